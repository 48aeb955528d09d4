"""Figures of what the instruments measure, runs side by side: name -> `vfmlab.studies.measure.measure`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from vfmlab import config
from vfmlab.evaluation.number import LATENT, Report, quantities
from vfmlab.plots import primitives

Reports = Mapping[str, Report]


# -- tables ----------------------------------------------------------------------


def numbers(reports: Reports) -> list[dict[str, Any]]:
    """One table row per run. Only rows with one mark in the column "protocols" compare."""
    rows, shown = [], quantities(LATENT)
    shared = [key for key in shown if all(report.value(key) is not None for report in reports.values())]
    for name, report in reports.items():
        mark = config.digest([report[key].protocol for key in shared])
        numbers = {q.title: report.value(key) for key, q in shown.items()}
        rows.append({"run": name, **numbers, "protocols": mark})
    return rows


def missing(reports: Reports) -> list[dict[str, str]]:
    """What could not be measured, and why: one row per run and reason."""
    every = [(run, key, why) for run, report in reports.items() for key, why in report.missing.items()]
    return [{"run": run, "number": key, "reason": why} for run, key, why in every]


def _curves(reports: Reports, name: str) -> dict[str, tuple[list, Mapping[str, Any]]]:
    """Values and axes of a curve, for the runs that have it."""
    curves = {run: report.curves.get(name) for run, report in reports.items()}
    return {run: (one.value, one.facts) for run, one in curves.items() if one is not None and not one.absent}


# -- numbers as figures ----------------------------------------------------------------------


def spectra(reports: Reports) -> go.Figure:
    """Share of the variance in the first k principal channels; all channels alike would be the diagonal."""
    lines = {}
    for run, (values, _) in _curves(reports, "spectrum").items():
        share = list(itertools.accumulate(values))
        lines[run] = ([k / len(share) for k in range(len(share) + 1)], [0.0, *share])
    figure = primitives.curves(lines, x="share of the channels, largest first", y="share of the variance",
                               title="spectrum of the latent")
    line = {"dash": "dot", "color": "#999"}
    return figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, showlegend=False)


def sensitivity(reports: Reports) -> go.Figure:
    """CKNNA with the reference on each set of disturbed images; dashed: the reference undisturbed."""
    lines, dashed = {}, []
    for run, (values, axes) in _curves(reports, "se_cknna_sets").items():
        lines[run] = (axes["sets"], values)
        other = f"{run}, reference undisturbed"
        lines[other] = (axes["sets"], axes["reference_clean"])
        dashed.append(other)
    return primitives.curves(lines, x="images", y="CKNNA", title="agreement with the reference",
                             dashed=dashed)


def factors(reports: Reports) -> go.Figure:
    """R^2 of every true factor of the scene, read linearly from the latent: one row per run."""
    curves = _curves(reports, "factors")
    names = list(dict.fromkeys(name for _, axes in curves.values() for name in axes["factor"]))
    table = [dict(zip(axes["factor"], r2, strict=True)) for r2, axes in curves.values()]
    shades = [[max(row.get(name) or 0.0, 0.0) for name in names] for row in table]
    cells = [["" if row.get(name) is None else f"{row[name]:.2f}" for name in names] for row in table]
    figure = primitives.heatmap(shades, names, list(curves), "factor", "", title="R2 of factors")
    figure.update_traces(text=cells, texttemplate="%{text}", zmin=0, zmax=1)
    return figure.update_layout(height=120 + 44 * len(curves), margin={"l": 160})


def segmentation(reports: Reports) -> go.Figure:
    """IoU of the object's mask against the number of labelled images, with the spread over draws."""
    figure = go.Figure()
    for i, (run, report) in enumerate(reports.items()):
        measured = [(k, v) for k, v in report.measured.items() if k.startswith("segmentation_")]
        values = sorted((int(k.rpartition("_")[2]), v.value, v.spread) for k, v in measured)
        shots, iou, spread = zip(*values, strict=True) if values else ((), (), ())
        line, error = {"color": primitives.colour(run, i)}, {"type": "data", "array": spread}
        figure.add_scatter(x=shots, y=iou, name=run, mode="lines+markers", line=line, error_y=error)
    figure.update_xaxes(type="log", tickvals=sorted({shots for one in figure.data for shots in one.x}))
    return primitives.framed(figure, "labelled images", "IoU", "few-label segmentation")


def rate(reports: Reports) -> go.Figure:
    """Probe accuracy and PSNR against bits per pixel: fewer bits (solid), fewer channels (dashed)."""
    parts = []
    for key, y in (("probe", "probe accuracy"), ("psnr", "PSNR (dB)")):
        lines, dashed = {}, []
        for run, (every, _) in _curves(reports, "rate").items():
            points = [p for p in every if p[key] is not None]
            whole = max(p["channels"] for p in every)
            all_channels = [p for p in points if p["channels"] == whole]
            fewer = sorted((p for p in points if p["bits"] == 8), key=lambda p: p["bpp"])
            for name, chosen in ((run, all_channels), (f"{run}, fewer channels", fewer)):
                if chosen:
                    lines[name] = tuple(zip(*((p["bpp"], p[key]) for p in chosen), strict=True))
            dashed.append(f"{run}, fewer channels")
        parts.append(primitives.curves(lines, x="bits per pixel", y=y, title=y, dashed=dashed))
    return primitives.panels(parts)


def robustness(reports: Reports) -> go.Figure:
    """PSNR and distance in the reference's features of decoding z + sigma noise, against sigma."""
    parts = []
    for key, y in (("robust_psnr", "PSNR (dB)"), ("robust_feature_distance", "1 - cosine of features")):
        lines = {run: (axes["sigma"], values) for run, (values, axes) in _curves(reports, key).items()}
        parts.append(primitives.curves(lines, x="noise on z (standard deviations)", y=y, title=y))
    return primitives.panels(parts)


def few_steps(reports: Reports) -> go.Figure:
    """gFD of the same noise against the sampler's steps, of generators."""
    curves = _curves(reports, "gfd_over_steps")
    lines = {run: (axes["steps"], values) for run, (values, axes) in curves.items()}
    figure = primitives.curves(lines, x="steps", y="gFD", title="samples in few steps")
    return figure.update_xaxes(type="log", dtick="D1")
