"""The claims ledger: statements of papers, stated as contrasts of rows before they are measured, and decided
by one rule.

A ledger is a set of rows (tokenizers, controls) and of claims on them. Its claims are decided together: the
interval of each contrast comes from a block of all rows and seeds, and levels are adjusted by Holm over the
contrasts of the ledger. What a claim lacks (a failed row, one seed, two protocols) is named; it is then not
decided, never dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vfmlab.errors import ConfigError, nearest
from vfmlab.evaluation import contrasts
from vfmlab.evaluation.contrasts import Block, Interval, Kind
from vfmlab.evaluation.number import quantities, quantity
from vfmlab.registry import LEDGERS
from vfmlab.studies.results import Result
from vfmlab.studies.rows import Row, Until, parse

# The largest differences that count as none.
DELTAS = {
    "gfd": 1.0,
    "gfd_own": 1.0,
    "probe_linear": 0.02,
    "probe_knn": 0.02,
    "probe_class_token": 0.02,
    "class_accuracy": 0.02,
    "psnr": 0.25,
    "rfd": math.log(1.1),
    "se_cknna_change": 0.02,
    "se_cknna_release_change": 0.02,
    "se_cknna_release_change_corrected": 0.02,
    "codebook_used": 0.02,
    "probe_1bpp": 0.02,
}
RATIOS = ("rfd",)  # compared as ratios: a contrast is the logarithm of one
# In these features a whole gFD is below 1, and nobody has said which difference counts as none.
UNSET = {"factors": ("gfd", "gfd_own"), "groups": ("gfd", "gfd_own")}


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of row means that the claim says is above 0 (a gap), or about 0 (no gap).

    Args:
        metric: a registered number. weights: row, or row#stage for a number of an earlier stage -> weight;
        they add up to 0. says: in words. delta: the largest difference that counts as none, 0 where
        none is set; None: :data:`DELTAS`.
    """

    metric: str
    weights: Mapping[str, float]
    says: str
    kind: Kind = "gap"
    delta: float | None = None

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(self.weights)

    @property
    def bound(self) -> float:
        return DELTAS[self.metric] if self.delta is None else self.delta

    @property
    def unit(self) -> str:
        q = quantity(self.metric)
        return f"log ratio of {q.label}" if self.metric in RATIOS else q.title


def better(metric: str, first: str, second: str) -> Contrast:
    """`first` is better than `second`."""
    sign = 1.0 if quantity(metric).better == "higher" else -1.0
    return Contrast(metric, {first: sign, second: -sign},
                    f"{first} has the better {quantity(metric).label} than {second}")


def same(metric: str, first: str, second: str) -> Contrast:
    """The two are about equal."""
    says = f"{first} and {second} have about the same {quantity(metric).label}"
    return Contrast(metric, {first: 1.0, second: -1.0}, says, "no gap")


def gains_more(metric: str, first: tuple[str, str], second: tuple[str, str]) -> Contrast:
    """From `first[0]` to `first[1]` more is gained than from `second[0]` to `second[1]`."""
    sign = 1.0 if quantity(metric).better == "higher" else -1.0
    weights: dict[str, float] = {}
    for (before, after), side in ((first, sign), (second, -sign)):
        weights[after] = weights.get(after, 0.0) + side
        weights[before] = weights.get(before, 0.0) - side
    says = f"{first[0]} -> {first[1]} gains more {quantity(metric).label} than {second[0]} -> {second[1]}"
    return Contrast(metric, {row: w for row, w in weights.items() if w}, says)


@dataclass(frozen=True)
class Claim:
    """A statement of a paper.

    Args:
        id: short, unique in its ledger. statement: one sentence. source: paper, table. figures: the paper's
        own. contrasts: all of them must hold. open: why it cannot be decided by contrasts here; then it has
        none. elsewhere: what decides it by other means, a page beside the ledger's or a notebook.
    """

    id: str
    statement: str
    source: str
    figures: str
    contrasts: tuple[Contrast, ...] = ()
    open: str = ""
    elsewhere: str = ""

    @property
    def rows(self) -> tuple[str, ...]:
        """Labels of the rows it needs."""
        return tuple(dict.fromkeys(row.partition("#")[0] for one in self.contrasts for row in one.rows))


@dataclass(frozen=True)
class Entry:
    """A row of a ledger.

    Args:
        spec: domain -> what :mod:`vfmlab.studies.rows` reads, without label. until: what is trained. block:
            rows of one block have one spread over seeds; a contrast of two takes each row's from its own.
    """

    spec: Mapping[str, str]
    until: Until = None
    block: str = ""


