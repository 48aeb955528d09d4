"""What every discriminator is: images -> one tensor of logits per scale or depth; high means "a real image".

Randomness (augmentation, crops) comes only from the :class:`vfmlab.seeding.StepRandom` that the caller
passes; without one there is none.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from vfmlab.config import Section
from vfmlab.decoders.diffusion import State
from vfmlab.losses.discriminators.augment import POLICIES, Policy
from vfmlab.nn.frozen import Frozen
from vfmlab.seeding import StepRandom

Features = list[list[Tensor]]


class DiscriminatorConfig(Section):
    """Images -> logits. Each registered discriminator extends this."""

    kind: str
    augment: tuple[Policy,
                   ...] = Field((), description="DiffAugment policies for real and generated images alike")


class Discriminator(nn.Module):
    """Base of all discriminators.

    A kind subclasses this in one file, registers itself, declares its options as a nested `Config`, and
    implements `score`. Its constructor takes `(config, size, vfm)`: size is the image's side in pixels, vfm
    the frozen :class:`vfmlab.vfm.VisionModel` of the run, or None. A frozen backbone stands in `hidden`,
    outside of `parameters()`, `state_dict()` and `.train()`, so all parameters are to be trained and saved.
    """

    Config: type[DiscriminatorConfig] = DiscriminatorConfig
    registered_name: ClassVar[str] = "discriminator"

    def __init__(self, config: DiscriminatorConfig, size: int, vfm: nn.Module | None = None):
        super().__init__()
        self.config, self.size = config, size
        self.hidden = Frozen()

    def score(self, images: Tensor, labels: Tensor | None,
              state: State | None = None) -> tuple[list[Tensor], Features]:
        """Logits, and the maps behind them by scale or depth from early to late, of images as they are."""
        raise NotImplementedError

    def forward(self, images: Tensor, labels: Tensor | None = None, rng: StepRandom | None = None,
                features: bool = False,
                state: State | None = None) -> list[Tensor] | tuple[list[Tensor], Features]:
        """Logits of each scale or depth (fp32, one row per image), and on request the maps they come from.

        Args:
            images: B 3 H W in [-1, 1]. labels: long B, needed only by a conditional discriminator. rng: of
                exactly these rows; draws augmentation and crops. None: neither. features: return `(logits,
                features)`; `features[i]` lists the maps behind `logits[i]`, early to late. state: the noisy
                images of a decoder that denoises, for kinds that judge pairs.
        """
        if rng is not None:
            images = self.crop(self.augment(images, rng), rng)
        logits, maps = self.score(images, labels, state)
        logits = [x.float() for x in logits]
        return (logits, maps) if features else logits

    def augment(self, images: Tensor, rng: StepRandom) -> Tensor:
        """DiffAugment with the policies of the config, each image with its own numbers."""
        for policy in self.config.augment:
            images = POLICIES[policy](images, rng)
        return images

    def crop(self, images: Tensor, rng: StepRandom) -> Tensor:
        """A random window of the batch, for kinds that judge windows."""
        return images
