"""Blocks of the deep-compression autoencoder's decoder as HAE uses them (DC-AE, arXiv 2410.10733; HAE,
2601.22904), and the convolutional stem that takes the place of a VFM's patch embedding. Maps B C h w."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.sphere import rms_over_image

HEAD = 32  # width of a head of linear attention


class RMSNorm2d(nn.Module):
    """x / rms(x) * weight, the mean square taken over channels *and* places of each image, in fp32.

    So no pixel is normalised by itself, and one bright corner changes all others: that is what the release
    does.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (rms_over_image(x) * self.weight).to(x.dtype)


class ConvStem(nn.Module):
    """Images B 3 H W -> maps B out H/2^n W/2^n: n convolutions of stride 2 without bias, the first 7 x 7, all
    but the last followed by norm and SiLU."""

    def __init__(self, out: int, widths: tuple[int, ...] = (64, 128, 256)):
        super().__init__()
        steps = list(zip((3, *widths), (*widths, out), strict=True))
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, 2, kernel // 2, bias=False)
            for (a, b), kernel in zip(steps, [7] + [3] * len(widths), strict=True)
        )
        self.norms = nn.ModuleList(RMSNorm2d(width) for width in widths)
        for conv in self.convs:
            bound = conv.weight[0].numel() ** -0.5
            nn.init.uniform_(conv.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = F.silu(norm(conv(x)))
        return self.convs[-1](x)


class ResidualBlock(nn.Module):
    """x + norm(conv(SiLU(conv x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = RMSNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


class LinearAttention(nn.Module):
    """ReLU linear attention: (v k^T) q / (sum k . q + 1e-15), heads of width 32, each with its q, k, v; sums
    over places in fp32."""

    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.proj = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        qkv = self.qkv(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = qkv.float().flatten(2).unflatten(1, (-1, 3 * HEAD)).chunk(3, dim=2)  # B heads 32 N
            q, k = q.relu(), k.relu()
            out = (v @ k.transpose(2, 3)) @ q / (k.sum(3, keepdim=True).transpose(2, 3) @ q + 1e-15)
        return self.proj(out.flatten(1, 2).unflatten(2, (h, w)).to(x.dtype))


class GLUConv(nn.Module):
    """1x1 to 4 times the width twice, SiLU, depthwise 3x3, one half gates the other, 1x1 back."""

    def __init__(self, width: int):
        super().__init__()
        inner = 2 * 4 * width
        self.inverted = nn.Conv2d(width, inner, 1)
        self.depth = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.point = nn.Conv2d(inner // 2, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.depth(F.silu(self.inverted(x))).chunk(2, dim=1)
        return self.point(value * F.silu(gate))


class EfficientViTBlock(nn.Module):
    """x + linear attention, then x + gated convolution. norm: behind each of the two; the release: none."""

    def __init__(self, width: int, norm: bool = False):
        super().__init__()
        self.context, self.local = LinearAttention(width), GLUConv(width)
        self.norm1, self.norm2 = (RMSNorm2d(width) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.context(x))
        return x + self.norm2(self.local(x))


class Widen(nn.Module):
    """3x3 convolution to another width; with the shortcut, plus the input with its channels repeated."""

    def __init__(self, inputs: int, out: int, shortcut: bool):
        super().__init__()
        self.conv = nn.Conv2d(inputs, out, 3, padding=1)
        self.repeats = out // inputs if shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + x.repeat_interleave(self.repeats, dim=1) if self.repeats else y


class Upsample(nn.Module):
    """Twice the side: nearest and 3x3 convolution ("interpolate"), or convolution and pixel shuffle
    ("shuffle").

    With the shortcut, plus the input with channels repeated 4 out / in times and pixel-shuffled.
    """

    def __init__(self, inputs: int, out: int, kind: str = "interpolate", shortcut: bool = True):
        super().__init__()
        self.kind, self.repeats = kind, 4 * out // inputs if shortcut else 0
        self.conv = nn.Conv2d(inputs, out if kind == "interpolate" else 4 * out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "interpolate":
            y = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        else:
            y = F.pixel_shuffle(self.conv(x), 2)
        return y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2) if self.repeats else y
