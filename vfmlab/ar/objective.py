"""The training forward of the ar generator: labels and orders drawn, cross-entropy of every code returned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.config import AR
from vfmlab.seeding import StepRandom


class ARObjective(nn.Module):
    """Cross-entropy of codes given those before, a mean over tokens (nats).

    Args:
        network: `(labels B, codes B T, order) -> logits B T K`, with `num_classes`, its null label. It is
        what gets averaged. config: the run's ar section.
    """

    def __init__(self, network: nn.Module, config: AR):
        super().__init__()
        self.network, self.config = network, config

    def forward(self, batch: Any, rng: StepRandom, samples: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch.

        Args:
            batch: (codes long B T in raster order, labels B, ...). rng: randomness for exactly these rows.
            samples: images seen so far, which decide how often orders are random.

        Returns:
            the mean cross-entropy in nats a token, and `bits_per_image`: the same in bits, summed over
            tokens.
        """
        codes, labels = batch[0].long(), batch[1]
        labels = torch.where(rng.rand() < self.config.class_dropout, self.network.num_classes, labels)
        order, permuted = None, self.config.permuted
        if permuted is not None:
            order, chance = rng.rand(codes.shape[1]).argsort(1), permuted.chance(samples)
            raster = torch.arange(codes.shape[1], device=codes.device)
            order = torch.where((rng.rand() < chance)[:, None], order, raster)
        logits = self.network(labels, codes, order)
        targets = codes if order is None else codes.gather(1, order)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return loss, {"bits_per_image": loss.detach() * codes.shape[1] / math.log(2)}


@torch.no_grad()
def image_bits(network: nn.Module, labels: Tensor, codes: Tensor) -> Tensor:
    """Bits that each image's codes cost under the network, in raster order: float64 B.

    Raises:
        ConfigError: labels or codes that are not the network's.
    """
    logits = network.logits(labels, codes).float()
    nats = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    return nats.double().sum(1) / math.log(2)
