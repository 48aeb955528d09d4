"""What frozen VFMs say about the training images: patch tokens for REPA, global tokens for REG; cached beside
the latents.

    <directory>/meta.json                which VFM, layer, grid, data
                targets-00000.safetensors `target` B D h w on the network's grid, `token` B K, their `_flip`s;
                fp16

A cache does not depend on the tokenizer: all runs on the same images with the same target share it. How its
files are kept: `vfmlab.diffusion.shards`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vfmlab import vfm
from vfmlab.config import VFM, Diffusion
from vfmlab.data import Batch, BatchStream, ImageSource, some_images, to_float
from vfmlab.data.stream import from_thread
from vfmlab.diffusion import latents, shards
from vfmlab.diffusion.alignment import regrid
from vfmlab.errors import CheckpointError, ConfigError

FORMAT = "vfmlab-targets/1"
WHAT = shards.What("targets", "VFM", "target cache", FORMAT)
STATISTICS_IMAGES = 4096  # where tokens are not cached


class AlignedBatch(NamedTuple):
    """:class:`~vfmlab.diffusion.latents.LatentBatch` with targets: B D h w patch tokens, B K global token, or
    None."""

    z: Tensor
    labels: Tensor
    indices: Tensor
    target: Tensor | None = None
    token: Tensor | None = None


class Teacher:
    """A frozen VFM as the source of targets.

    Args:
        cfg: the VFM. size: side of the images in pixels. layer: whose map is wanted, or None. grid: what maps
            are brought to. pooled: the global token is wanted. resample: maps of another grid are brought to
            `grid`; else refused.

    Raises:
        ConfigError: a layer that does not exist, another grid, a VFM without global token.
    """

    def __init__(self, cfg: VFM, size: int, layer: int | None, grid: tuple[int, int], pooled: bool = False,
                 resample: bool = True):
        self.model = vfm.build(cfg.model_copy(update={"layers": None}), size)
        self.cfg, self.size, self.layer, self.grid, self.pooled = cfg, size, layer, tuple(grid), pooled
        if layer is not None:
            own = self.model.grid(layer)
            if own != self.grid and (not resample or own[0] * self.grid[1] != own[1] * self.grid[0]):
                raise ConfigError(f"alignment: layer {layer} of '{cfg.name}' has {own[0]} x {own[1]} places, "
                                  f"the network {self.grid[0]} x {self.grid[1]}; change "
                                  "alignment.vfm.upscale or network.patch, or set alignment.resample=true "
                                  "(for grids of one shape)")
        layers = {layer} if layer is not None else set()
        # models tell their global token with layer -1
        self.layers = tuple(sorted(layers | ({-1} if pooled else set())))
        self.token_width: int | None = None
        if pooled:
            features = self.model.features(torch.zeros(1, 3, size, size), (-1,)).pooled
            if features is None:
                raise ConfigError(f"class_token.vfm '{cfg.name}' has no global token; choose one that has, "
                                  "for example dinov2_b14")
            self.token_width = features.shape[1]

    @property
    def name(self) -> str:
        return self.cfg.name

    def facts(self) -> dict[str, Any]:
        """What its cache says about it."""
        return {"vfm": self.name, "weights": self.model.fingerprint, "layer": self.layer, "grid": self.grid,
                "token": self.token_width}

    @property
    def width(self) -> int:
        """Of the map's tokens."""
        return self.model.width(self.layer)

    def fingerprint(self, source: ImageSource, flip: bool) -> str:
        """Digest of all that decides a cache of these targets."""
        return shards.fingerprint(FORMAT, self.cfg.name, self.model.fingerprint, self.model.input_size,
                                  self.layer, self.grid, self.pooled, source.fingerprint, len(source), flip)

    @torch.no_grad()
    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Images B 3 H W in [-1, 1] -> `target` B D h w and `token` B K, those that are wanted, fp32."""
        features = self.model.features(images, self.layers)
        targets = {} if self.layer is None else {"target": regrid(features.maps[self.layer], self.grid)}
        return targets | ({"token": features.pooled} if self.pooled else {})

    def to(self, device: torch.device | str) -> Teacher:
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.mean.device


class Plan(NamedTuple):
    """The VFMs of a run, and whether what each says is cached. whole: one gives patch and global tokens."""

    teachers: list[Teacher]
    cached: list[bool]
    whole: bool

    def of(self, part: str) -> Teacher | None:
        """The one that gives "target" or "token"."""
        wanted = (t for t in self.teachers if (t.layer is not None if part == "target" else t.pooled))
        return next(wanted, None)


def plan(config: Diffusion, grid: tuple[int, int], size: int, token: int | None) -> Plan:
    """Who is asked for what. grid: of the network's tokens. token: width of the network's class token.

    Raises:
        ConfigError: as :class:`Teacher`, or a class token of another width than the network's.
    """
    a, c = config.alignment, config.class_token
    together = (
        a is not None and c is not None
        and a.vfm.model_copy(update={"layers": None}) == c.vfm.model_copy(update={"layers": None})
    )
    teachers, cached = [], []
    if a is not None:
        teachers.append(Teacher(a.vfm, size, a.layer, grid, together, a.resample))
        cached.append(a.cache and (not together or c.cache))
    if c is not None and not together:
        teachers.append(Teacher(c.vfm, size, None, grid, True))
        cached.append(c.cache)
    chosen = Plan(teachers, cached, together and a.layer == -1)
    if c is not None and (width := chosen.of("token").token_width) != token:
        raise ConfigError(f"class_token: the global token of '{c.vfm.name}' has {width} channels, "
                          f"network.token is {token}; set diffusion.network.token={width}")
    return chosen


# -- cache -------------------------------------------------------------------------------------------------


def build(directory: Path, teacher: Any, source: ImageSource, flip: bool = False, batch: int = 64,
          rank: int = 0, world: int = 1) -> Iterator[tuple[int, int]]:
    """Encode `source` into `directory`, or find it encoded; yields (images done, images in all). As
    `latents.build`.

    teacher: a :class:`Teacher`, or what offers its `name`, `facts`, `fingerprint`, `read` and `device`.
    """
    wanted, directory = teacher.fingerprint(source, flip), Path(directory)
    meta = shards.begun(directory, WHAT, wanted, count=len(source), shard=latents.SHARD, flip=flip,
                        **teacher.facts(), data=source.fingerprint)

    def encode(indices: Tensor, batch: Batch) -> dict[str, Tensor]:
        images, targets = to_float(batch.images).to(teacher.device), {}
        for suffix, view in {"": images, "_flip": images.flip(-1)}.items():
            if not suffix or flip:
                targets |= {f"{key}{suffix}": value.half().cpu() for key, value in teacher.read(view).items()}
        for key, value in targets.items():
            if not torch.isfinite(value).all():
                raise CheckpointError(f"'{teacher.name}' gives a {key} that is not finite in fp16 for "
                                      f"one of the images {int(indices[0])} to {int(indices[-1])}")
        return targets

    yield from shards.write(directory, "targets", meta, source.batch, encode, batch, rank, world)


class Targets:
    """Random access to a finished cache; rank, world: as of :class:`~vfmlab.diffusion.shards.Shards`."""

    def __init__(self, directory: Path, rank: int = 0, world: int = 1):
        self._shards = shards.finished(directory, WHAT, "vfmlab.diffusion.targets.build", None, rank, world)
        self.meta, self.flip = self._shards.meta, self._shards.meta["flip"]

    def __len__(self) -> int:
        return self.meta["count"]

    def __getitem__(self, which: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        """(indices long B, flip bool B or None) -> `target`, `token`, fp32."""
        keys = [key for key in self._shards.parts[0] if not key.endswith("_flip")]
        return {key: self._shards.rows(key, *which) for key in keys}

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [K] of the tokens, images as they are."""
        tokens = torch.cat([part["token"].double() for part in self._shards.parts])
        return tokens.mean(0).float(), tokens.std(0, correction=0).float()


