"""How good samples are: one pass over them, in which every metric over samples sees every batch; the
tokenizer's own beside.

Sample i is made from (seed, i) with a class that i decides, whatever the batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from vfmlab import config, data
from vfmlab.evaluation import prompts
from vfmlab.evaluation.features import Seen
from vfmlab.evaluation.frechet import FeatureSet
from vfmlab.evaluation.instruments.base import CODES, SAMPLES, Metrics, Part, Pass
from vfmlab.evaluation.number import Report
from vfmlab.evaluation.precision import precise, tf32
from vfmlab.evaluation.protocol import Setup, open_setup
from vfmlab.evaluation.reconstruction import Progress, measure
from vfmlab.evaluation.roundtrip import as_saved, evaluating, seeds
from vfmlab.seeding import SampleRandom, derive
from vfmlab.tokenizers.base import Tokenizer

# Of the tokenizer, beside the generation numbers.
BESIDE = ("rfd", "rfd_reference", "rkd", "psnr", "class_accuracy_own", "prompt_all_own")


def labels_of(ids: Tensor, num_classes: int, protocol: config.Protocol | None = None) -> Tensor:
    """The class of each sample, fixed by its id: balanced over any run of ids, or drawn for each."""
    if protocol is None or protocol.labels == "balanced":
        return ids % max(num_classes, 1)
    drawn = [derive("label", protocol.seed, i) % max(num_classes, 1) for i in ids.tolist()]
    return torch.tensor(drawn, dtype=torch.long)


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
    network = prompts.prompted(network, protocol, setup.source)
    if protocol.prompts is not None:
        num_classes = network.num_classes
    resolved, samples = setup.resolved(sampling=True), FeatureSet.empty(setup.space.dimension)
    gathered = Pass(setup, resolved, tokenizer, baseline.real, baseline.own, samples, network=network)
    metrics = Metrics(SAMPLES, gathered)
    ranks, done = setup.ranks, 0
    batches = torch.arange(protocol.n).split(protocol.batch * ranks.count)
    shares = (ranks.share(ids) for ids in batches)
    source = (drawn(network, tokenizer, protocol, shares, num_classes, seed) if setup.drawn is None
              else _there(setup, device))
    with evaluating(network, tokenizer), tf32(False), contextlib.closing(source) as images:
        for ids, own in zip(batches, images, strict=True):
            own = as_saved(own)
            seen = setup.space(own)
            whole, *parts = ranks.join(len(ids), data.to_uint8(own), *seen)
            whole, seen = own if ranks.count == 1 else data.to_float(whole), Seen(*parts)
            samples.update(seen.features)
            labels = labels_of(ids, num_classes, protocol)
            shown = prompts.classes(protocol, setup.source, labels)
            metrics.update(Part(None, whole, seen, shown, ids, drawn_for=labels))
            done += len(ids)
            if progress is not None:
                progress(done, protocol.n)
        draft, kind = metrics.write(), "diffusion"
        if protocol.token_sampler is not None:
            draft, kind = Metrics(CODES, gathered).write(draft), "ar"
    report, own = draft.report(kind=kind, hash=resolved.hash), baseline.report
    numbers = {**report.numbers, **{name: own[name] for name in BESIDE if name in own}}
    protocols = {**own.protocols, **report.protocols, resolved.hash: resolved.as_dict()}
    return report.replace(numbers=numbers, protocols=protocols)


def _there(setup: Setup, device: torch.device) -> Iterator[Tensor]:
    """This process's share of samples that were drawn before, batch after batch."""
    for part in setup.drawn.images(setup.protocol.batch * setup.ranks.count):
        yield data.to_float(setup.ranks.share(part)).to(device)


def drawn(network: nn.Module, tokenizer: Tokenizer, protocol: config.Protocol, batches: Iterable[Tensor],
          num_classes: int, seed: int = 0) -> Iterator[Tensor]:
    """Images B 3 H W in [-1, 1] of batch after batch of ids; one is decoded while the next is sampled.

    seed: of the run, see :class:`~vfmlab.config.Protocol`. TF32, a switch of the whole process, is decoded in
    its turn.
    """
    device = next(network.parameters()).device
    stream = torch.cuda.Stream(device) if device.type == "cuda" and protocol.precision != "tf32" else None

    @torch.no_grad()
    def decode(z: Tensor, ids: Tensor) -> Tensor:
        with precise(protocol.precision, device):
            if not z.is_floating_point():
                return tokenizer.decode_codes(z).float()
            return tokenizer.decode(z, **seeds(tokenizer, noise_of(protocol, seed), ids)).float()

    def beside(z: Tensor, ids: Tensor, ready: torch.cuda.Event | None) -> Tensor:
        if stream is None:
            return decode(z, ids)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            images = decode(z, ids)
        stream.synchronize()
        images.record_stream(torch.cuda.default_stream(device))
        return images

    if protocol.precision == "tf32":
        yield from (decode(latents(network, tokenizer, protocol, ids, num_classes, seed), ids)
                    for ids in batches)
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for ids in batches:
            z = latents(network, tokenizer, protocol, ids, num_classes, seed)
            ready = None if stream is None else torch.cuda.current_stream(device).record_event()
            before, waiting = waiting, pool.submit(beside, z, ids, ready)
            if before is not None:
                yield before.result()
        if waiting is not None:
            yield waiting.result()


def noise_of(protocol: config.Protocol, seed: int) -> int:
    """The seed that the samples' noise follows. seed: of the run."""
    return derive("samples of a run", protocol.seed, seed) if protocol.noise == "run" else protocol.seed


@torch.no_grad()
def latents(network: nn.Module, tokenizer: Tokenizer, protocol: config.Protocol, ids: Tensor,
            num_classes: int, seed: int = 0) -> Tensor:
    """Samples `ids` as normalised latents B C h w, or as codes B T of a token network."""
    from vfmlab.ar import sampling as tokens
    from vfmlab.diffusion import sampling

    device = next(network.parameters()).device
    labels = labels_of(ids, num_classes, protocol).to(device)
    random = SampleRandom(noise_of(protocol, seed), ids.tolist(), device)
    with precise(protocol.precision, device):
        if protocol.token_sampler is not None:
            return tokens.sample(network, labels, random, protocol.token_sampler, protocol.guidance)
        return sampling.sample(network, labels, random, protocol.sampler, protocol.guidance,
                               tokenizer.latent_shape, num_classes)
