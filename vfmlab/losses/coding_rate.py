"""Classes apart in the latent: coding-rate reduction (MCR2, arXiv 2006.08558), as the discriminative first
stage of joint compression and classification (2310.19675) has it.

    R(Z) = 1/2 log det(I + d / (n eps^2) Z Z^T),  R_c = n_c / (2n) log det(I + d / (n_c eps^2) Z_c Z_c^T)
    value = sum of the R_c - R(Z)

Z: d x n, a column an image: the posterior's mode, its mean over places, of unit length. All images together
shall fill the space, those of one class little of it. That asks for more images than dimensions, n > d: with
fewer the optimum is images at right angles to each other, whatever their classes, as it was for flattened
latents (d = 512) in batches of 32. Constants, and the mean over places, are ours.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.registry import LOSSES


def rate(z: Tensor, eps: float) -> Tensor:
    """1/2 log det(I + d / (n eps^2) z^T z) of rows z (n d), in nats: the smaller of both determinants."""
    n, d = z.shape
    gram = z @ z.T if n <= d else z.T @ z
    whole = torch.eye(len(gram), device=z.device, dtype=z.dtype) + d / (n * eps**2) * gram
    return 0.5 * torch.linalg.slogdet(whole).logabsdet


def reduction(z: Tensor, labels: Tensor, eps: float) -> Tensor:
    """R(Z) minus the rates of the classes, each by its share of the rows; 0 where there is one class."""
    # one image is one class, also in a plan, where it has no values
    parts = [z] if len(z) == 1 else [z[labels == label] for label in labels.unique()]
    return rate(z, eps) - sum(len(part) / len(z) * rate(part, eps) for part in parts)


@LOSSES.register("coding_rate")
class CodingRate(Loss):
    """Minus the coding-rate reduction of a process's (micro-)batch: no mean over images, so that accumulation
    and more processes change it. It needs labels, and more images in a batch than the latent has channels."""

    class Config(config.LossConfig):
        eps: float = Field(0.5, gt=0, description="error that coding is allowed, for vectors of length 1")

    on_images = False

    def value(self, r: Reconstruction) -> Tensor:
        if r.labels is None:
            raise ConfigError(f"losses.{self.name} tells classes apart, but this batch has no labels; use "
                              "data with classes, or remove the term")
        z = F.normalize(r.posterior.mode().float().mean(dim=(2, 3)), dim=1, eps=1e-8)
        if 1 < len(z) <= z.shape[1]:  # of one image a plan counts the cost
            raise ConfigError(f"losses.{self.name}: {len(z)} images in a latent of {z.shape[1]} channels, "
                              "where right angles between all images are its optimum; use a larger "
                              "train.batch")
        return -reduction(z, r.labels, self.config.eps)
