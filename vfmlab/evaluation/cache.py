"""Tensors cached on disk. A cache that cannot be read or written costs time, never a number."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from vfmlab.errors import TrainingError
from vfmlab.weights import io


def folder() -> Path:
    """`VFMLAB_CACHE`, or `vfmlab` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vfmlab"
    return Path(os.environ.get("VFMLAB_CACHE", default)).expanduser()


def read(path: Path | None) -> dict[str, Tensor] | None:
    """Tensors that :func:`write` wrote; None where there are none or the file is damaged."""
    stored = None if path is None else io.cached(path)
    return None if stored is None else stored[0]


def stored(path: Path | None, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file, or those that `make` gives, which are then written there."""
    tensors = read(path)
    if tensors is None:
        tensors = make()
        write(path, tensors)
    return tensors


def write(path: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors; nothing where that cannot be done (a read-only folder, a full disk)."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        io.write(path, tensors)
    except (OSError, SafetensorError, TrainingError):
        return
