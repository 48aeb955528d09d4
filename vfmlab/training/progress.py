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
        shown = "  ".join(f"{k} {v:.4g}" for k, v in event.data.items() if isinstance(v, int | float))
        return f"{where}  {shown}  {clock(event.seconds_left)} left"
    if event.kind in ("start", "finish", "skip"):
        word = {"start": "starts", "finish": "finished", "skip": "was finished before"}[event.kind]
        return f"{event.run_id} {word}" + (f"; images: {event.data['data']}" if event.data.get("data") else "")
    if event.kind == "warning":
        return f"warning: {event.phase}: {event.data.get('message', '')}"
    numbers = {k: v.get("value") if isinstance(v, dict) else v for k, v in event.data.items()}
    shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items() if isinstance(v, int | float | str))
    return f"{event.kind}: {where}  {shown}"


def watch(events: Iterable[Event], mode: Mode = "auto", every: float = 10.0, stream: TextIO | None = None) -> Iterator[Event]:
    """Pass `events` through and show them: "bar" redraws a tqdm bar, "plain" writes a line every `every` seconds.

    "auto" takes the bar on a terminal or in a live notebook and plain lines elsewhere (logs, papermill), where a redrawn
    bar would fill the file with one line per tick.
    """
    stream = stream or sys.stderr
    if mode == "auto":
        mode = "bar" if stream.isatty() else "plain"
    bar: tqdm | None = None
    last = 0.0
    try:
        for event in events:
            if mode == "bar":
                if event.kind in ("start", "step"):  # preparations (a latent cache, say) are steps of a phase of their own
                    if bar is None or bar.desc.removesuffix(": ") != event.phase:
                        if bar is not None:
                            bar.close()
                        bar = tqdm(total=event.total, initial=event.samples, desc=event.phase, unit="img", unit_scale=True, file=stream)
                    numbers = {k: f"{v:.3g}" for k, v in list(event.data.items())[:4] if event.kind == "step" and isinstance(v, float)}
                    bar.set_postfix(numbers, refresh=False)
                    bar.update(event.samples - bar.n)
                elif event.kind == "finish" and bar is not None:
                    bar.update(event.total - bar.n)
                    bar.close()
                    bar = None
                if event.kind in ("warning", "evaluation", "skip") or event.data.get("data"):
                    tqdm.write(describe(event), file=stream)
            elif mode == "plain" and (event.kind not in ("step", "preview", "checkpoint") or time.monotonic() - last > every):
                print(describe(event), file=stream, flush=True)
                last = time.monotonic() if event.kind == "step" else last
            yield event
    finally:
        if bar is not None:
            bar.close()


def follow(events: Iterable[Event], mode: Mode = "auto", every: float = 10.0) -> list[Event]:
    """Run a job to its end and return what it told, previews' images of all but the last left out to save memory."""
    kept: list[Event] = []
    for event in watch(events, mode, every, sys.stdout):  # notebooks colour stderr as if something were wrong
        if event.kind == "preview":
            kept = [e for e in kept if e.kind != "preview"]
        kept.append(event)
    return kept
