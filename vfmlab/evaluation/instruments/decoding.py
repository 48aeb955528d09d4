"""Decoding of other latents: errors by frequency, paths between images, noisy latents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument, Metric, Part, Pass
from vfmlab.evaluation.instruments.geometry import frequencies
from vfmlab.evaluation.lines import between, path_shape
from vfmlab.evaluation.number import HIGHER, LATENT, LOWER, Draft, Quantity
from vfmlab.evaluation.pixels import psnr
from vfmlab.evaluation.roundtrip import as_saved
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS
from vfmlab.seeding import SampleRandom, derive, generator

SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # noise on the normalised latent, in its standard deviations
CURVE_IMAGES = 128  # enough for a curve of PSNR with paired noise (standard error about .3 dB)
CUT = 1 / 8  # cycles a pixel: a quarter of the highest frequency
PAIRS, STEPS = 32, 8


def bands(images: Tensor, cut: float = CUT) -> tuple[Tensor, Tensor]:
    """Mean square of images B C H W in frequencies up to `cut` cycles a pixel and above: B each.

    The two add up to the mean square of the image (Parseval).
    """
    h, w = images.shape[-2:]
    power = torch.fft.fft2(images.double()).abs().square().mean(1) / (h * w) ** 2
    low = frequencies(h, w).to(images.device) <= cut + 1e-9
    return power[:, low].sum(1), power[:, ~low].sum(1)


@INSTRUMENTS.register("frequency")
class Frequency(Instrument):
    """Reconstruction error in low and high spatial frequencies.

    `mse_low` and `mse_high` (on [0, 1]) add up to the mean squared error; `lost_low` and `lost_high` are
    shares of the images' own power there, the mean colour left out.
    """

    kinds = ("tokenizer",)
    quantities = (Quantity("mse_low", "error, low frequencies", LOWER),
                  Quantity("mse_high", "error, high frequencies", LOWER),
                  Quantity("lost_low", "lost share, low frequencies", LOWER),
                  Quantity("lost_high", "lost share, high frequencies", LOWER),
                  Quantity("error_high_share", "share of the error in high frequencies"))

    def measure(self, subject: Subject, report: Draft) -> None:
        maps = subject.held_out
        n = min(len(maps), 512)
        images = maps.images(n)
        error = bands((as_saved(subject.decode(maps.maps[:n])) - images) / 2)
        own = bands((images - images.mean((2, 3), keepdim=True)) / 2)
        section = subject.section({"measure": "error by frequency", "cut": CUT, "images": n})
        for name, lost, there in zip(("low", "high"), error, own, strict=True):
            report.add(f"mse_{name}", float(lost.mean()), section, n)
            if there.mean() > 0:
                report.add(f"lost_{name}", float(lost.mean() / there.mean()), section, n)
            else:
                report.absent(f"lost_{name}", f"the images hold no {name} frequencies")
        total = float(error[0].mean() + error[1].mean())
        if total > 0:
            report.add("error_high_share", float(error[1].mean()) / total, section, n)
        else:
            report.absent("error_high_share", "the reconstructions have no error")


def pairs(n: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` seeded pairs of different numbers below n."""
    if n < 2:
        raise DataError(f"an interpolation needs 2 images, got {n}")
    draw = generator("pairs", seed)
    first = torch.randint(n, (count,), generator=draw)
    return first, (first + torch.randint(1, n, (count,), generator=draw)) % n


