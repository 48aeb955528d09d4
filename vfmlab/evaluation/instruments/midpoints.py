"""Is the space between latents inhabited? Pictures decoded half way to the nearest neighbour."""

from __future__ import annotations

import torch

from vfmlab.errors import DataError
from vfmlab.evaluation.frechet import FeatureSet, frechet_distance
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.instruments.neighbours import nearest
from vfmlab.evaluation.number import LATENT, LOWER, TOKENIZERS, Draft, Published, Quantity
from vfmlab.evaluation.roundtrip import as_saved
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

BATCH = 128


@INSTRUMENTS.register("midpoints")
class Midpoints(Instrument):
    """Frechet distance, in the reference's features, of images and of what is decoded half way between each
    latent and its nearest neighbour.

    After iFID (2026), whose pairing and metric are not published: midpoints and Euclidean neighbours among
    the held-out images are ours. `midpoint_fd_excess` takes away the distance of the plain reconstructions.
    """

    kinds = ("tokenizer",)
    quantities = (Quantity("midpoint_fd", "FD of midpoints", LOWER, shown=(LATENT,),
                           definition="Frechet distance of images and of decodings half way to the nearest latent",
                           published=Published(0.65, TOKENIZERS)),
                  Quantity("midpoint_fd_excess", "FD of midpoints beyond rFD", LOWER,
                           definition="the same less that of reconstructions, in the same features"))  # fmt: skip

    def measure(self, subject: Subject, report: Draft) -> None:
        held = subject.held_out
        z, images = held.maps, held.images()
        if len(z) < 2:
            raise DataError("one held-out image has no neighbour")
        middle = (z + z[nearest(z, 1)[:, 0]]) / 2
        sets = [self._features(subject, x) for x in (images, as_saved(subject.decode(z)),
                                                    as_saved(subject.decode(middle)))]
        own, between = (frechet_distance(sets[0], one) for one in sets[1:])
        section = subject.section({"measure": "decoded midpoints", "neighbour": "euclid"}, reference=True)
        report.add("midpoint_fd", between, section, len(z))
        report.add("midpoint_fd_excess", between - own, section, len(z))

    @staticmethod
    def _features(subject: Subject, images: torch.Tensor) -> FeatureSet:
        rows = [subject.reference(part.to(subject.device)) for part in images.split(BATCH)]
        return FeatureSet.empty(rows[0].shape[1]).update(torch.cat(rows))
