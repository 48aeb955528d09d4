"""The first thing a notebook does: figures that can be seen, and no parameter that it does not have."""

from __future__ import annotations

import ast
from itertools import pairwise

from vfmlab.errors import ConfigError, nearest
from vfmlab.plots import primitives
from vfmlab.studies import predictions
from vfmlab.widgets.panel import Shown

INJECTED = "# Parameters\n"  # how the cell begins that papermill puts after the notebook's own parameters


def set_up_notebook() -> None:
    """Choose the renderer of figures, and check what papermill has set; for the setup cell.

    Raises:
        ConfigError: papermill was given a parameter that the notebook does not have, which it only warns of.
    """
    from IPython import get_ipython

    primitives.use_notebook_renderer()
    Shown.sent = False  # a notebook that is run again may have lost its outputs
    predictions.forget()
    shell = get_ipython()
    check_parameters([] if shell is None else shell.user_ns.get("In", []))


def check_parameters(cells: list[str]) -> None:
    """Refuse a name in papermill's cell that the cell before it does not set. cells: executed so far."""
    for own, injected in pairwise(cells):
        if injected.startswith(INJECTED):
            known = _names(own)
            for name in _names(injected) - known:
                raise ConfigError(f"this notebook has no parameter '{name}'{nearest(name, known)}")


def _names(source: str) -> set[str]:
    """The variables that a cell sets."""
    return {node.id for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
