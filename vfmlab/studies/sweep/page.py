"""The figures of a sweep on one HTML page that needs no network: parallel coordinates, marginal effects, best images, table.

Points whose numbers were measured under different protocols stand in different sections; nothing is ranked across them.
"""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vfmlab import runs
from vfmlab.evaluation.protocol import BETTER, groups
from vfmlab.plots import primitives
from vfmlab.studies.sweep.folder import Folder
from vfmlab.studies.sweep.grid import Grid, Point, Range, show
from vfmlab.training.progress import clock

SHOWN = 6  # numbers on the page where the grid names none
BEST = 6  # pictures
SHADES = [[0, "#bdd7ee"], [0.5, "#2b7bba"], [1, "#062a52"]]  # the best is the darkest, and the worst can still be seen on white
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1b1f23; background: #fff; }
h1 { font-size: clamp(1.2rem, 4vw, 1.6rem); overflow-wrap: anywhere; } h2 { font-size: 1.25rem; margin-top: 2.4rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
p.note { color: #57606a; font-size: .9rem; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #d8dee4; white-space: nowrap; }
.best { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1.2rem; }
figure { margin: 0; } figure img { width: 100%; max-height: 320px; object-fit: contain; object-position: left top; image-rendering: pixelated; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; } code { background: #f6f8fa; padding: 0 .2rem; }
"""
Result = dict[str, Any]


def better(metric: str, grid: Grid, results: Sequence[Result] = ()) -> str | None:
    """Which end of a number is good: as the grid says, as the report said, as the bench knows; None where nobody does."""
    said = next((entry["better"] for r in results if (entry := r["metrics"].get(metric)) and entry.get("better")), None)
    return grid.metrics.get(metric) or said or BETTER.get(metric)


def leading(grid: Grid, results: Sequence[Result]) -> list[str]:
    """The numbers to be shown, the first one first: the objective of a search, those the grid names, else the first there are."""
    there = list(dict.fromkeys(name for r in results for name in r["metrics"]))
    named = [*([grid.search.objective] if grid.search else []), *grid.metrics]
    return list(dict.fromkeys(name for name in named if name in there)) or there[:SHOWN]


def write(grid: Grid, notebook: str, points: Sequence[Point], folders: Mapping[str, Folder], names: Sequence[str], target: Path) -> Path:
    """Write the page. names: what differs between the points."""
    results, failed, still = [], [], 0
    for point in points:
        outcome = folders[point.key].outcome()
        if outcome is None:
            still += 1
        elif outcome["state"] == "failed":
            failed.append((point, outcome["error"]))
        else:
            metrics = {k: v for k, v in outcome["numbers"].items() if v["value"] is not None}
            results.append({"point": point, "metrics": metrics, "seconds": outcome["seconds"], "image": folders[point.key].image})
    said = [f"{len(results)} of {len(points)} points finished"]
    said += [f"{n} {word}" for n, word in ((len(failed), "failed"), (still, "still to be run")) if n]
    if results:
        said.append(f"{clock(statistics.fmean(r['seconds'] for r in results))} a point")
    fixed = grid.fixed()
    held = ", ".join(f"{k} = {show(v)}" for k, v in {**fixed.parameters, **fixed.set}.items() if k != "root")
    body = [f"<h1>{html.escape(notebook)}: a {'search' if grid.search else 'sweep'} over {html.escape(', '.join(names) or 'one point')}</h1>",
            f'<p class="note">{html.escape("; ".join(said))}.{html.escape(f" The same in all: {held}.") if held else ""}</p>']  # fmt: skip
    parts = groups(results)
    drawn = 0
    for i, part in enumerate(parts):
        if len(parts) > 1:
            body.append(f"<h2>Protocol {i + 1} of {len(parts)}</h2>")
        body.append(f'<p class="note">{html.escape(_protocols(part, leading(grid, part)))}</p>')
        for heading, note, content in _sections(grid, part, names):
            if isinstance(content, go.Figure):
                content, drawn = f'<div class="wide">{primitives.fragment(content, first=drawn == 0)}</div>', drawn + 1
            body.append(f'<h2>{heading}</h2><p class="note">{html.escape(note)}</p>{content}')
    silent = [r for r in results if not r["metrics"]]
    if silent:
        body.append(f"<h2>Points without numbers</h2><p>{len(silent)}: end the notebook with <code>vfmlab.studies.sweep.result(...)</code>.</p>")
    if failed:
        rows = [{"point": p.key, **{n: p.values.get(n) for n in names}, "error": error} for p, error in failed]
        body.append(f'<h2>Failed</h2><p class="note">Run them again with --retry.</p>{_table(rows)}')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(notebook)}: sweep</title><style>{STYLE}</style>'
    runs.write_atomic(target, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>')
    return target


def _protocols(part: Sequence[Result], shown: Sequence[str]) -> str:
    """Under what the numbers were measured."""
    ways: dict[str | None, list[str]] = {}
    entries = {k: r["metrics"][k] for r in part for k in shown if k in r["metrics"]}
    for name, entry in entries.items():
        ways.setdefault(entry["protocol"], []).append(f"{name} (N = {entry['n']})" if entry["n"] else name)
    return "; ".join(f"protocol {way}: {', '.join(names)}" if way else f"no protocol given: {', '.join(names)}" for way, names in ways.items()) + "."


def _sections(grid: Grid, part: Sequence[Result], names: Sequence[str]) -> list[tuple[str, str, Any]]:
    """(heading, note, figure or HTML) for points that may be compared."""
    shown = leading(grid, part)
    first, end = shown[0], better(shown[0], grid, part)
    ordered = rank(part, first, end)
    varied = [n for n in names if len({show(r["point"].values.get(n)) for r in part}) > 1]
    way = f"{first}, {'higher' if end == 'higher' else 'lower'} is better" if end else f"{first} (which end is good was not said)"
    found: list[tuple[str, str, Any]] = []
    if len(part) > 1 and varied:
        found.append(("All points", f"One line per point, coloured by {way}. Drag along an axis to choose.", parallel(part, varied, shown, end)))
        found.append(("What each setting does", "One dot per point; the line joins the means over all other settings.", marginal(part, varied, shown, grid)))
    if grid.search and len(part) > 1:
        found.append(("Course of the search", f"{first} of each point and the best so far.", course(part, first, end)))
    pictures = [r for r in ordered if r["image"].exists()][:BEST]
    if pictures:
        cards = "".join(_card(r, [n for n in names if n in varied] or names, shown) for r in pictures)
        found.append(("Best images" if end else "Images", f"By {way}." if end else "In the order of the grid.", f'<div class="best">{cards}</div>'))
    rows = []
    for r in ordered:
        numbers = {k: r["metrics"].get(k, {}).get("value") for k in shown}
        rows.append({"point": r["point"].key, **{n: r["point"].values.get(n) for n in names}, **numbers, "seconds": r["seconds"]})
    found.append(("Numbers", f"Ordered by {way}." if end else "In the order of the grid.", _table(rows)))
    return found


def rank(part: Sequence[Result], metric: str, end: str | None) -> list[Result]:
    """Best first; points without the number last; in their own order where no end is good."""
    if end is None:
        return list(part)
    having = sorted((r for r in part if metric in r["metrics"]), key=lambda r: r["metrics"][metric]["value"], reverse=end == "higher")
    return having + [r for r in part if metric not in r["metrics"]]


def _scale(values: Sequence[Any]) -> tuple[list[float], list[str] | None]:
    """Positions of values on an axis, and its ticks where they are no numbers."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return [float(v) for v in values], None
    ticks = sorted({show(v) if v is not None else "–" for v in values})
    return [float(ticks.index(show(v) if v is not None else "–")) for v in values], ticks


def _short(text: str, length: int) -> str:
    """The end of it, which tells dotted names apart."""
    return text if len(text) <= length else "…" + text[1 - length :]


def parallel(part: Sequence[Result], names: Sequence[str], shown: Sequence[str], end: str | None) -> go.Figure:
    """Parallel coordinates: settings, then numbers. Points that lack a number are left out. end: of the first number."""
    whole = [r for r in part if all(k in r["metrics"] for k in shown)]
    axes = []
    for name in names:
        at, ticks = _scale([r["point"].values.get(name) for r in whole])
        axis = {"label": _short(name, 22), "values": at}
        if ticks:
            axis |= {"tickvals": list(range(len(ticks))), "ticktext": [_short(tick, 18) for tick in ticks]}
        elif len(set(at)) <= 8:
            axis["tickvals"] = sorted(set(at))
        axes.append(axis)
    axes += [{"label": k, "values": [r["metrics"][k]["value"] for r in whole]} for k in shown]
    colours = [r["metrics"][shown[0]]["value"] for r in whole]
    line = {"color": colours, "colorscale": SHADES, "reversescale": end == "lower", "showscale": True, "colorbar": {"title": {"text": shown[0]}, "thickness": 12}}
    figure = go.Figure(go.Parcoords(dimensions=axes, line=line, labelangle=-12 if len(axes) > 5 else 0, unselected={"line": {"opacity": 0.1}}))
    return figure.update_layout(template=primitives.TEMPLATE, height=440, width=max(700, 150 * len(axes)), margin={"l": 96, "r": 24, "t": 84, "b": 36})


def marginal(part: Sequence[Result], names: Sequence[str], shown: Sequence[str], grid: Grid) -> go.Figure:
    """Each number over each setting: dots are points, the line joins means."""
    gaps = {"horizontal_spacing": min(0.05, 0.3 / len(names)), "vertical_spacing": min(0.08, 0.3 / len(shown))}
    sheet = make_subplots(rows=len(shown), cols=len(names), shared_yaxes=True, **gaps)
    ranges = {name for (_, name), values in grid.axes().items() if isinstance(values, Range)}
    for i, metric in enumerate(shown):
        having = [r for r in part if metric in r["metrics"]]
        y, hover = [r["metrics"][metric]["value"] for r in having], [r["point"].label() for r in having]
        for k, name in enumerate(names):
            cell = {"row": i + 1, "col": k + 1}
            x = [r["point"].values.get(name) for r in having]
            axis: dict[str, Any] = {"type": "linear"}
            if _scale(x)[1] is not None:
                x, axis = [show(v) if v is not None else "–" for v in x], {"type": "category"}
            dots = {"color": primitives.PALETTE[i % len(primitives.PALETTE)], "opacity": 0.55, "size": 8}
            tip = "%{text}<br>%{y:.4g}<extra></extra>"
            sheet.add_trace(go.Scatter(x=x, y=y, mode="markers", marker=dots, text=hover, hovertemplate=tip, showlegend=False), **cell)
            seen = list(dict.fromkeys(x)) if axis["type"] == "category" else sorted(set(x))
            if name not in ranges:
                means = [statistics.fmean(b for a, b in zip(x, y, strict=True) if a == v) for v in seen]
                look = {"line": {"color": "#1b1f23", "width": 1.5}, "marker": {"symbol": "line-ew-open", "size": 14}}
                sheet.add_trace(go.Scatter(x=seen, y=means, mode="lines+markers", hoverinfo="skip", showlegend=False, **look), **cell)
            if axis["type"] == "linear" and _spread(seen):
                axis["type"] = "log"
            if name not in ranges and len(seen) <= 8:
                axis |= {"tickvals": seen, "ticktext": [_short(str(v), 14) for v in seen]}
            sheet.update_xaxes(title_text=name if i == len(shown) - 1 else None, **axis, **cell)
        sheet.update_yaxes(title_text=metric, row=i + 1, col=1)
    size = {"height": 60 + 210 * len(shown), "width": max(520, 90 + 300 * len(names))}
    return sheet.update_layout(template=primitives.TEMPLATE, margin={"l": 72, "r": 16, "t": 20, "b": 52}, **size)


def _spread(values: Sequence[float]) -> bool:
    """Whether positive values span two decades, so that an axis should be logarithmic."""
    return min(values) > 0 and max(values) / min(values) >= 100


def course(part: Sequence[Result], metric: str, end: str | None) -> go.Figure:
    """A number over the points of a search, in the order in which they were drawn."""
    values = [r["metrics"][metric]["value"] for r in part if metric in r["metrics"]]
    choose = max if end == "higher" else min
    best = [choose(values[: i + 1]) for i in range(len(values))]
    steps = list(range(1, len(values) + 1))
    figure = primitives.curves({"best so far": (steps, best)}, x="point", y=metric)
    figure.update_traces(mode="lines", line_shape="hv")
    return figure.add_trace(go.Scatter(x=steps, y=values, mode="markers", name="point", marker={"color": primitives.PALETTE[1], "size": 8}))


def _card(result: Result, names: Sequence[str], shown: Sequence[str]) -> str:
    data = base64.b64encode(result["image"].read_bytes()).decode()
    numbers = ", ".join(f"{k} {primitives.number(result['metrics'][k]['value'])}" for k in shown[:3] if k in result["metrics"])
    given = result["point"].label(names) or result["point"].key
    return (f"<figure><img alt='{html.escape(given, quote=True)}' src='data:image/png;base64,{data}'>"
            f"<figcaption><b>{html.escape(numbers)}</b><br>{html.escape(given)}<br><code>{result['point'].key}</code></figcaption></figure>")  # fmt: skip


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return html.escape(primitives.number(value) if value is None or isinstance(value, int | float | str) else show(value))

    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{cell(row.get(c))}</td>' for c in columns)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'
