"""The frozen network whose features a representation is compared with: by default one of another family.

A tokenizer that was built on a vision model, or aligned with it, agrees with that model for a trivial reason.
So the default is a model of another family: the judge where it is the protocol's feature space (another
architecture, data order and seed than the pocket VFM), else DINOv2-B, or SigLIP2-B where a DINO is inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab import config, data
from vfmlab.evaluation import cache, perturbations
from vfmlab.evaluation.features import FeatureSpace, VisionModelSpace
from vfmlab.evaluation.number import NOT_HASHED
from vfmlab.evaluation.perturbations import Perturbation, sides_of
from vfmlab.evaluation.protocol import Resolved, selection
from vfmlab.nn.transforms import resize

FAMILIES = ("siglip", "dino", "eva", "mae", "clip", "pocket")  # the first that a name contains


def family(name: str) -> str:
    """The family of a model or feature space: "dino" for `dinov2_b14`, else the name itself."""
    bare = name.lower().removeprefix("vfm:").removeprefix("timm:").partition(":")[0]
    return next((f for f in FAMILIES if f in bare), bare)


def default(vfm: str | None, features: str) -> str:
    """Feature space of the reference for something built on `vfm` (or on none) under `protocol.features`."""
    if family(features) == "judge":
        return features
    return "siglip2_b16_256" if vfm is not None and family(vfm) == "dino" else "dinov2_b14"


class Reference:
    """Token-mean features of a feature space, cached on disk for every perturbation of the images."""

    def __init__(self, space: FeatureSpace):
        self.space, self.name = space, space.name

    def facts(self) -> dict[str, str | int]:
        """What enters a protocol's hash."""
        return self.space.facts() | {"pool": "token mean"}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images B 3 S S in [-1, 1] -> B D on the CPU."""
        space = self.space
        if isinstance(space, VisionModelSpace):
            return space.model.features(images, (-1,)).maps[-1].mean((2, 3)).float().cpu()
        return space(images).features.float().cpu()

    def features(self, source: data.ImageSource, resolved: Resolved, perturbation: Perturbation,
                 batch_size: int, device: str | torch.device, cell: int = 1) -> Tensor:
        """N D for the protocol's perturbed images; a scaled image is brought back to the full size for it."""
        section = {k: v for k, v in resolved.sections["images"].items() if k not in ("ema", *NOT_HASHED)}
        sides = sides_of(section["size"], cell) if perturbation.moved else None
        key = config.digest([section, self.facts(), perturbation.name, perturbation.facts, sides])
        path = cache.folder() / "reference_features" / f"{key}.safetensors"

        def read(images: Tensor, ids: list[int]) -> Tensor:
            return self(resize(images.to(device), section["size"]))

        return perturbations.features(path, source, selection(resolved, source), perturbation,
                                      section["seed"], cell, batch_size, read)
