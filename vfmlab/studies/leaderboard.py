"""What the finished runs of a folder measured, read from their reports: tables, curves and clouds of points.

Nothing is computed and no model is loaded. Numbers of different protocols are never put into one table or one cloud.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from vfmlab import runs
from vfmlab.errors import ConfigError, VfmlabError, nearest
from vfmlab.evaluation.protocol import groups
from vfmlab.plots import primitives
from vfmlab.studies import compare_page
from vfmlab.studies.results import CURVES, METRICS, Result, arrow


def collect(root: str | Path, every_phase: bool = False) -> list[Result]:
    """One record per run that was measured, in the form of :mod:`vfmlab.studies.results`.

    A diffusion run carries the numbers of its tokenizer too, and what was measured during its training as "curve"; one without a
    report has that curve alone. Runs that another one was built on are left out unless `every_phase`. Beside the fields of a
    comparison: "name", "method", "kind", "instruments" (like "metrics", of the tokenizer and its own).
    """
    folders = {folder.id: folder for folder in runs.scan(root)}
    found, parents = [], set()
    for folder in folders.values():
        try:
            run, report = folder.config(), folder.report()
        except VfmlabError:
            continue  # of another version of the library; the list of runs names it
        if run.tokenizer is None:
            continue
        curve = [] if run.diffusion is None else [_flat(r) for r in folder.metrics("evaluation")]
        if not _usable(report) and not curve:
            continue
        if run.parent is not None:
            parents.add(run.parent)
        below = None if run.diffusion is None else folders.get(run.parent)
        reports = [r for r in (below.report() if below else None, report) if _usable(r)] if _usable(report) else []
        metrics, absent = {}, {}
        for one in reports:
            metrics |= {k: {"value": v["value"], "protocol": v["protocol"], "n": v["n"]} for k, v in one["metrics"].items() if v.get("value") is not None}
            # why, without what to do about it on this machine
            absent |= {k: v.get("reason", "").partition(";")[0].partition(" (")[0] for k, v in one["metrics"].items() if v.get("value") is None}
        side = run.data.size // run.tokenizer.factor
        found.append({
            "label": folder.id, "seed": run.seed, "run": folder.id, "name": run.name, "method": run.tokenizer.method, "kind": run.kind,
            "data": f"{run.data.source.partition(':')[0]}:{Path(run.data.source.partition(':')[2]).name}, {run.data.size} px",
            "hash": report["hash"] if _usable(report) else None, "protocol": report["protocol"] if _usable(report) else None,
            "metrics": metrics, "absent": absent, "stages": [], "curve": curve,
            "seconds": {k: round(f.status().seconds, 1) for k, f in (("tokenizer", folder if run.diffusion is None else below), ("diffusion", folder))
                        if f is not None and (k == run.kind or k == "tokenizer")},
            "parameters": None, "latent": [run.tokenizer.channels, side, side], "failed": None, "instruments": _instruments(folder, below),
        })  # fmt: skip
    return found if every_phase else [r for r in found if r["run"] not in parents]


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v.get("value") if isinstance(v, dict) else v for k, v in record.items()}


def _usable(report: Any) -> bool:
    return isinstance(report, dict) and isinstance(report.get("metrics"), dict) and "hash" in report and "protocol" in report


def _instruments(*folders: runs.RunDir | None) -> dict[str, dict[str, Any]]:
    """Numbers of the instruments kept beside runs; the newest measurement of each."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for path in sorted(() if folder is None else (folder.path / "instruments").glob("*.json"), key=lambda p: p.stat().st_mtime):
            try:
                report = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            entries = report.get("metrics", {}) if isinstance(report, dict) else {}
            found |= {k: {"value": v["value"], "protocol": v["protocol"], "n": v.get("n")} for k, v in entries.items() if v.get("value") is not None}
    return found


