"""What the finished runs of a folder measured, read from their reports: tables, curves and clouds of points.

Nothing is computed and no model is loaded (:func:`vfmlab.studies.results.scan`). Numbers of different
protocols are never put into one table, one curve or one cloud.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from vfmlab.errors import ConfigError, nearest
from vfmlab.evaluation.number import CURVE, TABLE, Number, groups, quantities, quantity
from vfmlab.plots import primitives
from vfmlab.studies import compare_page
from vfmlab.studies.results import Result, courses, head


def tables(results: Sequence[Result]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(heading, note, rows) of one table per protocol: a row per run, best generation first."""
    made = []
    for part in groups(results):
        named = dict.fromkeys((*quantities(CURVE), *quantities(TABLE)))
        used = [k for k in named if any(k in r.numbers for r in part)]
        one, rows = max(part, key=lambda r: len(r.protocol)), []
        for r in sorted(part, key=_order):
            row: dict[str, Any] = {"run": r.run, "method": r.method, "seed": r.seed}
            row |= {head(quantity(k),
                         one.size): primitives.number(r.numbers[k].value if k in r.numbers else None)
                         for k in used}
            rows.append(row | {"latent": " x ".join(map(str, r.latent)),
                               "seconds": primitives.number(sum(r.seconds.values()))})
        hashes = sorted({str(r.hash) for r in part})
        plural = "s" * (len(part) > 1)
        runs_ = f"{len(part)} run{plural} (protocol {', '.join(hashes)})"
        heading = f"{one.data}, N = {one.protocol.get('n')}, {runs_}"
        made.append((heading, compare_page.note(part, ""), rows))
    return made


def _order(r: Result) -> tuple[float, float, str]:
    gfd, rfd = (r.numbers[k].value if k in r.numbers else math.inf for k in ("gfd", "rfd"))
    return gfd, rfd, r.run


def metrics(results: Sequence[Result]) -> list[str]:
    """Names of all numbers that at least one record has, those of tables first."""
    there = dict.fromkeys(k for r in results for k in (*r.numbers, *r.instruments))
    return list(dict.fromkeys([*(k for k in quantities(TABLE) if k in there), *there]))


class Point(NamedTuple):
    """A run in a cloud."""

    run: str
    method: str
    x: Number
    y: Number


def cloud(results: Sequence[Result], x: str, y: str) -> list[list[Point]]:
    """Points of all records that have both numbers, in lists of one pair of protocols, largest first.

    Raises:
        ConfigError: a number that no record has.
    """
    known = metrics(results)
    for name in (x, y):
        if name not in known:
            raise ConfigError(f"no run here has a number '{name}'{nearest(name, known)}; evaluate the runs "
                              "first: vfmlab eval RUN")
    lists: dict[Any, list[Point]] = {}
    for r in results:
        a, b = r.number(x), r.number(y)
        if a and b:
            lists.setdefault((a.protocol, b.protocol), []).append(Point(r.run, r.method, a, b))
    return sorted(lists.values(), key=len, reverse=True)


def scatter(points: Sequence[Point], x: str, y: str) -> go.Figure:
    """One of :func:`cloud` as a figure; `customdata` is the run's id, the colour its method's."""
    figure = go.Figure()
    for method in dict.fromkeys(p.method for p in points):
        mine = [p for p in points if p.method == method]
        figure.add_scatter(
            x=[p.x.value for p in mine], y=[p.y.value for p in mine], customdata=[p.run for p in mine], name=method, mode="markers",
            marker={"size": 13, "color": primitives.colour(method), "line": {"width": 1, "color": "#fff"}},
            hovertemplate="%{customdata}<br>" + f"{x} %{{x:.4g}}, {y} %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    figure = primitives.framed(figure, quantity(x).head, quantity(y).head, height=400)
    return figure.update_layout(legend={"orientation": "h", "y": -0.22})


def convergence(results: Sequence[Result], metric: str = "gfd") -> go.Figure:
    """A number over the images seen by diffusion, of the runs that share the most common protocol.

    Runs of one method share their colour, seeds their name in the legend; points of other protocols are left
    out, and the title says so.

    Raises:
        ConfigError: not one of the numbers that are followed in training.
    """
    if metric not in quantities(CURVE):
        raise ConfigError(f"'{metric}' is not measured during training{nearest(metric, quantities(CURVE))}")
    figure, names = primitives.curves({}, x="images seen by the diffusion model", y=quantity(metric).head), []
    curves = courses(results, metric)
    for r, c in curves:
        if c.samples:
            variants = list(dict.fromkeys(o.name for o, _ in curves if o.method == r.method))
            dash = ("solid", "dash", "dot", "dashdot", "longdash")[variants.index(r.name) % 5]
            figure.add_scatter(
                x=c.samples, y=c.values, customdata=[r.run] * len(c.samples), name=r.name, legendgroup=r.name, showlegend=r.name not in names,
                mode="lines+markers", line={"color": primitives.colour(r.method), "dash": dash}, hovertemplate="%{customdata}<br>%{y:.4g}<extra></extra>",
            )  # fmt: skip
            names.append(r.name)
    missing = sum(c.left_out for _, c in curves)
    title = f"{missing} points of other protocols, or without one, are left out" if missing else None
    figure.update_layout(title=title and {"text": title, "font": {"size": 12}},
                         margin={"t": 44 if title else 16})
    return figure.update_layout(hovermode="closest", height=400, legend={"orientation": "h", "y": -0.22})
