"""Training a tokenizer: images -> (VFM features) -> latent -> images, a weighted sum of losses, latent
statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vfmlab import config, vfm
from vfmlab.data import BatchStream, ImageSource, open_source, some_images, to_float
from vfmlab.diffusion import targets
from vfmlab.errors import ConfigError
from vfmlab.nn import parts
from vfmlab.nn.quantizers.base import counting
from vfmlab.registry import TOKENIZERS
from vfmlab.runs import RunDir, beside
from vfmlab.seeding import StepRandom, derive
from vfmlab.tokenizers.base import Statistics, Tokenizer, measure
from vfmlab.training import checkpoint, evaluated, features
from vfmlab.training.objective import TokenizerObjective
from vfmlab.training.task import Task

SHOWN = 8  # images of a preview
STATISTICS_IMAGES = 4096  # standard error of a mean: 1/64 std even if all places of an image were alike
START_IMAGES = 2048
COLLAPSED = 0.02  # of the entries of every codebook


class TokenizerTask(Task):
    """A run with a `tokenizer` section, as the training loop wants it.

    Args:
        run: the phase to train.
        parent, parent_dir: the tokenizer and the directory of the stage before (or of imported weights), for
            runs that have one: weights begin as the parent's average, and what losses and discriminators
            learned goes on.

    Raises:
        ConfigError: no losses, a loss that needs what the run has not, sizes that do not fit.
    """

    name = "tokenizer"
    find_unused = True  # terms end, and images of a decoder or codes may have no term that reads them
    completes = True
    columns = SHOWN

    def __init__(self, run: config.Phase, parent: Tokenizer | None = None, parent_dir: RunDir | None = None):
        self.run, self.train, self.trains = run, run.train, run.trains
        if (run.parent is None) != (parent is None):
            raise ConfigError(f"run '{run.id}' starts from {run.parent or 'no other run'}; train it through "
                              "vfmlab.train")
        self.source: ImageSource = open_source(run.data, "train").at_least(run.data.least_side)
        self.held_out: ImageSource = open_source(run.data, "val")
        model = vfm.build(run.vfm, run.data.size) if run.vfm is not None else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("tokenizer", self.seed))
            tokenizer: Tokenizer = TOKENIZERS.get(run.tokenizer.method)(run.tokenizer, run.data.size, model)
            parts.replace(tokenizer, run.recipe.parts, "tokenizer", run.seed)
            self.objective = TokenizerObjective(tokenizer, run.losses, run.equivariance, parent,
                                                run.recipe.parts)
        if parent is not None:
            tokenizer.load_state_dict(parent.state_dict())
        self.weights: Tokenizer = tokenizer
        self.inner = "adaptive weights" * any(loss.adaptive for loss in self.objective.losses.values())
        self.discriminators = self.objective.discriminators
        if parent_dir is not None:
            self.started = inherit(parent_dir,
                                   {"others": self.objective, "discriminators": self.discriminators})
        self.fresh_start = parent is None
        self.cached: targets.Targets | None = None

    @property
    def seed(self) -> int:
        """Each stage sees its own order of images and its own noise."""
        number = self.run.recipe.stage
        return derive("stage", self.run.seed, number) if number else self.run.seed

    @property
    def compiled(self) -> list[nn.Module]:
        return [module for module in self.weights.children() if any(True for _ in module.parameters())]

    def facts(self) -> dict[str, str]:
        model = self.weights.vfm
        known = {"fingerprint": self.source.fingerprint}
        return known if model is None else {**known, "vfm_fingerprint": model.fingerprint}

    def prepare(self, run_dir: RunDir, fresh: bool) -> Iterator[tuple[str, int, int]]:
        """What a method solves or measures before its first stage, on a seeded part of the training
        images."""
        self.root = str(run_dir.path.parent)
        yield from self._prepare_features()
        if fresh and self.fresh_start:
            yield "closed-form start", 0, 1
            images = some_images(self.source, START_IMAGES, "start", self.run.seed, device=self.device)
            self.say(self.weights.begin(list(images)))
            yield "closed-form start", 1, 1

    def _prepare_features(self) -> Iterator[tuple[str, int, int]]:
        """The frozen VFM's maps of all training images, where they fit in what the run allows."""
        most, layers, flip = self.train.vfm_cache, self.objective.layers, self.run.data.flip
        if most is None or not layers:
            return
        if self.run.data.crop is not None:
            self.say("the VFM is asked at every step: features of random crops (data.crop) cannot be kept")
            return
        reader = features.Reader(self.weights.vfm, layers)
        needed = reader.size(len(self.source), flip)
        if needed > most:
            self.say(f"the VFM is asked at every step: its features take {needed:.2g} GB, "
                      f"train.vfm_cache allows {most:g}")
            return
        folder = Path(self.root) / ".latents" / f"features-{reader.fingerprint(self.source, flip)}"
        for done, of in targets.build(folder, reader, self.source, flip, **self.share):
            yield "VFM features", done, of
        self.cached = targets.Targets(folder, **self.share)

    def stream(self, start_step: int, rows: slice) -> Iterator[Any]:
        data, batch = self.run.data, self.train.batch
        images = BatchStream(self.source, batch, self.seed, start_step, rows, data.flip, data.workers,
                             data.crop)
        if self.cached is None:
            return images
        return features.beside(images, self.cached, batch, self.seed, start_step, rows)

    def costly_steps(self, n: int) -> list[int]:
        """Steps that decode at full size: equivariance makes others cheaper."""
        side = self.run.data.size
        random = (StepRandom(self.seed, step, 1) for step in range(200))
        full = [step for step, rng in enumerate(random) if self.objective.plan(rng).image_side >= side]
        return full[:n] or super().costly_steps(n)

    def preview(self, weights: Tokenizer) -> Tensor:
        """The first held-out images (first row) and what is decoded from their posterior's mean: 2N 3 H W."""
        first = torch.arange(min(SHOWN, len(self.held_out)))
        images = to_float(self.held_out.batch(first).images).to(self.device)
        from vfmlab.evaluation.roundtrip import seeds

        z, noise = weights.posterior(images).mode().float(), seeds(weights, self.run.protocol.seed, first)
        return torch.cat([images, weights.decode_raw(z, **noise)[0].float()])

    def evaluate(self, weights: Tokenizer, samples: int) -> dict[str, Any]:
        from vfmlab.evaluation.reconstruction import evaluate_reconstruction

        with _on_its_sphere(weights, self.source, self.seed):
            return evaluate_reconstruction(weights, self.run.data, self.run.protocol, evaluated.setup(self),
                                           evaluated.alive(self)).record()

    def remark(self) -> str:
        """Whether the quantiser collapsed, for discrete tokenizers."""
        shares = {book: book.effective() for book in counting(self.weights)}
        # of a small codebook one entry is more than that share
        if not shares or any(share >= max(COLLAPSED, 1.01 / book.size) for book, share in shares.items()):
            return ""
        most = 100 * max(shares.values())
        return (f"the quantiser collapsed: its codebooks use {most:.2g} % of their entries; try "
                "losses.codebook.entropy above 0, fewer entries, more codebooks, or a quantiser that moves "
                "all entries, such as simvq or fsq")

    def finish(self, weights: Tokenizer, run_dir: RunDir) -> None:
        """Latent statistics, of the averaged and of the raw weights, each on the same training images."""
        write_statistics(run_dir, [self.weights, weights], self.source, self.run.seed)


