"""Two variants of one computation timed against each other, and the list of benchmarks that do so."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch

Result = dict[str, Any]
BENCHMARKS: dict[str, Callable[[int], Result]] = {}
NEEDS_CUDA: set[str] = set()


def benchmark(name: str, cuda: bool = False) -> Callable[[Callable[[int], Result]], Callable[[int], Result]]:
    """File a benchmark under `name`. cuda: it is left out on machines without a GPU."""

    def keep(function: Callable[[int], Result]) -> Callable[[int], Result]:
        BENCHMARKS[name] = function
        NEEDS_CUDA.update({name} if cuda else ())
        return function

    return keep


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, the GPU's queue emptied before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def compare(ours: Callable[[], Any], other: Callable[[], Any], repeats: int, warm: int = 1) -> Result:
    """Seconds of `other` over seconds of `ours`: median and middle half of the ratios of interleaved pairs."""
    for function in (ours, other) * warm:
        function()
    mine, theirs = [], []
    for k in range(repeats):
        if k % 2:
            theirs.append(timed(other))
            mine.append(timed(ours))
        else:
            mine.append(timed(ours))
            theirs.append(timed(other))
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return {
        "ratio": median(ratios),
        "spread": [low, high],
        "ours_seconds": median(mine),
        "other_seconds": median(theirs),
        "repeats": repeats,
    }
