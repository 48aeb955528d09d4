"""Adaptive weight: a term as strong at the encoder's last layer as reconstruction (2012.09841, eq. 7)."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from vfmlab.errors import TrainingError

LIMIT = 1e4


def adaptive_weight(reconstruction: Tensor, loss: Tensor, parameter: nn.Parameter,
                    at: str = "encoder") -> Tensor:
    """|d reconstruction / d parameter| / (|d loss / d parameter| + 1e-4), clamped to [0, LIMIT], detached,
    fp32 scalar.

    With several processes the gradients are averaged over all of them before their norms are taken, so that
    the weight is what one process with the whole batch would find; every rank must call this. Each
    micro-batch of an accumulated step finds a weight of its own. The graph is kept for backward.

    Args:
        reconstruction: the sum of the weighted reconstruction terms. loss: the term to be weighed, without
            its weight. parameter: `tokenizer.last_encoder_layer()`, or its last decoder layer; at: which of
            the two, for the message.
    """
    grads = []
    for what, value in (("reconstruction", reconstruction), ("loss", loss)):
        grad = None
        if value.requires_grad and parameter.requires_grad:
            grad = torch.autograd.grad(value, parameter, retain_graph=True, allow_unused=True)[0]
        if grad is None:
            raise TrainingError(f"adaptive weight: the {what} does not depend on the {at}'s last layer "
                                "(frozen by 'trains', or reconstruction weight 0?); set adaptive=false for "
                                "this term")
        grads.append(grad.float())
    both = torch.stack(grads)
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(both)
        both = both / distributed.get_world_size()
    ours, other = both.flatten(1).norm(dim=1)
    return (ours / (other + 1e-4)).clamp(0.0, LIMIT).detach()
