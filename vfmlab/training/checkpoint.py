"""Checkpoints: weights as safetensors for everybody, training state for the loop, both or neither after a crash.

    checkpoints/model.safetensors  weights as trained
                ema.safetensors    their average, what the rest of the project uses
                state.pt           optimiser, step, guards, parts outside the weights; read with weights_only=True

A checkpoint is a set of three files. All three are first written beside, as `*.new`, the state last: from then on the
new checkpoint counts, and :func:`recover` finishes the renames if the process dies between them. Before that moment the
old checkpoint is untouched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vfmlab import runs
from vfmlab.errors import CheckpointError

FORMAT = "vfmlab/1"
FILES = ("model.safetensors", "ema.safetensors", "state.pt")  # in the order of the renames: the state is the last


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors (contiguous, on the CPU) with `metadata` as text; beside, then renamed."""
    keys = [key for key in tensors if "_orig_mod" in key]
    if keys:
        raise CheckpointError(f"weights carry a compiler's prefix ('{keys[0]}'); save the module that is not compiled")
    cpu = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    with runs.beside(path) as temporary:
        save_file(cpu, temporary, {key: str(value) for key, value in metadata.items()})


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file; :class:`CheckpointError` for anything else."""
    return _open(path, lambda file: ({key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})))  # noqa: SIM118


def _open(path: str | Path, read: Callable[[Any], Any]) -> Any:
    path = Path(path)
    try:
        with open(path, "rb") as handle:
            head = handle.read(9)
    except OSError as error:
        raise CheckpointError(f"no weights at '{path}': {error.strerror}") from None
    if (head[:2] == b"PK" or head[:1] == b"\x80") and head[8:] != b"{":  # safetensors begin with a length, which may be any, and a brace
        raise CheckpointError(f"'{path}' is a pickle, which can run code when read; convert it to safetensors first")
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"'{path}' ({size} bytes) is truncated or not safetensors ({error}); copy it again, or train the run again"
        ) from None


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a weights file, without its tensors."""
    return _open(path, lambda file: dict(file.metadata() or {}))


def load_weights(module: nn.Module, path: str | Path) -> dict[str, str]:
    """Load a safetensors file into `module`, strictly; returns the file's metadata.

    Raises :class:`CheckpointError`, one line, when names or shapes differ.
    """
    tensors, metadata = read_weights(path)
    put(module, tensors, f"'{path}'")
    return metadata


def put(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """`module.load_state_dict(tensors)`, strict, with one-line messages."""
    if hasattr(module, "adapt"):  # tokenizers, whose statistics have two forms
        module.adapt(tensors)
    check(module.state_dict(), tensors, where)
    module.load_state_dict(tensors)


def check(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """:class:`CheckpointError` unless both hold the same names and shapes."""
    missing, strange = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    if missing or strange:
        what = f"lacks '{missing[0]}'" if missing else f"holds '{strange[0]}', which the model has not"
        more = f" (and {len(missing) + len(strange) - 1} more names differ)" if len(missing) + len(strange) > 1 else ""
        raise CheckpointError(f"{where} {what}{more}; it belongs to another config or version")
    if shapes:
        key = min(shapes)
        raise CheckpointError(
            f"{where}: '{key}' has shape {tuple(tensors[key].shape)}, the model {tuple(own[key].shape)} "
            f"({len(shapes)} shapes differ); use the config that the weights were trained with"
        )


def save(
    run_dir: runs.RunDir, model: Mapping[str, Tensor], ema: Mapping[str, Tensor], state: Any, metadata: dict[str, Any]
) -> None:
    """Replace the run's checkpoint. state: anything that `torch.load(weights_only=True)` reads, with an int "step".

    A full disk raises :class:`vfmlab.errors.TrainingError`; the old checkpoint is then intact and nothing is left over.
    """
    recover(run_dir)
    folder = run_dir.checkpoints
    folder.mkdir(parents=True, exist_ok=True)
    step = {"format": FORMAT, "run_id": run_dir.id, "kind": run_dir.kind, "step": state["step"], **metadata}
    try:
        save_weights(folder / "model.safetensors.new", model, step)
        save_weights(folder / "ema.safetensors.new", ema, step)
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
        runs.sync(folder)


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
    (model, facts), (ema, _) = read_weights(paths[0]), read_weights(paths[1])
    if facts.get("step") != str(state["step"]):
        raise CheckpointError(
            f"run '{run_dir.id}': model.safetensors is of step {facts.get('step')}, state.pt of {state['step']}; "
            + _way_out(run_dir)
        )
    return model, ema, state


def _read_state(path: Path, run_dir: runs.RunDir) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: RuntimeError, UnpicklingError, EOFError, ...
        reason = str(error).splitlines()[0][:90] if str(error) else type(error).__name__
        raise CheckpointError(f"'{path}' is truncated or unsafe to read ({reason}); {_way_out(run_dir)}") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"'{path}' is not a training state; {_way_out(run_dir)}")
    return state


def _way_out(run_dir: runs.RunDir) -> str:
    return f"put a copy back, or remove '{run_dir.checkpoints}' to start the run anew"
