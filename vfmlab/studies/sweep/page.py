"""The page of a sweep: parallel coordinates, what each setting does, best images, table.

Points of different protocols stand in different sections; nothing is ranked across them.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vfmlab.evaluation.number import HIGHER, LOWER, Number, groups, quantity
from vfmlab.plots import primitives
from vfmlab.studies.page import Page, Picture
from vfmlab.studies.sweep.folder import Folder
from vfmlab.studies.sweep.grid import Grid, Point, Range, show
from vfmlab.studies.sweep.outputs import numbers
from vfmlab.training.progress import clock

SHOWN = 6  # numbers on the page where the grid names none
BEST = 6  # pictures
# the best is the darkest, and the worst can still be seen on white
SHADES = [[0, "#bdd7ee"], [0.5, "#2b7bba"], [1, "#062a52"]]


@dataclass(frozen=True)
class Outcome:
    """A finished point with its numbers. image: its picture, which may not exist."""

    point: Point
    numbers: Mapping[str, Number]
    seconds: float = 0.0
    image: Path = field(default_factory=Path)

    def value(self, name: str) -> float | None:
        return self.numbers[name].value if name in self.numbers else None


def better(metric: str, grid: Grid, results: Sequence[Outcome] = ()) -> str | None:
    """The good end of a number: as the grid says, else the report, else the registry; or None."""
    reported = next((r.numbers[metric].better for r in results if metric in r.numbers), None)
    return grid.metrics.get(metric) or reported or quantity(metric).better


def leading(grid: Grid, results: Sequence[Outcome]) -> list[str]:
    """The numbers to show: the objective of a search, those the grid names, else the first ones."""
    there = list(dict.fromkeys(name for r in results for name in r.numbers))
    named = [*([grid.search.objective] if grid.search else []), *grid.metrics]
    return list(dict.fromkeys(name for name in named if name in there)) or there[:SHOWN]


def write(grid: Grid, notebook: str, points: Sequence[Point], folders: Mapping[str, Folder],
          names: Sequence[str], target: Path) -> Path:
    """Write the page. names: what differs between the points."""
    results, failed, still = [], [], 0
    for point in points:
        outcome = folders[point.key].outcome()
        if outcome is None:
            still += 1
        elif outcome["state"] == "failed":
            failed.append({"point": point.key, **{n: point.values.get(n) for n in names},
                           "error": outcome["error"]})
        else:
            measured = {k: v for k, v in numbers(outcome).items() if not v.absent}
            results.append(Outcome(point, measured, outcome["seconds"], folders[point.key].image))
    counts = [f"{len(results)} of {len(points)} points finished"]
    counts += [f"{n} {word}" for n, word in ((len(failed), "failed"), (still, "still to be run")) if n]
    counts += [f"{clock(statistics.fmean(r.seconds for r in results))} a point"] if results else []
    fixed = grid.fixed()
    same = ", ".join(f"{k} = {show(v)}" for k, v in {**fixed.parameters, **fixed.set}.items() if k != "root")
    lead = "; ".join(counts) + "." + (f" The same in all: {same}." if same else "")
    page = Page(f"{notebook}: a {'search' if grid.search else 'sweep'} over "
                f"{', '.join(names) or 'one point'}", lead=lead)
    parts = groups(results)
    for i, part in enumerate(parts):
        heading = f"Protocol {i + 1} of {len(parts)}" if len(parts) > 1 else ""
        page.add(heading, _protocols(part, leading(grid, part)))
        _sections(page, grid, part, names)
    if silent := sum(not r.numbers for r in results):
        page.add("Points without numbers",
                 f"{silent}: end the notebook with vfmlab.studies.sweep.result(...).")
    if failed:
        page.add("Failed", "Run them again with --retry.", primitives.table(failed))
    return page.write(target)


def _protocols(part: Sequence[Outcome], shown: Sequence[str]) -> str:
    """Under what the numbers were measured."""
    ways: dict[str | None, list[str]] = {}
    for name, one in {k: r.numbers[k] for r in part for k in shown if k in r.numbers}.items():
        ways.setdefault(one.protocol, []).append(f"{name} (N = {one.n})" if one.n else name)
    texts = {way: ", ".join(names) for way, names in ways.items()}
    return "; ".join(f"protocol {way}: {text}" if way else f"no protocol given: {text}"
                     for way, text in texts.items()) + "."


def _sections(page: Page, grid: Grid, part: Sequence[Outcome], names: Sequence[str]) -> None:
    """Figures, pictures and the table of points that may be compared."""
    shown = leading(grid, part)
    first, end = shown[0], better(shown[0], grid, part)
    ordered = rank(part, first, end)
    varied = [n for n in names if len({show(r.point.values.get(n)) for r in part}) > 1]
    way = f"{first}, {end} is better" if end else f"{first} (which end is good was not said)"
    order = "In the order of the grid."
    if len(part) > 1 and varied:
        note = f"One line per point, coloured by {way}. Drag along an axis to choose."
        page.add("All points", note, parallel(part, varied, shown, end))
        note = "One dot per point; the line joins the means over all other settings."
        page.add("What each setting does", note, marginal(part, varied, shown, grid))
    if grid.search and len(part) > 1:
        page.add("Course of the search", f"{first} of each point and the best so far.",
                 course(part, first, end))
    if pictures := [r for r in ordered if r.image.is_file()][:BEST]:
        cards = [_card(r, [n for n in names if n in varied] or names, shown) for r in pictures]
        page.add("Best images" if end else "Images", f"By {way}." if end else order, cards)
    rows = [{"point": r.point.key, **{n: r.point.values.get(n) for n in names},
             **{k: r.value(k) for k in shown}, "seconds": r.seconds} for r in ordered]
    page.add("Numbers", f"Ordered by {way}." if end else order, primitives.table(rows))


def rank(part: Sequence[Outcome], metric: str, end: str | None) -> list[Outcome]:
    """Best first; points without the number last; in their own order where no end is good."""
    if end is None:
        return list(part)
    having = sorted((r for r in part if metric in r.numbers), key=lambda r: r.value(metric),
                    reverse=end == HIGHER)
    return having + [r for r in part if metric not in r.numbers]


def _scale(values: Sequence[Any]) -> tuple[list[float], list[str] | None]:
    """Positions of values on an axis, and its ticks where they are no numbers."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return [float(v) for v in values], None
    ticks = sorted({show(v) if v is not None else "–" for v in values})
    return [float(ticks.index(show(v) if v is not None else "–")) for v in values], ticks


