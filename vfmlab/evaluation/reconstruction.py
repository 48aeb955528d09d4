"""What reconstruction loses: one pass, in which every metric over reconstructions sees every batch.

All is streamed: memory does not grow with the number of images beyond the rows for distances.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vfmlab import config
from vfmlab.evaluation.frechet import FeatureSet
from vfmlab.evaluation.instruments.base import RECONSTRUCTIONS, Metrics, Part, Pass
from vfmlab.evaluation.number import Report
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
    with evaluating(tokenizer):
        for batch, images in setup.images(device):
            raw, restored, codes = through(tokenizer, images)
            codes = None if codes is None else codes.cpu()
            seen = setup.space(restored)
            gathered.own.update(seen.features)
            theirs = rows[done : done + len(images)]
            if len(theirs) < len(images):
                theirs = setup.space(images).features
            z = tokenizer.normalise(raw).cpu()
            metrics.update(Part(images, restored, seen, batch.labels, batch.indices, theirs, z, codes))
            if done < LATENTS:
                latents.append(z[: LATENTS - done])
                labels.append(batch.labels[: LATENTS - done])
            done += len(images)
            if progress is not None:
                progress(done, gathered.resolved.n)
        gathered.latents, gathered.labels = torch.cat(latents), torch.cat(labels)
        gathered.report = metrics.write().report(kind="tokenizer", hash=gathered.resolved.hash)
    return gathered
