"""Errors a user can act on: one line that names the thing, its value and the way out.

Everything the library raises on bad input derives from :class:`VfmlabError`; the command line prints its
message as one line and exits non-zero, notebooks and the app show the same line.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class VfmlabError(Exception):
    """Base of all errors that are the input's fault and that the message says how to mend, on one line."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a name or value from outside may hold any character


class ConfigError(VfmlabError):
    """A field, preset or registry name is unknown, of the wrong type or contradicts another."""


class DataError(VfmlabError):
    """Images or labels cannot be read, or too few of them."""


class CheckpointError(VfmlabError):
    """A weights file is missing, truncated, of another shape, or not safetensors."""


class RunError(VfmlabError):
    """A run directory is missing, ambiguous, unfinished or of another kind."""


class RunBusy(RunError):
    """Another process is training this run."""


class Stopped(VfmlabError):
    """A training ended early and saved its state, because a stop was requested."""


class Interrupted(KeyboardInterrupt):
    """A person stopped a command or a cell of a notebook; the message says what is saved and how to go on.

    Ends a command and "run all" like an interrupt.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class TrainingError(VfmlabError):
    """Training stopped itself: non-finite or exploding loss, dead gradients, out of memory, disk full."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A clause that helps with a mistyped name: `" (did you mean 'x'?)"`, or the choices when none is
    near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.55)
    if close:
        return f" (did you mean '{close[0]}'?)"
    if not choices:
        return ""
    shown = ", ".join(choices[:16]) + (", ..." if len(choices) > 16 else "")
    return f" (choose from: {shown})"


_WAYS = {
    errno.ENOSPC: "free space on that disk", errno.EDQUOT: "free space: the quota is used up",
    errno.EROFS: "choose another folder: this file system is read-only", errno.ENAMETOOLONG: "choose a shorter name",
    errno.EACCES: "choose another path, or change its permissions", errno.EPERM: "choose another path",
    errno.ELOOP: "its symbolic links run in a circle", errno.EMFILE: "allow more open files: ulimit -n 4096",
    errno.ENOMEM: "close other programs, or make train.batch smaller",
}  # fmt: skip


def of_the_machine(error: BaseException) -> str:
    """One line for what the machine refuses (files, disk, memory); "" for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        where = f"'{error.filename}': " if error.filename is not None else ""
        return f"{where}{error.strerror}; {_WAYS.get(error.errno, 'check the path')}"
    signs = ("out of memory", "can't allocate memory", "Unable to allocate",
             "Storage size calculation overflowed")
    if isinstance(error,
                  MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in signs)):
        reason = text[:120] or "no details"
        return f"out of memory ({reason}); make train.batch, data.size or data.train smaller"
    return ""
