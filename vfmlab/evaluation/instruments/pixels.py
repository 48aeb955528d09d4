"""PSNR, SSIM and LPIPS of each reconstruction against its own image."""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.evaluation.instruments.base import Metric, Part, Pass
from vfmlab.evaluation.number import HEADLINE, HIGHER, LOWER, TABLE, Draft, Quantity
from vfmlab.evaluation.pixels import compare, perceptual
from vfmlab.registry import INSTRUMENTS


@INSTRUMENTS.register("pixels")
class Pixels(Metric):
    """Means over images; spread: standard deviation over images."""

    order = 10
    quantities = (
        Quantity("psnr", "PSNR", HIGHER, "dB", (TABLE, HEADLINE),
                 definition="10 log10 of peak power over the mean squared error of a reconstruction, mean of images"),
        Quantity("psnr_mask", "PSNR in mask", HIGHER, "dB", (TABLE,),
                 definition="PSNR inside the object's mask"),
        Quantity("ssim", "SSIM", HIGHER, "", (TABLE,),
                 definition="structural similarity of a reconstruction with its image, both in [-1, 1] "
                            "(in [0, 1] it differs by hundredths)"),
        Quantity("lpips", "LPIPS (AlexNet)", LOWER, "", (TABLE,),
                 definition="distance of image and reconstruction in AlexNet's features, as fitted to human judgements"),
    )  # fmt: skip

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.lpips = perceptual(str(gathered.tokenizer.stat_mean.device))
        self.values: dict[str, list[Tensor]] = {}
        self.missing: dict[str, str] = {}

    def update(self, part: Part) -> None:
        masks = self.gathered.setup.source.masks(part.ids)
        for name, value in compare(part.images, part.output, masks, self.lpips).items():
            if isinstance(value, str):
                self.missing[name] = value
            else:
                self.values.setdefault(name, []).append(value.double().cpu())

    def write(self, draft: Draft) -> None:
        resolved = self.gathered.resolved.of("images")
        for name, parts in self.values.items():
            x = torch.cat(parts)
            if len(x):
                draft.mean(name, x, resolved)
            else:
                draft.absent(name, "no image has anything to measure it on")
        for name, reason in self.missing.items():
            draft.absent(name, reason)
