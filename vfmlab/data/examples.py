"""A few images of a source: held-out ones, class by class, to look at; a seeded part, to measure on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vfmlab import config
from vfmlab.data.base import ImageSource, to_float
from vfmlab.data.open import open_source
from vfmlab.seeding import generator


def some_images(source: ImageSource, most: int, *draw: str | int, batch: int = 128,
                device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Batches (B 3 H W in [-1, 1], on `device`) of at most `most` images of a source, seeded by `draw`."""
    for part in torch.randperm(len(source), generator=generator(*draw))[:most].split(batch):
        yield to_float(source.batch(part).images).to(device)


def examples(cfg: config.Data, n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """`n` held-out images [n 3 S S] in [-1, 1], class by class, with labels and class names."""
    source = open_source(cfg, "val")
    order = torch.randperm(len(source), generator=generator("examples", seed)).tolist()
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(int(source.labels[index]), []).append(index)
    picked: list[int] = []
    while len(picked) < min(n, len(source)):
        for label in sorted(by_class):
            if by_class[label] and len(picked) < n:
                picked.append(by_class[label].pop(0))
    batch = source.batch(torch.tensor(picked))
    return to_float(batch.images), batch.labels, [source.class_names[i] for i in batch.labels.tolist()]
