"""The one engine behind every study: a graph of nodes (phases, reports, notebooks), run by dask.

A node is a module-level function with plain JSON as its arguments; nodes with one key are one node. Who works
is :mod:`~vfmlab.studies.cluster`'s matter. All state is in files: a phase whose worker dies goes on from its
checkpoint on another one, and progress is read from the run directories.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from vfmlab import api, config, runs
from vfmlab.errors import RunBusy, Stopped, TrainingError, VfmlabError
from vfmlab.studies.cluster import connect
from vfmlab.training.progress import clock

if TYPE_CHECKING:
    from distributed import Client, Future

POLL = 0.5  # seconds between looks at the graph
EVERY = 30.0  # seconds between lines where no terminal shows a bar
AGAIN = 20.0  # seconds between interrupts of a kernel: one between two cells goes unnoticed


@dataclass(frozen=True)
class Node:
    """One thing to do.

    Args:
        key: the same for the same work; for a phase its run directory. kind: nodes of one take as long per
        unit. needs: keys of nodes without which it cannot be. after: of nodes that end first, well or not.
        units: images to train on, or 1. folder: the run directory, for a phase.
    """

    key: str
    kind: str
    label: str
    task: Callable[..., object]
    arguments: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    units: int = 1
    folder: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a node ended. error: one line, or None; trace: of a program error; stopped: on request, or with the
    cluster, which decides nothing about the node."""

    seconds: float = 0.0
    error: str | None = None
    trace: str | None = None
    stopped: bool = False


def phase_nodes(phases: Sequence[config.Phase], root: Path, label: str, retry: bool = True,
                evaluate: bool = False, needs: tuple[str, ...] = ()) -> list[Node]:
    """A node for each phase, each after the one before it, the first after `needs`.

    Args:
        retry: train what failed before. evaluate: add a node that measures each phase.
    """
    nodes, now = [], time.time()
    for phase in phases:
        key, name = str(root / phase.id), f"{label} {phase.stage}"
        recipe = phase.recipe.model_dump(mode="json")
        given = {"recipe": recipe, "root": str(root), "retry": retry, "since": now}
        units = max(1, phase.budget)
        nodes.append(Node(key, phase.kind, name, train_phase, given, needs, units=units, folder=key))
        needs = (key,)
        if evaluate:
            given = {"ref": phase.id, "root": str(root), "protocol": recipe["protocol"]}
            nodes.append(Node(report_key(key), "evaluation", f"{name} report", api.evaluate, given, needs))
    return nodes


def report_key(key: str) -> str:
    """Key of the node that measures the phase `key`."""
    return f"{key}/report.json"


def train_phase(recipe: dict[str, Any], root: str, retry: bool, since: float) -> None:
    """Train the last phase of a recipe from where it stands; a run that another study trains is waited for.

    Raises:
        VfmlabError: as `api.train`; the phase failed before, or after `since` (s of the clock) in this study.
    """
    run = config.parse(recipe)
    folder = runs.RunDir(Path(root) / run.id)
    status = folder.status()
    if status.state == "failed" and (not retry or status.heartbeat > since):
        raise TrainingError(status.message + ("" if retry else " (failed before; --retry trains it again)"))
    while True:
        try:
            deque(api.train(run, root), maxlen=0)
            return
        except RunBusy:
            if stopping(str(folder.path)):
                raise Stopped("stopped on request") from None
            time.sleep(POLL)


# -- on a worker -------------------------------------------------------------------------------------------

_one = threading.Lock()  # random numbers and threads belong to a process, so it does one node at a time
_running: set[str] = set()
_stopping: set[str] = set()
_kernels: list[subprocess.Popen[Any]] = []
_interrupted = -AGAIN


def _perform(task: Callable[..., object], arguments: dict[str, Any], key: str, needs: Sequence[Outcome],
             after: object) -> Outcome:
    """Do a node; whatever goes wrong is its outcome, so that the others go on."""
    if failed := next((outcome for outcome in needs if outcome.error), None):
        return Outcome(error=failed.error, stopped=failed.stopped)
    began = time.monotonic()
    with _one:
        _running.add(key)
        try:
            task(**arguments)
            return Outcome(time.monotonic() - began)
        except VfmlabError as error:
            return Outcome(time.monotonic() - began, _line(error), stopped=isinstance(error, Stopped))
        except BaseException as error:  # also what a signal raises: the worker goes on
            text = f"{type(error).__name__}: {_line(error)}".rstrip(": ")
            return Outcome(time.monotonic() - began, text, traceback.format_exc())
        finally:
            _running.discard(key)
            _stopping.discard(key)


