"""Latent statistics of releases, in the form that tokenizers here keep them: mean and std of each channel of raw latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vfmlab.errors import CheckpointError
from vfmlab.weights import io
from vfmlab.weights.table import Row

COUNT = 1  # of images, in place of a number that releases do not tell; tokenizers need one above zero


def read(path: str | Path, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Latent mean and std of a release: a file with `mean` and `std` or `var`; [C] each, or [C h w] if per position.

    Args:
        eps: added to a variance before its root, where the release does so.

    Raises:
        CheckpointError: other entries, shapes that are no statistics, a std that is not positive.
    """
    content = io.read_released(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("mean"), Tensor):
        found = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"statistics '{path}' must hold 'mean' and 'std' (or 'var'), not {found}")
    mean, std = content["mean"], content.get("std")
    if std is None and isinstance(content.get("var"), Tensor):
        std = (content["var"].double() + eps).sqrt()
    if not isinstance(std, Tensor) or std.shape != mean.shape:
        raise CheckpointError(f"statistics '{path}': 'std' or 'var' is missing or not of the shape of 'mean'")
    mean, std = (value.double()[0] if value.ndim == 4 and value.shape[0] == 1 else value.double() for value in (mean, std))
    if mean.ndim == 3 and mean.shape[1:] == (1, 1):
        mean, std = mean.flatten(), std.flatten()
    if mean.ndim not in (1, 3):
        raise CheckpointError(f"statistics '{path}': shape {list(content['mean'].shape)} is neither per channel nor C h w")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise CheckpointError(f"statistics '{path}': std must be positive and all values finite")
    return mean, std


def per_channel(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics [C] of latents whose statistics per position are [C h w]: the law of total variance."""
    if mean.ndim == 1:
        return mean, std
    variance = std.square().mean((1, 2)) + mean.var((1, 2), correction=0)
    return mean.mean((1, 2)), variance.sqrt()


def released(row: Row) -> tuple[Tensor, Tensor, str] | None:
    """(mean, std, where from) of a row's release, [C] or [C h w] (one value, [1], stands for all channels).

    None where none are published. Raises :class:`CheckpointError` if the file is not to be had.
    """
    known = row.statistics
    if known is None:
        return None
    if known.scale is not None:  # z = scale * raw, so raw latents count as having mean 0 and std 1 / scale
        return torch.zeros(1).double(), torch.full((1,), 1 / known.scale).double(), f"scale {known.scale} of {row.name}"
    path = io.fetch(known.repo or row.repo, known.file, way="pass it: --statistics PATH (or --statistics measured)")
    return *read(path, known.eps), f"{known.file} of {known.repo or row.repo}"
