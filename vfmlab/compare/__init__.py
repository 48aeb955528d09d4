"""Train several settings with several seeds under one protocol and write down what came out, whichever way it is.

Rows (:mod:`~vfmlab.compare.rows`) are trained and evaluated side by side (:mod:`~vfmlab.compare.lanes`); what is finished
is not done again, and a row that fails is named without losing the others. The result is a table of numbers, costs and
sizes, stage by stage where a recipe has stages, curves over training, and reconstructions of the same images, with the
command that made them: Markdown, JSON, HTML and PNG. Numbers of different protocols never stand in one table.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vfmlab import runs
from vfmlab.compare import grids, pages
from vfmlab.compare.lanes import train
from vfmlab.compare.results import METRICS, collect, groups, records, spread, stage_records
from vfmlab.compare.rows import Row, Until, parse
from vfmlab.errors import TrainingError

__all__ = ["METRICS", "Row", "collect", "groups", "parse", "records", "run", "spread", "stage_records", "train"]
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
        specs: rows, see :mod:`vfmlab.compare.rows`. seeds: each row is trained with each. jobs: rows at a time.
        overrides: dotted changes that hold for all rows. until: "tokenizer" leaves diffusion out.

    Returns:
        the Markdown file.

    Raises:
        TrainingError: every row failed; the first reason.
    """
    root, out = Path(root), Path(out)
    out = out.with_suffix("") if out.suffix in (".md", ".json", ".html") else out
    rows = parse(specs, seeds, overrides, until)
    results = collect(rows, root, train(rows, root, jobs))
    if not any(r["metrics"] for r in results):
        raise TrainingError(f"all {len(rows)} rows failed; the first: {results[0]['failed']}")
    sets = [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in (overrides or {}).items()]
    parts = ["vfmlab", "compare", *specs, "--seeds", *map(str, seeds)]
    for flag, values in (("--until", [until]), ("--out", [] if out.is_absolute() else [str(out)]), ("--title", [title] if title != TITLE else []), ("--set", sets)):
        parts += [flag, *values] if values and values[0] else []
    command = shlex.join(parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = grids.write(rows, root, out.parent / "images", out.name)
    seen = {label: f"images/{path.name}" for label, path in pictures.items()}
    runs.write_json(out.with_name(f"{out.name}.json"), {"title": title, "command": command, "results": results, "pictures": seen})
    runs.write_atomic(out.with_name(f"{out.name}.html"), pages.page(results, command, title, pictures))
    runs.write_atomic(out.with_name(f"{out.name}.md"), pages.markdown(results, command, title, seen))
    return out.with_name(f"{out.name}.md")
