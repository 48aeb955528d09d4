"""Train several settings with several seeds under one protocol and write down what came out, whichever way it is.

Rows (:mod:`~vfmlab.studies.rows`) are trained and evaluated side by side (:mod:`~vfmlab.studies.lanes`); what is finished
is not done again, and a row that fails is named without losing the others. The result is a table of numbers, costs and
sizes, stage by stage where a recipe has stages, curves over training, and reconstructions of the same images, with the
command that made them: Markdown, JSON, HTML and PNG. Numbers of different protocols never stand in one table.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vfmlab import runs
from vfmlab.errors import ConfigError, TrainingError
from vfmlab.evaluation.instruments.base import choose
from vfmlab.evaluation.protocol import groups
from vfmlab.studies import compare_page, correlation, correlation_page, grids
from vfmlab.studies.lanes import train
from vfmlab.studies.results import METRICS, collect, records, spread, stage_records
from vfmlab.studies.rows import Row, Until, parse

__all__ = ["METRICS", "Row", "collect", "correlate", "groups", "parse", "records", "run", "spread", "stage_records", "train"]
TITLE = "Comparison"


def run(
    specs: Sequence[str],
    seeds: Sequence[int],
    root: str | Path,
    out: str | Path,
    jobs: int = 2,
    overrides: dict[str, Any] | None = None,
    title: str = TITLE,
    until: Until = None,
) -> Path:
    """Train what is missing, evaluate, and write `out`.md, `out`.json, `out`.html and `images/<out>*.png` beside them.

    Args:
        specs: rows, see :mod:`vfmlab.studies.rows`. seeds: each row is trained with each. jobs: rows at a time.
        overrides: dotted changes that hold for all rows. until: "tokenizer" leaves diffusion out.

    Returns:
        the Markdown file.

    Raises:
        TrainingError: every row failed; the first reason.
    """
    root, out = Path(root), _bare(out)
    rows = parse(specs, seeds, overrides, until)
    results = collect(rows, root, train(rows, root, jobs))
    if not any(r["metrics"] for r in results):
        raise TrainingError(f"all {len(rows)} rows failed; the first: {results[0]['failed']}")
    command = _command("compare", specs, seeds, out, overrides, {"--until": [until], "--title": [title] if title != TITLE else []})
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = grids.write(rows, root, out.parent / "images", out.name)
    seen = {label: f"images/{path.name}" for label, path in pictures.items()}
    runs.write_json(out.with_name(f"{out.name}.json"), {"title": title, "command": command, "results": results, "pictures": seen})
    runs.write_atomic(out.with_name(f"{out.name}.html"), compare_page.page(results, command, title, pictures))
    runs.write_atomic(out.with_name(f"{out.name}.md"), compare_page.markdown(results, command, title, seen))
    return out.with_name(f"{out.name}.md")


def correlate(
    specs: Sequence[str],
    seeds: Sequence[int],
    root: str | Path,
    out: str | Path,
    jobs: int = 2,
    overrides: dict[str, Any] | None = None,
    target: str = "gfd",
    names: Sequence[str] = correlation.NAMES,
    compared_with: str | None = None,
    say: Callable[[str], object] = print,
) -> Path:
    """Train what is missing, measure every tokenizer with the instruments, and write which numbers go along with `target`.

    Args:
        specs, seeds, jobs, overrides: as in :func:`run`. target: "gfd", "gfd_own" or "class_accuracy". names: instruments.
        compared_with: reference model of all rows; None: each row's default, see `vfmlab.evaluation.reference`.

    Returns:
        the Markdown file; `out`.json and `out`.html stand beside it.

    Raises:
        ConfigError: unknown target or instrument, or too few rows with the target.
    """
    if target not in correlation.TARGETS:
        raise ConfigError(f"target = '{target}': choose from {', '.join(correlation.TARGETS)}")
    choose(names, "tokenizer", "the rows")
    root, out = Path(root), _bare(out)
    rows = parse(specs, seeds, overrides)
    results = correlation.measure_rows(collect(rows, root, train(rows, root, jobs)), rows, root, names, compared_with, say)
    found = correlation.correlate(results, target)
    more = {"--target": [target] if target != "gfd" else [], "--instruments": list(names) if tuple(names) != correlation.NAMES else []}
    command = _command("correlate", specs, seeds, out, overrides, more | {"--compared-with": [compared_with]})
    return correlation_page.write(results, found, target, command, f"What goes along with {correlation.name(target)}", out)


def _bare(out: str | Path) -> Path:
    """The name of the files to write, without an ending."""
    out = Path(out)
    return out.with_suffix("") if out.suffix in (".md", ".json", ".html") else out


def _command(
    verb: str, specs: Sequence[str], seeds: Sequence[int], out: Path, overrides: dict[str, Any] | None, more: dict[str, Sequence[str | None]]
) -> str:
    """What to type to have the same again, without folders of this machine."""
    sets = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in (overrides or {}).items()]
    parts = ["vfmlab", verb, *specs, "--seeds", *map(str, seeds)]
    for flag, values in {**more, "--out": [] if out.is_absolute() else [str(out)], "--set": sets}.items():
        parts += [flag, *values] if values and values[0] else []
    return shlex.join(parts)
