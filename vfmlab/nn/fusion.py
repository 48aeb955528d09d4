"""One latent for blocks of different resolutions (multi-scale latent fusion of VFM-VAE, arXiv 2510.18457)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.convnext import Activation
from vfmlab.nn.depthwise import DepthwiseConv
from vfmlab.nn.norms import group_norm
from vfmlab.nn.pointwise import PointwiseConv
from vfmlab.nn.vit_block import ACTIVATIONS


class LatentFusion(nn.Module):
    """[depthwise 3x3 -> 1x1 -> GroupNorm -> activation], then [1x1 -> GroupNorm]. B C h w -> B C' h*up/down
    w*up/down.

    A smaller target is reached by pixel-unshuffling first, a larger one by pixel-shuffling between the two
    stages, so that no value of the latent is averaged away.

    Args:
        inputs, outputs: channels. up, down: whole factors of the side; one of them is 1.
    """

    def __init__(self, inputs: int, outputs: int, up: int = 1, down: int = 1,
                 activation: Activation = "leaky_relu"):
        super().__init__()
        self.up, self.down, self.activation = up, down, ACTIVATIONS[activation]
        inputs, inner = inputs * down**2, outputs * up**2
        self.depthwise = DepthwiseConv(inputs, 3, bias=False)
        self.pointwise = PointwiseConv(inputs, inner, bias=False)
        self.norm = group_norm(inner, least=1)
        self.mix = PointwiseConv(outputs, outputs, bias=False)
        self.norm_out = group_norm(outputs, least=1)

    def forward(self, z: Tensor) -> Tensor:
        if self.down > 1:
            z = F.pixel_unshuffle(z, self.down)
        z = self.activation(self.norm(self.pointwise(self.depthwise(z))))
        if self.up > 1:
            z = F.pixel_shuffle(z, self.up)
        return self.norm_out(self.mix(z))
