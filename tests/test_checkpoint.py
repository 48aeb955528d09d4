"""Checkpoints: three files that fit together or the ones before, and one clear line for anything broken."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
from io import FileIO

import pytest
import torch
import toy
from torch import nn
from toy import ToyTask, toy_run, train_toy

from vfmlab import runs
from vfmlab.errors import CheckpointError, TrainingError
from vfmlab.training import checkpoint
from vfmlab.training.loop import fit
from vfmlab.weights import io


@pytest.fixture
def run_dir(tmp_path):
    return runs.create(toy_run(), tmp_path)


def save(run_dir, step, value=None):
    value = float(step) if value is None else value
    tensors = {"a": torch.full((4,), value)}
    checkpoint.save(run_dir, tensors, tensors, {"step": step}, {"samples": step})


def content(run_dir):
    model, ema, state = checkpoint.load(run_dir)
    return model["a"][0].item(), ema["a"][0].item(), state["step"]


def test_save_and_load(run_dir):
    assert checkpoint.load(run_dir) is None
    save(run_dir, 1)
    save(run_dir, 2)
    assert content(run_dir) == (2.0, 2.0, 2)
    assert sorted(os.listdir(run_dir.checkpoints)) == ["ema.safetensors", "model.safetensors", "state.pt"]
    _, metadata = io.read(run_dir.ema)
    assert metadata == {"format": "vfmlab/1", "run_id": run_dir.id, "kind": "pretrain", "step": "2", "samples": "2"}


@pytest.mark.parametrize("failing", range(12))
def test_killed_at_any_rename(run_dir, monkeypatch, failing):
    """Whatever rename the process dies at, what is loaded is one whole checkpoint: the old or the new."""
    save(run_dir, 1)
    calls, replace = [], os.replace

    def dies(*paths):
        calls.append(paths)
        if len(calls) > failing:
            raise SystemError("killed")
        replace(*paths)

    monkeypatch.setattr(os, "replace", dies)
    try:
        save(run_dir, 2)
        whole = True
    except SystemError:
        whole = False
    monkeypatch.undo()
    checkpoint.recover(run_dir)
    step = content(run_dir)[2]
    assert content(run_dir) == (float(step), float(step), step)
    assert step == (2 if failing >= 3 else 1)  # three renames make the .new files complete
    assert whole == (failing >= 6)
    assert not list(run_dir.checkpoints.glob("*.new"))


@pytest.mark.parametrize("file", range(3))
def test_full_disk(run_dir, monkeypatch, file):
    """A disk that fills while any of the three files is written: one line, the old checkpoint, no leftovers."""
    save(run_dir, 1)
    writes = []

    def full(real):
        def write(*args, **kwargs):
            writes.append(args)
            if len(writes) > file:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return write

    monkeypatch.setattr(io, "save_file", full(io.save_file))
    monkeypatch.setattr(torch, "save", full(torch.save))
    with pytest.raises(TrainingError, match=r"disk full while writing .*earlier files are intact") as caught:
        save(run_dir, 2)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert content(run_dir) == (1.0, 1.0, 1)
    assert sorted(os.listdir(run_dir.checkpoints)) == ["ema.safetensors", "model.safetensors", "state.pt"]


FULL_DISK = """
import os, pathlib
from toy import ToyTask, fit, runs, toy_run
from vfmlab.errors import TrainingError
from vfmlab.weights import io

root, run = pathlib.Path("disk"), toy_run(samples=128)
run_dir = runs.create(run, root)
list(fit(ToyTask(run), run_dir, until=64, device="cpu"))
try:
    with open(root / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(512))
except OSError:
    pass
try:
    list(fit(ToyTask(run), run_dir, device="cpu"))
except TrainingError as error:
    message = str(error)
