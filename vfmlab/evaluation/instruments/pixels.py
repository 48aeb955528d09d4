"""PSNR, SSIM and LPIPS of each reconstruction against its own image."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from vfmlab.errors import ConfigError
from vfmlab.evaluation.features import fetch
from vfmlab.evaluation.instruments.base import Metric, Part, Pass
from vfmlab.evaluation.number import HEADLINE, HIGHER, LOWER, TABLE, Draft, Quantity
from vfmlab.registry import INSTRUMENTS

FLOOR = 1e-10  # mean squared error on [0, 1] of a perfect image: 100 dB


def decibels(mse: Tensor) -> Tensor:
    """PSNR of mean squared errors on [0, 1]; equal images count as 100 dB, so that means stay finite."""
    return -10 * mse.clamp_min(FLOOR).log10()


def psnr(images: Tensor, restored: Tensor) -> Tensor:
    """PSNR in dB of each of B images, both B 3 H W in [-1, 1]: B."""
    return decibels(((images - restored) / 2).square().mean((1, 2, 3)))


@functools.cache
def perceptual(device: str = "cpu") -> nn.Module | str:
    """LPIPS (arXiv 1801.03924; AlexNet, its authors' choice for measuring) by torchmetrics, or why there is
    none."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    try:
        fetch(AlexNet_Weights.DEFAULT.url, "LPIPS")
        return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
    except ConfigError as error:
        return str(error)


def compare(images: Tensor, restored: Tensor, masks: Tensor | None,
            lpips: nn.Module | str) -> dict[str, Tensor | str]:
    """Every pixel metric, one number per image (B), or the reason why it cannot be had.

    Args:
        images, restored: B 3 H W in [-1, 1]. masks: bool B 1 H W of the object, None where the data know
        none.
        lpips: the network, or why there is none.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    values: dict[str, Tensor | str] = {"psnr": psnr(images, restored), "psnr_mask": "this data has no masks"}
    if masks is not None:
        error = ((images - restored) / 2).square()
        masks = masks.to(error)
        covered = masks.sum((1, 2, 3))
        inside = (error.mean(1, keepdim=True) * masks).sum((1, 2, 3)) / covered.clamp_min(1)
        values["psnr_mask"] = decibels(inside)[covered > 0]  # an image without object has no inside
    ssim = structural_similarity_index_measure(restored, images, data_range=(-1.0, 1.0), reduction="none")
    values["ssim"] = ssim.reshape(-1)
    if isinstance(lpips, str):
        values["lpips"] = lpips
    elif min(images.shape[-2:]) < 32:
        values["lpips"] = f"images of {images.shape[-1]} px are too small for its backbone (32)"
    else:
        values["lpips"] = lpips(restored, images).reshape(-1)
    return values


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
                 definition="structural similarity of a reconstruction with its image"),
        Quantity("lpips", "LPIPS", LOWER, "", (TABLE,),
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
                draft.add(name, float(x.mean()), resolved, len(x), float(x.std(correction=0)))
            else:
                draft.absent(name, "no image has anything to measure it on")
        for name, reason in self.missing.items():
            draft.absent(name, reason)
