"""Convergence as single numbers: the area under gFD over samples seen, and when runs reach one level."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from vfmlab.errors import DataError, RunError
from vfmlab.evaluation.course import Course, over_training
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import LOWER, Draft, Quantity
from vfmlab.evaluation.protocol import Resolved
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS
from vfmlab.runs import RunDir

CONVERGING = {"gfd": "gFD", "gfd_own": "gFD to own rec."}
HOW = "set diffusion.train.evaluate_at"


def area(samples: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of a convergence curve between its first and last point (trapezoids over samples).

    Raises:
        DataError: fewer than two points, or points out of order.
    """
    if len(samples) != len(values):
        raise DataError(f"a curve has {len(samples)} positions and {len(values)} values; give one value per "
                        "position")
    if len(samples) < 2:
        raise DataError(f"a convergence curve needs at least 2 evaluations, got {len(samples)}; set "
                        "train.evaluate_at")
    if any(a >= b for a, b in itertools.pairwise(samples)):
        raise DataError("the evaluations of a convergence curve must be in order of samples, each once")
    whole = sum((b - a) * (u + v) / 2
                for (a, u), (b, v) in itertools.pairwise(zip(samples, values, strict=True)))
    return whole / (samples[-1] - samples[0])


def reach(samples: Sequence[float], values: Sequence[float], level: float,
          lower: bool = True) -> float | None:
    """Samples at which a curve first comes to `level` (linear between evaluations); None if it never does."""
    sign = 1 if lower else -1
    before = None
    for s, v in zip(samples, values, strict=True):
        if sign * v <= sign * level:
            if before is None or before[1] == v:
                return float(s)
            return before[0] + (s - before[0]) * (level - before[1]) / (v - before[1])
        before = (s, v)
    return None


def steps_to_reach(folders: Sequence[RunDir], metric: str = "gfd",
                   level: float | None = None) -> list[dict[str, Any]]:
    """Samples and steps that several runs need to come to one level of a metric; None where a run does not.

    level: None takes the worst last value among the runs, so that each reaches it.

    Raises:
        RunError: a run without evaluations during training. DataError: different protocols.
    """
    courses: dict[str, Course] = {folder.id: over_training(folder, metric) for folder in folders}
    for run, one in courses.items():
        if not one.samples:
            raise RunError(f"run '{run}' has no '{metric}' from evaluations during training; {HOW} and train "
                           "it")
    marks = sorted({one.protocol or "" for one in courses.values()})
    if len(marks) > 1:
        raise DataError(f"'{metric}' of these runs was measured under different protocols "
                        f"({', '.join(marks)})")
    level = max(one.values[-1] for one in courses.values()) if level is None else level
    rows = []
    for folder in folders:
        samples, values = courses[folder.id].samples, courses[folder.id].values
        at = reach(samples, values, level)
        steps = None if at is None else at / folder.config().train.batch
        whole = area(samples, values) if len(samples) > 1 else None
        rows.append({"run": folder.id, "level": level, "samples": at, "steps": steps, "area": whole})
    return rows


@INSTRUMENTS.register("convergence")
class Convergence(Instrument):
    """Area under the curves of gFD over samples seen, from the evaluations during training."""

    kinds = ("diffusion",)
    quantities = (*(Quantity(f"{name}_area", f"mean {label} over training", LOWER)
                    for name, label in CONVERGING.items()),
                  *(Quantity(f"{name}_short", f"{label} after a short training", LOWER)
                    for name, label in CONVERGING.items()),
                  *(Quantity(f"{name}_over_samples", f"{label} over training", LOWER, many=True)
                    for name, label in CONVERGING.items()))

    def measure(self, subject: Subject, report: Draft) -> None:
        if subject.folder is None:
            raise DataError("a model that is not in a run directory has no course of training")
        for name in CONVERGING:
            one = over_training(subject.folder, name)
            if not one.samples:
                reason = f"the run has no '{name}' with a protocol from evaluations during training; {HOW}"
                report.fill([f"{name}_area", f"{name}_over_samples"], reason)
                continue
            facts = {"measure": f"area under {name}", "first": one.samples[0], "last": one.samples[-1]}
            facts |= {"evaluations": len(one.samples), "of": one.protocol}
            section = Resolved({**subject.resolved.sections, "instrument": facts})
            report.add(f"{name}_over_samples", list(one.values), section, subject.n,
                       samples=list(one.samples))
            try:
                report.add(f"{name}_area", area(one.samples, one.values), section, subject.n)
            except DataError as error:
                report.absent(f"{name}_area", str(error))
