"""Terms that are given from a notebook's cell; see :mod:`vfmlab.nn.parts`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vfmlab.config import LossConfig, Part
from vfmlab.errors import ConfigError, TrainingError
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.nn import parts as given


class Own(Loss):
    """A function of a :class:`Reconstruction`, or a module that is called with one; its parameters train.

    Adaptive terms are not weighed by it.
    """

    on_images = False

    def __init__(self, config: LossConfig, context: LossContext, name: str, thing: Any):
        super().__init__(config, context)
        self.name = name
        self.of = thing() if inspect.isclass(thing) else thing

    def value(self, r: Reconstruction) -> Tensor:
        """Raises ConfigError where it is no scalar, TrainingError where it is not finite."""
        value = self.of(r)
        if not isinstance(value, Tensor) or value.ndim:
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"losses.{self.name}, your own, gives {shape}; give a tensor of one number, a "
                              "mean over the images")
        if not torch.isfinite(value):
            raise TrainingError(f"losses.{self.name}, your own, is {float(value)}; look for a division by 0 "
                                "or the root or logarithm of 0 in it")
        return value


def build(parts: Mapping[str, Part] | None, context: LossContext,
          taken: Mapping[str, Loss]) -> dict[str, Loss]:
    """The terms among the parts of a recipe, by name. taken: the recipe's other terms."""
    built: dict[str, Loss] = {}
    for name, part in (parts or {}).items():
        kind, _, label = name.partition(".")
        if kind != "losses":
            continue
        if label in taken or not label.isidentifier():
            raise ConfigError(f"parts['{name}']: '{label}' is " + (
                "a term of this recipe already; give yours another name" if label in taken
                else "no name of a term; write letters, digits and _"))
        built[label] = Own(LossConfig(weight=part.weight), context, label, given.fetch(name, part))
    return built
