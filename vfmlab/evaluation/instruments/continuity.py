"""Does a small move of the latent move the picture little? LPC in AlexNet's features."""

from __future__ import annotations

import torch

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.instruments.decoding import CURVE_IMAGES
from vfmlab.evaluation.number import LOWER, Draft, Quantity
from vfmlab.evaluation.pixels import distances, perceptual
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS
from vfmlab.seeding import SampleRandom, derive

EPSILON = 0.1  # of the normalised latent's standard deviation


@INSTRUMENTS.register("continuity")
class Continuity(Instrument):
    """LPIPS between what is decoded from z + epsilon u and from z - epsilon u, mean over images (LPC, PAE,
    arXiv 2605.07915). Epsilon, Gaussian moves u and the number of images: ours. Measured where LPIPS is."""

    kinds = ("tokenizer",)
    quantities = (Quantity("lpc", "LPIPS of latent moves", LOWER,
                           definition="LPIPS between decodings of a latent moved forth and back by a tenth of its deviation"),)  # fmt: skip

    @torch.no_grad()
    def measure(self, subject: Subject, report: Draft) -> None:
        network, maps = perceptual(str(subject.device)), subject.held_out
        if isinstance(network, str):
            raise DataError(network)
        z, ids = maps.maps[:CURVE_IMAGES], maps.indices[:CURVE_IMAGES].tolist()
        move = EPSILON * SampleRandom(derive("continuity", subject.protocol.seed), ids).randn(*z.shape[1:])
        forth, back = (subject.decode(moved).to(subject.device) for moved in (z + move, z - move))
        values = distances(forth, back, network)
        if isinstance(values, str):
            raise DataError(values)
        facts = {"measure": "LPIPS of latent moves", "network": "alex", "epsilon": EPSILON, "images": len(z)}
        report.mean("lpc", values.double().cpu(), subject.section(facts))
