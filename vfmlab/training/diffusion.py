"""Training latent diffusion on a tokenizer's latents, encoded once (cached) or anew at every step, aligned or
not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vfmlab import config
from vfmlab.data import BatchStream, ImageSource, open_source, to_float
from vfmlab.diffusion import captions, latents, path, prompts, sampling, shards, targets
from vfmlab.diffusion.alignment import Projection
from vfmlab.diffusion.objective import DiffusionObjective
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation.number import Number
from vfmlab.evaluation.roundtrip import seeds
from vfmlab.nn import parts as given
from vfmlab.registry import NETWORKS
from vfmlab.runs import RunDir
from vfmlab.seeding import SampleRandom, derive
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.training import evaluated, features, repa_e
from vfmlab.training.repa_e import Tuned
from vfmlab.training.task import Task
from vfmlab.training.tokenizer import inherit, write_statistics
from vfmlab.weights.load import with_weaker

SHOWN = 16  # samples of a preview
# of evaluations: agreement of a block with the VFM that the network is aligned with
TARGET_KEY = "cknna_target_block_"


class DiffusionTask(Task):
    """A run with a `diffusion` section, as the training loop wants it.

    With `alignment` or `class_token` the images' targets come beside the latents; with `tune` the tokenizer
    is a part of what is trained, averaged and saved.

    Args:
        run: whose `diffusion` and `data` sections are used. tokenizer: trained, with latent statistics; it is
            frozen.
        cache_root: folder of caches, one inside for each tokenizer (or target VFM), data set and options.
        tokenizer_dir: the tokenizer's run directory, for what its losses learned, where it is tuned.

    Raises:
        CheckpointError: a tokenizer without latent statistics. ConfigError: an alignment that does not fit
        the network.
    """

    name = "diffusion"

    def __init__(self, run: config.Phase, tokenizer: Tokenizer, cache_root: str | Path = "runs/.latents",
                 tokenizer_dir: RunDir | None = None):
        self.run, self.train, self.cache_root = run, run.train, Path(cache_root)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        _ = tokenizer.statistics
        self.source: ImageSource = open_source(run.data, "train")
        self.captions = (None if run.diffusion.text is None
                         else captions.Captioned(run.diffusion, self.source))
        self.class_names = self.source.class_names if self.captions is None else self.captions.texts
        self.num_classes = len(self.class_names)
        with torch.random.fork_rng(devices=[]):
            network, self.targets, projection = build(
                run.diffusion, run.data.size, run.seed, tokenizer.latent_shape, self.num_classes,
                run.recipe.parts,
            )
            network.path = path.of_run(run.diffusion, run.tokenizer)
            self.weights, self.objective = network, None
            if run.diffusion.tune is not None:
                self._tune(network, projection, tokenizer_dir)
        if self.objective is None:
            self.objective = DiffusionObjective(network, run.diffusion, projection)
        self.find_unused = (
            run.diffusion.tune is not None or (projection is not None and projection.config.until is not None)
        )
        self.shards, self.completes = run.diffusion.tune is None, run.diffusion.tune is not None
        self.columns = min(SHOWN, max(self.num_classes, 8))
        self.caches = run.diffusion.cache and run.diffusion.tune is None
        self.crop = None if self.caches else run.data.crop  # stored latents are of the centre crop
        self.cached: latents.LatentSource | None = None
        self.sources: list[targets.Targets | targets.Teacher] = []

    def _tune(self, network: nn.Module, projection: Projection, tokenizer_dir: RunDir | None) -> None:
        if self.train.compile:
            raise ConfigError("diffusion.train.compile with diffusion.tune: the alignment's gradient is "
                              "taken twice, which compiled networks do not allow; set it to false")
        self.weights = Tuned(network, repa_e.copy_of(self.tokenizer, self.run))
        self.trains, self.inner = repa_e.trains(self.run.diffusion.tune), "alignments that tune (REPA-E)"
        self.objective = repa_e.TunedObjective(self.weights, self.run.diffusion, self.run.losses,
                                               self.tokenizer, projection)
        self.discriminators = self.objective.own.discriminators
        if tokenizer_dir is not None:
            self.started = inherit(tokenizer_dir,
                                   {"others": self.objective, "discriminators": self.discriminators})

    def _parts(self, weights: nn.Module) -> tuple[nn.Module, Tokenizer]:
        """Network and tokenizer of `weights`."""
        network, tokenizer = weights, self.tokenizer
        if isinstance(weights, Tuned):
            network, tokenizer = weights.network, weights.tokenizer
        if self.captions is not None:
            prompts.set_prompts(network, self.captions.prompts)
        return network, tokenizer

    @property
    def compiled(self) -> list[nn.Module]:
        return [self._parts(self.weights)[0]]

    def facts(self) -> dict[str, str]:
        model, statistics = self.tokenizer.vfm, self.tokenizer.statistics
        known = {"fingerprint": statistics.fingerprint, "class_names": json.dumps(self._remembered)}
        known["tokenizer"] = self.run.parent or ""
        return known if model is None else {**known, "vfm_fingerprint": model.fingerprint}

    @property
    def _remembered(self) -> list[str]:
        """The classes; of captions a few examples."""
        return self.class_names if self.captions is None else self.class_names[: prompts.EXAMPLES]

    # -- data -----------------------------------------------------------------------------------------------

    def prepare(self, run_dir: RunDir, fresh: bool) -> Iterator[tuple[str, int, int]]:
        """The caches: every training image encoded once, by the tokenizer and by the VFMs it is aligned
        with."""
        self.root = str(run_dir.path.parent)
        self.tokenizer.to(self.device)
        share, flip = self.share, self.run.data.flip
        if self.caches:
            options = {"flip": flip, "sampled": self.run.diffusion.sample_posterior}
            wanted = latents.fingerprint(self.tokenizer, self.source, **options)
            folder = self.cache_root / wanted
            train = self.run.recipe.train
            stores = train is not None and train.vfm_cache is not None
            maps = (features.stored(self.cache_root, self.tokenizer, self.source, flip, **share) if stores
                    else None)
            for done, of in latents.build(folder, self.tokenizer, self.source, **options, **share, maps=maps):
                yield "latents", done, of
            self.cached = latents.LatentSource(folder, wanted, **share)
        if self.captions is not None:
            for done, of in self.captions.prepare(self.cache_root, self.device, **share):
                yield "captions", done, of
            self._parts(self.weights)
        if self.targets is not None:
            yield from self._prepare_targets()

    def _prepare_targets(self) -> Iterator[tuple[str, int, int]]:
        self.sources, share, flip = [], self.share, self.run.data.flip
        for teacher, cached in zip(self.targets.teachers, self.targets.cached, strict=True):
            teacher.to(self.device)
            if cached and self.crop is not None:
                cached = False
                self.say(f"'{teacher.name}' is asked at every step: targets of random crops (data.crop) "
                         "cannot be kept")
            if cached:
                folder = self.cache_root / f"targets-{teacher.fingerprint(self.source, flip)}"
                for done, of in targets.build(folder, teacher, self.source, flip, **share):
                    yield "targets", done, of
            self.sources.append(targets.Targets(folder, **share) if cached else teacher)
        token = self.run.diffusion.class_token
        if token is not None and token.normalise:
            source = self.sources[self.targets.teachers.index(self.targets.of("token"))]
            chosen = (
                source.statistics() if isinstance(source, targets.Targets)
                else targets.token_statistics(source, self.source, self.run.seed)
            )
            self.objective.scale.set(*chosen)

    def stream(self, start_step: int, rows: slice) -> Iterator[Any]:
        batches = self._stream(start_step, rows)
        return batches if self.captions is None else self.captions.labelled(batches)

    def _stream(self, start_step: int, rows: slice) -> Iterator[Any]:
        batch, seed, data = self.train.batch, self.run.seed, self.run.data
        asks = any(isinstance(source, targets.Teacher) for source in self.sources)
        encodes, tunes = self.cached is None, self.run.diffusion.tune is not None
        images = None
        if asks or encodes:
            images = targets.Tap(BatchStream(self.source, batch, seed, start_step, rows, data.flip,
                                             data.workers, self.crop))
        if tunes:
            batches = images
        elif encodes:
            sampled = self.run.diffusion.sample_posterior
            batches = latents.fresh_stream(images, self.tokenizer, batch, seed, start_step, rows, sampled)
        else:
            batches = latents.cached_stream(self.cached, batch, seed, start_step, rows)
        if not self.sources:
            return batches
        kind = repa_e.TunedBatch if tunes else targets.AlignedBatch
        return shards.mapped(lambda pair: kind(*pair[0][:3], **pair[1]),
                             targets.beside(batches, self.sources, images, batch, seed, start_step, rows))

    def example(self, rows: slice) -> Any:
        """Noise in place of latents and targets: as large, and there before the caches are."""
        tunes, n = self.run.diffusion.tune is not None, rows.stop - rows.start
        return example(n, self.tokenizer.latent_shape, self.run.data.size, self.num_classes, self.targets,
                       tunes)

    # -- looking at it --------------------------------------------------------------------------------------

    def preview(self, weights: nn.Module) -> Tensor:
        """Samples of fixed seeds and labels, decoded: N 3 H W. Solver and guidance are the protocol's."""
        protocol, ids = self.run.protocol, torch.arange(self.columns)
        network, tokenizer = self._parts(weights)
        with_weaker(network, tokenizer, protocol.guidance, self.root)
        labels = torch.arange(self.columns, device=self.device) % self.num_classes
        random, shape = SampleRandom(self.run.seed, ids.tolist(), self.device), tokenizer.latent_shape
        z = sampling.sample(network, labels, random, protocol.sampler, protocol.guidance, shape,
                            self.num_classes)
        return tokenizer.decode(z, **seeds(tokenizer, self.run.seed, ids))

    def evaluate(self, weights: nn.Module, samples: int) -> dict[str, Any]:
        network, tokenizer = self._parts(weights)
        with_weaker(network, tokenizer, self.run.protocol.guidance, self.root)
        report = evaluated.generated(self, network, tokenizer)
        return report.record() | {name: number.entry() for name, number in self._blocks(network).items()}

    def _blocks(self, network: nn.Module) -> dict[str, Number]:
        """Agreement (CKNNA) of every block at t = 1/2 with the protocol's feature space, and with the VFM it
        is aligned with."""
        from vfmlab.evaluation.instruments.blocks import BLOCK_KEY, block_alignment
        from vfmlab.evaluation.protocol import Resolved, exact, resolve, selection

        z, setup = self._baseline.latents, self._setup
        resolved = resolve(exact(setup.protocol), setup.cfg, setup.source, setup.space)
        ids = selection(resolved, setup.source)[: len(z)]
        references = {BLOCK_KEY: self._baseline.real.features()[: len(z)]}
        if self.run.diffusion.alignment is not None:
            teacher, source = self.targets.of("target"), setup.source
            parts = [teacher.read(to_float(
                source.batch(part).images).to(self.device))["target"].mean((2, 3)).cpu()
                for part in ids.split(128)]
            references[TARGET_KEY] = torch.cat(parts)
        numbers: dict[str, Number] = {}
        for key, theirs in references.items():
            facts = self.targets.of("target").facts() if key == TARGET_KEY else {}
            mark = Resolved({**resolved.sections, "target": facts} if facts else resolved.sections).hash
            try:
                numbers |= block_alignment(network, z, ids.tolist(), theirs, mark, key)
            except DataError:  # too few images, or features that do not differ yet: no reason to stop
                continue
        return numbers

    def finish(self, weights: nn.Module, run_dir: RunDir) -> None:
        """A tuned tokenizer's latent statistics, measured anew, of the averaged and of the raw weights."""
        if not isinstance(weights, Tuned):
            return
        write_statistics(run_dir, [self.weights.tokenizer, weights.tokenizer], self.source, self.run.seed)


