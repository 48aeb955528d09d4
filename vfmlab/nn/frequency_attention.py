"""Channel attention on low or high frequencies (TriKD, arXiv 2309.12557)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

WIDTH = 10.0  # of the Gaussian filter, in steps of the spectrum


def filtered(x: Tensor, band: Literal["low", "high"]) -> Tensor:
    """Magnitude of x (B C h w) behind a Gaussian low pass, or one minus it, on the centred spectrum.

    The filter's centre is ((h - 1) // 2, (w - 1) // 2), as released: at even sides one beside the zero
    frequency.
    """
    h, w = x.shape[-2:]
    row, column = (torch.arange(n, device=x.device) - (n - 1) // 2 for n in (h, w))
    mask = torch.exp(-(row[:, None] ** 2 + column**2) / (2 * WIDTH**2))
    mask = mask if band == "low" else 1 - mask
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.float()), dim=(-2, -1)) * mask
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).abs()


class FrequencyAttention(nn.Module):
    """1x1(x + x sigmoid(1x1(mean over places of the filtered x))): B C h w -> B out h w, no biases."""

    def __init__(self, width: int, out: int, band: Literal["low", "high"]):
        super().__init__()
        self.band = band
        self.attention = nn.Conv2d(width, width, 1, bias=False)
        self.conv = nn.Conv2d(width, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.attention(filtered(x, self.band).mean((2, 3), keepdim=True)))
        return self.conv(x + x * share)
