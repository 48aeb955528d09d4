"""A figure's state as JSON and as a link, the Python lines that make it again, and the way back to the page.

What comes back is not trusted: unknown fields are dropped, values are held against their component.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import gradio as gr
from PIL import Image

from apps.common import COMPUTE, checked

LONGEST = 4000  # characters of a state


@dataclass(frozen=True)
class Tab:
    """What a tab shares. fields: name -> component.

    free: lists whose choices are not known before the tab is filled; its handler checks them.
    """

    name: str
    fields: Mapping[str, gr.components.Component]
    free: tuple[str, ...] = ()


@contextmanager
def columns(verb: str) -> Iterator[SimpleNamespace]:
    """Two columns. Within this, a tab's controls, at their head, above the fold, the buttons `start`, `stop`.

    Beside them, in the column `right`, `shown` for the results and, after this, the :func:`panel`.
    """
    tab = SimpleNamespace()
    with gr.Row():
        left, tab.right = gr.Column(scale=1, min_width=280), gr.Column(scale=3, min_width=300)
    with tab.right:
        tab.shown = gr.HTML(label="results")
    with left:
        with gr.Row(elem_classes="vl-go"):
            tab.start = gr.Button(verb, variant="primary", min_width=120)
            tab.stop = gr.Button("stop", min_width=80)
        yield tab
    with tab.right:
        tab.panel = panel()


def panel() -> list[gr.components.Component]:
    """Where a tab shows them; the components are outputs of its handlers."""
    with gr.Accordion("Save this, share it, or make it again in Python", open=False):
        file = gr.DownloadButton("picture (PNG)", size="sm")
        link = gr.HTML()
        code = gr.Code(language="python", label="Python", interactive=False, lines=3)
        state = gr.Code(language="json", label="state", interactive=False, lines=3)
    return [file, link, code, state]


def href(tab: str, state: Mapping[str, Any]) -> str:
    return escape("?" + urlencode({"state": json.dumps({"tab": tab, **state})}))


def outputs(tab: str, state: Mapping[str, Any], code: Sequence[str],
            picture: Image.Image | None = None) -> tuple:
    """Values for :func:`panel`: a PNG to save, link, Python (lines), JSON."""
    file = gr.skip()
    if picture is not None:
        handle, file = tempfile.mkstemp(".png", f"vfmlab_{tab}_", os.environ.get("GRADIO_TEMP_DIR"))
        os.close(handle)
        picture.save(file)
    settings = {key: value for key, value in state.items() if key != "numbers"}
    link = f'<a href="{href(tab, settings)}">link to this state</a>'
    note = f'<p class="vl-link">{link} (the page opens with these settings; nothing runs until asked)</p>'
    return file, note, "\n".join(code), json.dumps({"tab": tab, **state})


def connect(name: str, compute: Callable, tab: SimpleNamespace, fields: Sequence[Any],
            outputs: Sequence[Any] = (), free: tuple[str, ...] = (), endpoint: str | None = None) -> Tab:
    """A tab whose first button calls `compute` with its fields, in the order of its parameters, as an
    endpoint of its own name or another one, and whose second ends the jobs of its session, each with what
    it has so far. outputs: where these are not just those of the tab."""
    page = gr.context.Context.root_block

    def end(request: gr.Request) -> None:
        page.stop(request.session_hash)

    outputs = outputs or [tab.shown, *tab.panel]
    tab.start.click(compute, fields, outputs, api_name=endpoint, **COMPUTE)
    tab.stop.click(end, None, None, concurrency_limit=None, queue=True, api_visibility="private")
    parameters = zip(inspect.signature(compute).parameters, fields, strict=True)
    return Tab(name, {key: one for key, one in parameters if not isinstance(one, gr.State)}, free)


def parse(text: str | None) -> dict[str, Any]:
    """A state from JSON; {} where it is none."""
    try:
        state = json.loads(text) if isinstance(text, str) and len(text) <= LONGEST else {}
    except (ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def updates(tab: Tab, state: Mapping[str, Any]) -> list[Any]:
    """One update per field: its value from the state where it fits, fresh choices for lists of runs."""
    mine = state if state.get("tab") == tab.name else {}
    changes = []
    for name, component in tab.fields.items():
        fresh, value = getattr(component, "fresh", None), mine.get(name)
        change: dict[str, Any] = {"choices": fresh()} if fresh else {}
        pairs = change["choices"] if fresh else getattr(component, "choices", None) or []
        known = [value for _, value in pairs]
        if name in tab.free:
            value = value if isinstance(value, str) and len(value) < 300 else None
        elif (value := fitting(component, value, known)) is None and fresh:
            value = component.first(known)
        if fresh or value is not None:
            change["value"] = value
        changes.append(gr.update(**change) if change else gr.skip())
    return changes


def left_out(tab: Tab, state: Mapping[str, Any], changes: Sequence[Any]) -> list[str]:
    """Labels of the fields that a state names and its `updates` show otherwise: a run that is gone, a value
    that does not fit."""
    named = ((component, state[name], change) for (name, component), change
             in zip(tab.fields.items(), changes, strict=True) if name in state)
    return [component.label.partition(" (")[0] for component, value, change in named
            if "value" not in change or not (change["value"] == value or hasattr(component, "from_name"))]


def fitting(component: Any, value: Any, known: list[Any]) -> Any:
    """A value from outside as it may be shown in a component; None where it may not."""
    if isinstance(component, gr.Slider | gr.Number):
        with suppress(gr.Error):
            return checked(component, value)
    if isinstance(component, gr.Checkbox):
        return value if isinstance(value, bool) else None
    if getattr(component, "multiselect", False):
        return [v for v in value if v in known] or None if isinstance(value, list) else None
    if isinstance(component, gr.Dropdown | gr.Radio):
        return value if isinstance(value, str | int) and value in known else None
    return component.from_name(value) if hasattr(component, "from_name") else None