@INSTRUMENTS.register("interpolation")
class Interpolation(Instrument):
    """Straight lines between two images' latents, decoded: length and roughness of their path."""

    kinds = ("tokenizer",)
    quantities = (Quantity("path_length", "path length", LOWER, shown=(LATENT,)),
                  Quantity("path_roughness", "path roughness", LOWER),
                  Quantity("path_steps", "steps along the path", many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        z = subject.held_out.maps
        a, b = pairs(len(z), PAIRS, subject.protocol.seed)
        lines = between(z[a], z[b], STEPS)
        frames = subject.decode(lines.flatten(0, 1)).unflatten(0, lines.shape[:2])
        length, rough = path_shape(frames)
        section = subject.section({"measure": "decoded straight lines", "pairs": PAIRS, "steps": STEPS})
        for name, values in (("path_length", length), ("path_roughness", rough)):
            report.mean(name, values, section)
        x = frames.double().flatten(2)
        steps = (x[:, 1:] - x[:, :-1]).norm(dim=2)
        report.add("path_steps", (steps / steps.sum(1, keepdim=True)).mean(0).tolist(), section, PAIRS)


@INSTRUMENTS.register("robustness")
class Robustness(Instrument):
    """PSNR and feature distance (1 - cosine in the reference's features) of decoding z + sigma noise.

    The same noise for every sigma. `noise_psnr_loss`: dB lost at sigma 0.5 against no noise.
    """

    kinds = ("tokenizer",)
    quantities = (Quantity("noise_psnr_loss", "lost to noise", LOWER, "dB", (LATENT,)),
                  Quantity("noise_feature_distance", "feature distance under noise", LOWER),
                  Quantity("robust_psnr", "PSNR under noise", HIGHER, "dB", many=True),
                  Quantity("robust_feature_distance", "feature distance under noise", LOWER, many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        maps = subject.held_out
        n = min(len(maps), CURVE_IMAGES)
        z, images = maps.maps[:n], maps.images(n)
        random = SampleRandom(derive("robustness", subject.protocol.seed), maps.indices[:n].tolist())
        noise = random.randn(*z.shape[1:])
        theirs = subject.reference(images.to(subject.device))
        values, apart = [], []
        for sigma in SIGMAS:
            restored = as_saved(subject.decode(z + sigma * noise))
            values.append(float(psnr(images, restored).mean()))
            seen = subject.reference(restored.to(subject.device))
            apart.append(float(1 - F.cosine_similarity(seen.double(), theirs.double()).mean()))
        section, at = subject.section({"measure": "decoding of noisy latents", "images": n},
                                      reference=True), SIGMAS.index(0.5)
        report.add("robust_psnr", values, section, n, sigma=list(SIGMAS))
        report.add("robust_feature_distance", apart, section, n, sigma=list(SIGMAS))
        report.add("noise_psnr_loss", values[0] - values[at], section, n)
        report.add("noise_feature_distance", apart[at], section, n)


@INSTRUMENTS.register("noise_psnr")
class NoisePsnr(Metric):
    """PSNR of decoding z + sigma noise, same noise for every sigma: the cost of diffusion's errors."""

    order = 12
    quantities = (Quantity("noise_psnr", "PSNR under noise", HIGHER, "dB", many=True),)

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.n = 0

    def update(self, part: Part) -> None:
        if (room := CURVE_IMAGES - self.n) > 0:
            self.pairs.append((part.latents[:room], part.images[:room].cpu()))
            self.n += len(self.pairs[-1][0])

    def write(self, draft: Draft) -> None:
        tokenizer, seed = self.gathered.tokenizer, self.gathered.setup.protocol.seed
        if int(tokenizer.stat_count) == 0:
            raise DataError("the tokenizer has no latent statistics yet")
        device, done, values = tokenizer.stat_mean.device, 0, {sigma: [] for sigma in SIGMAS}
        for z, images in self.pairs:
            z, images = z.to(device), images.to(device)
            noise = SampleRandom(seed, range(done, done + len(z)), device).randn(*z.shape[1:])
            for sigma in SIGMAS:
                values[sigma].append(psnr(images,
                                          as_saved(tokenizer.decode(z + sigma * noise))).double().cpu())
            done += len(z)
        curve = [float(torch.cat(parts).mean()) for parts in values.values()]
        draft.add("noise_psnr", curve, self.gathered.resolved.of("images"), done, sigma=list(SIGMAS))
