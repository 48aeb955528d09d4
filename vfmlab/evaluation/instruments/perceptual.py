"""LPIPS in VGG's features: another number than LPIPS in AlexNet's, and never the same column."""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.evaluation.instruments.base import Metric, Part, Pass
from vfmlab.evaluation.number import LOWER, Draft, Quantity
from vfmlab.evaluation.pixels import distances, perceptual
from vfmlab.registry import INSTRUMENTS


@INSTRUMENTS.register("lpips_vgg")
class VGGDistance(Metric):
    """Mean and spread over images; measured where VGG's weights (528 MB) are there already."""

    order = 12
    quantities = (
        Quantity("lpips_vgg", "LPIPS (VGG)", LOWER,
                 definition="distance of image and reconstruction in VGG-16's features, as fitted to human judgements"),
    )  # fmt: skip

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.network = perceptual(str(gathered.tokenizer.stat_mean.device), "vgg")
        self.values: list[Tensor] = []
        self.missing = ""

    def update(self, part: Part) -> None:
        distance = distances(part.images, part.output, self.network)
        if isinstance(distance, str):
            self.missing = distance
        else:
            self.values.append(distance.double().cpu())

    def write(self, draft: Draft) -> None:
        if self.missing:
            draft.absent("lpips_vgg", self.missing)
        else:
            draft.mean("lpips_vgg", torch.cat(self.values), self.gathered.resolved.of("images"))
