"""Follow a stream of events: a bar where somebody watches, a line now and then where nobody does."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Literal, TextIO

from tqdm.auto import tqdm

from vfmlab.training.events import Event

Mode = Literal["auto", "bar", "plain", "none"]


def clock(seconds: float | None) -> str:
    """Seconds as m:ss or h:mm:ss; '?' when unknown."""
    if seconds is None:
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"


def describe(event: Event) -> str:
    """One line for one event."""
    where = f"{event.phase}  {event.samples:,}/{event.total:,} images"
    if event.kind == "step":
        numbers = {k: v for k, v in event.data.items() if isinstance(v, int | float) and k != "samples"}
        shown = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        return f"{where}  {shown}  {clock(event.seconds_left)} left"
    if event.kind in ("start", "finish", "skip"):
        word = {"start": "starts", "finish": "finished", "skip": "was finished before"}[event.kind]
        facts = (
            {"images: ": event.data.get("data"), "": event.data.get("note")} if event.kind == "start" else {}
        )
        return "; ".join([f"{event.run_id} {word}: {event.phase}",
                          *(f"{name}{fact}" for name, fact in facts.items() if fact)])
    if event.kind == "warning":
        return f"warning: {event.phase}: {event.data.get('message', '')}"
    numbers = {k: v.get("value") if isinstance(v, dict) else v for k, v in event.data.items()}
    pairs = ((k, v) for k, v in numbers.items() if isinstance(v, int | float | str))
    shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in pairs)
    return f"{event.kind}: {where}  {shown}"


class Progress:
    """Shows events as they come: `with Progress() as show: for event in events: show(event)`.

    Args:
        mode: "bar" redraws a tqdm bar, "plain" writes a line every `every` seconds, "none" shows nothing.
            "auto" takes the bar on a terminal or in a live notebook and plain lines elsewhere (logs,
            papermill), where a redrawn bar would fill the file with one line per tick.
        stream: None: standard error.
    """

    def __init__(self, mode: Mode = "auto", every: float = 10.0, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.mode = ("bar" if self.stream.isatty() else "plain") if mode == "auto" else mode
        self.every, self.last = every, 0.0
        self.bar: tqdm | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        if self.mode == "bar":
            self._draw(event)
        elif self.mode == "plain":
            often = event.kind in ("step", "preview", "checkpoint")
            if not often or time.monotonic() - self.last > self.every:
                print(describe(event), file=self.stream, flush=True)
                self.last = time.monotonic() if event.kind == "step" else self.last

    def _draw(self, event: Event) -> None:
        # preparations (a latent cache, say) are steps of a phase of their own
        if event.kind in ("start", "step"):
            if self.bar is None or self.bar.desc.removesuffix(": ") != event.phase:
                self._close()
                total, done = event.total, event.samples
                self.bar = tqdm(total=total, initial=done, desc=event.phase, unit="img", unit_scale=True,
                                file=self.stream)
            if event.kind == "start" and (event.data.get("data") or event.data.get("note")):
                tqdm.write(describe(event), file=self.stream)
            numbers = [(k, v) for k, v in list(event.data.items())[:4] if event.kind == "step"
                       and isinstance(v, float)]
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in numbers}, refresh=False)
            self.bar.update(event.samples - self.bar.n)
        elif event.kind == "finish" and self.bar is not None:
            self.bar.update(event.total - self.bar.n)
            self._close()
        elif event.kind in ("warning", "evaluation", "skip"):
            tqdm.write(describe(event), file=self.stream)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def watch(events: Iterable[Event], mode: Mode = "auto", every: float = 10.0) -> Iterator[Event]:
    """Pass `events` through and show them as :class:`Progress` does."""
    with Progress(mode, every) as show:
        for event in events:
            show(event)
            yield event


def follow(events: Iterable[Event], mode: Mode = "auto") -> list[Event]:
    """Run a job to its end and return its events, with images of the last preview only (memory)."""
    done: list[Event] = []
    with Progress(mode, stream=sys.stdout) as show:  # notebooks colour stderr as if something were wrong
        for event in events:
            show(event)
            if event.kind == "preview":
                done = [e for e in done if e.kind != "preview"]
            done.append(event)
    return done