def _short(text: str, length: int) -> str:
    """The end of it, by which dotted names differ."""
    return text if len(text) <= length else "…" + text[1 - length :]


def parallel(part: Sequence[Outcome], names: Sequence[str], shown: Sequence[str],
             end: str | None) -> go.Figure:
    """Parallel coordinates: settings, then numbers, of points that have all. end: of the first number."""
    whole = [r for r in part if all(k in r.numbers for k in shown)]
    axes = []
    for name in names:
        at, ticks = _scale([r.point.values.get(name) for r in whole])
        axis = {"label": _short(name, 22), "values": at}
        if ticks:
            axis |= {"tickvals": list(range(len(ticks))), "ticktext": [_short(tick, 18) for tick in ticks]}
        elif len(set(at)) <= 8:
            axis["tickvals"] = sorted(set(at))
        axes.append(axis)
    axes += [{"label": k, "values": [r.value(k) for r in whole]} for k in shown]
    colours = [r.value(shown[0]) for r in whole]
    line = {"color": colours, "colorscale": SHADES, "reversescale": end == LOWER, "showscale": True,
            "colorbar": {"title": {"text": shown[0]}, "thickness": 12}}
    figure = go.Figure(go.Parcoords(dimensions=axes, line=line, labelangle=-12 if len(axes) > 5 else 0,
                                    unselected={"line": {"opacity": 0.1}}))
    size = {"height": 440, "width": max(700, 150 * len(axes)), "margin": {"l": 96, "r": 24, "t": 84, "b": 36}}
    return figure.update_layout(template=primitives.TEMPLATE, **size)


