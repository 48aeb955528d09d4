"""PatchGAN on one or several scales: convolutions that judge overlapping patches (1611.07004, pix2pixHD
1711.11585).

It never sees a vision foundation model, so it cannot share the tokenizer's blind spots: the default choice.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.decoders.diffusion import State
from vfmlab.losses.discriminators.base import Discriminator, DiscriminatorConfig, Features
from vfmlab.losses.discriminators.heads import VirtualBatchNorm
from vfmlab.registry import DISCRIMINATORS

WIDEST = 512


class PatchJudge(nn.Module):
    """One scale: 4x4 convolutions, `layers` of stride 2 and two of stride 1; no norm in the first and the
    last.

    The padding of 2 makes maps one larger than half, so the smallest images work.
    """

    def __init__(self, width: int, layers: int, norm: str):
        super().__init__()
        widths = [3, *(min(width * 2**k, WIDEST) for k in range(layers + 1))]
        strides = [2] * layers + [1]
        self.layers = nn.ModuleList(Layer(widths[k], widths[k + 1], strides[k], norm if k else "none")
                                    for k in range(layers + 1))
        self.out = nn.Conv2d(widths[-1], 1, 4, padding=2)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits B 1 h w, and the maps of all layers before."""
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return self.out(x), maps


class Layer(nn.Module):
    """Convolution -> norm -> leaky ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 4, stride, padding=2)
        self.norm = NORMS[norm](outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


NORMS = {
    # Always the batch's own statistics: a discriminator is only ever used on batches, and running ones would
    # mix real and generated images.
    "batch": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "virtual_batch": VirtualBatchNorm,
    "instance": lambda channels: nn.InstanceNorm2d(channels),
    "none": lambda channels: nn.Identity(),
}


@DISCRIMINATORS.register("patchgan")
class PatchGAN(Discriminator):
    """`scales` networks of one shape on images halved 0, 1, 2 ... times; logits: B 1 h w each, finest first.

    Defaults suit 32 px on a CPU. VFM-VAE's last stage trains against width 64, 3 layers, 3 scales, norms over
    virtual batches, with the LSGAN loss and feature matching 10 (released config). Weights start as in
    pix2pixHD: N(0, 0.02), norms N(1, 0.02).
    """

    class Config(DiscriminatorConfig):
        width: int = Field(16, ge=1, description="channels of the first layer; doubled by each one up to 512")
        layers: int = Field(3, ge=1, description="convolutions of stride 2")
        scales: int = Field(3, ge=1, description="image pyramid; 1: the plain PatchGAN")
        norm: Literal["batch", "virtual_batch", "instance", "none"] = Field(
            "instance",
            description="'batch' shares statistics over the images of one process's (micro-)batch, "
                        "'virtual_batch' over 8 images of it"
        )

    def __init__(self, config: PatchGAN.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        self.scales = nn.ModuleList(PatchJudge(config.width, config.layers, config.norm)
                                    for _ in range(config.scales))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d | VirtualBatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def score(self, images: Tensor, labels: Tensor | None,
              state: State | None = None) -> tuple[list[Tensor], Features]:
        """Labels and states are not looked at."""
        logits, features = [], []
        for k, scale in enumerate(self.scales):
            if k:
                images = F.avg_pool2d(images, 3, stride=2, padding=1, count_include_pad=False)
            out, maps = scale(images)
            logits.append(out)
            features.append(maps)
        return logits, features
