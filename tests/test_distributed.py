"""Two processes (gloo, CPU) with half the rows each train what one process with the whole batch trains."""

from __future__ import annotations

import math

import processes
import pytest
import tiny
import torch
from toy import TIMING, train_toy

from vfmlab import runs
from vfmlab.weights import io


def launch(root, wait=True, launcher="--multi_gpu", state="finished", **options):
    """`accelerate launch` of tests/tiny.py with two processes on the CPU."""
    process = processes.start(tiny.__file__, {"root": str(root), **options}, launcher)
    if not wait:
        return process
    output, _ = process.communicate(timeout=290)
    assert process.returncode == 0, output
    (run_dir,) = runs.scan(root)
    assert (run_dir.env()["processes"], run_dir.status().state) == (2, state), output
    return run_dir


def close(one, two, rtol=2e-4, atol=2e-6, later=1e-4):
    """Weights, averages and curves agree within rounding.

    All numbers of the first step, gradient norm included, agree to 1e-5. Adam then divides small gradients by their own
    size and so enlarges rounding errors: later numbers agree to `later`.
    """
    for path in ("model", "ema"):
        left, right = io.read(getattr(one, path))[0], io.read(getattr(two, path))[0]
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    for a, b in zip(one.metrics("step"), two.metrics("step"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {*TIMING, "kind"}:
            equal = math.isclose(a[key], b[key], rel_tol=1e-5 if a["step"] == 1 else later, abs_tol=1e-7)
            assert equal, (a["step"], key, a[key], b[key])


def test_two_processes_equal_one(tmp_path):
    """The toy, fp32: noise and data are the same rows of the same global batch, gradients are means over both."""
    options = {"norm": False, "precision": "fp32", "samples": 128, "clip": 0.5}
    two = launch(tmp_path / "two", kind="toy", **options)
    one, *_ = train_toy(tmp_path / "one", **options)
    close(one, two)
    assert two.metrics("step")[0]["grad_norm"] > 0.5, "clipping must have been at work"


@pytest.mark.parametrize(("kind", "optimizer"), [("game", "adamw"), ("diffusion", "adamw"), ("diffusion", "muon"), ("ar", "adamw")])
def test_two_processes_equal_one_for_real_parts(tmp_path, kind, optimizer):
    """Adaptive loss weights, equivariance and a discriminator included: choices and weights are those of the global batch."""
    overrides = {"train.precision": "fp32", "train.lr": 2e-4}
    if kind == "diffusion":
        overrides = {"diffusion.train.precision": "fp32", "diffusion.train.evaluate_at": [], "diffusion.train.optimizer": optimizer}
    if kind == "ar":  # dropout is drawn by each process for its own rows
        overrides = {"ar.train.precision": "fp32", "ar.train.evaluate_at": [], "ar.network.dropout": 0.0}
    two = launch(tmp_path / "two", kind=kind, overrides=overrides)
    one, _ = tiny.train_tiny(kind, tmp_path / "one", **overrides)
    # A bias before a norm has no gradient but rounding, which Adam makes steps of: 8 x lr bounds it. The curves tell more.
    close(one, two, rtol=2e-3, atol=2e-3 if kind == "game" else 5e-4, later=1e-2)
    if kind == "game":
        first, *_, last = one.metrics("step")
        assert first["weight_vf"] > 0
        assert "adversarial" not in first
        assert last["weight_adversarial"] > 0


@pytest.mark.parametrize(("kind", "optimizer"), [("diffusion", "muon"), ("ar", "adamw")])
def test_shares_of_two_processes_equal_one_and_resume(tmp_path, kind, optimizer):
    """FSDP: stopped once, gone on sharded, then by one process: the same curve and weights as never sharded."""
    measured = [32] if kind == "diffusion" else []
    overrides = {"precision": "fp32", "evaluate_at": measured, "preview_every": 32, "optimizer": optimizer, "clip": 0.1}
    overrides = {f"{kind}.train.{key}": value for key, value in overrides.items()}
    overrides |= {"ar.network.dropout": 0.0} if kind == "ar" else {}
    options = {"kind": kind, "overrides": overrides}
    two = launch(tmp_path / "two", launcher="--use_fsdp", state="interrupted", stops=[24, 48], **options)
    assert (two.env()["sharded"], two.status().samples) == (True, 48)
    whole, _ = tiny.train_tiny(kind, tmp_path / "one", **overrides)
    resumed, events = tiny.train_tiny(kind, tmp_path / "two", **overrides)
    assert [event.data["resumed"] for event in events if "resumed" in event.data] == [48]
    close(whole, resumed, rtol=2e-3, atol=5e-4, later=1e-2)
    assert [each.keys() for each in whole.metrics("evaluation")] == [each.keys() for each in two.metrics("evaluation")]
    assert len(list(two.images.iterdir())) == len(list(whole.images.iterdir())) > 0


def test_a_bad_step_is_skipped_by_all_and_ctrl_c_stops_all(tmp_path):
    """A loss that is not finite on one process only; then the launcher gets SIGINT: one checkpoint, no process left.

    The first process sends it from inside a step, so that nobody has to wait until training has come far enough.
    """
    process = launch(
        tmp_path, wait=False, kind="toy", norm=False, precision="fp32", samples=10**9, poison_rank=1, interrupt_step=9
    )
    output, _ = process.communicate(timeout=290)
    assert process.returncode, output
    (run_dir,) = runs.scan(tmp_path)
    assert run_dir.status().state == "interrupted", output
    (bad,) = run_dir.metrics(file="bad_steps.jsonl")
    assert bad["step"] == 4
    assert bad["indices"] == list(range(48, 64)), "the indices of both processes"
    state = torch.load(run_dir.checkpoints / "state.pt", weights_only=True)
    assert state["step"] >= 9
    assert state["step"] * 16 == run_dir.status().samples
    assert state["updates"] == state["step"] - 1
