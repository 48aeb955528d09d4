"""Figures of runs, reports and studies. Records, logs and tensors go in, a plotly figure comes out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from vfmlab.evaluation import course
from vfmlab.evaluation.number import CURVE, Report, quantities, quantity
from vfmlab.plots import primitives
from vfmlab.runs import RunDir
from vfmlab.tokenizers.base import Statistics

MARGIN = {"l": 56, "r": 12, "t": 76, "b": 44}
NO_METRIC = (
    "step", "samples", "seconds", "samples_per_second", "kind", "lr", "bad_steps", "ema_samples",
    "parameter_norm",
)  # fmt: skip
AT = "gradient at "  # how columns of an opened step's table begin

# -- runs ----------------------------------------------------------------------


def training_curves(folders: Sequence[RunDir]) -> go.Figure:
    """Every metric of the training records, one panel each, one line per run."""
    records = {folder.id: folder.metrics("step") for folder in folders}
    names = dict.fromkeys(name for rows in records.values() for row in rows for name in row)
    parts = []
    for name in (name for name in names if name not in NO_METRIC):
        lines = {}
        for run_id, rows in records.items():
            points = [(r["samples"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
            if points:
                lines[run_id] = tuple(zip(*points, strict=True))
        if lines:
            positive = all(v > 0 for _, ys in lines.values() for v in ys)
            log_y = positive and name.startswith(("loss", "l1", "l2"))
            parts.append(primitives.curves(lines, y=name, title=name, log_y=log_y))
    return primitives.panels(parts, columns=3)


def loss_terms(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Rows of an opened step's table: each term's share of the loss, and its gradient's norm by place."""
    terms, grey = [row["term"] for row in records], primitives.PALETTE[7]
    sheet = make_subplots(1, 2, subplot_titles=("share of the loss", "gradient norm of weight x value"))
    sheet.add_bar(x=terms, y=[row["share"] for row in records], marker_color=grey, name="share", row=1, col=1)
    for i, place in enumerate(dict.fromkeys(key for row in records for key in row if key.startswith(AT))):
        values = [row.get(place) or None for row in records]  # no bar for 0 on a logarithmic axis
        hue = primitives.PALETTE[i % len(primitives.PALETTE)]
        sheet.add_bar(x=terms, y=values, name=place.removeprefix(AT), marker_color=hue, row=1, col=2)
    sheet.update_yaxes(type="log", row=1, col=2)
    return sheet.update_layout(template=primitives.TEMPLATE, height=340, margin=MARGIN)


def convergence(folders: Sequence[RunDir], dashed: Sequence[str] = (),
                labels: Sequence[str] | None = None) -> go.Figure:
    """Quality of samples over training, from the evaluations that runs log on the way.

    One line per run or, with `labels`, per label: the mean over its runs. All under the protocol that most
    runs ended with; points of others, or without one, are left out, and the panel says so.
    """
    label_of = dict(zip((f.id for f in folders), labels or [f.id for f in folders], strict=True))
    logged, parts = {folder.id: course.logged(folder) for folder in folders}, []
    for name, q in quantities(CURVE).items():
        curves = course.together(logged, name)
        lines = _means((label_of[run], samples, value) for run, c in curves.items()
                       for samples, value in zip(c.samples, c.values, strict=True))
        missing = sum(c.left_out for c in curves.values())
        if lines:
            title = q.label + (f" ({missing} points of other protocols left out)" if missing else "")
            by_place = labels is not None
            parts.append(primitives.curves(lines, y=name, title=title, dashed=dashed, by_place=by_place))
    return primitives.panels(parts, columns=3)


def _means(points: Iterable[tuple[str, float, float]]) -> dict[str, tuple[list[float], list[float]]]:
    """Lines of (line, x, y): the mean where a line has several y at one x."""
    lines: dict[str, dict[float, list[float]]] = {}
    for name, x, y in points:
        lines.setdefault(name, {}).setdefault(x, []).append(y)
    return {name: (sorted(at), [statistics.fmean(at[x]) for x in sorted(at)]) for name, at in lines.items()}


