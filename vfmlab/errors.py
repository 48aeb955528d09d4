"""Errors a user can act on: one line that names the thing, its value and the way out.

Everything the library raises on bad input derives from :class:`VfmlabError`; the command line prints its message as
one line and exits non-zero, notebooks and the app show the same line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VfmlabError(Exception):
    """Base of all errors that are the input's fault and that the message says how to mend."""


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


class TrainingError(VfmlabError):
    """Training stopped itself: non-finite or exploding loss, dead gradients, out of memory, disk full."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A clause that helps with a mistyped name: `" (did you mean 'x'?)"`, or the choices when none is near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.55)
    if close:
        return f" (did you mean '{close[0]}'?)"
    if not choices:
        return ""
    shown = ", ".join(choices[:16]) + (", ..." if len(choices) > 16 else "")
    return f" (choose from: {shown})"
