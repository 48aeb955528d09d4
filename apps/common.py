"""What all tabs share: how errors are told, how numbers from outside are checked, how a figure looks on light and dark ground."""

from __future__ import annotations

import functools
import html
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from vfmlab.errors import VfmlabError

COMPUTE = {"concurrency_id": "compute", "concurrency_limit": 1}  # one job at a time; the others wait in line and see their place
LIGHT = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}  # lists and links: answered at once, no endpoint
_FOLDERS = re.compile(r"(?<=['\" ])(?:/[^/'\" ]+)+/(?=[^/'\" ]+)")


def problem(message: str) -> gr.Error:
    """`message` for the person in front of the page: no traceback, no HTML (it may quote what came from outside), no folders."""
    return gr.Error(html.escape(_FOLDERS.sub("", str(message)), quote=False), print_exception=False)


def told(compute: Callable) -> Callable:
    """A handler whose expected errors become messages: what the library says about bad input, and files that are gone."""

    def translated(error: Exception) -> Exception:
        if isinstance(error, VfmlabError):
            return problem(str(error))
        return problem(f"A file of this run could not be read ({error.strerror or type(error).__name__}). It may have been deleted; reload the page.")

    if inspect.isgeneratorfunction(compute):

        @functools.wraps(compute)
        def stream(*args: Any):
            try:
                yield from compute(*args)
            except (VfmlabError, OSError) as error:
                raise translated(error) from None

        return stream

    @functools.wraps(compute)
    def call(*args: Any):
        try:
            return compute(*args)
        except (VfmlabError, OSError) as error:
            raise translated(error) from None

    return call


def number(value: Any, low: float, high: float, name: str) -> float:
    """A finite number in [low, high]; sliders check their ends, but not NaN, and clients need no slider."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise problem(f"{name} = {value!r} is no number; give one between {low:g} and {high:g}") from None
    if not (math.isfinite(value) and low <= value <= high):
        raise problem(f"{name} = {value:g}: give a number between {low:g} and {high:g}")
    return value


def whole(value: Any, low: int, high: int, name: str) -> int:
    """A whole number in [low, high]."""
    return round(number(value, low, high, name))


def themed(figure: go.Figure) -> go.Figure:
    """A figure that is readable on light and on dark ground: transparent, with grey text and lines."""
    grey, faint = "#848d97", "rgba(132, 141, 151, .28)"
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": grey}, width=None, autosize=True)
    figure.update_xaxes(gridcolor=faint, linecolor=faint, zerolinecolor=faint, automargin=True)
    figure.update_yaxes(gridcolor=faint, linecolor=faint, zerolinecolor=faint, automargin=True)
    return figure
