"""Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/): orthogonal steps for matrices.

    M <- 0.95 M + 0.05 G
    W <- W - lr sqrt(max(1, rows / columns)) orthogonal(0.05 G + 0.95 M)      (Nesterov)

`torch.optim.Muon` does the same one matrix at a time. The networks here are stacks of equal blocks, so that
the matrices of one shape go through the iteration in one batched product each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.training.sharded import share, whole

LR = 0.02  # of the matrices; Jordan et al. and the runs in docs/results/optimizers.md
MOMENTUM = 0.95
# Newton-Schulz: X <- a X + b (X X') X + c (X X')^2 X, five times. Singular values end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def matrices(module: nn.Module) -> set[int]:
    """Ids of the parameters that Muon trains: matrices inside blocks.

    A block is an element of a list of modules that has modules of its own: a transformer block, a residual
    block. Convolutions count as matrices of outputs x (inputs * kernel). What stands outside blocks
    (embeddings, first and last layers), depthwise kernels, gains and biases are AdamW's.
    """
    kinds = nn.ModuleList | nn.ModuleDict | nn.Sequential
    lists = [each for each in module.modules() if isinstance(each, kinds)]
    blocks = [block for each in lists for block in each.children() if any(True for _ in block.children())]
    inside = (p for block in blocks for p in block.parameters())
    return {id(p) for p in inside if p.ndim in (2, 4) and min(p.shape[:2]) > 1}


def orthogonal(updates: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: n rows columns -> same, singular values near 1.

    dtype: of the products.
    """
    x = updates.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.float().norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon for the groups with `matrices: True`, AdamW for the others: one optimiser, one state.

    Weight decay is decoupled in both. dtype: of the iteration's products.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype = torch.float32, **options: Any):
        super().__init__(groups, **options)
        self.dtype = dtype
        # an overflow of fp16 is the scaler's to skip, for both halves
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's looks for its own entries in the state of every parameter.
        torch.optim.Optimizer.__setstate__(self, state)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"]:
                self._step_matrices(group)
        return loss

    @torch.no_grad()
    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in group["params"]:
            if p.grad is not None:
                alike.setdefault((p.shape[0], p.numel() // p.shape[0]), []).append(p)
        for (rows, columns), of in alike.items():
            states = [self.state[p] for p in of]
            for state, p in zip(states, of, strict=True):
                if not state:
                    state["momentum"] = torch.zeros_like(p)
            momentum, gradients = [state["momentum"] for state in states], [p.grad for p in of]
            torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
            ahead = [gradient.clone() for gradient in gradients]
            torch._foreach_lerp_(ahead, momentum, MOMENTUM)  # Nesterov's; torch 2.11 has it in place alone
            # of shares every process takes the step of the whole matrix, and its part of it
            ahead = [whole(each).reshape(rows, columns) for each in ahead]
            updates = orthogonal(torch.stack(ahead), self.dtype)
            if group["weight_decay"]:
                torch._foreach_mul_(of, 1 - group["lr"] * group["weight_decay"])
            steps = [share(update.reshape(p.shape).to(p.dtype), p)
                     for update, p in zip(updates, of, strict=True)]
            torch._foreach_add_(of, steps, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)
