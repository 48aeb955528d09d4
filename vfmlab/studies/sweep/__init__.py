"""Sweeps: one notebook at many settings, and what came out of it as one table and one page.

    vfmlab sweep notebooks/02_train_a_tokenizer.ipynb --grid grid.yaml --jobs 2

    from vfmlab.studies import sweep
    result = sweep.run("notebooks/02_train_a_tokenizer.ipynb", {"set": {"losses.vf.weight": [0, 0.1]}})
    result.table, result.page, result.records

The notebook hands out its results by ending with `vfmlab.studies.sweep.result(report)`. Every point is a
folder named by the hash of (the notebook's code, what was given to it); what is in one is never done again.
See :mod:`vfmlab.studies.sweep.grid` for what a grid can say.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vfmlab.studies.sweep.outputs import result

if TYPE_CHECKING:
    from vfmlab.studies.sweep.sweep import Sweep, run

__all__ = ["Sweep", "result", "run"]


def __getattr__(name: str) -> Any:
    """What a notebook that only hands out its results need not wait for."""
    if name in __all__:
        return getattr(importlib.import_module("vfmlab.studies.sweep.sweep"), name)
    raise AttributeError(f"module 'vfmlab.studies.sweep' has no attribute '{name}'")
