"""The latent cache: a data set encoded once through a tokenizer, and the streams of latents that diffusion
trains on.

    <directory>/meta.json                 what is cached: fingerprint, shape, counts, classes, statistics
                latents-00000.safetensors mean, std (and mean_flip, std_flip), labels, indices of SHARD
                images; -00001 ...

Means and standard deviations of the *normalised* posterior are stored in fp16: at their unit scale its range
is no limit and its rounding error is about 2e-4 of the latents' standard deviation (bf16: 2e-3). The std is
stored instead of the log-variance because a rounding error of the logarithm is multiplied by the std's size.

How the files are kept: `vfmlab.diffusion.shards`. A cache is used only with the fingerprint of tokenizer,
data and options that it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vfmlab.data import Batch, BatchStream, ImageSource, to_float
from vfmlab.data.stream import Order, from_thread
from vfmlab.diffusion import shards
from vfmlab.errors import CheckpointError
from vfmlab.seeding import generator
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.weights import io

FORMAT = "vfmlab-latents/1"
WHAT = shards.What("latents", "tokenizer", "latent cache", FORMAT)
Maps = Callable[[Tensor, bool], dict[int, Tensor]]  # (indices long B, mirrored) -> B D h w by layer
SHARD = 4096  # images a shard: at 16 x 16 x 32 about 128 MB with both copies


class LatentBatch(NamedTuple):
    """z: fp32 B C h w normalised latents. labels, indices: long B."""

    z: Tensor
    labels: Tensor
    indices: Tensor


def fingerprint(tokenizer: Tokenizer, source: ImageSource, flip: bool = False, sampled: bool = True) -> str:
    """Digest of all that decides a cache: the tokenizer's weights and statistics, VFM, images, options."""
    tokenizer.statistics  # noqa: B018  missing statistics are an error here, before anything is encoded
    vfm = getattr(tokenizer.vfm, "fingerprint", None)
    config = tokenizer.config.model_dump(mode="json")
    return shards.fingerprint(FORMAT, config, tokenizer.size, io.digest(tokenizer), vfm, source.fingerprint,
                              len(source), flip, sampled)


def build(directory: str | Path, tokenizer: Tokenizer, source: ImageSource, flip: bool = False,
          sampled: bool = True, batch: int = 64, rank: int = 0, world: int = 1,
          maps: Maps | None = None) -> Iterator[tuple[int, int]]:
    """Encode `source` into `directory`, or find it encoded; yields (images done, images in all) on the way.

    Args:
        tokenizer: in eval mode, with statistics; encodes on the device it is on, in fp32.
        flip: also store the mirrored images' latents. sampled: store the posterior's std, so that z can be
            drawn anew each time; otherwise (and for a deterministic tokenizer) only the mode.
        rank, world: of several processes each encodes every world-th shard, then waits for the others.
        maps: the frozen VFM's maps of these images by layer, where they are stored; else the VFM is asked.

    Raises:
        CheckpointError: the tokenizer has no statistics, the directory holds other latents, or a latent is
        not finite.
    """
    directory, statistics = Path(directory), tokenizer.statistics
    meta = shards.begun(
        directory, WHAT, fingerprint(tokenizer, source, flip, sampled),
        count=len(source), shape=list(tokenizer.latent_shape), shard=SHARD, flip=flip,
        class_names=source.class_names, method=tokenizer.config.method, data=source.fingerprint,
        statistics={"mean": statistics.mean.tolist(), "std": statistics.std.tolist(),
                    "count": statistics.count, "fingerprint": statistics.fingerprint},
    )

    def encode(indices: Tensor, images: Batch) -> dict[str, Tensor]:
        return _encode(tokenizer, indices, images, flip, sampled, maps)

    yield from shards.write(directory, "latents", meta, source.batch, encode, batch, rank, world)


@torch.no_grad()
def _encode(tokenizer: Tokenizer, indices: Tensor, batch: Batch, flip: bool, sampled: bool,
            maps: Maps | None) -> dict[str, Tensor]:
    """One batch as it is stored."""
    images = to_float(batch.images).to(tokenizer.stat_mean.device)
    stored = {"labels": batch.labels, "indices": batch.indices}
    for suffix, view in {"": images, "_flip": images.flip(-1)}.items():
        if suffix and not flip:
            continue
        posterior = tokenizer.encode(view, maps and maps(indices, bool(suffix)))
        stored[f"mean{suffix}"] = posterior.mean.half().cpu()
        if sampled and posterior.logvar is not None:
            stored[f"std{suffix}"] = posterior.std.half().cpu()
    for key, value in stored.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            which = f"one of the images {int(indices[0])} to {int(indices[-1])}"
            raise CheckpointError(f"tokenizer '{tokenizer.config.method}' encodes {which} to a {key} that is "
                                  "not finite in fp16; look at its training, or measure its latent "
                                  "statistics again")
    return stored


