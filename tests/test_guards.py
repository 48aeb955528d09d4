"""Bad steps are skipped and written down, and a few in a row end the run; nothing is repaired in silence."""

from __future__ import annotations

import math

import pytest
import torch
from toy import ToyTask, outcome, toy_run, train_toy

from vfmlab import runs
from vfmlab.config import Train
from vfmlab.errors import TrainingError
from vfmlab.training import loop
from vfmlab.training.guards import ENOUGH, Guard
from vfmlab.training.loop import fit
from vfmlab.weights import io


def guard(**changes):
    return Guard(Train(samples=100, **changes))


def check(keeper, loss, gradient, parameters):
    return keeper.reason_to_skip({"loss": loss, "grad_norm": gradient, "parameter_norm": parameters})


@pytest.mark.parametrize(
    ("loss", "gradient", "parameters", "reason"),
    [
        (math.nan, 1.0, 1.0, "loss is nan"),
        (math.inf, 1.0, 1.0, "loss is inf"),
        (1.0, math.nan, 1.0, "gradient norm is nan"),
        (1.0, math.inf, 1.0, "gradient norm is inf"),
        (1.0, 0.0, 1.0, "gradients are zero"),
        (1.0, 1.0, math.nan, "parameters are not finite"),
        (2001.0, 1.0, 1.0, "more than 1000 times its running median 2"),
        (-2001.0, 1.0, 1.0, "more than 1000 times its running median 2"),
    ],
)
def test_each_reason(loss, gradient, parameters, reason):
    keeper = guard()
    for _ in range(ENOUGH):
        assert check(keeper, 2.0, 1.0, 1.0) is None
    assert reason in check(keeper, loss, gradient, parameters)
    assert check(keeper, 1999.0, 1.0, 1.0) is None  # a bad step leaves the median as it was
    assert keeper.in_a_row == 0
    assert keeper.total == 1


def test_patience_and_state():
    keeper = guard(guard_patience=2)
    keeper.check_patience(check(keeper, math.nan, 1.0, 1.0), "x")
    copy = guard(guard_patience=2)
    copy.load_state_dict(keeper.state_dict())
    for one in (keeper, copy):
        with pytest.raises(TrainingError, match=r"2 bad steps in a row.*loss is nan; try a lower train\.lr.*see x"):
            one.check_patience(check(one, math.nan, 1.0, 1.0), "x")


def test_a_planted_nan_is_skipped_and_written_down(tmp_path):
    run_dir, events, _ = train_toy(tmp_path, poison={5: math.nan})
    (record,) = run_dir.metrics(file="bad_steps.jsonl")
    assert record["step"] == 6
    assert record["seed"] == 0
    assert record["reason"] == "loss is nan"
    assert record["indices"] == list(range(80, 96))
    assert events[-1].kind == "finish"
    last = run_dir.metrics("step")[-1]
    assert last["bad_steps"] == 1
    assert last["ema_samples"] == 240
    assert all(math.isfinite(record["loss"]) for record in run_dir.metrics("step"))
    assert any(record["samples"] == 96 for record in run_dir.metrics("step"))


def test_a_skipped_step_changes_no_parameter(tmp_path):
    """Steps 0-2, then a bad one: the weights are those after step 2."""
    good, *_ = train_toy(tmp_path / "good", norm=False, until=48)
    bad, *_ = train_toy(tmp_path / "bad", norm=False, until=64, poison={3: math.inf})
    left, right = (outcome(run)["state"]["optimizer"] for run in (good, bad))
    assert left == right
    for name in ("model", "ema"):
        one, other = io.read(getattr(good, name))[0], io.read(getattr(bad, name))[0]
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_inputs_that_are_not_numbers_leave_no_trace(tmp_path):
    """Batch norm's running statistics are changed by the forward itself: a skipped step takes that back."""
    run = toy_run(samples=64)
    task, run_dir = ToyTask(run), runs.create(run, tmp_path)
    task.spoilt = (2,)
    list(fit(task, run_dir, device="cpu"))
    assert [record["step"] for record in run_dir.metrics(file="bad_steps.jsonl")] == [3]
    for path in (run_dir.model, run_dir.ema):
        tensors, _ = io.read(path)
        assert all(torch.isfinite(value).all() for value in tensors.values())
        assert tensors["encoder.1.num_batches_tracked"] == 3