def _measured(tokenizer: Tokenizer, source: ImageSource, seed: int) -> Statistics:
    """The tokenizer's latent statistics on a seeded part of the images; it has them from then on."""
    images = some_images(source, STATISTICS_IMAGES, "statistics", seed, device=tokenizer.stat_mean.device)
    statistics = measure(tokenizer, images, source.fingerprint)
    tokenizer.set_statistics(statistics)
    return statistics


@contextmanager
def _on_its_sphere(tokenizer: Tokenizer, source: ImageSource, seed: int) -> Iterator[None]:
    """Inside, a tokenizer whose latents lie on a sphere has the statistics that decoding them needs; those of
    its run are measured at the end."""
    if tokenizer.config.radius is None:
        yield
        return
    before = {name: value.clone() for name, value in tokenizer.named_buffers() if name.startswith("stat_")}
    _measured(tokenizer, source, seed)
    try:
        yield
    finally:
        for name, value in before.items():
            getattr(tokenizer, name).copy_(value)


def write_statistics(run_dir: RunDir, tokenizers: list[Tokenizer], source: ImageSource, seed: int) -> None:
    """Measure latent statistics of each tokenizer, and write the last one's to the run."""
    for tokenizer in tokenizers:
        statistics = _measured(tokenizer, source, seed)
    facts = {"count": str(statistics.count), "fingerprint": statistics.fingerprint}
    with beside(run_dir.latent_stats) as temporary:
        save_file({"mean": statistics.mean, "std": statistics.std}, temporary, facts)


@torch.no_grad()
def inherit(parent: RunDir, modules: dict[str, nn.Module | None]) -> dict[str, str]:
    """Copy what the training state of `parent` holds for these modules, tensor by tensor, where name and
    shape agree.

    Terms and discriminators that the parent did not have begin anew; imported parents have no training state
    at all.

    Returns:
        facts for the event of the start: a note where a trained parent's state is gone, and with it what
        losses had learned.
    """
    state = checkpoint.load_state(parent)
    for name, module in modules.items():
        saved = {} if state is None or module is None else state.get(name) or {}
        own = {} if module is None else module.state_dict()
        for key, value in saved.items():
            if key in own and own[key].shape == value.shape:
                own[key].copy_(value)
    learn = [key for module in modules.values() if module is not None for key, _ in module.named_parameters()
             if key.startswith(("losses.", "objectives."))]
    gone = state is None and parent.config().imported is None and learn
    return {"note": f"losses and discriminators begin anew: '{parent.id}' has no checkpoints/state.pt, which "
                    "holds what they had learned"} if gone else {}
