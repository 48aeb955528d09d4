"""A figure's state as JSON and as a link, the Python lines that make it again, and the way back from a link to the page.

What comes back is not trusted: unknown fields are dropped, values are held against the component they are for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from apps.cards import escape

LONGEST = 4000  # characters of a state


@dataclass(frozen=True)
class Tab:
    """What a tab shares. fields: name -> component. fresh: name -> choices as they are now, for lists of runs. free: lists whose
    choices are not known before the tab is filled; its handler checks them."""

    name: str
    fields: Mapping[str, gr.components.Component]
    fresh: Callable[[], dict[str, list[str]]]
    free: tuple[str, ...] = ()


def panel() -> list[gr.components.Component]:
    """Where a tab shows them; the components are outputs of its handlers."""
    with gr.Accordion("Share this, or make it again in Python", open=False):
        link = gr.HTML()
        code = gr.Code(language="python", label="Python", interactive=False, lines=3)
        state = gr.Code(language="json", label="state", interactive=False, lines=3)
    return [link, code, state]


def tell(tab: str, state: Mapping[str, Any], code: str) -> tuple[str, str, str]:
    """Values for :func:`panel`: link, Python, JSON."""
    text = json.dumps({"tab": tab, **state})
    link = "?" + urlencode({"state": text})
    return f'<p class="vl-link"><a href="{escape(link)}">link to this state</a> (the page opens with these settings; nothing runs until asked)</p>', code, text


def parse(text: str | None) -> dict[str, Any]:
    """A state from JSON; {} where it is none."""
    try:
        found = json.loads(text) if text and len(text) <= LONGEST else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def updates(tab: Tab, state: Mapping[str, Any]) -> list[Any]:
    """One update per field of `tab`: its value from the state where it fits, fresh choices where it is a list of runs."""
    mine = state if state.get("tab") == tab.name else {}
    fresh = tab.fresh()
    found = []
    for name, component in tab.fields.items():
        change: dict[str, Any] = {}
        choices = fresh.get(name)
        if choices is not None:
            change["choices"] = choices
        known = choices if choices is not None else [value for _, value in getattr(component, "choices", None) or []]
        value = mine.get(name)
        fits, value = (isinstance(value, str) and len(value) < 300, value) if name in tab.free else fit(component, value, known)
        if fits:
            change["value"] = value
        elif choices is not None:
            many = getattr(component, "multiselect", False)
            change["value"] = choices[:2] if many else (choices[0] if choices else None)
        found.append(gr.update(**change) if change else gr.skip())
    return found


def fit(component: Any, value: Any, known: list[Any]) -> tuple[bool, Any]:
    """Whether a value from outside may be shown in a component, and as what."""
    if value is None:
        return False, None
    if isinstance(component, gr.Slider | gr.Number):
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        good = good and (component.minimum is None or value >= component.minimum) and (component.maximum is None or value <= component.maximum)
        return good, value
    if isinstance(component, gr.Checkbox):
        return isinstance(value, bool), value
    if getattr(component, "multiselect", False):
        kept = [v for v in value if v in known] if isinstance(value, list) else []
        return bool(kept), kept
    if isinstance(component, gr.Dropdown | gr.Radio):
        return isinstance(value, str | int) and value in known, value
    if hasattr(component, "from_name"):
        path = component.from_name(value)
        return path is not None, path
    return False, None
