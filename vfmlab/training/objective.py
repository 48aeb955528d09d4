"""The training forward of a tokenizer: the one that training, REPA-E, plans and notebooks use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab import config
from vfmlab.data import to_float
from vfmlab.errors import ConfigError
from vfmlab.evaluation.pixels import psnr
from vfmlab.losses import base, own
from vfmlab.losses.adaptive import adaptive_weight
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.losses.cascade import Cascade, turned
from vfmlab.losses.discriminators.training import Discriminators, Pairs
from vfmlab.losses.feature_matching import FeatureMatching
from vfmlab.losses.feature_reconstruction import FeatureReconstruction
from vfmlab.losses.preservation import Preservation
from vfmlab.losses.terms import Pieces, Term, total
from vfmlab.nn import transforms
from vfmlab.nn.frozen import Frozen
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, Tokenizer


class TokenizerObjective(nn.Module):
    """A tokenizer with its losses: images -> (VFM features) -> latent -> images -> a weighted sum of terms.

    Args:
        tokenizer: what is trained; its frozen VFM stays outside of parameters. terms: the recipe's losses;
            those of weight 0 are left out. parent: the stage before, for terms that preserve its latents; it
            is frozen. parts: terms given from a notebook's cell are among them.

    Attributes:
        discriminators: those of the adversarial terms, or None. Another optimiser's, so no part of these
        parameters.

    Raises:
        ConfigError: no terms; a term that nothing can feed.
    """

    def __init__(self, tokenizer: Tokenizer, terms: dict[str, config.LossConfig],
                 equivariance: config.Equivariance, parent: Tokenizer | None = None,
                 parts: Mapping[str, config.Part] | None = None):
        super().__init__()
        if not terms:
            raise ConfigError("losses is empty: a tokenizer learns nothing; set for example losses.l1=1.0")
        size, (channels, side, _) = tokenizer.size, tokenizer.map_shape
        self.tokenizer, self.equivariance = tokenizer, equivariance
        context = LossContext(size, channels, side, tokenizer.vfm)
        built = base.build(terms, context)
        self.losses = nn.ModuleDict(built | own.build(parts, context, built))
        discriminators = Discriminators(terms, size, tokenizer.vfm)
        needed = [*tokenizer.layers, *tokenizer.teacher_layers]
        needed += [layer for loss in self.losses.values() for layer in loss.layers]
        self.layers = tuple(dict.fromkeys(needed))
        if self.layers and tokenizer.vfm is None:
            raise ConfigError(f"VFM layers {list(self.layers)} are read but the run has no 'vfm' section; "
                              "add vfm.name")
        for name, loss in self.losses.items():
            if isinstance(loss, FeatureMatching) and loss.config.of not in discriminators.terms:
                of = f"losses.{loss.config.of}"
                raise ConfigError(f"losses.{name} reads the discriminator of {of}, which is off; add {of}")
            if isinstance(loss, Preservation) and parent is None:
                raise ConfigError(f"losses.{name} keeps the latent where the stage before had put it, but "
                                  "there is none; move it to a later stage")
        angles = {loss.config.degrees for loss in self.losses.values() if isinstance(loss, Cascade)}
        if len(angles) > 1:
            raise ConfigError(f"losses: terms 'cascade' with the angles {sorted(angles)}; one set of "
                              "perturbed images is decoded: give them the same degrees")
        self.rebuilds = any(isinstance(loss, FeatureReconstruction) for loss in self.losses.values())
        preserves = any(isinstance(loss, Preservation) for loss in self.losses.values())
        self.frozen = Frozen(parent=parent.requires_grad_(False).eval() if preserves else None)
        self.to(memory_format=torch.channels_last)
        if len(discriminators):  # after the memory format, which is not theirs
            self.frozen["discriminators"] = discriminators

    @property
    def discriminators(self) -> Discriminators | None:
        return self.frozen.get("discriminators")

    def plan(self, rng: StepRandom) -> transforms.Choice:
        """Which equivariance path this step takes; the first thing drawn from `rng`."""
        side = self.tokenizer.map_shape[-1]  # of region tokens, whose grid is not the decoder's, too
        return transforms.plan(self.equivariance, rng, side, self.tokenizer.size / side)

    def forward(self, batch: Any, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor], Pairs]:
        """Loss and metrics of one batch (see :meth:`pieces`), and what the discriminators learn from."""
        pieces = self.pieces(batch, rng, samples)
        r = pieces.reconstruction
        return pieces.loss, pieces.metrics, Pairs.of(r, batch.labels).detached()

    def pieces(self, batch: Any, rng: StepRandom, samples: int) -> Pieces:
        """One batch on its way to the loss.

        Args:
            batch: `images` uint8 B 3 H W, `labels` long B, perhaps `features` of the frozen VFM by layer.
            rng: of exactly these rows. samples: images seen before.
        """
        r = self.reconstruct(batch, rng, samples)
        terms = self.terms(r, samples)
        return Pieces(*self.score(r, terms), terms, r)

    def reconstruct(self, batch: Any, rng: StepRandom, samples: int) -> Reconstruction:
        """All that the terms read: the batch on its way through VFM, encoder, latent, decoder and
        discriminators."""
        choice = self.plan(rng)
        images = to_float(batch.images).contiguous(memory_format=torch.channels_last)
        inputs = transforms.input_images(images, choice)
        features: dict[int, Tensor] = getattr(batch, "features", {}) if inputs is images else {}
        if self.layers and not features:
            with torch.no_grad():
                features = self.tokenizer.vfm.features(inputs, self.layers).maps
        own = self.tokenizer.own_features(inputs)
        posterior = _fp32(self.tokenizer.posterior(inputs, own or features or None))
        z = posterior.sample(noise=rng.randn(*posterior.mean.shape[1:]))
        target = transforms.target_images(images, choice)
        latent = transforms.latent(self.tokenizer.perturb(z, rng), choice)
        decoded, denoising = self.tokenizer.decode_in_training(latent, target, rng)
        r = Reconstruction(
            target=target,
            labels=batch.labels,
            denoising=denoising,
            images=[image.float() for image in decoded],
            posterior=posterior,
            z=z,
            features=features,
            encoded=None if not own else own[list(own)[-1]],
            reference=self._reference(inputs, features),
            rebuilt=self.tokenizer.rebuild(z) if self.rebuilds else None,
            taught=self.tokenizer.teach(features) if self.tokenizer.teacher_layers else None,
        )
        cascades = [loss for loss in self.losses.values() if isinstance(loss, Cascade)]
        if cascades:
            noise = rng.randn(*z.shape[1:])
            latents = (turned(z, noise, angle) for angle in cascades[0].config.degrees)
            latents = (transforms.latent(part, choice) for part in latents)
            perturbed = [self.tokenizer.decode_raw(part)[0].float() for part in latents]
            r = dataclasses.replace(r, perturbed=perturbed)
        if self.discriminators is None:
            return r
        outputs = self.discriminators.outputs(Pairs.of(r, batch.labels), rng, samples)
        return dataclasses.replace(r, discriminated=outputs)

    @torch.no_grad()
    def _reference(self, inputs: Tensor, features: dict[int, Tensor]) -> dict[str, Tensor]:
        """The parent's latents and what enters its adapter, where a term reads them."""
        parent = self.frozen.get("parent")
        if parent is None:
            return {}
        own = parent.own_features(inputs)
        reference = {"after": parent.posterior(inputs, own or features or None).mode().float()}
        return reference if not own else {**reference, "before": own[list(own)[-1]]}

    def terms(self, r: Reconstruction, samples: int) -> dict[str, Term]:
        """The terms that are on after `samples` images; adaptive ones come last, weighed against the
        reconstruction terms."""
        weights = {name: loss.config.weight * loss.config.factor(samples)
                   for name, loss in self.losses.items()}
        values = {name: loss(r) for name, loss in self.losses.items() if weights[name] > 0}
        fixed = {name: Term(value, weights[name]) for name, value in values.items()
                 if not self.losses[name].adaptive}
        pixels = [term.weighted for name, term in fixed.items() if self.losses[name].on_images]
        return fixed | {name: Term(value, weights[name] * self._adaptive(name, value, pixels))
                        for name, value in values.items() if name not in fixed}

    def score(self, r: Reconstruction, terms: dict[str, Term]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the terms times their weights.

        Returns:
            the sum; each term without its weight, `weight_<term>` where the weight is adaptive, `psnr` (dB,
            mean over images) of what was decoded against its target, `codebook_usage` (percent) of discrete
            tokenizers.
        """
        metrics = {name: term.value.detach() for name, term in terms.items()}
        metrics |= {f"weight_{name}": term.weight for name, term in terms.items()
                    if self.losses[name].adaptive}
        with torch.no_grad():
            metrics["psnr"] = psnr(r.images[0].clamp(-1, 1), r.target).mean()
            codes = getattr(r.posterior, "codes", None)
            if codes is not None:
                metrics["codebook_usage"] = codes.usage.mean()
        return total(terms) if terms else torch.zeros((), device=r.target.device), metrics

    def _adaptive(self, name: str, term: Tensor, pixels: list[Tensor]) -> Tensor:
        if not pixels:
            raise ConfigError(f"losses.{name} is adaptive, but no reconstruction loss weighs it; add "
                              "losses.l1")
        at = self.losses[name].adaptive_at
        layer = (
            self.tokenizer.last_decoder_layer() if at == "decoder" else self.tokenizer.last_encoder_layer()
        )
        with torch.autocast(term.device.type, enabled=False):
            return adaptive_weight(sum(pixels), term, layer, at=at)


def _fp32(posterior: Posterior) -> Posterior:
    logvar = None if posterior.logvar is None else posterior.logvar.float()
    return dataclasses.replace(posterior, mean=posterior.mean.float(), logvar=logvar)
