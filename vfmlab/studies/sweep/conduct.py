"""A sweep from its grid to its page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vfmlab import runs
from vfmlab.errors import ConfigError, nearest
from vfmlab.studies.sweep import book as books
from vfmlab.studies.sweep import grid as grids
from vfmlab.studies.sweep import pool, table
from vfmlab.studies.sweep.book import Book
from vfmlab.studies.sweep.folder import Folder
from vfmlab.studies.sweep.grid import Grid, Point

Source = str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """What there is of a sweep. records: one per point, see :func:`vfmlab.studies.sweep.table.records`."""

    out: Path
    records: list[dict[str, Any]]

    @property
    def table(self) -> Path:
        return self.out / "table.parquet"

    @property
    def page(self) -> Path:
        return self.out / "index.html"

    def count(self, state: str) -> int:
        """Points that are "finished", "failed" or "open"."""
        return sum(record["state"] == state for record in self.records)


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before a point is run."""

    book: Book
    grid: Grid
    out: Path
    root: Path
    points: list[Point]  # none yet for a search

    def folder(self, point: Point) -> Folder:
        return Folder(self.out / "points" / point.key)

    @property
    def names(self) -> list[str]:
        """Of what differs between points."""
        found = dict.fromkeys(name for _, name in self.grid.axes())
        for setting in self.grid.points:
            found |= dict.fromkeys([*setting.parameters, *setting.set])
        return list(found)


def _plan(notebook: str | Path, grid: Source, out: str | Path | None) -> _Plan:
    """Read and check all there is to check, so that nothing is found out hours later.

    Raises:
        ConfigError: see :func:`grid.read`, :func:`book.read`; a point whose config cannot be.
    """
    where = "grid" if isinstance(grid, Mapping) else str(grid)
    book, read = books.read(notebook), grids.read(grid)
    name = Path(notebook).stem if isinstance(grid, Mapping) else f"{Path(notebook).stem}-{Path(grid).stem}"
    out = Path(out or Path("sweeps") / name).resolve()
    root = Path(read.parameters["root"]).resolve() if "root" in read.parameters else out / "runs"
    points = [] if read.search else grids.expand(read, book.code, where)
    for i, point in enumerate(points):
        try:
            book.check(point)
        except ConfigError as error:
            raise ConfigError(f"{where}: point {i + 1} ({point.label()}): {error}") from None
    if read.search:
        _check_search(book, read, where)
    return _Plan(book, read, out, root, points)


def _check_search(book: Book, grid: Grid, where: str) -> None:
    """Names, and both ends of each range, one at a time; combinations show when they are drawn."""
    (setting,) = grids.settings(grid)
    axes = grid.axes()
    if moved := [name for part, name in axes if part == "set" and name.split(".")[0] == "protocol"]:
        raise ConfigError(f"{where}: set.{moved[0]}: numbers of different protocols cannot be ranked, so a search cannot vary them; use a grid")
    tried = {place: [values.low, values.high] if isinstance(values, grids.Range) else values for place, values in axes.items()}
    first = {place: values[0] for place, values in tried.items()}
    for place, values in tried.items():
        for value in values:
            point = grids.place(setting, {**first, place: value}, book.code)
            try:
                book.check(point)
            except ConfigError as error:
                raise ConfigError(f"{where}: {'.'.join(place)} = {grids.show(value)}: {error}") from None


