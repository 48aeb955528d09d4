"""Training the ar generator on a quantised tokenizer's codes, encoded once (cached) or anew at every step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab import config
from vfmlab.ar import codes as cache
from vfmlab.ar import sampling
from vfmlab.ar.llamagen import CodeShape
from vfmlab.ar.objective import ARObjective
from vfmlab.data import BatchStream, ImageSource, open_source
from vfmlab.registry import TOKEN_NETWORKS
from vfmlab.runs import RunDir
from vfmlab.seeding import SampleRandom, derive
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.training import evaluated
from vfmlab.training.task import Task

SHOWN = 16  # samples of a preview


class ARTask(Task):
    """A run with an `ar` section, as the training loop wants it.

    Args:
        run: whose `ar` and `data` sections are used. tokenizer: trained and quantised; it is frozen.
        cache_root: folder of caches, one inside for each tokenizer, data set and options.

    Raises:
        ConfigError: a continuous tokenizer.
    """

    name = "ar"
    shards = True

    def __init__(self, run: config.Phase, tokenizer: Tokenizer, cache_root: str | Path = "runs/.latents"):
        self.run, self.train, self.cache_root = run, run.train, Path(cache_root)
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.versions = cache.Versions(run.data, run.ar.ten_crops)
        self.source: ImageSource = self.versions.source
        if run.ar.ten_crops is not None:  # the run's own images; the larger ones are cut from the same files
            self.source = open_source(run.data, "train")
            self.source.bad = self.versions.source.bad
        self.num_classes = self.source.num_classes
        with torch.random.fork_rng(devices=[]):
            self.weights = build(run.ar, run.seed, CodeShape.of(tokenizer), self.num_classes)
        self.objective = ARObjective(self.weights, run.ar)
        self.columns = min(SHOWN, max(self.num_classes, 8))
        self.cached: cache.CodeSource | None = None

    def facts(self) -> dict[str, str]:
        known = {"class_names": json.dumps(self.source.class_names), "tokenizer": self.run.parent or ""}
        model = self.tokenizer.vfm
        return known if model is None else {**known, "vfm_fingerprint": model.fingerprint}

    # -- data -----------------------------------------------------------------------------------------------

    def prepare(self, run_dir: RunDir, fresh: bool) -> Iterator[tuple[str, int, int]]:
        """The cache: every version of every training image encoded once."""
        self.root = str(run_dir.path.parent)
        self.tokenizer.to(self.device)
        if not self.run.ar.cache:
            return
        wanted = cache.fingerprint(self.tokenizer, self.versions)
        folder = self.cache_root / wanted
        for done, of in cache.build(folder, self.tokenizer, self.versions, **self.share):
            yield "codes", done, of
        self.cached = cache.CodeSource(folder, wanted, **self.share)

    def stream(self, start_step: int, rows: slice) -> Iterator[cache.CodeBatch]:
        batch, seed, data = self.train.batch, self.run.seed, self.run.data
        if self.cached is not None:
            return cache.cached_stream(self.cached, batch, seed, start_step, rows)
        images = BatchStream(self.source, batch, seed, start_step, rows, data.flip, data.workers,
                             data.crop)
        return cache.fresh_stream(images, self.tokenizer)

    def example(self, rows: slice) -> cache.CodeBatch:
        """Random codes: as large, and there before the cache is."""
        return example(rows.stop - rows.start, self.weights.codes, self.num_classes)

    # -- looking at it --------------------------------------------------------------------------------------

    def preview(self, weights: nn.Module) -> Tensor:
        """Samples of fixed seeds and labels, decoded: N 3 H W. Drawn as the protocol says."""
        protocol = self.run.protocol
        labels = torch.arange(self.columns, device=self.device) % self.num_classes
        random = SampleRandom(self.run.seed, range(self.columns), self.device)
        drawn = sampling.sample(weights, labels, random, protocol.token_sampler, protocol.guidance)
        return self.tokenizer.decode_codes(drawn)

    def evaluate(self, weights: nn.Module, samples: int) -> dict[str, Any]:
        return evaluated.generated(self, weights, self.tokenizer).record()


def build(cfg: config.AR, seed: int, codes: CodeShape, num_classes: int) -> nn.Module:
    """The network of a run, drawn from its seed (the global generator's state changes)."""
    torch.manual_seed(derive("ar", seed))
    return TOKEN_NETWORKS.get(cfg.network.kind)(cfg.network, codes, num_classes)


def example(n: int, codes: CodeShape, num_classes: int) -> cache.CodeBatch:
    """Random codes in the form of a run's real batches, n rows."""
    drawn = torch.randint(0, codes.entries, (n, codes.tokens))
    return cache.CodeBatch(drawn, torch.arange(n) % num_classes, torch.arange(n))
