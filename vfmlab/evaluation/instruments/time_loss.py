"""Error of the predicted velocity over t."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vfmlab.diffusion import path as flow
from vfmlab.diffusion import prompts
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.instruments.blocks import PART, latents
from vfmlab.evaluation.number import LOWER, Draft, Quantity
from vfmlab.evaluation.roundtrip import evaluating
from vfmlab.evaluation.subject import Subject, noise_of
from vfmlab.registry import INSTRUMENTS

BINS = 10


@torch.no_grad()
def time_losses(network: nn.Module, z: Tensor, labels: Tensor, ids: Sequence[int], seed: int = 0,
                bins: int = BINS) -> tuple[list[float], list[float]]:
    """Middle of each of `bins` parts of [0, 1], and there the velocity's error over the target's power.

    Args:
        z: N C h w clean normalised latents. labels: long N. ids: one per row, which decide its noise.
    """
    times, losses = [(i + 0.5) / bins for i in range(bins)], []
    device, along = next(network.parameters()).device, flow.of(network)
    with evaluating(network):
        for t in times:
            wrong = power = 0.0
            for k, part in enumerate(z.split(PART)):
                part, rows = part.to(device), slice(k * PART, k * PART + len(part))
                noise = noise_of(part, ids[rows], seed)
                point = along.interpolate(part, noise, torch.full((len(part),), t, device=device))
                v = along.tangent(point.x, network(point.x, point.t, labels[rows].to(device)))
                wrong += float((v - point.v).double().square().sum())
                power += float(point.v.double().square().sum())
            losses.append(wrong / power)
    return times, losses


@INSTRUMENTS.register("time_loss")
class TimeLoss(Instrument):
    """Error of the predicted velocity over t in units of the target's power, and its mean."""

    kinds = ("diffusion",)
    quantities = (Quantity("velocity_error", "velocity error", LOWER),
                  Quantity("velocity_error_over_t", "velocity error over t", LOWER, many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        z, ids = latents(subject)
        network, labels = subject.network, subject.held_out.labels[: len(z)]
        facts = {"measure": "velocity error", "bins": BINS, "images": len(z)}
        if (own := getattr(network, "prompts", None)) is not None:
            texts = prompts.captions(subject.source, torch.tensor(ids))
            network = prompts.prompted(network, prompts.of(texts, own.encoder))
            labels, facts = torch.arange(len(z)), facts | {"condition": "captions"}
        times, losses = time_losses(network, z, labels, ids, subject.protocol.seed)
        section = subject.section(facts)
        report.add("velocity_error", sum(losses) / len(losses), section, len(z))
        report.add("velocity_error_over_t", losses, section, len(z), t=times)
