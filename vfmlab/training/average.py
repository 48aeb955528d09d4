"""The running average of weights (EMA): timm's, with its half-life counted in samples."""

from __future__ import annotations

from timm.utils import ModelEmaV3
from torch import nn

from vfmlab.config import Train


class Average:
    """Exponential average of everything in `weights.state_dict()`; half-life `train.ema_halflife` images.

    Warm-up: the decay of update n is at most 1 - n^(-2/3) (timm), so that early averages do not remember the
    initialisation. With a half-life of 0 there is no average and `module` is `weights` itself.

    Attributes:
        updates: number of updates so far; decides the warm-up, so it is saved with the run.
        samples: images these updates stand for.
    """

    def __init__(self, weights: nn.Module, train: Train):
        self.weights, self.batch, self.updates = weights, train.batch, 0
        self.ema: ModelEmaV3 | None = None
        if train.ema_halflife:
            decay = 0.5 ** (train.batch / train.ema_halflife)
            # shares what `weights` holds as Frozen
            self.ema = ModelEmaV3(weights, decay=decay, use_warmup=True)
            self.ema.module.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """The averaged weights, in eval mode."""
        return self.weights if self.ema is None else self.ema.module

    @property
    def samples(self) -> int:
        return self.updates * self.batch

    def update(self) -> None:
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.weights, step=self.updates)
