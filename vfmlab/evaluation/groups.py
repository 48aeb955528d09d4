"""`groups`: what stands on each place of a `scenes:groups` image, read off it by a small network; the judge
of prompts, and a feature space.

The image is cut into its four places and each is read by itself, as a detector's boxes are: is there a thing,
of which shape, texture and colour? The network is trained with blur and noise, as the judge of classes is. As
features of an image stand the probabilities of all places, those of texture and colour times that of a thing.

:func:`verdict` compares a reading with a caption, in the manner of GenEval (arXiv 2310.11513): counts,
shapes, textures, colours and sides each by themselves, and whether all is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vfmlab.data import captions
from vfmlab.data.groups import COLOURS, PLACES, STYLE
from vfmlab.evaluation import judge
from vfmlab.evaluation.features import FeatureSpace, Seen, run_or_path
from vfmlab.registry import FEATURE_SPACES

# Columns of a place; the last shape is none.
COLUMNS = {"shape": len(STYLE.shapes) + 1, "texture": len(STYLE.textures), "colour": len(COLOURS)}
NOTHING = len(STYLE.shapes)


class Thing(NamedTuple):
    """A thing on a place (0 to 3, row by row)."""

    place: int
    texture: str
    colour: str
    shape: str


class GroupNet(nn.Module):
    """Images in [-1, 1] (B 3 H W) -> logits B 4 14: shape or nothing, texture, colour of each place.

    Args:
        width: channels of the first stage.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        self.width, self.fingerprint = width, ""  # of the weights; set by load()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(judge.Residual(width, width, 2), judge.Residual(width, 2 * width, 2))
        self.head = nn.Linear(2 * width * (judge.SIZE // 8) ** 2, sum(COLUMNS.values()))

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments that build this network again."""
        return {"width": self.width}

    def forward(self, images: Tensor) -> Tensor:
        half = judge.SIZE // 2
        x = judge.resized(images).unflatten(3, (2, half)).unflatten(2, (2, half))
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        maps = self.stages(self.stem(x)).flatten(1).float()
        with torch.autocast(maps.device.type, enabled=False):  # fp32: Frechet statistics are taken of these
            return self.head(maps).unflatten(0, (-1, PLACES))


def parts(logits: Tensor) -> dict[str, Tensor]:
    """B 4 14 -> name -> B 4 K."""
    return dict(zip(COLUMNS, logits.split(list(COLUMNS.values()), -1), strict=True))


def probabilities(logits: Tensor) -> Tensor:
    """B 4 14 -> B 56, those of texture and colour times that of a thing."""
    output = {name: part.softmax(-1) for name, part in parts(logits).items()}
    there = 1 - output["shape"][..., NOTHING:]
    output |= {name: output[name] * there for name in ("texture", "colour")}
    return torch.cat(list(output.values()), -1).flatten(1)


def things(features: Tensor) -> list[list[Thing]]:
    """What stands on the places of each image, from features B 56."""
    by_place = parts(features.unflatten(1, (PLACES, -1)))
    best = {name: part.argmax(-1).tolist() for name, part in by_place.items()}
    return [[Thing(place, STYLE.textures[texture], COLOURS[colour], STYLE.shapes[shape])
             for place, (shape, texture, colour) in enumerate(zip(*row, strict=True)) if shape != NOTHING]
            for row in zip(*(best[name] for name in COLUMNS), strict=True)]


# -- prompts -----------------------------------------------------------------------------------------------


def verdict(scene: captions.Scene, seen: list[Thing]) -> dict[str, bool]:
    """What of a caption is right: count, shape, texture, colour, side (what it does not say is left out), and
    `all`: the things are those it names, no more and no fewer, and stand where it says.

    Shapes, textures and colours are right where those seen anywhere are those named, whatever their number.
    """
    named = [thing for thing in (scene.first, scene.second) if thing is not None]
    right = {"count": len(seen) == sum(thing.count for thing in named)}
    for what in ("shape", "texture", "colour"):
        asked = {getattr(thing, what) for thing in named}
        if None not in asked:
            right[what] = {getattr(thing, what) for thing in seen} == asked
    groups = [[thing for thing in seen if _like(thing, name)] for name in named]
    whole = right["count"] and [len(group) for group in groups] == [name.count for name in named]
    if scene.second is not None:
        right["side"] = all(groups) and all(_stands(a.place, scene.side, b.place)
                                            for a in groups[0] for b in groups[1])
    return right | {"all": whole and right.get("side", True)}


def shares(prompts: Sequence[str], features: Tensor) -> dict[str, float]:
    """Of images with features B 56, how many are right in each regard of :func:`verdict` of their captions.

    Raises:
        ConfigError: a prompt that is no caption of drawn scenes.
    """
    verdicts: dict[str, list[bool]] = {}
    for prompt, seen in zip(prompts, things(features), strict=True):
        for what, right in verdict(captions.parse(prompt), seen).items():
            verdicts.setdefault(what, []).append(right)
    return {what: sum(values) / len(values) for what, values in verdicts.items()}


def _like(thing: Thing, name: captions.Thing) -> bool:
    return all(getattr(name, what) in (None, getattr(thing, what)) for what in ("shape", "texture", "colour"))


def _stands(a: int, side: str, b: int) -> bool:
    """Whether place a is to that side of place b."""
    (row, column), (other_row, other_column) = divmod(a, 2), divmod(b, 2)
    return {"left of": column < other_column, "right of": column > other_column, "above": row < other_row,
            "below": row > other_row}[side]


def load(weights: str | Path | None = None) -> GroupNet:
    """A reader of groups: bundled, or of a run with objective "groups"; see `judge.trained`."""
    return judge.trained(weights, "groups", GroupNet)


@FEATURE_SPACES.register("groups")
class GroupSpace(FeatureSpace):
    """What stands on the places of `scenes:groups`: bundled, or `groups:RUN` of a run with objective
    "groups"."""

    def __init__(self, reference: str, size: int, root: str | Path):
        super().__init__()
        self.net = load(run_or_path(reference, root))
        self.version, self.dimension = self.net.fingerprint, PLACES * sum(COLUMNS.values())
        self.preprocessing = f"bilinear antialiased to {judge.SIZE}, four places"

    def forward(self, images: Tensor) -> Seen:
        return Seen(probabilities(self.net(images)), None)
