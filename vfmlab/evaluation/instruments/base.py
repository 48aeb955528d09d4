"""Instruments: measurements of a representation that say why one latent serves diffusion better than another.

Each is one registry entry (`vfmlab.registry.INSTRUMENTS`), works on the features of a :class:`~vfmlab.evaluation.subject.
Subject` (tokenizer, diffusion model or vision model), and writes numbers with the hash of the protocol they depend on. A
new one is a class in a file of this package. :mod:`vfmlab.studies.measure` is the door for runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vfmlab.errors import ConfigError, DataError, nearest
from vfmlab.evaluation.protocol import HIGHER, LOWER, Report
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

VERSION = 1  # raised whenever an instrument's numbers change
EVERY = ("tokenizer", "diffusion", "vfm")


class Scalars(NamedTuple):
    """Names of an instrument's scalars by the end that is good."""

    higher: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()
    neither: tuple[str, ...] = ()

    @property
    def ends(self) -> dict[str, str | None]:
        """name -> "higher", "lower" or None."""
        return {name: end for names, end in zip(self, (HIGHER, LOWER, None), strict=True) for name in names}


class Instrument:
    """Base of all instruments; `measure` writes every number named in `scalars` and `curves`.

    Attributes:
        kinds: of subjects it can measure. scalars: its numbers, by the end that is good. curves: its lists of numbers.
    """

    registered_name: str
    kinds: tuple[str, ...] = EVERY
    scalars: Scalars = Scalars()
    curves: tuple[str, ...] = ()

    def measure(self, subject: Subject, report: Report) -> None:
        raise NotImplementedError


def names(kind: str | None = None) -> list[str]:
    """All instruments, or those that measure subjects of this kind."""
    return [name for name in INSTRUMENTS if kind is None or kind in INSTRUMENTS.get(name).kinds]


def better() -> dict[str, str | None]:
    """Every scalar of every instrument and which end of it is good."""
    return {key: end for name in INSTRUMENTS for key, end in INSTRUMENTS.get(name).scalars.ends.items()}


def choose(wanted: Sequence[str] | None, kind: str, what: str) -> list[str]:
    """The instruments asked for, or all that measure this kind.

    Raises:
        ConfigError: unknown, or not for this kind of subject.
    """
    if wanted is None:
        return names(kind)
    for name in wanted:
        if name not in INSTRUMENTS:
            raise ConfigError(f"unknown instrument '{name}'{nearest(name, INSTRUMENTS.names())}")
        kinds = INSTRUMENTS.get(name).kinds
        if kind not in kinds:
            raise ConfigError(f"instrument '{name}' measures {' and '.join(kinds)} runs; '{what}' is a {kind}; choose from: {', '.join(names(kind))}")
    return list(dict.fromkeys(wanted))


def measure(subject: Subject, wanted: Sequence[str] | None = None, progress: Callable[[int, int], object] | None = None) -> dict[str, Any]:
    """What the instruments say about one subject.

    Returns:
        {"kind", "reference", "representation", "metrics": {name: {"value", "protocol", "n", "better", "spread"?}},
        "curves": {name: {"value": [...], ...}}, "protocols": {hash: protocol}, "instruments": {name: {"seconds"}}}. What
        cannot be measured on this subject is there with value None and a reason.
    """
    report, spent = Report(), {}
    chosen = choose(wanted, subject.kind, subject.name)
    curves: set[str] = set()
    for k, name in enumerate(chosen):
        instrument, started = INSTRUMENTS.get(name)(), time.perf_counter()
        curves |= set(instrument.curves)
        try:
            instrument.measure(subject, report)
        except (DataError, ConfigError) as error:
            for key in (*instrument.scalars.ends, *instrument.curves):
                if key not in report.numbers:
                    report.absent(key, str(error))
        for key, end in instrument.scalars.ends.items():
            report.numbers[key]["better"] = end
        spent[name] = {"seconds": round(time.perf_counter() - started, 2)}
        if progress is not None:
            progress(k + 1, len(chosen))
    return {
        "kind": subject.kind,
        "reference": subject.reference.name,
        "representation": subject.facts,
        "metrics": {k: v for k, v in report.numbers.items() if k not in curves},
        "curves": {k: v for k, v in report.numbers.items() if k in curves},
        "protocols": report.protocols,
        "instruments": spent,
    }


__all__ = ["EVERY", "VERSION", "Instrument", "Scalars", "better", "choose", "measure", "names"]
