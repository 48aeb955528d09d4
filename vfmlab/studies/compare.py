"""Train several settings with several seeds under one protocol and write down what came out.

Rows (:mod:`~vfmlab.studies.rows`) are trained and evaluated by the :mod:`~vfmlab.studies.executor`; what is
finished is not done again, and a row that fails is named without losing the others. The result is a table of
numbers, costs and sizes, stage by stage where a recipe has stages, curves over training, and reconstructions
of the same images, with the command that made them: Markdown, JSON, HTML and PNG. Numbers of different
protocols never stand in one table.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from vfmlab import runs
from vfmlab.errors import ConfigError, Interrupted, TrainingError
from vfmlab.evaluation.instruments.base import choose
from vfmlab.evaluation.number import quantity
from vfmlab.studies import compare_page, correlation, correlation_page, executor, grids, measure
from vfmlab.studies.command import command
from vfmlab.studies.results import Result, collect, together
from vfmlab.studies.rows import Row, Until, parse
from vfmlab.training.check import unbiased

TITLE = "Comparison"
Instruments = Mapping[str, Sequence[str]]
NONE: Instruments = MappingProxyType({})


def train(rows: Sequence[Row], root: str | Path, jobs: int | None = None, stream: TextIO | None = None,
          cluster: str | None = None, retry: bool = True, instruments: Instruments = NONE,
          compared_with: str | None = None) -> dict[str, str]:
    """Train and measure all phases of all rows; what is finished is not done again.

    Args:
        jobs, stream, cluster: see :func:`vfmlab.studies.executor.run`. retry: failed phases are trained
        again. instruments: by label, what else is measured on a row's tokenizer and stored beside it, see
        :func:`vfmlab.studies.correlation.measure_rows`.

    Returns:
        id of a failed row's last phase -> why. Ctrl-C saves all and is raised.

    Raises:
        ConfigError: a row whose judge sees with its own VFM's eyes; before anything is trained.
    """
    root = runs.root_folder(root).resolve()
    for row in rows:
        try:
            for phase in row.phases:
                unbiased(phase)
        except ConfigError as error:
            raise ConfigError(f"row '{row.label}': {error}") from None
    names = [f"{row.label}, seed {row.seed}," for row in rows]
    parts = [executor.phase_nodes(row.phases, root, name, retry, evaluate=True)
             for row, name in zip(rows, names, strict=True)]
    more = [_instruments(row.tokenizers[-1].id, root, name, instruments[row.label], compared_with)
            for row, name in zip(rows, names, strict=True) if row.label in instruments]
    outcomes = executor.run([*(node for nodes in parts for node in nodes), *more], jobs, cluster, stream)
    errors = [[error for node in nodes if (error := outcomes[node.key].error)] for nodes in parts]
    return {row.phases[-1].id: mine[0] for row, mine in zip(rows, errors, strict=True) if mine}


def _instruments(run: str, root: Path, label: str, names: Sequence[str],
                 compared_with: str | None) -> executor.Node:
    """Measures a tokenizer once it has its report. An instrument that fails fails no row: it is named when
    the numbers are read."""
    given = {"ref": run, "names": list(names), "root": str(root), "compared_with": compared_with}
    key = str(root / run)
    return executor.Node(f"{key}/instruments", "instruments", f"{label} instruments", measure.measure, given,
                         (executor.report_key(key),))


def measured(rows: Sequence[Row], root: str | Path, jobs: int = 1) -> list[Result]:
    """Train and measure all rows, for notebooks: a line now and then, and one for every row that failed.

    Raises:
        Interrupted: by Ctrl-C, or the notebook's button; all is saved, and the same cell goes on from there.
    """
    cell = sys.stdout  # what a cell shows
    try:
        results = collect(rows, root, train(rows, root, jobs, cell))
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what was trained is saved: run this cell again to go on") from None
    for result in (result for result in results if result.failed):
        print(f"failed: {result.label}, seed {result.seed}: {result.failed}", file=cell)
    return results


def trained(rows: Sequence[Row], root: str | Path, jobs: int | None = None, cluster: str | None = None,
            retry: bool = True, instruments: Instruments = NONE) -> list[Result]:
    """Results of all rows, trained and measured as :func:`train` does it.

    Raises:
        TrainingError: every row failed.
    """
    results = collect(rows, root, train(rows, root, jobs, None, cluster, retry, instruments))
    if rows and not any(r.numbers for r in results):
        raise TrainingError(f"all {len(rows)} rows failed; the first: {results[0].failed}")
    return results


def run(specs: Sequence[str], seeds: Sequence[int], root: str | Path, out: str | Path,
        jobs: int | None = None, overrides: dict[str, Any] | None = None, title: str = TITLE,
        until: Until = None, cluster: str | None = None, retry: bool = True) -> Path:
    """Train what is missing, evaluate, write `out`.md (returned), .json, .html and images/<out>*.png.

    Args:
        specs: rows, see :mod:`vfmlab.studies.rows`. seeds: each row is trained with each. jobs, cluster,
        retry: see :func:`train`. overrides: dotted changes to all rows. until: see `rows`.

    Raises:
        TrainingError: every row failed. ConfigError: a row that cannot be, `out` cannot be written.
    """
    root, out = Path(root).expanduser(), writable(out)
    rows = parse(specs, seeds, overrides, until)
    results = trained(rows, root, jobs, cluster, retry)
    flags = {"--seeds": seeds, "--until": [until] if until else [],
             "--title": [title] if title != TITLE else [], "--out": _named(out), "--set": _sets(overrides)}
    pictures = grids.write(rows, root, out.parent / "images", out.name)
    seen = {label: f"images/{path.name}" for label, path in pictures.items()}
    record = {"results": [r.as_json() for r in results], "pictures": seen}
    made_by = command("compare", specs, flags)
    return compare_page.build(results, made_by, title, pictures).publish(out, record)


def from_files(files: Sequence[str | Path], out: str | Path, title: str, made_by: str) -> Path:
    """The page of results that studies wrote before; nothing is trained or measured, and its .json names no
    result again. Of one row and seed in two files see :func:`vfmlab.studies.results.together`.

    Raises:
        DataError: a file that holds no results.
    """
    return compare_page.build(together(files), made_by, title).publish(writable(out), {"results": []})


def correlate(specs: Sequence[str], seeds: Sequence[int], root: str | Path, out: str | Path,
              jobs: int | None = None, overrides: dict[str, Any] | None = None, target: str = "gfd",
              names: Sequence[str] = correlation.NAMES, compared_with: str | None = None,
              say: Callable[[str], object] = print, cluster: str | None = None, retry: bool = True,
              goal: Sequence[str | Path] = ()) -> Path:
    """Train what is missing, measure tokenizers, write what goes along with `target`; `out`.md.

    Args:
        specs, seeds, jobs, overrides, cluster, retry: as in :func:`run`. target: "gfd", "gfd_own" or
        "class_accuracy". names: instruments. compared_with: reference model of all rows; None: each row's
        default, see `vfmlab.evaluation.reference`. goal: files with the target of rows of these labels, see
        :func:`vfmlab.studies.correlation.aimed`; no generator is trained then.

    Raises:
        ConfigError: unknown target or instrument, or too few rows with the target.
    """
    correlation.check_target(target)
    choose(names, "tokenizer", "the rows")
    root, out = Path(root).expanduser(), writable(out)
    goals = together(goal) if goal else []
    rows = parse(specs, seeds, overrides, "tokenizer" if goal else None)
    if goal:
        correlation.check_goal([row.label for row in rows], goals, target)
    failed = train(rows, root, jobs, None, cluster, retry, {row.label: names for row in rows}, compared_with)
    results = correlation.measure_rows(collect(rows, root, failed), rows, root, names, compared_with, say)
    results = correlation.aimed(results, goals, target) if goal else results
    flags = {"--seeds": seeds, "--target": [target] if target != "gfd" else [], "--goal": goal,
             "--instruments": names if tuple(names) != correlation.NAMES else [],
             "--compared-with": [compared_with] if compared_with else [],
             "--out": _named(out), "--set": _sets(overrides)}
    return _correlated(results, target, out, command("correlate", specs, flags), results)


def correlate_files(files: Sequence[str | Path], out: str | Path, target: str, made_by: str,
                    goal: Sequence[str | Path] = ()) -> Path:
    """:func:`correlate` of results that studies wrote before; nothing is trained or measured, and its .json
    names no result again.

    Args:
        goal: files that the target is taken from, see :func:`vfmlab.studies.correlation.aimed`.

    Raises:
        ConfigError: unknown target, or too few rows with it. DataError: a file that holds no results.
    """
    results = together(files)
    if goal:
        results = correlation.aimed(results, together(goal), target)
    return _correlated(results, target, writable(out), made_by)


def _correlated(results: Sequence[Result], target: str, out: Path, made_by: str,
                fresh: Sequence[Result] = ()) -> Path:
    strengths = correlation.correlate(results, target)
    title = f"What goes along with {quantity(target).label}"
    record = {"target": target, "correlations": [c._asdict() for c in strengths],
              "leads": [one._asdict() for one in correlation.leads(results, target)],
              "results": [r.as_json() for r in fresh]}
    return correlation_page.build(results, strengths, target, made_by, title).publish(out, record)


def writable(out: str | Path) -> Path:
    """The name of the files to write, without an ending. A folder that cannot be written is refused now."""
    out = Path(out).expanduser()
    runs.output_folder(out.parent, bool, overwrite=True)
    return out.with_suffix("") if out.suffix in (".md", ".json", ".html") else out


def _sets(overrides: Mapping[str, Any] | None) -> list[str]:
    """Overrides as --set takes them."""
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in (overrides or {}).items()]


def _named(out: Path) -> list[str]:
    """`out` as --out takes it; a folder of this machine is left out."""
    return [] if out.is_absolute() else [str(out)]
