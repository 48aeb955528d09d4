"""`scenes:easy|medium|hard|other`: drawn images, one textured shape before a background; `scenes:groups`,
several of them, is :mod:`vfmlab.data.groups`.

An image is a pure function of (style, seed, split, index, size); what is shown does not depend on the size.
Its class is shape x texture; everything else (position, scale, rotation, colours, background) is a nuisance
factor whose true value :meth:`SceneSource.factors` returns. `scenes:other` draws shapes and textures that no
other style has: a vision model trained on it has never seen the classes of `easy`, `medium` and `hard`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from vfmlab.config import digest
from vfmlab.data import captions
from vfmlab.data import shapes as draw
from vfmlab.data.base import ImageSource
from vfmlab.errors import ConfigError, nearest
from vfmlab.seeding import derive

VERSION = 1  # raised whenever a pixel changes
BLOCK = 32  # images drawn at once: arrays of one block stay in the cache of the processor


@dataclass(frozen=True)
class Style:
    """What a difficulty level draws. Lengths are fractions of half the image side, angles radians."""

    shapes: tuple[str, ...]
    textures: tuple[str, ...]
    radius: tuple[float, float]
    offset: float
    rotation: float
    backgrounds: tuple[str, ...]
    inverted: float = 0.0  # share of images with a dark object before a bright background


BASIC = captions.BASIC
STYLES = {
    "easy": Style(BASIC, ("plain", "striped"), (0.7, 0.86), 0.1, 0.15, ("flat",)),
    "medium": Style(BASIC, ("plain", "striped"), (0.56, 0.86), 0.3, 0.4, ("flat", "linear")),
    "hard": Style(
        (*BASIC, "bar", "half", "corner"), ("plain", "striped"), (0.34, 0.6), 0.4, np.pi,
        ("flat", "linear", "radial", "bands"), inverted=0.5,
    ),
    "other": Style(
        ("star", "heart", "hexagon", "arrow", "crescent", "drop", "trefoil", "hourglass"),
        ("shaded", "dotted", "checked"), (0.45, 0.86), 0.35, np.pi,
        ("flat", "linear", "radial", "bands"), inverted=0.3,
    ),
}  # fmt: skip


def uniform(key: int, indices: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each index, float64 B count: splitmix64 of (key, index, slot)."""
    with np.errstate(over="ignore"):
        x = np.uint64(key) + indices.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        slots = np.arange(count, dtype=np.uint64)[None] * np.uint64(0xD1342543DE82EF95)
        for salt in (slots, np.uint64(0x632BE59BD9B4E019)):
            x = x + salt
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def colour(u: np.ndarray, dark: np.ndarray) -> np.ndarray:
    """u B 3 in [0, 1) -> RGB B 3 in [0, 1]; dark and bright colours do not overlap in luminance."""
    hue, saturation = 6 * u[:, 0], np.where(dark, 0.3 + 0.7 * u[:, 1], 0.1 + 0.45 * u[:, 1])
    value = np.where(dark, 0.05 + 0.3 * u[:, 2], 0.8 + 0.2 * u[:, 2])
    k = (np.array([5.0, 3.0, 1.0]) + hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1))