def tables(results: Sequence[Result]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(heading, note, rows), one table per protocol: a row per run with its numbers, best generation first where there is one."""
    found = []
    for part in groups(results):
        used = [k for k in (*CURVES, *(k for k in METRICS if k not in CURVES)) if any(k in r["metrics"] for r in part)]
        last = float("inf")
        order = sorted(part, key=lambda r: (r["metrics"].get("gfd", {}).get("value", last), r["metrics"].get("rfd", {}).get("value", last), r["run"]))
        rows = []
        for r in order:
            row: dict[str, Any] = {"run": r["run"], "method": r["method"], "seed": r["seed"]}
            row |= {f"{METRICS[k]} {arrow(k)}": primitives.number(r["metrics"].get(k, {}).get("value")) for k in used}
            rows.append(row | {"latent": " x ".join(map(str, r["latent"])), "seconds": primitives.number(sum(r["seconds"].values()))})
        hashes = sorted({r["hash"] for r in part})
        one = max(part, key=lambda r: len(r["protocol"]))
        heading = f"{one['data']}, N = {one['protocol']['n']}, {len(part)} run{'s' * (len(part) > 1)} (protocol {', '.join(hashes)})"
        found.append((heading, compare_page.note(part).replace(" Cells: mean (each seed); bold: best mean.", ""), rows))
    return found


def metrics(results: Sequence[Result]) -> list[str]:
    """Names of all numbers that at least one record has, reports' first."""
    ours = [k for k in METRICS if any(k in r["metrics"] for r in results)]
    others = dict.fromkeys(k for r in results for k in (*r["metrics"], *r["instruments"]) if k not in METRICS)
    return [*ours, *others]


def cloud(results: Sequence[Result], x: str, y: str) -> list[list[dict[str, Any]]]:
    """Points {"run", "method", x, y, "protocols"} of all records that have both numbers, in lists of one pair of protocols, largest first.

    Raises:
        ConfigError: a number that no record has.
    """
    known = metrics(results)
    for name in (x, y):
        if name not in known:
            raise ConfigError(f"no run here has a number '{name}'{nearest(name, known)}; evaluate the runs first: vfmlab eval RUN")
    lists: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in results:
        a, b = (r["metrics"].get(name) or r["instruments"].get(name) for name in (x, y))
        if a and b:
            pair = (a["protocol"], b["protocol"])
            lists.setdefault(pair, []).append({"run": r["run"], "method": r["method"], x: a["value"], y: b["value"], "n": (a["n"], b["n"]), "protocols": pair})
    return sorted(lists.values(), key=len, reverse=True)


def scatter(points: Sequence[Mapping[str, Any]], x: str, y: str) -> go.Figure:
    """One cloud of :func:`cloud` as a figure; a point's `customdata` is its run's id, its colour that of its method."""
    figure = go.Figure()
    for method in dict.fromkeys(p["method"] for p in points):
        mine = [p for p in points if p["method"] == method]
        figure.add_trace(go.Scatter(
            x=[p[x] for p in mine], y=[p[y] for p in mine], customdata=[p["run"] for p in mine], name=method, mode="markers",
            marker={"size": 13, "color": primitives.colour(method), "line": {"width": 1, "color": "#fff"}},
            hovertemplate="%{customdata}<br>" + f"{x} %{{x:.4g}}, {y} %{{y:.4g}}<extra></extra>",
        ))  # fmt: skip
    titles = [f"{METRICS.get(name, name)} {arrow(name)}" if name in METRICS else name for name in (x, y)]
    figure.update_xaxes(title=titles[0])
    figure.update_yaxes(title=titles[1])
    return figure.update_layout(template=primitives.TEMPLATE, height=400, margin={"l": 56, "r": 12, "t": 16, "b": 44}, legend={"orientation": "h", "y": -0.22})


def convergence(results: Sequence[Result], metric: str = "gfd") -> go.Figure:
    """A metric over the images that the diffusion model saw; runs of one method share their colour, seeds their name in the legend.

    Raises:
        ConfigError: not one of the metrics that are followed in training.
    """
    if metric not in CURVES:
        raise ConfigError(f"'{metric}' is not measured during training{nearest(metric, CURVES)}")
    figure, names = primitives.curves({}, x="images seen by the diffusion model", y=f"{METRICS[metric]} {arrow(metric)}"), []
    for r in results:
        points = [(p["samples"], p[metric]) for p in r["curve"] if isinstance(p.get(metric), int | float)]
        if points:
            xs, ys = zip(*points, strict=True)
            variants = list(dict.fromkeys(o["name"] for o in results if o["method"] == r["method"] and o["curve"]))
            dash = ("solid", "dash", "dot", "dashdot", "longdash")[variants.index(r["name"]) % 5]
            figure.add_trace(go.Scatter(
                x=xs, y=ys, customdata=[r["run"]] * len(xs), name=r["name"], legendgroup=r["name"], showlegend=r["name"] not in names,
                mode="lines+markers", line={"color": primitives.colour(r["method"]), "dash": dash}, hovertemplate="%{customdata}<br>%{y:.4g}<extra></extra>",
            ))  # fmt: skip
            names.append(r["name"])
    return figure.update_layout(hovermode="closest", height=400, legend={"orientation": "h", "y": -0.22})
