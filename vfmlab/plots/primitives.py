"""The parts of figures. Arrays and records go in, a plotly figure (or a PIL image) comes out.

Colours belong to methods and are the same in notebooks, reports and the app. Images are drawn as pixels (no
smoothing), because blur is one of the things people look for.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import torch
from PIL import Image
from plotly.subplots import make_subplots
from torch import Tensor

from vfmlab.data import to_uint8

# Okabe-Ito, readable with colour-vision deficiency and on light and dark ground.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7F7F7F")
TEMPLATE = "plotly_white"
LINK = re.compile(r"\[([^][]+)\]\(((?:https?://)?[\w./#%-]+)\)")
METHOD_COLOURS = {
    "vfm_vae": PALETTE[0], "plain_vae": PALETTE[1], "va_vae": PALETTE[2], "aligntok": PALETTE[3],
    "rae": PALETTE[4], "sd_vae": PALETTE[5], "fae": PALETTE[6], "multi_layer_rae": PALETTE[7],
    # Tol's muted colours
    "vqgan": "#332288", "vfmtok": "#117733", "vqrae": "#882255", "gae": "#AA4499", "dino_sae": "#999933", "pae": "#44AA99",
    "svg": "#661100", "epsilon_vae": "#6699CC", "ps_vae": "#DDCC77",
}  # fmt: skip


def colour(name: str, index: int = 0) -> str:
    """The colour of a method; runs named after a method (or tier_method) share it; others by position."""
    # rae is a part of multi_layer_rae
    for method, value in sorted(METHOD_COLOURS.items(), key=lambda item: -len(item[0])):
        if name == method or f"_{method}" in f"_{name}":
            return value
    return PALETTE[index % len(PALETTE)]


# -- images ----------------------------------------------------------------------


def tile(images: Tensor, columns: int = 8, scale: int | None = None, gap: int = 2) -> Image.Image:
    """One picture with all images [N 3 H W] in [-1, 1] (or uint8), enlarged by a whole factor."""
    images = images[None] if images.ndim == 3 else images
    pixels = images if images.dtype == torch.uint8 else to_uint8(images.detach())
    pixels = pixels.cpu().permute(0, 2, 3, 1).numpy()
    count, height, width, _ = pixels.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    scale = scale or max(1, min(6, 1000 // (columns * width)))
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    picture = Image.fromarray(sheet)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def png(picture: Image.Image, **options: Any) -> bytes:
    """The picture as a PNG file. options: of PIL's writer, such as further frames."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def data_uri(picture: Image.Image | bytes, **options: Any) -> str:
    """The picture, or a PNG file as it is, as an address that holds it."""
    file = picture if isinstance(picture, bytes) else png(picture, **options)
    return "data:image/png;base64," + base64.b64encode(file).decode()


def _bare(picture: Image.Image, title: str | None, left: int = 8) -> go.Figure:
    """The picture without axes. left: pixels beside it."""
    top = 40  # room for the title, and for plotly's buttons, which would cover the first row of images
    figure = go.Figure(go.Image(source=data_uri(picture), hoverinfo="skip"))
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure.update_layout(title=title, width=picture.width + left + 8, height=picture.height + 8 + top,
                                margin={"l": left, "r": 8, "t": top, "b": 8}, plot_bgcolor="rgba(0,0,0,0)",
                                showlegend=False)


def grid(images: Tensor, columns: int = 8, title: str | None = None, scale: int | None = None) -> go.Figure:
    """A contact sheet of images [N 3 H W] in [-1, 1]."""
    return _bare(tile(images, columns, scale), title)


