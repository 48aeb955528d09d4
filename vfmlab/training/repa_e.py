"""REPA-E (arXiv 2504.10483): diffusion is trained while its tokenizer is tuned through the alignment loss.

One step trains both. The diffusion loss stops at the latents: left to itself it would make them easy to
predict and empty. The alignment loss goes on into the tokenizer, with a weight of its own, beside the
tokenizer's own losses:

    network:   velocity + alignment.weight * alignment (+ class token)
    tokenizer: tune.weight * alignment + its own losses

Latents are encoded at every step and normalised by running statistics, the tokenizer's own buffers, which are
carried in its checkpoint; at the end they are measured again. In the paper a batch norm does this, with the
batch's own statistics for the diffusion loss and the running ones for the tokenizer's (`tune.statistics`):
the network then sees the latents twice, the second time with noise and times of its own (ours).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from vfmlab.config import Diffusion, Equivariance, Losses, Phase, Tune
from vfmlab.diffusion.alignment import Projection, TokenScale
from vfmlab.diffusion.objective import Flow, Terms
from vfmlab.errors import ConfigError
from vfmlab.losses.discriminators.training import Pairs
from vfmlab.losses.terms import Pieces
from vfmlab.nn import parts
from vfmlab.registry import TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Tokenizer, over
from vfmlab.training.objective import TokenizerObjective

MOMENTUM = 0.1  # of the running latent statistics, per step


class Tuned(nn.Module):
    """A diffusion network and the tokenizer that is tuned with it: one module, so one checkpoint
    (`network.*`, `tokenizer.*`)."""

    def __init__(self, network: nn.Module, tokenizer: Tokenizer):
        super().__init__()
        self.network, self.tokenizer = network, tokenizer


class TunedBatch(NamedTuple):
    """images: uint8 B 3 H W. labels, indices: long B. target, token: as in
    :class:`vfmlab.diffusion.targets.AlignedBatch`."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    target: Tensor
    token: Tensor | None = None


class TunedObjective(nn.Module):
    """The training forward of REPA-E.

    Args:
        weights: network and tokenizer. config: with `tune` and `alignment`. terms: the losses with which the
            tokenizer was trained; `tune.losses` come in their place. original: the tokenizer as it was, for
            terms that preserve its latents. projection: REPA's loss.

    Raises:
        ConfigError: a tokenizer without losses of its own, or one whose statistics are not per channel.
    """

    def __init__(self, weights: Tuned, config: Diffusion, terms: Losses, original: Tokenizer,
                 projection: Projection):
        super().__init__()
        self.config = config
        terms = terms if config.tune.losses is None else config.tune.losses
        if not terms:
            raise ConfigError(
                "tune: the tokenizer has no losses of its own to hold it; set diffusion.tune.losses, for "
                "example "
                '{"l1": 1.0}'
            )
        if weights.tokenizer.stat_mean.ndim != 1:
            raise ConfigError("tune: this tokenizer has latent statistics for every place; running ones are "
                              "per channel, so it cannot be tuned")
        self.weights, self.projection, self.flow = weights, projection, Flow(self.config)
        own = TokenizerObjective(weights.tokenizer, terms, Equivariance(), original)
        self.losses, self.frozen = own.losses, own.frozen
        self.scale = TokenScale(weights.network.config.token) if self.config.class_token is not None else None
        self._own = [own]  # a list, not a submodule: its parts are this module's already

    @property
    def own(self) -> TokenizerObjective:
        """The tokenizer's own training forward."""
        return self._own[0]

    def forward(self, batch: TunedBatch, rng: StepRandom,
                samples: int) -> tuple[Tensor, dict[str, Tensor], Pairs]:
        """Loss and metrics of one batch, and what the tokenizer's discriminators learn from."""
        pieces = self.pieces(batch, rng, samples)
        r = pieces.reconstruction
        return pieces.loss, pieces.metrics, Pairs.of(r, batch.labels).detached()

    def pieces(self, batch: TunedBatch, rng: StepRandom, samples: int) -> Pieces:
        """One batch on its way to the loss; terms and metrics as :meth:`vfmlab.diffusion.objective.Flow.loss`
        and the tokenizer's own, as `tokenizer_*`."""
        tokenizer = self.weights.tokenizer
        pieces = self.own.pieces(batch, rng, samples)
        r = pieces.reconstruction
        raw = r.z if self.config.sample_posterior else r.posterior.mode()
        mean, variance = self._follow(raw.detach())
        z = tokenizer.normalise(raw)
        cut = z.detach().requires_grad_()
        on = self.projection.on(samples)
        scaled = self.scale(batch.token) if self.scale is not None else None
        projection = self.projection if on else None

        def terms_at(latents: Tensor) -> Terms:
            return self.flow.terms(self.weights.network, latents, batch.labels, rng, projection, batch.target,
                                   batch.token, scaled)

        if self.config.tune.statistics == "batch":
            terms = terms_at((raw.detach() - over(mean)) / over(variance.sqrt()))
            seen = terms_at(cut) if on else terms
        else:
            seen = terms = terms_at(cut)
        weighed = self.flow.weigh(terms)
        loss, parts = self.flow.loss(terms, weighed)
        loss = loss + pieces.loss
        if on:
            # The alignment's gradient at the latents alone goes on into the tokenizer, as that of a term
            # which is zero.
            (g,) = torch.autograd.grad(self.config.tune.weight * seen.alignment.mean(), cut,
                                       retain_graph=True)
            through = (z * g).sum()
            loss = loss + (through - through.detach())
        parts |= {f"tokenizer_{key}": value for key, value in pieces.metrics.items()}
        weighed |= {f"tokenizer_{name}": term for name, term in pieces.terms.items()}
        return Pieces(loss, parts, weighed, r, terms)

    @torch.no_grad()
    def _follow(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel over the global batch, which the running statistics follow."""
        first, second = raw.mean((0, 2, 3)), raw.square().mean((0, 2, 3))
        if PartialState().num_processes > 1:
            first, second = reduce(first, "mean"), reduce(second, "mean")
        variance = (second - first.square()).clamp_min(1e-8)
        self.weights.tokenizer.move_statistics(first, variance, MOMENTUM)
        return first, variance


def trains(tune: Tune) -> tuple[str, ...]:
    """Globs on the parameter names of :class:`Tuned`."""
    return ("network.*", *(f"tokenizer.{glob}" for glob in tune.trains))


def copy_of(tokenizer: Tokenizer, run: Phase) -> Tokenizer:
    """A trainable tokenizer with the weights and statistics of `tokenizer`, on the same VFM."""
    twin: Tokenizer = TOKENIZERS.get(run.tokenizer.method)(run.tokenizer, run.data.size, tokenizer.vfm)
    parts.replace(twin, run.recipe.parts, "tokenizer", run.seed)
    twin.load_state_dict(tokenizer.state_dict())
    twin.fingerprint = tokenizer.fingerprint
    return twin
