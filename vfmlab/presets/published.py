"""What papers and releases say of the fields of the `paper` presets, beside what the presets have.

A :class:`~vfmlab.presets.published_facts.Fact` is one field of one preset. Values are written in this
project's units (images, not steps; t = 1 is noise); `note` says where the source counts in another way, and
why a preset differs. What no source states is listed as unknown, never filled in. Grades: C, released code or
configuration; P, the paper's text; N, a third party's note or another paper's table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vfmlab.config import Recipe, Section
from vfmlab.errors import ConfigError, nearest
from vfmlab.presets.published_facts import FACTS, UNKNOWN, Fact
from vfmlab.presets.table import get, names, row


class Line(NamedTuple):
    """A fact beside the preset. agrees: None where no source states the field."""

    fact: Fact
    ours: Any
    agrees: bool | None


def facts(name: str) -> tuple[Fact, ...]:
    """Of a preset: its own, and for all other fields those of the preset that it is made of."""
    own = FACTS.get(name, ())
    fields = {fact.field for fact in own}
    base = row(name).of.partition("+")[0]
    inherited = facts(base) if base else ()
    return (*own, *(fact for fact in inherited if fact.field not in fields))


def lines(name: str) -> Iterator[Line]:
    """The facts of a preset beside its fields.

    Raises:
        ConfigError: a fact names a field that the preset does not have.
    """
    recipe = get(name)
    for fact in facts(name):
        ours = value(recipe, fact.field)
        yield Line(fact, ours, None if fact.said is UNKNOWN else same(fact.said, ours))


def value(recipe: Recipe, field: str) -> Any:
    """A field of a recipe, or of a stage's settings; None where a section or a loss is off."""
    stage, _, path = field.rpartition("/")
    node: Any = recipe
    if stage:
        stages = [each.name for each in recipe.stages]
        if stage not in stages:
            raise ConfigError(f"'{field}': '{recipe.name}' has no stage '{stage}'{nearest(stage, stages)}")
        node = recipe.settings(stages.index(stage))
    for key in path.split("."):
        if node is None:
            return None
        if isinstance(node, dict):
            node = node.get(key)
        elif isinstance(node, tuple):
            node = node[int(key)]
        elif key in type(node).model_fields:
            node = getattr(node, key)
        else:
            raise ConfigError(f"'{field}': there is no '{key}'{nearest(key, type(node).model_fields)}")
    return node


def same(said: Any, ours: Any) -> bool:
    """Whether a preset has what a source says; a part that is named stands for its section."""
    if isinstance(ours, Section):
        ours = getattr(ours, "kind", getattr(ours, "name", ours))
    if isinstance(said, int | float) and isinstance(ours, int | float) and not isinstance(said, bool):
        return math.isclose(said, ours, rel_tol=1e-9)
    if isinstance(said, Sequence) and not isinstance(said, str):
        return (isinstance(ours, Sequence) and len(said) == len(ours)
                and all(map(same, said, ours)))
    return said == ours


def shown(item: Any) -> str:
    """A value for people."""
    if isinstance(item, Section):
        item = getattr(item, "kind", getattr(item, "name", item))
    if item is None:
        return "none"
    if isinstance(item, bool):
        return "yes" if item else "no"
    if isinstance(item, int):
        return f"{item:,}"
    if isinstance(item, float):
        return f"{item:.4g}"
    if isinstance(item, Sequence) and not isinstance(item, str):
        return ", ".join(map(shown, item)) or "none"
    return str(item)


def rows(name: str) -> list[dict[str, str]]:
    """The table of a preset: field, paper, release, ours, grade, and what differs or is ours."""
    table = []
    for fact, ours, agrees in lines(name):
        verdict = {None: "", True: "", False: "differs"}[agrees]
        table.append({"field": f"`{fact.field}`", "paper": shown(fact.paper), "release": shown(fact.release),
                      "ours": shown(ours), "grade": fact.grade or "-",
                      "remark": ": ".join(filter(None, (verdict, fact.note)))})
    return table


def presets() -> list[str]:
    """The presets that are held against papers."""
    return [name for name in names() if row(name).tier == "paper"]
