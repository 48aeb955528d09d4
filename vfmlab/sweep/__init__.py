"""Sweeps: one notebook at many settings, and what came out of it as one table and one page.

    vfmlab sweep notebooks/02_train_a_tokenizer.ipynb --grid grid.yaml --jobs 2

    from vfmlab import sweep
    found = sweep.run("notebooks/02_train_a_tokenizer.ipynb", {"set": {"losses.vf.weight": [0, 0.1]}})
    found.table, found.page, found.records

The notebook hands out its results by ending with `vfmlab.sweep.result(report)`. Every point is a folder named by the hash
of (the notebook's code, what was given to it); what is in one is never done again. See :mod:`vfmlab.sweep.grid` for what
a grid can say.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vfmlab.sweep.handout import result

if TYPE_CHECKING:
    from vfmlab.sweep.conduct import Sweep, commands, run

__all__ = ["Sweep", "commands", "result", "run"]


def __getattr__(name: str) -> Any:
    """What a notebook that only hands out its results need not wait for."""
    if name in __all__:
        return getattr(importlib.import_module("vfmlab.sweep.conduct"), name)
    raise AttributeError(f"module 'vfmlab.sweep' has no attribute '{name}'")
