"""One picture at a time, as tensors and records: what the app, notebooks and pages show.

Plain functions from models and images to tensors and records. Images are N 3 S S in [-1, 1], latents
normalised; results are on the CPU. What belongs to a whole data set has its own place (`vfmlab.evaluation`);
what lies between two points is in `vfmlab.studies.interpolate`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab import api, config, data
from vfmlab.errors import ConfigError, DataError, VfmlabError
from vfmlab.evaluation import pixels
from vfmlab.evaluation.coder import Coder
from vfmlab.evaluation.features import FeatureSpace, open_space
from vfmlab.evaluation.roundtrip import CPU_PART, as_saved, evaluating, images_of
from vfmlab.evaluation.subject import Maps
from vfmlab.plots import primitives
from vfmlab.seeding import SampleRandom, derive, generator
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.vfm.base import VisionModel

Images = Tensor | Sequence[str | Path]
SHOWN_STD = 2.5  # a latent's channel is drawn from -2.5 to 2.5 of its standard deviations


@torch.no_grad()
def encode(tokenizer: Tokenizer, images: Images) -> Tensor:
    """The latents (posterior mode, normalised) of images: N C h w."""
    parts = api.images_for(tokenizer, images).split(CPU_PART)
    with evaluating(tokenizer):
        on = tokenizer.stat_mean.device
        return torch.cat([tokenizer.encode(part.to(on)).mode().cpu() for part in parts])


@torch.no_grad()
def decode(tokenizer: Tokenizer, z: Tensor, ids: Tensor | None = None) -> Tensor:
    """Images of normalised latents N C h w: N 3 S S.

    ids: of the images, where decoding draws noise; None: their places.
    """
    with evaluating(tokenizer):
        return images_of(tokenizer, z, ids=ids)


# -- reconstruction ----------------------------------------------------------------------


@dataclass(frozen=True)
class Disturbance:
    """What is done to latents before they are decoded, to see what breaks. The default does nothing.

    sigma: noise added to each value, in standard deviations of its channel; seed: of that noise. channels:
    the first principal ones (None: all); bits: each of these is rounded to 2^bits levels (None: not rounded).
    """

    sigma: float = 0.0
    channels: int | None = None
    bits: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sigma <= 10:  # NaN fails too
            raise ConfigError(f"sigma = {self.sigma}: noise is between 0 and 10 standard deviations")
        for name, value, most in (("channels", self.channels, math.inf), ("bits", self.bits, 16)):
            if value is not None and not 1 <= value <= most:
                to = f" to {most}" if most < math.inf else ""
                raise ConfigError(f"{name} = {value}: give a whole number from 1{to}, or nothing")

    @property
    def rounds(self) -> bool:
        return self.channels is not None or self.bits is not None

    def __call__(self, z: Tensor, bank: Maps | None = None) -> Tensor:
        """z: N C h w. bank: latents of other images, on which rounding chooses channels and levels.

        Raises:
            ConfigError: rounding without a bank, or more channels than there are.
        """
        if self.rounds:
            if bank is None:
                raise ConfigError("channels, bits: these are chosen on latents of other images; give a bank")
            channels = z.shape[1] if self.channels is None else self.channels
            if channels > z.shape[1]:
                raise ConfigError(f"channels = {channels}: this latent has {z.shape[1]} channels")
            z, _ = Coder(bank.maps)(z, channels, 16 if self.bits is None else self.bits)
        if self.sigma:
            z = z + self.sigma * SampleRandom(derive("noisy", self.seed), range(len(z))).randn(*z.shape[1:])
        return z


@dataclass(frozen=True)
class Rebuilt:
    """Images through one tokenizer.

    target, images: N 3 S S, originals and reconstructions. latent: what is decoded, N C h w. metrics: name ->
    one number per image (psnr in dB, ssim, lpips, feature_distance). missing: name -> why there is none.
    """

    target: Tensor
    images: Tensor
    latent: Tensor
    metrics: dict[str, list[float]]
    missing: dict[str, str]

    def error(self, gain: float = 4.0) -> Tensor:
        """Mean absolute error over channels, grey N 3 S S; white: 2 / gain or more."""
        return primitives.error_map(self.target, self.images, gain)

    def latent_map(self) -> Tensor:
        """The first three principal components of the latent as colours, N 3 S S."""
        return primitives.pca_maps(self.latent, self.target.shape[-1])


@functools.lru_cache(maxsize=4)
def feature_space(name: str, size: int) -> FeatureSpace | str:
    """The feature space of that name, or in one line why it cannot be had here."""
    try:
        return open_space(name, size).to(api.device())
    except VfmlabError as error:
        return str(error)


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, images: Images, disturbance: Disturbance | None = None,
                bank: Maps | None = None, space: str | None = "judge") -> Rebuilt:
    """Images through a tokenizer and back, with the numbers of each; measured on 8-bit images, as reports do.

    Args:
        images: N 3 S S, or image files. disturbance, bank: see :class:`Disturbance`.
        space: of the feature distance (1 - cosine); None: not measured.
    """
    target = api.images_for(tokenizer, images)
    z = encode(tokenizer, target)
    if disturbance is not None:
        z = disturbance(z, bank)
    restored = as_saved(decode(tokenizer, z))
    where = api.device()
    values = pixels.compare(target.to(where), restored.to(where), None, pixels.perceptual(str(where)))
    metrics = {name: value.double().tolist() for name, value in values.items() if not isinstance(value, str)}
    missing = {k: v for k, v in values.items() if isinstance(v, str) and k != "psnr_mask"}
    if space is not None:
        opened = feature_space(space, tokenizer.size)
        if isinstance(opened, str):
            missing["feature_distance"] = opened
        else:
            a, b = (opened(x.to(where)).features.double() for x in (target, restored))
            metrics["feature_distance"] = (1 - F.cosine_similarity(a, b)).tolist()
    return Rebuilt(target, restored, z, metrics, missing)


# -- features ----------------------------------------------------------------------


@torch.no_grad()
def layer_maps(model: Tokenizer | VisionModel, images: Images,
               layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Feature maps N C h w by depth: "layer 0", "layer 2", ... of the VFM, then "latent" of a tokenizer.

    model: a tokenizer (with or without a VFM) or a vision model. layers: of the VFM; None: those it reads by
    default. Maps of a tokenizer's own encoder are called "encoder ...".
    """
    if isinstance(model, VisionModel):
        x = images if isinstance(images, Tensor) else api.read_images(images, model.size)
        maps = model.features(x.to(model.mean.device), layers).maps
        return {f"layer {k}": value.cpu() for k, value in maps.items()}
    x = api.images_for(model, images)
    maps = {} if model.vfm is None else layer_maps(model.vfm, x, layers)
    own = model.own_features(x.to(model.stat_mean.device))
    maps |= {f"encoder {k}": m.float().cpu() for k, m in (own or {}).items()}
    return maps | {"latent": encode(model, x)}