def stopping(key: str) -> bool:
    """Whether the node `key`, which runs in this process, was asked to stop."""
    return key in _stopping


def interruptible(kernel: subprocess.Popen[Any]) -> None:
    """From now on, a study that stops interrupts this process, which a node of this process started."""
    _kernels.append(kernel)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:1000]


def _stop(folders: Mapping[str, str | None]) -> int:
    """Ask what this process runs of `folders` (key -> run directory) to save and end; how many still run."""
    global _interrupted
    mine = _running & folders.keys()
    _stopping.update(mine)
    for key in mine:
        run = folders[key] and runs.RunDir(Path(folders[key]))
        if run and (status := run.status()).state == "running" and status.pid == os.getpid():
            run.request_stop()
        elif not run and time.monotonic() - _interrupted > AGAIN:
            _interrupted = time.monotonic()
            _kernels[:] = [kernel for kernel in _kernels if kernel.poll() is None]
            for kernel in _kernels:
                with contextlib.suppress(OSError):
                    kernel.send_signal(signal.SIGINT)
    return len(mine)


# -- the graph ---------------------------------------------------------------------------------------------


def run(nodes: Iterable[Node] = (), jobs: int | None = None, cluster: str | None = None,
        stream: TextIO | None = None, more: Callable[[int], Iterable[Node]] = lambda free: (),
        done: Callable[[Node, Outcome], object] = lambda node, outcome: None) -> dict[str, Outcome]:
    """Run a graph to its end; a node that fails fails those that need it, the others go on.

    Args:
        nodes: each after those that it needs. jobs, cluster: see :func:`vfmlab.studies.cluster.connect`.
        stream: where progress goes, None: stderr. more: further nodes, given the number of idle workers,
        called whenever a node has ended. done: called with every node that has ended.

    Returns:
        key -> outcome. Ctrl-C and SIGTERM save what is being trained and are then raised.

    Raises:
        ConfigError: no such cluster, or `jobs` that cannot be.
    """
    nodes = list(nodes)
    with _terminating(), connect(cluster, jobs, len(nodes)) as client:
        return _Graph(stream or sys.stderr, more, done).run(client, nodes)


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM ends a study as Ctrl-C does: with SystemExit, so that what is being trained is saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


