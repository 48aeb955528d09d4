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
from vfmlab.seeding import StepRandom

NEAR = ("loss_data", "loss_middle", "loss_noise")


@dataclass(frozen=True)
class Terms:
    """Losses per image [B], unweighted: velocity of the latents, and where they are on, of the class token
    and of alignment."""

    velocity: Tensor
    token: Tensor | None
    alignment: Tensor | None
    t: Tensor
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
        out, kept = out if projection is not None else (out, {})
        joint = self.config.class_token is not None
        return Terms(
            along.loss(out.v if joint or second else out, point, self.config.cosine_loss),
            path.velocity_loss(out.v_class, beside.v) if joint else None,
            None if projection is None else projection(kept[projection.config.block], target, token),
            t,
            along.loss(out.base, point, self.config.cosine_loss) * network.base_weight if second else None,
        )

    def loss(self, found: Terms) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, a mean over images, and its parts.

        Parts: `loss_data`, `loss_middle`, `loss_noise`, the latents' loss weighted towards t = 0, 1/2 and 1,
        each divided by the expected weight, not the drawn one, so that means over ranks and micro-batches are
        exact. With alignment, class token or second read-out also `velocity` (the latents' loss),
        `token_velocity`, `base` (the second read-out's, weighted), and `alignment`, the mean cosine.
        """
        self.expected = self.expected.to(found.t.device)
        with torch.no_grad():
            parts = (found.velocity[:, None] * _near(found.t)).mean(0) / self.expected
        total, metrics = found.velocity.mean(), dict(zip(NEAR, parts, strict=True))
        if found.token is None and found.alignment is None and found.base is None:
            return total, metrics
        metrics["velocity"] = total.detach()
        if found.base is not None:
            metrics["base"] = found.base.mean().detach()
            total = total + found.base.mean()
        if found.token is not None:
            metrics["token_velocity"] = found.token.mean().detach()
            total = total + self.config.class_token.weight * found.token.mean()
        if found.alignment is not None:
            metrics["alignment"] = 1 - found.alignment.mean().detach()
            total = total + self.config.alignment.weight * found.alignment.mean()
        return total, metrics


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
        """Loss of one batch.

        Args:
            batch: (z B C h w normalised latents, labels B, ...), with `target` and `token` where they are
            read. rng:
                randomness for exactly these rows. samples: images seen so far; alignment may end after some.

        Returns:
            the mean loss and its parts, see :meth:`Flow.loss`.
        """
        on = self.projection is not None and self.projection.on(samples)
        target, token = getattr(batch, "target", None), getattr(batch, "token", None)
        scaled = self.scale(token) if self.scale is not None else None
        found = self.flow.terms(self.network, batch[0].float(), batch[1], rng,
                                self.projection if on else None, target, token, scaled)
        return self.flow.loss(found)


def _near(t: Tensor) -> Tensor:
    """How near t is to data, middle and noise: weights [B, 3] that sum to 1 (quadratic Bernstein
    polynomials)."""
    return torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
