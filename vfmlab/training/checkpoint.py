"""Checkpoints: weights as safetensors for everybody, training state for the loop, both or neither after a
crash.

    checkpoints/model.safetensors  weights as trained
                ema.safetensors    their average, what the rest of the project uses
                state.pt           optimiser, step, guards, parts outside the weights; read with
                weights_only=True

A checkpoint is a set of three files. All three are first written beside, as `*.new`, the state last: from
then on the new checkpoint counts, and :func:`recover` finishes the renames if the process dies between them.
Before that moment the old checkpoint is untouched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmlab import runs
from vfmlab.config import files
from vfmlab.errors import CheckpointError
from vfmlab.weights import io

FORMAT = "vfmlab/1"
# in the order of the renames: the state is the last
FILES = ("model.safetensors", "ema.safetensors", "state.pt")


def save(run_dir: runs.RunDir, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], state: Any,
         metadata: dict[str, Any]) -> None:
    """Replace the run's checkpoint. state: anything that `torch.load(weights_only=True)` reads, with an int
    "step".

    A full disk raises :class:`vfmlab.errors.TrainingError`; the old checkpoint is then intact and nothing is
    left over.
    """
    recover(run_dir)
    folder = run_dir.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    step = {"format": FORMAT, "run_id": run_dir.id, "kind": run_dir.kind, "step": state["step"], **metadata}
    try:
        io.write(folder / "model.safetensors.new", model, step)
        io.write(folder / "ema.safetensors.new", ema, step)
        # Through a file of Python's: torch's own writer hides that the disk is full.
        with runs.beside(folder / "state.pt.new") as temporary, open(temporary, "wb") as handle:
            torch.save(state, handle)
    except BaseException:
        recover(run_dir)
        raise
    recover(run_dir)


def recover(run_dir: runs.RunDir) -> None:
    """Bring `checkpoints/` into one piece: finish a complete new checkpoint, remove an incomplete one."""
    folder = run_dir.checkpoints
    complete = (folder / "state.pt.new").exists()
    for name in FILES:
        new = folder / f"{name}.new"
        if new.exists():
            if complete:
                os.replace(new, folder / name)
            else:
                new.unlink()
    if complete:
        files.sync(folder)


def load_state(run_dir: runs.RunDir) -> dict[str, Any] | None:
    """The training state alone; None for runs without one (imported weights)."""
    path = run_dir.checkpoints / FILES[2]
    return _read_state(path, run_dir) if path.exists() else None


def load(run_dir: runs.RunDir) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]] | None:
    """(model tensors, EMA tensors, state) of the run's checkpoint, or None before the first one."""
    paths = [run_dir.checkpoints / name for name in FILES]
    if not any(path.exists() for path in paths):
        return None
    if missing := [path.name for path in paths if not path.exists()]:
        raise CheckpointError(f"run '{run_dir.id}' lacks checkpoints/{missing[0]}; {_way_out(run_dir)}")
    state = _read_state(paths[2], run_dir)
    (model, facts), (ema, averaged) = io.read(paths[0]), io.read(paths[1])
    for path, step in ((paths[0], facts.get("step")), (paths[1], averaged.get("step"))):
        if step != str(state["step"]):
            raise CheckpointError(f"run '{run_dir.id}': {path.name} is of step {step}, state.pt of "
                                  f"{state['step']}; {_way_out(run_dir)}")
    return model, ema, state


def _read_state(path: Path, run_dir: runs.RunDir) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: RuntimeError, UnpicklingError, EOFError, ...
        reason = str(error).splitlines()[0][:90] if str(error) else type(error).__name__
        raise CheckpointError(
            f"'{path}' is truncated or unsafe to read ({reason}); {_way_out(run_dir)}") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"'{path}' is not a training state; {_way_out(run_dir)}")
    return _renamed(state)


def _renamed(state: dict[str, Any]) -> dict[str, Any]:
    """A state as this version names its parts; earlier ones called discriminators opponents, and their
    objectives games."""
    if "opponent" in state:
        weights = state.pop("opponent")
        state["discriminators"] = {key.replace("games.", "objectives.", 1): value
                                   for key, value in weights.items()}
        state["discriminator_optimizer"] = state.pop("opponent_optimizer")
    return state


def _way_out(run_dir: runs.RunDir) -> str:
    return f"put a copy back, or remove '{run_dir.checkpoints}' to start the run anew"
