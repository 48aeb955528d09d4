"""Benchmarks of evaluation: distances and alignments against their textbook formulations."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vfmlab.evaluation import frechet
from vfmlab.evaluation.representation import cknna
from vfmlab.seeding import generator
from vfmlab.timing import Result, benchmark, compare, timed

PROCESS = "/proc/self/status"


@benchmark("frechet")
def frechet_distance(repeats: int) -> Result:
    """Frechet distance at 2048 dimensions: eigenvalues of a symmetric product against scipy's matrix square root."""
    import numpy as np
    from scipy.linalg import sqrtm

    dimension, count = 2048, 4096
    draw = generator("bench", "frechet")
    mix = torch.randn(dimension, dimension, generator=draw, dtype=torch.float64) / dimension**0.5
    sides = []
    for shift in (0.0, 0.05):
        moments = frechet.Moments(dimension)
        for _ in range(count // 1024):
            moments.update(torch.randn(1024, dimension, generator=draw, dtype=torch.float64) @ mix + shift)
        sides.append(moments)
    means, covariances = [m.mean.numpy() for m in sides], [m.covariance.numpy() for m in sides]

    def classic() -> float:
        root = np.trace(sqrtm(covariances[0] @ covariances[1])).real
        apart = means[0] - means[1]
        return float(apart @ apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root)

    ours, theirs = frechet.frechet_distance(*sides), classic()
    # scipy takes many seconds a call and the calls above were the warm-up.
    found = compare(lambda: frechet.frechet_distance(*sides), classic, min(repeats, 3), warm=0)
    difference = abs(ours - theirs) / abs(theirs)
    what = f"scipy sqrtm / eigenvalues, {dimension} dimensions"
    return {"what": what, **found, "goal": "5x, difference below 1e-6", "detail": {"relative difference": difference}}


def dense_cknna(a: Tensor, b: Tensor, k: int = 10, product: bool = True) -> Tensor:
    """CKNNA as its definition reads, with N x N kernels and masks; features of unit length. Unbiased HSIC.

    product: the last term from a product of two N x N matrices, as in the formula, or, with less work, from sums of them.
    """
    n = len(a)

    def nearest(kernel: Tensor) -> Tensor:
        best = kernel.clone().fill_diagonal_(-math.inf).topk(k, dim=1).indices
        return torch.zeros_like(kernel).scatter_(1, best, 1.0)

    def hsic(one: Tensor, other: Tensor) -> Tensor:
        chained = (one @ other).sum() if product else one.sum(0) @ other.sum(1)
        ends = one.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * chained / (n - 2)
        return ((one * other.T).sum() + ends) / (n * (n - 3))

    kernels = [x @ x.T for x in (a, b)]
    masks = [nearest(kernel) for kernel in kernels]

    def similarity(i: int, j: int) -> Tensor:
        mask = (masks[i] * masks[j]).fill_diagonal_(0)
        return hsic(mask * kernels[i], mask * kernels[j])

    return similarity(0, 1) / (similarity(0, 0) * similarity(1, 1)).sqrt()


def related(n: int, width: int) -> tuple[Tensor, Tensor]:
    """Two representations n x width of unit length that share a part."""
    draw = generator("bench", "cknna")
    shared = torch.randn(n, width, generator=draw)
    sides = (shared + torch.randn(n, width, generator=draw) for _ in range(2))
    first, second = (torch.nn.functional.normalize(x, dim=1) for x in sides)
    return first, second


@benchmark("cknna")
def cknna_sparse(repeats: int, n: int = 10_000, width: int = 768) -> Result:
    """CKNNA on the k neighbours alone against N x N kernels and masks; the peak memory of a process that does only ours.

    The formula's product of N x N matrices takes minutes on one core, so it is timed once; the ratio with a spread is to sums in its place.
    """
    a, b = related(n, width)
    ours, theirs = cknna(a, b), float(dense_cknna(a, b, product=False))
    found = compare(partial(cknna, a, b), partial(dense_cknna, a, b, product=False), min(repeats, 5), warm=0)
    detail = {"relative difference": abs(ours - theirs) / abs(theirs)}
    detail["ratio to the formula as it stands"] = round(timed(partial(dense_cknna, a, b)) / timed(partial(cknna, a, b)), 1)
    if Path(PROCESS).exists():  # Linux; getrusage would tell the peak of whoever started the process
        code = f"from vfmlab import bench_evaluation as bench; bench.cknna(*bench.related({n}, {width})); print(open('{PROCESS}').read())"
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        detail["peak memory (GB)"] = round(int(told.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9, 2)
    what = f"N x N matrices / neighbours only, N = {n:,}, width {width}"
    return {"what": what, **found, "goal": "5x to the formula, under 2 GB in all", "detail": detail}
