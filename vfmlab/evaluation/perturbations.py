"""What is done to images before they are measured: nothing, noise, or a quarter turn and scale.

Noise, turn and scale depend on (seed, the image's index, the perturbation) only, not on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmlab import data
from vfmlab.evaluation import cache
from vfmlab.nn.transforms import resize, scaled_side, turn
from vfmlab.seeding import SampleRandom, derive

SIGMAS = (0.05, 0.10, 0.15, 0.20)
SCALES = (1.0, 0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Perturbation:
    """sigma: of Gaussian noise on images in [-1, 1]. moved: a random quarter turn and scale each.

    release: as VFM-VAE's release does it. Noise of 255 sigma on images in 0..255 (twice as much), clipped and
    rounded; the reference reads a scaled image at its size.
    """

    name: str = "clean"
    sigma: float = 0.0
    moved: bool = False
    release: bool = False

    @property
    def facts(self) -> dict[str, Any]:
        """What enters a protocol's hash."""
        return ({"sigma": self.sigma} | ({"turns": 4, "scales": list(SCALES)} if self.moved else {})
                | ({"as": "release"} if self.release else {}))

    def __call__(self, images: Tensor, ids: Sequence[int], seed: int,
                 cell: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Images B 3 S S in [-1, 1] -> groups of one size each: (rows long, images b 3 s s).

        ids: one per image. cell: sides are rounded to whole cells of so many pixels.
        """
        random = SampleRandom(derive(self.name, seed), ids)
        rows = torch.arange(len(images))
        if self.sigma:
            noise = self.sigma * random.randn(*images.shape[1:]).to(images)
            noisy = data.to_float(data.to_uint8(images + 2 * noise)) if self.release else images + noise
            return [(rows, noisy)]
        if not self.moved:
            return [(rows, images)]
        drawn = torch.tensor([torch.randint(4, (2,), generator=g).tolist()
                              for g in random.streams]).view(-1, 2)
        groups = []
        for k, side in enumerate(sides_of(images.shape[-1], cell)):
            mine = rows[drawn[:, 1] == k]
            if len(mine):
                turned = torch.stack([turn(images[i], int(drawn[i, 0])) for i in mine.tolist()])
                groups.append((mine, resize(turned, side)))
        return groups


@torch.no_grad()
def features(path: Path | None, source: data.ImageSource, indices: Tensor, perturbation: Perturbation,
             seed: int, cell: int, batch: int, read: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
    """What `read` makes of the perturbed images at `indices`, N D; cached in the file `path`.

    read: (images b 3 s s, their ids) -> b D.
    """

    def measured() -> dict[str, Tensor]:
        rows = []
        for part in indices.split(batch):
            images, ids, out = data.to_float(source.batch(part).images), part.tolist(), None
            for where, perturbed in perturbation(images, ids, seed, cell):
                values = read(perturbed, [ids[i] for i in where.tolist()])
                out = values.new_empty(len(images), values.shape[1]) if out is None else out
                out[where] = values
            rows.append(out)
        return {"features": torch.cat(rows)}

    return cache.stored(path, measured)["features"]


def sides_of(size: int, cell: int = 1) -> list[int]:
    """Side of an image of `size` pixels at each of `SCALES`, in whole cells."""
    return [scaled_side(size // cell, scale) * cell for scale in SCALES]


CLEAN = Perturbation()
NOISY = tuple(Perturbation(f"noise {sigma:.2f}", sigma) for sigma in SIGMAS)
MOVED = Perturbation("rotation and scale", moved=True)
RELEASE = (*(Perturbation(f"release, {p.name}", p.sigma, release=True) for p in NOISY),
           Perturbation("release, rotation and scale", moved=True, release=True))
