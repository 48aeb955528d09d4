"""The process that executes points, one after the other: `python -m vfmlab.studies.sweep.worker`, folders of points on standard input.

It ends when its input does, which is what happens when the sweep ends in any way, killed or not; the kernel is then told
to stop, so that a training saves its state.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import filelock
import psutil

from vfmlab import runs
from vfmlab.studies.sweep import handout
from vfmlab.studies.sweep.folder import Folder

GRACE = 90.0  # seconds in which a stopped notebook can save
AGAIN = 20.0  # seconds after which it is told once more: a kernel between two cells does not hear it
STOPPED = 130


def main() -> int:
    """0: the input ended while nothing was to be done; 130: stopped in a point, about which nothing was decided."""
    todo: queue.Queue[str | None] = queue.Queue()
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(todo, stopping), daemon=True).start()
    while (path := todo.get()) is not None:
        folder = Folder(Path(path))
        with filelock.FileLock(folder.path / ".lock"):  # the process of a killed sweep may still be saving
            if folder.outcome() is None and not execute(folder, stopping):
                return STOPPED
    return 0


def execute(folder: Folder, stopping: threading.Event) -> bool:
    """Run the notebook of a point and put down what came out, also where it failed; False: it was stopped."""
    import papermill

    job = folder.job()
    began, error, book = time.monotonic(), None, None
    try:
        book = papermill.execute_notebook(job["notebook"], folder.notebook, job["parameters"], progress_bar=False, kernel_name=job["kernel"])
    except papermill.PapermillExecutionError as problem:
        if problem.ename == "KeyboardInterrupt":
            return False
        error = f"{_line(f'{problem.ename}: {problem.evalue}')} (cell {problem.exec_count})"
    except Exception as problem:  # a kernel that died, a notebook that cannot be written: the other points go on
        error = _line(f"{type(problem).__name__}: {problem}")
    if error is not None:
        if stopping.is_set():
            return False
        folder.end("failed", time.monotonic() - began, error)
        return True
    found, picture = handout.harvest(book)
    if picture is not None:
        runs.write_atomic(folder.image, picture)
    folder.end("finished", time.monotonic() - began, **found)
    return True


def _line(text: str) -> str:
    return " ".join(text.split())[:1000]


def _listen(todo: queue.Queue[str | None], stopping: threading.Event) -> None:
    """Pass on what comes in; at its end interrupt the kernel, and in the end use force."""
    rest = b""
    while part := os.read(0, 4096):  # not sys.stdin: a thread that waits in its buffer breaks the end of the process
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            todo.put(line.decode())
    stopping.set()
    todo.put(None)
    end, told = time.monotonic() + GRACE, -AGAIN
    while time.monotonic() < end:
        kernels = psutil.Process().children()
        if kernels and time.monotonic() - told > AGAIN:
            _signal(kernels, signal.SIGINT)
            told = time.monotonic()
        time.sleep(0.1)
    _signal(psutil.Process().children(recursive=True), signal.SIGKILL)
    os._exit(STOPPED)


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
