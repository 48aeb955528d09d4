"""1x1 convolution as one matrix product an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """B I H W -> B O H W in x's memory format.

    Args:
        weight: O I, or B O I where every image has its own. bias: O.
    """
    if weight.ndim == 2 and (x.device.type != "cpu" or len(x) > 1):
        return F.conv2d(x, weight[:, :, None, None], bias)
    # One image on one thread: torch's convolution takes its slowest way there.
    weight = weight.expand(len(x), -1, -1)
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # B HW I
        y = pixels @ weight.mT if bias is None else torch.baddbmm(bias, pixels, weight.mT)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    pixels = x.flatten(2)  # B I HW
    y = weight @ pixels if bias is None else torch.baddbmm(bias[:, None], weight, pixels)
    return y.unflatten(2, x.shape[2:])


class PointwiseConv(nn.Conv2d):
    """B I H W -> B O H W by :func:`pointwise`; its weights are those of a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight.flatten(1), self.bias)
