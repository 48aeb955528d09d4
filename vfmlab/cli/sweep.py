"""`vfmlab sweep`: thin over `vfmlab.studies.sweep`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from vfmlab.cli.arguments import arg

NotebookArg = Annotated[Path, tyro.conf.Positional, arg(metavar="NOTEBOOK", help="an .ipynb or py:percent file with a cell tagged 'parameters'")]


def sweep(
    notebook: NotebookArg,
    /,
    grid: Path,
    jobs: int | None = None,
    out: Path | None = None,
    retry: bool = False,
    as_commands: Annotated[bool, arg(name="print", help="print a command for each point that is not done, for a cluster, and run nothing")] = False,
    point: str | None = None,
) -> int:
    """Run a notebook at every point of a grid, or at those that Optuna chooses, and make one table and one page of it.

    Points that are done are skipped; started again, a sweep goes on. Exit code 1: some points failed.

    Args:
        grid: YAML or JSON: notebook parameters, config fields, or a search; see docs/sweeps.md.
        jobs: points at a time; by default one per GPU, or one.
        out: folder of the sweep; by default sweeps/<notebook>-<grid>.
        retry: run points that failed again.
        point: run this one only, as --print wrote it.
    """
    from vfmlab.studies import sweep as sweeps

    again = shlex.join(["vfmlab", "sweep", str(notebook), "--grid", str(grid), *(["--out", str(out)] if out else [])])
    if as_commands:
        lines = sweeps.commands(notebook, grid, out)
        print("\n".join(lines) if lines else "", end="\n" if lines else "")
        print(f"# {len(lines)} points to run; when they are, table and page: {again}", file=sys.stderr)
        return 0
    try:
        found = sweeps.run(notebook, grid, out, jobs, retry, point)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was done is kept. To go on: {again}") from None
    failed = found.count("failed")
    if point is not None:
        (record,) = (record for record in found.records if record["point"] == point)
        print(f"{point}: {record['state']}" + (f": {record['error']}" if record["error"] else ""))
        return int(record["state"] != "finished")
    print(f"{found.count('finished')} of {len(found.records)} points finished" + (f", {failed} failed; to run them again: {again} --retry" if failed else ""))
    print(f"table: {found.table}\npage:  {found.page}")
    return int(failed > 0)
