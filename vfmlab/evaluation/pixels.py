"""Images against images, pixel by pixel: PSNR (the only one in the project), SSIM and LPIPS."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from vfmlab.errors import ConfigError
from vfmlab.evaluation.features import fetch

FLOOR = 1e-10  # mean squared error on [0, 1] of a perfect image: 100 dB


def decibels(mse: Tensor) -> Tensor:
    """PSNR of mean squared errors on [0, 1]; equal images count as 100 dB, so that means stay finite."""
    return -10 * mse.clamp_min(FLOOR).log10()


def psnr(images: Tensor, restored: Tensor) -> Tensor:
    """PSNR in dB of each of B images, both B 3 H W in [-1, 1]: B."""
    return decibels(((images - restored) / 2).square().mean((1, 2, 3)))


@functools.cache
def perceptual(device: str = "cpu", network: str = "alex") -> nn.Module | str:
    """LPIPS (arXiv 1801.03924; AlexNet, as its authors measure, or VGG) by torchmetrics, or why there is
    none.

    VGG's weights are not downloaded for this.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    weights = {"alex": AlexNet_Weights, "vgg": VGG16_Weights}[network]
    try:
        fetch(weights.DEFAULT.url, f"LPIPS ({network})", download=network == "alex")
        return LearnedPerceptualImagePatchSimilarity(net_type=network).net.to(device)
    except ConfigError as error:
        return str(error)


def compare(images: Tensor, restored: Tensor, masks: Tensor | None,
            lpips: nn.Module | str) -> dict[str, Tensor | str]:
    """Every pixel metric, one number per image (B), or the reason why it cannot be had.

    Args:
        images, restored: B 3 H W in [-1, 1]. masks: bool B 1 H W of the object, None where there are none.
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
    return values | {"lpips": distances(images, restored, lpips)}


def distances(images: Tensor, restored: Tensor, lpips: nn.Module | str) -> Tensor | str:
    """LPIPS of each of B images (both B 3 H W in [-1, 1]) by a network of :func:`perceptual`, or why there is
    none."""
    if isinstance(lpips, str):
        return lpips
    if min(images.shape[-2:]) < 32:
        return f"images of {images.shape[-1]} px are too small for its backbone (32)"
    return lpips(restored, images).reshape(-1)
