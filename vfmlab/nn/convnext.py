"""Residual layers that a style can modulate: VFM-VAE's ConvNeXt layer, and a plain 3x3 one to ablate it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.depthwise import DepthwiseConv
from vfmlab.nn.modulation import Style, modulated_conv
from vfmlab.nn.norms import group_norm
from vfmlab.nn.pointwise import PointwiseConv, pointwise
from vfmlab.nn.vit_block import ACTIVATIONS

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "leaky_relu"]


class ModulatedConvNeXt(nn.Module):
    """x + scale * contract(act(modulated_expand(norm(depthwise(x))))), B C H W -> same (arXiv 2510.18457).

    Args:
        channels: of input and output. style: width of w; 0: an unmodulated 1x1 convolution in its place.
        kernel: of the depthwise convolution. expansion: hidden width over `channels`.
        layer_scale: initial scale of the branch.
        legacy_noise: side of a fixed noise map that released 256 px weights carry, added with a learned
            strength after the depthwise convolution and interpolated where the activations have another size;
            0 (new training): none.
    """

    def __init__(self, channels: int, style: int, kernel: int = 7, expansion: int = 4,
                 layer_scale: float = 1e-5, activation: Activation = "gelu", legacy_noise: int = 0):
        super().__init__()
        hidden = expansion * channels
        self.activation = ACTIVATIONS[activation]
        self.depthwise = DepthwiseConv(channels, kernel)
        self.norm = group_norm(channels)
        self.style = Style(style, channels) if style else None
        self.expand_weight = nn.Parameter(torch.randn(hidden, channels, 1, 1) / math.sqrt(channels))
        self.expand_bias = nn.Parameter(torch.zeros(hidden))
        self.contract = PointwiseConv(hidden, channels)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))
        self.legacy_noise = legacy_noise
        if legacy_noise:
            self.register_buffer("noise", torch.randn(legacy_noise, legacy_noise))
            self.noise_strength = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        y = self.depthwise(x)
        if self.legacy_noise:
            y = y + self._noise(y.shape[-2:]).to(y.dtype)
        y = self.norm(y)
        if self.style is None:
            y = pointwise(y, self.expand_weight.flatten(1), self.expand_bias)
        else:
            y = modulated_conv(y, self.expand_weight, self.style(w), bias=self.expand_bias)
        y = self.activation(y)
        if y.dtype == torch.float16:  # whose range the product of weight and layer scale leaves
            return torch.addcmul(x, self.contract(y).to(x.dtype), self.scale.to(x.dtype))
        # The scale on the weights: no pass over the map, and backward needs no copy of what it scales.
        scale = self.scale.flatten()
        y = pointwise(y, self.contract.weight.flatten(1) * scale[:, None], self.contract.bias * scale)
        return x + y.to(x.dtype)

    def _noise(self, shape: torch.Size) -> Tensor:
        noise = self.noise[None, None]
        if noise.shape[-2:] != shape:
            noise = F.interpolate(noise, size=shape, mode="bilinear", align_corners=False)
        return noise * self.noise_strength


class ModulatedResBlock(nn.Module):
    """x + conv3x3(silu(norm(modulated_conv3x3(silu(norm(x)))))): SD-VAE's residual block, B C H W -> same.

    style: width of w; 0: both convolutions are ordinary ones.
    """

    def __init__(self, channels: int, style: int):
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels, least=1), group_norm(channels, least=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.style = Style(style, channels) if style else None

    def forward(self, x: Tensor, w: Tensor | None = None) -> Tensor:
        y = F.silu(self.norm1(x))
        if self.style is None:
            y = self.conv1(y)
        else:
            y = modulated_conv(y, self.conv1.weight, self.style(w), bias=self.conv1.bias)
        return x + self.conv2(F.silu(self.norm2(y)))