@pytest.mark.parametrize(("factor", "reason"), [(math.nan, "loss is nan"), (0.0, "are zero"), (1e7, "running")])
def test_patience_ends_the_run_and_keeps_the_checkpoint(tmp_path, factor, reason):
    run = toy_run(guard_patience=3)
    run_dir = runs.create(run, tmp_path)
    poison = dict.fromkeys(range(9, 16), factor)
    with pytest.raises(TrainingError, match=f"3 bad steps in a row.*{reason}.*bad_steps"):
        list(fit(ToyTask(run, poison=poison), run_dir, device="cpu"))
    assert [record["step"] for record in run_dir.metrics(file="bad_steps.jsonl")] == [10, 11, 12]
    status = run_dir.status()
    assert status.state == "failed"
    assert reason in status.message
    assert torch.load(run_dir.checkpoints / "state.pt", weights_only=True)["step"] == 8


def test_guards_resume_exactly(tmp_path):
    """A run stopped between two bad steps keeps count: it ends where the uninterrupted one ends."""
    run = toy_run(guard_patience=3)
    run_dir = runs.create(run, tmp_path)
    poison = dict.fromkeys(range(9, 12), math.nan)
    list(fit(ToyTask(run, poison=poison), run_dir, until=16 * 11, device="cpu"))
    with pytest.raises(TrainingError, match="3 bad steps in a row"):
        list(fit(ToyTask(run, poison=poison), run_dir, device="cpu"))
    assert [record["step"] for record in run_dir.metrics(file="bad_steps.jsonl")] == [10, 11, 12]


def test_broken_parameters_are_never_saved(tmp_path):
    run = toy_run(checkpoint_every=32)
    run_dir = runs.create(run, tmp_path)
    task = ToyTask(run)
    events = fit(task, run_dir, device="cpu")
    for event in events:
        if event.kind == "checkpoint" and event.samples == 64:
            break
    with torch.no_grad():
        task.weights.decoder.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match="weights are not finite"):
        list(events)
    assert run_dir.status().state == "failed"
    assert all(torch.isfinite(value).all() for value in io.read(run_dir.model)[0].values())


def test_a_run_that_took_no_step_is_failed(tmp_path):
    """Fewer steps than the guards' patience, all skipped: nothing was learned, so nothing is finished."""
    run = toy_run(samples=64, guard_patience=5)
    run_dir = runs.create(run, tmp_path)
    for _ in range(2):  # and so it stays when it is started again
        with pytest.raises(TrainingError, match="none of the 4 steps could be taken"):
            list(fit(ToyTask(run, poison=dict.fromkeys(range(4), math.nan)), run_dir, device="cpu"))
        assert run_dir.status().state == "failed"
    assert not (run_dir.path / "finished.txt").exists()


def test_steps_that_the_scaler_of_fp16_skips_are_no_steps_of_the_average(tmp_path, monkeypatch):
    """A fused optimiser is called in an overflow, too, and does nothing by itself: neither average nor means may count it."""
    make = loop.make_accelerator

    def half(*args):  # as on a GPU: accelerate takes fp16 there only
        accelerator = make(*args)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**24)
        accelerator.state._mixed_precision = "fp16"
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", half)
    run_dir, *_ = train_toy(tmp_path, norm=False, precision="fp32", samples=256, log_every=256)
    state = torch.load(run_dir.checkpoints / "state.pt", weights_only=True)
    skipped = round(24 - math.log2(state["scaler"]["scale"]))
    assert 0 < skipped < 16
    assert state["updates"] == state["step"] - skipped == 16 - skipped
    (record,) = run_dir.metrics("step")
    assert math.isfinite(record["grad_norm"])
