"""What the frozen VFM says about the training images of a tokenizer, computed once: a folder of targets.

The maps of all layers that the tokenizer and its losses read, in fp16, with those of the mirrored images
where the run flips. The files are those of :mod:`vfmlab.diffusion.targets`; a folder belongs to the VFM's
weights, the size at which it sees images, the layers and the images, and all runs that share these share it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vfmlab.data import Batch, BatchStream, ImageSource
from vfmlab.diffusion import latents, shards, targets
from vfmlab.errors import CheckpointError
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.vfm.base import VisionModel

FORMAT = "vfmlab-features/1"


class FeatureBatch(NamedTuple):
    """:class:`~vfmlab.data.Batch` with the VFM's maps of its images by layer, B D h w, fp32."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    features: dict[int, Tensor]


class Reader:
    """The maps of `layers` of a frozen VFM, as :func:`vfmlab.diffusion.targets.build` stores them."""

    def __init__(self, model: VisionModel, layers: tuple[int, ...]):
        self.model, self.layers, self.name = model, layers, model.facts.name

    @property
    def device(self) -> torch.device:
        return self.model.mean.device

    def size(self, count: int, flip: bool) -> float:
        """Gigabytes on disk of `count` images."""
        values = sum(self.model.width(k) * self.model.grid(k)[0] * self.model.grid(k)[1] for k in self.layers)
        return 2e-9 * values * count * (2 if flip else 1)

    def facts(self) -> dict[str, Any]:
        return {"vfm": self.name, "weights": self.model.fingerprint, "input": self.model.input_size,
                "layers": list(self.layers)}

    def fingerprint(self, source: ImageSource, flip: bool) -> str:
        """Digest of all that decides the folder."""
        least = [] if source.least is None else [source.least]
        return shards.fingerprint(FORMAT, self.facts(), source.fingerprint, len(source), flip, *least)

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Images B 3 H W in [-1, 1] -> map B D h w by layer, fp32."""
        return {str(k): value for k, value in self.model.features(images, self.layers).maps.items()}


def stored(folder: Path, tokenizer: Tokenizer, source: ImageSource, flip: bool, rank: int = 0,
           world: int = 1) -> latents.Maps | None:
    """The maps of all that `tokenizer` reads, if a run has stored them for these images inside `folder`.

    rank, world: as of :class:`~vfmlab.diffusion.shards.Shards`.
    """
    if tokenizer.vfm is None or not tokenizer.layers:
        return None
    for file in sorted(folder.glob("features-*/meta.json")):
        try:
            meta = shards.read_meta(file.parent, targets.FORMAT, "target cache")
        except CheckpointError:  # damaged, or another version's: others may be whole
            continue
        reader = Reader(tokenizer.vfm, tuple(meta["layers"]))
        same = meta["fingerprint"] == reader.fingerprint(source, meta["flip"])  # also of images left out
        whole = all(part.exists() for part in shards.files(file.parent, "targets", meta))
        if same and whole and set(tokenizer.layers) <= set(meta["layers"]) and meta["flip"] >= flip:
            return _maps(targets.Targets(file.parent, rank, world), tokenizer.stat_mean.device)
    return None


def _maps(cached: targets.Targets, device: torch.device) -> latents.Maps:
    def read(indices: Tensor, mirrored: bool) -> dict[int, Tensor]:
        maps = cached[indices, torch.full_like(indices, mirrored, dtype=torch.bool)]
        return {int(layer): value.to(device) for layer, value in maps.items()}

    return read


def beside(images: BatchStream, cached: targets.Targets, batch: int, seed: int, start_step: int,
           rows: slice) -> Iterator[FeatureBatch]:
    """Each batch of `images`, `start_step`'s first, with the maps that `cached` holds of its images."""
    def together(pair: tuple[Batch, dict[str, Tensor]]) -> FeatureBatch:
        return FeatureBatch(*pair[0], {int(layer): value for layer, value in pair[1].items()})

    return shards.mapped(together,
                         targets.beside(images, [cached], None, batch, seed, start_step, rows))