def marginal(part: Sequence[Outcome], names: Sequence[str], shown: Sequence[str], grid: Grid) -> go.Figure:
    """Each number over each setting: dots are points, the line joins means."""
    gaps = {"horizontal_spacing": min(0.05, 0.3 / len(names)),
            "vertical_spacing": min(0.08, 0.3 / len(shown))}
    sheet = make_subplots(rows=len(shown), cols=len(names), shared_yaxes=True, **gaps)
    ranges = {name for (_, name), values in grid.axes().items() if isinstance(values, Range)}
    for i, metric in enumerate(shown):
        having = [r for r in part if metric in r.numbers]
        y, hover = [r.value(metric) for r in having], [r.point.label() for r in having]
        for k, name in enumerate(names):
            cell = {"row": i + 1, "col": k + 1}
            x = [r.point.values.get(name) for r in having]
            axis: dict[str, Any] = {"type": "linear"}
            if _scale(x)[1] is not None:
                x, axis = [show(v) if v is not None else "–" for v in x], {"type": "category"}
            dots = {"color": primitives.PALETTE[i % len(primitives.PALETTE)], "opacity": 0.55, "size": 8}
            sheet.add_scatter(x=x, y=y, mode="markers", marker=dots, text=hover, showlegend=False,
                              hovertemplate="%{text}<br>%{y:.4g}<extra></extra>", **cell)
            seen = list(dict.fromkeys(x)) if axis["type"] == "category" else sorted(set(x))
            if name not in ranges:
                means = [statistics.fmean(b for a, b in zip(x, y, strict=True) if a == v) for v in seen]
                sheet.add_scatter(x=seen, y=means, mode="lines+markers", hoverinfo="skip", showlegend=False,
                                  line={"color": "#1b1f23", "width": 1.5},
                                  marker={"symbol": "line-ew-open", "size": 14}, **cell)
            if axis["type"] == "linear" and min(seen) > 0 and max(seen) / min(seen) >= 100:
                axis["type"] = "log"  # two decades or more
            if name not in ranges and len(seen) <= 8:
                axis |= {"tickvals": seen, "ticktext": [_short(str(v), 14) for v in seen]}
            sheet.update_xaxes(title_text=name if i == len(shown) - 1 else None, **axis, **cell)
        sheet.update_yaxes(title_text=metric, row=i + 1, col=1)
    size = {"height": 60 + 210 * len(shown), "width": max(520, 90 + 300 * len(names))}
    return sheet.update_layout(template=primitives.TEMPLATE, margin={"l": 72, "r": 16, "t": 20, "b": 52},
                               **size)


def course(part: Sequence[Outcome], metric: str, end: str | None) -> go.Figure:
    """A number over the points of a search, in the order in which they were drawn."""
    values = [r.value(metric) for r in part if metric in r.numbers]
    best = list(itertools.accumulate(values, max if end == HIGHER else min))
    steps = list(range(1, len(values) + 1))
    figure = primitives.curves({"best so far": (steps, best)}, x="point", y=metric)
    figure.update_traces(mode="lines", line_shape="hv")
    return figure.add_scatter(x=steps, y=values, mode="markers", name="point",
                              marker={"color": primitives.PALETTE[1], "size": 8})


def _card(result: Outcome, names: Sequence[str], shown: Sequence[str]) -> Picture:
    values = ", ".join(f"{k} {primitives.number(result.value(k))}" for k in shown[:3] if k in result.numbers)
    label = result.point.label(names) or result.point.key
    return Picture(result.image, f"{label} ({result.point.key})", bold=values)
