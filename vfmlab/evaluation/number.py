"""A measured value, from the metric to the page: `Number`; and `Report`, a mapping of them. JSON both ways.

What a number is called, which end of it is good, its unit and the tables it stands in are registered once,
with the metric or instrument that measures it (`Quantity`, in :mod:`vfmlab.evaluation.instruments`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vfmlab.errors import ConfigError, DataError, TrainingError, nearest
from vfmlab.registry import INSTRUMENTS
from vfmlab.runs import RunDir, write_json

LOWER, HIGHER = "lower", "higher"
TABLE, CURVE, TARGET, HEADLINE, LATENT = "table", "curve", "target", "headline", "latent"
VERSION = 2  # of the JSON; 1 had neither label, unit nor direction


class Published(NamedTuple):
    """A correlation with gFID over the tokenizers of a paper, above 0 where a worse gFID goes with more of
    the number. Of 2606.03578 only sizes are known here: the sign is that of its claim."""

    rho: float
    over: str


TOKENIZERS, ENCODERS = "86 tokenizers (arXiv 2606.03578)", "27 encoders in an RAE (arXiv 2605.18324)"


@dataclass(frozen=True)
class Quantity:
    """What is known of a number before it is measured.

    better: HIGHER, LOWER, or None where that is open. shown: TABLE (columns of comparisons and of the
    leaderboard), CURVE (followed over training), TARGET (correlations may be taken with it), HEADLINE (first
    in correlations), LATENT (table of the instruments). many: a list of values, such as a curve over noise.
    definition: one line for readers. apart: every tokenizer has a protocol of its own, so that it stands in
    no table of several runs and does not keep their rows from standing together. published: what others
    report of its correlation with gFID.
    """

    name: str
    label: str = ""
    better: str | None = None
    unit: str = ""
    shown: tuple[str, ...] = ()
    many: bool = False
    definition: str = ""
    apart: bool = False
    published: Published | None = None

    @property
    def title(self) -> str:
        """Label and unit, as in the head of a table: "PSNR (dB)"."""
        return f"{self.label or self.name} ({self.unit})" if self.unit else self.label or self.name

    @property
    def head(self) -> str:
        """Title with an arrow to the good end."""
        return self.title + {HIGHER: " ↑", LOWER: " ↓"}.get(self.better or "", "")


def quantities(*shown: str) -> dict[str, Quantity]:
    """Registered numbers by name, in their instruments' order; with `shown`, those with such a mark."""
    parts = sorted((INSTRUMENTS.get(name) for name in INSTRUMENTS), key=lambda part: part.order)
    return {q.name: q for part in parts for q in part.quantities if not shown or set(shown) & set(q.shown)}


def quantity(name: str) -> Quantity:
    """The registered number of that name, else one without direction or unit."""
    return quantities().get(name) or Quantity(name)


@dataclass(frozen=True)
class Number:
    """One measured value.

    value: None where it could not be had, and then `reason` says why; a list for curves. protocol: hash of
    all that it depends on. n: images or samples. spread: standard deviation (over images, subsets or draws:
    as the metric says; facts["over"] is "images" where it is that of single images around their mean). facts:
    what belongs to it: the axes of a curve ({"sigma": [...]}), chance, the block.
    """

    value: Any
    protocol: str | None = None
    n: int | None = None
    spread: float | None = None
    better: str | None = None
    label: str = ""
    unit: str = ""
    reason: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def absent(self) -> bool:
        return self.value is None

    def as_json(self) -> dict[str, Any]:
        """A flat dict without empty fields; `value` and `protocol` are always there."""
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "facts"}
        return {k: v for k, v in named.items() if v not in (None, "")
                or k in ("value", "protocol")} | dict(self.facts)

    def entry(self) -> dict[str, Any]:
        """:meth:`as_json` without what the registry says of it."""
        return {k: v for k, v in self.as_json().items() if k not in ("better", "label", "unit")}

    @classmethod
    def from_json(cls, name: str, entry: Any) -> Number:
        """The inverse of :meth:`as_json`; the registry adds label, unit and direction where there are none.

        Raises:
            DataError: not an entry of a report.
        """
        if not isinstance(entry, Mapping) or "value" not in entry:
            raise DataError(f"number '{name}' is no entry of a report: {str(entry)[:80]}")
        value, names = entry["value"], {f.name for f in dataclasses.fields(cls)} - {"facts"}
        if isinstance(value, bool) or not (value is None or isinstance(value, int | float | list)):
            raise DataError(f"number '{name}' = {str(value)[:80]}: expected a number, a list or null")
        known = {k: v for k, v in entry.items() if k in names and (v is not None or k == "value")}
        if isinstance(value, int | float) and not math.isfinite(value):
            known |= {"value": None, "reason": f"it came out as {value}"}
        q = quantity(name)
        return cls(**{"better": q.better, "label": q.label or name, "unit": q.unit} | known,
                   facts={k: v for k, v in entry.items() if k not in names})


