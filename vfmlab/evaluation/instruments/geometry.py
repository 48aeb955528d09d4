"""The shape of a latent space: spread over channels, effective rank, density, spatial frequencies.

Tokens are the C-dimensional vectors at the positions of the maps; "images" means their token means.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import HEADLINE, LATENT, LOWER, TOKENIZERS, Draft, Published, Quantity
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS
from vfmlab.seeding import generator

TOKENS = 4096  # for distances between tokens
K = 10


def tokens(maps: Tensor) -> Tensor:
    """Maps N C h w -> all tokens (N h w) C."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def spectrum(x: Tensor) -> Tensor:
    """Eigenvalues of the covariance of rows N C, largest first (float64).

    Raises:
        DataError: fewer than 2 rows, or all equal.
    """
    x = x.double()
    if len(x) < 2:
        raise DataError(f"a covariance needs at least 2 samples, got {len(x)}")
    x = x - x.mean(0)
    values = torch.linalg.eigvalsh(x.T @ x / len(x)).flip(0).clamp_min(0)
    if not values[0] > 0:
        raise DataError(f"features are constant over all {len(x)} samples; they have no spectrum")
    return values


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of normalised eigenvalues (Roy and Vetterli 2007), from 1 to C."""
    return float(torch.special.entr(values / values.sum()).sum().exp())


def uniformity(x: Tensor, t: float = 2.0, block: int = 1024) -> float:
    """log of the mean of exp(-t |u - v|^2) over pairs of rows N D on the unit sphere.

    0 when all rows point the same way; lower is more uniform. Wang and Isola 2020 (arXiv 2005.10242), eq. 2,
    t = 2.
    """
    n = len(x)
    if n < 2:
        raise DataError(f"uniformity needs at least 2 samples, got {n}")
    u = F.normalize(x.double(), dim=1)
    # without the pairs of a row with itself
    total = sum(float((t * (2 * (part @ u.T) - 2)).exp().sum()) for part in u.split(block)) - n
    return float(torch.tensor(max(total, 0.0) / (n * (n - 1)), dtype=torch.float64).clamp_min(1e-300).log())


def neighbour_distances(x: Tensor, k: int = K, block: int = 1024) -> Tensor:
    """Euclidean distance of each row of N D to its k-th nearest other row: N."""
    if not 1 <= k < len(x):
        raise DataError(f"k = {k} neighbours of N = {len(x)} samples: needs 1 <= k < N; lower k or use more "
                        "samples")
    x = x.float()
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])


def gini(values: Tensor) -> float:
    """Gini coefficient of non-negative values: 0 when all are equal, towards 1 when few hold everything."""
    x = values.double().sort().values
    n = len(x)
    if not x.sum() > 0:
        raise DataError("all distances are zero; samples coincide")
    return float(((2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1) * x).sum() / (n * x.sum()))


def frequencies(h: int, w: int) -> Tensor:
    """Cycles a cell of each coefficient of `torch.fft.fft2` on a grid: h w."""
    return (torch.fft.fftfreq(h)[:, None].square() + torch.fft.fftfreq(w)[None].square()).sqrt()


def low_share(maps: Tensor, cut: float = 0.25) -> float:
    """Share of the variance within images (N C h w, maps centred) up to `cut` cycles a cell."""
    h, w = maps.shape[-2:]
    power = torch.fft.fft2(maps.double()).abs().square().sum((0, 1))
    radius = frequencies(h, w).to(power.device)
    power[0, 0] = 0
    if not power.sum() > 0:
        raise DataError(f"features on a {h} x {w} grid do not vary within an image; they have no spatial "
                        "frequencies")
    return float(power[radius <= cut + 1e-9].sum() / power.sum())


@INSTRUMENTS.register("geometry")
class Geometry(Instrument):
    """Spectrum of the channels' covariance, density of tokens, uniformity, share of low frequencies.

    `effective_rank` is out of C channels (`effective_rank_share` is divided by C); `density_gini` is the Gini
    coefficient of the distances to the 10th neighbour among 4096 tokens: 0 for an even cloud, larger for
    clumps and gaps. Which end serves diffusion is the question, so only density, where the literature claims
    one (VA-VAE: uniform is better), has a good end.
    """

    quantities = (Quantity("density_gini", "density Gini", LOWER, shown=(LATENT,),
                           published=Published(0.64, TOKENIZERS + ", of its coefficient of variation")),
                  Quantity("effective_rank", "effective rank", shown=(LATENT, HEADLINE)),
                  Quantity("effective_rank_share", "effective rank / channels"),
                  Quantity("top_variance", "variance of the first component"),
                  Quantity("uniformity", "uniformity"),
                  Quantity("low_frequency_share", "low frequencies", shown=(LATENT,)),
                  Quantity("kurtosis", "kurtosis"),
                  Quantity("channel_mean", "mean of each channel", many=True),
                  Quantity("channel_std", "standard deviation of each channel", many=True),
                  Quantity("spectrum", "spectrum", many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        maps = subject.held_out.maps
        n, x = len(maps), tokens(maps)
        section = subject.section({"measure": "geometry", "tokens": TOKENS, "k": K,
                                   "low": "up to a quarter cycle a cell"})
        values = spectrum(x)
        rank = effective_rank(values)
        report.add("effective_rank", rank, section, n, channels=len(values))
        report.add("effective_rank_share", rank / len(values), section, n)
        report.add("top_variance", float(values[0] / values.sum()), section, n)
        report.add("spectrum", (values / values.sum()).tolist(), section, n)
        mean, std = x.double().mean(0), x.double().std(0, correction=0)
        report.add("channel_mean", mean.tolist(), section, n)
        report.add("channel_std", std.tolist(), section, n)
        alive = std > 1e-6 * std.max()
        fourth = ((x.double()[:, alive] - mean[alive]) / std[alive]).pow(4).mean(0)
        report.add("kurtosis", float(fourth.mean() - 3), section, n, dead_channels=int((~alive).sum()))
        report.add("uniformity", uniformity(subject.pooled()), section, subject.n)
        draw = torch.randperm(len(x), generator=generator("tokens", subject.protocol.seed))[:TOKENS]
        report.add("density_gini", gini(neighbour_distances(x[draw])), section, n)
        report.add("low_frequency_share", low_share(maps), section, n)
