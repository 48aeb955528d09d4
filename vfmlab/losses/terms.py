"""What one training forward goes through: terms with their weights, and the tensors from images to loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from vfmlab.losses.base import Reconstruction

if TYPE_CHECKING:  # a floor above
    from vfmlab.ar.objective import Drawn
    from vfmlab.diffusion.objective import Terms


class Term(NamedTuple):
    """One term of a loss.

    value: scalar with gradients, without its weight. weight: a number; a detached scalar where
    it is adaptive.
    """

    value: Tensor
    weight: float | Tensor

    @property
    def weighted(self) -> Tensor:
        return self.value * self.weight


def total(terms: Mapping[str, Term]) -> Tensor:
    """The sum of the terms times their weights, in their order."""
    return sum(term.weighted for term in terms.values())


@dataclass(frozen=True)
class Pieces:
    """One batch on its way through a training objective; everything carries gradients.

    loss: scalar, what `backward` is called on. metrics: detached scalars by name. terms: what the loss is the
    sum of. reconstruction: images, features, posterior, latent and decoded images, where a tokenizer trains.
    flow: noisy latents, times, velocities, where diffusion trains. drawn: codes and logits, where codes are
    learned in order.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    terms: dict[str, Term]
    reconstruction: Reconstruction | None = None
    flow: Terms | None = None
    drawn: Drawn | None = None
