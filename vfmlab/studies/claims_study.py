"""`vfmlab claims`: train what a ledger's rows need within a budget, decide, write the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vfmlab import runs
from vfmlab.config import Phase
from vfmlab.evaluation.instruments.base import instrument_of
from vfmlab.studies import claims, claims_page, compare, correlation
from vfmlab.studies.claims import Claim, Price
from vfmlab.studies.results import Result, together
from vfmlab.studies.rows import Row
from vfmlab.training import plan


def from_files(name: str, files: Sequence[str | Path], only: Sequence[str], out: Path, command: str) -> Path:
    """Decide a ledger by results that comparisons wrote before; nothing is trained.

    Raises:
        ConfigError: no such ledger or claim. DataError: a file that holds no results.
    """
    book = claims.ledger(name)
    results = together(files)
    chosen, out = book.chosen(only), compare.writable(out)
    return _write(book, chosen, results, out, command, [Path(file).name for file in files])


def run(name: str, domain: str, root: str | Path, out: Path, command: str, seeds: Sequence[int] = (0, 1, 2),
        only: Sequence[str] = (), budget: float | None = None, overrides: Mapping[str, Any] | None = None,
        jobs: int | None = None, cluster: str | None = None, retry: bool = False) -> Path:
    """Train, measure, decide and write the page of a ledger in a domain: .md (returned), .json, .html.

    Args:
        domain: one of the ledger's. budget: seconds of one core; None: no end. The rest as in
            :func:`vfmlab.studies.compare.run`.

    Raises:
        ConfigError: no such ledger, claim or domain. TrainingError: every row failed.
    """
    book, root, out = claims.ledger(name), Path(root).expanduser(), compare.writable(out)
    chosen, left = book.chosen(only), []
    if budget is not None:
        known = listed(name, domain, root, seeds, only, overrides, budget)
        chosen, left = claims.affordable(known, budget)
    rows = book.study(domain, chosen, seeds, overrides or {})
    needed = _instruments(chosen)
    results = compare.trained(rows, root, jobs, cluster, retry, needed)
    results = [correlation.measure_rows([result], [row], root, needed[row.label])[0]
               if row.label in needed else result for result, row in zip(results, rows, strict=True)]
    return _write(book, chosen, results, out, command, (), left)


def listed(name: str, domain: str, root: str | Path, seeds: Sequence[int] = (0, 1, 2),
           only: Sequence[str] = (), overrides: Mapping[str, Any] | None = None,
           budget: float = math.inf) -> list[Price]:
    """What each claim costs, in seconds of one core of this machine: steps are timed once per kind of
    phase."""
    book = claims.ledger(name)
    chosen = book.chosen(only)
    rows = book.study(domain, chosen, seeds, overrides or {})
    first = {row.label: row for row in reversed(rows)}  # seeds of a row cost the same
    timed: dict[str, float] = {}

    def price(row: Row) -> dict[str, float]:
        pairs = zip(row.phases, first[row.label].phases, strict=True)
        return {phase.id: 0.0 if runs.finished(phase, root)
                else timed.get(like.id) or timed.setdefault(like.id, _seconds(like)) for phase, like in pairs}

    return claims.prices(rows, chosen, price, budget)


def _seconds(phase: Phase) -> float:
    """A phase's training steps on one core, and its measurements, whose images cost half of a training step's
    each time that they go through (seen at `pocket`; without gradients, but with features and statistics)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step = plan.measured(phase)["seconds_per_step"]
    finally:
        torch.set_num_threads(threads)
    passes = phase.protocol.n
    if phase.generator is not None:
        passes *= 1 + sum(n <= phase.budget for n in phase.train.evaluate_at)
        passes *= 1 if phase.diffusion is None else phase.protocol.sampler.steps
    return step * (phase.budget + passes / 2) / phase.train.batch


def _instruments(chosen: Sequence[Claim]) -> dict[str, tuple[str, ...]]:
    """Label -> instruments whose numbers the claims need beyond the reports."""
    needed: dict[str, dict[str, None]] = {}
    for contrast in (contrast for claim in chosen for contrast in claim.contrasts):
        if name := instrument_of(contrast.metric):
            for row in contrast.rows:
                needed.setdefault(row.partition("#")[0], {})[name] = None
    return {label: tuple(names) for label, names in needed.items()}


def _write(book: claims.Ledger, chosen: Sequence[Claim], results: Sequence[Result], out: Path, command: str,
           sources: Sequence[str], left: Sequence[Claim] = ()) -> Path:
    decided = claims.decide(chosen, results, book.blocks)
    page = claims_page.build(decided, results, book.title, command, sources, left)
    rows = [] if sources else [r.as_json() for r in results]
    return page.publish(out, {"claims": [claims_page.record(one) for one in decided], "results": rows})
