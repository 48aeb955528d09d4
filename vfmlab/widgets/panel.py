"""Controls above a figure, an ordinary output replaced in place: an exported page keeps the last one."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from vfmlab.errors import ConfigError, VfmlabError
from vfmlab.plots import primitives

if TYPE_CHECKING:
    import ipywidgets

Draw = Callable[..., go.Figure]


def controls() -> Any:
    """The module ipywidgets. Raises ConfigError where it is not installed."""
    try:
        import ipywidgets
    except ImportError:
        raise ConfigError("widgets need ipywidgets: uv pip install -c constraints.txt -e '.[notebooks]', or "
                          "set headless = True") from None
    return ipywidgets


# Where a notebook was opened again without its outputs; the setup cell makes the next figure send plotly.js.
MISSING = """<p class="vfmlab-missing" hidden>This figure needs plotly.js, which this page has lost: run
the cell with set_up_notebook() and this one again.</p><script>if (!window.Plotly)
document.querySelectorAll('.vfmlab-missing').forEach(p => p.hidden = false)</script>"""


class Shown:
    """A figure in the output of a cell, replaced by the next one. sent: plotly.js is in the notebook."""

    sent = False

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, figure: go.Figure) -> None:
        from IPython.display import display

        # As HTML, because JupyterLab's renderer of plotly's own MIME type never draws a second figure in one
        # output.
        bundle = {"text/html": MISSING + primitives.fragment(figure), "text/plain": "figure"}
        if self._handle is not None:
            self._handle.update(bundle, raw=True)
            return
        if not Shown.sent:
            display({"text/html": f"<script>{get_plotlyjs()}</script>"}, raw=True)
            Shown.sent = True
        self._handle = display(bundle, raw=True, display_id=True)


class Panel:
    """`draw(**value)` below the controls; changing one of them draws anew.

    Attributes:
        controls: name -> ipywidgets control. value: name -> what is chosen. figure: what is shown (None
            before it is displayed). note: a line for what went wrong; the figure before stays.
    """

    def __init__(self, draw: Draw, controls_: Mapping[str, ipywidgets.Widget],
                 more: Sequence[ipywidgets.Widget] = ()):
        widgets = controls()
        self.draw, self.controls, self.figure = draw, dict(controls_), None
        self.note = widgets.HTML()
        row = widgets.HBox([*self.controls.values(), *more], layout=widgets.Layout(flex_flow="row wrap"))
        self.box = widgets.VBox([row, self.note])
        self._shown = Shown()
        self._quiet = False
        for control in self.controls.values():
            control.observe(lambda _: self.redraw(), "value")

    @property
    def value(self) -> dict[str, Any]:
        return {name: control.value for name, control in self.controls.items()}

    def redraw(self) -> None:
        """Draw what is chosen now."""
        if self._quiet:
            return
        self.note.value = "<i>computing ...</i>"
        try:
            self.figure = self.draw(**self.value)
        except VfmlabError as error:
            self.note.value = f"<b>{html.escape(str(error))}</b>"
            return
        except Exception as error:  # an exception of a callback would end in a log that nobody sees
            self.note.value = f"<b>{html.escape(f'{type(error).__name__}: {error}')}</b>"
            raise
        self.note.value = ""
        self._shown.show(self.figure)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Several changes of controls, drawn once."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False
        self.redraw()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._shown = Shown()
        display(self.box)
        self.redraw()


def choose(draw: Draw, headless: bool = False, **options: Sequence[Any]) -> Any:
    """`draw(**choices)` with a slider for each option of numbers and a drop-down for others.

    It begins with the first of each. headless: the figure of these.
    """
    if headless:
        return draw(**{name: values[0] for name, values in options.items()})
    widgets = controls()

    def control(name: str, values: Sequence[Any]) -> Any:
        if all(isinstance(value, int | float) for value in values):
            ordered = [(f"{value:g}", value) for value in sorted(values)]
            return widgets.SelectionSlider(options=ordered, value=values[0], description=name,
                                           continuous_update=False)
        return widgets.Dropdown(options=[(str(v), v) for v in values], description=name)

    return Panel(draw, {name: control(name, values) for name, values in options.items()})
