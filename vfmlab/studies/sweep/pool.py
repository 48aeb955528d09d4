"""Points side by side: one process each, one GPU each where there are several, and a line that says how far it is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from vfmlab import runs
from vfmlab.studies.sweep.book import Book
from vfmlab.studies.sweep.folder import Folder
from vfmlab.studies.sweep.grid import Point
from vfmlab.studies.sweep.worker import STOPPED
from vfmlab.training.progress import clock

WORKER = (sys.executable, "-m", "vfmlab.studies.sweep.worker")  # takes folders of points
POLL = 0.2  # seconds between looks at the processes
EVERY = 30.0  # seconds between lines where nobody watches a bar


class Source(Protocol):
    """Where points come from: a list, or a search that decides on the next one when it knows the last."""

    def take(self) -> Point | None:
        """The next point, or None while there is none to be had."""

    def put_back(self, point: Point) -> None:
        """`point` cannot begin yet, because its run is being trained by another."""

    def ended(self, point: Point, outcome: dict[str, Any]) -> None: ...

    @property
    def left(self) -> int:
        """How many points have not been taken."""


class Queue:
    """Points in a fixed order."""

    def __init__(self, points: Sequence[Point]):
        self.waiting = list(points)

    def take(self) -> Point | None:
        return self.waiting.pop(0) if self.waiting else None

    def put_back(self, point: Point) -> None:
        self.waiting.insert(0, point)

    def ended(self, point: Point, outcome: dict[str, Any]) -> None:
        pass

    @property
    def left(self) -> int:
        return len(self.waiting)


def gpus() -> list[str]:
    """What to put into CUDA_VISIBLE_DEVICES for each GPU that this process may use; the list is empty without any."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    visible = [name.strip() for name in named.split(",") if name.strip()] if named is not None else [str(i) for i in range(count)]
    return visible[:count]


@dataclass
class Slot:
    """A process that executes points, and the one it is at."""

    number: int
    process: subprocess.Popen | None = None
    point: Point | None = None
    began: float = 0.0
    phases: frozenset[str] = frozenset()  # runs that the point may have to train


