"""What reconstruction loses: one pass, in which every metric over reconstructions sees every batch.

All is streamed: memory does not grow with the number of images beyond the rows for distances.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vfmlab import config
from vfmlab.evaluation.features import Seen
from vfmlab.evaluation.frechet import FeatureSet
from vfmlab.evaluation.instruments.base import RECONSTRUCTIONS, Metrics, Part, Pass
from vfmlab.evaluation.number import Report
from vfmlab.evaluation.precision import precise, tf32
from vfmlab.evaluation.protocol import Setup, open_setup, real_features
from vfmlab.evaluation.roundtrip import evaluating, through
from vfmlab.tokenizers.base import Tokenizer

Progress = Callable[[int, int], object]

LATENTS = 1000  # for probes and alignment


def evaluate_reconstruction(tokenizer: Tokenizer, cfg: config.Data, protocol: config.Protocol,
                            setup: Setup | None = None, progress: Progress | None = None) -> Report:
    """All numbers of a tokenizer's reconstructions, by the weights that it has.

    Which numbers these are is registered in :mod:`vfmlab.evaluation.instruments`. What could not be had is
    there with value None and a reason.

    Raises:
        DataError: reconstructions or features are not finite.
    """
    return measure(tokenizer, cfg, protocol, setup, progress).report


@torch.no_grad()
def measure(tokenizer: Tokenizer, cfg: config.Data, protocol: config.Protocol, setup: Setup | None = None,
            progress: Progress | None = None) -> Pass:
    """One pass over the images: the report, features of both sides, the first latents and labels."""
    device = tokenizer.stat_mean.device
    setup = setup or open_setup(cfg, protocol, device=device)
    real = real_features(setup)
    gathered = Pass(setup, setup.resolved(), tokenizer, real, FeatureSet.empty(setup.space.dimension))
    rows = real.features()  # in the order of the images, as many as are held
    metrics, done, latents, labels = Metrics(RECONSTRUCTIONS, gathered), 0, [], []
    with evaluating(tokenizer), tf32(False):
        for batch, images, ids in setup.shares(device):
            with precise(protocol.precision, images.device):
                trip = through(tokenizer, images, protocol.seed, setup.ranks.share(ids))
            seen = setup.space(trip.restored)
            z = tokenizer.normalise(trip.raw).cpu()
            images, restored, codes, z, y, *parts = setup.joined(
                ids, images, trip.restored, trip.codes, z, batch.labels, *seen)
            seen = Seen(*parts)
            gathered.own.update(seen.features)
            theirs = rows[done : done + len(ids)]
            if len(theirs) < len(ids):
                theirs = setup.space(images).features
            metrics.update(Part(images, restored, seen, y, ids, theirs, z,
                                None if codes is None else codes.cpu()))
            if done < LATENTS:
                latents.append(z[: LATENTS - done])
                labels.append(y[: LATENTS - done])
            done += len(ids)
            if progress is not None:
                progress(done, gathered.resolved.n)
        gathered.latents, gathered.labels = torch.cat(latents), torch.cat(labels)
        gathered.report = metrics.write().report(kind="tokenizer", hash=gathered.resolved.hash)
    return gathered