@dataclass
class Ledger:
    """Rows and claims that are decided together.

    Args:
        rows: label -> entry. domains: name -> overrides that hold for all rows there.
    """

    title: str
    rows: Mapping[str, Entry]
    claims: Sequence[Claim]
    domains: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def blocks(self) -> dict[str, str]:
        """Label -> block."""
        return {label: entry.block for label, entry in self.rows.items()}

    def chosen(self, only: Sequence[str] = ()) -> list[Claim]:
        """The claims called `only`, or all. ConfigError: no such claim."""
        known = {claim.id: claim for claim in self.claims}
        for name in only:
            if name not in known:
                raise ConfigError(f"unknown claim '{name}'{nearest(name, known)}")
        return [known[name] for name in dict.fromkeys(only)] or list(self.claims)

    def study(self, domain: str, claims: Sequence[Claim], seeds: Sequence[int],
              overrides: Mapping[str, Any]) -> list[Row]:
        """The rows that `claims` need in a domain, seeds outermost; rows that the domain does not have are
        left out."""
        if domain not in self.domains:
            raise ConfigError(f"unknown domain '{domain}': choose from {', '.join(self.domains)}")
        changes = {**self.domains[domain], **overrides}
        wanted = dict.fromkeys(row for claim in claims for row in claim.rows)
        rows = []
        for until in dict.fromkeys(self.rows[label].until for label in wanted):
            mine = [label for label in wanted if self.rows[label].until == until
                    and domain in self.rows[label].spec]
            rows += parse([f"{label}={self.rows[label].spec[domain]}" for label in mine], seeds, changes,
                          until)
        return sorted(rows, key=lambda row: row.seed)


# -- deciding ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What came of one contrast.

    Args:
        interval: None where it could not be measured, and then `lacks` says why. p: adjusted by Holm.
        verdict: by the adjusted level. alone: by its own 95 % interval. seeds: that would decide it at the
            adjusted level, if no other undecided contrast is decided before it.
    """

    contrast: Contrast
    interval: Interval | None = None
    p: float = 1.0
    verdict: contrasts.Verdict = "undecided"
    alone: contrasts.Verdict = "undecided"
    seeds: int | None = None
    lacks: str = ""


@dataclass(frozen=True)
class Decided:
    """A claim with what came of it. verdict: supported, refuted, undecided, elsewhere, or not run."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        verdicts = [finding.verdict for finding in self.findings]
        if self.claim.elsewhere:
            return "elsewhere"
        if not verdicts or all(finding.lacks for finding in self.findings):
            return "not run"
        if "refuted" in verdicts:
            return "refuted"
        return "supported" if set(verdicts) == {"supported"} else "undecided"

    @property
    def lacks(self) -> list[str]:
        """What stands between it and a verdict."""
        return list(dict.fromkeys([*([self.claim.open] if self.claim.open else []),
                                   *(f.lacks for f in self.findings if f.lacks)]))


def decide(claims: Sequence[Claim], results: Sequence[Result], blocks: Mapping[str, str]) -> list[Decided]:
    """Decide claims by what their rows measured; levels by Holm over all contrasts that have an interval.

    Args:
        blocks: label -> block; results of other labels are not looked at.
    """
    results = [r for r in results if r.label in blocks]
    effects = [[_finding(contrast, results, blocks) for contrast in claim.contrasts] for claim in claims]
    flat = [finding for findings in effects for finding in findings if finding.interval is not None]
    decisions = [contrasts.decide(f.interval, f.contrast.kind, f.contrast.bound) for f in flat]
    adjusted = contrasts.holm([decision.p for decision in decisions])
    left = sum(p > 1 - contrasts.LEVEL for p in adjusted)
    closed: dict[int, Finding] = {}
    for finding, decision, p in zip(flat, decisions, adjusted, strict=True):
        one, decided = finding.contrast, p <= 1 - contrasts.LEVEL
        needed = None if decided else contrasts.seeds_to_decide(finding.interval, one.kind, one.bound, left)
        closed[id(finding)] = dataclasses.replace(
            finding, p=p, verdict=decision.verdict if decided else "undecided", alone=decision.verdict,
            seeds=needed)
    pairs = zip(claims, effects, strict=True)
    return [Decided(claim, tuple(closed.get(id(f), f) for f in findings)) for claim, findings in pairs]


def _finding(contrast: Contrast, results: Sequence[Result], blocks: Mapping[str, str]) -> Finding:
    try:
        block = _block(contrast, results, blocks)
        contrast = _in_space(contrast, results)
    except ConfigError as error:
        return Finding(contrast, lacks=str(error))
    interval = block.contrast(contrast.weights)
    few = f"{len(block.seeds)} seed: nothing is known of the spread; train at least 2, better 3"
    return Finding(contrast, interval, lacks="" if interval.freedom else few)


def _in_space(contrast: Contrast, results: Sequence[Result]) -> Contrast:
    """The contrast, without a difference that counts as none where its features have none set.

    Raises:
        ConfigError: a claim of no gap, which needs one.
    """
    labels = {row.partition("#")[0] for row in contrast.rows}
    named = {str(r.protocol.get("features", {}).get("name")) for r in results if r.label in labels}
    spaces = {name.partition(":")[0] for name in named}
    unset = [space for space in spaces if contrast.metric in UNSET.get(space, ())]
    if contrast.delta is not None or not unset:
        return contrast
    if contrast.kind == "no gap":
        raise ConfigError(f"which difference of {quantity(contrast.metric).label} counts as none in the "
                          f"features '{unset[0]}' is not set; give the contrast a delta")
    return dataclasses.replace(contrast, delta=0.0)