assert "disk full while writing" in message and "\\n" not in message, message
assert sorted(os.listdir(run_dir.checkpoints)) == ["ema.safetensors", "model.safetensors", "state.pt"]
os.unlink(root / "filler")
events = list(fit(ToyTask(run), run_dir, device="cpu"))
assert events[0].data["resumed"] == 64 and events[-1].kind == "finish", events
"""


def test_a_really_full_disk(tmp_path):
    """A small file system of our own, filled to the brim while a run trains on it; space freed, the run goes on."""
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=512k tmpfs disk || exit 77; exec "$0" -c "$1"'
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, sys.executable, FULL_DISK]
    env = {**os.environ, "PYTHONPATH": os.path.dirname(toy.__file__)}
    try:
        done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=250)
    except FileNotFoundError:
        pytest.skip("no 'unshare' here to make a small file system with")
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"making a small file system is not permitted here: {done.stderr.strip()[:100]}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", [0, 100, 600, 1500, 3000, 4000, 5000])
def test_a_disk_that_fills_anywhere_inside_the_state(run_dir, monkeypatch, room):
    """torch's writer puts an error of its own over the system's, depending on where in the file it happens."""
    save(run_dir, 1)

    class Full(FileIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(checkpoint, "open", lambda path, mode="r": Full(path, mode), raising=False)
    tensors = {"a": torch.zeros(4)}
    state = {"step": 2, "optimizer": [torch.zeros(300) for _ in range(5)]}
    with pytest.raises(TrainingError, match="disk full while writing .*state"):
        checkpoint.save(run_dir, tensors, tensors, state, {"samples": 2})
    monkeypatch.undo()
    assert content(run_dir) == (1.0, 1.0, 1)
    assert sorted(os.listdir(run_dir.checkpoints)) == ["ema.safetensors", "model.safetensors", "state.pt"]


def test_torch_reports_a_full_device(run_dir, monkeypatch):
    """The state file's way to the disk keeps the system's error, which torch's own writer hides."""
    save(run_dir, 1)
    if not os.path.exists("/dev/full"):
        pytest.skip("the system has no /dev/full")
    real_open = open

    def opened(path, mode="r"):
        real_open(path, mode).close()
        return real_open("/dev/full", mode) if mode == "wb" else real_open(path, mode)

    monkeypatch.setattr(checkpoint, "open", opened, raising=False)
    with pytest.raises(TrainingError, match="disk full"):
        save(run_dir, 2)
    monkeypatch.undo()
    assert content(run_dir) == (1.0, 1.0, 1)


def test_training_on_a_full_disk_fails_clearly_and_goes_on_later(tmp_path, monkeypatch):
    run = toy_run(samples=128)
    run_dir = runs.create(run, tmp_path)
    real, calls = io.save_file, []

    def full(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(TrainingError, match="disk full"):
        list(fit(ToyTask(run), run_dir, device="cpu"))
    monkeypatch.undo()
    assert run_dir.status().state == "failed"
    assert "disk full" in run_dir.status().message
    events = list(fit(ToyTask(run), run_dir, device="cpu"))
    assert events[0].data["resumed"] == 64
    assert events[-1].kind == "finish"


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    return train_toy(tmp_path_factory.mktemp("half"), samples=64, until=32, checkpoint_every=32)[0]


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "missing", "noise"])
def test_damaged_files_are_one_clear_line(tmp_path, half_way, name, damage):
    run_dir = runs.RunDir(shutil.copytree(half_way.path, tmp_path / half_way.id))
    path = run_dir.checkpoints / name
    before = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        half, pickled, noise = before[: len(before) // 2], pickle.dumps({"step": os.getcwd}), bytes(range(256)) * 8
        path.write_bytes({"truncated": half, "empty": b"", "pickle": pickled, "noise": noise}[damage])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        next(fit(ToyTask(run_dir.config()), run_dir, device="cpu"))
    message = str(caught.value)
    assert "\n" not in message
    assert ("start the run anew" in message) or ("again" in message) or ("convert" in message)
    assert run_dir.status().state == "failed"
    path.write_bytes(before)  # a copy put back: the run goes on
    if damage == "missing":
        assert list(fit(ToyTask(run_dir.config()), run_dir, device="cpu"))[-1].kind == "finish"


@pytest.mark.parametrize("name", ["model", "ema"])
def test_weights_of_another_step_are_refused(run_dir, name):
    save(run_dir, 1)
    path = getattr(run_dir, name)
    old = path.read_bytes()
    save(run_dir, 2)
    path.write_bytes(old)
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors is of step 1, state\.pt of 2"):
        checkpoint.load(run_dir)


def test_load_weights_is_strict(tmp_path):
    io.write(tmp_path / "w.safetensors", nn.Linear(3, 4).state_dict(), {})
    assert io.load_file(nn.Linear(3, 4), tmp_path / "w.safetensors") == {}
    with pytest.raises(CheckpointError, match=r"1 of another shape: weight \[4, 3\] instead of \[4, 2\]"):
        io.load_file(nn.Linear(2, 4), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="1 unexpected: bias"):
        io.load_file(nn.Linear(3, 4, bias=False), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"2 missing: 0\.weight, 0\.bias; 2 unexpected"):
        io.load_file(nn.Sequential(nn.Linear(3, 4)), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="no file"):
        io.load_file(nn.Linear(3, 4), tmp_path / "absent.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_unopened(tmp_path, zipped):
    path = tmp_path / "weights.safetensors"
    torch.save({"weight": torch.zeros(1)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"is a pickle.*convert it to safetensors"):
        io.read(path)


def test_compiler_prefixes_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="_orig_mod"):
        io.write(tmp_path / "w.safetensors", {"_orig_mod.weight": torch.zeros(1)}, {})


def test_channels_last_and_tied_weights_round_trip(tmp_path):
    module = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)})
    module["b"] = module["a"]
    io.write(tmp_path / "w.safetensors", module.state_dict(), {})
    other = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3)})
    io.load_file(other, tmp_path / "w.safetensors")
    assert torch.equal(other["b"].weight, module["a"].weight)
