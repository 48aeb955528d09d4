"""Which runs there are, and the few models in memory. Only run ids come in from the browser, never paths."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from apps import cards
from apps.common import printable, problem
from vfmlab import api, runs
from vfmlab.errors import VfmlabError
from vfmlab.studies import explore
from vfmlab.weights import io

KEEP = 6  # models in memory at a time; the one unused for longest goes first
GENERATORS = ("diffusion", "ar")  # kinds of runs that draw samples
BANK = 400  # held-out images among which neighbours are looked for
MOST_RUNS = 6  # side by side


@lru_cache(maxsize=4096)
def _reason(path: str, stamp: float) -> str:
    """Why a run with a sound config.json cannot be offered; "" where it can."""
    try:
        path.encode()  # ids are sent as text
        runs.RunDir(path).config()
    except (VfmlabError, UnicodeError) as error:
        return str(error)
    return ""


def _known(root: Path) -> tuple[dict[str, runs.RunDir], dict[str, str]]:
    """All runs that can be offered, newest first, and for each folder that cannot why."""
    listed, bad = runs.listing(root)
    good = {}
    for run in reversed(listed):
        try:
            reason = _reason(str(run.path), (run.path / "config.json").stat().st_mtime)
        except OSError as error:
            reason = error.strerror
        (bad if reason else good)[run.id] = reason or run
    return good, bad


def unreadable(root: Path) -> str:
    """One line that names the runs that are left out of the lists; "" where there are none."""
    bad = _known(root)[1]
    lines = (f"'{name}' ({' '.join(bad[name].split())[:160]})" for name in sorted(bad)[:4])
    named = printable("; ".join(lines))
    return f"{len(bad)} folder{'s' * (len(bad) > 1)} cannot be read and are left out: {named}" if bad else ""


def _weights(folder: runs.RunDir) -> bool:
    return folder.ema.exists() or folder.model.exists()


def choices(root: Path, *kinds: str) -> list[tuple[str, str]]:
    """(readable name, id) of the runs of these kinds that have weights, newest first: their name, and what
    differs from others of that name."""
    known, differ = _known(root)[0], {}
    ids = [i for kind in kinds for i, run in known.items() if run.kind == kind and _weights(run)]
    for kind in kinds:
        differ |= runs.contrast([known[i] for i in ids if known[i].kind == kind])
    differ = {i: re.sub(r'"(\w+:)?/[^"]*/', r'"\1', text) for i, text in differ.items()}  # no folders
    names = {i: known[i].raw_config["name"] + (f" ({differ[i][:70]})" if differ[i] else "") for i in ids}
    taken = list(names.values())
    unique = {i: name if taken.count(name) == 1 else f"{name} [{i[-8:]}]" for i, name in names.items()}
    return [(printable(name), i) for i, name in unique.items()]


def dropdown(root: Path, kinds: tuple[str, ...], label: str, none: str | None = None,
             most: int = 1) -> gr.Dropdown:
    """A list to choose one run of these kinds from, or up to `most`. none: what stands for no run, first."""
    several = {"multiselect": True, "max_choices": most} if most > 1 else {}

    def fresh() -> list[tuple[str, str]]:
        return [*([(none, none)] if none else []), *choices(root, *kinds)]

    def first(ids: list[str]) -> Any:
        return ids[:2] if several else next(iter(ids), None)

    names = fresh()
    value = first([run_id for _, run_id in names])
    made = gr.Dropdown(names, value=value, label=label, allow_custom_value=True, **several)
    made.fresh, made.first = fresh, first  # what a reload of the page shows
    return made


def checked(root: Path, run_id: Any, *kinds: str) -> runs.RunDir:
    """The run of that id, of one of these kinds and with weights, or where no kind is named any; a message
    where there is none. What is no name of a folder of `root` is no id."""
    folder = _known(root)[0].get(run_id) if isinstance(run_id, str) else None
    if folder is None or (kinds and (folder.kind not in kinds or not _weights(folder))):
        what = f"finished {' or '.join(kinds)} run" if kinds else "run"
        raise problem(f"There is no {what} '{str(run_id)[:80]}' here (any more). "
                      "Reload the page for a fresh list and choose another one.")
    return folder


def several(root: Path, run_ids: Any, *kinds: str) -> list[str]:
    """One to MOST_RUNS different ids, all checked."""
    texts = isinstance(run_ids, list) and all(isinstance(run_id, str) for run_id in run_ids)
    chosen = list(dict.fromkeys(run_ids)) if texts else []
    if not chosen:
        raise problem(f"Choose at least one {' or '.join(kinds)} run.")
    if len(chosen) > MOST_RUNS:
        raise problem(f"{len(chosen)} runs are chosen; at most {MOST_RUNS} stand side by side.")
    return [checked(root, run_id, *kinds).id for run_id in chosen]


@dataclass(frozen=True)
class Shown:
    """A run as cards show it: its readable name, as in the lists, and its method, which decides the colour.

    model: its tokenizer, or its generator with the tokenizer.
    """

    name: str
    method: str
    model: Any = None

    def card(self, figures: Sequence[str], facts: str, numbers: Sequence[tuple[str, str]] = (),
             more: str = "", **look: Any) -> str:
        """See `cards.card`. more: after the name."""
        return cards.card(self.name + more, self.method, figures, numbers, facts, **look)


def shown(root: Path, run_id: str, model: Any = None) -> Shown:
    names = {i: name for name, i in choices(root, *GENERATORS, "tokenizer")}
    run = _known(root)[0].get(run_id)
    method = ((run.raw_config.get("tokenizer") if run else None) or {}).get("method", "")
    return Shown(names.get(run_id, run_id), method, model)


@lru_cache(maxsize=KEEP)
def _load(kind: str, path: str, stamp: float, ema: bool) -> Any:
    return (api.load_tokenizer if kind == "tokenizer" else api.load_generator)(path, ema=ema)


@lru_cache(maxsize=KEEP)
def _bank(path: str, stamp: float) -> Any:
    return explore.bank(_load("tokenizer", path, stamp, True), runs.RunDir(Path(path)).config().data, BANK)


def _stamp(folder: runs.RunDir) -> float:
    """Changes when the weights do, so that a run trained further is loaded again."""
    return max(path.stat().st_mtime for path in folder.checkpoints.glob("*.safetensors"))


def opened(root: Path, run_id: Any, *kinds: str, ema: bool = True) -> Shown:
    """A run of one of these kinds with its model."""
    folder = checked(root, run_id, *kinds)
    return shown(root, folder.id, _load(folder.kind, str(folder.path), _stamp(folder), ema))


def bank(root: Path, run_id: Any) -> Any:
    """Latents of held-out images of a tokenizer's own data."""
    folder = checked(root, run_id, "tokenizer")
    return _bank(str(folder.path), _stamp(folder))


