"""The training forward of the ar generator: labels and orders drawn, cross-entropy of every code returned."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.config import AR
from vfmlab.losses.terms import Pieces, Term
from vfmlab.seeding import StepRandom


class Drawn(NamedTuple):
    """What the network predicts and what it says, in the order in which codes are drawn.

    codes: long B T. logits: B T K. labels: long B, with the null label where the class was dropped.
    """

    codes: Tensor
    logits: Tensor
    labels: Tensor


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
        pieces = self.pieces(batch, rng, samples)
        return pieces.loss, pieces.metrics

    def pieces(self, batch: Any, rng: StepRandom, samples: int = 0) -> Pieces:
        """:meth:`forward` with what it went through; arguments as there."""
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
        metrics = {"bits_per_image": loss.detach() * codes.shape[1] / math.log(2)}
        return Pieces(loss, metrics, {"cross_entropy": Term(loss, 1.0)}, drawn=Drawn(targets, logits, labels))


@torch.no_grad()
def image_bits(network: nn.Module, labels: Tensor, codes: Tensor) -> Tensor:
    """Bits that each image's codes cost under the network, in raster order: float64 B.

    Raises:
        ConfigError: labels or codes that are not the network's.
    """
    logits = network.logits(labels, codes).float()
    nats = F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    return nats.double().sum(1) / math.log(2)
