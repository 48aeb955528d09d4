"""One step in pieces is the step that training takes: same images, same noise, same loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import COMMON, common
from torch.nn import functional

import vfmlab
from vfmlab import api, presets, runs
from vfmlab.diffusion import path
from vfmlab.errors import ConfigError
from vfmlab.plots import figures

LOGGED = {"train.samples": 16, "train.batch": 8, "train.log_every": 8, "train.precision": "fp32", "train.evaluate_at": []}
PRESETS = [name for name in presets.names() if presets.row(name).tier == "tiny" and presets.get(name).tokenizer is not None]


def small(name: str):
    recipe = presets.get(name)
    kind = "diffusion" if recipe.diffusion is not None else "ar" if recipe.ar is not None else None
    trained = kind is not None and getattr(recipe, kind).train is not None
    generator = {f"{kind}.{name}": value for name, value in LOGGED.items()} if trained else {}
    return api.resolve(name, {**common(recipe), **LOGGED, **generator})


@pytest.mark.parametrize("name", PRESETS)
def test_every_phase_of_every_preset_opens(name, tmp_path):
    """From fresh weights, without any run: the terms sum to the loss, and the table says where gradients go."""
    recipe = small(name)
    for phase in recipe.phases():
        step = vfmlab.open_step(phase, tmp_path, device="cpu")
        assert len(step.images) == 8
        assert step.images.abs().max() <= 1
        table = step.explain()
        rows = table.records
        assert {row["term"] for row in rows} == set(step.terms)
        assert sum(row["weight x value"] for row in rows) == pytest.approx(float(step.loss), rel=1e-5)
        assert sum(row["share"] for row in rows) == pytest.approx(1, rel=1e-4)
        assert any(value > 0 for row in rows for key, value in row.items() if key.startswith("gradient at"))
        assert len(figures.loss_terms(table.records).data) >= 2
        if phase.kind == "tokenizer":
            assert step.decoded.shape == step.reconstruction.target.shape
            assert step.posterior.mean.shape[0] == 8
        elif phase.kind == "ar":
            assert bool(step.note), "its tokenizer is not trained"
            loss = functional.cross_entropy(step.logits.float().flatten(0, 1), step.codes.flatten())
            assert float(loss) == float(step.loss)
            either = [step.tokenizer.codes(images).sort(1).values for images in (step.images, step.images.flip(-1))]
            for k, codes in enumerate(step.codes.sort(1).values):
                assert any(torch.equal(codes, whole[k]) for whole in either)
            assert {"gradient at block 1", "gradient at output"} <= set(rows[0])
            with pytest.raises(ConfigError, match="'velocity' is not part of a step of the phase 'ar'"):
                _ = step.velocity
        else:
            assert bool(step.note), "its tokenizer is not trained"
            t = step.t[:, None, None, None]
            if phase.diffusion.tune is None and isinstance(path.of(step.network), path.Linear):
                torch.testing.assert_close(step.noisy, step.z + t * step.target, atol=1e-5, rtol=1e-4)
            assert step.velocity.shape == step.target.shape
        step.loss.backward()
        left_out = any(parameter.grad is None for parameter in step.parameters)
        assert step.task.find_unused or not left_out, "several processes would end at the second step"
    assert not runs.scan(tmp_path), "looking leaves no run"


@pytest.mark.parametrize("name", ["tiny_va_vae", "tiny_vfm_vae_joint", "tiny_ar_orders"])
def test_the_loss_is_the_one_that_training_logs(name, tmp_path):
    """Exactly, at the first step of each phase, and at the next step of an interrupted run."""
    recipe = small(name)
    for event in itertools.chain(api.train(recipe, tmp_path, until="tokenizer"), api.train(recipe, tmp_path)):
        assert event.kind != "bad"
    for phase in recipe.phases():
        logged = runs.open_run(phase.id, tmp_path).metrics("step")[0]
        step = vfmlab.open_step(phase, tmp_path)
        assert step.note == ""
        assert float(step.loss) == logged["loss"]
        for key, value in step.pieces.metrics.items():
            assert float(value) == logged[key], key


def test_a_run_opens_at_its_next_step(tmp_path):
    recipe = api.resolve("tiny_va_vae", {**COMMON, **LOGGED})
    events = api.train(recipe, tmp_path, until="tokenizer")
    for event in events:
        if "loss" in event.data:
            events.close()  # saves
            break
    run = recipe.phases()[0].id
    step = vfmlab.open_step(run, tmp_path)
    assert step.number == 1
    list(api.train(recipe, tmp_path, until="tokenizer"))
    assert float(step.loss) == runs.open_run(run, tmp_path).metrics("step")[1]["loss"]
    assert vfmlab.open_step(run[:-5], tmp_path).number == vfmlab.open_step(run, tmp_path).number


def test_ten_lines_by_hand_learn(tmp_path):
    step = vfmlab.open_step("tiny_plain_vae", tmp_path, {**COMMON, **LOGGED}, device="cpu")
    optimizer, losses = torch.optim.Adam(step.parameters, lr=1e-2), []
    for _ in range(8):
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(float(step.loss))
        step = step.next()
    assert step.number == 8
    assert losses[-1] < losses[0]


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ConfigError, match="phase = 'difusion'.*did you mean|phase = 'difusion'.*diffusion"):
        vfmlab.open_step("tiny_plain_vae", tmp_path, phase="difusion")
    with pytest.raises(ConfigError, match="'velocity' is not part of a step of the phase 'tokenizer', but .* 'diffusion'"):
        _ = vfmlab.open_step("tiny_plain_vae", tmp_path, COMMON).velocity
    with pytest.raises(ConfigError, match="phase 'pretrain' cannot be opened"):
        vfmlab.open_step(next(name for name in presets.names() if presets.get(name).pretrain is not None), tmp_path)