@dataclass
class _Graph:
    stream: TextIO
    more: Callable[[int], Iterable[Node]]
    done: Callable[[Node, Outcome], object]
    nodes: dict[str, Node] = field(default_factory=dict)
    futures: dict[str, Future] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, client: Client, nodes: Iterable[Node]) -> dict[str, Outcome]:
        from distributed import wait

        bar = tqdm(total=100, desc="study", file=self.stream, disable=not self.stream.isatty(),
                   bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}")
        shown = time.monotonic()
        try:
            self._submit(client, nodes)
            self._submit(client, self.more(self._idle(client)))
            while open_ := [future for key, future in self.futures.items() if key not in self.outcomes]:
                with contextlib.suppress(TimeoutError, CancelledError):
                    wait(open_, timeout=POLL, return_when="FIRST_COMPLETED")
                if self._collect():
                    self._submit(client, self.more(self._idle(client)))
                if not bar.disable or time.monotonic() - shown > EVERY:
                    share, line = self._progress(len(client.nthreads()))
                    bar.n = round(100 * share)
                    bar.set_postfix_str(line)
                    if bar.disable:
                        print(f"{100 * share:.0f}% {line}", file=self.stream, flush=True)
                        shown = time.monotonic()
            return self.outcomes
        except BaseException:
            self._interrupt(client)
            raise
        finally:
            bar.close()

    def _submit(self, client: Client, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node.key not in self.nodes:
                self.nodes[node.key] = node
                needs, after = ([self.futures[key] for key in keys] for keys in (node.needs, node.after))
                given = (node.task, dict(node.arguments), node.key, needs, after)
                self.futures[node.key] = client.submit(_perform, *given, key=(node.kind, node.key))

    def _idle(self, client: Client) -> int:
        open_ = [node for key, node in self.nodes.items() if key not in self.outcomes]
        chains = {node.key for node in open_} - {need for node in open_ for need in node.needs}
        return max(0, (len(client.nthreads()) or 1) - len(chains))

    def _collect(self) -> bool:
        """Take in what has ended; whether there was any."""
        ended = [key for key, future in self.futures.items() if key not in self.outcomes and future.done()]
        for key in ended:
            self.outcomes[key] = outcome = _outcome(self.futures[key])
            node = self.nodes[key]
            before = [self.outcomes[need] for need in node.needs if need in self.outcomes]
            if outcome.error is not None and not any(other.error for other in before):
                tqdm.write(f"{node.label} failed: {outcome.error}", file=self.stream)
            if outcome.trace is not None:
                tqdm.write(outcome.trace.rstrip(), file=self.stream)
            self.done(node, outcome)
        return bool(ended)

    def _interrupt(self, client: Client) -> None:
        """Nothing new begins; what is being trained saves. A second Ctrl-C does not wait for it."""
        client.cancel([future for key, future in self.futures.items() if key not in self.outcomes])
        folders = {key: node.folder for key, node in self.nodes.items()}
        while any(client.run(_stop, folders, on_error="ignore").values()):
            time.sleep(POLL)

    def _progress(self, workers: int) -> tuple[float, str]:
        """Share of the whole that is done, and a line: nodes, what runs, time left."""
        spent, units = Counter(), Counter()
        left: dict[str, float] = {}
        now = []
        for key, node in self.nodes.items():
            ended = key in self.outcomes
            share = float(ended)
            if node.folder is not None:
                status = runs.RunDir(Path(node.folder)).status()
                if status.samples:
                    spent[node.kind] += status.seconds
                    units[node.kind] += status.samples
                if not ended:
                    share = min(status.samples / node.units, 1.0)
                    now += [f"{node.label} {100 * share:.0f}%"] if status.state == "running" else []
            elif ended and self.outcomes[key].error is None:
                spent[node.kind] += self.outcomes[key].seconds
                units[node.kind] += 1
            left[key] = node.units * (1 - share)
        rate = {kind: spent[kind] / units[kind] for kind in units if spent[kind] > 0}
        trained = {node.kind for node in self.nodes.values() if node.folder}
        slowest = max((rate[kind] for kind in trained & rate.keys()), default=0.0)
        cost = {key: rate.get(node.kind, slowest if node.folder else 0.0) for key, node in self.nodes.items()}
        seconds, whole, end = 0.0, 0.0, {}
        for key, node in self.nodes.items():  # each after those that it needs
            seconds, whole = seconds + left[key] * cost[key], whole + node.units * cost[key]
            before = max((end[need] for need in (*node.needs, *node.after)), default=0.0)
            end[key] = left[key] * cost[key] + before
        rest = max(seconds / max(workers, 1), *end.values(), 0.0)
        failed = sum(outcome.error is not None for outcome in self.outcomes.values())
        parts = [f"{len(self.outcomes)} of {len(self.nodes)} done" + (f", {failed} failed" if failed else "")]
        parts += [", ".join(now)] if now else [] if workers else ["no worker yet"]
        ended = len(self.outcomes) / len(self.nodes)
        known = rest > 0 or ended == 1  # what is left may be of a kind of which none has ended yet
        parts += [f"about {clock(rest)} left" if known else "time left unknown yet"]
        return 1 - seconds / whole if known and whole else ended, "; ".join(parts)


def _outcome(future: Future) -> Outcome:
    if future.status == "finished":
        return future.result()
    if future.status == "error":
        error = future.exception()
        if type(error).__name__ == "KilledWorker":
            return Outcome(error=f"{error.allowed_failures + 1} workers died running it: out of memory?")
        return Outcome(error=f"{type(error).__name__}: {_line(error)}")
    return Outcome(error="the cluster ended before it was done", stopped=True)
