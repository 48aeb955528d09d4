"""Train and evaluate many rows, side by side in processes of their own, and tell how far it is.

A lane takes one row after the other: all its phases, each evaluated when it is trained. What is finished is not done
again. Rows that share a stage wait for each other, so that nothing is trained twice. A row that fails is named and left;
the others go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from vfmlab import api, config, runs
from vfmlab.errors import VfmlabError
from vfmlab.studies.rows import Row
from vfmlab.training.events import Event
from vfmlab.training.progress import clock, watch

LANE = (sys.executable, "-m", "vfmlab.studies.lane")  # takes the file of a job
POLL = 0.5  # seconds between looks at the lanes
EVERY = 30.0  # seconds between lines where nobody watches a bar


def work(phases: Sequence[config.Phase], root: str | Path) -> Iterator[Event]:
    """Train and evaluate phase after phase; events of the training."""
    for phase in phases:
        yield from api.train(phase, root)
        api.evaluate(phase.id, root)


def train(rows: Sequence[Row], root: Path, jobs: int = 2, stream: TextIO | None = None) -> dict[str, str]:
    """Train and evaluate all rows, `jobs` at a time with one thread each; one job works in this process.

    Returns:
        id of a row's last phase -> why it could not be had, for the rows that failed. Ctrl-C saves all and is raised.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    stream = stream or sys.stderr
    return _here(rows, root, stream) if jobs <= 1 else _Lanes(rows, root, jobs, stream).run()


def _here(rows: Sequence[Row], root: Path, stream: TextIO) -> dict[str, str]:
    failed: dict[str, str] = {}
    for i, row in enumerate(rows):
        print(f"row {i + 1} of {len(rows)}: {row.label}, seed {row.seed}", file=stream, flush=True)
        try:
            for _ in watch(work(row.phases, root), stream=stream):
                pass
        except Exception as error:  # one row's failure, whatever it is, must not cost the others
            failed[row.phases[-1].id] = _reason(error)
            print(f"row '{row.label}', seed {row.seed} failed: {_reason(error)}", file=stream, flush=True)
            if not isinstance(error, VfmlabError):
                traceback.print_exc(file=stream)
    return failed


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return text if isinstance(error, VfmlabError) else f"{type(error).__name__}: {text}"


class _Lanes:
    def __init__(self, rows: Sequence[Row], root: Path, jobs: int, stream: TextIO):
        self.rows, self.root, self.jobs, self.stream = list(rows), root, jobs, stream
        self.folder = root / ".configs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.phases = {phase.id: phase for row in rows for phase in row.phases}
        self.running: dict[subprocess.Popen, Row] = {}
        self.failed: dict[str, str] = {}
        self.broken: dict[str, str] = {}  # phase -> why; rows that need it fail too
        self.done = 0

    def run(self) -> dict[str, str]:
        waiting, told = list(self.rows), time.monotonic()
        bar = tqdm(total=100, unit="%", desc="compare", file=self.stream, bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}",
                   disable=not self.stream.isatty())  # fmt: skip
        try:
            while waiting or self.running:
                while len(self.running) < self.jobs and (row := self._next(waiting)) is not None:
                    waiting.remove(row)
                    self._start(row)
                for process in [p for p in self.running if p.poll() is not None]:
                    self._ended(self.running.pop(process), process.returncode)
                share, line = self._state()
                bar.n = round(100 * share)
                bar.set_postfix_str(line)
                if bar.disable and time.monotonic() - told > EVERY:
                    print(f"{100 * share:.0f}% {line}", file=self.stream, flush=True)
                    told = time.monotonic()
                if self.running:
                    time.sleep(POLL)
        finally:
            for process in self.running:
                process.terminate()  # the training saves its state
            for process in self.running:
                process.wait()
            bar.close()
        return self.failed

    def _next(self, waiting: list[Row]) -> Row | None:
        """The first row none of whose unfinished phases is being worked on by another."""
        busy = {phase.id for row in self.running.values() for phase in row.phases}
        for row in list(waiting):
            if why := next((self.broken[phase.id] for phase in row.phases if phase.id in self.broken), None):
                waiting.remove(row)
                self._fail(row, why)
            elif not any(phase.id in busy and not finished(phase, self.root) for phase in row.phases):
                return row
        return None

    def _start(self, row: Row) -> None:
        last = row.phases[-1].id
        job = {"phases": [json.loads(phase.recipe.model_dump_json()) for phase in row.phases], "root": str(self.root)}
        runs.write_json(self.folder / f"{last}.json", job)
        with open(self.folder / f"{last}.log", "wb") as log:
            process = subprocess.Popen([*LANE, str(self.folder / f"{last}.json")], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.running[process] = row

    def _ended(self, row: Row, code: int) -> None:
        if code == 0:
            self.done += 1
            return
        log = self.folder / f"{row.phases[-1].id}.log"
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {code}"
        if (phase := next((p for p in row.phases if not finished(p, self.root)), None)) is not None:
            self.broken[phase.id] = why
        self._fail(row, why, f" (log: {log})")

    def _fail(self, row: Row, why: str, more: str = "") -> None:
        self.failed[row.phases[-1].id] = why
        tqdm.write(f"row '{row.label}', seed {row.seed} failed: {why}{more}", file=self.stream)

    def _state(self) -> tuple[float, str]:
        """Share of the training that is done, and a line: rows, what runs, time left."""
        spent, samples = {}, {}
        left = {phase.id: phase.budget for phase in self.phases.values()}
        total, now = dict(left), {}
        for id_, phase in self.phases.items():
            if not (self.root / id_ / "config.json").exists():
                continue
            status = runs.RunDir(self.root / id_).status()
            now[id_] = status.samples / max(total[id_], 1)
            left[id_] = 0 if status.state == "finished" else max(0, total[id_] - status.samples)
            if status.samples:
                spent[phase.kind] = spent.get(phase.kind, 0.0) + status.seconds
                samples[phase.kind] = samples.get(phase.kind, 0) + status.samples
        rate = {kind: spent[kind] / samples[kind] for kind in samples if spent[kind] > 0}
        guess = max(rate.values(), default=0.0)  # a kind that has not begun yet: as the slowest that has
        cost = {id_: rate.get(phase.kind, guess) for id_, phase in self.phases.items()}
        seconds = sum(n * cost[id_] for id_, n in left.items())
        whole = sum(n * cost[id_] for id_, n in total.items())
        at = []
        for row in self.running.values():
            phase = next((p for p in row.phases if not finished(p, self.root)), row.phases[-1])
            at.append(f"{row.label} s{row.seed} {phase.stage} {100 * now.get(phase.id, 0):.0f}%")
        lanes = max(1, min(self.jobs, len(self.running) or self.jobs))
        time_left = f"about {clock(seconds / lanes)} left" if rate else "time left unknown yet"
        gone = f", {len(self.failed)} failed" if self.failed else ""
        line = f"{self.done} of {len(self.rows)} rows{gone}; {'; '.join(at)}; {time_left}"
        return 1 - seconds / whole if whole else 0.0, line


def finished(run: config.Phase, root: Path) -> bool:
    return (root / run.id / "config.json").exists() and runs.RunDir(root / run.id).status().state == "finished"
