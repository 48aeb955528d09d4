"""Classifier-free guidance (arXiv 2207.12598) limited to an interval of time (arXiv 2404.07724) and to
channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vfmlab.config import Guidance
from vfmlab.errors import ConfigError

EDGE = 1e-6  # times on the interval's edge count as inside in spite of rounding


class Guided:
    """The velocity field that is integrated: v(x, t) for fixed labels.

        v = v_null + scale * (v_cond - v_null)   where low <= t <= high (both ends included; t = 0 data, t = 1
        noise)
        v = v_cond                               elsewhere

    An interval (0, 0.9) therefore leaves the noisiest tenth of the way unguided, (0.1, 1) the last steps.
    With `channels`, only the first so many are guided and the rest is v_cond: the releases' behaviour, kept
    for parity. Where no guidance acts (scale 1, outside the interval, only null labels) the network runs
    once; elsewhere condition and null run as one batch of twice the size.

    Args:
        network: called `(x, t B, y B) -> v`, x and v: B C h w, or B D flat states (see
        `vfmlab.diffusion.joint`).
        labels: B, `null` among them means unconditional. null: the null label.
        scales: [D] scale of each value of flat states, in place of `guidance.scale` and `guidance.channels`.
    """

    def __init__(
        self, network: Callable[..., Tensor], labels: Tensor, guidance: Guidance, null: int,
        scales: Tensor | None = None
    ):
        low, high = guidance.interval
        if low > high:
            raise ConfigError(f"guidance.interval ({low}, {high}) is empty; give low <= high (t = 0 is data)")
        self.network, self.labels, self.guidance, self.null = network, labels, guidance, null
        self.scales = None if scales is None else scales.to(labels.device)
        changes = guidance.scale != 1 if scales is None else bool((scales != 1).any())
        self.conditional = changes and bool((labels != null).any())
        self.evaluations = 0  # network calls so far, a doubled batch counted twice

    def active(self, t: float) -> bool:
        """Whether guidance changes the velocity at time t."""
        low, high = self.guidance.interval
        return self.conditional and low - EDGE <= t <= high + EDGE

    def __call__(self, x: Tensor, t: float) -> Tensor:
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
        if not self.active(t):
            self.evaluations += 1
            return self.network(x, times, self.labels).float()
        self.evaluations += 2
        nulls = torch.full_like(self.labels, self.null)
        both = self.network(torch.cat([x, x]), torch.cat([times, times]),
                            torch.cat([self.labels, nulls])).float()
        cond, null = both.chunk(2)
        if self.scales is not None:
            return torch.where(self.scales == 1, cond, null + self.scales * (cond - null))
        guided = null + self.guidance.scale * (cond - null)
        k = self.guidance.channels
        return guided if k is None else torch.cat([guided[:, :k], cond[:, k:]], dim=1)

    def rows(self, which: slice) -> Guided:
        """The same field for some of the samples."""
        return Guided(self.network, self.labels[which], self.guidance, self.null, self.scales)
