"""Semantic preservation: the latent stays where the last stage put it (AlignTok, 2509.25162, stage 2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.registry import LOSSES


def preservation(new: Tensor, old: Tensor, distance: str) -> Tensor:
    """B C h w twice. "l2": mean squared difference; "cosine": 1 - cosine over C, mean over places."""
    new, old = new.float(), old.detach().float()
    if distance == "l2":
        return F.mse_loss(new, old)
    return (1 - F.cosine_similarity(new, old, dim=1)).mean()


@LOSSES.register("preservation")
class Preservation(Loss):
    """Distance of the encoding to that of the parent stage's frozen copy, for the same images.

    Reads `r.reference[anchor]`, the frozen copy's; against it `r.posterior.mode()` ("after" the adapter) or
    `r.encoded` ("before": what enters the adapter, B D h w). All raw. AlignTok: after, l2, weight 1; the rest
    are its ablations.
    """

    class Config(config.LossConfig):
        distance: Literal["l2", "cosine"] = "l2"
        anchor: Literal["after", "before"] = Field("after", description="the adapter")

    on_images = False

    def __init__(self, config: Preservation.Config, context: LossContext):
        super().__init__(config, context)
        self.anchor = config.anchor

    def value(self, r: Reconstruction) -> Tensor:
        old = r.reference.get(self.anchor)
        new = r.posterior.mode() if self.anchor == "after" else r.encoded
        if old is None or new is None:
            raise ConfigError(f"losses.preservation.anchor '{self.anchor}' has no reference: it needs a "
                              "stage before this one"
                              + ("" if self.anchor == "after" else " and a tokenizer with an adapter")
                              + "; remove losses.preservation or give the run a parent stage")
        if old.shape != new.shape:
            raise ConfigError(f"losses.preservation: the stage before encodes to {list(old.shape[1:])}, this "
                              f"one to {list(new.shape[1:])}; keep tokenizer.channels and tokenizer.factor "
                              "over the stages")
        return preservation(new, old, self.config.distance)
