"""Training a tokenizer: images -> (VFM features) -> latent -> images, a weighted sum of losses, latent statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vfmlab import config, vfm
from vfmlab.data import BatchStream, ImageSource, open_source, to_float
from vfmlab.errors import ConfigError
from vfmlab.losses.adaptive import adaptive_weight
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.nn import transforms
from vfmlab.registry import LOSSES, TOKENIZERS
from vfmlab.runs import RunDir, beside
from vfmlab.seeding import StepRandom, derive, generator
from vfmlab.tokenizers import linear_start
from vfmlab.tokenizers.base import Statistics, Tokenizer, measure
from vfmlab.training.task import Task

SHOWN = 8  # images of a preview
STATISTICS_IMAGES = 4096  # standard error of a mean: 1/64 std even if all places of an image were alike
START_IMAGES = 2048
LATENT_TERMS = ("kl", "codebook")  # terms on the latent alone: no part of the reconstruction that others are weighed by
UNFED = {"adversarial", "feature_matching", "preservation"}  # terms that read more than one batch's reconstruction


class TokenizerObjective(nn.Module):
    """The training forward of a tokenizer.

    Args:
        tokenizer: what is trained; its frozen VFM stays outside of parameters. losses: name -> term, weight 0 left out.
    """

    def __init__(self, tokenizer: Tokenizer, losses: dict[str, nn.Module], equivariance: config.Equivariance):
        super().__init__()
        self.tokenizer, self.losses, self.equivariance = tokenizer, nn.ModuleDict(losses), equivariance
        needed = [*tokenizer.layers, *(layer for loss in losses.values() for layer in loss.layers)]
        self.layers = tuple(dict.fromkeys(needed))
        if self.layers and tokenizer.vfm is None:
            raise ConfigError(f"VFM layers {list(self.layers)} are read but the run has no 'vfm' section; add vfm.name")

    def plan(self, rng: StepRandom) -> transforms.Choice:
        """Which equivariance path this step takes; the first thing drawn from `rng`."""
        return transforms.plan(
            self.equivariance, rng, self.tokenizer.latent_shape[-1], self.tokenizer.config.factor
        )

    def forward(self, batch: Any, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one batch.

        Returns:
            the weighted sum, and each term without its weight, `weight_<term>` where the weight is adaptive, and the
            `psnr` (dB, mean over images) of what was decoded against its target.
        """
        choice = self.plan(rng)
        images = to_float(batch.images).contiguous(memory_format=torch.channels_last)
        seen = transforms.input_images(images, choice)
        features: dict[int, Tensor] = {}
        if self.layers:
            with torch.no_grad():
                features = self.tokenizer.vfm.features(seen, self.layers).maps
        posterior = self.tokenizer.posterior(seen, features or None)
        logvar = None if posterior.logvar is None else posterior.logvar.float()
        posterior = dataclasses.replace(posterior, mean=posterior.mean.float(), logvar=logvar)
        z = posterior.sample(noise=rng.randn(*posterior.mean.shape[1:]))
        decoded = self.tokenizer.decode_raw(transforms.latent(z, choice))
        target = transforms.target_images(images, choice)
        made = Reconstruction(target, [image.float() for image in decoded], posterior, z, features)
        loss, metrics = self.weigh(made, samples)
        with torch.no_grad():
            mse = (made.images[0].clamp(-1, 1) - target).square().flatten(1).mean(1) / 4
            metrics["psnr"] = (-10 * mse.clamp_min(1e-10).log10()).mean()
        return loss, metrics

    def weigh(self, made: Reconstruction, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the terms times their weights; adaptive ones are weighed against the reconstruction terms."""
        terms = {
            name: loss(made)
            for name, loss in self.losses.items()
            if loss.config.until is None or samples < loss.config.until
        }
        metrics = {name: term.detach() for name, term in terms.items()}
        fixed = {name: term * self.losses[name].config.weight for name, term in terms.items() if not self.adapts(name)}
        total = sum(fixed.values())
        pixels = [term for name, term in fixed.items() if name not in LATENT_TERMS]
        for name, term in terms.items():
            if self.adapts(name):
                if not pixels:
                    raise ConfigError(f"losses.{name} is adaptive, but no reconstruction loss weighs it; add losses.l1")
                with torch.autocast(term.device.type, enabled=False):
                    weight = adaptive_weight(sum(pixels), term, self.tokenizer.last_encoder_layer())
                total = total + self.losses[name].config.weight * weight * term
                metrics[f"weight_{name}"] = weight
        return total, metrics

    def adapts(self, name: str) -> bool:
        return bool(self.losses[name].adaptive)


class TokenizerTask(Task):
    """A run with a `tokenizer` section, as the training loop wants it.

    Args:
        run: whose `tokenizer`, `vfm`, `losses`, `equivariance`, `data` and `train` sections are used.

    Raises:
        ConfigError: no losses, a loss that needs what the run has not, sizes that do not fit.
    """

    name = "tokenizer"
    columns = SHOWN

    def __init__(self, run: config.Run):
        self.run, self.train, self.trains = run, run.train, run.trains
        size, losses = run.data.size, {name: term for name, term in run.losses.items() if term.weight > 0}
        if not losses:
            raise ConfigError("losses is empty: a tokenizer learns nothing; set for example losses.l1=1.0")
        if unfed := sorted(UNFED & losses.keys()):
            raise ConfigError(
                f"losses.{unfed[0]} needs a discriminator or a stage before this one, which tokenizer training does "
                "not provide; remove it"
            )
        self.source: ImageSource = open_source(run.data, "train")
        self.held_out: ImageSource = open_source(run.data, "val")
        model = vfm.build(run.vfm, size) if run.vfm is not None else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("tokenizer", run.seed))
            tokenizer: Tokenizer = TOKENIZERS.get(run.tokenizer.method)(run.tokenizer, size, model)
            channels, side, _ = tokenizer.latent_shape
            context = LossContext(size, channels, side, model)
            built = {name: LOSSES.get(name)(term, context) for name, term in losses.items()}
        self.weights: Tokenizer = tokenizer
        self.objective = TokenizerObjective(tokenizer, built, run.equivariance).to(memory_format=torch.channels_last)
        own = any(True for loss in built.values() for _ in loss.parameters())
        self.find_unused = own and any(term.until is not None for term in losses.values())
        self.root: str = "runs"
        self._setup: Any = None

    @property
    def device(self) -> torch.device:
        return self.weights.stat_mean.device

    @property
    def compiled(self) -> list[nn.Module]:
        return [module for module in self.weights.children() if any(True for _ in module.parameters())]

    def facts(self) -> dict[str, str]:
        model = self.weights.vfm
        found = {"fingerprint": self.source.fingerprint}
        return found if model is None else {**found, "vfm_fingerprint": model.fingerprint}

    def prepare(self, run_dir: RunDir, fresh: bool) -> Iterator[tuple[str, int, int]]:
        """The linear start, for tokenizers that have one: closed form, on a seeded part of the training images."""
        self.root = str(run_dir.path.parent)
        if fresh and getattr(self.weights, "start", None) is not None:
            yield "linear start", 0, 1
            linear_start.fit(self.weights, list(self.some_images("start", START_IMAGES)))
            yield "linear start", 1, 1

    def stream(self, start_step: int, rows: slice) -> BatchStream:
        data = self.run.data
        return BatchStream(self.source, self.train.batch, self.run.seed, start_step, rows, data.flip, data.workers)

    def costly_steps(self, n: int) -> list[int]:
        """Steps that decode at full size: equivariance makes others cheaper."""
        side = self.run.data.size
        random = (StepRandom(self.run.seed, step, 1) for step in range(200))
        full = [step for step, rng in enumerate(random) if self.objective.plan(rng).image_side >= side]
        return full[:n] or super().costly_steps(n)

    def some_images(self, what: str, most: int, batch: int = 128) -> Iterator[Tensor]:
        """Batches of a fixed, seeded subset of the training images, [-1, 1], on the tokenizer's device."""
        order = torch.randperm(len(self.source), generator=generator(what, self.run.seed))[:most]
        for part in order.split(batch):
            yield to_float(self.source.batch(part).images).to(self.device)

    def preview(self, weights: Tokenizer) -> Tensor:
        """The first held-out images (first row) and what is decoded from their posterior's mean: 2N 3 H W."""
        images = to_float(self.held_out.batch(torch.arange(min(SHOWN, len(self.held_out)))).images).to(self.device)
        return torch.cat([images, weights.decode_raw(weights.posterior(images).mode().float())[0].float()])

    def evaluate(self, weights: Tokenizer, samples: int) -> dict[str, Any]:
        from vfmlab.evaluation.protocol import open_setup
        from vfmlab.evaluation.reconstruction import evaluate_reconstruction

        self._setup = self._setup or open_setup(self.run.data, self.run.protocol, self.root, self.device)
        return evaluate_reconstruction(weights, self.run.data, self.run.protocol, self._setup)

    def finish(self, weights: Tokenizer, run_dir: RunDir) -> None:
        """Latent statistics, of the averaged and of the raw weights, each on the same training images."""
        found: Statistics | None = None
        for tokenizer in (self.weights, weights):
            images = self.some_images("statistics", STATISTICS_IMAGES)
            found = measure(tokenizer, images, self.source.fingerprint)
            tokenizer.set_statistics(found)
        facts = {"count": str(found.count), "fingerprint": found.fingerprint}
        with beside(run_dir.latent_stats) as temporary:
            save_file({"mean": found.mean, "std": found.std}, temporary, facts)
