"""The training forward of a tokenizer, and that of the discriminators it plays against."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vfmlab import config
from vfmlab.data import to_float
from vfmlab.errors import ConfigError
from vfmlab.losses.adaptive import adaptive_weight
from vfmlab.losses.adversarial import Adversarial, Judged
from vfmlab.losses.base import Reconstruction
from vfmlab.losses.discriminators.game import DiscriminatorObjective, judge
from vfmlab.losses.feature_matching import FeatureMatching
from vfmlab.losses.feature_reconstruction import FeatureReconstruction
from vfmlab.losses.preservation import Preservation
from vfmlab.nn import transforms
from vfmlab.registry import DISCRIMINATORS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, Tokenizer


class Handed(NamedTuple):
    """What the tokenizer's step hands to its discriminators. fake, real: B 3 H W in [-1, 1], detached; labels: long B."""

    fake: Tensor
    real: Tensor
    labels: Tensor


class TokenizerObjective(nn.Module):
    """The training forward of a tokenizer.

    Args:
        tokenizer: what is trained; its frozen VFM stays outside of parameters. losses: name -> term, weight 0 left out.
        opponents: the discriminators of the adversarial terms, or None. parent: the stage before, frozen, or None.

    Raises:
        ConfigError: a term that nothing can feed.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        losses: dict[str, nn.Module],
        equivariance: config.Equivariance,
        opponents: Opponents | None = None,
        parent: Tokenizer | None = None,
    ):
        super().__init__()
        self.tokenizer, self.losses, self.equivariance = tokenizer, nn.ModuleDict(losses), equivariance
        self.__dict__["opponents"] = opponents  # another optimiser's, so no part of these parameters
        needed = [*tokenizer.layers, *(layer for loss in losses.values() for layer in loss.layers)]
        self.layers = tuple(dict.fromkeys(needed))
        if self.layers and tokenizer.vfm is None:
            raise ConfigError(f"VFM layers {list(self.layers)} are read but the run has no 'vfm' section; add vfm.name")
        self.matched = {loss.config.of for loss in losses.values() if isinstance(loss, FeatureMatching)}
        rivals = () if opponents is None else opponents.names
        for name, loss in losses.items():
            if isinstance(loss, FeatureMatching) and loss.config.of not in rivals:
                raise ConfigError(f"losses.{name} reads the discriminator of losses.{loss.config.of}, which is off; add losses.{loss.config.of}")
            if isinstance(loss, Preservation) and parent is None:
                raise ConfigError(f"losses.{name} keeps the latent where the stage before had put it, but there is none; move it to a later stage")
        self.rebuilds = any(isinstance(loss, FeatureReconstruction) for loss in losses.values())
        keeps = any(isinstance(loss, Preservation) for loss in losses.values())
        self.__dict__["parent"] = parent.requires_grad_(False).eval() if keeps else None

    def plan(self, rng: StepRandom) -> transforms.Choice:
        """Which equivariance path this step takes; the first thing drawn from `rng`."""
        return transforms.plan(self.equivariance, rng, self.tokenizer.latent_shape[-1], self.tokenizer.config.factor)

    def forward(self, batch: Any, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor], Handed]:
        """Loss of one batch.

        Returns:
            the weighted sum; each term without its weight, `weight_<term>` where the weight is adaptive or grows, and the
            `psnr` (dB, mean over images) of what was decoded against its target; what the discriminators learn from.
        """
        choice = self.plan(rng)
        images = to_float(batch.images).contiguous(memory_format=torch.channels_last)
        seen = transforms.input_images(images, choice)
        features: dict[int, Tensor] = {}
        if self.layers:
            with torch.no_grad():
                features = self.tokenizer.vfm.features(seen, self.layers).maps
        own = self.tokenizer.own_features(seen)
        posterior = _fp32(self.tokenizer.posterior(seen, own or features or None))
        z = posterior.sample(noise=rng.randn(*posterior.mean.shape[1:]))
        decoded = self.tokenizer.decode_raw(transforms.latent(self.tokenizer.perturb(z, rng), choice))
        made = Reconstruction(
            target=transforms.target_images(images, choice),
            images=[image.float() for image in decoded],
            posterior=posterior,
            z=z,
            features=features,
            encoded=None if not own else own[list(own)[-1]],
            reference={} if self.parent is None else self._reference(seen, features),
            rebuilt=self.tokenizer.rebuild(z) if self.rebuilds else None,
        )
        handed = Handed(made.images[0].detach(), made.target, batch.labels)
        if self.opponents is not None:
            made = dataclasses.replace(made, judged=self._judged(made, batch.labels, rng, samples))
        loss, metrics = self.weigh(made, samples)
        with torch.no_grad():
            mse = (made.images[0].clamp(-1, 1) - made.target).square().flatten(1).mean(1) / 4
            metrics["psnr"] = (-10 * mse.clamp_min(1e-10).log10()).mean()
            codes = getattr(posterior, "codes", None)
            if codes is not None:
                metrics["codebook_usage"] = codes.usage.mean()
        return loss, metrics, handed

    @torch.no_grad()
    def _reference(self, seen: Tensor, features: dict[int, Tensor]) -> dict[str, Tensor]:
        own = self.parent.own_features(seen)
        found = {"after": self.parent.posterior(seen, own or features or None).mode().float()}
        return found if not own else {**found, "before": own[list(own)[-1]]}

    def _judged(self, made: Reconstruction, labels: Tensor, rng: StepRandom, samples: int) -> dict[str, Judged]:
        """What each discriminator says, where a term that listens to it is on."""
        heard = {
            loss.config.of if isinstance(loss, FeatureMatching) else name
            for name, loss in self.losses.items()
            if isinstance(loss, Adversarial | FeatureMatching) and factor(loss.config, samples) > 0
        }
        return {
            name: judge(self.opponents.discriminator(name), made.images[0], made.target, labels, rng, name in self.matched)
            for name in self.opponents.names
            if name in heard
        }

    def weigh(self, made: Reconstruction, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the terms times their weights; adaptive ones are weighed against the reconstruction terms."""
        weights = {name: loss.config.weight * factor(loss.config, samples) for name, loss in self.losses.items()}
        terms = {name: loss(made) for name, loss in self.losses.items() if weights[name] > 0}
        metrics = {name: term.detach() for name, term in terms.items()}
        fixed = {name: term * weights[name] for name, term in terms.items() if not self.losses[name].adaptive}
        total = sum(fixed.values()) if fixed else torch.zeros((), device=made.target.device)
        pixels = [term for name, term in fixed.items() if self.losses[name].on_images]
        for name, term in terms.items():
            if not self.losses[name].adaptive:
                continue
            if not pixels:
                raise ConfigError(f"losses.{name} is adaptive, but no reconstruction loss weighs it; add losses.l1")
            at_decoder = self.losses[name].adaptive_at == "decoder"
            layer = self.tokenizer.last_decoder_layer() if at_decoder else self.tokenizer.last_encoder_layer()
            with torch.autocast(term.device.type, enabled=False):
                weight = adaptive_weight(sum(pixels), term, layer, at=self.losses[name].adaptive_at)
            total = total + weights[name] * weight * term
            metrics[f"weight_{name}"] = weights[name] * weight
        return total, metrics

    def _apply(self, fn: Any, recurse: bool = True) -> TokenizerObjective:
        super()._apply(fn, recurse)
        if self.parent is not None:
            self.parent._apply(fn, recurse)
        return self