def colours(maps: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    """Each map N C h w as the colours of its first three principal components, N 3 `size` `size`."""
    return {name: primitives.pca_maps(value, size) for name, value in maps.items()}


def likeness(maps: Tensor, query: tuple[float, float]) -> Tensor:
    """Cosine of every position of maps N C h w to the one at `query` (y, x in 0..1): N h w in [-1, 1].

    Raises:
        ConfigError: a query outside the image.
    """
    if not all(0 <= q <= 1 for q in query):
        raise ConfigError(f"query = {tuple(query)}: y and x are shares of the image, 0 to 1")
    unit = F.normalize(maps.float(), dim=1)
    h, w = unit.shape[-2:]
    here = unit[:, :, min(int(query[0] * h), h - 1), min(int(query[1] * w), w - 1)]
    return torch.einsum("bchw,bc->bhw", unit, here)


def grey(values: Tensor, size: int) -> Tensor:
    """Maps N h w in [-1, 1] as grey images N 3 `size` `size`; pixels stay pixels."""
    shades = F.interpolate(values[:, None].clamp(-1, 1), size=(size, size), mode="nearest")
    return shades.expand(-1, 3, -1, -1)


def marked(images: Tensor, query: tuple[float, float]) -> Tensor:
    """Images with a small white square, framed black, at `query` (y, x in 0..1)."""
    size, out = images.shape[-1], images.clone()
    inner = size // 64  # pixels around the middle one that are white
    y, x = (min(int(q * size), size - 1) for q in query)
    for half, value in ((inner + 1, -1.0), (inner, 1.0)):
        out[:, :, max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1] = value
    return out


def channel_maps(z: Tensor, size: int, count: int | None = None) -> Tensor:
    """The first `count` channels (None: all) of one latent 1 C h w as grey images K 3 `size` `size`.

    Black is -2.5, white 2.5 standard deviations.
    """
    return grey(z[0, :count] / SHOWN_STD, size)


# -- neighbours ----------------------------------------------------------------------


@torch.no_grad()
def bank(tokenizer: Tokenizer, cfg: config.Data, n: int = 500, seed: int = 0) -> Maps:
    """Latents of a seeded choice of `n` held-out images (all, where there are fewer), labels and source."""
    source = data.open_source(cfg, "val")
    which = torch.randperm(len(source), generator=generator("bank", seed))[:n].sort().values
    batches = [source.batch(part) for part in which.split(CPU_PART)]
    z = torch.cat([encode(tokenizer, data.to_float(batch.images)) for batch in batches])
    labels, used = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("labels", "indices"))
    return Maps(z, labels, used, source)


@dataclass(frozen=True)
class Neighbours:
    """Nearest first. images: K 3 S S; labels: names of classes; indices: positions in the held-out split.

    distances: root mean square over the latent's values, in standard deviations.
    """

    images: Tensor
    labels: list[str]
    indices: list[int]
    distances: list[float]


def nearest(bank: Maps, z: Tensor, k: int = 8, pooled: bool = False) -> Neighbours:
    """The images of a bank whose latents are nearest to z (1 C h w).

    pooled: compare means over positions, so that where a thing is does not count.

    Raises:
        DataError: z has another shape than the bank's latents.
    """
    if z.shape != (1, *bank.maps.shape[1:]):
        raise DataError(f"the latent has shape {tuple(z.shape)}, the bank's {tuple(bank.maps.shape[1:])}; "
                        "encode with the same tokenizer")
    others, own = (x.mean((2, 3)) if pooled else x.flatten(1) for x in (bank.maps, z))
    distances = (others - own).square().mean(1).sqrt()
    first = distances.topk(min(k, len(bank)), largest=False)
    positions = bank.indices[first.indices]
    names = [bank.source.class_names[i] for i in bank.labels[first.indices].tolist()]
    images = data.to_float(bank.source.batch(positions).images)
    return Neighbours(images, names, positions.tolist(), first.values.tolist())
