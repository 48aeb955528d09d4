"""Where presets are filed. Each file of this package files its own, so that a method's presets are one file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from vfmlab.config import Recipe
from vfmlab.errors import ConfigError, nearest

_TABLE: dict[str, Callable[[], Recipe]] = {}
_TIERS = ("tiny", "pocket", "small", "paper")


def preset(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """File a preset under its function's name."""
    _TABLE[function.__name__] = function
    return function


def table() -> dict[str, Callable[[], Recipe]]:
    """Name -> function, tier by tier."""
    package = importlib.import_module("vfmlab.presets")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"vfmlab.presets.{module.name}")
    return dict(sorted(_TABLE.items(), key=lambda item: (_TIERS.index(item[0].split("_")[0]), item[0])))


def names() -> list[str]:
    return list(table())


def get(name: str) -> Recipe:
    """The run called `name`; :class:`ConfigError` with the nearest known name otherwise."""
    found = table()
    if name not in found:
        raise ConfigError(f"unknown preset '{name}'{nearest(name, found)}")
    return found[name]()


def function(name: str) -> Callable[[], Recipe]:
    """The preset itself; its docstring says command, cost and what to expect."""
    return table()[name]


def summary(name: str) -> str:
    """First line of the preset's docstring."""
    return (table()[name].__doc__ or "").strip().splitlines()[0]
