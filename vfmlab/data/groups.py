"""`scenes:groups`: one to three things on four places, alone or beside another one; the scenes of captions.

The image is four places, two across and two down, each with one thing in it or none. A scene is a group of
one to three like things, or of one or two that stand left of, right of, above or below one other thing, which
differs from them in colour, texture or shape. Things have one of six colours and stand before a dark even
ground. As in :mod:`vfmlab.data.scenes` an image is a pure function of (seed, split, index, size); its class
is shape x texture of the group.
"""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from torch import Tensor

from vfmlab.config import Data, digest
from vfmlab.data import captions
from vfmlab.data.base import ImageSource
from vfmlab.data.scenes import Place, SceneSource, Style, colour, second_tone, uniform
from vfmlab.errors import ConfigError
from vfmlab.seeding import derive

VERSION = 1  # raised whenever a pixel or a caption changes
PLACES = 4  # row by row
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
RADIUS, JITTER = (0.32, 0.40), 0.03  # fractions of half the image side
STYLE = Style(captions.BASIC, ("plain", "striped"), RADIUS, JITTER, 0.15, ("flat",))
RELATED = 0.6  # share of scenes with a second thing
SCENE = 12  # numbers that decide what is where
BLOCK = 256  # images drawn at once
MOST = 10_000_000  # scenes of a split: their labels are held in memory


class GroupSource(ImageSource):
    """`count` scenes of groups.

    Args:
        split: "train" and "val" are two independent streams. size: side S >= 8. count: number of images.
        seed: of the stream.
    """

    def __init__(self, split: str, size: int, count: int, seed: int = 0):
        self._key = derive("scenes", VERSION, "groups", seed, split)
        names = [f"{texture} {shape}" for shape in STYLE.shapes for texture in STYLE.textures]
        mark = digest(["scenes", VERSION, "groups", split, size, count, seed])
        super().__init__(size, torch.arange(count) % len(names), names, mark)

    def captions(self, indices: Tensor) -> list[str]:
        """ "two striped red discs left of a plain blue cross"."""
        return [str(scene) for scene, _ in self._scenes(np.asarray(indices, dtype=np.int64))]

    def cells(self, indices: Tensor) -> dict[str, Tensor]:
        """What stands on each place, long B 4 (row by row): `shape`, `texture`, `colour`, positions in the
        style's tuples and COLOURS; -1: nothing."""
        table = {name: torch.full((len(indices), PLACES), -1) for name in ("shape", "texture", "colour")}
        for row, (_, things) in enumerate(self._scenes(np.asarray(indices, dtype=np.int64))):
            for place, thing in things.items():
                table["shape"][row, place] = STYLE.shapes.index(thing.shape)
                table["texture"][row, place] = STYLE.textures.index(thing.texture)
                table["colour"][row, place] = COLOURS.index(thing.colour)
        return table

    def _scenes(self, indices: np.ndarray) -> list[tuple[captions.Scene, dict[int, captions.Thing]]]:
        """The scene of each index, and the thing on each place that is taken."""
        u = uniform(self._key, indices, SCENE)
        return [_scene(int(i) % self.num_classes, row) for i, row in zip(indices, u, strict=True)]

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        where = np.asarray(indices, dtype=np.int64)
        images = np.empty((len(where), 3, self.size, self.size), np.uint8)
        for start in range(0, len(where), BLOCK):
            rows = slice(start, start + BLOCK)
            images[rows] = self._draw(where[rows]) * np.float32(255) + np.float32(0.5)
        return torch.from_numpy(images), indices

    def _draw(self, indices: np.ndarray) -> np.ndarray:
        """Float32 B 3 S S in [0, 1]."""
        u = uniform(self._key, indices, SCENE + 3 + 7 * PLACES)
        ground = colour(u[:, SCENE : SCENE + 3], np.ones(len(indices), bool)).astype(np.float32)
        canvas = np.broadcast_to(ground[:, :, None, None], (*ground.shape, self.size, self.size)).copy()
        of_class: dict[tuple[int, int], list[tuple[int, int, captions.Thing]]] = {}
        for row, (_, things) in enumerate(self._scenes(indices)):
            for place, thing in things.items():
                kind = STYLE.shapes.index(thing.shape), STYLE.textures.index(thing.texture)
                of_class.setdefault(kind, []).append((row, place, thing))
        for (shape, texture), members in sorted(of_class.items()):
            rows, places, things = (np.array(part) for part in zip(*members, strict=True))
            own = u[:, SCENE + 3 :].reshape(len(indices), PLACES, 7)[rows, places]
            factors = {"shape": np.array([shape]), "texture": np.array([texture]),
                       "x": places % 2 - 0.5 + JITTER * (2 * own[:, 0] - 1),
                       "y": places // 2 - 0.5 + JITTER * (2 * own[:, 1] - 1),
                       "scale": RADIUS[0] + (RADIUS[1] - RADIUS[0]) * own[:, 2],
                       "rotation": STYLE.rotation * (2 * own[:, 3] - 1)}
            drawn = Place(STYLE, factors, self.size)
            fore = np.array([_rgb(thing.colour, *row[4:]) for thing, row in zip(things, own, strict=True)],
                            np.float32)
            tone = second_tone(fore)
            for k, row in enumerate(rows):
                mix, a, b = drawn.texture[k], fore[k][:, None, None], tone[k][:, None, None]
                canvas[row] += drawn.coverage[k] * (a + (b - a) * mix - canvas[row])
        return canvas


