"""The frozen network whose view of the images a representation is compared with: by default one of another family.

A tokenizer that was built on a vision model, or aligned with it, agrees with that model for a trivial reason. So the
default is a model of another family: the judge where it is the protocol's feature space (another architecture, data
order and seed than the pocket VFM), else DINOv2-B, or SigLIP2-B for whatever builds on a DINO.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab import config, data
from vfmlab.evaluation.features import FeatureSpace, VisionModelSpace
from vfmlab.evaluation.perturbations import View, sides_of
from vfmlab.evaluation.protocol import NOT_HASHED, Resolved, cache_folder, chosen
from vfmlab.nn.transforms import resize
from vfmlab.weights import io

FAMILIES = ("siglip", "dino", "eva", "mae", "clip", "pocket")  # the first that a name contains


def family(name: str) -> str:
    """The family of a vision model, feature space or VFM row: "dino" for `dinov2_b14`, else the name itself."""
    bare = name.lower().removeprefix("vfm:").removeprefix("timm:").partition(":")[0]
    return next((f for f in FAMILIES if f in bare), bare)


def default(vfm: str | None, features: str) -> str:
    """Feature space of the reference for something built on `vfm` (or on none) under `protocol.features`."""
    if family(features) == "judge":
        return features
    return "siglip2_b16_256" if vfm is not None and family(vfm) == "dino" else "dinov2_b14"


class Reference:
    """Token-mean features of a feature space, kept on disk for every view of the images."""

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

    def features(self, source: data.ImageSource, resolved: Resolved, view: View, batch: int, device: str | torch.device, cell: int = 1) -> Tensor:
        """N D for the protocol's images seen through `view`; a scaled image is brought back to the full size for it."""
        section = {k: v for k, v in resolved.sections["images"].items() if k not in ("ema", *NOT_HASHED)}
        sides = sides_of(section["size"], cell) if view.moved else None
        path = cache_folder() / "reference_features" / f"{config.digest([section, self.facts(), view.name, view.facts, sides])}.safetensors"
        if (found := kept(path)) is not None and len(found["features"]) == section["n"]:
            return found["features"]
        rows = []
        for part in chosen(resolved, source).split(batch):
            found = source.batch(part)
            images, out = data.to_float(found.images).to(device), None
            for where, seen in view(images, part.tolist(), section["seed"], cell):
                values = self(resize(seen, images.shape[-1]))
                out = values.new_empty(len(images), values.shape[1]) if out is None else out
                out[where] = values
            rows.append(out)
        keep(path, {"features": torch.cat(rows)})
        return torch.cat(rows)


def kept(path) -> dict[str, Tensor] | None:
    """Tensors that :func:`keep` wrote, or None where there are none or the file is damaged (it is then written anew)."""
    stored = io.cached(path)
    return None if stored is None else stored[0]


def keep(path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write(path, tensors)
