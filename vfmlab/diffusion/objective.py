"""The training forward of latent diffusion: noise, time and label dropout drawn, velocity predicted, loss returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.config import Diffusion
from vfmlab.diffusion import path
from vfmlab.seeding import StepRandom


class DiffusionObjective(nn.Module):
    """Flow-matching loss on latents.

    Args:
        network: `(x B C h w, t B, y B) -> v B C h w`, with `num_classes`, its null label. It is what gets averaged.
        config: time sampling, cosine term and class dropout.
    """

    def __init__(self, network: nn.Module, config: Diffusion):
        super().__init__()
        self.network, self.config = network, config
        times = path.time_quantiles(config.time)
        self.register_buffer("expected", self._near(times).mean(0), persistent=False)

    @staticmethod
    def _near(t: Tensor) -> Tensor:
        """How near t is to data, middle and noise: weights [B, 3] that sum to 1 (quadratic Bernstein polynomials)."""
        return torch.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)

    def forward(self, batch: Any, rng: StepRandom, samples: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch.

        Args:
            batch: (z B C h w normalised latents, labels B, ...). rng: randomness for exactly these rows.
            samples: images seen so far (nothing here depends on it).

        Returns:
            the mean loss, and `loss_data`, `loss_middle`, `loss_noise`: its mean weighted towards t = 0, 1/2 and 1.
            Each is divided by the expected weight, not the drawn one: means over ranks and micro-batches are exact.
        """
        z, labels = batch[0].float(), batch[1]
        noise, t, drop = rng.randn(*z.shape[1:]), path.draw_times(self.config.time, rng), rng.rand()
        labels = torch.where(drop < self.config.class_dropout, self.network.num_classes, labels)
        point = path.interpolate(z, noise, t)
        each = path.velocity_loss(self.network(point.x, point.t, labels), point.v, self.config.cosine_loss)
        with torch.no_grad():
            parts = (each[:, None] * self._near(t)).mean(0) / self.expected
        return each.mean(), dict(zip(("loss_data", "loss_middle", "loss_noise"), parts, strict=True))
