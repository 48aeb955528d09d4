"""The frozen network whose features a representation is compared with: by default one of another family.

A tokenizer that was built on a vision model, or aligned with it, agrees with that model for a trivial reason.
So the default is a model of another family: the judge where it is the protocol's feature space (another
architecture, data order and seed than the pocket VFM), a network that a package ships where the protocol
looks with one, else DINOv2-B, or SigLIP2-B for whatever builds on a DINO. Networks of two families may still
have been trained on the same images and labels: both families that packages ship have seen ImageNet's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab import config, data
from vfmlab.evaluation import cache, perturbations
from vfmlab.evaluation.features import OWN, FeatureSpace, VisionModelSpace
from vfmlab.evaluation.number import NOT_HASHED
from vfmlab.evaluation.perturbations import Perturbation, sides_of
from vfmlab.evaluation.protocol import Resolved, selection
from vfmlab.nn.transforms import resize

# The first that a name contains.
FAMILIES = (
    "siglip", "dino", "eva", "mae", "clip", "pocket", "efficientnet", "mobilenet", "convnext", "resnet", "regnet", "swin",
)  # fmt: skip
SHIPPED = ("mobilenetv2@128", "efficientnet_lite2@128")  # there without a network


def bare(name: str) -> str:
    """The vision model behind the name of a feature space, subject or VFM: `mobilenetv2` of
    `classifier:mobilenetv2@128`."""
    for prefix in ("vfm:", "classifier:", "timm:"):
        name = name.removeprefix(prefix)
    return name.partition(":")[0].partition("@")[0]


def family(name: str) -> str:
    """The family of a vision model, feature space or VFM row: "dino" for `dinov2_b14`, else the name
    itself."""
    model = bare(name).lower()
    return next((f for f in FAMILIES if f in model), model)


def related(vfm: str | None, features: str) -> str:
    """What a reader must know where a judge looks with the eyes of the VFM that it judges, else ""."""
    if vfm is None or family(vfm) != family(features):
        return ""
    what = "are the same vision model" if bare(vfm) == bare(features) else "are of one family"
    other = next(name for name in SHIPPED if family(name) != family(vfm))
    return (f"the VFM '{vfm}' and protocol.features '{features}' {what}: distances and class accuracy favour "
            f"what is built on it; look with another one too, for example classifier:{other}")


def default(vfm: str | None, features: str) -> str:
    """Feature space of the reference for something built on `vfm` (or on none) under `protocol.features`."""
    if family(features) in OWN:
        return features
    if features.startswith("classifier:") or bare(features) in map(bare, SHIPPED):
        known = (features.removeprefix("classifier:"), *SHIPPED)
        return next(name for name in known if vfm is None or family(name) != family(vfm))
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
        """N D for the protocol's perturbed images; a scaled image is brought back to the full size for it,
        but where the perturbation is the release's.

        Raises:
            ConfigError: the release's, and a network that reads no smaller images.
        """
        section = {k: v for k, v in resolved.sections["images"].items() if k not in ("ema", *NOT_HASHED)}
        sides = sides_of(section["size"], cell) if perturbation.moved else None
        key = config.digest([section, self.facts(), perturbation.name, perturbation.facts, sides])
        path = cache.folder() / "reference_features" / f"{key}.safetensors"

        def read(images: Tensor, ids: list[int]) -> Tensor:
            images = images.to(device)
            return self(images if perturbation.release else resize(images, section["size"]))

        return perturbations.features(path, source, selection(resolved, source), perturbation,
                                      section["seed"], cell, batch_size, read)
