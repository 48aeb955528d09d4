"""Changing a recipe by dotted names, and reading one: every mistake is one line with the field, the value and
the way out."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Container
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vfmlab.config.files import absolute_source, expand, parse_json
from vfmlab.config.recipe import Phase, Recipe, Settings, Stage
from vfmlab.config.schema import loss_config
from vfmlab.errors import ConfigError, nearest
from vfmlab.registry import DECODERS, LOSSES, NETWORKS, PATHS, TOKEN_NETWORKS, TOKENIZERS

Config = TypeVar("Config", Recipe, Phase)


def parse(config: dict[str, Any], where: str = "config") -> Recipe:
    """A :class:`Recipe` from JSON-like `config`; a single-line :class:`ConfigError` if it does not fit."""
    try:
        return Recipe.model_validate(config)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, config)}") from None


def parse_overrides(values: dict[str, Any] | str | None) -> dict[str, Any]:
    """Dotted name -> value, from a dict or its JSON (papermill passes one)."""
    if isinstance(values, str):
        try:
            values = parse_json(values or "{}", object)
        except ValueError as error:
            example = """'{"train.samples": 50000}'"""
            raise ConfigError(f"overrides: {error}: {brief(values)}; write for example {example}") from None
    if not isinstance(values or {}, dict):
        raise ConfigError(f"overrides: expected a JSON object of dotted names, got {brief(values)}")
    return dict(values or {})


def located(values: dict[str, Any]) -> dict[str, Any]:
    """Overrides as they are meant in this folder: absolute paths without `~`, so two folders are two runs."""

    def absolute(name: str, value: Any) -> Any:
        field = name.rpartition(".")[2]
        if isinstance(value, dict):
            return {key: absolute(str(key), inner) for key, inner in value.items()}
        if not isinstance(value, str) or value in ("pretrained", "random"):
            return value
        if field in ("source", "encoder"):
            return absolute_source(value)
        files = field in ("weights", "pretrained", "reference", "prompts")
        local = files and (value.startswith("~") or os.path.exists(value))
        return os.path.abspath(expand(value)) if local else value

    return absolute("", values)


def override(config: Config, values: dict[str, Any] | str | None) -> Config:
    """A recipe or phase with dotted fields replaced, e.g. `{"train.samples": 50000, "seed": 1}`.

    A dict given for a section changes the fields that it names; another `kind` of decoder, network or path
    keeps of the former one's fields those that it has too. Unknown fields and values of the wrong type
    raise :class:`ConfigError` with the field, the value and the nearest right name.
    """
    values = parse_overrides(values)
    if not values:
        return config
    if isinstance(config, Phase):
        return override(config.recipe, values).last
    tree = config.model_dump(mode="json")
    before = copy.deepcopy(tree)
    for dotted, value in values.items():
        *path, last = str(dotted).split(".")
        node = tree
        for depth, key in enumerate(path):
            if path[max(0, depth - 1) : depth] == ["losses"] and key.partition(":")[0] in LOSSES:
                node.setdefault(key, {})  # a loss term is added by naming it
            if path[:1] == ["stages"] and depth == 1:
                node = {str(i): stage
                        for i, stage in enumerate(node)} | {stage["name"]: stage for stage in node}
            added = path[:1] == ["stages"] and depth > 2  # a stage says only what differs
            if not isinstance(node, dict) or (key not in node and not added):
                raise ConfigError(_unknown(dotted, value, path[:depth], node, key, before))
            if node.get(key) is None:  # an absent section is opened by naming one of its fields
                node[key] = {}
            elif isinstance(node[key], int | float) and "losses" in path[:depth]:
                node[key] = {"weight": node[key]}
            node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(_unknown(dotted, value, path, node, last, before))
        if isinstance(value, dict) and isinstance(node.get(last), dict):
            if node[last] and not value:
                warnings.warn(f"overrides: {dotted} = {{}} names no field, so that section stays as it is; "
                              "name the fields to change, or null where it can be left out", stacklevel=2)
            node[last] = {**node[last], **value}
        else:
            node[last] = value
    inner = ((dotted, value) for dotted, value in values.items() if isinstance(value, dict))
    named = {*values, *(f"{dotted}.{key}" for dotted, value in inner for key in value)}
    _leave(before, tree, tree, [], named)
    recipe = parse(tree, "overrides")
    for dotted, value in values.items():
        _reaches(tree, str(dotted), value)
    return recipe


def _reaches(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Warn of a change of what the first stage sets itself: no stage reads it. Rows of a comparison may share
    one that others read, so it is no error."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            _reaches(tree, f"{dotted}.{key}", inner)
        return
    stages, path = tree.get("stages"), dotted.split(".")
    if not stages or path[0] not in Settings.model_fields:
        return
    node: Any = stages[0]
    for key in path:
        node = (node if isinstance(node, dict) else {"weight": node}).get(key)
        if node is None:
            return
    name = stages[0]["name"]
    warnings.warn(f"overrides: {dotted} = {brief(value)} reaches no stage of {tree['name']}: '{name}' sets "
                  f"its own; set stages.{name}.{dotted}", stacklevel=3)


def _leave(before: Any, after: Any, tree: dict[str, Any], path: list[str], named: Container[str]) -> None:
    """Take out of every decoder, network and path of `after` whose kind is another than `before` the former
    kind's fields that the new one lacks, but for those that are named."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return
    if (path[-1:] in (["decoder"], ["network"], ["path"]) and before.get("kind") != after.get("kind")
            and (known := _fields(path, tree))):
        for key in before.keys() - known:
            if after.get(key) == before[key] and ".".join([*path, key]) not in named:
                after.pop(key, None)
    for key in after.keys() & before.keys():
        _leave(before[key], after[key], tree, [*path, key], named)