def latent_statistics(raw: Statistics, method: str = "") -> go.Figure:
    """Mean and standard deviation of each channel of the raw latent, as in a tokenizer's checkpoint."""
    bar = go.Bar(x=[str(c) for c in range(len(raw.mean))], y=raw.mean.tolist(),
                 error_y={"type": "data", "array": raw.std.tolist()}, marker_color=primitives.colour(method))
    title = f"raw latent over {raw.count} training images (data {raw.fingerprint[:12]})"
    return primitives.framed(go.Figure(bar), "latent channel", "raw mean ± std", title, 320)


# -- numbers ----------------------------------------------------------------------


def seed_bars(values: Mapping[str, Sequence[float]], y: str) -> go.Figure:
    """One bar per row (the mean) with every seed as a dot. values: row -> one number per seed."""
    figure = primitives.bars({name: statistics.fmean(seeds) for name, seeds in values.items()}, y=y)
    names = [name for name, seeds in values.items() for _ in seeds]
    dots = {"color": "#1b1f23", "size": 7, "symbol": "circle-open"}
    every = [value for seeds in values.values() for value in seeds]
    figure.add_scatter(x=names, y=every, mode="markers", marker=dots, name="each seed", showlegend=False)
    return figure


def probe_figure(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Bars of :func:`vfmlab.studies.probing.probe_layers`: a group per layer, a bar per VFM and probe."""
    figure = go.Figure()
    for i, vfm in enumerate(dict.fromkeys(r["VFM"] for r in records)):
        of_vfm = [r for r in records if r["VFM"] == vfm]
        layers = [f"layer {r['layer']}" for r in of_vfm]
        for probe, pattern in (("linear probe", ""), ("kNN", "/")):
            marker = {"color": primitives.PALETTE[i], "pattern": {"shape": pattern}}
            figure.add_bar(x=layers, y=[r[probe] for r in of_vfm], name=f"{vfm}, {probe}", marker=marker)
    figure.update_yaxes(range=[0, 1])
    return primitives.framed(figure, None, "accuracy").update_layout(barmode="group")


def robustness(reports: Mapping[str, Report]) -> go.Figure:
    """PSNR of decoding against the noise added to the normalised latent, from the reports."""
    curves = {name: report.curves["noise_psnr"] for name,
              report in reports.items() if "noise_psnr" in report.curves}
    lines = {name: (curve.facts["sigma"], curve.value) for name, curve in curves.items() if not curve.absent}
    return primitives.curves(lines, x="noise added to z (standard deviations)", y="PSNR (dB)")


def trade_off(reports: Mapping[str, Report]) -> go.Figure:
    """Reconstruction (rFD) against generation (gFD), one point per run."""
    points = [{"name": name, "rFD": r.value("rfd"), "gFD": r.value("gfd")} for name, r in reports.items()]
    return primitives.scatter(points, "rFD", "gFD",
                              title="better reconstruction is left, better generation is down")


# -- studies ----------------------------------------------------------------------


def rate_curves(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """PSNR and rFD against bits per pixel, one line per latent width (mean over seeds).

    records: of :func:`vfmlab.studies.ablations.rate_distortion`.
    """
    parts = []
    for key, log in (("psnr", False), ("rfd", True)):
        lines = _means((r["row"], r["rate"], r[key]) for r in records)
        log_y, title = log and all(y > 0 for _, ys in lines.values() for y in ys), quantity(key).title
        parts.append(primitives.curves(lines, "bits per pixel of the latent", title, title, log_y))
    return primitives.panels(parts, columns=2)


def dynamics_maps(courses: Mapping[str, Mapping[str, Sequence[Any]]], title: str) -> go.Figure:
    """Block x images seen, one map per row on one colour scale.

    courses: row -> {"samples", "block", "value": a row per block}, as
    :func:`vfmlab.evaluation.instruments.blocks.over_training` gives it.
    """
    columns = min(4, len(courses))
    count = -(-len(courses) // columns)
    gaps = {"horizontal_spacing": 0.05, "vertical_spacing": 0.22}
    sheet = make_subplots(rows=count, cols=columns, subplot_titles=list(courses), **gaps)
    for i, one in enumerate(courses.values()):
        x, y = [f"{s:,}" for s in one["samples"]], [str(k) for k in one["block"]]
        place = {"row": i // columns + 1, "col": i % columns + 1}
        sheet.add_heatmap(z=one["value"], x=x, y=y, coloraxis="coloraxis", **place)
    sheet.update_xaxes(title="images seen", row=count)
    sheet.update_yaxes(title="block", col=1)
    look = {"coloraxis": {"colorscale": "Viridis"}, "height": 110 + 210 * count, "margin": MARGIN}
    return sheet.update_layout(template=primitives.TEMPLATE, title=title, **look)


def similarity_figure(times: Sequence[float], matrices: Mapping[int, Tensor],
                      encoder: int | None = None) -> go.Figure:
    """Cosine of each block's tokens one step apart, and between any two times for the encoder's last block.

    matrices: block -> T T, as :func:`vfmlab.diffusion.reuse.similarity_over_time` gives it for `times` (T).
    """
    last = encoder if encoder is not None else max(matrices)
    lines = {f"block {block}{' (head)' * (encoder is not None and block > encoder)}":
             (times[1:], matrix.diagonal(1).tolist()) for block, matrix in matrices.items()}
    steps = primitives.curves(lines, "t (1 noise, 0 data)", "cosine", "one step apart", by_place=True)
    ticks = [f"{t:.2f}" for t in times]
    pairs = primitives.heatmap(matrices[last], ticks, ticks, "t", "", f"block {last}, any two times")
    sheet = primitives.panels([steps, pairs.update_traces(zmax=1)],
                              title="similarity of the blocks on the way from noise to data")
    sheet.update_xaxes(autorange="reversed", row=1, col=1)
    return sheet.update_layout(height=420, margin=MARGIN, legend={"orientation": "h", "y": -0.25})


def reuse_figure(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """gFD against time: the encoder reused (solid), and fewer steps (dashed).

    records: of :func:`vfmlab.studies.reuse.records`.
    """
    steps, x = max(r["steps"] for r in records), "seconds an image"
    groups = {"encoder reused": [r for r in records if r["steps"] == steps],
              "fewer steps": [r for r in records if r["encodings"] == r["steps"]]}
    figure = go.Figure()
    for i, (name, group) in enumerate(groups.items()):
        group = sorted(group, key=lambda r: r[x])
        figure.add_scatter(
            x=[r[x] for r in group], y=[r["gFD"] for r in group], name=name, mode="lines+markers+text",
            text=[f"{r['steps']} steps" if i else r["encoder"] for r in group],
            textposition="top center", line={"color": primitives.PALETTE[i], "dash": "dash" if i else "solid"}
        )
    return primitives.framed(figure, x, "gFD", "quality against time", 400)


def guidance_figure(records: Sequence[Mapping[str, Any]], label: str = "gFD") -> go.Figure:
    """A number over the scale of guidance: of each kind a line of the first run, a point for each run.

    Dotted: unguided.

    records: of :func:`vfmlab.studies.guide.records`. label: of the number there.
    """
    figure, x = go.Figure(), "scale of guidance"
    for i, kind in enumerate(dict.fromkeys(r["kind"] for r in records)):
        mine = [r for r in records if r["kind"] == kind]
        first = [r for r in mine if r["run"] == records[0]["run"]]
        line = {"color": primitives.PALETTE[i], "dash": "dot" if kind == "none" else "solid"}
        if kind == "none":
            figure.add_hline(first[0][label], line=line)
        figure.add_scatter(x=[r["scale"] for r in first], y=[r[label] for r in first], name=kind,
                           mode="lines", line=line, legendgroup=kind)
        figure.add_scatter(x=[r["scale"] for r in mine], y=[r[label] for r in mine], mode="markers",
                           marker={"color": line["color"]}, legendgroup=kind, showlegend=False,
                           text=[f"{kind}, seed {r['seed']}" for r in mine])
    return primitives.framed(figure, x, label, f"{label} over the scale of guidance", 400)
