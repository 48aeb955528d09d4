"""Metrics and instruments: what is measured, one registry entry each (`vfmlab.registry.INSTRUMENTS`), one
place for each number.

A :class:`Metric` belongs to every report: it sees batch after batch while images or samples go by. An
:class:`Instrument` is measured when it is asked for, on the features of a
:class:`~vfmlab.evaluation.subject.Subject` (tokenizer, diffusion model or vision model);
:mod:`vfmlab.studies.measure` is its door for runs. A new one is a class in a file of this package: its
`quantities` say what its numbers are called and where they are shown, and nothing else is needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vfmlab.errors import ConfigError, DataError, nearest
from vfmlab.evaluation.features import Seen
from vfmlab.evaluation.frechet import FeatureSet
from vfmlab.evaluation.number import Draft, Quantity, Report
from vfmlab.evaluation.precision import tf32
from vfmlab.evaluation.protocol import Resolved, Setup, compared_features
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS
from vfmlab.tokenizers.base import Tokenizer

VERSION = 2  # raised whenever an instrument's numbers change
EVERY = ("tokenizer", "diffusion", "vfm")
RECONSTRUCTIONS, LATENTS, SAMPLES, CODES = "reconstructions", "latents", "samples", "codes"


@dataclass
class Pass:
    """What a pass over images, or over samples, gathers; the metrics write their numbers from it.

    real, own, samples: features of the images, of their reconstructions, of the samples. latents: N C h w,
    normalised where the tokenizer has statistics, of the first images; labels: long N, theirs. network: the
    generator, of passes over samples.
    """

    setup: Setup
    resolved: Resolved
    tokenizer: Tokenizer
    real: FeatureSet
    own: FeatureSet
    samples: FeatureSet | None = None
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    report: Report = field(default_factory=lambda: Report({}))
    network: nn.Module | None = None

    @cached_property
    def compared(self) -> FeatureSet:
        """What samples are compared with: the protocol's reference, else the real images."""
        return self.real if self.setup.reference is None else compared_features(self.setup)


class Part(NamedTuple):
    """One batch. images: B 3 H W in [-1, 1], None for samples; output: decoded, 8 bits; seen: its features.

    real: the images' features B D, of reconstructions; latents: B C h w on the CPU; codes: B T, of
    quantised tokenizers; ids: of images or samples, long B. labels: classes, None where samples have none;
    drawn_for: of samples, the classes or numbers of prompts that the network was given.
    """

    images: Tensor | None
    output: Tensor
    seen: Seen
    labels: Tensor | None
    ids: Tensor
    real: Tensor | None = None
    latents: Tensor | None = None
    codes: Tensor | None = None
    drawn_for: Tensor | None = None


class Metric:
    """Base of what every report holds.

    Attributes:
        quantities: its numbers. order: of its columns in tables. over: RECONSTRUCTIONS (reports and
            evaluations during the training of tokenizers), LATENTS (reports of tokenizers: what a pass has
            gathered), SAMPLES, CODES (of an ar generator, beside its samples).
    """

    registered_name: str
    quantities: tuple[Quantity, ...] = ()
    order: int = 50
    over: str = RECONSTRUCTIONS

    def __init__(self, gathered: Pass):
        self.gathered = gathered

    @classmethod
    def fits(cls, gathered: Pass) -> bool:
        """Whether it is a question for this tokenizer at all; its numbers are left out otherwise."""
        return True

    def update(self, part: Part) -> None:
        """Take in one batch."""

    def write(self, draft: Draft) -> None:
        """Write every number of `quantities`; after a :class:`DataError` those not written are absent."""
        raise NotImplementedError


class Metrics:
    """The metrics over `over` together: `update` with every batch, then `write`."""

    def __init__(self, over: str, gathered: Pass):
        kinds = (INSTRUMENTS.get(name) for name in INSTRUMENTS)
        kinds = sorted((kind for kind in kinds if issubclass(kind, Metric)
                        and kind.over == over and kind.fits(gathered)),
                       key=lambda kind: kind.order)
        self.metrics = [kind(gathered) for kind in kinds]

    def update(self, part: Part) -> None:
        for metric in self.metrics:
            metric.update(part)

    def write(self, draft: Draft | None = None) -> Draft:
        draft = draft or Draft()
        for metric in self.metrics:
            _attempt(metric.quantities, draft, metric.write, draft)
        return draft


class Instrument:
    """Base of what is measured on request; `measure` writes every number named in `quantities`.

    Attributes:
        kinds: of subjects. quantities: its numbers and curves. order: of its columns in tables.
    """

    registered_name: str
    quantities: tuple[Quantity, ...] = ()
    order: int = 100
    kinds: tuple[str, ...] = EVERY

    def measure(self, subject: Subject, report: Draft) -> None:
        raise NotImplementedError


def names(kind: str | None = None) -> list[str]:
    """All instruments, or those that measure subjects of this kind."""
    known = {name: INSTRUMENTS.get(name) for name in INSTRUMENTS}
    return [name for name, part in known.items() if issubclass(part, Instrument)
            and (kind is None or kind in part.kinds)]


def instrument_of(metric: str) -> str | None:
    """The instrument that measures a number; None: it stands in every report."""
    return next((name for name in INSTRUMENTS if issubclass(kind := INSTRUMENTS.get(name), Instrument)
                 and any(q.name == metric for q in kind.quantities)), None)


def choose(wanted: Sequence[str] | None, kind: str, what: str) -> list[str]:
    """The instruments of these names, or all that measure this kind.

    Raises:
        ConfigError: unknown, or not for this kind of subject.
    """
    if wanted is None:
        return names(kind)
    for name in wanted:
        if name not in names():
            raise ConfigError(f"unknown instrument '{name}'{nearest(name, names())}")
        kinds = INSTRUMENTS.get(name).kinds
        if kind not in kinds:
            fit = ", ".join(names(kind))
            raise ConfigError(f"instrument '{name}' measures {' and '.join(kinds)} runs; '{what}' is a "
                              f"{kind}; choose from: {fit}")
    return list(dict.fromkeys(wanted))


def measure(subject: Subject, wanted: Sequence[str] | None = None,
            progress: Callable[[int, int], object] | None = None) -> Report:
    """What the instruments measure on one subject; what cannot be had is absent, with a reason."""
    draft, spent = Draft(), {}
    selected = choose(wanted, subject.kind, subject.name)
    for k, name in enumerate(selected):
        instrument, started = INSTRUMENTS.get(name)(), time.perf_counter()
        with tf32(False):
            _attempt(instrument.quantities, draft, instrument.measure, subject, draft)
        spent[name] = round(time.perf_counter() - started, 2)
        if progress is not None:
            progress(k + 1, len(selected))
    about = {"reference": subject.reference.name, "representation": subject.facts}
    return draft.report(kind=subject.kind, run=subject.name, instruments=spent, about=about)


def _attempt(quantities: Sequence[Quantity], draft: Draft, action: Callable[..., Any], *args: Any) -> None:
    """Run `action`; what it has not written when it gives up is absent, with its reason."""
    reason = "not measured"
    try:
        action(*args)
    except (DataError, ConfigError) as error:
        reason = str(error)
    draft.fill([q.name for q in quantities], reason)
