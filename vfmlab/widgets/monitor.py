"""Training in a notebook: curves, previews, time left, and a button that stops and saves.

    await widgets.train(run, root)

The cell lasts until the training ends, so that the cells below find it finished. Between two events it gives
the kernel a moment to hear the button, which is why it is awaited (ipykernel 7.4 and later; elsewhere the
notebook's own interrupt button stops and saves just as well).
"""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from vfmlab import api, config, runs
from vfmlab.errors import Interrupted
from vfmlab.plots import figures, primitives
from vfmlab.training import progress
from vfmlab.training.events import Event
from vfmlab.widgets.panel import Shown, controls

EVERY = 2.0  # seconds between two drawings of the curves, at least
SHARE = 0.05  # of the time that drawing may take


async def train(run: config.Recipe | dict[str, Any] | str, root: str | Path = "runs", headless: bool = False,
                **how: Any) -> list[Event]:
    """Train what is not trained yet and show it; see `vfmlab.train`. headless: a line now and then.

    how: `overrides`, `until`, as there.

    Returns:
        the events, previews of all but the last left out.

    Raises:
        Interrupted: by the button; the state is saved, and the same cell goes on from there.
    """
    if headless:
        return progress.follow(api.train(run, root, **how), "plain")
    return await Monitor(runs.root_folder(root)).follow(api.train(run, root, **how))


class Monitor:
    """What is shown. stop: the button; bar: images seen; line: where it is."""

    def __init__(self, root: Path):
        widgets = controls()
        self.root, self.stopping = root, False
        self.line = widgets.HTML("<i>starting ...</i>")
        self.bar = widgets.IntProgress(0, 0, 1, layout=widgets.Layout(width="24em"))
        self.stop = widgets.Button(description="stop and save", icon="stop", button_style="warning")
        self.stop.on_click(lambda _: self._press())
        self.box = widgets.VBox([widgets.HBox([self.bar, self.stop]), self.line])
        self.curves, self.preview, self._run = Shown(), Shown(), ""
        self._next = 0.0  # when the curves may be drawn again

    def _press(self) -> None:
        self.stopping = self.stop.disabled = True
        self.stop.description = "stopping ..."

    async def follow(self, events: Iterator[Event]) -> list[Event]:
        """Consume the events of a training and show them."""
        from IPython.display import display

        display(self.box)
        shown: list[Event] = []
        with closing(events):  # closing saves
            try:
                for event in events:
                    if event.kind == "preview":
                        shown = [e for e in shown if e.kind != "preview"]
                    shown.append(event)
                    self.show(event)
                    await asyncio.sleep(0.002)  # messages of the browser are read here
                    if self.stopping:
                        break
                else:
                    return shown
            finally:
                self.stop.disabled = True
        message = f"stopped by the button; run '{self._run}' is saved: run this cell again to go on"
        self.line.value, self.stop.description = html.escape(message), "stopped"
        raise Interrupted(message)

    def show(self, event: Event) -> None:
        """Bring line, bar, preview and curves up to date."""
        if event.run_id != self._run:
            self._run, self._next = event.run_id, 0.0
        self.bar.max, self.bar.value = max(event.total, 1), event.samples
        if event.kind == "preview":
            self.preview.show(primitives.grid(event.data["images"], columns=event.data.get("columns") or 8,
                                              title=f"after {event.samples:,} images"))
        elif event.kind != "checkpoint":  # says nothing about the time left
            self.line.value = html.escape(f"{event.run_id}: "
                                          f"{progress.describe(event).removeprefix(f'{event.run_id} ')}")
        began = time.monotonic()
        if event.kind in ("finish", "skip") or (event.kind == "step" and began > self._next):
            folder = runs.RunDir(self.root / event.run_id)
            if folder.metrics("step"):
                self.curves.show(figures.training_curves([folder]))
            self._next = time.monotonic() + max(EVERY, (time.monotonic() - began) / SHARE)