def rows(groups: Mapping[str, Tensor], title: str | None = None, scale: int | None = None) -> go.Figure:
    """One labelled row per group of images [N 3 H W] in [-1, 1], e.g. {"original": x, "error": e}."""
    first = next(iter(groups.values()))
    count, _, _, width = first.shape
    scale = scale or max(1, min(6, 860 // (count * width)))
    sheet = tile(torch.cat(list(groups.values())), columns=count, scale=scale)
    step = (sheet.height + 2 * scale) / len(groups)  # with the gap below
    return _bare(sheet, title, 9 * max(len(name) for name in groups) + 16).update_yaxes(
        visible=True, tickmode="array", tickvals=[step * (i + 0.5) for i in range(len(groups))],
        ticktext=list(groups), showgrid=False, zeroline=False
    )


def error_map(target: Tensor, image: Tensor, gain: float = 4.0) -> Tensor:
    """Mean absolute error over channels, grey [N 3 H W] in [-1, 1]; white: an error of 2 / gain or more."""
    error = (target.float() - image.float()).abs().mean(1, keepdim=True)
    return (error * gain - 1).clamp(-1, 1).expand(-1, 3, -1, -1)


def pca_maps(features: Tensor, size: int | None = None) -> Tensor:
    """Feature maps [N C h w] as colours [N 3 H W] in [-1, 1]: their first three principal components.

    Components are scaled to their own 2..98 % range; signs are fixed by the largest loading.
    """
    n, c, h, w = features.shape
    flat = features.detach().float().permute(0, 2, 3, 1).reshape(-1, c)
    flat = flat - flat.mean(0)
    _, _, basis = torch.linalg.svd(flat[:: max(1, len(flat) // 20_000)], full_matrices=False)
    basis = basis[:3]
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    scores = flat @ basis.T
    if scores.shape[1] < 3:
        scores = torch.nn.functional.pad(scores, (0, 3 - scores.shape[1]))
    low, high = torch.quantile(scores[:: max(1, len(scores) // 100_000)],
                               torch.tensor([0.02, 0.98], device=scores.device), dim=0)
    shades = ((scores - low) / (high - low).clamp_min(1e-8) * 2 - 1).clamp(-1, 1)
    maps = shades.reshape(n, h, w, 3).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(maps, size=(size, size), mode="nearest") if size else maps


# -- numbers ----------------------------------------------------------------------


def framed(figure: go.Figure, x: str | None, y: str | None, title: str | None = None,
           height: int = 360) -> go.Figure:
    """The figure with names of its axes, and margins that leave room for a title where there is one."""
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    margin = {"l": 56, "r": 12, "t": 44 if title else 16, "b": 44}
    return figure.update_layout(template=TEMPLATE, title=title, height=height, margin=margin)


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str = "images seen",
           y: str = "loss", title: str | None = None, log_y: bool = False, dashed: Sequence[str] = (),
           by_place: bool = False) -> go.Figure:
    """Lines over training: {name: (x, y)}.

    dashed: names that are drawn dashed, in the colour of the line before. by_place: colours by place in
    `series`, for runs of one method.
    """
    figure, solid = go.Figure(), -1
    for i, (name, (xs, ys)) in enumerate(series.items()):
        mode = "lines+markers" if len(xs) <= 12 else "lines"
        solid += name not in dashed
        hue = PALETTE[i % len(PALETTE)] if by_place else colour(name, max(solid, 0))
        line = {"color": hue, "dash": "dash" if name in dashed else "solid"}
        figure.add_trace(go.Scatter(x=list(xs), y=list(ys), name=name, mode=mode, line=line))
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(type="log" if log_y else "linear", exponentformat="power" if log_y else None)
    return framed(figure, x, y, title).update_layout(hovermode="x unified")


def panels(figures: Sequence[go.Figure], columns: int = 2, title: str | None = None) -> go.Figure:
    """Several curve figures beside each other; a name keeps its colour and appears once in the legend.

    Without any, an empty figure.
    """
    if not figures:
        return framed(go.Figure(), None, None, title)
    count = -(-len(figures) // columns)
    gaps = {"horizontal_spacing": 0.09, "vertical_spacing": 0.32 / max(2, count)}
    titles = [f.layout.title.text or "" for f in figures]
    sheet = make_subplots(rows=count, cols=columns, subplot_titles=titles, **gaps)
    seen: set[str] = set()
    for k, figure in enumerate(figures):
        row, column = k // columns + 1, k % columns + 1
        for trace in figure.data:
            trace = trace.__class__(trace)  # a copy: traces belong to one figure only
            trace.update(legendgroup=trace.name, showlegend=bool(trace.name) and trace.name not in seen)
            seen.add(trace.name)
            sheet.add_trace(trace, row, column)
        x, y = figure.layout.xaxis, figure.layout.yaxis
        sheet.update_xaxes(title=x.title.text, row=row, col=column)
        sheet.update_yaxes(title=y.title.text, type=y.type, row=row, col=column)
    margin = {"l": 56, "r": 12, "t": 64, "b": 44}
    return sheet.update_layout(template=TEMPLATE, title=title, height=340 * count + 60, margin=margin)


def scatter(points: Sequence[Mapping[str, Any]], x: str, y: str, title: str | None = None) -> go.Figure:
    """One point per record {"name": ..., x: ..., y: ...}, its label on the side where there is room."""
    figure = go.Figure()
    across = [point[x] for point in points if point[x] is not None]
    for i, point in enumerate(points):
        name = str(point["name"])
        right = point[x] is not None and 2 * point[x] > min(across) + max(across)
        side = "middle left" if right else "middle right"
        dot = {"mode": "markers+text", "textposition": side, "text": [name]}
        marker = {"size": 12, "color": colour(name, i)}
        figure.add_scatter(x=[point[x]], y=[point[y]], name=name, marker=marker, **dot)
    return framed(figure, x, y, title, 380).update_layout(showlegend=False)


def plane(groups: Mapping[str, Tensor], lines: Sequence[str] = (), title: str | None = None) -> go.Figure:
    """Points of a plane, N 2 for each name, at one scale for both axes.

    lines: names whose points are joined in their order.
    """
    figure = go.Figure()
    for i, (name, points) in enumerate(groups.items()):
        x, y = points.detach().double().cpu().t().tolist()
        dots = {"mode": "markers", "marker_size": 4 if len(points) > 40 else 10}
        style = {"mode": "lines"} if name in lines else dots
        figure.add_scatter(x=x, y=y, name=name, **style, line_color=colour(name, i))
    figure.update_xaxes(constrain="domain")
    figure.update_yaxes(scaleanchor="x")
    return framed(figure, None, None, title, 420)


def number(value: Any) -> str:
    """A number with three significant digits, text as it is, None as a dash, lists and mappings as JSON."""
    if value is None:
        return "–"
    if isinstance(value, list | dict):
        return json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def linked(text: str) -> str:
    """`text` as HTML: escaped, with Markdown's links, to files and over http alone, as links."""
    return LINK.sub(r'<a href="\2">\1</a>', html.escape(text))


@dataclass(frozen=True, repr=False)
class Table:
    """Records as a table: one row each, columns as they first appear. A cell in ** is bold, links are links.

    Notebooks and pages show it as HTML (nothing is cut, and it can be selected), documents as Markdown.
    """

    records: Sequence[Mapping[str, Any]]
    title: str = ""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for record in self.records for key in record))

    @property
    def rows(self) -> list[list[str]]:
        """The cells as text."""
        return [[number(record.get(column)) for column in self.columns] for record in self.records]

    def __html__(self) -> str:
        def cell(text: str) -> str:
            bold = len(text) > 4 and text.startswith("**") and text.endswith("**")
            return f"<td><b>{linked(text[2:-2])}</b></td>" if bold else f"<td>{linked(text)}</td>"

        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in self.rows)
        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    _repr_html_ = __html__

    def __repr__(self) -> str:
        return self.markdown()

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def table(records: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """A table with one row per record."""
    return Table(list(records), title)


def bars(values: Mapping[str, float], y: str, title: str | None = None) -> go.Figure:
    """One bar per name."""
    colours = [colour(name, i) for i, name in enumerate(values)]
    bar = go.Bar(x=list(values), y=list(values.values()), marker_color=colours, showlegend=False)
    return framed(go.Figure(bar), None, y, title, 340)


def heatmap(values: Any, x: Sequence[Any], y: Sequence[Any], x_title: str, y_title: str,
            title: str | None = None) -> go.Figure:
    """A matrix [len(y), len(x)] as colours. A name may repeat: every row and column has its place."""
    figure = go.Figure(go.Heatmap(z=np.asarray(values), colorscale="Viridis"))
    for axis, given in (("x", x), ("y", y)):
        names = [str(v) for v in given]
        if len(set(names)) == len(names):
            figure.update_traces({axis: names})
        else:  # plotly draws all that has one name at one place
            figure.update_layout({f"{axis}axis": {"tickvals": list(range(len(names))), "ticktext": names}})
    return framed(figure, x_title, y_title, title)


def use_notebook_renderer() -> None:
    """Figures in notebooks: live in JupyterLab, and in exported HTML without a network."""
    pio.renderers.default = "plotly_mimetype+notebook"


def fragment(figure: go.Figure | Table, first: bool = False) -> str:
    """A figure or table as an HTML fragment; the `first` one of a page carries plotly.js."""
    if isinstance(figure, Table):
        return figure.__html__()
    return figure.to_html(full_html=False, include_plotlyjs="inline" if first else False,
                          config={"displaylogo": False})
