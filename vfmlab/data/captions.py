"""Captions of drawn scenes: a small closed language, written from true factors and read back into them.

    a striped red disc
    two striped red discs left of a plain blue cross

A caption is a :class:`Scene`: a group of like things, and perhaps one more thing that the group stands left
of, right of, above or below. The same scene always has the same caption; :data:`WORDS` are all its words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from vfmlab.errors import ConfigError

COUNTS = ("a", "two", "three")
SIDES = ("left of", "right of", "above", "below")
HUES = {"red": 0.0, "yellow": 60.0, "green": 120.0, "blue": 230.0, "purple": 290.0}  # degrees
COLOURS = (*HUES, "white", "black")
GREY = 0.2  # colours less saturated than this are white or black
BASIC = ("disc", "square", "triangle", "cross", "ring")  # those that come in groups
SHAPES = (*BASIC, "bar", "half", "corner", "star", "heart", "hexagon", "arrow", "crescent", "drop", "trefoil",
          "hourglass")
TEXTURES = ("plain", "striped", "shaded", "dotted", "checked")


def plural(shape: str) -> str:
    """ "discs", "crosses"."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


WORDS = tuple(sorted({*COUNTS, *" ".join(SIDES).split(), *COLOURS, *SHAPES, *map(plural, BASIC), *TEXTURES}))


@dataclass(frozen=True)
class Thing:
    """Like things: how many (1 to 3), and what they are; texture or colour None: not said."""

    count: int
    texture: str | None
    colour: str | None
    shape: str

    def __str__(self) -> str:
        words = COUNTS[self.count - 1], self.texture, self.colour
        return " ".join([word for word in words if word] + [self.shape if self.count == 1
                                                            else plural(self.shape)])


@dataclass(frozen=True)
class Scene:
    """`first`, or `first` to one side of `second`; side: one of SIDES."""

    first: Thing
    side: str | None = None
    second: Thing | None = None

    def __str__(self) -> str:
        return str(self.first) if self.second is None else f"{self.first} {self.side} {self.second}"


def _one_of(words: tuple[str, ...]) -> str:
    return "|".join(words)


_NAMED = {plural(shape): shape for shape in BASIC} | {shape: shape for shape in SHAPES}
_THING = re.compile(rf"({_one_of(COUNTS)})(?: ({_one_of(TEXTURES)}))?(?: ({_one_of(COLOURS)}))?"
                    rf" ({_one_of(tuple(_NAMED))})")


def parse(caption: str) -> Scene:
    """The scene that a caption describes; texture and colour may be left out.

    Raises:
        ConfigError: not in the language of drawn scenes.
    """
    first, side, second = re.fullmatch(rf"(.*?)(?: ({_one_of(SIDES)}) (.*))?", caption, re.DOTALL).groups()
    matches = [_THING.fullmatch(text) for text in (first, second) if text is not None]
    if None not in matches:
        things = [Thing(COUNTS.index(count) + 1, texture, colour, _NAMED[shape])
                  for count, texture, colour, shape in (match.groups() for match in matches)]
        scene = Scene(things[0], side, things[1] if side else None)
        if str(scene) == caption:  # "two disc" is not
            return scene
    raise ConfigError(f"'{caption[:80]}' is no caption of drawn scenes; write for example 'two striped red "
                      "discs left of a plain blue cross'")


def colour_names(rgb: np.ndarray) -> list[str]:
    """Name of each colour, RGB B 3 in [0, 1]: the nearest hue of HUES; white or black where it is grey."""
    high, low = rgb.max(1), rgb.min(1)
    spread = np.maximum(high - low, 1e-9)
    r, g, b = rgb.T
    sector = np.where(high == r, ((g - b) / spread) % 6, np.where(high == g, (b - r) / spread + 2,
                                                                  (r - g) / spread + 4))
    away = np.abs((60 * sector[:, None] - np.array(list(HUES.values())) + 180) % 360 - 180)
    nearest = [list(HUES)[i] for i in away.argmin(1)]
    grey = (high - low) < GREY * np.maximum(high, 1e-9)
    return [("white" if value > 0.5 else "black") if is_grey else name
            for name, is_grey, value in zip(nearest, grey, high, strict=True)]