class Pool:
    """Works through a source with `jobs` processes. devices: GPUs to be dealt out; empty: the environment as it is."""

    def __init__(self, book: Book, out: Path, root: Path, jobs: int, devices: Sequence[str], stream: TextIO, names: Sequence[str] = ()):
        self.book, self.out, self.root, self.devices, self.stream = book, out, root, list(devices), stream
        self.slots = [Slot(i) for i in range(jobs)]
        self.names = names  # of what varies, for the lines about points
        self.seconds: list[float] = []  # of points that were finished, now or before
        self.failed = 0

    def folder(self, point: Point) -> Folder:
        return Folder(self.out / "points" / point.key)

    @property
    def running(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.point is not None]

    def work(self, source: Source, total: int) -> None:
        """Until the source is empty and all have ended. Ctrl-C tells the points to stop, waits until they have saved, and goes on up."""
        bar = tqdm(total=total, initial=total - source.left, desc="sweep", unit="point", file=self.stream, disable=not self.stream.isatty())
        told = time.monotonic()
        try:
            while True:
                self._fill(source)
                if not self.running:
                    return
                done = total - source.left - len(self.running)
                bar.update(done - bar.n)
                bar.set_postfix_str(self.line(source.left), refresh=True)
                if bar.disable and time.monotonic() - told > EVERY:
                    print(f"{done} of {total} points; {self.line(source.left)}", file=self.stream, flush=True)
                    told = time.monotonic()
                time.sleep(POLL)
                for slot in self.running:
                    if slot.process.poll() is not None or self.folder(slot.point).outcome() is not None:
                        self._ended(slot, source)
        finally:
            bar.update(total - source.left - len(self.running) - bar.n)
            for slot in self.slots:
                if slot.process is not None:
                    slot.process.stdin.close()  # tells it to stop
            for slot in self.slots:
                if slot.process is not None:
                    slot.process.wait()
            bar.close()

    def _fill(self, source: Source) -> None:
        """Give points to free slots. A run that one point may train is left alone by the others until it is finished."""
        aside: list[Point] = []
        free = [slot for slot in self.slots if slot.point is None]
        while free and (point := source.take()) is not None:
            unfinished = frozenset(run.id for run in self.book.check(point) if runs.RunDir(self.root / run.id).status().state != "finished")
            if any(unfinished & slot.phases for slot in self.running):
                aside.append(point)
            else:
                self._start(free.pop(0), point, unfinished)
        for point in reversed(aside):
            source.put_back(point)

    def _start(self, slot: Slot, point: Point, phases: frozenset[str]) -> None:
        folder, copy = self.folder(point), self.out / "notebooks" / f"{self.book.code}.ipynb"
        given = {"parameters": point.parameters, "set": point.set}
        folder.begin(notebook=str(copy), kernel=self.book.kernel, parameters=self.book.given(point, self.root), point=given)
        if slot.process is None or slot.process.poll() is not None:
            slot.process = self._process(slot.number)
        slot.point, slot.began, slot.phases = point, time.monotonic(), phases
        slot.process.stdin.write(f"{folder.path}\n".encode())
        slot.process.stdin.flush()

    def _process(self, number: int) -> subprocess.Popen:
        environment = {**os.environ, "VFMLAB_WAIT": "1"}  # sweeps on several machines may share runs
        if len(self.slots) > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[number % len(self.devices)]
        with open(self._log(number), "wb") as log:
            # A session of its own: Ctrl-C is for the sweep, which then tells its points to stop.
            return subprocess.Popen(WORKER, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _log(self, number: int) -> Path:
        return self.out / f"worker-{os.getpid()}-{number}.log"

    def _ended(self, slot: Slot, source: Source) -> None:
        point, slot.point, slot.phases = slot.point, None, frozenset()
        folder, code = self.folder(point), slot.process.poll()
        if folder.outcome() is None:
            if code == STOPPED:
                raise KeyboardInterrupt  # somebody interrupted the kernel itself
            lines = [line for line in self._log(slot.number).read_text(errors="replace").splitlines() if line.strip()]
            why = f"killed by signal {-code} (out of memory?)" if code < 0 else lines[-1].strip() if lines else f"exit code {code}"
            folder.end("failed", time.monotonic() - slot.began, why)
        outcome = folder.outcome()
        label = point.label(self.names) or point.key
        if outcome["state"] == "finished":
            self.seconds.append(outcome["seconds"])
            tqdm.write(f"{label}: done in {clock(outcome['seconds'])}", file=self.stream)
        else:
            self.failed += 1
            tqdm.write(f"{label}: failed: {outcome['error']} (see {folder.notebook})", file=self.stream)
        source.ended(point, outcome)

    def line(self, waiting: int) -> str:
        """What runs, how many failed, time left."""
        parts = [f"{len(self.running)} running"]
        now = [f"{run.name} {100 * run.share:.0f}%" for run in _trained(self.root, frozenset().union(*(slot.phases for slot in self.running)))]
        parts += [f"({', '.join(now)})"] if now else []
        failed = f", {self.failed} failed" if self.failed else ""
        left = self.left(waiting)
        return f"{' '.join(parts)}{failed}, {'time left unknown yet' if left is None else f'about {clock(left)} left'}"

    def left(self, waiting: int) -> float | None:
        """Seconds, as if each point took as long as those finished so far did on average; None before there is one."""
        if not self.seconds:
            return None
        mean, now = sum(self.seconds) / len(self.seconds), time.monotonic()
        rest = [max(mean - (now - slot.began), 0.0) for slot in self.running]
        lanes = min(len(self.slots), max(len(self.running) + waiting, 1))
        return max((sum(rest) + mean * waiting) / lanes, *rest, 0.0)


@dataclass(frozen=True)
class _Trained:
    name: str
    share: float


def _trained(root: Path, ids: Iterable[str]) -> list[_Trained]:
    """The runs among `ids` that are being trained now."""
    found = []
    for id_ in sorted(ids):
        status = runs.RunDir(root / id_).status()
        if status.state == "running" and status.total:
            found.append(_Trained(id_.rpartition("-")[0], status.samples / status.total))
    return found