def token_statistics(teacher: Teacher, source: ImageSource, seed: int) -> tuple[Tensor, Tensor]:
    """:meth:`Targets.statistics` of a seeded part of the images, where tokens are not cached."""
    images = some_images(source, STATISTICS_IMAGES, "token statistics", seed, device=teacher.device)
    tokens = torch.cat([teacher.read(part)["token"].double().cpu() for part in images])
    return tokens.mean(0).float(), tokens.std(0, correction=0).float()


# -- streams -----------------------------------------------------------------------------------------------


class _Cached:
    """Step -> targets of this rank's rows."""

    def __init__(self, targets: Targets, batch: int, seed: int, rows: slice):
        self.targets, self.draws = targets, latents.Draws(len(targets), batch, seed, rows, targets.flip)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return self.targets[self.draws(step)]


class Tap:
    """A stream of images that keeps the last batch it gave, so that two readers in step decode once."""

    def __init__(self, images: BatchStream):
        self.images = images
        self.last: Batch | None = None

    def __iter__(self) -> Tap:
        return self

    def __next__(self) -> Batch:
        self.last = next(self.images)
        return self.last

    def close(self) -> None:
        self.images.close()


def beside(batches: Iterator[Any], sources: list[Targets | Teacher], images: Tap | None, batch: int,
           seed: int, start_step: int, rows: slice) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Each of `batches` with the targets of its images.

    Args:
        batches: of step `start_step` first, in the order of `BatchStream`. sources: caches, or VFMs that are
        asked now.
        images: the batches' images where a VFM is asked; if `batches` does not draw from it, it is drawn
        here.
    """
    caches = [from_thread(_Cached(s, batch, seed, rows), start_step) for s in sources
              if isinstance(s, Targets)]
    fresh = [s for s in sources if isinstance(s, Teacher)]
    seen = None
    try:
        for stored in batches:
            extra: dict[str, Tensor] = {}
            for cache in caches:
                extra |= next(cache)
            if fresh:
                if images.last is seen:  # `batches` drew none of them
                    next(images)
                seen = images.last
                for teacher in fresh:
                    extra |= teacher.read(to_float(seen.images.to(teacher.device)))
            yield stored, extra
    finally:
        for stream in (*caches, batches, *([images] if images is not None else [])):
            if hasattr(stream, "close"):
                stream.close()
