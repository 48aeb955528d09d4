"""How much guidance, and away from what: gFD over the scale for every kind of guidance, and which is ahead.

The network is one, and so are the noise and all else of the protocol; what differs is the guidance alone:
away from the null label (classifier-free), from the network's own second read-out, from a weaker model. The
first run is drawn at every scale, and each kind takes the one that is best there. The verdict is of the other
runs, which differ from it in their seed and are drawn at these scales alone, or at all, to see what a scale
does.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfmlab import api, config, runs
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation import contrasts
from vfmlab.plots import figures, primitives
from vfmlab.studies.claims import DELTAS, UNSET
from vfmlab.studies.compare import writable
from vfmlab.studies.page import Page, definitions

QUESTION = "How much guidance, and away from what?"
NONE = "none"
KINDS: Mapping[str, str | None] = {NONE: None, "null label": None, "internal": "internal", "auto": "auto"}
SCALES = (1.25, 1.5, 2.0, 3.0)
METRICS = {"gfd": "gFD", "gfd_own": "gFD to own rec.", "class_accuracy": "class accuracy",
           "precision": "precision", "recall": "recall"}
DRAWN = ("gFD", "precision", "recall")  # a figure each, over the scale
Record = Mapping[str, Any]


def kinds_of(run: config.Phase, weaker: Sequence[str]) -> list[str]:
    """The kinds of guidance that a generator can have; the null label is one where it was trained with."""
    second = run.diffusion is not None and getattr(run.diffusion.network, "base_depth", None)
    there = (run.generator.null_label, second, weaker)
    return [kind for kind, one in zip(list(KINDS)[1:], there, strict=True) if one]


def records(refs: Sequence[str], root: str | Path, scales: Sequence[float] = SCALES,
            weaker: Sequence[str] = (), n: int | None = None, whole: bool = False) -> list[dict[str, Any]]:
    """One row a run, kind and scale: of the first run all scales, of the others those that were best there,
    or all where `whole`; the unguided one of each run first.

    All are measured under the runs' protocol but for kind and scale of its guidance, which acts at the times
    t that the protocol has; what was measured before is read, unless it lacks one of `METRICS`.

    Args:
        refs: generators of one recipe, with a seed each. weaker: for kind auto, the model that guidance leads
        away from, one for all runs or one for each. n: samples; None: the protocol's.

    Raises:
        ConfigError: runs that differ in more than their seed, scales at or below 1, as many weaker runs as
            fit neither, a run that is no generator. RunError: no such run. DataError: no gFD.
    """
    if not refs or not scales or min(scales) <= 1:
        raise ConfigError(f"{len(refs)} runs, scales {', '.join(map(str, scales)) or 'none'}: give at least "
                          "one run, and scales above 1, which is no guidance")
    if len(weaker) not in (0, 1, len(refs)):
        raise ConfigError(f"{len(weaker)} weaker models for {len(refs)} runs; give one for all, or one for "
                          "each")
    folders = [runs.open_run(ref, root) for ref in refs]
    phases = [folder.config() for folder in folders]
    _alike(folders, phases)
    kinds, table = kinds_of(phases[0], weaker), []
    plans = [(NONE, 1.0), *itertools.product(kinds, sorted(set(scales)))]
    for k, (folder, phase) in enumerate(zip(folders, phases, strict=True)):
        for kind, scale in plans:
            other = weaker[k % len(weaker)] if kind == "auto" else None
            when = {} if kind == NONE else {"interval": phase.protocol.guidance.interval}
            guidance = config.Guidance(kind=KINDS[kind], scale=scale, weaker=other, **when)
            table.append({"run": folder.id, "seed": phase.seed, "kind": kind, "scale": scale,
                          **_measured(folder, root, guidance, n)})
        plans = list(chosen(table).items()) if k == 0 and not whole else plans
    return table


def _measured(folder: runs.RunDir, root: str | Path, guidance: config.Guidance,
              n: int | None) -> dict[str, Any]:
    changes = {"guidance": guidance.model_dump(mode="json"), **({} if n is None else {"n": n})}
    report = api.evaluate(folder.path, root, changes)
    if not set(METRICS) <= set(report):  # of a version that did not measure all of them
        report = api.evaluate(folder.path, root, changes, again=True)
    if report.value("gfd") is None:
        raise DataError(f"run '{folder.id}', guidance {guidance.scale:g}: no gFD; {report['gfd'].reason}")
    numbers = {label: report.value(name) for name, label in METRICS.items()}
    return {**numbers, "N": report["gfd"].n, "protocol": report.hash}


def _alike(folders: Sequence[runs.RunDir], phases: Sequence[config.Phase]) -> None:
    """ConfigError where runs are no generators of one recipe with a seed each."""
    for folder, phase in zip(folders, phases, strict=True):
        if phase.generator is None:
            raise ConfigError(f"run '{folder.id}' is a {phase.kind} run; name runs of a generator")
        one, other = (p.recipe.model_dump(mode="json", exclude={"seed", "name"}) for p in (phases[0], phase))
        parts = [part for part in one if one[part] != other[part]]
        if parts:
            raise ConfigError(f"runs '{folders[0].id}' and '{folder.id}' differ in '{parts[0]}'; name runs "
                              "that differ in their seed alone")
    seeds = [phase.seed for phase in phases]
    again = [seed for seed in seeds if seeds.count(seed) > 1]
    if again:
        raise ConfigError(f"two runs have seed {again[0]}; name each run once")


def chosen(table: Iterable[Record]) -> dict[str, float]:
    """Kind -> the scale with the least gFD, of one run."""
    best: dict[str, Record] = {}
    for row in table:
        if row["kind"] not in best or row["gFD"] < best[row["kind"]]["gFD"]:
            best[row["kind"]] = row
    return {kind: row["scale"] for kind, row in best.items()}


@dataclass(frozen=True)
class Verdict:
    """What two kinds differ by, at their scales: gFD of the second less that of the first, which is less."""

    first: str
    second: str
    interval: contrasts.Interval
    p: float
    verdict: str


def verdicts(table: Sequence[Record], scales: Mapping[str, float], bound: float) -> list[Verdict]:
    """Every two kinds at the scales given, levels by Holm; none with fewer than two runs.

    The one with the smaller mean is named first; it is "ahead" by the rule for claims, or "level" where the
    difference is at most `bound`, which counts as none.
    """
    values = {kind: {row["seed"]: row["gFD"] for row in table if (row["kind"], row["scale"]) == (kind, scale)}
              for kind, scale in scales.items()}
    block = contrasts.Block.of(values)
    if len(block.seeds) < 2:
        return []
    ranked = sorted(values, key=lambda kind: statistics.fmean(values[kind].values()))
    pairs = list(itertools.combinations(ranked, 2))
    intervals = [block.contrast({second: 1.0, first: -1.0}) for first, second in pairs]
    decisions = [contrasts.decide(interval, "gap", bound) for interval in intervals]
    levels = contrasts.holm([decision.p for decision in decisions])
    words = {"supported": "ahead", "refuted": "level", "undecided": "undecided"}
    return [Verdict(*pair, interval, p, words[d.verdict] if p <= 1 - contrasts.LEVEL else "undecided")
            for pair, interval, d, p in zip(pairs, intervals, decisions, levels, strict=True)]


def shape(table: Sequence[Record], scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """What the scale does, of runs that were drawn at all: is gFD less at the chosen one than unguided and at
    the largest, which all runs but the first decide; and are precision greater and recall less at the
    largest than unguided, which all do. Levels by Holm; nothing with fewer than two runs beside the first.
    """
    first, cases = table[0]["run"], []
    for kind in (kind for kind in scales if kind != NONE):
        mine = [row for row in table if row["kind"] in (NONE, kind)]
        largest = max(row["scale"] for row in mine)
        rest = [row for row in mine if row["run"] != first]
        cases += [(kind, "gFD", 1.0, scales[kind], rest), (kind, "gFD", largest, scales[kind], rest),
                  (kind, "precision", largest, 1.0, mine), (kind, "recall", 1.0, largest, mine)]
    shown, levels = [], []
    for kind, label, more, less, rows in cases:
        values: dict[str, dict[int, float]] = {}
        for row in rows:
            values.setdefault(f"{row['scale']:g}", {})[row["seed"]] = row[label]
        few = len({row["seed"] for row in rows}) < 2
        if few or more == less or None in (row[label] for row in rows):
            continue
        interval = contrasts.Block.of(values).contrast({f"{more:g}": 1.0, f"{less:g}": -1.0})
        levels.append(contrasts.decide(interval))
        shown.append({"kind": kind, "expected": f"{label} at {more:g} above that at {less:g}",
                      "difference": interval.estimate,
                      "95 % interval": f"{interval.low:+.3g} … {interval.high:+.3g}"})
    for row, decision, p in zip(shown, levels, contrasts.holm([d.p for d in levels]), strict=True):
        row |= {"p (Holm)": p, "verdict": decision.verdict if p <= 1 - contrasts.LEVEL else "undecided"}
    return shown


def page(refs: Sequence[str], root: str | Path, out: Path, command: str, scales: Sequence[float] = SCALES,
         weaker: Sequence[str] = (), n: int | None = None, whole: bool = False) -> Path:
    """Measure, write `out`.md (returned), .json and .html."""
    out = writable(out)
    table = records(refs, root, scales, weaker, n, whole)
    first = [row for row in table if row["run"] == table[0]["run"]]
    rest = table[len(first):]
    at = chosen(first)
    protocol = runs.open_run(refs[0], root).config().protocol
    space, (late, early) = protocol.features.partition(":")[0], protocol.guidance.interval
    bound = 0.0 if "gfd" in UNSET.get(space, ()) else DELTAS["gfd"]
    decided = verdicts(rest, at, bound)
    ahead = [one for one in decided if one.verdict == "ahead"]
    edge = [kind for kind, scale in at.items() if kind != NONE and scale in (min(scales), max(scales))]
    verdict = "None: one run chooses the scales, and a spread needs two more."
    if decided:
        verdict = "; ".join(_says(one, at) for one in ahead) + "." if ahead else "None is ahead of another."
    made = Page("Guidance", QUESTION, verdict, command=command,
                definitions=definitions(("gfd", "gfd_own", "precision", "recall")),
                lead=f"One network, one set of noises a seed; protocols that differ in their guidance alone, "
                     f"which acts where {late:g} <= t <= {early:g} (t = 1: noise). "
                     f"Scales are chosen on seed {first[0]['seed']}, and compared on "
                     f"{', '.join(str(row['seed']) for row in rest if row['kind'] == NONE) or 'no other'}."
                     + (f" At the edge of the scales, and perhaps better beyond: {', '.join(edge)}." if edge
                        else ""))
    if decided:
        made.add("At the chosen scales", "gFD of the second less that of the first."
                 + (f" Level: at most {bound:g} apart." if bound else ""),
                 primitives.table([_row(one, at) for one in decided]))
    drawn = [label for label in DRAWN if all(row[label] is not None for row in table)]
    left = ", ".join(label for label in DRAWN if label not in drawn)
    made.add("Over the scale", "Lines: the first run. Points: every run."
             + (f" Not measured of all: {left}; `vfmlab eval RUN` says why." if left else ""),
             *(figures.guidance_figure(table, label) for label in drawn),
             primitives.table([{**row, "chosen": "yes" if at[row["kind"]] == row["scale"] else ""}
                               for row in table]))
    record = {"records": table, "chosen": at, "verdicts": [_row(one, at) for one in decided]}
    if whole and (effects := shape(table, at)):
        made.add("What the scale does", "gFD: of all runs but the first, which chose the scale. Precision "
                 "and recall: of all runs, at the largest scale and unguided.", primitives.table(effects))
        record["shape"] = effects
    return made.publish(out, record)


def _named(kind: str, at: Mapping[str, float]) -> str:
    return kind if kind == NONE else f"{kind} {at[kind]:g}"


def _says(one: Verdict, at: Mapping[str, float]) -> str:
    return (f"{_named(one.first, at)} is ahead of {_named(one.second, at)} by {one.interval.estimate:.2g} ± "
            f"{one.interval.half_width():.2g} gFD")


def _row(one: Verdict, at: Mapping[str, float]) -> dict[str, Any]:
    return {"first": _named(one.first, at), "second": _named(one.second, at), "gFD": one.interval.estimate,
            "95 % interval": f"{one.interval.low:+.3g} … {one.interval.high:+.3g}", "p (Holm)": one.p,
            "verdict": one.verdict}