class LatentSource:
    """Random access to a finished cache. Shards are memory-mapped: a cache larger than memory is read as it
    is needed.

    Args:
        directory: of the cache. wanted: fingerprint it must have; None: any. rank, world: as of
            :class:`~vfmlab.diffusion.shards.Shards`.

    Attributes:
        shape: (C, h, w). flip: mirrored copies are there. sampled: stds are there.
        used: long N, the image whose latent stands at an index; another where it could not be read. Caches of
            earlier versions do not know.

    Raises:
        CheckpointError: no cache there, another one, or an incomplete or broken one.
    """

    def __init__(self, directory: str | Path, wanted: str | None = None, rank: int = 0, world: int = 1):
        self._shards = shards.finished(directory, WHAT, "vfmlab.diffusion.latents.build", wanted, rank, world)
        meta = self._shards.meta
        self.meta, self.fingerprint, self.shape = meta, meta["fingerprint"], tuple(meta["shape"])
        self.flip = meta["flip"]
        self.shards = self._shards.parts
        self.sampled = "std" in self.shards[0]
        self.all_labels = torch.cat([shard["labels"] for shard in self.shards])
        known = all("indices" in shard for shard in self.shards)
        self.used = (torch.cat([shard["indices"] for shard in self.shards]) if known
                     else torch.arange(len(self.all_labels)))

    def __len__(self) -> int:
        return len(self.all_labels)

    def labels(self, indices: Tensor) -> Tensor:
        """Long B."""
        return self.all_labels[indices]

    def latents(self, indices: Tensor, flip: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
        """Normalised latents z, fp32 B C h w.

        Args:
            indices: long B. flip: bool B, which rows take the mirrored copy. noise: standard normal B C h w
            that draws z from the posterior; None: the mode. A cache without stds ignores it.
        """
        if flip is not None and flip.any() and not self.flip:
            raise CheckpointError("this latent cache has no mirrored copies; build it with flip=True")
        z = self._shards.rows("mean", indices, flip)
        if noise is not None and self.sampled:
            z = z.addcmul_(self._shards.rows("std", indices, flip), noise.to(z))
        return z


def posterior_noise(seed: int, step: int, total: int, shape: tuple[int, ...], rows: slice) -> Tensor:
    """The noise that draws step's latents from their posteriors: this rank's rows of the global batch's."""
    return torch.randn(total, *shape, generator=generator("latents", seed, step))[rows]


class Draws:
    """Step -> indices of this rank's rows, and which are mirrored: the draws of `BatchStream`."""

    def __init__(self, count: int, batch: int, seed: int, rows: slice, flip: bool):
        self.order, self.batch, self.seed = Order(count, batch, seed), batch, seed
        self.rows, self.flip = rows, flip

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        indices = self.order(step)[self.rows]
        if not self.flip:
            return indices, None
        return indices, torch.rand(self.batch, generator=generator("flip", self.seed, step))[self.rows] < 0.5


class _Cached:
    """Step -> this rank's rows of its batch of cached latents."""

    def __init__(self, source: LatentSource, batch: int, seed: int, rows: slice):
        self.source, self.batch, self.seed, self.rows = source, batch, seed, rows
        self.draws = Draws(len(source), batch, seed, rows, source.flip)

    def __getitem__(self, step: int) -> LatentBatch:
        indices, flip = self.draws(step)
        noise = None
        if self.source.sampled:
            noise = posterior_noise(self.seed, step, self.batch, self.source.shape, self.rows)
        latents, labels = self.source.latents(indices, flip, noise), self.source.labels(indices)
        return LatentBatch(latents, labels, self.source.used[indices])


def cached_stream(source: LatentSource, batch: int, seed: int, start_step: int = 0,
                  rows: slice | None = None) -> Iterator[LatentBatch]:
    """Batches of cached latents without end, step `start_step` first, each a pure function of (seed, step).

    Order and flips are those of :class:`vfmlab.data.BatchStream` with the same seed; arguments as there.
    """
    return from_thread(_Cached(source, batch, seed, rows if rows is not None else slice(0, batch)),
                       start_step)


def fresh_stream(
    images: BatchStream, tokenizer: Tokenizer, batch: int, seed: int, start_step: int = 0,
    rows: slice | None = None,
    sampled: bool = True,
) -> Iterator[LatentBatch]:  # fmt: skip
    """The same batches encoded on the fly: what :func:`cached_stream` gives, up to the rounding of its fp16.

    Args:
        images: a stream that was started with the same batch, seed, start_step and rows.
    """
    rows = rows if rows is not None else slice(0, batch)
    device = tokenizer.stat_mean.device
    with closing(images):
        for step, part in enumerate(images, start_step):
            with torch.no_grad():
                posterior = tokenizer.encode(to_float(part.images.to(device)))
                noise = (
                    posterior_noise(seed, step, batch, posterior.mean.shape[1:], rows) if sampled else None
                )
                z = posterior.mode() if noise is None else posterior.sample(noise=noise.to(device))
            yield LatentBatch(z, part.labels, part.indices)
