"""Convergence as single numbers: the area under gFD over samples seen, and when runs reach one level."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from vfmlab.errors import DataError
from vfmlab.evaluation.course import over_training
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import LOWER, Draft, Quantity
from vfmlab.evaluation.protocol import Resolved
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

CONVERGING = {"gfd": "gFD", "gfd_own": "gFD to own rec."}


def area(samples: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of a convergence curve between its first and last point (trapezoids over ordered samples).

    Raises:
        DataError: fewer than two points.
    """
    if len(samples) < 2:
        raise DataError(f"a convergence curve needs at least 2 evaluations, got {len(samples)}; set "
                        "train.evaluate_at")
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
                reason = (f"the run has no '{name}' with a protocol from evaluations during training; "
                          "set diffusion.train.evaluate_at")
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
