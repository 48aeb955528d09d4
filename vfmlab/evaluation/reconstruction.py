"""What a tokenizer keeps of held-out images: PSNR, SSIM, LPIPS, distances in feature space, robustness to noise.

Reconstructions decode the posterior's mean and are rounded to 8 bits before anything is measured. All is streamed: what
stays in memory does not grow with the number of images beyond the rows that distances keep.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.evaluation.features import fetch
from vfmlab.evaluation.frechet import FeatureSet, frechet_distance, kernel_distance
from vfmlab.evaluation.probes import CPU_PART
from vfmlab.evaluation.protocol import Report, Resolved, Setup, as_saved, open_setup, real_features
from vfmlab.seeding import SampleRandom
from vfmlab.tokenizers.base import Tokenizer

Progress = Callable[[int, int], object]

SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # noise on the normalised latent, in its standard deviations
CURVE_IMAGES = 128  # enough for a curve of PSNR with paired noise (standard error about .3 dB)
KEPT_LATENTS = 1000  # for probes and alignment
FLOOR = 1e-10  # mean squared error on [0, 1] of a perfect image: 100 dB


@dataclass
class Measured:
    """What a pass over the images leaves: numbers, features of both sides, and the first latents with their labels."""

    report: Report
    real: FeatureSet
    own: FeatureSet
    latents: Tensor  # N C h w, normalised where the tokenizer has statistics
    labels: Tensor


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    cfg: config.Data,
    protocol: config.Protocol,
    setup: Setup | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """All reconstruction numbers of a tokenizer (EMA weights or not: the caller's choice, see protocol.ema).

    Returns:
        {metric: {"value", "protocol", "n", "spread"?}}: `psnr`, `psnr_mask` (dB, mean of images), `ssim`, `lpips`,
        `feature_distance` (1 - cosine between the features of an image and of its reconstruction in the protocol's
        space, mean of images), `rfd` (Frechet distance; with protocol.features "inception" this is rFID), `rkd`
        (kernel distance),
        `class_accuracy_own` (share of reconstructions whose class the judge still tells), `noise_psnr` (a curve: value
        and sigma are lists). spread: standard deviation over images, for `rkd` over subsets. What could not be had is
        there with value None and a reason.
    """
    return measure(tokenizer, cfg, protocol, setup, progress).report.numbers


@torch.no_grad()
def measure(
    tokenizer: Tokenizer,
    cfg: config.Data,
    protocol: config.Protocol,
    setup: Setup | None = None,
    progress: Progress | None = None,
) -> Measured:
    """One pass over the protocol's images; see :func:`evaluate_reconstruction`."""
    device = tokenizer.stat_mean.device
    setup = setup or open_setup(cfg, protocol, device=device)
    resolved, report = setup.resolved(), Report()
    pixels, own = PixelMetrics(perceptual(str(device))), FeatureSet.empty(setup.space.dimension)
    real = real_features(setup)
    theirs, apart = real.features(), []  # in the order of the images, as many as are kept
    judged, latents, labels = setup.judged, [], []
    kept = hits = done = 0
    first: list[tuple[Tensor, Tensor]] = []
    with evaluating(tokenizer):
        for batch, images in setup.images(device):
            raw, restored = through(tokenizer, images)
            pixels.update(images, restored, setup.source.masks(batch.indices))
            seen = setup.space(restored)
            own.update(seen.features)
            their = theirs[done : done + len(images)].to(seen.features)
            if len(their) < len(images):
                their = setup.space(images).features
            apart.append(1 - functional.cosine_similarity(seen.features.float(), their.float()).double().cpu())
            if judged is None:
                hits += int((setup.told(seen.logits) == batch.labels).sum())
            if kept < KEPT_LATENTS:
                latents.append(normalised(tokenizer, raw)[: KEPT_LATENTS - kept].cpu())
                labels.append(batch.labels[: KEPT_LATENTS - kept])
                if kept < CURVE_IMAGES:
                    first.append((latents[-1], images.cpu()))
                kept += len(latents[-1])
            done += len(images)
            if progress is not None:
                progress(done, resolved.n)
        pixels.report(report, resolved.of("images"))
        _curve(report, tokenizer, first, resolved.of("images"), protocol)
    far = torch.cat(apart)
    report.add("feature_distance", float(far.mean()), resolved, done, float(far.std(correction=0)))
    distances(report, "r", "", own, real, resolved, protocol.seed)
    if judged is None:
        report.add("class_accuracy_own", hits / done, resolved, done)
    else:
        report.absent("class_accuracy_own", judged)
    return Measured(report, real, own, torch.cat(latents), torch.cat(labels))


def through(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images B 3 H W -> raw latents (the posterior's mean, fp32), and what is decoded from them as a metric sees it."""
    raw, restored = [], []
    for part in images.split(CPU_PART if images.device.type == "cpu" else len(images)):
        raw.append(tokenizer.posterior(part.contiguous(memory_format=torch.channels_last)).mode().float())
        restored.append(as_saved(decode(tokenizer, raw[-1])))
    return torch.cat(raw), torch.cat(restored)


def decode(tokenizer: Tokenizer, raw: Tensor) -> Tensor:
    """Raw latents -> images in [-1, 1]; works before statistics are measured, as during training."""
    return tokenizer.decode_raw(raw)[0].float().clamp(-1, 1)


def normalised(tokenizer: Tokenizer, raw: Tensor) -> Tensor:
    """Raw latents as the rest of the project sees them; unchanged while there are no statistics."""
    return tokenizer.normalise(raw)


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside, what was before outside."""
    before = [m.training for m in modules]
    try:
        for m in modules:
            m.eval()
        yield
    finally:
        for m, mode in zip(modules, before, strict=True):
            m.train(mode)


def distances(
    report: Report, prefix: str, suffix: str, a: FeatureSet, b: FeatureSet, resolved: Resolved, seed: int
) -> None:
    """Frechet and kernel distance side by side: `<prefix>fd<suffix>`, `<prefix>kd<suffix>`."""
    n = min(a.count, b.count)
    report.add(f"{prefix}fd{suffix}", frechet_distance(a, b), resolved, n)
    if n >= 4:
        value, spread = kernel_distance(a, b, seed=seed)
        report.add(f"{prefix}kd{suffix}", value, resolved, n, spread)
    else:
        report.absent(f"{prefix}kd{suffix}", f"needs at least 4 images, got {n}")


@dataclass
class PixelMetrics:
    """Metrics that compare each reconstruction with its own image, kept as one number per image.

    lpips: the network, or the reason why there is none.
    """

    lpips: nn.Module | str
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def update(self, images: Tensor, restored: Tensor, masks: Tensor | None) -> None:
        """images, restored: B 3 H W in [-1, 1]; masks: bool B 1 H W, or None where the source knows none."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        error = ((images - restored) / 2).square()
        self._keep("psnr", decibels(error.mean((1, 2, 3))))
        if masks is None:
            self.missing["psnr_mask"] = "this data has no masks"
        else:
            masks = masks.to(error)
            covered = masks.sum((1, 2, 3))
            inside = (error.mean(1, keepdim=True) * masks).sum((1, 2, 3)) / covered.clamp_min(1)
            self._keep("psnr_mask", decibels(inside)[covered > 0])  # an image without object has no inside
        ssim = structural_similarity_index_measure(restored, images, data_range=(-1.0, 1.0), reduction="none")
        self._keep("ssim", ssim.reshape(-1))
        if isinstance(self.lpips, str):
            self.missing["lpips"] = self.lpips
        elif min(images.shape[-2:]) < 32:
            self.missing["lpips"] = f"images of {images.shape[-1]} px are too small for its backbone (32)"
        else:
            self._keep("lpips", self.lpips(restored, images).reshape(-1))

    def _keep(self, name: str, values: Tensor) -> None:
        self.values.setdefault(name, []).append(values.double().cpu())

    def report(self, report: Report, resolved: Resolved) -> None:
        for name, parts in self.values.items():
            x = torch.cat(parts)
            if len(x):
                report.add(name, float(x.mean()), resolved, len(x), float(x.std(correction=0)))
            else:
                report.absent(name, "no image has anything to measure it on")
        for name, reason in self.missing.items():
            report.absent(name, reason)


def decibels(mse: Tensor) -> Tensor:
    """PSNR of mean squared errors on [0, 1]; equal images count as 100 dB, so that means stay finite."""
    return -10 * mse.clamp_min(FLOOR).log10()


@functools.cache
def perceptual(device: str = "cpu") -> nn.Module | str:
    """LPIPS (arXiv 1801.03924; AlexNet, its authors' choice for measuring) by torchmetrics, or why there is none."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import AlexNet_Weights

    try:
        fetch(AlexNet_Weights.DEFAULT.url, "LPIPS")
        return LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
    except ConfigError as error:
        return str(error)


def _curve(
    report: Report,
    tokenizer: Tokenizer,
    kept: list[tuple[Tensor, Tensor]],
    resolved: Resolved,
    protocol: config.Protocol,
) -> None:
    """PSNR of decoding z + sigma * noise, the same noise for every sigma: what errors of a diffusion model cost."""
    if int(tokenizer.stat_count) == 0:
        report.absent("noise_psnr", "the tokenizer has no latent statistics yet")
        return
    device, done, values = tokenizer.stat_mean.device, 0, {sigma: [] for sigma in SIGMAS}
    for z, images in kept:
        z, images = z[: CURVE_IMAGES - done].to(device), images[: CURVE_IMAGES - done].to(device)
        noise = SampleRandom(protocol.seed, range(done, done + len(z)), device).randn(*z.shape[1:])
        for sigma in SIGMAS:
            restored = as_saved(tokenizer.decode(z + sigma * noise))
            values[sigma].append(decibels(((images - restored) / 2).square().mean((1, 2, 3))).double().cpu())
        done += len(z)
    curve = [float(torch.cat(v).mean()) for v in values.values()]
    report.add("noise_psnr", curve, resolved, done, sigma=list(SIGMAS))
