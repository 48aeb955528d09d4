"""The two halves of a step against a discriminator: what the decoder hears from it, and how it learns itself.

    heard = judge(discriminator, images[0], target, labels, rng, features=True)   # -> r.judged, decoder's terms, step
    loss, metrics = DiscriminatorObjective(discriminator, "hinge")(images[0].detach(), target, labels, rng)  # own step
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vfmlab.losses.adversarial import Judged, Kind, discriminator_losses
from vfmlab.losses.discriminators.base import Discriminator
from vfmlab.seeding import StepRandom


def judge(
    discriminator: Discriminator,
    fake: Tensor,
    real: Tensor,
    labels: Tensor | None = None,
    rng: StepRandom | None = None,
    features: bool = False,
) -> Judged:
    """The discriminator's view of decoded images `fake`; gradients reach the images, never its own parameters.

    features: keep the maps of `fake` and `real`, under the same augmentation and crop, for feature matching.
    """
    with frozen(discriminator):
        if not features:
            return Judged(discriminator(fake, labels, rng))
        before = None if rng is None else rng.generator.get_state()
        logits, ours = discriminator(fake, labels, rng, features=True)
        if rng is not None:
            rng.generator.set_state(before)  # the same numbers again: differences are the decoder's, not augmentation's
        with torch.no_grad():
            _, theirs = discriminator(real, labels, rng, features=True)
        return Judged(logits, ours, theirs)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters take no gradients inside."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class DiscriminatorObjective(nn.Module):
    """The discriminator's own training forward: one call, so that it can be wrapped for several processes."""

    def __init__(self, discriminator: Discriminator, kind: Kind):
        super().__init__()
        self.discriminator, self.kind = discriminator, kind

    def forward(
        self, fake: Tensor, real: Tensor, labels: Tensor | None = None, rng: StepRandom | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean of the losses on real and on generated images, fp32 scalar; detached metrics).

        Metrics: the mean logit of real and of generated images, and the share of logits on the right side of the
        midpoint between "real" and "generated" (accuracy: 0.5 is a guess, 1 a decoder that is not heard any more).
        """
        told_real = self.discriminator(real, labels, rng)
        told_fake = self.discriminator(fake.detach(), labels, rng)
        on_real, on_fake = discriminator_losses(told_real, told_fake, self.kind)
        with torch.no_grad():
            middle = 0.5 if self.kind == "lsgan" else 0.0
            right = [(x > middle).float().mean() for x in told_real] + [(x < middle).float().mean() for x in told_fake]
            metrics = {
                "real": sum(x.mean() for x in told_real) / len(told_real),
                "fake": sum(x.mean() for x in told_fake) / len(told_fake),
                "accuracy": sum(right) / len(right),
            }
        return 0.5 * (on_real + on_fake), metrics