class Parts(NamedTuple):
    """What a diffusion run trains. targets: the VFMs that it is aligned with, or None; projection: REPA's
    loss, or None."""

    network: nn.Module
    targets: targets.Plan | None
    projection: Projection | None


def build(cfg: config.Diffusion, size: int, seed: int, latent_shape: tuple[int, int, int], num_classes: int,
          parts: Mapping[str, config.Part] | None = None) -> Parts:
    """Network, targets and alignment of a run, drawn from its seed (the global generator's state changes).

    size: side of the images in pixels. parts: those given from a notebook's cell.

    Raises :class:`ConfigError` for an alignment that does not fit the network.
    """
    torch.manual_seed(derive("diffusion", seed))
    network = NETWORKS.get(cfg.network.kind)(cfg.network, latent_shape, num_classes)
    network = given.replace(network, parts, "network", seed)
    if cfg.text is not None:
        prompts.set_prompts(network, prompts.blank(cfg.network.text))
    align = cfg.alignment
    if align is None and cfg.class_token is None:
        return Parts(network, None, None)
    # After the network, whose initialisation is then the same with and without alignment.
    asked = targets.plan(cfg, network.grid, size, getattr(cfg.network, "token", None))
    torch.manual_seed(derive("alignment", seed))
    projection = None if align is None else Projection(align, network, asked.of("target").width, asked.whole)
    return Parts(network, asked, projection)


def example(n: int, latent_shape: tuple[int, int, int], size: int, num_classes: int,
            asked: targets.Plan | None, tunes: bool) -> Any:
    """A batch of noise in the form of a run's real ones: n rows of latents (images of `size` where it
    `tunes`) with targets."""
    labels, z = torch.arange(n) % num_classes, torch.randn(n, *latent_shape)
    if asked is None:
        return latents.LatentBatch(z, labels, torch.arange(n))
    map_of, token_of = asked.of("target"), asked.of("token")
    target = None if map_of is None else torch.randn(n, map_of.width, *map_of.grid)
    token = None if token_of is None else torch.randn(n, token_of.token_width)
    if tunes:
        images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)
        return repa_e.TunedBatch(images, labels, torch.arange(n), target, token)
    return targets.AlignedBatch(z, labels, torch.arange(n), target, token)
