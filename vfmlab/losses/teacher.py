"""Training of a tokenizer's teacher: a VFM's map rebuilt from its code (GAE, 2603.10365, first stage)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, Reconstruction
from vfmlab.losses.preservation import preservation
from vfmlab.registry import LOSSES


@LOSSES.register("teacher")
class TeacherLoss(Loss):
    """Distance of the rebuilt map to the target, `r.taught`: "l2" (the release), mean over all elements, or
    "cosine" (the paper's text), 1 - cosine over channels, mean over places."""

    class Config(config.LossConfig):
        distance: Literal["l2", "cosine"] = "l2"

    on_images = False

    def value(self, r: Reconstruction) -> Tensor:
        if r.taught is None:
            raise ConfigError(f"losses.{self.name}: this tokenizer has no teacher to train; use "
                              "tokenizer.method=gae with tokenizer.teacher={}, or remove the term")
        return preservation(r.taught.rebuilt, r.taught.target, self.config.distance)