def _scene(label: int, u: np.ndarray) -> tuple[captions.Scene, dict[int, captions.Thing]]:
    """The scene of a class and SCENE numbers in [0, 1), and the thing on each place that is taken."""
    textures = len(STYLE.textures)
    kind = STYLE.textures[label % textures], COLOURS[int(6 * u[1])], STYLE.shapes[label // textures]
    one = captions.Thing(1, *kind)
    if u[0] >= RELATED:
        count = 1 + int(3 * u[2])
        taken = np.argsort(u[3:7], kind="stable")[:count]
        return captions.Scene(captions.Thing(count, *kind)), {int(place): one for place in taken}
    count, side = 1 + int(2 * u[2]), int(4 * u[7])
    other = STYLE.textures[int(2 * u[9])], COLOURS[int(6 * u[10])], STYLE.shapes[int(5 * u[8])]
    if other == kind:
        other = other[0], COLOURS[(int(6 * u[10]) + 1) % len(COLOURS)], other[2]
    along, across = (1, 2) if side < 2 else (2, 1)  # steps in the numbering of places
    far = side % 2  # left of, above: the group comes first
    order = (0, 1) if u[3] < 0.5 else (1, 0)
    second = captions.Thing(1, *other)
    things = {far * along + line * across: one for line in order[:count]}
    things[(1 - far) * along + int(2 * u[11]) * across] = second
    return captions.Scene(captions.Thing(count, *kind), captions.SIDES[side], second), things


def _rgb(name: str, hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """RGB in [0, 1] of a named colour and three numbers in [0, 1)."""
    if name == "white":
        return colorsys.hsv_to_rgb(hue, 0.08 * saturation, 0.85 + 0.15 * value)
    angle = captions.HUES[name] + 16 * (hue - 0.5)
    return colorsys.hsv_to_rgb(angle / 360 % 1, 0.75 + 0.25 * saturation, 0.8 + 0.2 * value)


def open_scenes(config: Data, style: str, split: str) -> SceneSource | GroupSource:
    """The split of `scenes:STYLE` that `config` describes; :class:`ConfigError` without `data.train`."""
    if split == "train" and config.train is None:
        raise ConfigError("field 'data.train' is missing: scenes are endless, so set for example "
                          "data.train=20000")
    count = config.train if split == "train" else config.val
    if count > MOST:
        raise ConfigError(f"field 'data.{split}' = {count}: at most {MOST:,} scenes are drawn")
    source = (GroupSource(split, config.size, count, config.seed) if style == "groups"
              else SceneSource(style, split, config.size, count, config.seed))
    source.sizes = (config.train or 0, config.train or 0, config.val)
    return source
