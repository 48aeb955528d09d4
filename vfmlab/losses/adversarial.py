"""Adversarial losses on a discriminator's logits, and the term of a recipe that names discriminator, loss and
schedule.

Logits come as a list, one tensor per scale or depth; every loss is the mean over the list of the mean over
each tensor, in fp32. High logits mean "real". The discriminators themselves stand in
`vfmlab.losses.discriminators`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, SerializeAsAny, model_validator
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.config.schema import Beta
from vfmlab.config.section import by_name
from vfmlab.errors import ConfigError
from vfmlab.losses.base import Loss, LossContext, Reconstruction
from vfmlab.registry import DISCRIMINATORS, LOSSES

Kind = Literal["hinge", "lsgan", "nonsaturating", "softplus_hinge"]

# (real, generated) for the discriminator, generated for the generator; each from logits to pointwise losses.
_POINTWISE: dict[str, tuple[Callable, Callable, Callable]] = {
    "hinge": (lambda x: F.relu(1 - x), lambda x: F.relu(1 + x), lambda x: -x),  # Lim & Ye 1705.02894
    # Mao et al. 1611.04076
    "lsgan": (lambda x: (x - 1).square(), lambda x: x.square(), lambda x: (x - 1).square()),
    # Goodfellow et al. 1406.2661
    "nonsaturating": (lambda x: F.softplus(-x), F.softplus, lambda x: F.softplus(-x)),
    # VFMTok's release (2507.08441): each side its own
    "softplus_hinge": (lambda x: F.relu(1 - x), lambda x: F.relu(1 + x), lambda x: F.softplus(-x)),
}


def _mean(pointwise: Callable, logits: Sequence[Tensor]) -> Tensor:
    return sum(pointwise(x.float()).mean() for x in logits) / len(logits)


def generator_loss(fake: Sequence[Tensor], kind: Kind) -> Tensor:
    """What the decoder lowers: logits towards "real". hinge: -mean, lsgan: (x - 1)^2, else softplus(-x)."""
    return _mean(_POINTWISE[kind][2], fake)


def discriminator_losses(real: Sequence[Tensor], fake: Sequence[Tensor], kind: Kind) -> tuple[Tensor, Tensor]:
    """The discriminator's loss on real and on generated images; it lowers their mean."""
    return _mean(_POINTWISE[kind][0], real), _mean(_POINTWISE[kind][1], fake)


def ramp(samples: int, start: int, warmup: int) -> float:
    """Factor on a term's weight after `samples` images: 0 before `start`, linearly to 1 over `warmup`."""
    if samples < start:
        return 0.0
    return 1.0 if samples >= start + warmup else (samples - start) / warmup


@dataclass(frozen=True)
class Discriminated:
    """A discriminator's outputs for one batch, for the decoder's terms.

    fake: logits of the decoded images, with gradients. fake_features, real_features: the maps behind the
    logits of decoded and of target images (the latter without gradients), under the same augmentation; []
    where nobody reads them.
    """

    fake: list[Tensor]
    fake_features: list[list[Tensor]] = field(default_factory=list)
    real_features: list[list[Tensor]] = field(default_factory=list)


def outputs_of(r: Reconstruction, loss: str, name: str) -> Discriminated:
    """`r.discriminated[name]`; :class:`ConfigError` where that discriminator has not run on this batch."""
    outputs = r.discriminated.get(name)
    if outputs is None and loss == name:
        raise ConfigError(f"losses.{name}: its discriminator has not run on this batch; it works in "
                          "tokenizer training only")
    if outputs is None:
        raise ConfigError(f"losses.{loss} reads the discriminator of losses.{name}, which is off; add "
                          f"losses.{name}")
    return outputs


AnyDiscriminator = Annotated[SerializeAsAny[config.Section], by_name(DISCRIMINATORS, "kind")]


class Scheduled(config.LossConfig):
    """A term that begins late: the counts are images seen in the stage."""

    start: int = Field(0, ge=0, description="off before so many samples")
    warmup: int = Field(0, ge=0, description="the weight then grows linearly over so many samples")

    def factor(self, samples: int) -> float:
        return super().factor(samples) * ramp(samples, self.start, self.warmup)


@LOSSES.register("adversarial")
class Adversarial(Loss):
    """The generator's loss on `r.discriminated[name].fake`; a recipe with two of them names the second
    "adversarial:label".

    The discriminator is no part of this term: it is built from `config.discriminator`, trains with an
    optimiser of its own and fills `r.discriminated` (`vfmlab.losses.discriminators.training`).
    """

    class Config(Scheduled):
        discriminator: AnyDiscriminator = Field({"kind": "patchgan"}, validate_default=True)
        loss: Kind = "hinge"
        discriminator_start: int | None = Field(
            None, ge=0, description="the discriminator trains from here on; null: from `start` on"
        )
        adaptive: bool = Field(False, description="scaled by the gradients' ratio at the last decoder layer")
        r1: float | None = Field(None, gt=0, description="weight of R1, half the squared gradient at real "
                                                         "images; null: none")
        lr: float | None = Field(None, gt=0, description="of the discriminator; null: the run's")
        betas: tuple[Beta, Beta] | None = Field(None,
                                                description="of the discriminator's Adam; null: the run's")

        @model_validator(mode="after")
        def _smooth(self) -> Adversarial.Config:
            if self.r1 is not None and hasattr(self.discriminator, "backbone"):
                raise ValueError(f"r1 {self.r1:g} takes second derivatives, which a frozen backbone's "
                                 "attention does not give; use discriminator.kind=patchgan or trajectory, "
                                 "or r1=null")
            return self

        def trains_discriminator(self, samples: int) -> bool:
            """Whether the discriminator takes a step after `samples` images of the stage."""
            first = self.start if self.discriminator_start is None else self.discriminator_start
            return samples >= first and (self.until is None or samples < self.until)

    adaptive_at = "decoder"
    on_images = False

    def __init__(self, config: Adversarial.Config, context: LossContext):
        super().__init__(config, context)
        self.adaptive = config.adaptive

    def value(self, r: Reconstruction) -> Tensor:
        return generator_loss(outputs_of(r, self.name, self.name).fake, self.config.loss)
