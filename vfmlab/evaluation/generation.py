"""How good samples are: one pass over them, in which every metric over samples sees every batch; the
tokenizer's own beside.

Sample i is made from (seed, i) with class i modulo the number of classes, whatever the batch size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfmlab import config
from vfmlab.evaluation.frechet import FeatureSet
from vfmlab.evaluation.instruments.base import CODES, SAMPLES, Metrics, Part, Pass
from vfmlab.evaluation.number import Report
from vfmlab.evaluation.protocol import Setup, open_setup
from vfmlab.evaluation.reconstruction import Progress, measure
from vfmlab.evaluation.roundtrip import as_saved, evaluating
from vfmlab.seeding import SampleRandom, derive
from vfmlab.tokenizers.base import Tokenizer

BESIDE = ("rfd", "rkd", "psnr", "class_accuracy_own")  # of the tokenizer, beside the generation numbers


def labels_of(ids: Tensor, num_classes: int) -> Tensor:
    """The class of each sample: balanced over any run of ids, and fixed by the id."""
    return ids % max(num_classes, 1)


@torch.no_grad()
def evaluate_generation(network: nn.Module, tokenizer: Tokenizer, cfg: config.Data, protocol: config.Protocol,
                        num_classes: int, progress: Progress | None = None, setup: Setup | None = None,
                        baseline: Pass | None = None, seed: int = 0) -> Report:
    """Draw protocol.n samples and measure them; with the tokenizer's own numbers in `BESIDE`.

    Args:
        network: `(x, t, y) -> v`, or a token network where the protocol has a `token_sampler`.
        tokenizer: with statistics, or quantised. cfg: the data the tokenizer was trained on.
        progress: called with (samples done, samples in all) after every batch.
        setup, baseline: what :func:`~vfmlab.evaluation.protocol.open_setup` and
            :func:`~vfmlab.evaluation.reconstruction.measure` gave for the same tokenizer and protocol: spares
            work when a network is evaluated again and again.
        seed: of the run; the noise follows it where protocol.noise is "run".

    Raises:
        DataError: samples are not finite. CheckpointError: a tokenizer without statistics.
    """
    device = next(network.parameters()).device
    setup = setup or open_setup(cfg, protocol, device=device)
    baseline = baseline or measure(tokenizer, cfg, protocol, setup)
    resolved, samples = setup.resolved(sampling=True), FeatureSet.empty(setup.space.dimension)
    gathered = Pass(setup, resolved, tokenizer, baseline.real, baseline.own, samples, network=network)
    metrics = Metrics(SAMPLES, gathered)
    with evaluating(network, tokenizer):
        for ids in torch.arange(protocol.n).split(protocol.batch):
            labels = labels_of(ids, num_classes)
            images = as_saved(draw(network, tokenizer, protocol, ids, labels.to(device), num_classes, seed))
            seen = setup.space(images)
            samples.update(seen.features)
            metrics.update(Part(None, images, seen, labels, ids))
            if progress is not None:
                progress(int(ids[-1]) + 1, protocol.n)
        draft, kind = metrics.write(), "diffusion"
        if protocol.token_sampler is not None:
            draft, kind = Metrics(CODES, gathered).write(draft), "ar"
    report, own = draft.report(kind=kind, hash=resolved.hash), baseline.report
    numbers = {**report.numbers, **{name: own[name] for name in BESIDE if name in own}}
    protocols = {**own.protocols, **report.protocols, resolved.hash: resolved.as_dict()}
    return report.replace(numbers=numbers, protocols=protocols)


def draw(network: nn.Module, tokenizer: Tokenizer, protocol: config.Protocol, ids: Tensor, labels: Tensor,
         num_classes: int, seed: int = 0) -> Tensor:
    """Samples `ids` as images B 3 H W in [-1, 1]. seed: of the run, see :class:`~vfmlab.config.Protocol`."""
    from vfmlab.ar import sampling as tokens
    from vfmlab.diffusion import sampling

    own = protocol.noise == "run"
    noise = derive("samples of a run", protocol.seed, seed) if own else protocol.seed
    random = SampleRandom(noise, ids.tolist(), labels.device)
    if protocol.token_sampler is not None:
        return tokenizer.decode_codes(tokens.sample(network, labels, random, protocol.token_sampler,
                                                    protocol.guidance))
    z = sampling.sample(network, labels, random, protocol.sampler, protocol.guidance, tokenizer.latent_shape,
                        num_classes)
    return tokenizer.decode(z)
