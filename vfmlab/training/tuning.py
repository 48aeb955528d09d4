"""REPA-E (arXiv 2504.10483): diffusion is trained while its tokenizer is tuned through the alignment loss.

One step trains both. The diffusion loss stops at the latents: left to itself it would make them easy to predict and empty.
The alignment loss goes on into the tokenizer, with a weight of its own, beside the tokenizer's own losses:

    network:   velocity + alignment.weight * alignment (+ class token)
    tokenizer: tune.weight * alignment + its own losses

Latents are encoded at every step and normalised by running statistics, the tokenizer's own buffers, which are carried in
its checkpoint; at the end they are measured again. In the paper a batch norm with the batch's own statistics does this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from vfmlab.config import Diffusion, Equivariance, Phase
from vfmlab.diffusion.alignment import Projection, TokenScale
from vfmlab.diffusion.objective import Flow
from vfmlab.diffusion.tuned import Tuned, follow
from vfmlab.errors import ConfigError
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.losses.preservation import Preservation
from vfmlab.registry import LOSSES, TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Tokenizer, over
from vfmlab.training.reconstruction import Handed, Opponents, TokenizerObjective


class TunedBatch(NamedTuple):
    """images: uint8 B 3 H W. labels, indices: long B. target, token: as in :class:`vfmlab.diffusion.targets.AlignedBatch`."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    target: Tensor
    token: Tensor | None = None


class _Reconstructing(TokenizerObjective):
    """The tokenizer's own training forward, which hands out what it made on the way."""

    def weigh(self, made: Reconstruction, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.__dict__["made"] = made
        return super().weigh(made, samples)


class TunedObjective(nn.Module):
    """The training forward of REPA-E.

    Args:
        weights: network and tokenizer. config: the run's diffusion section, with `tune` and `alignment`. projection: REPA's loss.
        losses: the tokenizer's own terms. opponents: their discriminators, or None. parent: the tokenizer as it was, frozen,
            for terms that preserve it.
    """

    def __init__(
        self, weights: Tuned, config: Diffusion, projection: Projection, losses: dict[str, nn.Module],
        opponents: Opponents | None = None, parent: Tokenizer | None = None,
    ):  # fmt: skip
        super().__init__()
        self.weights, self.config, self.projection, self.flow = weights, config, projection, Flow(config)
        own = _Reconstructing(weights.tokenizer, losses, Equivariance(), opponents, parent)
        self.losses = own.losses
        self.__dict__["own"] = own  # its parts are this module's already
        self.scale = TokenScale(weights.network.config.token) if config.class_token is not None else None

    def forward(self, batch: TunedBatch, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor], Handed]:
        """Loss of one batch; parts as :meth:`vfmlab.diffusion.objective.Flow.loss` and the tokenizer's own, as `tokenizer_*`."""
        own, metrics, handed = self.own(batch, rng, samples)
        made, tokenizer = self.own.__dict__.pop("made"), self.weights.tokenizer
        raw = made.z if self.config.sample_posterior else made.posterior.mode()
        self._follow(raw.detach())
        z = (raw - over(tokenizer.stat_mean.clone())) / over(tokenizer.stat_std.clone())
        cut = z.detach().requires_grad_()
        on = self.projection.on(samples)
        scaled = self.scale(batch.token) if self.scale is not None else None
        found = self.flow.terms(
            self.weights.network, cut, batch.labels, rng, self.projection if on else None, batch.target, batch.token, scaled
        )
        loss, parts = self.flow.loss(found)
        loss = loss + own
        if on:
            # The alignment's gradient at the latents alone goes on into the tokenizer, as that of a term which is zero.
            (g,) = torch.autograd.grad(self.config.tune.weight * found.alignment.mean(), cut, retain_graph=True)
            through = (z * g).sum()
            loss = loss + (through - through.detach())
        return loss, parts | {f"tokenizer_{key}": value for key, value in metrics.items()}, handed

    @torch.no_grad()
    def _follow(self, raw: Tensor) -> None:
        """Running statistics over the global batch."""
        first, second = raw.mean((0, 2, 3)), raw.square().mean((0, 2, 3))
        if PartialState().num_processes > 1:
            first, second = reduce(first, "mean"), reduce(second, "mean")
        follow(self.weights.tokenizer, first, (second - first.square()).clamp_min(1e-8), self.config.tune.momentum)

    def _apply(self, fn: Any, recurse: bool = True) -> TunedObjective:
        super()._apply(fn, recurse)
        if self.own.parent is not None:
            self.own.parent._apply(fn, recurse)
        return self


def copy_of(tokenizer: Tokenizer, run: Phase) -> Tokenizer:
    """A trainable tokenizer with the weights and statistics of `tokenizer`, on the same VFM."""
    twin: Tokenizer = TOKENIZERS.get(run.tokenizer.method)(run.tokenizer, run.data.size, tokenizer.vfm)
    twin.load_state_dict(tokenizer.state_dict())
    twin.fingerprint = tokenizer.fingerprint
    return twin


def make(run: Phase, weights: Tuned, original: Tokenizer, projection: Projection) -> tuple[TunedObjective, Opponents | None]:
    """The objective of a run with `diffusion.tune`, and its discriminators, if its terms have any."""
    tune, size = run.diffusion.tune, run.data.size
    losses = tune.losses if tune.losses is not None else run.losses
    if not losses:
        raise ConfigError("tune: the tokenizer has no losses of its own to hold it; set diffusion.tune.losses, for example {\"l1\": 1.0}")
    if weights.tokenizer.stat_mean.ndim != 1:
        raise ConfigError("tune: this tokenizer has latent statistics for every place; running ones are per channel, so it cannot be tuned")
    channels, side, _ = weights.tokenizer.latent_shape
    context = LossContext(size, channels, side, original.vfm)
    built = {name: LOSSES.get(name.partition(":")[0])(term, context) for name, term in losses.items()}
    for name, loss in built.items():
        loss.name = name
    opponents = Opponents(losses, size, original.vfm)
    rivals = opponents if opponents.names else None
    keeps = any(isinstance(loss, Preservation) for loss in built.values())
    return TunedObjective(weights, run.diffusion, projection, built, rivals, original if keeps else None), rivals