def parse_assignments(items: list[str]) -> dict[str, Any]:
    """`["a.b=3", "c=x"]` -> `{"a.b": 3, "c": "x"}`; values are JSON where they parse, text otherwise."""
    values: dict[str, Any] = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set: {brief(item)} is not of the form field=value, for example "
                              "train.samples=50000")
        try:
            values[key] = parse_json(text, object)
        except ValueError:
            values[key] = text
    return values


def brief(value: Any) -> str:
    """`value` as a message shows it: one line of at most 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python turns into text
        return f"an integer of {value.bit_length():,} bits"
    return text if len(text) < 80 else text[:77] + "..."


def _unknown(dotted: str, value: Any, above: list[str], node: Any, key: str, tree: dict[str, Any]) -> str:
    names = LOSSES if above[-1:] == ["losses"] else node if isinstance(node, dict) else ()
    known = [".".join([*above, name]) for name in names]
    hint = _elsewhere(dotted, tree) or nearest(".".join([*above, key]), known)
    return f"overrides: unknown field {brief(str(dotted))} = {brief(value)}{hint}"


def _elsewhere(dotted: str, tree: dict[str, Any]) -> str:
    """A clause with the fields that end like `dotted`, or like it without its first part; mostly ""."""

    def names(node: Any, above: str) -> list[str]:
        inner = node.items() if isinstance(node, dict) else ()
        return [name for key, value in inner for name in (above + key, *names(value, f"{above}{key}."))]

    for tail in (dotted, dotted.partition(".")[2]):
        alike = [name for name in names(tree, "") if tail and name.endswith(f".{tail}") and name != dotted]
        if 0 < len(alike) < 4:
            return f" (did you mean {' or '.join(map(repr, alike))}?)"
    return ""


def explain(error: ValidationError, config: Any) -> str:
    """The first problem of a pydantic error as one line: field, value, complaint, nearest right name."""
    every = error.errors(include_url=False)  # a misspelt field first, before the one that lacks for it
    first = next((each for each in every if each["type"] == "extra_forbidden"), every[0])
    place = [str(part) for part in first["loc"]
             if not str(part).startswith(("function-", "lax-or", "SerializeAsAny"))]
    field, shown = ".".join(place), brief(first.get("input"))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        above = "".join(f"{part}." for part in place[:-1])
        known = [above + name for name in _fields(place[:-1], config)]
        hint = _elsewhere(field, config) or nearest(field, known)
        return f"unknown field {brief(field)} = {shown}{hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"field {brief(field)} is missing{more}"
    if first["type"] == "model_type" and (inner := _fields(place, config)):
        names = ", ".join(f"{field}.{name}" for name in inner[:6])
        return f"field {brief(field)} = {shown}: it is a section; name its fields: {names}{more}"
    if first["type"] == "value_error" and not place:
        return f"{message}{more}"
    return f"field {brief(field)} = {shown}: {message}{more}"


def _fields(place: list[str], config: Any) -> list[str]:
    """Field names of the section at `place`, for the suggestion after an unknown name."""
    model: Any = Recipe
    if place[:1] == ["stages"]:
        return list(Stage.model_fields) if len(place) == 2 else _fields(place[2:], {})
    networks = TOKEN_NETWORKS if place[:1] == ["ar"] else NETWORKS
    try:
        node = config
        for part in place:
            node = node.get(part, {}) if isinstance(node, dict) else {}
            field = model.model_fields[part] if part in getattr(model, "model_fields", {}) else None
            model = field.annotation if field is not None else None
            registry, key = {"tokenizer": (TOKENIZERS, "method"), "decoder": (DECODERS, "kind"),
                             "network": (networks, "kind"), "path": (PATHS, "kind")}.get(part, (None, ""))
            if registry is not None:
                model = registry.get(node[key]).Config
            elif place[-2:-1] == ["losses"] and part == place[-1]:
                model = loss_config(part)
            model = next((a for a in getattr(model, "__args__", ()) if isinstance(a, type)
                          and issubclass(a, BaseModel)),
                         model)
    except (KeyError, TypeError, IndexError, ConfigError):
        return []
    return list(getattr(model, "model_fields", {}))
