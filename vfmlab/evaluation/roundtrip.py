"""Images through a tokenizer and back as metrics see them: posterior mean, rounded to 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vfmlab import data
from vfmlab.errors import DataError
from vfmlab.seeding import derive
from vfmlab.tokenizers.base import Tokenizer

CPU_PART = 32  # images encoded at a time on a CPU: maps of more do not fit into its caches


def as_saved(images: Tensor) -> Tensor:
    """Model output as a metric sees it: clipped and rounded to 8 bits, in [-1, 1].

    Raises:
        DataError: not finite (8 bits would turn that into black).
    """
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
        raise DataError(f"{len(bad)} of {len(images)} images are not finite (the first: number {bad[0]} of "
                        "its batch)")
    return data.to_float(data.to_uint8(images))


class Trip(NamedTuple):
    """There and back. raw: latents, the posterior's mean, fp32; restored: what is decoded from them (on a
    sphere: from their directions) as a metric sees it; codes: B T long of quantised tokenizers, else None."""

    raw: Tensor
    restored: Tensor
    codes: Tensor | None = None


def seeds(tokenizer: Tokenizer, seed: int, ids: Tensor) -> dict[str, list[int]]:
    """What decoding takes beside latents: where it draws noise, a seed for each of the images `ids`."""
    if not tokenizer.config.seeded:
        return {}
    return {"seeds": [derive("decoding", seed, i) for i in ids.tolist()]}


def through(tokenizer: Tokenizer, images: Tensor, seed: int = 0, ids: Tensor | None = None) -> Trip:
    """Images B 3 H W through the tokenizer and back. seed, ids: of the images, see :func:`seeds`; ids None:
    their places."""
    raw, restored, codes = [], [], []
    ids = torch.arange(len(images)) if ids is None else ids
    size = CPU_PART if images.device.type == "cpu" else len(images)
    for part, own in zip(images.split(size), ids.split(size), strict=True):
        posterior = tokenizer.posterior(part.contiguous(memory_format=torch.channels_last))
        raw.append(posterior.mode().float())
        restored.append(as_saved(decode(tokenizer, raw[-1], **seeds(tokenizer, seed, own))))
        if tokenizer.quantised:
            codes.append(posterior.indices)
    return Trip(torch.cat(raw), torch.cat(restored), torch.cat(codes) if codes else None)


def decode(tokenizer: Tokenizer, raw: Tensor, **noise: list[int]) -> Tensor:
    """Raw latents -> images in [-1, 1]; works before statistics are measured, as during training.

    On a sphere they take the length at which a generator's are decoded, which needs the statistics.
    """
    if tokenizer.config.radius is not None:
        raw = tokenizer.denormalise(tokenizer.normalise(raw))
    return tokenizer.decode_raw(raw, **noise)[0].float().clamp(-1, 1)


@torch.no_grad()
def images_of(tokenizer: Tokenizer, z: Tensor, seed: int = 0, ids: Tensor | None = None,
              part: int = CPU_PART) -> Tensor:
    """Normalised latents N C h w -> images in [-1, 1] on the CPU, `part` at a time.

    seed, ids: of the images, see :func:`seeds`; ids None: their places.
    """
    on, ids = tokenizer.stat_mean.device, torch.arange(len(z)) if ids is None else ids
    return torch.cat([tokenizer.decode(some.to(on), **seeds(tokenizer, seed, own)).cpu()
                      for some, own in zip(z.split(part), ids.split(part), strict=True)])


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside, what was before outside."""
    before = [m.training for m in modules]
    try:
        for m in modules:
            m.eval()
        yield
    finally:
        for m, mode in zip(modules, before, strict=True):
            m.train(mode)
