"""Key steps of a reused encoder: the published lists, and what runs at them."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from vfmlab.config import Guidance, Sampler
from vfmlab.diffusion.ddt import DDT
from vfmlab.diffusion.reuse import KEYS_50, Reused, groups
from vfmlab.diffusion.sampling import sample
from vfmlab.seeding import SampleRandom


def ddt():
    torch.manual_seed(0)
    network = DDT(DDT.Config(width=16, depth=1, heads=2, head_width=16, head_depth=1, head_heads=2), (4, 4, 4), 3)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network


def test_groups_as_published(golden):
    c = json.loads((golden / "continuous" / "formulas.json").read_text())["faster_diffusion"]
    assert list(KEYS_50) == c["keys_50"]
    assert groups(KEYS_50, 50) == c["groups_50"]
    assert groups(range(0, 50, 4), 50) == c["mod4_groups"]


@torch.no_grad()
def test_the_encoder_runs_at_key_steps():
    reused, x = Reused(ddt(), KEYS_50), torch.randn(2, 4, 4, 4)
    for k in range(50):
        reused(x, torch.full((2,), 1 - k / 50), torch.tensor([0, 1]))
    assert (reused.encodings, reused.evaluations) == (9, 50)


def test_lists_and_strides_agree():
    network, labels = ddt(), torch.tensor([0, 1])

    def draw(reuse):
        return sample(network, labels, SampleRandom(0, range(2)), Sampler(steps=6, reuse=reuse), Guidance())

    assert torch.equal(draw((0, 2, 4)), draw(2))
    assert torch.equal(draw(tuple(range(6))), draw(None))
    assert not torch.allclose(draw((0, 1, 2)), draw((0, 3, 4)))
    for keys in ((), (1, 2), (0, 2, 2), (0, 3, 1)):
        with pytest.raises(ValidationError, match="key steps rise from 0"):
            Sampler(reuse=keys)
