"""Presets are rows: a name, what it is, a config, and what to know before it is started.

A preset is named wherever a recipe is wanted, alone or with changes, read from left to right:

    pocket_vfm_vae                  a row of this table
    pocket_vfm_vae+no_style+d16     with variants: the same, but for named changes
    pocket_rae@pocket_plain_vae     with the generator, its training and the protocol of another
    mine.json+no_kl                 a config file in place of a preset
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from dataclasses import dataclass, field
from typing import Any

from vfmlab.config import Recipe, override, parse
from vfmlab.config.files import expand, read_json
from vfmlab.errors import ConfigError, nearest
from vfmlab.presets import variants
from vfmlab.presets.tiers import COST, RESULT, SOURCE, TIERS


@dataclass(frozen=True)
class Preset:
    """One row.

    Args:
        about: what it is, one sentence. config: the recipe without its name; with `of`, dotted changes to
        that one.
        of: the preset with variants that it is, but for `config`. cost: what it takes once what it builds on
        is there.
        result: what to expect, or what was published. ours: what no paper states. needs: packages and
        weights.
    """

    name: str
    about: str
    config: dict[str, Any] = field(default_factory=dict)
    of: str = ""
    cost: str = ""
    result: str = ""
    ours: str = ""
    needs: str = ""

    @property
    def tier(self) -> str:
        return self.name.partition("_")[0]

    @property
    def command(self) -> str:
        launch = "accelerate launch -m vfmlab" if self.tier == "paper" else "vfmlab"
        return f"{launch} train {self.name}{SOURCE[self.tier]}"

    @property
    def facts(self) -> dict[str, str]:
        """What the row says, for people: name of the fact -> text."""
        facts = {
            "command": self.command, "is": self.of, "takes": self.cost or COST[self.tier], "needs": self.needs,
            "expect": self.result or RESULT[self.tier], "ours": self.ours,
        }  # fmt: skip
        return {name: text for name, text in facts.items() if text}

    def recipe(self) -> Recipe:
        if not self.of:
            return parse({**self.config, "name": self.name}, f"preset {self.name}")
        return override(variants.change(get(self.of), self.config), {"name": self.name})


@functools.cache
def table() -> dict[str, Preset]:
    """Name -> row, tier by tier."""
    package = importlib.import_module("vfmlab.presets")
    modules = [
        importlib.import_module(f"vfmlab.presets.{m.name}") for m in pkgutil.iter_modules(package.__path__)
    ]
    rows = [row for module in modules for row in getattr(module, "ROWS", ())]
    return {row.name: row for row in sorted(rows, key=lambda row: (TIERS.index(row.tier), row.name))}


def names() -> list[str]:
    return list(table())


def row(name: str) -> Preset:
    """The row called `name`; :class:`ConfigError` with the nearest known name otherwise."""
    if name not in table():
        if "-" in name:
            raise ConfigError(f"'{name}' is no preset; a run goes on by the command it was started with, or "
                              "by the config.json in its folder")
        raise ConfigError(f"unknown preset '{name}'{nearest(name, table())}")
    return table()[name]


def summary(name: str) -> str:
    """What a preset is, in one sentence."""
    return row(name).about


def about(name: str) -> dict[str, str]:
    """What is known of a preset, or of one with variants and another's generator, before it is started.

    Raises:
        ConfigError: as :func:`get`.
    """
    first, *changes = re.split("(?=[+@])", name)
    if not changes:
        return {"about": summary(name)} | row(name).facts
    get(name)
    said = {"+": lambda other: variants.VARIANTS[other].about, "@": summary}
    return {"about": summary(first), "command": row(first).command.replace(first, name),
            **{part: said[part[0]](part[1:]) for part in changes}}


def get(name: str, overrides: dict[str, Any] | str | None = None) -> Recipe:
    """The recipe that `name` says, `PRESET[+VARIANT...][@PRESET][+VARIANT...]`, with dotted `overrides` on
    top.

    Variants that are fitted to the recipe (`plain_matched`: as large as its decoder) come after the
    overrides.

    Raises:
        ConfigError: an unknown preset, variant or field, a variant or diffusion model that does not fit.
    """
    file = re.match(r".*?\.json(?=[+@]|$)", name)  # a path may hold a + or @ itself
    first = file.group() if file else re.split("[+@]", name)[0]
    recipe, fitted = _base(first), []
    for part in re.split("(?=[+@])", name[len(first) :])[1:]:
        if part[0] == "@":
            recipe = _with_generator_of(recipe, _base(part[1:]))
        elif part[1:] in variants.FITTED:
            fitted.append(part[1:])
        else:
            recipe = variants.apply(recipe, part[1:])
    recipe = override(recipe, overrides)
    return functools.reduce(variants.apply, fitted, recipe)


def _base(name: str) -> Recipe:
    if not name.endswith(".json"):
        return row(name).recipe()
    return parse(read_json(expand(name), ConfigError, "config file"), name)


def _with_generator_of(recipe: Recipe, other: Recipe) -> Recipe:
    """`recipe` with the generator and the protocol of `other`; its tokenizer's runs stay the same ones.
    Latents on a sphere stay there: the other's path and solver become a sphere's."""
    pair = f"{recipe.name}@{other.name}"
    for one, what in ((recipe, "tokenizer"), (other, "generator")):
        if getattr(one, what) is None:
            named = "tokenizer" if what == "tokenizer" else "diffusion or ar"
            raise ConfigError(f"'{pair}': '{one.name}' has no {named} section; name a preset that trains one")
    if getattr(recipe.tokenizer, "radius", None) is not None and other.ar is None:
        other = variants.apply(other, "sphere")
    own = None if recipe.generator is None else recipe.generator.tokenizer_of
    taken = {"diffusion": None, "ar": None, "protocol": other.protocol.model_dump()}
    kind = "diffusion" if other.ar is None else "ar"
    taken[kind] = other.generator.model_dump() | {"tokenizer_of": own}
    return parse(recipe.model_dump() | taken, pair)
