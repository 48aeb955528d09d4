"""Style modulation: the mapping network, the style of one layer, and convolutions whose weights a style
scales.

A modulated convolution multiplies its weight's input channels by a style s of the sample, and (demodulated)
divides each output channel by the norm of what results. Moving the scales to the activations gives the same
numbers with shared weights:

    conv(x, w s / |w s|) = conv(x s, w) * rsqrt(sum_i (w_oi s_i)^2 + eps)

Of the two the one whose scales meet fewer numbers is taken: on large maps a 1x1 layer has per-sample weights,
one matrix product an image, and two passes over the activations (and what backward saves of them) go away.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.pointwise import pointwise

EPS = 1e-8


def modulated_conv(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool = True,
                   bias: Tensor | None = None) -> Tensor:
    """Convolution (odd kernel, same size) whose input channels are scaled by a style per sample.

    Args:
        x: B I H W. weight: O I k k. style: B I. bias: O, added after demodulation. Returns B O H W.
    """
    outputs, inputs, kernel, _ = weight.shape
    if kernel == 1 and 2 * outputs * inputs <= (outputs + inputs) * x.shape[-2] * x.shape[-1]:
        with torch.autocast(x.device.type, enabled=False):
            own = weight.float().flatten(1) * style.float()[:, None]  # B O I
            if demodulate:
                own = own * (own.square().sum(dim=2, keepdim=True) + EPS).rsqrt()
        return pointwise(x, own.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = F.conv2d(x * style.to(x.dtype)[:, :, None, None], weight.to(x.dtype), padding=kernel // 2)
    if demodulate:
        # The norm is a sum over many squares: taken in fp32 whatever the activations are.
        with torch.autocast(x.device.type, enabled=False):
            norm = style.float().square() @ weight.float().square().sum(dim=(2, 3)).t()
            scale = (norm + EPS).rsqrt()[:, :, None, None]
        scale = scale.to(y.dtype)
        return y * scale if bias is None else torch.addcmul(bias.to(y.dtype)[:, None, None], y, scale)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: the stored weight is scaled by `lr_multiplier /
    sqrt(inputs)` in use.

    Adam's step is then relative to a unit-variance weight; a multiplier below 1 slows the layer (its stored
    weight is 1 / multiplier times larger). The bias is scaled by the multiplier. Karras et al., arXiv
    1812.04948, appendix C.
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, lr_multiplier: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), bias / lr_multiplier))
        self.gain, self.bias_gain = lr_multiplier / math.sqrt(inputs), lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias * self.bias_gain)


class Mapping(nn.Module):
    """Global style w of a latent: pool to `pooled` x `pooled`, normalise to unit second moment, two-layer
    perceptron.

    Args:
        inputs: channels of the latent. width: of w. pooled: side of the pooled latent.
        hidden: width between the layers; None: that of w. VFM-VAE's release has that of the pooled latent.
    """

    def __init__(self, inputs: int, width: int, pooled: int = 1, hidden: int | None = None):
        super().__init__()
        self.pooled, hidden = pooled, hidden or width
        self.layers = nn.ModuleList(EqualLinear(a, b, lr_multiplier=0.01)
                                    for a, b in ((inputs * pooled**2, hidden), (hidden, width)))

    def forward(self, z: Tensor) -> Tensor:  # B C h w -> B width
        z = F.adaptive_avg_pool2d(z.float(), self.pooled).flatten(1)
        z = z * (z.square().mean(dim=1, keepdim=True) + EPS).rsqrt()
        return self.layers[1](F.leaky_relu(self.layers[0](z), 0.2))


class Style(nn.Module):
    """Style of one layer from the global one: Linear(w) in three parts, m1 * m2 + m3. B width -> B channels.

    The product lets a layer's style be quadratic in w (StyleGAN-T, arXiv 2301.09515, section 3.1).
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.linear = EqualLinear(width, 3 * channels, bias=1.0)

    def forward(self, w: Tensor) -> Tensor:
        a, b, c = self.linear(w).float().chunk(3, dim=1)
        return a * b + c


class ToRGB(nn.Module):
    """Features -> image by a 1x1 convolution, modulated but not demodulated; unmodulated when `style` is 0.

    Args:
        channels: of the features. style: width of w, or 0.
    """

    def __init__(self, channels: int, style: int):
        super().__init__()
        self.style = Style(style, channels) if style else None
        self.weight = nn.Parameter(torch.randn(3, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.gain = 1 / math.sqrt(channels)

    def forward(self, x: Tensor, w: Tensor | None) -> Tensor:
        if self.style is None:
            y = pointwise(x, self.weight.to(x.dtype).flatten(1) * self.gain)
        else:
            y = modulated_conv(x, self.weight, self.style(w) * self.gain, demodulate=False)
        return y.float() + self.bias.view(1, -1, 1, 1)
