"""Widgets for notebooks: each chooses what a function draws; `headless=True` gives just that.

    widgets.set_up_notebook()                   # in the first cell: figures, and parameters that exist
    await widgets.train(run, root)              # curves, previews, time left, a button that stops and saves
    widgets.pick_run(root)                      widgets.reconstructions(tokenizers, images)
    widgets.features(vfm, images)               widgets.sampling(diffusion_model)
    widgets.interpolation(tokenizers, images)   widgets.choose(draw, name=[values, ...])
    widgets.expect(statement, holds)            widgets.verdicts()   # predictions, and what became of them
"""

from __future__ import annotations

from vfmlab.studies.predictions import close, expect, less, verdicts
from vfmlab.widgets.explorers import features, interpolation, pick_run, reconstructions, sampling
from vfmlab.widgets.monitor import Monitor, train
from vfmlab.widgets.notebook import set_up_notebook
from vfmlab.widgets.panel import Panel, choose

__all__ = ["Monitor", "Panel", "choose", "close", "expect", "features", "interpolation", "less",
           "pick_run", "reconstructions", "sampling", "set_up_notebook", "train", "verdicts"]
