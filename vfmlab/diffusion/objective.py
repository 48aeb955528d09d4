"""The training forward of latent diffusion: noise, time and label dropout drawn, velocity predicted, loss
returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.config import Diffusion
from vfmlab.diffusion import path
from vfmlab.diffusion.alignment import Projection, TokenScale
from vfmlab.losses.terms import Pieces, Term, total
from vfmlab.seeding import StepRandom

NEAR = ("loss_data", "loss_middle", "loss_noise")


@dataclass(frozen=True)
class Terms:
    """Losses per image [B], unweighted: velocity of the latents, and where they are on, of the class token
    and of alignment.

    t: times [B]. point: where on the path, with the velocity that is to be predicted there; prediction: the
    network's (both B C h w). read: block -> tokens B N D after it, where a projection reads them.
    """

    velocity: Tensor
    token: Tensor | None
    alignment: Tensor | None
    t: Tensor
    point: path.PathSample
    prediction: Tensor
    read: dict[int, Tensor]
    base: Tensor | None = None  # velocity of the second read-out, of networks that have one


class Flow:
    """Flow matching of latents (and a class token) with a network: draws, and losses per image.

    Args:
        config: time sampling, cosine term, class dropout, and which of alignment and class token are on.
    """

    def __init__(self, config: Diffusion):
        self.config = config
        self.expected = _near(path.time_quantiles(config.time)).mean(0)

    def terms(
        self, network: nn.Module, z: Tensor, labels: Tensor, rng: StepRandom,
        projection: Projection | None = None,
        target: Tensor | None = None, token: Tensor | None = None, scaled: Tensor | None = None,
    ) -> Terms:  # fmt: skip
        """Losses at noisy latents.

        Args:
            z: B C h w normalised latents. labels: long B. rng: randomness for exactly these rows. projection:
            REPA's loss, if
                it is on, against target (B D h w) and token (B K). scaled: B K the token as it is denoised.
        """
        noise, t, drop = rng.randn(*z.shape[1:]), path.draw_times(self.config.time, rng), rng.rand()
        labels = torch.where(drop < self.config.class_dropout, network.num_classes, labels)
        along = path.of(network)
        if self.config.stale is not None:
            return self._stale(network, along, z, noise, t, labels, rng)
        point = along.interpolate(z, noise, t)
        more: dict[str, Any] = {}
        if self.config.class_token is not None:
            beside = path.interpolate(scaled, rng.randn(scaled.shape[1]), t)
            more["token"] = beside.x
        if projection is not None:
            more["features_at"] = (projection.config.block,)
        if getattr(network, "least_time", None):
            point = path.as_seen(point, network.least_time)
        second = getattr(network, "base_weight", 0.0) > 0
        if second:
            more["readouts"] = True
        out = network(point.x, point.t, labels, **more)
        out, hidden = out if projection is not None else (out, {})
        joint = self.config.class_token is not None
        prediction = out.v if joint or second else out
        return Terms(
            along.loss(prediction, point, self.config.cosine_loss),
            path.velocity_loss(out.v_class, beside.v) if joint else None,
            None if projection is None else projection(hidden[projection.config.block], target, token),
            t, point, prediction, hidden,
            along.loss(out.base, point, self.config.cosine_loss) * network.base_weight if second else None,
        )

    def _stale(self, network: nn.Module, along: path.Path, z: Tensor, noise: Tensor, t: Tensor,
               labels: Tensor, rng: StepRandom) -> Terms:
        """Losses of a split network's head at several times under one encoding; rows: image by image for the
        first time, then for the next."""
        stale = self.config.stale
        first = along.interpolate(z, noise, t)
        tokens = network.encode(first.x, first.t, labels)[-1]
        later = (t[:, None] * (1 - stale.span * rng.rand(stale.heads))).T.flatten()
        z, noise, tokens = (x.repeat(stale.heads, *[1] * (x.ndim - 1)) for x in (z, noise, tokens))
        point = along.interpolate(z, noise, later)
        v, _ = network.head(point.x, point.t, tokens)
        return Terms(along.loss(v, point, self.config.cosine_loss), None, None, later, point, v, {})

    def weigh(self, flow: Terms) -> dict[str, Term]:
        """The terms, means over images, with their weights."""
        terms = {"velocity": Term(flow.velocity.mean(), 1.0)}
        if flow.base is not None:
            terms["base"] = Term(flow.base.mean(), 1.0)
        if flow.token is not None:
            terms["token_velocity"] = Term(flow.token.mean(), self.config.class_token.weight)
        if flow.alignment is not None:
            terms["alignment"] = Term(flow.alignment.mean(), self.config.alignment.weight)
        return terms

    def loss(self, flow: Terms, terms: dict[str, Term]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, a mean over images, and its parts.

        Parts: `loss_data`, `loss_middle`, `loss_noise`, the latents' loss weighted towards t = 0, 1/2 and 1,
        each divided by the expected weight, not the drawn one, so that means over ranks and micro-batches are
        exact. With alignment, class token or second read-out also `velocity` (the latents' loss),
        `token_velocity`, `base` (the second read-out's, weighted), and `alignment`, the mean cosine.
        """
        self.expected = self.expected.to(flow.t.device)
        with torch.no_grad():
            parts = (flow.velocity[:, None] * _near(flow.t)).mean(0) / self.expected
        metrics = dict(zip(NEAR, parts, strict=True))
        if len(terms) > 1:
            metrics |= {name: term.value.detach() for name, term in terms.items()}
        if "alignment" in terms:
            metrics["alignment"] = 1 - metrics["alignment"]
        return total(terms), metrics


class DiffusionObjective(nn.Module):
    """Flow-matching loss on latents, with alignment and class token where the config has them.

    Args:
        network: `(x B C h w, t B, y B) -> v B C h w`, with `num_classes`, its null label. It is what gets
        averaged.
        config: the run's diffusion section. projection: REPA's loss; its read-out trains with the network,
        but is no part of it.
    """

    def __init__(self, network: nn.Module, config: Diffusion, projection: Projection | None = None):
        super().__init__()
        self.network, self.config, self.projection, self.flow = network, config, projection, Flow(config)
        self.scale = TokenScale(network.config.token) if config.class_token is not None else None

    def forward(self, batch: Any, rng: StepRandom, samples: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch, see :meth:`pieces` and :meth:`Flow.loss`."""
        pieces = self.pieces(batch, rng, samples)
        return pieces.loss, pieces.metrics

    def pieces(self, batch: Any, rng: StepRandom, samples: int = 0) -> Pieces:
        """One batch on its way to the loss.

        Args:
            batch: (z B C h w normalised latents, labels B, ...), with `target` and `token` where they are
            read. rng:
                randomness for exactly these rows. samples: images seen so far; alignment may end after some.
        """
        on = self.projection is not None and self.projection.on(samples)
        target, token = getattr(batch, "target", None), getattr(batch, "token", None)
        scaled = self.scale(token) if self.scale is not None else None
        flow = self.flow.terms(self.network, batch[0].float(), batch[1], rng,
                                self.projection if on else None, target, token, scaled)
        terms = self.flow.weigh(flow)
        return Pieces(*self.flow.loss(flow, terms), terms, flow=flow)


def _near(t: Tensor) -> Tensor:
    """How near t is to data, middle and noise: weights [B, 3] that sum to 1 (quadratic Bernstein
    polynomials)."""
    return torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
