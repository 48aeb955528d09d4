"""Ctrl-C, SIGTERM and stop requests while training: finish the step, save, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from vfmlab.errors import Stopped

REQUEST = 256  # in place of a signal's number: a stop request in the run's directory


class Stop:
    """Turns signals into a request to stop at the next step boundary.

    A step must not be torn: a signal inside one only sets `asked`. Between steps (previews, evaluation,
    loading) it raises at once, and so does a second Ctrl-C anywhere. Signals reach the main thread only;
    elsewhere this does nothing, and a generator is stopped by closing it.

    Attributes:
        asked: 0, the signal's number, or REQUEST. busy: inside a step. together: several processes have to
            stop at the same step, so a signal between steps waits for the next one.
    """

    def __init__(self):
        self.asked, self.busy, self.together, self._listening = 0, False, False, False
        self._turn = ExitStack()

    def raise_now(self) -> None:
        """End as the signal would: KeyboardInterrupt, or SystemExit 143 for SIGTERM; Stopped on request."""
        if self.asked == REQUEST:
            raise Stopped("stopped on request; started again, the run goes on")
        raise SystemExit(128 + signal.SIGTERM) if self.asked == signal.SIGTERM else KeyboardInterrupt

    def _handle(self, number: int, frame: object) -> None:
        again, self.asked = self.asked, number
        waits = self._listening and (self.busy or self.together)
        if not waits or (again and number == signal.SIGINT):
            self.raise_now()

    def terminating(self) -> AbstractContextManager[None]:
        """SIGTERM becomes SystemExit 143 all the while, so that `finally` clauses run."""
        return self._handler(signal.SIGTERM)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around the generator: signals are handled, and the caller's (a notebook's) random numbers stay."""
        with self.terminating(), self._turn:
            self._begin_turn()
            yield

    @contextmanager
    def away(self) -> Iterator[None]:
        """Around a `yield`: while the consumer computes, Ctrl-C and global random numbers are its own."""
        self._turn.close()
        try:
            yield
        finally:
            self._begin_turn()

    def _begin_turn(self) -> None:
        self._turn.enter_context(self._handler(signal.SIGINT))
        started = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._turn.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started
                                                       else []))
        self._listening = True
        self._turn.callback(setattr, self, "_listening", False)

    @contextmanager
    def _handler(self, number: int) -> Iterator[None]:
        # Not in another thread, whose collector may close the generator. A program that ignores a signal
        # (nohup, a background shell job) goes on ignoring it.
        if not _in_main_thread() or signal.getsignal(number) is signal.SIG_IGN:
            yield
            return
        before = signal.signal(number, self._handle)
        try:
            yield
        finally:
            if _in_main_thread():
                signal.signal(number, before if before is not None else signal.SIG_DFL)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
