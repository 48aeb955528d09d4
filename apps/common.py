"""What all tabs share: the layout, errors as one line, checks of values, figures on light and dark ground."""

from __future__ import annotations

import html
import math
import re
from typing import Any

import gradio as gr
import plotly.graph_objects as go

COMPUTE = {"concurrency_id": "compute", "concurrency_limit": 1}  # one job at a time; others see their place
# lists and links, answered at once
LIGHT = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
SEED = 2**31 - 1  # the largest one
_FOLDERS = re.compile(r"(?<=['\" ])(?:/[^/'\" ]+)+/(?=[^/'\" ]+)")


def printable(value: Any) -> Any:
    """`value` (a JSON tree) with text that is no Unicode, such as the name of a folder, spelled out."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(child) for key, child in value.items()}
    return [printable(child) for child in value] if isinstance(value, list | tuple) else value


def problem(message: str) -> gr.Error:
    """`message` for the page: no traceback, no HTML, no folders (it may quote what came from outside)."""
    line = _FOLDERS.sub("", printable(str(message)))[:600]
    return gr.Error(html.escape(line, quote=False), print_exception=False)


def number(value: Any, low: float, high: float, name: str) -> float:
    """A finite number in [low, high]; sliders check their ends, but not NaN, and clients need no slider."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        shown = str(value)[:60]
        raise problem(f"{name} = {shown!r} is no number; give one between {low:g} and {high:g}") from None
    if not (math.isfinite(value) and low <= value <= high):
        raise problem(f"{name} = {value:g}: give a number between {low:g} and {high:g}")
    return value


def checked(component: Any, value: Any) -> Any:
    """`value` as a component holds it: a finite number in its range, whole where it counts, or a bool."""
    if isinstance(component, gr.Checkbox):
        return bool(value)
    if not isinstance(component, gr.Slider | gr.Number):
        return value
    value = number(value, component.minimum, component.maximum, component.label.partition(" (")[0])
    return round(value) if component.step == 1 or component.precision == 0 else value


def text(value: Any) -> str:
    """`value` where it is a text of a usable length, else the empty one."""
    return value if isinstance(value, str) and len(value) < 1000 else ""


def themed(figure: go.Figure) -> go.Figure:
    """A figure that is readable on light and on dark ground: transparent, with grey text and lines."""
    grey, faint = "#848d97", "rgba(132, 141, 151, .28)"
    ground = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    figure.update_layout(**ground, font={"color": grey}, width=None, autosize=True)
    figure.update_xaxes(gridcolor=faint, linecolor=faint, zerolinecolor=faint, automargin=True)
    figure.update_yaxes(gridcolor=faint, linecolor=faint, zerolinecolor=faint, automargin=True)
    return figure
