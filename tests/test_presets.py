"""Every tokenizer has presets at every tier, and every `tiny` preset runs through all its phases to samples and numbers."""

from __future__ import annotations

import math

import pytest
from tiny import COMMON

from vfmlab import api, presets, runs
from vfmlab.config import override
from vfmlab.registry import TOKENIZERS

TIERS = ("tiny", "pocket", "small", "paper")
TINY = [name for name in presets.names() if name.startswith("tiny_")]
SHORT = COMMON | {"train.samples": 16, "diffusion.train.samples": 16, "diffusion.train.evaluate_at": []}


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("method", TOKENIZERS.names())
def test_every_tokenizer_has_a_preset(method, tier):
    run = presets.get(f"{tier}_{method}")
    assert (run.tokenizer.method, run.tier) == (method, tier)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_says_its_command(name):
    function = presets.function(name)
    assert f"vfmlab train {name}" in function.__doc__ or f"vfmlab import {name}" in function.__doc__, "docstring: command, cost, expectation"
    assert presets.get(name).name == name


@pytest.mark.parametrize("name", TINY)
def test_tiny_runs_to_samples_and_numbers(name, tmp_path):
    run = override(presets.get(name), SHORT)
    for _ in api.train(run, tmp_path):
        pass
    for phase in run.phases():
        assert runs.open_run(phase.id, tmp_path).status().state == "finished"
    *_, last = api.sample(run.id, [0, 1], root=tmp_path, previews=0)
    assert last.images.shape == (2, 3, 16, 16)
    report = api.evaluate(run.id, tmp_path)
    assert all(math.isfinite(report["metrics"][key]["value"]) for key in ("gfd", "rfd", "psnr"))