@dataclass(frozen=True)
class Report(Mapping[str, Number]):
    """Numbers of one run (or network) under one protocol: `report["psnr"].value`.

    kind: "tokenizer", "diffusion", "ar" or "vfm". curves: the numbers whose values are lists. protocols: what
    each hash stands for. hash: of the whole protocol; a number carries that of the part it depends on.
    warnings: lines a reader must know. request: what was asked for, as a digest. instruments: seconds that
    each took. about: what was measured, in words.
    """

    numbers: Mapping[str, Number]
    kind: str = ""
    run: str = ""
    hash: str = ""
    curves: Mapping[str, Number] = field(default_factory=dict)
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    request: str = ""
    instruments: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Number:
        if name not in self.numbers:
            raise KeyError(f"no number '{name}'{nearest(name, self.numbers)}")
        return self.numbers[name]

    def __str__(self) -> str:
        """A line for each number: value and unit, or why there is none."""
        lines = [f"  {name:<28} " + (number.reason or "not measured" if number.absent
                                     else f"{number.value:.4f} {number.unit}".rstrip())
                 for name, number in self.items()]
        return "\n".join([f"{self.run}  protocol {self.hash}", *lines])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # the last line of a notebook's cell

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The whole protocol."""
        return self.protocols.get(self.hash, {})

    def value(self, name: str) -> float | None:
        """The value, or None where it was not measured."""
        return self.numbers[name].value if name in self.numbers else None

    @property
    def measured(self) -> dict[str, Number]:
        """The numbers that have a value."""
        return {name: number for name, number in self.numbers.items() if not number.absent}

    @property
    def missing(self) -> dict[str, str]:
        """The numbers and curves that have none, with the reason."""
        return {k: v.reason or "not measured" for k, v in {**self.numbers, **self.curves}.items() if v.absent}

    def replace(self, **changes: Any) -> Report:
        return dataclasses.replace(self, **changes)

    def only(self, names: Sequence[str]) -> Report:
        """The part with these numbers and curves, and the protocols they use."""
        parts = [{k: v for k, v in group.items() if k in set(names)} for group in (self.numbers, self.curves)]
        used = {number.protocol for group in parts for number in group.values()}
        return self.replace(numbers=parts[0], curves=parts[1],
                            protocols={k: v for k, v in self.protocols.items() if k in used})

    def joined(self, other: Report) -> Report:
        """This report with the numbers of another one of the same subject, which win."""
        groups = ("numbers", "curves", "protocols", "instruments")
        return self.replace(**{name: {**getattr(self, name), **getattr(other, name)} for name in groups})

    def record(self) -> dict[str, Any]:
        """Numbers and curves as entries of one flat JSON record: what is logged during training."""
        return {name: number.entry() for name, number in {**self.numbers, **self.curves}.items()}

    def as_json(self) -> dict[str, Any]:
        """What report.json holds."""
        entries = {name: {k: v.as_json() for k, v in getattr(self, attribute).items()}
                   for name, attribute in (("metrics", "numbers"), ("curves", "curves"))}
        more = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                if f.name not in ("numbers", "curves")}
        return {"version": VERSION, **more, "warnings": list(self.warnings), "protocol": self.protocol,
                **entries}

    @classmethod
    def from_json(cls, data: Any) -> Report:
        """A report of this or an earlier version.

        Raises:
            DataError: no report, or one of a later version.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("metrics"), Mapping):
            raise DataError("not a report: it has no 'metrics'; measure the run anew with vfmlab eval RUN "
                            "--again")
        if data.get("version", 1) not in (1, VERSION):
            raise DataError(f"report of version {data['version']}, this library reads up to {VERSION}; "
                            "update it, or measure anew")
        groups = {k: data.get(k) if isinstance(data.get(k), Mapping) else {}
                  for k in ("metrics", "curves", "protocols", "instruments", "about")}
        numbers, curves = ({k: Number.from_json(k, v) for k, v in groups[name].items()}
                           for name in ("metrics", "curves"))
        whole = data["protocol"] if isinstance(data.get("protocol"), Mapping) else {}
        mark = str(data.get("hash") or "")
        protocols = (groups["protocols"] if mark in groups["protocols"] or not mark
                     else {**groups["protocols"], mark: whole})
        spent = {k: v["seconds"] if isinstance(v, Mapping) else v for k, v in groups["instruments"].items()}
        about = groups["about"] or {k: data[k] for k in ("reference", "representation") if k in data}
        text = {k: str(data.get(k) or "") for k in ("kind", "run", "request")}
        lines = tuple(str(line) for line in data.get("warnings") or ())
        return cls(numbers, hash=mark, curves=curves, protocols=protocols, warnings=lines, seconds=data.get("seconds") or 0.0,
                   instruments=spent, about=about, **text)  # fmt: skip


def read(path: str | Path) -> Report | None:
    """The report in a file; None where there is none, or it is damaged (it is then measured anew)."""
    try:
        return Report.from_json(json.loads(Path(path).read_bytes()))
    except (OSError, DataError, TypeError, KeyError, ValueError, RecursionError):
        return None


def of_run(folder: RunDir) -> Report | None:
    """The report of a run under its own protocol, or None before the first evaluation."""
    return read(folder.path / "report.json")


