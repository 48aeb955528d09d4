"""What runs measured, as records and tables: numbers with protocols, curves over training, costs, sizes.

One record per row of a comparison (:func:`collect`, which measures what is missing), or per run of a folder
(:func:`scan`, which only reads). Numbers of different protocols never share a table, ranking or curve.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfmlab import api, config, runs
from vfmlab.errors import DataError, VfmlabError
from vfmlab.evaluation import course, number
from vfmlab.evaluation.contrasts import Block
from vfmlab.evaluation.instruments import convergence
from vfmlab.evaluation.number import CURVE, HIGHER, TABLE, TARGET, Number, Quantity, Report, quantities
from vfmlab.plots import primitives
from vfmlab.studies.command import shown_source
from vfmlab.studies.rows import Row
from vfmlab.training import plan

VERSION = 2  # of the JSON; 1 had "metrics" without labels, and curves without protocols


@dataclass(frozen=True)
class Stage:
    """One trained phase of a row. kind: "tokenizer", "diffusion" or "ar"."""

    stage: str
    kind: str
    run: str
    seconds: float
    numbers: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One row with one seed, or one run.

    numbers: of the last stage of the tokenizer and of the diffusion model; absent: name -> why it could not
    be measured. stages: the same for every phase. logged: name -> points of the evaluations during the
    diffusion model's training, whatever their protocol. instruments: numbers of the instruments. hash,
    protocol: of the last report. seconds: by kind. parameters: {"trained", "tokenizer", "decoder", "vfm"};
    latent: (C, h, w). failed: why the row, or its later phases, could not be had; what it has is there.
    """

    label: str
    run: str
    seed: int = 0
    data: str = ""
    size: int | None = None
    hash: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Number] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    stages: Sequence[Stage] = ()
    logged: course.Logged = field(default_factory=dict)
    instruments: Mapping[str, Number] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    parameters: Mapping[str, int] | None = None
    latent: Sequence[int] | None = None
    failed: str | None = None
    name: str = ""
    method: str = ""
    kind: str = ""

    def replace(self, **changes: Any) -> Result:
        return dataclasses.replace(self, **changes)

    def number(self, name: str) -> Number | None:
        """A measured number of the reports or of the instruments."""
        candidates = (group.get(name) for group in (self.numbers, self.instruments))
        return next((number for number in candidates if number is not None and not number.absent), None)

    def with_report(self, report: Report, kind: str) -> Result:
        """With the numbers of one more phase; a later stage's replace those of an earlier one."""
        before = ({}, {}) if kind == "tokenizer" else (self.numbers, self.absent)
        images = dict(report.protocol.get("images", {}))
        images |= {"source": shown_source(images["source"])} if "source" in images else {}
        return self.replace(
            numbers={**before[0], **report.measured}, hash=report.hash, protocol={**report.protocol, "images": images},
            absent={**before[1], **{name: _brief(one.reason or "") for name, one in report.items() if one.absent}},
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        entries = {name: {k: v.as_json() for k, v in getattr(self, name).items()}
                   for name in ("numbers", "instruments")}
        stages = [{**dataclasses.asdict(s), "numbers": {k: v.as_json() for k, v in s.numbers.items()}}
                  for s in self.stages]
        curves = {k: [{"samples": at, **v.entry()} for at, v in points] for k, points in self.logged.items()}
        more = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**more, "version": VERSION, **entries, "stages": stages, "logged": curves}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of :meth:`as_json`.

        Raises:
            DataError: of another version.
        """
        if data.get("version") != VERSION:
            raise DataError(f"results of version {data.get('version', 1)}, this library reads {VERSION}; "
                            "make them anew with vfmlab compare")

        def numbers(entries: Mapping[str, Any]) -> dict[str, Number]:
            return {name: Number.from_json(name, entry) for name, entry in entries.items()}

        groups = {name: numbers(data[name]) for name in ("numbers", "instruments")}
        stages = tuple(Stage(**{**stage, "numbers": numbers(stage["numbers"])}) for stage in data["stages"])
        logged = {name: [(at["samples"], Number.from_json(name, {k: at[k] for k in at if k != "samples"}))
                         for at in points]
                  for name, points in data["logged"].items()}
        fields = {f.name for f in dataclasses.fields(cls)}
        more = {**groups, "stages": stages, "logged": logged}
        return cls(**{name: value for name, value in data.items() if name in fields} | more)


def read(path: str | Path, key: str = "results") -> list[Result]:
    """The results in the JSON that a comparison or a correlation wrote.

    Raises:
        DataError: no such file, other JSON, or of another version.
    """
    try:
        data = json.loads(Path(path).expanduser().read_bytes())
        return [Result.from_json(entry) for entry in data[key]]
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"'{path}' holds no results; name the .json that vfmlab compare wrote") from None


def together(files: Sequence[str | Path]) -> list[Result]:
    """The results of several files; of one row and seed in two of them, the numbers of both, and where both
    have one that of the first. :class:`DataError` as in :func:`read`, and where no row has a number."""
    merged: dict[tuple[str, int], Result] = {}
    for result in (one for path in files for one in read(path)):
        before = merged.setdefault((result.label, result.seed), result)
        longer = max(before, result, key=lambda one: len(one.stages))  # its curves, costs and protocol
        merged[result.label, result.seed] = longer.replace(
            numbers={**result.numbers, **before.numbers}, failed=before.failed and result.failed,
            instruments={**result.instruments, **before.instruments})
    if not any(result.numbers for result in merged.values()):
        raise DataError(f"no row in {', '.join(map(str, files))} has a number; name the .json of a study "
                        "that trained rows, not one made of other files")
    return list(merged.values())


# -- collecting --------------------------------------------------------------------------------------------


def collect(rows: Sequence[Row], root: str | Path, failed: Mapping[str, str] | None = None) -> list[Result]:
    """One record per row of a comparison; what is trained and not measured yet is measured.

    failed: id of a row's last phase -> why its training failed.
    """
    built: dict[str, dict[str, Any]] = {}  # seeds of a row have one size
    return [_row(row, runs.root_folder(root), failed or {}, built) for row in rows]


def _row(row: Row, root: Path, failed: Mapping[str, str], built: dict[str, dict[str, Any]]) -> Result:
    last, why = row.phases[-1], []
    result = _begin(last, last.id).replace(label=row.label)
    try:
        built[row.label] = built.get(row.label) or sizes(row)
        result = result.replace(**built[row.label])
    except VfmlabError as error:
        why.append(str(error))
    for phase in row.phases:
        folder = runs.RunDir(root / phase.id)
        state = folder.status() if folder.path.is_dir() else None
        if state is None or state.state != "finished":
            how = f"{state.state}: {state.message}".strip(": ") if state else "not begun"
            why.append(f"run '{phase.id}' is not finished ({how})")
            break
        try:
            report = api.evaluate(phase.id, root, phase.protocol)
        except Exception as error:  # whatever it is: the other rows must come out
            line = (str(error).splitlines() or [type(error).__name__])[0]
            why.append(f"evaluation of run '{phase.id}': {line}")
            break
        result = result.with_report(report, phase.kind)
        stage = Stage(phase.stage, phase.kind, phase.id, round(state.seconds, 1), report.measured)
        spent = round(result.seconds.get(phase.kind, 0.0) + state.seconds, 1)
        result = result.replace(stages=(*result.stages, stage), seconds={**result.seconds, phase.kind: spent})
        if phase.generator is not None:
            result = result.replace(logged=course.logged(folder))
    first = failed.get(last.id) or next(iter(why), None)  # of the training first: all have one config
    return result.replace(failed=first and first.replace(f"{root}/", ""))


def scan(root: str | Path, every_phase: bool = False) -> list[Result]:
    """One record per run of a folder that was measured; nothing is computed and no model is loaded.

    A diffusion run carries the numbers of its tokenizer too; one without a report has what it logged alone.
    Runs that another one was built on are left out unless `every_phase`.
    """
    folders, results, parents = {folder.id: folder for folder in runs.scan(root)}, [], set()
    for folder in folders.values():
        try:
            run = folder.config()
            report = number.of_run(folder)
            logged = {} if run.generator is None else course.logged(folder)
        except (VfmlabError, OSError):
            continue  # of another version of the library; the list of runs names it
        if run.tokenizer is None or (report is None and not logged):
            continue
        if run.parent is not None:
            parents.add(run.parent)
        spent, one = {}, folder
        with suppress(VfmlabError, OSError):  # an earlier stage of another version of the library
            while one is not None:
                spent[one.kind] = round(spent.get(one.kind, 0.0) + one.status().seconds, 1)
                one = folders.get(one.config().parent or "")
        below = folders.get(run.parent) if run.generator is not None and run.parent is not None else None
        chain = [(below, "tokenizer")] * (below is not None) + [(folder, run.kind)]
        result = _begin(run, folder.id).replace(logged=logged, seconds=spent)
        for one, kind in chain if report is not None else ():
            own = number.of_run(one)
            result = result if own is None else result.with_report(own, kind)
        results.append(result.replace(instruments={k: v for f, _ in reversed(chain)
                                                   for k, v in _instruments(f).items()}))
    return results if every_phase else [r for r in results if r.run not in parents]


def _begin(run: config.Phase, run_id: str) -> Result:
    return Result(
        run_id, run_id, run.seed, f"{shown_source(run.data.source)}, {run.data.size} px", run.data.size, name=run.name,
        method=run.tokenizer.method, kind=run.kind, latent=run.tokenizer.latent_shape(run.data.size),
    )  # fmt: skip


def _instruments(folder: runs.RunDir) -> dict[str, Number]:
    """Numbers of the instruments beside a run; the newest measurement of each."""
    numbers: dict[str, Number] = {}
    for path in sorted((folder.path / "instruments").glob("*.json"), key=lambda p: p.stat().st_mtime):
        report = number.read(path)
        numbers |= {} if report is None else report.measured
    return numbers


def _brief(reason: str) -> str:
    """What is missing, without what to do about it on this machine."""
    name, colon, rest = reason.partition(";")[0].rpartition(": ")
    return name + colon + rest.partition(" (")[0]


def sizes(row: Row) -> dict[str, Any]:
    """{"latent": (C, h, w), "parameters": {"trained", "tokenizer", "decoder", "vfm"}} of the tokenizer.

    Built without storage. trained: parameters that any stage trains; tokenizer: all but those of the VFM.
    """
    (tokenizer,) = plan.empty_tokenizers(row.run.tokenizer_phase)
    stages = [phase for phase in row.tokenizers if phase.imported is None]  # that one is not trained
    globs = {glob for phase in stages for glob in phase.trains}
    counts = {name: p.numel() for name, p in tokenizer.named_parameters()}
    free = {name for name, p in tokenizer.named_parameters() if p.requires_grad}
    trained = sum(n for name, n in counts.items() if name in free
                  and any(fnmatch.fnmatchcase(name, glob) for glob in globs))
    vfm = 0 if tokenizer.vfm is None else sum(p.numel() for p in tokenizer.vfm.parameters())
    decoder = sum(n for name, n in counts.items() if name.startswith("decoder."))
    parameters = {"trained": trained, "tokenizer": sum(counts.values()), "decoder": decoder, "vfm": vfm}
    return {"latent": tuple(tokenizer.latent_shape), "parameters": parameters}


# -- numbers over seeds --------------------------------------------------------------------------------------


def means(results: Sequence[Result], metric: str) -> dict[str, list[float]]:
    """label -> the values of its seeds, in the order of the seeds; labels without the number are left out."""
    values: dict[str, list[float]] = {}
    for r in sorted(results, key=lambda r: r.seed):
        if metric in r.numbers:
            values.setdefault(r.label, []).append(float(r.numbers[metric].value))
    return {label: values[label] for label in labels(results) if label in values}


def labels(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(r.label for r in results))


def best(results: Sequence[Result], metric: str) -> str | None:
    """The label with the best mean; None with fewer than two labels. Raises ConfigError across protocols."""
    values = means(results, metric)
    if len(values) < 2 or quantities()[metric].better is None:
        return None
    hashes = {r.label: r.numbers[metric].protocol for r in results if metric in r.numbers}
    return number.rank({k: {metric: Number(statistics.fmean(v), hashes[k])} for k, v in values.items()},
                metric)[0][0]


def spread(values: Sequence[float]) -> str:
    """Mean and, in brackets, every value; from four values on mean ± standard deviation."""
    text, *each = map(primitives.number, (statistics.fmean(values), *values))
    if len(each) > 3:
        return f"{text} ± {primitives.number(float(f'{statistics.stdev(values):.2g}'))}"
    return f"{text} ({', '.join(each)})" if len(each) > 1 else text


def verdict(results: Sequence[Result]) -> str:
    """Which row is best by the first target that rows have; no verdict without a spread over seeds.

    Rows of other protocols than that of most are left out. The best mean is ahead of the next one only where
    the 95 % interval of their difference leaves out 0; it comes from all rows with the same seeds.
    """
    results = max(number.groups(results), key=len, default=[])
    for name, q in quantities(TARGET).items():
        values = means(results, name)
        if len(values) < 2:
            continue
        order = [label for label, _ in sorted(values.items(), key=lambda item: statistics.fmean(item[1]),
                                              reverse=q.better == HIGHER)]
        shown = f"{q.head}: " + "; ".join(f"{label} {spread(values[label])}" for label in order) + "."
        seeds = {label: {r.seed: float(r.numbers[name].value) for r in results
                         if r.label == label and name in r.numbers} for label in order}
        first, second = order[:2]
        if min(len(seeds[first]), len(seeds[second])) < 2:
            return f"None: one seed a row, so nothing is known of the spread. {shown}"
        if set(seeds[first]) != set(seeds[second]):
            return f"None: {first} and {second} were not measured with the same seeds. {shown}"
        alike = {label: mine for label, mine in seeds.items() if set(mine) == set(seeds[first])}
        gap = Block.of(alike).contrast({first: 1.0, second: -1.0})
        size = f"{abs(gap.estimate):.3g} ± {gap.half_width():.2g} (95 %)"
        if gap.low <= 0 <= gap.high:
            return f"None: the difference of {first} and {second}, {size}, may be none. {shown}"
        return f"{first} is best: ahead of {second} by {size}. {shown}"
    return "None: fewer than two rows have a number of what is generated under one protocol."


def after(results: Sequence[Result], stage: str) -> list[Result]:
    """`results` as they stood after `stage`: the numbers of that stage's run in place of the last one's."""
    return [result.replace(numbers=next((s.numbers for s in result.stages if s.stage == stage), {}))
            for result in results]


# -- tables ------------------------------------------------------------------------------------------------


def cells(results: Sequence[Result], label: str, heads: Mapping[str, str]) -> dict[str, str]:
    """Mean and every seed of the numbers that a row has. heads: number -> head of its column."""
    values = {title: means(results, name).get(label) for name, title in heads.items()}
    return {title: spread(own) for title, own in values.items() if own}


def head(q: Quantity, size: int | None) -> str:
    """The head of a column; a PSNR with the side of its images, because those of two sides do not compare."""
    return q.head.replace("(dB)", f"(dB, {size} px)") if size else q.head


def records(results: Sequence[Result], mark: str = "{}") -> list[dict[str, str]]:
    """One table row per label: all numbers there are (mean and spread), seconds, parameters, latent shape.

    mark: how the best of a column is written, for example "**{}**". All results must belong to one of the
    groups of one protocol.
    """
    columns = {head(q, results[0].size): (means(results, k), best(results, k))
               for k, q in quantities(TABLE).items()}
    columns = {title: column for title, column in columns.items() if column[0]}
    table = []
    for label in labels(results):
        mine = [r for r in results if r.label == label]
        row = {"row": label}
        for title, (values, top) in columns.items():
            text = spread(values[label]) if label in values else "–"
            row[title] = mark.format(text) if label == top else text
        seconds = [r.seconds["tokenizer"] for r in mine if "tokenizer" in r.seconds]
        row["tokenizer seconds"] = f"{statistics.fmean(seconds):,.0f}" if seconds else "–"
        parameters, latent = mine[0].parameters, mine[0].latent
        counts = f"{parameters['trained']:,} / {parameters['tokenizer']:,}" if parameters else "–"
        row["parameters trained / all"] = counts
        row["VFM"] = f"{parameters['vfm']:,}" if parameters and parameters["vfm"] else "–"
        row["latent"] = " x ".join(map(str, latent)) if latent else "–"
        table.append(row)
    return table


def report_records(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """One table row per report: every number, its guidance where it sampled, N and the protocol hash."""
    table = []
    for name, report in reports.items():
        size = report.protocol.get("images", {}).get("size")
        row: dict[str, Any] = {"run": name}
        row |= {head(number.quantity(key), size): one.value for key, one in report.items()}
        if sampling := report.protocol.get("sampling"):
            row["guidance"] = sampling["guidance"]["scale"]
        table.append(row | {"N": report.protocol.get("n"), "protocol": report.hash})
    return table


def stage_records(results: Sequence[Result]) -> list[dict[str, str]]:
    """One table row per stage of every recipe that has more than one: what each stage bought."""
    table = []
    for label in labels(results):
        mine = [r for r in results if r.label == label]
        seconds: dict[str, list[float]] = {}
        for s in (s for r in mine for s in r.stages if s.kind == "tokenizer"):
            seconds.setdefault(s.stage, []).append(s.seconds)
        heads = {k: head(q, mine[0].size) for k, q in quantities(TABLE).items()}
        table += [{"row": label, "after stage": name, **cells(after(mine, name), label, heads),
                   "seconds": f"{statistics.fmean(spent):,.0f}"}
                  for name, spent in seconds.items() if len(seconds) > 1]
    return table


def courses(results: Sequence[Result], metric: str) -> list[tuple[Result, course.Course]]:
    """The curve of a number over training of every result that logged it, all under one protocol.

    That of most results' own numbers, else the one that most of them ended with.
    """
    marks = [r.numbers[metric].protocol for r in results if metric in r.numbers]
    protocol = statistics.mode(marks) if marks else None
    one = course.together({f"{i} {r.run}": r.logged for i, r in enumerate(results)}, metric, protocol)
    return [(r, dataclasses.replace(c, run=r.run)) for i, r in enumerate(results)
            if (c := one.get(f"{i} {r.run}"))]


def curve_records(results: Sequence[Result], metric: str) -> list[dict[str, str]]:
    """One table row per label: a number over training, a column per number of images seen; and the images
    until the level that every run reaches, the worst last value, with straight lines between evaluations.
    """
    curves = [(r.label, c) for r, c in courses(results, metric) if c.samples]
    points = sorted({at for _, c in curves for at in c.samples})
    lower = quantities()[metric].better != HIGHER
    level = (max if lower else min)((c.values[-1] for _, c in curves), default=0.0)
    table = []
    for label in dict.fromkeys(label for label, _ in curves):
        mine = [c for name, c in curves if name == label]
        row = {"row": label}
        for at in points:
            values = [c.values[c.samples.index(at)] for c in mine if at in c.samples]
            row[f"{at:,}"] = spread(values) if values else "–"
        if len(points) > 1:
            reached = [convergence.reach(c.samples, c.values, level, lower) for c in mine]
            row[f"images until {primitives.number(level)}"] = spread(reached)
        table.append(row)
    return table


def curve_names(results: Sequence[Result]) -> list[str]:
    """The numbers followed over training that any of these results has logged."""
    return [name for name in quantities(CURVE) if any(r.logged.get(name) for r in results)]

