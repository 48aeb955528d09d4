"""Training latent diffusion on a tokenizer's latents, encoded once (cached) or anew at every step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from vfmlab import config
from vfmlab.data import BatchStream, ImageSource, open_source
from vfmlab.diffusion import latents, sampling
from vfmlab.diffusion.objective import DiffusionObjective
from vfmlab.registry import NETWORKS
from vfmlab.runs import RunDir
from vfmlab.seeding import SampleRandom, derive
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.training.task import Task

SHOWN = 16  # samples of a preview


class DiffusionTask(Task):
    """A run with a `diffusion` section, as the training loop wants it.

    Args:
        run: whose `diffusion` and `data` sections are used. tokenizer: trained, with latent statistics; it is frozen.
        cache_root: folder of latent caches, one inside for each tokenizer, data set and options.

    Raises:
        CheckpointError: a tokenizer without latent statistics.
    """

    name = "diffusion"

    def __init__(self, run: config.Run, tokenizer: Tokenizer, cache_root: str | Path = "runs/.latents"):
        self.run, self.train, self.cache_root = run, run.diffusion.train, Path(cache_root)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        _ = tokenizer.statistics
        self.source: ImageSource = open_source(run.data, "train")
        self.num_classes = self.source.num_classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("diffusion", run.seed))
            network = NETWORKS.get(run.diffusion.network.kind)
            self.weights = network(run.diffusion.network, tokenizer.latent_shape, self.num_classes)
        self.objective = DiffusionObjective(self.weights, run.diffusion)
        self.columns = min(SHOWN, max(self.num_classes, 8))
        self.root = "runs"
        self.cached: latents.LatentSource | None = None
        self._setup: Any = None
        self._baseline: Any = None

    @property
    def device(self) -> torch.device:
        return next(self.weights.parameters()).device

    def facts(self) -> dict[str, str]:
        model, statistics = self.tokenizer.vfm, self.tokenizer.statistics
        found = {"fingerprint": statistics.fingerprint, "class_names": json.dumps(self.source.class_names)}
        found["tokenizer"] = self.run.parent or ""
        return found if model is None else {**found, "vfm_fingerprint": model.fingerprint}

    def prepare(self, run_dir: RunDir, fresh: bool) -> Iterator[tuple[str, int, int]]:
        """The latent cache: every training image encoded once."""
        self.root = str(run_dir.path.parent)
        self.tokenizer.to(self.device)
        if not self.run.diffusion.cache:
            return
        options = {"flip": self.run.data.flip, "sampled": self.run.diffusion.sample_posterior}
        wanted = latents.fingerprint(self.tokenizer, self.source, **options)
        folder, state = self.cache_root / wanted, PartialState()
        share = {"rank": state.process_index, "world": state.num_processes}
        for done, of in latents.build(folder, self.tokenizer, self.source, **options, **share):
            yield "latents", done, of
        self.cached = latents.LatentSource(folder, wanted)

    def stream(self, start_step: int, rows: slice) -> Iterator[latents.LatentBatch]:
        batch, seed, data = self.train.batch, self.run.seed, self.run.data
        if self.cached is not None:
            return latents.cached_stream(self.cached, batch, seed, start_step, rows)
        images = BatchStream(self.source, batch, seed, start_step, rows, data.flip, data.workers)
        sampled = self.run.diffusion.sample_posterior
        return latents.fresh_stream(images, self.tokenizer, batch, seed, start_step, rows, sampled)

    def example(self, rows: slice) -> latents.LatentBatch:
        """Noise in place of latents: as large, and there before the cache is."""
        n = rows.stop - rows.start
        labels = torch.arange(n) % self.num_classes
        return latents.LatentBatch(torch.randn(n, *self.tokenizer.latent_shape), labels, torch.arange(n))

    def preview(self, weights: torch.nn.Module) -> Tensor:
        """Samples of fixed seeds and labels, decoded: N 3 H W. Solver and guidance are the protocol's."""
        protocol, ids = self.run.protocol, range(self.columns)
        labels = torch.arange(self.columns, device=self.device) % self.num_classes
        random, shape = SampleRandom(self.run.seed, ids, self.device), self.tokenizer.latent_shape
        z = sampling.sample(weights, labels, random, protocol.sampler, protocol.guidance, shape, self.num_classes)
        return self.tokenizer.decode(z)

    def evaluate(self, weights: torch.nn.Module, samples: int) -> dict[str, Any]:
        from vfmlab.evaluation.generation import evaluate_generation
        from vfmlab.evaluation.protocol import open_setup
        from vfmlab.evaluation.reconstruction import measure

        data, protocol = self.run.data, self.run.protocol
        if self._setup is None:  # real images and reconstructions do not change from one evaluation to the next
            self._setup = open_setup(data, protocol, self.root, self.device)
            self._baseline = measure(self.tokenizer, data, protocol, self._setup)
        more = {"setup": self._setup, "baseline": self._baseline}
        return evaluate_generation(weights, self.tokenizer, data, protocol, self.num_classes, **more)
