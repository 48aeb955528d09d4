"""Gradient checkpointing (arXiv 1604.06174): blocks store their inputs, and compute the rest again in
backward.

`train.recompute`. It changes no value and no name: the elements of the trained module's lists
(`nn.ModuleList`) take a class that wraps their own `forward`, and get their own back afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _Stored(torch.autograd.Function):
    """The identity, which stores its input, so that a plan counts what a block stores."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Recomputed:
    """In front of a module's class: its training forward is computed again in backward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        args = tuple(_Stored.apply(x) if isinstance(x, Tensor) and x.requires_grad else x for x in args)
        random = any(isinstance(part, nn.Dropout) and part.p for part in self.modules())
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)


@functools.cache
def _of(own: type) -> type:
    return type(own.__name__, (Recomputed, own), {"__module__": own.__module__, "own": own})


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Outermost elements of lists in `module` that train. One with saved buffers (running statistics, counts
    of codes) is left out, because a second pass would change them again; its own lists are looked at instead.
    """
    for parent in module.children():
        for child in parent if isinstance(parent, nn.ModuleList) else (parent,):
            if child is not parent and _may(child):
                yield child
            else:
                yield from blocks(child)


def _may(block: nn.Module) -> bool:
    saved = len(block.state_dict()) > len(list(block.named_parameters(remove_duplicate=False)))
    return not saved and any(p.requires_grad for p in block.parameters())


def start(module: nn.Module) -> list[nn.Module]:
    """Wrap the blocks of `module`; returns them, for :func:`stop`."""
    parts = list(blocks(module))
    for block in parts:
        block.__class__ = _of(type(block))
    return parts


def stop(wrapped: list[nn.Module]) -> None:
    """Give blocks their own classes back."""
    for block in wrapped:
        block.__class__ = type(block).own
