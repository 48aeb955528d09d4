"""The discriminators of a recipe, and the two halves of a step against them: the decoder's terms, and their
own update.

    discriminators = Discriminators(recipe, size, vfm)
    outputs = discriminators.outputs(Pairs.of(r, labels), rng, samples)       # -> r.discriminated
    loss, metrics = discriminators(Pairs.of(r, labels).detached(), rng, samples)  # their own step
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vfmlab.config import LossConfig, Train
from vfmlab.decoders.diffusion import State
from vfmlab.losses.adversarial import Adversarial, Discriminated, Kind, discriminator_losses
from vfmlab.losses.base import Reconstruction
from vfmlab.losses.discriminators.base import Discriminator
from vfmlab.losses.feature_matching import FeatureMatching
from vfmlab.registry import DISCRIMINATORS
from vfmlab.seeding import StepRandom


class Pairs(NamedTuple):
    """What discriminators judge. fake, real: B 3 H W in [-1, 1]; labels: long B; state: the noisy images that
    `fake` was estimated from, of decoders that denoise."""

    fake: Tensor
    real: Tensor
    labels: Tensor | None = None
    state: State | None = None

    @classmethod
    def of(cls, r: Reconstruction, labels: Tensor | None) -> Pairs:
        return cls(r.images[0], r.target, labels, None if r.denoising is None else r.denoising.state)

    def detached(self) -> Pairs:
        """For the discriminators' own step."""
        return self._replace(fake=self.fake.detach())


class Discriminators(nn.Module):
    """The discriminators of a recipe's adversarial terms, with their training forward.

    Args:
        terms: the recipe. size: side of the images in pixels. vfm: the run's frozen VisionModel, or None.
    """

    def __init__(self, terms: Mapping[str, LossConfig], size: int, vfm: nn.Module | None):
        super().__init__()
        self.terms = {name: term for name, term in terms.items() if isinstance(term, Adversarial.Config)}
        # terms that need a discriminator's outputs
        self.readers = {name: [term] for name, term in self.terms.items()}
        self.matched = set()  # terms whose discriminator also returns its maps
        for term in terms.values():
            if isinstance(term, FeatureMatching.Config) and term.of in self.terms:
                self.readers[term.of].append(term)
                self.matched.add(term.of)
        self.objectives = nn.ModuleDict({
            name: DiscriminatorObjective(DISCRIMINATORS.get(term.discriminator.kind)(term.discriminator, size, vfm), term.loss, term.r1 or 0.0)
            for name, term in self.terms.items()
        })  # fmt: skip

    def __len__(self) -> int:
        return len(self.terms)

    def __getitem__(self, name: str) -> Discriminator:
        return self.objectives[name].discriminator

    def learns(self, samples: int) -> bool:
        """Whether any of them takes a step after `samples` images."""
        return any(term.trains_discriminator(samples) for term in self.terms.values())

    def all_on(self) -> int:
        """A count of images at which every discriminator and every term of it is at work (for dry runs)."""
        return max((term.start + term.warmup for term in self.terms.values()), default=0)

    def groups(self, train: Train) -> list[dict[str, Any]]:
        """Parameter groups of their optimiser: each with its own learning rate and betas."""
        return [{"params": list(self.objectives[name].parameters()), "lr": term.lr or train.lr,
                 "betas": term.betas or train.betas}
                for name, term in self.terms.items()]

    def outputs(self, pairs: Pairs, rng: StepRandom, samples: int) -> dict[str, Discriminated]:
        """Outputs of those that a term reads after `samples` images; gradients reach `pairs.fake` alone."""
        return {name: discriminate(self[name], pairs, rng, name in self.matched)
                for name, readers in self.readers.items()
                if any(reader.factor(samples) > 0 for reader in readers)}

    def forward(self, pairs: Pairs, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the losses of those that learn now, and their metrics as `<term>_real`, `_fake`,
        `_accuracy`, `_loss`."""
        total, metrics = torch.zeros((), device=pairs.fake.device), {}
        for name, term in self.terms.items():
            if term.trains_discriminator(samples):
                loss, own = self.objectives[name](pairs, rng)
                total = total + loss
                metrics |= {f"{name}_{key}": value for key, value in {"loss": loss.detach(), **own}.items()}
        return total, metrics


def discriminate(discriminator: Discriminator, pairs: Pairs, rng: StepRandom | None = None,
                 features: bool = False) -> Discriminated:
    """The discriminator on decoded images `fake`; gradients reach the images, never its own parameters.

    features: also the maps of `fake` and `real`, under the same augmentation and crop, for feature matching.
    """
    fake, real, labels, state = pairs
    with frozen(discriminator):
        if not features:
            return Discriminated(discriminator(fake, labels, rng, state=state))
        before = None if rng is None else rng.generator.get_state()
        logits, ours = discriminator(fake, labels, rng, features=True, state=state)
        if rng is not None:
            # the same numbers again: differences are the decoder's, not augmentation's
            rng.generator.set_state(before)
        with torch.no_grad():
            _, theirs = discriminator(real, labels, rng, features=True, state=state)
        return Discriminated(logits, ours, theirs)


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
    """One discriminator's own training forward. r1: weight of its penalty on real images' gradients."""

    def __init__(self, discriminator: Discriminator, kind: Kind, r1: float = 0.0):
        super().__init__()
        self.discriminator, self.kind, self.r1 = discriminator, kind, r1

    def forward(self, pairs: Pairs, rng: StepRandom | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean of the losses on real and on generated images, plus the penalty, fp32 scalar; detached
        metrics).

        Metrics: the mean logit of real and of generated images, and the share of logits on the right side of
        the midpoint between "real" and "generated" (accuracy: 0.5 is a guess; 1: the discriminator is always
        right).
        """
        fake, real, labels, state = pairs
        punished = self.r1 > 0 and torch.is_grad_enabled()
        kind = real.device.type
        with torch.autocast(kind, enabled=not punished and torch.is_autocast_enabled(kind)):
            real = real.detach().requires_grad_(punished)
            on_real = self.discriminator(real, labels, rng, state=state)
        on_fake = self.discriminator(fake.detach(), labels, rng, state=state)
        loss_real, loss_fake = discriminator_losses(on_real, on_fake, self.kind)
        with torch.no_grad():
            middle = 0.5 if self.kind == "lsgan" else 0.0
            right = [(x > middle).float().mean()
                     for x in on_real] + [(x < middle).float().mean() for x in on_fake]
            metrics = {"real": sum(x.mean() for x in on_real) / len(on_real),
                       "fake": sum(x.mean() for x in on_fake) / len(on_fake),
                       "accuracy": sum(right) / len(right)}
        loss = 0.5 * (loss_real + loss_fake)
        if punished:
            penalty = gradient_penalty(real, on_real)
            loss = loss + 0.5 * self.r1 * penalty
            metrics["r1"] = penalty.detach()
        return loss, metrics


def gradient_penalty(images: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """R1 (Mescheder et al., 1801.04406, eq. 9) without its weight: the squared norm of the gradient of an
    image's mean logit, mean over the images."""
    score = sum(x.flatten(1).mean(1).sum() for x in logits) / len(logits)
    (gradient,) = torch.autograd.grad(score, images, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()
