"""The small head of a projected discriminator: spectrally normalised 1-d convolutions over a sequence of
tokens.

StyleGAN-T (Sauer et al. 2023, arXiv 2301.09515, section 3.2); VFM-VAE and RAE train the same head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.modulation import EqualLinear


class SpectralConv1d(nn.Conv1d):
    """Conv1d whose weight is divided by its largest singular value; padding wraps around.

    One power iteration per forward pass in training mode, v before u.
    `torch.nn.utils.parametrizations.spectral_norm` iterates u before v, which gives other weights after every
    step than the published discriminators.
    """

    def __init__(self, channels: int, out: int, kernel: int = 1):
        super().__init__(channels, out, kernel, padding=kernel // 2, padding_mode="circular")
        self.register_buffer("u", F.normalize(torch.randn(out), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(channels * kernel), dim=0))

    def forward(self, x: Tensor) -> Tensor:  # B C N -> B out N
        with torch.autocast(x.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            if self.training:
                with torch.no_grad():
                    self.v.copy_(F.normalize(matrix.T @ self.u, dim=0, eps=1e-12))
                    self.u.copy_(F.normalize(matrix @ self.v, dim=0, eps=1e-12))
            # Copies: a second forward pass (real after generated images) moves the buffers before backward
            # reads them.
            weight = self.weight / (self.u.clone() @ (matrix @ self.v.clone()))
        return self._conv_forward(x, weight, self.bias)


class VirtualBatchNorm(nn.Module):
    """Batch norm over groups of about `batch` consecutive images; always the statistics of the images at
    hand.

    A batch is cut into ceil(B / batch) groups as equal as can be, so every batch size works. fp32.
    """

    def __init__(self, channels: int, batch: int = 8, eps: float = 1e-5):
        super().__init__()
        self.batch, self.eps = batch, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # B C N, or B C h w
        with torch.autocast(x.device.type, enabled=False):
            shape, x = x.shape, x.float().flatten(2)
            groups = math.ceil(len(x) / self.batch)
            parts = [standardise(part, self.eps) for part in x.tensor_split(groups)]
            x = parts[0] if groups == 1 else torch.cat(parts)
            return (x * self.weight[:, None] + self.bias[:, None]).view(shape)


def standardise(x: Tensor, eps: float) -> Tensor:
    """Zero mean and unit variance of every channel over images and tokens; B C N."""
    var, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps)


class Block(nn.Module):
    """Spectral convolution -> virtual batch norm -> leaky ReLU 0.2."""

    def __init__(self, channels: int, kernel: int, batch: int, eps: float):
        super().__init__()
        self.conv = SpectralConv1d(channels, channels, kernel)
        self.norm = VirtualBatchNorm(channels, batch, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


class Head(nn.Module):
    """Tokens B C N -> one logit per token, B N.

    Args:
        channels: of the tokens. kernel: of the second convolution (odd). batch, eps: of the virtual batch
            norm. condition: width of the condition vector, 0 for an unconditional head. mapped: width in
            which condition and tokens are compared: logit = <tokens, condition> / sqrt(mapped).
    """

    def __init__(self, channels: int, kernel: int = 9, batch: int = 8, eps: float = 1e-5, condition: int = 0,
                 mapped: int = 64):
        super().__init__()
        self.first = Block(channels, 1, batch, eps)
        self.second = Block(channels, kernel, batch, eps)
        self.out = SpectralConv1d(channels, mapped if condition else 1)
        self.condition = EqualLinear(condition, mapped) if condition else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits B N and the two hidden maps. condition: B D, for conditional heads."""
        first = self.first(x)
        second = (first + self.second(first)) / math.sqrt(2)
        logits = self.out(second)
        if self.condition is None:
            return logits[:, 0], [first, second]
        mapped = self.condition(condition.to(self.condition.weight))
        return (logits * mapped[:, :, None]).sum(1) / math.sqrt(mapped.shape[1]), [first, second]
