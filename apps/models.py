"""Which runs there are, and the few models kept in memory. Only run ids come in from the browser, never paths."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from apps.common import problem
from vfmlab import api, runs
from vfmlab.errors import VfmlabError
from vfmlab.studies import explore
from vfmlab.weights import io

KEEP = 6  # models in memory at a time; the one unused for longest goes first
BANK = 400  # held-out images among which neighbours are looked for
MOST_RUNS = 6  # side by side


def finished(root: Path, kind: str) -> list[str]:
    """Ids of runs of `kind` that have weights, newest first."""
    return [run.id for run in reversed(runs.scan(root)) if run.kind == kind and (run.ema.exists() or run.model.exists())]


def checked(root: Path, run_id: Any, kind: str) -> runs.RunDir:
    """The run of that id; a message to the person where there is none. What is no name of a folder of `root` is no id."""
    known = {path.name for path in root.iterdir()} if isinstance(run_id, str) and root.is_dir() else set()
    if run_id in known:
        folder = runs.RunDir(root / run_id)
        try:
            if folder.kind == kind and (folder.ema.exists() or folder.model.exists()):
                return folder
        except VfmlabError:
            pass  # a folder without a config
    shown = str(run_id)[:80]
    raise problem(f"There is no finished {kind} run '{shown}' here (any more). Reload the page for a fresh list and choose another one.")


def several(root: Path, run_ids: Any, kind: str) -> list[str]:
    """One to MOST_RUNS different ids, all checked."""
    chosen = list(dict.fromkeys(run_ids)) if isinstance(run_ids, list) and all(isinstance(r, str) for r in run_ids) else []
    if not chosen:
        raise problem(f"Choose at least one {kind} run.")
    if len(chosen) > MOST_RUNS:
        raise problem(f"{len(chosen)} runs are chosen; at most {MOST_RUNS} stand side by side.")
    return [checked(root, run_id, kind).id for run_id in chosen]


@lru_cache(maxsize=KEEP)
def _load(kind: str, path: str, stamp: float, ema: bool) -> Any:
    return (api.load_tokenizer if kind == "tokenizer" else api.load_diffusion)(path, ema=ema)


@lru_cache(maxsize=KEEP)
def _bank(path: str, stamp: float) -> Any:
    return explore.bank(_load("tokenizer", path, stamp, True), runs.RunDir(Path(path)).config().data, BANK)


def _stamp(folder: runs.RunDir) -> float:
    """Changes when the weights do, so that a run trained further is loaded again."""
    return max(path.stat().st_mtime for path in folder.checkpoints.glob("*.safetensors"))


def tokenizer(root: Path, run_id: Any) -> Any:
    """The tokenizer of a run (EMA weights)."""
    folder = checked(root, run_id, "tokenizer")
    return _load("tokenizer", str(folder.path), _stamp(folder), True)


def diffusion(root: Path, run_id: Any, ema: bool = True) -> Any:
    """The diffusion model of a run with its tokenizer."""
    folder = checked(root, run_id, "diffusion")
    return _load("diffusion", str(folder.path), _stamp(folder), ema)


def bank(root: Path, run_id: Any) -> Any:
    """Latents of held-out images of a tokenizer's own data."""
    folder = checked(root, run_id, "tokenizer")
    return _bank(str(folder.path), _stamp(folder))


def class_names(root: Path, run_id: Any) -> list[str]:
    """Classes of a diffusion run, read without loading it."""
    folder = checked(root, run_id, "diffusion")
    return json.loads(io.metadata(folder.ema if folder.ema.exists() else folder.model).get("class_names", "[]"))


def method(root: Path, run_id: str, kind: str) -> str:
    """The tokenizer's method, which decides the colour."""
    return checked(root, run_id, kind).raw_config["tokenizer"]["method"]
