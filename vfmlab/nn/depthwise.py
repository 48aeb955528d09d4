"""Depthwise convolution, in the precision and by the products in which its gradient is fast on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 5  # side of the kernel
WIDE = 8  # columns whose products with their neighbourhood are one matrix product
AT_ONCE = 2**24  # numbers of the unfolded input


class DepthwiseConv(nn.Conv2d):
    """One odd kernel per channel, same size. B C H W -> same.

    Under CPU autocast it runs in fp32 and gives the result back in the precision it was asked in: the weight
    gradient of a 5x5 kernel in bf16 takes about five times as long there, the products are the same number
    either way. In training on the CPU that gradient is :func:`weight_gradient`, where it is the faster one:
    kernels from 5x5 on, with channels outermost.
    """

    def __init__(self, channels: int, kernel: int, bias: bool = True):
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        if not torch.is_autocast_enabled("cpu"):
            return self._on_cpu(x)
        with torch.autocast("cpu", enabled=False):
            return self._on_cpu(x.float()).to(torch.get_autocast_dtype("cpu"))

    def _on_cpu(self, x: Tensor) -> Tensor:
        own = self.weight.requires_grad and torch.is_grad_enabled() and self.kernel_size[0] >= LEAST
        # Traced and fake tensors take torch's way: compilers have their own, and a plan counts its products.
        if not own or type(x) is not Tensor or torch.compiler.is_compiling() or not x.is_contiguous():
            return super().forward(x)
        return _Depthwise.apply(x, self.weight, self.bias)


class _Depthwise(torch.autograd.Function):
    """The convolution with :func:`weight_gradient`; its backward has gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors  # once: where blocks are computed again they are given only once
        flipped, kernel, wanted = weight.flip(2, 3), weight.shape[-1], ctx.needs_input_grad
        return (F.conv2d(gradient, flipped, padding=kernel // 2, groups=len(weight)) if wanted[0] else None,
                weight_gradient(x, gradient, kernel) if wanted[1] else None,
                gradient.sum((0, 2, 3)) if wanted[2] else None)


def weight_gradient(x: Tensor, gradient: Tensor, kernel: int) -> Tensor:
    """d loss / d weight (C 1 k k) of a depthwise convolution, from its input and the gradient of its output.

    Both are B C H W. For every row of the kernel: products of WIDE columns with the WIDE + k - 1 beside them,
    summed over all places as one matrix product per channel, and then along diagonals. Twice the products of
    the direct sum, and on one core two to five times as fast as torch's.
    """
    height, width, pad = x.shape[2], x.shape[3], kernel // 2
    over = -width % WIDE
    x, gradient = F.pad(x, (pad, pad + over, pad, pad)), F.pad(gradient, (0, over))
    count = max(1, AT_ONCE // (2 * x[0].numel()))
    pairs = zip(x.split(count), gradient.split(count), strict=True)
    return sum(_of(part, beside, kernel, height) for part, beside in pairs)


def _of(x: Tensor, gradient: Tensor, kernel: int, height: int) -> Tensor:
    channels, span = x.shape[1], WIDE + kernel - 1
    around = x.unfold(3, span, WIDE).flatten(0, 1).contiguous()
    columns = gradient.unflatten(3, (-1, WIDE)).flatten(0, 1).flatten(1, 2).transpose(1, 2)  # BC WIDE N
    rows = []
    for row in range(kernel):
        products = columns @ around[:, row : row + height].flatten(1, 2)  # BC WIDE span
        products = products.unflatten(0, (-1, channels)).sum(0)
        diagonals = [products.diagonal(j, 1, 2)[..., :WIDE].sum(-1) for j in range(kernel)]
        rows.append(torch.stack(diagonals, -1))
    return torch.stack(rows, 1)[:, None]