def factor(term: config.LossConfig, samples: int) -> float:
    """What a term's weight is multiplied by after `samples` images: 0 once it is over or before it begins."""
    if term.until is not None and samples >= term.until:
        return 0.0
    return term.scale(samples) if hasattr(term, "scale") else 1.0


def _fp32(posterior: Posterior) -> Posterior:
    logvar = None if posterior.logvar is None else posterior.logvar.float()
    return dataclasses.replace(posterior, mean=posterior.mean.float(), logvar=logvar)


class Opponents(nn.Module):
    """The discriminators of a recipe's adversarial terms, and their training forward.

    Args:
        losses: the recipe; its adversarial terms name discriminators. size: side of the images in pixels.
        vfm: the run's frozen VisionModel, or None.
    """

    def __init__(self, losses: dict[str, config.LossConfig], size: int, vfm: nn.Module | None):
        super().__init__()
        self.terms = {name: term for name, term in losses.items() if isinstance(term, Adversarial.Config)}
        self.games = nn.ModuleDict({
            name: DiscriminatorObjective(DISCRIMINATORS.get(term.discriminator.kind)(term.discriminator, size, vfm), term.loss)
            for name, term in self.terms.items()
        })  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.terms)

    def discriminator(self, name: str) -> nn.Module:
        return self.games[name].discriminator

    def learns(self, samples: int) -> bool:
        """Whether any of them takes a step after `samples` images."""
        return any(term.trains_discriminator(samples) for term in self.terms.values())

    def all_on(self) -> int:
        """A count of images at which every discriminator and every term of it is at work (for dry runs)."""
        return max((term.start + term.warmup for term in self.terms.values()), default=0)

    def groups(self, train: config.Train) -> list[dict[str, Any]]:
        """Parameter groups of their optimiser: each with its own learning rate and betas."""
        return [
            {"params": list(self.games[name].parameters()), "lr": term.lr or train.lr, "betas": term.betas or train.betas}
            for name, term in self.terms.items()
        ]

    def forward(self, handed: Handed, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the losses of those that learn now, and their metrics as `<term>_real`, `_fake`, `_accuracy`, `_loss`."""
        total, metrics = torch.zeros((), device=handed.fake.device), {}
        for name, term in self.terms.items():
            if term.trains_discriminator(samples):
                loss, found = self.games[name](handed.fake, handed.real, handed.labels, rng)
                total = total + loss
                metrics |= {f"{name}_{key}": value for key, value in {"loss": loss.detach(), **found}.items()}
        return total, metrics