def _block(contrast: Contrast, results: Sequence[Result], blocks: Mapping[str, str]) -> Block:
    """The contrast's rows, and all others of their blocks that have the number under its protocol over the
    same seeds.

    Raises:
        ConfigError: a row that failed, is not there, or lacks the metric or a seed; a number that is not
            finite, or of a ratio and not above 0; rows of two protocols.
    """
    metric, values, marks = contrast.metric, {}, {}
    for row in contrast.rows:
        label, _, stage = row.partition("#")
        mine = [r for r in results if r.label == label]
        if not mine:
            raise ConfigError(f"row '{label}' was not run")
        if failed := next((r for r in mine if r.failed), None):
            raise ConfigError(f"row '{label}', seed {failed.seed}, failed: {failed.failed}")
        numbers = {r.seed: _number(r, metric, stage) for r in mine}
        if missing := [seed for seed, number in numbers.items() if number is None]:
            raise ConfigError(f"row '{row}', seed {missing[0]}, has no {quantity(metric).label}")
        values[row] = {seed: _value(metric, number.value) for seed, number in numbers.items()}
        if odd := [seed for seed, value in values[row].items() if not math.isfinite(value)]:
            raise ConfigError(f"row '{row}', seed {odd[0]}: {quantity(metric).label} "
                              f"{numbers[odd[0]].value} cannot be compared")
        marks |= {(row, seed): number.protocol for seed, number in numbers.items()}
    if len(set(marks.values())) > 1:
        one, other = list(dict.fromkeys(marks.values()))[:2]
        raise ConfigError(f"{quantity(metric).label}: rows of two protocols ({one}, {other}) are not "
                          "compared")
    common = set.intersection(*(set(mine) for mine in values.values()))
    if uneven := [row for row, mine in values.items() if set(mine) != set.union(*map(set, values.values()))]:
        raise ConfigError(f"row '{uneven[0]}' lacks a seed that others have; train every row with the same "
                          "seeds")
    own = {row.partition("#")[0] for row in contrast.rows}
    mine = {blocks[label] for label in own}
    # the others of their blocks, so that more is known of the spread; a row beside a stage of its own is none
    for label in dict.fromkeys(r.label for r in results if blocks[r.label] in mine and r.label not in own):
        numbers = {r.seed: n for r in results if r.label == label and (n := _number(r, metric, ""))}
        same_protocol = all(n.protocol == next(iter(marks.values())) for n in numbers.values())
        taken = {seed: _value(metric, n.value) for seed, n in numbers.items()}
        usable = common and common == set(taken) and all(map(math.isfinite, taken.values()))
        if usable and same_protocol:
            values[label] = taken
    return Block.of(values, {row: blocks[row.partition("#")[0]] for row in values})


def _number(result: Result, metric: str, stage: str):
    if not stage:
        return result.number(metric)
    number = next((s.numbers.get(metric) for s in result.stages if s.stage == stage), None)
    return None if number is None or number.absent else number


def _value(metric: str, value: float) -> float:
    """As contrasts take it; NaN for a ratio's number that is not above 0."""
    if metric not in RATIOS:
        return float(value)
    return math.log(value) if value > 0 else math.nan


def ledger(name: str) -> Ledger:
    """The registered ledger. ConfigError: no such one, or a claim names a row or number that is not there."""
    one = LEDGERS.get(name)
    for claim in one.claims:
        named = [("number", contrast.metric, quantities()) for contrast in claim.contrasts]
        for what, given, known in (*named, *(("row", row, one.rows) for row in claim.rows)):
            if given not in known:
                raise ConfigError(f"claim '{claim.id}': unknown {what} '{given}'{nearest(given, known)}")
    return one


# -- running -----------------------------------------------------------------------------------------------


Price = tuple[Claim, float]  # and what it costs: seconds of one core that no earlier claim pays for


def prices(rows: Sequence[Row], claims: Sequence[Claim], price: Callable[[Row], Mapping[str, float]],
           budget: float = math.inf) -> list[Price]:
    """What each claim costs, in order; a phase that two claims share is paid once, by the first of them that
    fits into the budget (s of one core).

    price: row -> {id of a phase: seconds of one core, 0 where it is finished}.
    """
    paid: dict[str, float] = {}
    listed = []
    for claim in claims:
        costs = [price(row) for row in rows if row.label in claim.rows]
        own = {phase: cost for one in costs for phase, cost in one.items() if phase not in paid}
        listed.append((claim, sum(own.values())))
        if listed[-1][1] <= budget:
            paid |= own
            budget -= listed[-1][1]
    return listed


def affordable(listed: Iterable[Price], budget: float) -> tuple[list[Claim], list[Claim]]:
    """Claims that fit into the budget that :func:`prices` had, in their order, and those that do not."""
    fits, left = [], []
    for claim, seconds in listed:
        (fits if seconds <= budget else left).append(claim)
        budget -= seconds if seconds <= budget else 0.0
    return fits, left