def save(path: Path, report: Report) -> Report:
    """Write a report; where that fails it comes back with a warning, and the numbers are not lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, report.as_json())
    except (OSError, TrainingError) as error:
        why = f"the report could not be written to '{path}' ({error}); its numbers are only here"
        return report.replace(warnings=(*report.warnings, why))
    return report


class Draft:
    """A report while it is being measured: `add` and `absent` write its numbers, `report` closes it."""

    def __init__(self) -> None:
        self.numbers: dict[str, Number] = {}
        self.curves: dict[str, Number] = {}
        self.protocols: dict[str, dict[str, Any]] = {}

    def add(self, name: str, value: Any, protocol: Any, n: int, spread: float | None = None,
            **facts: Any) -> None:
        """Write a number. protocol: the `Resolved` that it depends on."""
        q = quantity(name)
        self.protocols[protocol.hash] = protocol.as_dict()
        group = self.curves if q.many or isinstance(value, list) else self.numbers
        group[name] = Number(value, protocol.hash, n, spread, q.better, q.label or name, q.unit, facts=facts)

    def mean(self, name: str, values: Any, protocol: Any) -> None:
        """Write the mean of values [N], a number an image; spread: their standard deviation."""
        spread = float(values.std(correction=0))
        self.add(name, float(values.mean()), protocol, len(values), spread, over="images")

    def absent(self, name: str, reason: str) -> None:
        """A number that could not be had is there too, with the reason: never 0, never left out silently."""
        q = quantity(name)
        group = self.curves if q.many else self.numbers
        group[name] = Number(None, better=q.better, label=q.label or name, unit=q.unit, reason=reason)

    def fill(self, names: Sequence[str], reason: str) -> None:
        """Mark those of `names` that were not written as absent."""
        for name in names:
            if name not in self.numbers and name not in self.curves:
                self.absent(name, reason)

    def report(self, **more: Any) -> Report:
        return Report(dict(self.numbers), curves=dict(self.curves), protocols=dict(self.protocols), **more)


# -- orders and groups ---------------------------------------------------------------------------------------


def rank(reports: Mapping[str, Mapping[str, Number]], metric: str,
         protocols: Mapping[str, Any] | None = None) -> list[tuple[str, float]]:
    """Runs from best to worst by one metric: [(name, value)].

    Args:
        reports: name -> report, or its numbers. Runs without the number are left out. protocols: what hashes
            stand for, where the reports do not say.

    Raises:
        ConfigError: unknown metric, one without a good end, or numbers measured under different protocols.
    """
    known = quantities()
    if metric not in known:
        raise ConfigError(f"unknown metric '{metric}'{nearest(metric, known)}")
    numbers = {name: r[metric] for name, r in reports.items() if metric in r and not r[metric].absent}
    if not numbers:
        raise DataError(f"none of the {len(reports)} reports has a value of '{metric}'; evaluate the runs "
                        "first")
    if known[metric].better is None:
        raise ConfigError(f"'{metric}' cannot be ranked: which end of it is good is open")
    (one, first), *rest = numbers.items()
    for other, number in rest:
        if number.protocol != first.protocol:
            both = [getattr(reports[name], "protocols", protocols or {}).get(number.protocol)
                    for name, number in ((one, first), (other, number))]
            why = f": {difference(*both)}" if all(both) else ""
            raise ConfigError(f"'{metric}' of '{one}' (protocol {first.protocol}) and '{other}' (protocol "
                              f"{number.protocol}) cannot be ranked{why}; evaluate both under one protocol")
    return sorted(((k, float(v.value)) for k, v in numbers.items()), key=lambda item: item[1],
                  reverse=known[metric].better == HIGHER)


def groups(results: Sequence[Any]) -> list[list[Any]]:
    """Rows that may stand in one table: no number of two of them was measured under different protocols.

    results: with `numbers` each. Rows without any number are left out.
    """
    apart = {name for name, q in quantities().items() if q.apart}
    parts: list[tuple[dict[str, str | None], list[Any]]] = []
    for result in results:
        hashes = {k: v.protocol for k, v in result.numbers.items() if not v.absent and k not in apart}
        if not hashes:
            continue
        for known, members in parts:
            common = hashes.keys() & known.keys()
            if common and all(hashes[k] == known[k] for k in common):
                known.update(hashes)
                members.append(result)
                break
        else:
            parts.append((dict(hashes), [result]))
    return [members for _, members in parts]


NOT_HASHED = ("source", "accuracy")  # fields of a protocol that are shown, but cannot change a number


def difference(a: Mapping[str, Any], b: Mapping[str, Any], at: str = "") -> str:
    """Fields in which two protocols differ: "sampling.steps 25 / 50"."""
    parts = []
    for key in [*a, *(k for k in b if k not in a)]:
        one, two = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            parts.append(difference(one, two, f"{at}{key}."))
        elif one != two and key not in NOT_HASHED and (at or key not in ("n", "n_real")):
            parts.append(f"{at}{key} {one} / {two}")
    return ", ".join(part for part in parts if part)
