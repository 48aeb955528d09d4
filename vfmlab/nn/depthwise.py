"""Depthwise convolution, in the precision in which its gradient is fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """One odd kernel per channel, same size. B C H W -> same.

    Under CPU autocast it runs in fp32 and gives the result back in the precision it was asked in: the weight
    gradient of a 5x5 kernel in bf16 takes about five times as long there, the products are the same number
    either way.
    """

    def __init__(self, channels: int, kernel: int, bias: bool = True):
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))
