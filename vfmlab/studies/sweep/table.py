"""The points of a sweep as one table, in Parquet and CSV. Numbers stand beside the hash of their protocol."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfmlab import runs
from vfmlab.evaluation.number import Number
from vfmlab.studies.sweep.folder import Folder
from vfmlab.studies.sweep.grid import Point
from vfmlab.studies.sweep.outputs import numbers

PROTOCOL = ".protocol"  # a column for each number that has one


def records(points: Sequence[Point], folders: Mapping[str, Folder]) -> list[dict[str, Any]]:
    """One record per point: key, state ("finished", "failed", "open"), given, numbers, protocols, ...

    A value given that shares its name with a number is called `given.NAME`.
    """
    blank = {"state": "open", "numbers": {}, "runs": [], "seconds": None, "error": None}
    outcomes = {p.key: folders[p.key].outcome() or blank for p in points}
    measured = {p.key: collections.defaultdict(lambda: Number(None), numbers(outcomes[p.key]))
                for p in points}
    names = list(dict.fromkeys(name for p in points for name in measured[p.key]))
    given = list(dict.fromkeys(name for p in points for name in p.values))
    taken = {*names, "point", "state", "seconds", "error", "runs", "notebook"}
    marked = [name for name in names if any(measured[p.key][name].protocol for p in points)]
    return [{
        "point": p.key, "state": out["state"],
        **{f"given.{name}" if name in taken else name: p.values.get(name) for name in given},
        **{name: measured[p.key][name].value for name in names},
        **{name + PROTOCOL: measured[p.key][name].protocol for name in marked},
        "seconds": out["seconds"], "error": out["error"], "runs": " ".join(out["runs"]),
        "notebook": f"points/{p.key}/notebook.ipynb",
    } for p in points for out in [outcomes[p.key]]]  # fmt: skip


def write(rows: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """`table.parquet` and `table.csv` in `out`; the first of them."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.table({name: _column([row[name] for row in rows]) for name in (rows[0] if rows else ())})
    with runs.beside(out / "table.csv") as temporary:
        pyarrow.csv.write_csv(table, temporary)
    with runs.beside(out / "table.parquet") as temporary:
        pyarrow.parquet.write_table(table, temporary)
    return out / "table.parquet"


def _column(values: Sequence[Any]) -> list[Any]:
    """Numbers stay numbers, text stays text; a column that mixes them, or holds lists, is JSON."""
    known = [v for v in values if v is not None]
    if all(isinstance(v, bool) for v in known) or all(isinstance(v, str) for v in known):
        return list(values)
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in known):
        whole = all(isinstance(v, int) for v in known)
        return [v if v is None or whole else float(v) for v in values]
    return [None if v is None else json.dumps(v) for v in values]
