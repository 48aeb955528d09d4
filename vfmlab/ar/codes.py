"""The code cache: a data set encoded once through a quantised tokenizer, and the streams of codes that the ar
generator trains on.

    <directory>/meta.json               what is cached: fingerprint, tokens, codebook, counts, classes
                codes-00000.safetensors codes (N V T, int32) and labels of SHARD images; -00001 ...

V versions of every image: the image alone, with `flip` its mirror image too, or LlamaGen's ten crops (arXiv
2406.06525): corners and centre of a larger image, each also mirrored. Training draws one of them each time.
The files are those of `vfmlab.diffusion.shards`, as for latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vfmlab.ar.llamagen import CodeShape, inside
from vfmlab.config import Data
from vfmlab.data import Batch, BatchStream, ImageSource, open_source, to_float
from vfmlab.data.stream import Order, from_thread
from vfmlab.diffusion import shards
from vfmlab.seeding import generator
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.weights import io

FORMAT = "vfmlab-codes/1"
WHAT = shards.What("codes", "tokenizer", "code cache", FORMAT)
SHARD = 65_536  # images a shard: ten crops of 256 codes are 670 MB


class CodeBatch(NamedTuple):
    """codes: long B T in raster order. labels, indices: long B."""

    codes: Tensor
    labels: Tensor
    indices: Tensor


def crops(images: Tensor, size: int) -> list[Tensor]:
    """Four corners and the centre of images B C S S, `size` large, and the mirror image of each: ten."""
    most = images.shape[-1] - size
    places = [(0, 0), (0, most), (most, 0), (most, most), (most // 2, most // 2)]
    five = [images[:, :, y : y + size, x : x + size] for y, x in places]
    return [version for crop in five for version in (crop, crop.flip(-1))]


class Versions:
    """The images of a data set in all their versions.

    Args:
        data: the run's. ten_crops: how much larger than data.size images are cropped from; None: no crops.

    Attributes:
        source: of the images that are cut. count: versions of an image.
    """

    def __init__(self, data: Data, ten_crops: float | None = None):
        self.size, self.flip, self.ten_crops = data.size, data.flip, ten_crops
        self.side = data.size if ten_crops is None else max(data.size + 1, round(data.size * ten_crops))
        self.source: ImageSource = open_source(data.model_copy(update={"size": self.side}), "train")
        self.count = 10 if ten_crops is not None else 1 + data.flip

    def of(self, images: Tensor) -> list[Tensor]:
        """Versions of `images` (B 3 S S), each B 3 size size."""
        if self.ten_crops is not None:
            return crops(images, self.size)
        return [images, images.flip(-1)][: self.count]


def fingerprint(tokenizer: Tokenizer, versions: Versions) -> str:
    """Digest of all that decides a cache: the tokenizer's weights, its VFM, the images and their versions."""
    vfm, source = getattr(tokenizer.vfm, "fingerprint", None), versions.source
    return shards.fingerprint(FORMAT, tokenizer.config.model_dump(mode="json"), tokenizer.size,
                              io.digest(tokenizer), vfm, source.fingerprint, len(source), versions.side,
                              versions.count)


def build(directory: str | Path, tokenizer: Tokenizer, versions: Versions, batch: int = 64, rank: int = 0,
          world: int = 1) -> Iterator[tuple[int, int]]:
    """Encode all versions of all images into `directory`, or find them encoded; yields (done, in all).

    Args:
        tokenizer: quantised, in eval mode; encodes on the device it is on, in fp32. rank, world: of several
        processes each encodes every world-th shard, then waits for the others.

    Raises:
        CheckpointError: the directory holds other codes. ConfigError: a continuous tokenizer, or codes
        outside its codebook.
    """
    directory, shape = Path(directory), CodeShape.of(tokenizer)
    meta = shards.begun(
        directory, WHAT, fingerprint(tokenizer, versions), count=len(versions.source), shard=SHARD,
        tokens=shape.tokens, entries=shape.entries, versions=versions.count,
        class_names=versions.source.class_names, method=tokenizer.config.method,
        data=versions.source.fingerprint,
    )
    device = next(tokenizer.parameters()).device

    @torch.no_grad()
    def encode(indices: Tensor, part: Batch) -> dict[str, Tensor]:
        images = to_float(part.images).to(device)
        codes = torch.stack([tokenizer.codes(version) for version in versions.of(images)], dim=1)
        inside("codes", codes, shape.entries, f"of tokenizer '{tokenizer.config.method}'")
        return {"codes": codes.int().cpu(), "labels": part.labels}

    yield from shards.write(directory, "codes", meta, versions.source.batch, encode, batch, rank, world)


class CodeSource:
    """Random access to a finished cache; its shards are memory-mapped.

    Args:
        rank, world: as of :class:`~vfmlab.diffusion.shards.Shards`.

    Raises:
        CheckpointError: no cache there, another one, or an incomplete or broken one.
    """

    def __init__(self, directory: str | Path, wanted: str, rank: int = 0, world: int = 1):
        self._shards = shards.finished(directory, WHAT, "vfmlab.ar.codes.build", wanted, rank, world)
        self.versions = self._shards.meta["versions"]
        self.labels = torch.cat([shard["labels"] for shard in self._shards.parts])

    def __len__(self) -> int:
        return len(self.labels)

    def codes(self, indices: Tensor, versions: Tensor | None = None) -> Tensor:
        """Long B T. indices: long B. versions: which of each image, long B; None: the first."""
        every = self._shards.rows("codes", indices)
        which = torch.zeros_like(indices) if versions is None else versions
        return every[torch.arange(len(indices)), which].long()


class _Cached:
    """Step -> this rank's rows of its batch of cached codes."""

    def __init__(self, source: CodeSource, batch: int, seed: int, rows: slice):
        self.source, self.batch, self.seed, self.rows = source, batch, seed, rows
        self.order = Order(len(source), batch, seed)

    def __getitem__(self, step: int) -> CodeBatch:
        indices, versions = self.order(step)[self.rows], None
        if self.source.versions > 1:
            draw = generator("version", self.seed, step)
            versions = torch.randint(self.source.versions, (self.batch,), generator=draw)[self.rows]
        return CodeBatch(self.source.codes(indices, versions), self.source.labels[indices], indices)


def cached_stream(source: CodeSource, batch: int, seed: int, start_step: int = 0,
                  rows: slice | None = None) -> Iterator[CodeBatch]:
    """Batches of cached codes without end, step `start_step` first, each a pure function of (seed, step)."""
    return from_thread(_Cached(source, batch, seed, rows or slice(0, batch)), start_step)


def fresh_stream(images: BatchStream, tokenizer: Tokenizer) -> Iterator[CodeBatch]:
    """Batches of `images` encoded on the fly."""
    device = next(tokenizer.parameters()).device

    def encode(part: Batch) -> CodeBatch:
        return CodeBatch(tokenizer.codes(to_float(part.images.to(device))), part.labels.to(device),
                         part.indices)

    return shards.mapped(encode, images)
