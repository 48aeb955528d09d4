"""Latent statistics of releases, in the form that tokenizers here hold them: mean and std of raw latents."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmlab.errors import CheckpointError
from vfmlab.weights import io
from vfmlab.weights.table import Row

COUNT = 1  # of images, in place of a number that releases do not publish; tokenizers need one above zero
MEAN, STD, VAR = (
    tuple(f"{head}{name}" for head in ("", "latents_", "latent_")) for name in ("mean", "std", "var")
)
SCALED = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of diffusers' config.json


def read(path: str | Path, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Latent mean and std of a release, float64: [C] each, or [C h w] if per position.

    Args:
        path: .safetensors, a pickle of tensors, .npz, or .json, with `mean` and `std` or `var` (also
            `latents_*`, `latent_*`) as tensors, arrays or lists, [C], [1 C], [1 C 1 1], [C h w] or [1 C h w];
            or diffusers' config.json. eps: added to a variance before its root, where the release does so.

    Raises:
        CheckpointError: other entries or shapes, values that are not finite, a std <= 0.
    """
    where = f"statistics '{path}'"
    content = _content(Path(path).expanduser(), where)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{where} hold a {type(content).__name__}; give a file with a mean and a std "
                              "by name")
    mean, std, var = (_entry(content, names, where) for names in (MEAN, STD, VAR))
    if any(content.get(name) is not None for name in SCALED[:2]):
        return of_config(content, where)
    if mean is None or (std is None and var is None):
        names = ", ".join(map(str, list(content)[:6])) or "nothing"
        lacks = (f"a mean ({', '.join(MEAN)})" if mean is None
                 else f"a std or variance ({', '.join(STD + VAR)})")
        raise CheckpointError(f"{where} hold {names}, but not {lacks}; give a file with both")
    return _checked(mean, std if std is not None else (var + eps).sqrt(), where)


def of_config(config: Mapping[str, Any], where: str) -> tuple[Tensor, Tensor] | None:
    """Statistics in a config of diffusers, z = (raw - mean) * scaling_factor / std; or None.

    `shift_factor` is a mean; absent: mean 0, std 1, factor 1. One value, [1], is for all channels.

    Raises:
        CheckpointError: not finite numbers, or a factor or std <= 0.
    """
    scale, shift, mean, std = (_entry(config, (name,), where) for name in SCALED)
    if all(value is None for value in (scale, shift, mean, std)):
        return None
    mean = mean if mean is not None else shift if shift is not None else torch.zeros(1).double()
    std = std if std is not None else torch.ones_like(mean)
    return _checked(mean.expand_as(std) if mean.numel() == 1 else mean, std if scale is None else std / scale,
                    where)


def _content(path: Path, where: str) -> Any:
    if path.suffix not in (".npz", ".json"):
        return io.read_released(path)
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8-sig"))
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    except (OSError, ValueError, TypeError, RecursionError, EOFError, RuntimeError, zipfile.BadZipFile,
            zlib.error) as error:
        reason = " ".join(str(error).split())[:100]
        raise CheckpointError(f"{where} cannot be read as {path.suffix[1:]} ({reason}); export them "
                              "again") from None


def _entry(content: Mapping[str, Any], names: tuple[str, ...], where: str) -> Tensor | None:
    """The first entry that is there, as float64: [C] or [C h w]; None where none is."""
    name = next((name for name in names if content.get(name) is not None), None)
    if name is None:
        return None
    try:
        value = torch.as_tensor(content[name])
    except (TypeError, ValueError, RuntimeError, OverflowError):
        value = None
    if value is None or value.is_complex() or value.dtype == torch.bool or not value.numel():
        raise CheckpointError(f"{where}: '{name}' is no list, array or tensor of real numbers; export them "
                              "again")
    given, value = list(value.shape), value.detach().cpu().double()
    if value.ndim in (2, 4, 5) and value.shape[0] == 1:
        value = value[0]
    if value.ndim != 1 and value.numel() == (value.shape[0] if value.ndim else 1):
        value = value.flatten()
    if value.ndim not in (1, 3):
        raise CheckpointError(f"{where}: '{name}' has shape {given}, neither per channel [C] nor per place "
                              "[C h w]")
    return value


def _checked(mean: Tensor, std: Tensor, where: str) -> tuple[Tensor, Tensor]:
    if mean.shape != std.shape:
        raise CheckpointError(f"{where}: std has shape {list(std.shape)}, the mean {list(mean.shape)}; give "
                              "one of each")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise CheckpointError(f"{where}: std must be positive and all values finite; measure them: "
                              "--statistics measured")
    return mean, std


def per_channel(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [C] of latents whose statistics per position are [C h w]: the law of total variance."""
    if mean.ndim == 1:
        return mean, std
    variance = std.square().mean((1, 2)) + mean.var((1, 2), correction=0)
    return mean.mean((1, 2)), variance.sqrt()


def released(row: Row, config: Mapping[str, Any]) -> tuple[Tensor, Tensor, str] | None:
    """(mean, std, origin) of a release, [C] or [C h w]: of its file, else of its `config`.

    None where none are published. Raises :class:`CheckpointError` if the file is not to be had.
    """
    known = row.statistics
    if known is not None:
        repo = known.repo or row.repo
        path = io.fetch(repo, known.file,
                        way="pass a copy of it: --statistics PATH (or --statistics measured)")
        return *read(path, known.eps), f"{known.file} of {repo}"
    scaled = of_config(config, f"config of {row.name}")
    return None if scaled is None else (*scaled, f"scaling factor in the config of {row.name}")
