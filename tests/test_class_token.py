"""The probe of VFMTok's paper: classes from the class token of the feature decoder."""

from __future__ import annotations

import pytest
import torch
from evaluation_toys import CFG, Lossless, Toy

from vfmlab import api, config, presets
from vfmlab.evaluation import subject
from vfmlab.evaluation.instruments import base as bench
from vfmlab.evaluation.instruments.class_token import class_tokens
from vfmlab.evaluation.reference import Reference
from vfmlab.tokenizers.base import Statistics

PROTOCOL = config.Protocol(n=60, batch=25)


def of(tokenizer) -> subject.Subject:
    return subject.of_tokenizer(tokenizer, CFG, PROTOCOL, Reference(Toy()))


@pytest.fixture
def vfmtok():
    torch.manual_seed(0)
    tokenizer = api.build_tokenizer(presets.get("tiny_vfmtok").phases()[0]).eval()
    tokenizer.set_statistics(Statistics(torch.linspace(-0.2, 0.2, 4), torch.linspace(0.4, 0.6, 4), 10, "toy"))
    return tokenizer


@torch.no_grad()
def test_class_tokens_are_those_of_the_feature_branch(vfmtok):
    raw = vfmtok.posterior(torch.rand(3, 3, 16, 16) * 2 - 1).mode()
    read = class_tokens(of(vfmtok), vfmtok.normalise(raw))
    token, _ = vfmtok.decoder.features(vfmtok.memory(raw))
    assert read.shape == (3, 16)
    torch.testing.assert_close(read, token, rtol=1e-4, atol=1e-5)


def test_the_probe_reads_the_token_and_not_the_latent(vfmtok, monkeypatch):
    """A token that is the class gives every class; one that says nothing gives chance, on the same latents."""
    s = of(vfmtok)
    labels = {len(maps): maps.labels for maps in (s.training, s.held_out)}
    for token, right in ((lambda z: torch.nn.functional.one_hot(labels[len(z)], 20).float() + 0.01 * torch.randn(len(z), 20), True),
                         (lambda z: torch.randn(len(z), 20), False)):
        monkeypatch.setattr("vfmlab.evaluation.instruments.class_token.BATCH", 10**6)
        monkeypatch.setattr(vfmtok, "class_token", token)
        number = bench.measure(s, ["class_token"])["probe_class_token"]
        assert (number.value > 0.9) == right
        assert number.n == 60
        assert number.better == "higher"


def test_a_tokenizer_without_one_says_so():
    number = bench.measure(of(Lossless()), ["class_token"])["probe_class_token"]
    assert number.absent
    assert "'lossless' has no feature decoder with a class token; vfmtok has one" in number.reason