class SceneSource(ImageSource):
    """`count` images of a style.

    Args:
        style: name in `STYLES`. split: "train" and "val" are two independent streams. size: side S >= 8.
        count: number of images. seed: of the stream.
    """

    def __init__(self, style: str, split: str, size: int, count: int, seed: int = 0):
        if style not in STYLES:
            raise ConfigError(f"field 'data.source' = 'scenes:{style}': unknown "
                              f"style{nearest(style, [*STYLES, 'groups'])}")
        self.style = STYLES[style]
        self._key = derive("scenes", VERSION, style, seed, split)
        names = [f"{texture} {shape}" for shape in self.style.shapes for texture in self.style.textures]
        mark = digest(["scenes", VERSION, style, asdict(self.style), split, size, count, seed])
        super().__init__(size, torch.arange(count) % len(names), names, mark)

    @property
    def factor_classes(self) -> dict[str, int]:
        """Number of values of each categorical factor; every other factor is continuous."""
        s = self.style
        return {"shape": len(s.shapes), "texture": len(s.textures), "background_style": len(s.backgrounds)}

    def factors(self, indices: Tensor) -> dict[str, Tensor]:
        """The true factors of the images at `indices` (long B), the same at every size.

        shape, texture, background_style: long B, positions in the style's tuples. x (right), y (down), scale
        (radius): float B, fractions of half the side. rotation (radians, clockwise): float B. foreground,
        background, background_end: float B 3, RGB in [0, 1]. background_angle: float B, radians.
        """
        factors = self._factors(np.asarray(indices, dtype=np.int64))
        return {name: torch.from_numpy(v if v.dtype == np.int64 else v.astype(np.float32))
                for name, v in factors.items()}

    def _factors(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        s = self.style
        u = uniform(self._key, indices, 18)
        label = indices % self.num_classes
        dark = u[:, 4] < s.inverted
        return {"shape": label // len(s.textures), "texture": label % len(s.textures),
                "x": s.offset * (2 * u[:, 0] - 1), "y": s.offset * (2 * u[:, 1] - 1),
                "scale": s.radius[0] + (s.radius[1] - s.radius[0]) * u[:, 2],
                "rotation": s.rotation * (2 * u[:, 3] - 1), "foreground": colour(u[:, 5:8], dark),
                "background": colour(u[:, 8:11], ~dark), "background_end": colour(u[:, 11:14], ~dark),
                "background_style": (u[:, 14] * len(s.backgrounds)).astype(np.int64),
                "background_angle": 2 * np.pi * u[:, 15]}

    def captions(self, indices: Tensor) -> list[str]:
        """ "a striped red disc", as in :mod:`vfmlab.data.captions`."""
        factors, s = self._factors(np.asarray(indices, dtype=np.int64)), self.style
        colours = captions.colour_names(factors["foreground"])
        return [str(captions.Thing(1, s.textures[t], colour, s.shapes[k]))
                for t, colour, k in zip(factors["texture"], colours, factors["shape"], strict=True)]

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = np.empty((len(indices), 3, self.size, self.size), np.uint8)
        for rows, factors, place in self._blocks(indices):
            images[rows] = _compose(self.style, factors, place)
        return torch.from_numpy(images), indices

    def masks(self, indices: Tensor) -> Tensor:
        """Where the object covers at least half of a pixel: bool B 1 S S."""
        masks = np.empty((len(indices), 1, self.size, self.size), bool)
        for rows, _, place in self._blocks(indices):
            masks[rows, 0] = place.coverage >= 0.5
        return torch.from_numpy(masks)

    def _blocks(self, indices: Tensor):
        """(rows, their factors, their geometry), a few images of one class at a time."""
        where = np.asarray(indices, dtype=np.int64)
        order = np.argsort(where % self.num_classes, kind="stable")
        labels = where[order] % self.num_classes
        cuts = np.flatnonzero(np.diff(labels)) + 1
        for group in np.split(order, cuts):
            for start in range(0, len(group), BLOCK):
                rows = group[start : start + BLOCK]
                factors = self._factors(where[rows])
                yield rows, factors, Place(self.style, factors, self.size)


class Place:
    """Pixels in the coordinates of the object, and how much of each it covers. All images show one class."""

    def __init__(self, style: Style, factors: dict[str, np.ndarray], size: int):
        axis = (2 * np.arange(size) + 1) / size - 1
        x, y, radius, angle = (factors[name][:, None] for name in ("x", "y", "scale", "rotation"))
        cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
        across, down = axis - x, axis - y

        def rotated(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # B W, B H -> B H W
            return a.astype(np.float32)[:, None, :] + b.astype(np.float32)[:, :, None]

        self.axis = axis.astype(np.float32)
        self.u, self.v = rotated(cos * across, sin * down), rotated(-sin * across, cos * down)
        self._pixels = (radius * (size / 2)).astype(np.float32)[:, :, None]  # pixels per local unit
        self.coverage = self.edge(getattr(draw, style.shapes[factors["shape"][0]])(self.u, self.v))
        self.texture = getattr(draw, style.textures[factors["texture"][0]])(self.u, self.v, self.edge)

    def edge(self, distance: np.ndarray) -> np.ndarray:
        """Anti-aliasing: coverage falls from 1 to 0 over one pixel around distance 0."""
        return np.clip(np.float32(0.5) - distance * self._pixels, 0, 1)


def _background(style: Style, factors: dict[str, np.ndarray], axis: np.ndarray) -> np.ndarray:
    """Position between the two background colours: float32 B H W in [0, 1]."""
    cos, sin = (f(factors["background_angle"]).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    along = (cos * axis)[:, None, :] + (sin * axis)[:, :, None]  # -sqrt(2) .. sqrt(2)
    mix = np.zeros_like(along)
    for i, name in enumerate(style.backgrounds):
        rows = factors["background_style"] == i
        if name == "flat" or not rows.any():
            continue
        if name == "linear":
            mix[rows] = np.float32(0.5) + along[rows] * np.float32(0.35355339)
        elif name == "radial":
            a, b = axis - np.float32(0.5) * cos[rows], axis - np.float32(0.5) * sin[rows]
            mix[rows] = np.minimum(np.float32(0.5) * ((a * a)[:, None, :] + (b * b)[:, :, None]),
                                   np.float32(1))
        elif name == "bands":
            t = along[rows] * np.float32(1.1)
            mix[rows] = np.float32(2) * np.abs(t - np.floor(t) - np.float32(0.5))
    return mix


def second_tone(fore: np.ndarray) -> np.ndarray:
    """Between the first tone (float32 B 3) and the other end of the scale."""
    bright = fore.max(1, keepdims=True) >= 0.5
    return np.where(bright, np.float32(0.42) * fore, fore + np.float32(0.45) * (1 - fore))


def _compose(style: Style, factors: dict[str, np.ndarray], place: Place) -> np.ndarray:
    """Background, then the object in two tones: uint8 B 3 H W."""
    fore, back, end = (factors[name].astype(np.float32)
                       for name in ("foreground", "background", "background_end"))
    tone = second_tone(fore)
    mix = _background(style, factors, place.axis)
    image = np.empty((len(fore), 3, *mix.shape[1:]), np.uint8)
    for c in range(3):
        a, b = fore[:, c, None, None], tone[:, c, None, None]
        behind = back[:, c, None, None] + (end - back)[:, c, None, None] * mix
        value = behind + place.coverage * (a + (b - a) * place.texture - behind)
        image[:, c] = value * np.float32(255) + np.float32(0.5)
    return image
