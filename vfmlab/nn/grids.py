"""Maps of a vision model on the latent's grid: finer ones are unshuffled into channels, others resized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.errors import ConfigError


def steps(ratio: float) -> int:
    """How often a map is pixel-unshuffled on a grid `ratio` times the latent's: `ratio` if whole, else 1."""
    return int(ratio) if ratio >= 1 and float(ratio).is_integer() else 1


def ratios(grids: Mapping[int, int], side: int, field: str, way: str) -> dict[int, float]:
    """Grid of each layer over the latent's: whole, or one over a whole number.

    Args:
        grids: layer -> side of its grid. side: of the latent's. field, way: whose layers they are and what
            else to set, for messages.

    Raises:
        ConfigError: a grid and the latent's of which neither divides the other; or all are coarser than the
            latent.
    """
    for layer, grid in grids.items():
        if (grid % side and side % grid) or max(grids.values()) < side:
            raise ConfigError(f"{field}: layer {layer} has a {grid} x {grid} grid, no multiple of the "
                              f"latent's {side}{'' if side % grid else ', and no layer is as fine as that'}; "
                              f"set {way} (grid / latent is {grid / side:.3g})")
    return {layer: grid / side for layer, grid in grids.items()}


def fold(x: Tensor, ratio: float, grid: Iterable[int] | None = None) -> Tensor:
    """A map B D h' w' whose grid is `ratio` times the latent's -> B D * steps(ratio)^2 h w.

    A finer map by a whole number loses nothing: its places become channels. Others are resized, bilinear.
    grid: (h, w) of the latent; None: as `ratio` says.
    """
    if (step := steps(ratio)) > 1:
        x = F.pixel_unshuffle(x, step)
    elif grid is None and ratio != 1:
        grid = tuple(round(side / ratio) for side in x.shape[-2:])
    if grid is not None and tuple(x.shape[-2:]) != tuple(grid):
        x = F.interpolate(x, size=tuple(grid), mode="bilinear", align_corners=False)
    return x


def gathered(maps: Mapping[int, Tensor], ratios: Mapping[int, float], size: int) -> Tensor:
    """Maps of the layers in `ratios` (B D h' w' each), folded on the latent's grid and side by side: B D h w.

    Raises:
        ConfigError: a map of images of another size than `size` that cannot be unshuffled.
    """
    for layer, ratio in ratios.items():
        grid = tuple(maps[layer].shape[-2:])
        if any(side % steps(ratio) for side in grid):
            raise ConfigError(f"images: layer {layer} has a {grid} grid, which does not divide by "
                              f"{steps(ratio)}; use images of {size} px or a size whose grid does")
    return torch.cat([fold(maps[layer], ratio) for layer, ratio in ratios.items()], dim=1)
