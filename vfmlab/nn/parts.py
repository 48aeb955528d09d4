"""Parts of a run that are given from a notebook's cell: a loss, a module, a callback per step.

    vfmlab.train("pocket_vfm_vae", parts={"losses.edges": edges, "tokenizer.decoder.blocks.1": Plain})

| name | what it is | called with |
|---|---|---|
| `losses.NAME` | function, or class of a module | the :class:`~vfmlab.losses.base.Reconstruction` of a batch; gives one number |
| `tokenizer.PATH` | function or class | the module at PATH of the tokenizer; gives the one in its place |
| `network`, `network.PATH` | the same, of the generator's network | the module that it replaces |
| `on_step` | function; it may write to a list of the notebook | the task, the steps taken, the step's numbers |

A loss may be a pair (loss, weight). The recipe holds the hash of each part's source, with the functions and
constants of the same notebook that it uses, so that another source is another run. The source is saved with
the run, to be read, and never executed from there: a kernel that has not run the cell cannot resume the run.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from vfmlab.config import Part, digest, explain
from vfmlab.config.files import write_atomic
from vfmlab.errors import ConfigError
from vfmlab.seeding import derive

KINDS = {"losses": ("r",), "tokenizer": ("old",), "network": ("old",), "on_step": ("task", "step", "numbers")}
_given: dict[str, tuple[Any, str]] = {}  # hash -> part and source, of the cells that this process has run


def take(given: Mapping[str, Any]) -> dict[str, Part]:
    """What a recipe holds of the parts given: their hashes.

    Raises:
        ConfigError: an unknown place, no function or class, one that cannot be called as its place asks, one
        whose source cannot be had, or a weight that is not above 0.
    """
    taken = {}
    for name, thing in given.items():
        kind, _, rest = name.partition(".")
        needs = {"losses": True, "tokenizer": True, "on_step": False}.get(kind, bool(rest))
        if kind not in KINDS or needs != bool(rest):
            raise ConfigError(f"parts: '{name}' is no place for a part; name losses.NAME, tokenizer.PATH, "
                              "network, network.PATH or on_step")
        pair = kind == "losses" and isinstance(thing, tuple) and len(thing) == 2
        thing, weight = thing if pair else (thing, 1.0)
        _check(name, thing, KINDS[kind])
        text = "\n\n".join(sources(name, thing, set())) + "\n"
        try:
            taken[name] = Part(source=digest(text), weight=weight)
        except ValidationError as error:
            raise ConfigError(f"parts['{name}']: {explain(error, {})}") from None
        _given[taken[name].source] = thing, text
    return taken


def _check(name: str, thing: Any, arguments: tuple[str, ...]) -> None:
    shape = f"parts['{name}']: {getattr(thing, '__name__', repr(thing))}"
    if not (inspect.isfunction(thing) or inspect.isclass(thing)):
        made = isinstance(thing, nn.Module)
        way = "give its class: weights are made anew from the run's seed" if made else "give one of them"
        raise ConfigError(f"{shape} is no function and no class; {way}")
    if name.startswith("losses.") and inspect.isclass(thing):
        arguments = ()
    try:
        inspect.signature(thing).bind(*arguments)
    except TypeError:
        asked = f"({', '.join(arguments)})"
        own = inspect.signature(thing)
        raise ConfigError(f"{shape}{own} is called as {asked}; let it take that") from None


def fetch(name: str, part: Part) -> Any:
    """The part itself. Raises ConfigError where this process has not run the cell."""
    if part.source not in _given:
        raise ConfigError(f"part '{name}' (source {part.source}) was given from a notebook's cell, which "
                          "this process has not run; run that cell (the run's folder parts/ has a copy) and "
                          "give it as parts=")
    return _given[part.source][0]


def save(parts: Mapping[str, Part] | None, folder: Path) -> None:
    """Write the source of each part to `folder`/NAME.py."""
    for name, part in (parts or {}).items():
        folder.mkdir(exist_ok=True)
        fetch(name, part)
        write_atomic(folder / f"{name}.py", _given[part.source][1])


def replace(module: nn.Module, parts: Mapping[str, Part] | None, kind: str, seed: int) -> nn.Module:
    """`module`, the run's "tokenizer" or "network", with its parts in their places.

    Weights of parts are drawn from the run's seed. Raises ConfigError for a path that is not there, or a part
    that is no module.
    """
    for name, part in (parts or {}).items():
        place, _, path = name.partition(".")
        if place != kind:
            continue
        try:
            old = module.get_submodule(path)
        except AttributeError:
            known = ", ".join(name for name, _ in module.named_children())
            raise ConfigError(f"parts['{name}']: the {kind} has no module '{path}'; it has {known}") from None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("part", name, seed))
            new = fetch(name, part)(old)
        if not isinstance(new, nn.Module):
            raise ConfigError(f"parts['{name}'] gives {type(new).__name__}, not an nn.Module")
        if not path:
            return new
        module.set_submodule(path, new)
    return module


# -- sources ------------------------------------------------------------------------------------------------


def sources(name: str, thing: Any, seen: set[str]) -> Iterator[str]:
    """The source of a function or class, after those of what it uses from the same notebook or file.

    seen: names whose sources have been given; they are added to.

    Raises:
        ConfigError: no source, variables of a function around it, or a variable of the notebook that is no
        constant.
    """
    seen.add(thing.__name__)
    functions = list(_functions(thing))
    for function in functions:
        if inside := [v for v in function.__code__.co_freevars if v != "__class__"]:
            raise ConfigError(f"parts['{name}']: {thing.__name__} reads {', '.join(inside)} of the function "
                              "around it; define it in a cell of its own, with such values in it")
        for used in sorted(_globals(function.__code__) - seen):
            if used not in function.__globals__:
                continue  # a builtin
            value = function.__globals__[used]
            seen.add(used)
            if inspect.isfunction(value) or inspect.isclass(value):
                if value.__module__ == thing.__module__:
                    yield from sources(name, value, seen)
            elif _constant(value):
                yield f"{used} = {value!r}"
            elif not (isinstance(value, ModuleType) or callable(value) or name == "on_step"):
                raise ConfigError(f"parts['{name}']: {thing.__name__} reads the variable '{used}' "
                                  f"({type(value).__name__}), which a later kernel may not have; make it in "
                                  "the part itself")
    yield _source(name, thing, functions)


def _functions(thing: Any) -> Iterator[Callable[..., Any]]:
    members = vars(thing).values() if inspect.isclass(thing) else [thing]
    for member in members:
        member = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(member):
            yield member


def _globals(code: CodeType) -> set[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return names.union(*(_globals(each) for each in inner))


def _constant(value: Any) -> bool:
    return isinstance(value, int | float | str | None) or (
        isinstance(value, tuple) and all(map(_constant, value)))


def _source(name: str, thing: Any, functions: list[Callable[..., Any]]) -> str:
    text = _of_class(thing, functions) if inspect.isclass(thing) else ""
    with contextlib.suppress(OSError, TypeError):
        text = text or inspect.getsource(thing)
    if not text:
        raise ConfigError(f"parts['{name}']: {thing.__name__} has no source that could be saved; define it "
                          "in a cell or a file")
    return textwrap.dedent(text).strip()


def _of_class(thing: type, functions: list[Callable[..., Any]]) -> str:
    """The source of a class from its methods' cell: before Python 3.13 inspect does not look there."""
    for function in functions:
        text = "".join(linecache.getlines(function.__code__.co_filename))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.name == thing.__name__:
                return ast.get_source_segment(text, node) or ""
    return ""
