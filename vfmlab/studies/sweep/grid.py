"""What a sweep runs: a file (YAML or JSON) or dict of notebook parameters and config fields, and its points.

    parameters: {preset: pocket_vfm_vae, seed: [0, 1]}  # of a notebook; a list is an axis, others are fixed
    set:                                                # fields of the config, by their dotted names
      losses.vf.weight: [0, 0.1, 0.3]
      vfm.layers: [[0, 3], [0, 3, -1]]                  # an axis of a field that is a list itself
    points:                                             # settings that stand together, crossed with the axes
      - {parameters: {preset: pocket_plain_vae}}
    metrics: [rfd, psnr]                                # what the page shows, the first one first
    search: {objective: gfd, trials: 20}                # Optuna in place of the grid; axes may be ranges:
                                                        #   train.lr: {low: 1e-4, high: 1e-2, log: true}
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from vfmlab import config
from vfmlab.config.files import read_mapping
from vfmlab.errors import ConfigError, nearest

MOST = 10_000  # points of a grid
LARGEST = 2**63  # what a table's whole numbers stay below
WHERE = ("parameters", "set")
RESERVED = {
    "headless": "in a sweep it is always true",
    "overrides": "write config fields under 'set', by their dotted names",
}


class Range(config.Section):
    """Numbers between two ends, for a search; whole ones where both ends, and a `step`, are whole."""

    low: float | int
    high: float | int
    log: bool = False
    step: float | int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"a range from {self.low:g} to {self.high:g} is empty; 'low' has to be below "
                             "'high'")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a 'log' range has its low end above 0, and no 'step'")
        return self

    @property
    def whole(self) -> bool:
        return all(isinstance(v, int) for v in (self.low, self.high, self.step) if v is not None)


class Search(config.Section):
    """An Optuna search over the axes instead of their product."""

    objective: str = Field(..., description="one of the numbers that the notebook hands out")
    trials: int = Field(..., ge=1)
    direction: Literal["minimize", "maximize"] | None = Field(None, description="null: as the metric says")
    sampler: Literal["tpe", "random"] = "tpe"
    startup: int = Field(10, ge=1, description="trials drawn at random before the sampler learns from them")
    seed: int = 0


class Setting(config.Section):
    """Fixed values that stand together."""

    parameters: dict[str, Any] = Field({})
    set: dict[str, Any] = Field({})


class Grid(Setting):
    """The file. Lists under `parameters` and `set` are axes; their product is run, for each of `points`."""

    points: tuple[Setting, ...] = ()
    metrics: dict[str, Literal["lower", "higher"] | None] = Field({}, description="shown; which end is good")
    search: Search | None = None

    @model_validator(mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("metrics"), list | tuple):
            value = value | {"metrics": {str(name): None for name in value["metrics"]}}
        return value

    def axes(self) -> dict[tuple[str, str], list[Any] | Range]:
        """(where, name) -> values or range, in the order of the file."""
        axes: dict[tuple[str, str], list[Any] | Range] = {}
        for where in WHERE:
            for name, value in getattr(self, where).items():
                if isinstance(value, list):
                    axes[where, name] = value
                elif isinstance(value, dict) and {"low", "high"} <= value.keys():
                    axes[where, name] = _section(Range, value, f"{where}.{name}")
        return axes

    def fixed(self) -> Setting:
        axes = self.axes()
        parts = {where: dict(getattr(self, where)) for where in WHERE}
        for where, name in axes:
            del parts[where][name]
        return Setting(**parts)


@dataclass(frozen=True)
class Point:
    """One execution of the notebook. key: hash of (the notebook's code, parameters without root, set)."""

    parameters: dict[str, Any]
    set: dict[str, Any]
    key: str

    @property
    def values(self) -> dict[str, Any]:
        """Parameters and fields in one dict; no name stands under both."""
        return {**self.parameters, **self.set}

    def label(self, names: Any = None) -> str:
        """`seed=0, losses.vf.weight=0.1`, of all values or of those in `names`."""
        return ", ".join(f"{k}={show(v)}" for k, v in self.values.items() if names is None or k in names)


def point(code: str, parameters: Mapping[str, Any], fields: Mapping[str, Any]) -> Point:
    """The point of a notebook with the digest `code`."""
    own = {k: v for k, v in parameters.items() if k != "root"}
    return Point(own, dict(fields), config.digest([code, own, dict(fields)]))


def show(value: Any) -> str:
    """A value as it is written in the file."""
    return value if isinstance(value, str) else json.dumps(value)


def read(source: str | Path | Mapping[str, Any]) -> Grid:
    """The grid in a file, or in a dict.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, an axis that is empty or names a value twice, a
        range without a search.
    """
    where = "grid" if isinstance(source, Mapping) else str(source)
    tree = dict(source) if isinstance(source, Mapping) else read_mapping(source, "grid", _Loader, _unique)
    _known(tree, Grid, where)
    points = tree.get("points")
    for i, part in enumerate(points if isinstance(points, list | tuple) else ()):
        _known(part, Setting, f"{where}: points[{i}]")
    if "search" in tree:
        _known(tree["search"], Search, f"{where}: search")
    grid = _section(Grid, tree, where)
    for setting in (grid, *grid.points):
        _refuse(setting, where)
    for place, values in grid.axes().items():
        name = ".".join(place)
        if isinstance(values, Range):
            if grid.search is None:
                raise ConfigError(f"{where}: '{name}' is a range, which needs a 'search'; for a grid write "
                                  "its values as a list")
        elif not values:
            raise ConfigError(f"{where}: axis '{name}' is empty; give it at least one value, or leave it out")
        elif twice := [v for i, v in enumerate(values) if json.dumps(v) in map(json.dumps, values[:i])]:
            raise ConfigError(f"{where}: axis '{name}' names {show(twice[0])} twice")
    sizes = [len(values) for values in grid.axes().values() if isinstance(values, list)]
    count = max(len(grid.points), 1) * math.prod(sizes)
    if grid.search is None and count > MOST:
        raise ConfigError(f"{where}: these axes stand for {count:,} points, and {MOST:,} are the most; vary "
                          "less, or use a 'search'")
    if grid.search is not None and grid.points:
        raise ConfigError(f"{where}: a search draws its own points; leave 'points' out, or write what they "
                          "vary as axes")
    if grid.search is not None and not grid.axes():
        raise ConfigError(f"{where}: a search needs an axis to search along: a list of choices, or a range "
                          "{low: ..., high: ...}")
    return grid


def _refuse(setting: Setting, where: str) -> None:
    """What cannot be varied, or would be ambiguous in a table."""
    for name, why in RESERVED.items():
        if name in setting.parameters:
            raise ConfigError(f"{where}: parameters.{name}: {why}")
    root = setting.parameters.get("root", "")
    if not isinstance(root, str) or (root and not isinstance(setting, Grid)):
        raise ConfigError(f"{where}: parameters.root: all points keep their runs in one folder; give one "
                          "path, or leave it out")
    if both := sorted(setting.parameters.keys() & setting.set.keys()):
        raise ConfigError(f"{where}: '{both[0]}' stands under 'parameters' and under 'set'; write it once")
    for group in (setting.parameters, setting.set):
        for name, value in group.items():
            try:
                json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ConfigError(f"{where}: '{name}' = {value!a} is half of a character; write it as it is, "
                                  "without escapes") from None
            except (TypeError, ValueError):
                raise ConfigError(f"{where}: '{name}' = {value!r} is no number, text, list or mapping; put "
                                  "quotes around it") from None
            values = value if isinstance(value, list) else [value]
            if any(isinstance(v, int) and abs(v) >= LARGEST for v in values):
                raise ConfigError(f"{where}: '{name}' = {show(value)[:60]}: whole numbers stay below 2^63; "
                                  "put quotes around it where it is text")


def settings(grid: Grid) -> Iterator[Setting]:
    """The fixed values of each of `points`, or the one setting there is without them."""
    fixed = grid.fixed()
    for part in grid.points or (Setting(),):
        yield Setting(**{where: {**getattr(fixed, where), **getattr(part, where)} for where in WHERE})


def expand(grid: Grid, code: str, where: str = "grid") -> list[Point]:
    """All points, in the order of the file: the last axis changes fastest.

    Raises:
        ConfigError: two points that are the same; a search (its points are not known before it runs).
    """
    if grid.search is not None:
        raise ConfigError(f"{where}: the points of a search depend on its results; a grid without 'search' "
                          "has a list of them")
    axes = grid.axes()
    points = [place(setting, dict(zip(axes, values, strict=True)), code)
              for setting in settings(grid) for values in itertools.product(*axes.values())]
    first: dict[str, int] = {}
    for i, p in enumerate(points):
        if first.setdefault(p.key, i) < i:
            raise ConfigError(f"{where}: points {first[p.key] + 1} and {i + 1} are the same ({p.label()}); "
                              "axes replace what 'points' say")
    return points


def place(setting: Setting, chosen: Mapping[tuple[str, str], Any], code: str) -> Point:
    """The point of `setting` with the `chosen` values of the axes."""
    parts = {where: dict(getattr(setting, where)) for where in WHERE}
    for (where, name), value in chosen.items():
        parts[where][name] = value
    return point(code, parts["parameters"], parts["set"])


# -- files -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number (YAML 1.1 wants 1.0e-4), a key given twice a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _unique([(self.construct_object(key, deep=True), key.start_mark.line + 1) for key, _ in node.value])
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("anchors and aliases (&, *) are not read; write the values where they belong")
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
FLOAT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"'{twice[0]}' stands twice; write it once, with all its values")
    return dict(pairs)


def _known(tree: Any, model: type[config.Section], where: str) -> None:
    if isinstance(tree, dict) and (unknown := [key for key in tree if key not in model.model_fields]):
        raise ConfigError(f"{where}: unknown key "
                          f"'{unknown[0]}'{nearest(str(unknown[0]), model.model_fields)}")


def _section(model: type[config.Section], tree: Any, where: str) -> Any:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {config.explain(error, tree)}") from None
