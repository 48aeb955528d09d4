"""How tests compare with stored reference values."""

from __future__ import annotations

import torch
from torch import Tensor


def part(tensors: dict, prefix: str) -> dict:
    """The tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def close(got: Tensor, wanted: Tensor, atol: float = 2e-5) -> None:
    """Every value agrees to `atol`, and to 40 steps of the type at the tensor's largest value: CPUs sum in their own orders."""
    rounding = 40 * torch.finfo(wanted.dtype).eps * wanted.detach().abs().max().item() if wanted.is_floating_point() else 0.0
    torch.testing.assert_close(got, wanted, atol=atol + rounding, rtol=0)
