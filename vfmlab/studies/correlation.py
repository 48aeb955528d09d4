"""Which number that can be measured without training a diffusion model goes along with how well one trains?

For the rows of a comparison: every metric of the tokenizer's report and of the instruments, and its rank
correlation (Spearman) with a target such as gFD, over the means of the rows, with what the seeds and the
choice of rows leave open. Only numbers of one protocol are correlated.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vfmlab.errors import ConfigError, VfmlabError
from vfmlab.evaluation.number import TARGET, quantities, quantity
from vfmlab.studies import measure
from vfmlab.studies.results import Result
from vfmlab.studies.rows import Row

NAMES = ("alignment", "se_cknna", "lds", "probes", "factors", "segmentation", "geometry", "frequency",
         "interpolation", "robustness", "velocity_variance", "neighbours", "midpoints", "dct_energy")
GIVEN = "probe_linear"  # what alignment moves first; what a metric says beyond it is its own
LEAST = 4  # rows, below which ranks say nothing
# The first is said to track better (arXiv 2510.18457). Under noise alone all tokenizers are read in one way.
PAIRS = (("se_cknna", "alignment_cknna"), ("se_cknna_noise", "alignment_cknna"))
ENOUGH = 24  # methods (or rows), from which on a correlation over them may decide something
DRAWS = 2000  # of rows or methods, for the intervals
PERMUTATIONS = 20_000  # for p, which Holm multiplies by the number of metrics


class Correlation(NamedTuple):
    """How the ranks of a metric go with those of the target.

    rho: over the means of the rows. seeds: rho over the rows of each seed alone. low, high: the middle 95 %
    of rho when rows are drawn with replacement. methods: the same when methods are drawn and bring all their
    rows along, since variants of one method are no independent rows; None for fewer than 4 methods. p: share
    of permutations with as large an |rho|, two-sided: of the means of methods, or of rows where `methods` is
    None. rows, kinds: how many rows and methods. partial: rho with what both share with the ranks of
    :data:`GIVEN` taken out, None where that cannot be had.
    """

    metric: str
    rho: float
    seeds: tuple[float, ...]
    low: float
    high: float
    p: float
    rows: int
    partial: float | None = None
    methods: tuple[float, float] | None = None
    kinds: int = 0

    @property
    def independent(self) -> int:
        """Methods, or rows where none are known: variants of a method share most of what they are."""
        return self.kinds or self.rows

    @property
    def clear(self) -> bool:
        """Whether every interval there is leaves out 0."""
        return all(low * high > 0 for low, high in [(self.low, self.high), *filter(None, [self.methods])])


def measure_rows(results: Sequence[Result], rows: Sequence[Row], root: str | Path,
                 names: Sequence[str] = NAMES, compared_with: str | None = None,
                 say: Callable[[str], object] = lambda text: None) -> list[Result]:
    """`results` with the instruments' numbers of every row's tokenizer.

    A row whose tokenizer cannot be measured keeps its other numbers and says why in `failed`.
    """
    measured = []
    for k, (result, row) in enumerate(zip(results, rows, strict=True)):
        if any(stage.run == row.tokenizers[-1].id for stage in result.stages):
            say(f"instruments {k + 1}/{len(rows)}: {row.label}, seed {row.seed}")
            try:
                report = measure.measure(row.tokenizers[-1].id, names, root, compared_with=compared_with)
            except VfmlabError as error:
                result = result.replace(failed=result.failed or f"instruments: {error}")
            else:
                result = result.replace(instruments=report.measured)
        measured.append(result)
    return measured


class Lead(NamedTuple):
    """How much closer a metric goes along with the target than another one.

    gap: of the two correlations, each signed so that better with better is above 0 (their size, for a metric
    without a good end). low, high, methods: as in :class:`Correlation`, both of the same draws. rows: with
    both.
    """

    metric: str
    other: str
    gap: float
    low: float
    high: float
    methods: tuple[float, float] | None
    rows: int


def values(results: Sequence[Result], metric: str) -> dict[str, dict[int, float]]:
    """label -> {seed: value} of a number, under the protocol that most results have it under."""
    numbers = [(r, number) for r in results if (number := r.number(metric))]
    common = statistics.mode(number.protocol for _, number in numbers) if numbers else None
    by_label: dict[str, dict[int, float]] = {}
    for r, number in numbers:
        if number.protocol == common:
            by_label.setdefault(r.label, {})[r.seed] = float(number.value)
    return by_label


def check_goal(labels: Sequence[str], goals: Sequence[Result], target: str) -> None:
    """ConfigError where `goals` lack the target of a row; known before anything is trained."""
    check_target(target)
    there = values(goals, target)
    if missing := [label for label in dict.fromkeys(labels) if label not in there]:
        raise ConfigError(f"--goal: no '{target}' of row '{missing[0]}'; rows there: "
                          f"{', '.join(there) or 'none'}")


def aimed(results: Sequence[Result], goals: Sequence[Result], target: str) -> list[Result]:
    """`results`, of short trainings, with the target that `goals`, of longer ones, have on the same rows.

    What the short ones have of it stands with the instruments as `<target>_short`. A row with all seeds that
    the long one has takes each seed's own value, another one their mean. Rows that are not in both are left
    out.

    Raises:
        ConfigError: no such target, or no row in both.
    """
    check_target(target)
    goal, rows = values(goals, target), []
    seeds = {label: {r.seed for r in results if r.label == label} for label in goal}
    for result in results:
        if result.label not in goal:
            continue
        own = {f"{target}_short": result.numbers[target]} if target in result.numbers else {}
        mine = goal[result.label]  # under one protocol: another result may have the number under another
        number = next(number for r in goals if r.label == result.label and (number := r.number(target))
                      and number.value == mine.get(r.seed))
        alike = mine.keys() <= seeds[result.label] and result.seed in mine
        value = mine[result.seed] if alike else statistics.fmean(mine.values())
        number = dataclasses.replace(number, value=value)
        rows.append(result.replace(numbers={**result.numbers, target: number},
                                    instruments={**result.instruments, **own}))
    if not rows:
        raise ConfigError(f"no row has '{target}' in --goal and stands in --from too; rows there: "
                          f"{', '.join(goal) or 'none'}")
    return rows


def correlate(results: Sequence[Result], target: str = "gfd", seed: int = 0) -> list[Correlation]:
    """Every metric against the target, strongest first. seed: of the draws.

    Raises:
        ConfigError: unknown target, or fewer than 4 rows that have it under one protocol.
    """
    check_target(target)
    goal = values(results, target)
    if len(goal) < LEAST:
        raise ConfigError(f"{len(goal)} rows have '{target}' under one protocol; ranks need at least "
                          f"{LEAST}: compare more rows, or wait for their diffusion runs")
    given, methods = values(results, GIVEN), _methods(results)
    every = (_one(metric, values(results, metric), goal, given, seed, methods)
             for metric in candidates(results))
    return sorted((one for one in every if one is not None), key=lambda c: -abs(c.rho))


def leads(results: Sequence[Result], target: str = "gfd", seed: int = 0) -> list[Lead]:
    """The :data:`PAIRS` that at least four rows have, by draws of the same rows for both metrics."""
    goal, methods = values(results, target), _methods(results)
    every = (_lead(pair, [values(results, metric) for metric in pair], goal, target, seed, methods)
             for pair in PAIRS)
    return [one for one in every if one is not None]


def _lead(pair: tuple[str, str], mine: Sequence[dict[str, dict[int, float]]],
          goal: dict[str, dict[int, float]], target: str, seed: int,
          methods: Mapping[str, str]) -> Lead | None:
    """None where fewer than four rows have both."""
    labels = [label for label in goal if all(label in own for own in mine)]
    if len(labels) < LEAST:
        return None
    xs, y = [_means(own, labels) for own in mine], _means(goal, labels)
    signs = [_sign(quantity(metric).better, quantity(target).better) for metric in pair]

    def gap(times: np.ndarray | None = None) -> np.ndarray:
        rhos = [spearman(x, y, times) for x in xs]
        one, two = (sign * rho if sign else np.abs(rho) for sign, rho in zip(signs, rhos, strict=True))
        return one - two

    random, groups = np.random.default_rng(seed), _groups(labels, methods)
    low, high = _middle(gap, np.eye(len(labels)), random)
    over = _middle(gap, groups, random) if len(groups) >= LEAST else None
    return Lead(*pair, float(gap()), low, high, over, len(labels))


def _sign(end: str | None, other: str | None) -> int:
    """Of a correlation, so that better with better is above 0; 0 where one of them has no good end."""
    return 0 if None in (end, other) else 1 if end == other else -1


def _methods(results: Sequence[Result]) -> dict[str, str]:
    return {r.label: r.method for r in results if r.method}


def _means(mine: Mapping[str, Mapping[int, float]], labels: Sequence[str]) -> np.ndarray:
    return np.array([statistics.fmean(mine[label].values()) for label in labels])


def _groups(labels: Sequence[str], methods: Mapping[str, str]) -> np.ndarray:
    """Methods x rows: 1 where the row is of the method; one without is a method by itself. None are known: no
    groups."""
    of = [methods.get(label, label) for label in labels]
    kinds = sorted(set(of)) if methods else []
    return np.array([[kind == mine for mine in of] for kind in kinds], float)


def check_target(target: str) -> None:
    """ConfigError where `target` is not registered as one."""
    if target not in quantities(TARGET):
        raise ConfigError(f"target = '{target}': choose from {', '.join(quantities(TARGET))}")


def candidates(results: Sequence[Result]) -> list[str]:
    """All numbers of the tokenizers: those of their reports, then those of the instruments."""
    reports = (stage.numbers for r in results for stage in r.stages if stage.kind == "tokenizer")
    return list(dict.fromkeys(key for part in (*reports, *(r.instruments for r in results)) for key in part))


def _one(metric: str, mine: dict[str, dict[int, float]], goal: dict[str, dict[int, float]],
         given: dict[str, dict[int, float]], seed: int, methods: Mapping[str, str]) -> Correlation | None:
    """None where fewer than four rows have the metric, or where it is the same in all of them."""
    labels = [label for label in goal if label in mine]
    if len(labels) < LEAST:
        return None
    x, y = _means(mine, labels), _means(goal, labels)
    rho = float(spearman(x, y))
    if np.isnan(rho):
        return None
    seeds = []
    for s in sorted({s for label in labels for s in goal[label]}):
        pairs = [(mine[label][s], goal[label][s]) for label in labels if s in mine[label]
                 and s in goal[label]]
        own = float(spearman(*np.array(pairs).T)) if len(pairs) >= LEAST else np.nan
        seeds += [] if np.isnan(own) else [own]  # a metric may be constant in one seed
    def drawn(times: np.ndarray) -> np.ndarray:
        return spearman(x, y, times)

    random = np.random.default_rng(seed)
    low, high = _middle(drawn, np.eye(len(labels)), random)
    groups = _groups(labels, methods)
    over = _middle(drawn, groups, random) if len(groups) >= LEAST else None
    units = np.eye(len(labels)) if over is None else groups / groups.sum(1, keepdims=True)
    p = _chance(units @ x, units @ y, random)
    rest = None
    if metric != GIVEN and all(label in given for label in labels):
        rest = partial(x, y, _means(given, labels))
    return Correlation(metric, rho, tuple(seeds), low, high, p, len(labels), rest, over, len(groups))


def _chance(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> float:
    """Share of permutations with as large an |rho|, two-sided; 1 where one side is constant."""
    shape, rho = (PERMUTATIONS, len(x)), spearman(x, y)
    shuffled = spearman(np.broadcast_to(x, shape), random.permuted(np.broadcast_to(y, shape), axis=1))
    below = int((np.abs(shuffled) < abs(rho) - 1e-12).sum())
    return (1 + PERMUTATIONS - below) / (1 + PERMUTATIONS)


def _middle(value: Callable[[np.ndarray], np.ndarray], groups: np.ndarray,
            random: np.random.Generator) -> tuple[float, float]:
    """The middle 95 % of a value when groups are drawn with replacement. value: how often each row is there,
    draws x rows -> one of each draw. groups: which rows each holds, groups x rows."""
    drawn = random.integers(len(groups), size=(DRAWS, len(groups)))
    times = (drawn[..., None] == np.arange(len(groups))).sum(1) @ groups
    # a draw in which one side is constant has no correlation: 0
    low, high = np.quantile(np.nan_to_num(value(times)), [0.025, 0.975])
    return float(low), float(high)


def partial(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> float | None:
    """Rank correlation of x and y given z; None where z is constant, or says one of them exactly."""
    xy, xz, yz = (float(spearman(*pair)) for pair in ((x, y), (x, z), (y, z)))
    left = (1 - xz**2) * (1 - yz**2)
    return (xy - xz * yz) / left**0.5 if left > 1e-12 else None


def spearman(x: np.ndarray, y: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
    """Rank correlation along the last axis, ties sharing their mean rank; NaN for a constant side.

    times: D R, how often each of R rows is there; x and y have R values then, and the result D.
    """
    from scipy.stats import rankdata

    if times is None:
        a, b = (rankdata(v, axis=-1) - (v.shape[-1] + 1) / 2 for v in (x, y))
        times = np.ones_like(a)
    else:  # the rank of a row: those below it, and half of those level with it
        a, b = (times @ ((v < v[:, None]) + 0.5 * (v == v[:, None])).T - times.sum(-1, keepdims=True) / 2
                for v in (x, y))
    with np.errstate(invalid="ignore"):
        return (times * a * b).sum(-1) / np.sqrt((times * a * a).sum(-1) * (times * b * b).sum(-1))
