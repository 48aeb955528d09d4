"""Figures of what the instruments say, for any runs side by side: `{name: report}` as :func:`vfmlab.studies.measure.measure` gives it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from vfmlab import config
from vfmlab.evaluation.number import LATENT, Report, quantities
from vfmlab.plots import primitives
from vfmlab.seeding import SampleRandom, derive
from vfmlab.tokenizers.base import Tokenizer

Reports = Mapping[str, Report]


# -- tables -----------------------------------------------------------------------------------------------------------


def numbers(reports: Reports) -> list[dict[str, Any]]:
    """One table row per run. Rows with one mark in the column "protocols" were measured alike; others do not compare."""
    rows, shown = [], quantities(LATENT)
    shared = [key for key in shown if all(report.value(key) is not None for report in reports.values())]
    for name, report in reports.items():
        mark = config.digest([report[key].protocol for key in shared])
        rows.append({"run": name, **{q.title: report.value(key) for key, q in shown.items()}, "protocols": mark})
    return rows


def missing(reports: Reports) -> list[dict[str, str]]:
    """What could not be measured, and why: one row per run and reason."""
    return [{"run": run, "number": key, "reason": why} for run, report in reports.items() for key, why in report.missing.items()]


def _curves(reports: Reports, name: str) -> dict[str, tuple[list, Mapping[str, Any]]]:
    """Values and axes of a curve, for the runs that have it."""
    curves = {run: report.curves.get(name) for run, report in reports.items()}
    return {run: (one.value, one.facts) for run, one in curves.items() if one is not None and not one.absent}


# -- numbers as figures -----------------------------------------------------------------------------------------------


def spectra(reports: Reports) -> go.Figure:
    """Share of the variance in the first k principal channels; all channels alike would be the diagonal."""
    lines = {}
    for run, (values, _) in _curves(reports, "spectrum").items():
        share = list(itertools.accumulate(values))
        lines[run] = ([k / len(share) for k in range(len(share) + 1)], [0.0, *share])
    figure = primitives.curves(lines, x="share of the channels, largest first", y="share of the variance", title="spectrum of the latent")
    return figure.add_trace(go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line={"dash": "dot", "color": "#999"}, showlegend=False))


def sensitivity(reports: Reports) -> go.Figure:
    """CKNNA with the reference on each set of disturbed images; dashed: the reference sees the undisturbed image."""
    lines, dashed = {}, []
    for run, (values, axes) in _curves(reports, "se_cknna_sets").items():
        lines[run] = (axes["sets"], values)
        other = f"{run}, reference undisturbed"
        lines[other] = (axes["sets"], axes["reference_clean"])
        dashed.append(other)
    return primitives.curves(lines, x="images", y="CKNNA", title="agreement with the reference", dashed=dashed)


def factors(reports: Reports) -> go.Figure:
    """R^2 of every true factor of the scene, read linearly from the latent: one row per run."""
    found = _curves(reports, "factors")
    names = list(dict.fromkeys(name for _, axes in found.values() for name in axes["factor"]))
    values = [[dict(zip(axes["factor"], r2, strict=True)).get(name) for name in names] for r2, axes in found.values()]
    cells = [["" if v is None else f"{v:.2f}" for v in row] for row in values]
    figure = primitives.heatmap([[max(v or 0.0, 0.0) for v in row] for row in values], names, list(found), "factor", "", title="R2 of factors")
    return figure.update_traces(text=cells, texttemplate="%{text}", zmin=0, zmax=1).update_layout(height=120 + 44 * len(found), margin={"l": 160})


def segmentation(reports: Reports) -> go.Figure:
    """IoU of the object's mask against the number of labelled images, with the spread over which ones they are."""
    figure = go.Figure()
    for i, (run, report) in enumerate(reports.items()):
        found = {int(k.rpartition("_")[2]): v for k, v in report.measured.items() if k.startswith("segmentation_")}
        shots = sorted(found)
        figure.add_trace(go.Scatter(
            x=shots, y=[found[k].value for k in shots], name=run, mode="lines+markers", line={"color": primitives.colour(run, i)},
            error_y={"type": "data", "array": [found[k].spread for k in shots]},
        ))
    figure.update_xaxes(title="labelled images", type="log")
    figure.update_yaxes(title="IoU")
    return figure.update_layout(template=primitives.TEMPLATE, title="few-label segmentation", height=360, margin={"l": 56, "r": 12, "t": 44, "b": 44})


def rate(reports: Reports) -> go.Figure:
    """Probe accuracy and PSNR against bits per pixel: all channels at fewer bits (solid), fewer channels at 8 bits (dashed)."""
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


# -- images -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_maps(tokenizers: Mapping[str, Tokenizer], images: Tensor) -> go.Figure:
    """The first three principal components of each latent as colours."""
    shown = {"image": images}
    for name, tokenizer in tokenizers.items():
        shown[name] = primitives.pca_maps(tokenizer.encode(images.to(tokenizer.stat_mean.device)).mode().cpu(), images.shape[-1])
    return primitives.rows(shown, title="principal components of the latent")


@torch.no_grad()
def noisy(tokenizers: Mapping[str, Tokenizer], images: Tensor, sigma: float = 0.5, seed: int = 0) -> go.Figure:
    """Images decoded from z + sigma noise, one row per run."""
    shown = {"image": images}
    for name, tokenizer in tokenizers.items():
        where = tokenizer.stat_mean.device
        z = tokenizer.encode(images.to(where)).mode()
        noise = SampleRandom(derive("noisy", seed), range(len(z)), where).randn(*z.shape[1:])
        shown[name] = tokenizer.decode(z + sigma * noise).cpu()
    return primitives.rows(shown, title=f"decoded with noise of {sigma:g} standard deviations")


# -- diffusion --------------------------------------------------------------------------------------------------------


def blocks(report: Report, what: str = "cknna") -> go.Figure:
    """Agreement with the reference ("cknna"), or LDS ("lds"), of every block of a diffusion model at several t."""
    curve = report.curves[f"block_{what}_over_t"]
    times, title = [f"{t:g}" for t in curve.facts["t"]], f"{report.run}: {what.upper()} by block and t"
    return primitives.heatmap(curve.value, times, curve.facts["block"], "t (0 data, 1 noise)", "block", title=title)


def dynamics(course: Mapping[str, Sequence[Any]], title: str = "agreement of the blocks over training") -> go.Figure:
    """Block x samples seen, from :func:`vfmlab.evaluation.instruments.blocks.over_training`."""
    return primitives.heatmap(course["value"], [f"{s:,}" for s in course["samples"]], course["block"], "images seen", "block", title=title)


def time_losses(reports: Reports) -> go.Figure:
    """Error of the predicted velocity over t, one line per diffusion run."""
    lines = {run: (axes["t"], values) for run, (values, axes) in _curves(reports, "velocity_error_over_t").items()}
    return primitives.curves(lines, x="t (0 data, 1 noise)", y="velocity error / target power")
