"""Learning rate as a pure function of samples seen, and an estimate of the time left."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from vfmlab.config import Train


def rate(train: Train, samples: int) -> float:
    """Factor on the learning rate for the step that starts after `samples` images, in [0, 1].

    Linear warm-up over `train.warmup` images (the first step is not zero), then constant, cosine to 0 or
    linear to 0.
    """
    if samples < train.warmup:
        return min(1.0, (samples + train.batch) / train.warmup)
    if train.schedule == "constant":
        return 1.0
    progress = min(1.0, (samples - train.warmup) / max(1, train.samples - train.warmup))
    return 0.5 * (1 + math.cos(math.pi * progress)) if train.schedule == "cosine" else 1 - progress


class Clock:
    """Seconds left, from the median step (a slow first step or a busy moment does not count) and the median
    extra.

    Extras are what happens between steps: previews, evaluations, checkpoints.
    """

    def __init__(self):
        self.steps: deque[float] = deque(maxlen=64)
        self.extras: dict[str, list[float]] = {}

    def step(self, seconds: float) -> None:
        self.steps.append(seconds)

    def extra(self, kind: str, seconds: float) -> None:
        self.extras.setdefault(kind, []).append(seconds)

    @property
    def median(self) -> float:
        """Seconds of the median step; 0 before the first."""
        return median(self.steps) if self.steps else 0.0

    def left(self, steps: int, extras: dict[str, int]) -> float | None:
        """Seconds for `steps` more steps and so many more of each extra; None before the second step."""
        if len(self.steps) < 2:
            return None
        known = ((n, self.extras[kind]) for kind, n in extras.items() if self.extras.get(kind))
        return steps * self.median + sum(n * median(seconds) for n, seconds in known)
