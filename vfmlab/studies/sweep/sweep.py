"""A sweep from its grid to its page."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import filelock
from tqdm import tqdm

from vfmlab import runs
from vfmlab.errors import ConfigError, nearest
from vfmlab.studies import executor
from vfmlab.studies.sweep import grid as grids
from vfmlab.studies.sweep import notebook as notebooks
from vfmlab.studies.sweep import table
from vfmlab.studies.sweep.folder import Folder
from vfmlab.studies.sweep.grid import Grid, Point
from vfmlab.studies.sweep.notebook import Notebook
from vfmlab.training.progress import clock

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


def run(notebook: str | Path, grid: Source, out: str | Path | None = None, jobs: int | None = None,
        retry: bool = False, cluster: str | None = None, stream: TextIO | None = None) -> Sweep:
    """Run every point that is not done, then write `table.parquet`, `table.csv` and `index.html` into `out`.

    Args:
        notebook: .ipynb or .py (percent format) with a cell tagged "parameters". grid: a file, or the same as
        a dict. out: folder of the sweep; None: sweeps/<notebook>-<grid>. The runs of all points are in
        <out>/runs, so that points share phases; `parameters: {root: ...}` in the grid puts them elsewhere.
        retry: run failed points again. jobs, cluster, stream: see :func:`vfmlab.studies.executor.run`.

    Returns:
        what there is now. Ctrl-C saves what is being trained, and is raised when table and page are written.

    Raises:
        ConfigError: the grid, the notebook, a point or the cluster cannot be, or another process searches in
        `out`; nothing was run.
    """
    plan = _plan(notebook, grid, out, retry, stream or sys.stderr)
    with _searching(plan.out) if plan.grid.search else contextlib.nullcontext():
        return _run(plan, jobs, cluster)


@contextlib.contextmanager
def _searching(out: Path) -> Iterator[None]:
    """Alone in `out`: what is drawn next depends on all that was drawn. A grid needs no such thing."""
    lock = filelock.FileLock(runs.output_folder(out, bool, overwrite=True) / ".search.lock")
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ConfigError(f"search: another process searches in '{out}'; wait for it, or give another folder "
                          "(--out). One search may have many workers: --jobs, --cluster") from None
    with held:
        yield


def _run(plan: _Plan, jobs: int | None, cluster: str | None) -> Sweep:
    study, retry = _study(plan) if plan.grid.search else None, plan.retry
    plan.write()
    points = study.points if study else plan.points
    for point in points if retry else ():
        if (plan.folder(point).outcome() or {}).get("state") == "failed":
            plan.folder(point).result.unlink()
    todo = [] if study else [point for point in points if plan.folder(point).outcome() is None]
    total, left = (plan.grid.search.trials, study.left) if study else (len(points), len(todo))
    if left < total:
        print(f"{total - left} of {total} points were done before", file=plan.stream, flush=True)

    def more(free: int) -> Iterator[executor.Node]:
        while study and free > 0 and (point := study.take()) is not None:
            yield from plan.nodes(point)
            free -= 1

    def done(node: executor.Node, outcome: executor.Outcome) -> None:
        if (point := plan.by_node.get(node.key)) is not None:
            plan.record(point, outcome)
            if study:
                study.ended(point, plan.folder(point).outcome())

    try:
        if left:
            nodes = [node for point in todo for node in plan.nodes(point)]
            executor.run(nodes, jobs, cluster, plan.stream, more, done)
    finally:
        from vfmlab.studies.sweep import page

        points = list({p.key: p for p in study.points}.values()) if study else points
        folders = {p.key: plan.folder(p) for p in points}
        result = Sweep(plan.out, table.records(points, folders))
        for name in plan.grid.metrics if result.count("finished") else ():
            if name not in result.records[0]:
                hint = nearest(name, result.records[0])
                print(f"warning: metrics: no point hands out '{name}'{hint}", file=plan.stream)
        table.write(result.records, plan.out)
        page.write(plan.grid, plan.notebook.path.name, points, folders, plan.names, result.page)
    return result


@dataclass(frozen=True)
class _Plan:
    """A sweep before and while it runs. points: of a grid, all of them; of a search, none."""

    notebook: Notebook
    grid: Grid
    out: Path
    root: Path
    points: list[Point]
    retry: bool
    stream: TextIO
    by_node: dict[str, Point] = field(default_factory=dict)  # key of a node -> its point
    first: dict[str, str] = field(default_factory=dict)  # run -> node of the first point with it

    def folder(self, point: Point) -> Folder:
        return Folder(self.out / "points" / point.key)

    def label(self, point: Point) -> str:
        return point.label(self.names) or point.key

    @property
    def copy(self) -> Path:
        """The notebook as it is executed."""
        return self.out / "notebooks" / f"{self.notebook.code}.ipynb"

    @property
    def names(self) -> list[str]:
        """Of what differs between points."""
        together = (name for setting in self.grid.points for name in (*setting.parameters, *setting.set))
        return list(dict.fromkeys([*(name for _, name in self.grid.axes()), *together]))

    def write(self) -> None:
        facts = {"notebook": self.notebook.path.name, "code": self.notebook.code,
                 "grid": self.grid.model_dump(mode="json", exclude_none=True)}
        runs.output_folder(self.copy.parent, bool, overwrite=True)
        runs.write_atomic(self.copy, self.notebook.text)
        runs.write_json(self.out / "sweep.json", facts)

    def nodes(self, point: Point) -> list[executor.Node]:
        """The phases of a point, where the notebook says which it trains, then the notebook."""
        folder, phases = self.folder(point), self.notebook.check(point)
        trained, key = self.notebook.trained(phases), str(folder.path)
        folder.begin(notebook=str(self.copy), kernel=self.notebook.kernel,
                     parameters=self.notebook.values(point, self.root),
                     point={"parameters": point.parameters, "set": point.set},
                     phases=[phase.recipe.model_dump(mode="json") for phase in phases])
        self.by_node[key] = point
        nodes = executor.phase_nodes(trained, self.root, self.label(point), self.retry)
        last = tuple(node.key for node in nodes[-1:])
        first = [self.first.setdefault(phase.id, key) for phase in phases] if not trained else []
        others = tuple(dict.fromkeys(other for other in first if other != key))
        return [*nodes, executor.Node(key, "notebook", self.label(point), notebooks.execute_point,
                                      {"folder": key, "root": str(self.root)}, last, others)]

    def record(self, point: Point, outcome: executor.Outcome) -> None:
        """Say that a point has ended, and put down why where it did not come to that itself."""
        folder = self.folder(point)
        if outcome.error is None:
            tqdm.write(f"{self.label(point)}: done in {clock(outcome.seconds)}", file=self.stream)
        elif folder.outcome() is None and not outcome.stopped:
            folder.end("failed", outcome.seconds, outcome.error)


def _plan(notebook: str | Path, grid: Source, out: str | Path | None, retry: bool, stream: TextIO) -> _Plan:
    """Read and check all there is to check, so that no mistake shows hours later.

    Raises:
        ConfigError: see :func:`grid.read`, :func:`notebook.read`; a point whose config cannot be.
    """
    where = "grid" if isinstance(grid, Mapping) else str(grid)
    source, read = notebooks.read(Path(notebook).expanduser()), grids.read(grid)
    name = Path(notebook).stem if isinstance(grid, Mapping) else f"{Path(notebook).stem}-{Path(grid).stem}"
    out = Path(out or Path("sweeps") / name).expanduser().resolve()
    root = Path(read.parameters.get("root") or out / "runs").expanduser().resolve()
    points = [] if read.search else grids.expand(read, source.code, where)
    for i, point in enumerate(points):
        _check(source, point, f"{where}: point {i + 1} ({point.label()})")
    if read.search:
        _check_search(source, read, where)
    return _Plan(source, read, out, root, points, retry, stream)


def _check(source: Notebook, point: Point, where: str) -> None:
    try:
        source.check(point)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _check_search(source: Notebook, grid: Grid, where: str) -> None:
    """Names, and both ends of each range, one at a time; combinations show when they are drawn."""
    (setting,) = grids.settings(grid)
    tried = {place: [v.low, v.high] if isinstance(v, grids.Range) else v for place, v in grid.axes().items()}
    if moved := [name for part, name in tried if part == "set" and name.split(".")[0] == "protocol"]:
        raise ConfigError(f"{where}: set.{moved[0]}: numbers of different protocols cannot be ranked, so a "
                          "search cannot vary them; use a grid")
    first = {place: values[0] for place, values in tried.items()}
    for place, values in tried.items():
        for value in values:
            point = grids.place(setting, {**first, place: value}, source.code)
            _check(source, point, f"{where}: {'.'.join(place)} = {grids.show(value)}")


def _study(plan: _Plan) -> Any:
    from vfmlab.studies.sweep import page
    from vfmlab.studies.sweep.search import Study

    search = plan.grid.search
    end = page.better(search.objective, plan.grid)
    if search.direction is None and end is None:
        raise ConfigError(f"search: it is not known which end of '{search.objective}' is good; write "
                          "'direction: minimize' or 'maximize'")
    direction = search.direction or ("maximize" if end == "higher" else "minimize")

    def refuse(point: Point, why: str) -> None:
        plan.folder(point).begin(point={"parameters": point.parameters, "set": point.set})
        plan.folder(point).end("failed", 0.0, why)

    return Study(plan.grid, plan.notebook.code, plan.out, direction,
                 lambda point: plan.folder(point).outcome(), plan.notebook.check, refuse)
