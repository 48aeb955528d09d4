"""Which runs there are, and the few models kept in memory. Only run ids come in from the browser, never paths."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import gradio as gr

from vfmlab import api, runs
from vfmlab.errors import VfmlabError

KEEP = 4  # models held in memory at a time


def finished(root: Path, kind: str) -> list[str]:
    """Ids of runs of `kind` that have weights, newest first."""
    return [run.id for run in reversed(runs.scan(root)) if run.kind == kind and (run.ema.exists() or run.model.exists())]


def checked(root: Path, run_id: str | None, kind: str) -> str:
    """`run_id` if it is one of the listed runs; a message to the person otherwise."""
    known = finished(root, kind)
    if run_id not in known:
        raise gr.Error(f"There is no finished {kind} run called '{run_id}' here any more. Press 'refresh' and choose another.")
    return run_id


@lru_cache(maxsize=KEEP)
def _tokenizer(path: str, stamp: float):
    return api.load_tokenizer(path)


@lru_cache(maxsize=KEEP)
def _diffusion(path: str, stamp: float, ema: bool):
    return api.load_diffusion(path, ema=ema)


def _stamp(folder: Path) -> float:
    """Changes when the weights do, so that a run trained further is loaded again."""
    return max(p.stat().st_mtime for p in (folder / "checkpoints").glob("*.safetensors"))


def tokenizer(root: Path, run_id: str | None):
    folder = root / checked(root, run_id, "tokenizer")
    try:
        return _tokenizer(str(folder), _stamp(folder))
    except VfmlabError as error:
        raise gr.Error(str(error)) from None


def diffusion(root: Path, run_id: str | None, ema: bool = True):
    folder = root / checked(root, run_id, "diffusion")
    try:
        return _diffusion(str(folder), _stamp(folder), ema)
    except VfmlabError as error:
        raise gr.Error(str(error)) from None
