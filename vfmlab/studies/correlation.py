"""Which number that can be measured without training a diffusion model goes along with how well one trains?

For the rows of a comparison: every metric of the tokenizer's report and of the instruments, and its rank correlation
(Spearman) with a target such as gFD, over the means of the rows, with what the seeds and the choice of rows leave open.
Only numbers of one protocol are correlated.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vfmlab.errors import ConfigError, VfmlabError
from vfmlab.evaluation.instruments.base import better
from vfmlab.evaluation.protocol import BETTER
from vfmlab.studies import measure
from vfmlab.studies.results import METRICS, Result
from vfmlab.studies.rows import Row

NAMES = ("alignment", "se_cknna", "lds", "probes", "factors", "segmentation", "geometry", "frequency", "interpolation", "robustness")
TARGETS = ("gfd", "gfd_own", "class_accuracy")
LEAST = 4  # rows, below which ranks say nothing
DRAWS = 2000  # of rows, for the interval; of permutations, for p


class Correlation(NamedTuple):
    """How the ranks of a metric go with those of the target.

    rho: over the means of the rows. seeds: rho over the rows of each seed alone. low, high: the middle 95 % of rho when rows are
    drawn with replacement. p: share of permutations of the rows with as large an |rho|, two-sided. rows: how many.
    """

    metric: str
    rho: float
    seeds: tuple[float, ...]
    low: float
    high: float
    p: float
    rows: int


def measure_rows(
    results: Sequence[Result], rows: Sequence[Row], root: str | Path, names: Sequence[str] = NAMES, compared_with: str | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[Result]:
    """`results` with the instruments' numbers of every row's tokenizer under "instruments": {name: {"value", "protocol"}}.

    A row whose tokenizer cannot be measured keeps its other numbers and says why in "failed".
    """
    found = []
    for k, (result, row) in enumerate(zip(results, rows, strict=True)):
        values, failed = {}, result["failed"]
        if any(stage["run"] == row.tokenizers[-1].id for stage in result["stages"]):
            say(f"instruments {k + 1}/{len(rows)}: {row.label}, seed {row.seed}")
            try:
                report = measure.measure(row.tokenizers[-1].id, names, root, compared_with=compared_with)
            except VfmlabError as error:
                failed = failed or f"instruments: {error}"
            else:
                values = {k: {"value": v["value"], "protocol": v["protocol"]} for k, v in report["metrics"].items() if v["value"] is not None}
        found.append({**result, "instruments": values, "failed": failed})
    return found


def values(results: Sequence[Result], metric: str) -> dict[str, dict[int, float]]:
    """label -> {seed: value} of a metric or an instrument's number, of the protocol that most results have it under."""
    cells = [(r["label"], r["seed"], r["metrics"].get(metric) or r.get("instruments", {}).get(metric)) for r in results]
    hashes = [cell["protocol"] for _, _, cell in cells if cell]
    if not hashes:
        return {}
    common = statistics.mode(hashes)
    found: dict[str, dict[int, float]] = {}
    for label, seed, cell in cells:
        if cell and cell["protocol"] == common:
            found.setdefault(label, {})[seed] = float(cell["value"])
    return found


def correlate(results: Sequence[Result], target: str = "gfd", seed: int = 0) -> list[Correlation]:
    """Every metric against the target, strongest first. seed: of the draws.

    Raises:
        ConfigError: unknown target, or fewer than 4 rows that have it under one protocol.
    """
    if target not in TARGETS:
        raise ConfigError(f"target = '{target}': choose from {', '.join(TARGETS)}")
    goal = values(results, target)
    if len(goal) < LEAST:
        raise ConfigError(f"{len(goal)} rows have '{target}' under one protocol; ranks need at least {LEAST}: compare more rows, or wait for their diffusion runs")
    found = [one for metric in candidates(results) if (one := _one(metric, values(results, metric), goal, seed)) is not None]
    return sorted(found, key=lambda c: -abs(c.rho))


def candidates(results: Sequence[Result]) -> list[str]:
    """All numbers of the tokenizers: those of their reports, then those of the instruments."""
    reports = (stage["metrics"] for r in results for stage in r["stages"] if stage["kind"] == "tokenizer")
    return list(dict.fromkeys(key for part in (*reports, *(r.get("instruments", {}) for r in results)) for key in part))


def _one(metric: str, mine: dict[str, dict[int, float]], goal: dict[str, dict[int, float]], seed: int) -> Correlation | None:
    """None where fewer than four rows have the metric, or where it is the same in all of them."""
    labels = [label for label in goal if label in mine]
    if len(labels) < LEAST:
        return None
    x = np.array([statistics.fmean(mine[label].values()) for label in labels])
    y = np.array([statistics.fmean(goal[label].values()) for label in labels])
    rho = float(spearman(x, y))
    if np.isnan(rho):
        return None
    seeds = []
    for s in sorted({s for label in labels for s in goal[label]}):
        pairs = [(mine[label][s], goal[label][s]) for label in labels if s in mine[label] and s in goal[label]]
        own = float(spearman(*np.array(pairs).T)) if len(pairs) >= LEAST else np.nan
        seeds += [] if np.isnan(own) else [own]  # a metric may be constant in one seed
    random = np.random.default_rng(seed)
    drawn = random.integers(len(labels), size=(DRAWS, len(labels)))
    low, high = np.nanquantile(spearman(x[drawn], y[drawn]), [0.025, 0.975])
    shuffled = spearman(np.broadcast_to(x, drawn.shape), random.permuted(np.broadcast_to(y, drawn.shape), axis=1))
    p = (1 + int((np.abs(shuffled) >= abs(rho) - 1e-12).sum())) / (1 + DRAWS)
    return Correlation(metric, rho, tuple(seeds), float(low), float(high), p, len(labels))


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of the ranks along the last axis, equal values sharing their mean rank; NaN where one side is constant."""
    from scipy.stats import rankdata

    a, b = (rankdata(v, axis=-1) - (v.shape[-1] + 1) / 2 for v in (x, y))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def name(metric: str) -> str:
    """What a metric is called in a table's head."""
    return METRICS.get(metric, metric)


def end(metric: str) -> str:
    """Which end is good: an arrow, or nothing where that is open."""
    good = BETTER.get(metric) or better().get(metric)
    return {"higher": " ↑", "lower": " ↓"}.get(good or "", "")
