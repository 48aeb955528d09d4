"""Spatial structure inside one image: similarity of near against distant tokens (LDS), and of tokens of one
region against those of two (SRSS).

iREPA ("What matters for representation alignment: global information or spatial structure?", arXiv
2512.10794) defines

    LDS(X) = E[K(t, t') | d(t, t') < r_near] - E[K(t, t') | d(t, t') >= r_far]    (K: cosine of tokens)

Its released evaluation takes the four neighbours as near and a Manhattan distance of at least 6 cells as far,
on a grid of 16 x 16. Here the far bound is the same share of the grid's side, 6/16 (so exactly 6 on that
grid, and ours elsewhere).

SRSS is a name in arXiv 2606.03578 whose formula was not at hand. Ours is

    SRSS(X) = E[K(t, t') | one region] - E[K(t, t') | two regions]

over an object's mask and the rest, a token being of the object where that covers half its cell.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.instruments.recovery import object_masks
from vfmlab.evaluation.number import (
    ENCODERS,
    HEADLINE,
    HIGHER,
    LATENT,
    TOKENIZERS,
    Draft,
    Published,
    Quantity,
)  # fmt: skip
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

FAR = 6 / 16
BLOCK = 64  # images whose token similarities are held at once


def far_bound(h: int, w: int) -> int:
    """Manhattan distance from which two cells of an h x w grid count as far."""
    return max(2, round(FAR * max(h, w)))


@cache
def _pairs(h: int, w: int, far: int) -> tuple[Tensor, Tensor]:
    """Which pairs of cells are neighbours, and which are far: bool T T each."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], 1)
    distance = (place[:, None] - place[None]).abs().sum(-1)
    return distance == 1, distance >= far


def lds(maps: Tensor, far: int | None = None) -> Tensor:
    """Local minus distant cosine similarity of the tokens of each image: N C h w -> N, in [-2, 2].

    far: Manhattan distance from which pairs count as distant; None: 6/16 of the grid's side.

    Raises:
        DataError: a grid without near or without far pairs.
    """
    h, w = maps.shape[-2:]
    far = far_bound(h, w) if far is None else far
    near, distant = _pairs(h, w, far)
    if not near.any() or not distant.any():
        raise DataError(f"a grid of {h} x {w} has no pairs of tokens {far} or more cells apart; LDS needs a "
                        "larger one")
    near, distant, values = near.to(maps.device), distant.to(maps.device), []
    for part in maps.split(BLOCK):
        tokens = F.normalize(part.flatten(2).transpose(1, 2).float(), dim=2)
        alike = tokens @ tokens.transpose(1, 2)  # N T T
        values.append((alike * near).sum((1, 2)) / near.sum() - (alike * distant).sum((1, 2)) / distant.sum())
    return torch.cat(values)


def srss(maps: Tensor, masks: Tensor) -> Tensor:
    """Cosine similarity of an image's tokens inside regions less that across: N C h w and masks bool N 1 S S
    of the object -> M, in [-2, 2], of the M images in which both regions have two tokens."""
    inside = F.interpolate(masks.float(), maps.shape[-2:], mode="area").flatten(1) >= 0.5  # N T
    size = inside.sum(1)
    both = (size >= 2) & (inside.shape[1] - size >= 2)
    values = []
    for part, own in zip(maps[both].split(BLOCK), inside[both].to(maps.device).split(BLOCK), strict=True):
        tokens = F.normalize(part.flatten(2).transpose(1, 2).float(), dim=2)
        alike, same = tokens @ tokens.transpose(1, 2), own[:, :, None] == own[:, None]  # N T T
        across, same = ~same, same & ~torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
        values.append((alike * same).sum((1, 2)) / same.sum((1, 2))
                      - (alike * across).sum((1, 2)) / across.sum((1, 2)))
    return torch.cat(values) if values else maps.new_zeros(0)


@INSTRUMENTS.register("lds")
class LocalStructure(Instrument):
    """`lds`: mean over images; spread over images."""

    quantities = (Quantity("lds", "LDS", HIGHER, shown=(LATENT, HEADLINE),
                           published=Published(-0.13, ENCODERS)),)

    def measure(self, subject: Subject, report: Draft) -> None:
        maps = subject.held_out.maps
        values = lds(maps).double()
        facts = {"measure": "local - distant cosine", "near": "four neighbours",
                 "far": far_bound(*maps.shape[-2:])}
        report.mean("lds", values, subject.section(facts))


@INSTRUMENTS.register("srss")
class RegionStructure(Instrument):
    """`srss`: mean over images; spread over images."""

    quantities = (Quantity("srss", "SRSS", HIGHER,
                           definition="cosine of tokens of one region (object, background) less that of tokens of two",
                           published=Published(-0.72, TOKENIZERS)),)  # fmt: skip

    def measure(self, subject: Subject, report: Draft) -> None:
        values = srss(subject.held_out.maps, object_masks(subject, len(subject.held_out))).double()
        if not len(values):
            raise DataError("no object covers two tokens and leaves two; SRSS needs a finer grid")
        report.mean("srss", values, subject.section({"measure": "cosine in - across regions",
                                                     "region": "object, by half of a cell"}))