def class_names(root: Path, run_id: Any) -> list[str]:
    """Names of a generator's classes, read without loading it; [] where it cannot be read."""
    try:
        folder = checked(root, run_id, *GENERATORS)
        stored = io.metadata(folder.ema if folder.ema.exists() else folder.model).get("class_names", "[]")
        return [printable(str(name)) for name in json.loads(stored)]
    except (VfmlabError, OSError, ValueError):
        return []


def fits(root: Path, run_id: Any, chosen: Any, names: Sequence[str]) -> bool:
    """Is what stands in a list of classes one of `names`, the number of a class, or a prompt for a run that
    reads text?"""
    run = _known(root)[0].get(run_id) if isinstance(run_id, str) else None
    if not isinstance(chosen, str) or run is None:
        return False
    number = chosen.isdecimal() and len(chosen) < 9 and int(chosen) < len(class_names(root, run_id))
    return chosen in names or number or (run.raw_config.get("protocol") or {}).get("prompts") is not None


def class_index(model: api.LoadedDiffusion, name: Any) -> int:
    """The class of that name, else of that number."""
    names, given = [printable(n) for n in model.class_names], str(name)[:60]
    counted = int(given) if given.isdecimal() and len(given) < 9 else -1
    index = names.index(given) if given in names else counted
    if not 0 <= index < model.num_classes:
        listed = ", ".join(names[:12])
        raise problem(f"'{given}' is not one of this run's {model.num_classes} classes: {listed}")
    return index
