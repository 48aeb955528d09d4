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

pytestmark = pytest.mark.timeout(900)

# What two processes train: name -> job of tests/tiny.py. One launcher and one import serve all jobs of a kind.
TOY = {"norm": False, "precision": "fp32", "samples": 128, "clip": 0.5}
GAME = {"train.precision": "fp32", "train.lr": 2e-4}
DIFFUSION = {"diffusion.train.precision": "fp32", "diffusion.train.evaluate_at": []}
AR = {"ar.train.precision": "fp32", "ar.network.dropout": 0.0}  # dropout is drawn by each process for its own rows
WHOLE = {
    "toy": {"kind": "toy", **TOY},
    "game": {"kind": "game", "overrides": GAME},
    "adamw": {"kind": "diffusion", "overrides": DIFFUSION | {"diffusion.train.optimizer": "adamw"}},
    "muon": {"kind": "diffusion", "overrides": DIFFUSION | {"diffusion.train.optimizer": "muon"}},
    "ar": {"kind": "ar", "overrides": AR | {"ar.train.evaluate_at": []}},
}
STEPS = {"preview_every": 32, "clip": 0.1}
SHARED = {
    "muon": {"kind": "diffusion", "overrides": DIFFUSION | {f"diffusion.train.{key}": value for key, value in {
        **STEPS, "evaluate_at": [32], "optimizer": "muon"}.items()}},
    "ar": {"kind": "ar", "overrides": AR | {f"ar.train.{key}": value for key, value in {
        **STEPS, "evaluate_at": [], "optimizer": "adamw"}.items()}},
}  # fmt: skip


def launch(folder, jobs, launcher, **more):
    """`accelerate launch` of all jobs with two processes on the CPU, each job in a folder of its name below `folder`."""
    told = [{"root": str(folder / name), "port": processes.free_port(), **job, **more} for name, job in jobs.items()]
    process = processes.start(tiny.__file__, told, launcher)
    output, _ = process.communicate(timeout=800)  # of all jobs, on a busy machine
    assert process.returncode == 0, output
    return folder, output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every process has the whole model."""
    return launch(tmp_path_factory.mktemp("whole"), WHOLE, "--multi_gpu")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Every process has a share of the model (FSDP), and stops twice."""
    return launch(tmp_path_factory.mktemp("shared"), SHARED, "--use_fsdp", stops=[24, 48])


def trained(launched, name, state="finished"):
    folder, output = launched
    assert [(folder / f"{name}.{rank}").read_text() for rank in (0, 1)] == ["0", "0"], output
    (run_dir,) = runs.scan(folder / name)
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


def test_two_processes_equal_one(whole, tmp_path):
    """The toy, fp32: noise and data are the same rows of the same global batch, gradients are means over both."""
    two = trained(whole, "toy")
    one, *_ = train_toy(tmp_path, **TOY)
    close(one, two)
    assert two.metrics("step")[0]["grad_norm"] > 0.5, "clipping must have been at work"


@pytest.mark.parametrize("name", list(WHOLE)[1:])
def test_two_processes_equal_one_for_real_parts(whole, tmp_path, name):
    """Adaptive loss weights, equivariance and a discriminator included: choices and weights are those of the global batch."""
    two, (kind, overrides) = trained(whole, name), WHOLE[name].values()
    one, _ = tiny.train_tiny(kind, tmp_path, **overrides)
    # A bias before a norm has no gradient but rounding, which Adam makes steps of: 8 x lr bounds it. The curves tell more.
    close(one, two, rtol=2e-3, atol=2e-3 if kind == "game" else 5e-4, later=1e-2)
    if kind == "game":
        first, *_, last = one.metrics("step")
        assert first["weight_vf"] > 0
        assert "adversarial" not in first
        assert last["weight_adversarial"] > 0


@pytest.mark.parametrize("name", SHARED)
def test_shares_of_two_processes_equal_one_and_resume(shared, tmp_path, name):
    """FSDP: stopped once, gone on sharded, then by one process: the same curve and weights as never sharded."""
    two, (kind, overrides) = trained(shared, name, "interrupted"), SHARED[name].values()
    assert (two.env()["sharded"], two.status().samples) == (True, 48)
    one, _ = tiny.train_tiny(kind, tmp_path, **overrides)
    resumed, events = tiny.train_tiny(kind, shared[0] / name, **overrides)
    assert [event.data["resumed"] for event in events if "resumed" in event.data] == [48]
    close(one, resumed, rtol=2e-3, atol=5e-4, later=1e-2)
    assert [each.keys() for each in one.metrics("evaluation")] == [each.keys() for each in two.metrics("evaluation")]
    assert len(list(two.images.iterdir())) == len(list(one.images.iterdir())) > 0


def test_a_bad_step_is_skipped_by_all_and_ctrl_c_stops_all(tmp_path):
    """A loss that is not finite on one process only; then the launcher gets SIGINT: one checkpoint, no process left.

    The first process sends it from inside a step, so that nobody has to wait until training has come far enough.
    """
    job = {"kind": "toy", **TOY, "samples": 10**9, "poison_rank": 1, "interrupt_step": 9}
    process = processes.start(tiny.__file__, {"root": str(tmp_path), **job})
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