def run(
    notebook: str | Path,
    grid: Source,
    out: str | Path | None = None,
    jobs: int | None = None,
    retry: bool = False,
    only: str | None = None,
    stream: TextIO | None = None,
) -> Sweep:
    """Run every point that is not done, then write `table.parquet`, `table.csv` and `index.html` into `out`.

    Args:
        notebook: .ipynb or .py (percent format) with a cell tagged "parameters". grid: a file, or the same as a dict.
        out: folder of the sweep; None: sweeps/<notebook>-<grid>. The runs of all points are in <out>/runs, so that points
        that share a phase train it once; `parameters: {root: ...}` in the grid puts them elsewhere.
        jobs: points at a time; None: one per GPU, or one. retry: run failed points again. only: the key of one point;
        table and page are left alone then. stream: where progress goes; None: stderr.

    Returns:
        what there is now. Ctrl-C stops the points, which save, and is raised when table and page are written.

    Raises:
        ConfigError: the grid, the notebook or a point cannot be; nothing was run.
    """
    stream = stream or sys.stderr
    plan = _plan(notebook, grid, out)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs = {jobs}: at least one point has to be run at a time")
    devices = pool.gpus()
    (plan.out / "notebooks").mkdir(parents=True, exist_ok=True)
    runs.write_atomic(plan.out / "notebooks" / f"{plan.book.code}.ipynb", plan.book.text)
    runs.write_json(plan.out / "sweep.json", {"notebook": plan.book.path.name, "code": plan.book.code, "grid": plan.grid.model_dump(mode="json", exclude_none=True)})
    study = _study(plan) if plan.grid.search else None
    if retry:
        for point in study.points if study else plan.points:
            folder = plan.folder(point)
            if (found := folder.outcome()) is not None and found["state"] == "failed" and only in (None, point.key):
                folder.result.unlink()
    source = study or pool.Queue([p for p in _only(plan, only) if plan.folder(p).outcome() is None])
    total = plan.grid.search.trials if study else len(_only(plan, only))
    workers = pool.Pool(plan.book, plan.out, plan.root, jobs or len(devices) or 1, devices, stream, plan.names)
    workers.seconds = [found["seconds"] for p in (study.points if study else plan.points) if (found := plan.folder(p).outcome()) and found["state"] == "finished"]
    if before := total - source.left:
        print(f"{before} of {total} points were done before", file=stream, flush=True)
    try:
        workers.work(source, total)
    finally:
        from vfmlab.studies.sweep import page

        points = list({p.key: p for p in study.points}.values()) if study else plan.points
        found = Sweep(plan.out, table.records(points, {p.key: plan.folder(p) for p in points}))
        if only is None:
            table.write(found.records, plan.out)
            page.write(plan.grid, plan.book.path.name, points, {p.key: plan.folder(p) for p in points}, plan.names, found.page)
    return found


def commands(notebook: str | Path, grid: Source, out: str | Path | None = None) -> list[str]:
    """A command for each point that is not done, to be run anywhere that sees the same files; then the sweep itself makes the table.

    Raises:
        ConfigError: as :func:`run`; a search, whose points are not known beforehand; a grid that is no file.
    """
    if isinstance(grid, Mapping):
        raise ConfigError("commands of a sweep name its grid: write it to a file")
    plan = _plan(notebook, grid, out)
    if plan.grid.search:
        raise ConfigError(f"{grid}: the points of a search depend on its results, so there is no list of commands; run it with --jobs")
    base = ["vfmlab", "sweep", str(notebook), "--grid", str(grid), *(["--out", str(out)] if out else [])]
    return [shlex.join([*base, "--point", p.key]) for p in plan.points if plan.folder(p).outcome() is None]


def _only(plan: _Plan, key: str | None) -> Sequence[Point]:
    if key is None:
        return plan.points
    if plan.grid.search:
        raise ConfigError("a search decides on its points itself; leave --point out")
    found = [p for p in plan.points if p.key == key]
    if not found:
        raise ConfigError(f"no point '{key}' in this grid{nearest(key, [p.key for p in plan.points])}; notebook or grid changed since: --print lists them")
    return found


def _study(plan: _Plan) -> Any:
    from vfmlab.studies.sweep import page
    from vfmlab.studies.sweep.search import Study

    search = plan.grid.search
    end = page.better(search.objective, plan.grid)
    if search.direction is None and end is None:
        raise ConfigError(f"search: it is not known which end of '{search.objective}' is good; write 'direction: minimize' or 'maximize'")
    direction = search.direction or ("maximize" if end == "higher" else "minimize")

    def refuse(point: Point, why: str) -> None:
        folder = plan.folder(point)
        folder.begin(point={"parameters": point.parameters, "set": point.set})
        folder.end("failed", 0.0, why)

    return Study(plan.grid, plan.book.code, plan.out, direction, lambda p: plan.folder(p).outcome(), plan.book.check, refuse)
