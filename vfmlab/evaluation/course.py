"""Numbers over training, as a run logged them: every point has its protocol's hash, a curve one protocol.

This is the only reader of logged evaluations. A run's protocol may change while its weights stay (ids leave
it out), so its log can hold points of several; earlier versions logged some numbers without a hash. Such
points stand in no curve.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vfmlab.errors import DataError
from vfmlab.evaluation.number import Number
from vfmlab.runs import RunDir

# name -> (images seen, number) in order, whatever the protocol
Logged = Mapping[str, Sequence[tuple[int, Number]]]


@dataclass(frozen=True)
class Course:
    """One number of one run over training: values at samples (images seen), all of one protocol."""

    run: str
    name: str
    protocol: str | None
    samples: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    left_out: int = 0


def logged(folder: RunDir) -> dict[str, list[tuple[int, Number]]]:
    """Every number of the evaluations that a run logged, in the order of training."""
    points: dict[str, list[tuple[int, Number]]] = {}
    for record in folder.metrics("evaluation"):
        for name, entry in record.items():
            if name in ("kind", "step", "samples", "time") or not isinstance(record.get("samples"), int):
                continue
            try:
                number = Number.from_json(name, entry if isinstance(entry, Mapping) else {"value": entry})
            except DataError:
                continue
            if isinstance(number.value, int | float):
                points.setdefault(name, []).append((record["samples"], number))
    return points


def newest(points: Iterable[tuple[int, Number]]) -> str | None:
    """The protocol of the last point that has one."""
    return next((number.protocol for _, number in reversed(list(points)) if number.protocol), None)


def course(run: str, name: str, points: Sequence[tuple[int, Number]], protocol: str | None) -> Course:
    """The points under one protocol. Of two at one number of images the later one counts."""
    mine = {samples: float(number.value) for samples, number in points if protocol
            and number.protocol == protocol}
    order = sorted(mine)
    left_out = sum(number.protocol != protocol or not protocol for _, number in points)
    return Course(run, name, protocol, tuple(order), tuple(mine[s] for s in order), left_out)


def over_training(folder: RunDir, name: str, protocol: str | None = None) -> Course:
    """A number over the training of one run, under `protocol`; None: that of its last evaluation."""
    points = logged(folder).get(name, [])
    return course(folder.id, name, points, protocol or newest(points))


def together(runs: Mapping[str, Logged], name: str, protocol: str | None = None) -> dict[str, Course]:
    """Curves that may be drawn together: key -> course under one protocol, of runs that have points.

    runs: key -> what :func:`logged` gave. protocol: None takes the one that most runs ended with.
    """
    marks = [mark for points in runs.values() if (mark := newest(points.get(name, ())))]
    protocol = protocol or (statistics.mode(marks) if marks else None)
    return {key: course(key, name, points[name], protocol) for key, points in runs.items()
            if points.get(name)}


def left_out(courses: Iterable[Course]) -> str:
    """One line on the points that stand in no curve; empty where there are none."""
    missing = {c.run: c.left_out for c in courses if c.left_out}
    if not missing:
        return ""
    whose = ", ".join(f"{n} of `{run}`" for run, n in missing.items())
    reason = "points that were logged under another protocol, or by a version that logged no hash"
    return f"Left out: {reason} ({whose})."
