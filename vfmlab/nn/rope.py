"""Position codes of token grids: rotary embedding (turns queries and keys), sine-cosine table (added)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(grid: tuple[int, int], head_dim: int) -> Tensor:
    """Axial rotary table [2 (sin, cos), N, head_dim], N = h * w tokens row by row, on the CPU in fp32.

    The first half of a head's dimensions turns with the row, the second with the column; neighbouring
    dimensions form a pair (EVA-02, arXiv 2303.11331; as in LightningDiT). head_dim must be a multiple of 4.
    """
    # imports seconds of code that reading a config must not wait for
    from timm.layers import build_rotary_pos_embed

    return torch.stack(build_rotary_pos_embed(list(grid), dim=head_dim, in_pixels=False))


def rotary_line(length: int, head_dim: int) -> Tensor:
    """Rotary table [2 (sin, cos), N, head_dim] of N positions in a row (arXiv 2104.09864), in fp32.

    Pairs of neighbouring dimensions turn by position x 10000^(-2m / head_dim), m = 0, 1, ...
    """
    bands = 10_000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = (torch.arange(length)[:, None] * bands).repeat_interleave(2, dim=1)
    return torch.stack([angles.sin(), angles.cos()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the dimension pairs of x (B heads N d) by the angles of `table`; same shape and dtype as x.

    table: [2 (sin, cos), N, d], or [2, B, 1, N, d] where every row has positions of its own.

    On the CPU a pair is multiplied as one complex number, which takes half the time there; compilers do not
    know complex numbers, and GPUs do not need them.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        turn = torch.complex(table[1, ..., ::2], table[0, ..., ::2])
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
    sin, cos = table.to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin


def positions(table: Tensor, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Positions 1 N D of a square grid, interpolated where tokens stand on another one.

    prefix: of class tokens in front, whose positions stay.
    """
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(table, list(grid), num_prefix_tokens=prefix)


def sincos_table(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-d sine-cosine code [N, width] of a grid (MAE, arXiv 2111.06377): column first, then row; sin,
    then cos.

    width must be a multiple of 4. Computed in fp64, returned in fp32.
    """
    bands = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * bands for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
