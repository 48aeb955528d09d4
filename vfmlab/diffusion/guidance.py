"""Guidance: against the null label (classifier-free, arXiv 2207.12598), limited to an interval of time (arXiv
2404.07724) and to channels; against a network's own second read-out; against a weaker model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vfmlab.config import Guidance
from vfmlab.errors import ConfigError

EDGE = 1e-6  # times on the interval's edge count as inside in spite of rounding
Pair = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Steered:
    """A velocity field led away from a weaker one: w + scale (v - w) inside an interval of t, v elsewhere.

    Of the clean latents that networks predict the same holds, since both velocities stand at one x and t.

    Args:
        pair: (x, t B, y B) -> v, w: the field's velocity and the weaker one's.
    """

    def __init__(self, pair: Pair, scale: float, interval: tuple[float, float] = (0.0, 1.0)):
        self.pair, self.scale, self.interval = pair, scale, interval

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        (v, w), (low, high) = (out.float() for out in self.pair(x, t, y)), self.interval
        inside = ((t >= low - EDGE) & (t <= high + EDGE)).view(-1, *[1] * (v.ndim - 1))
        return torch.where(inside, w + self.scale * (v - w), v)


def internal(network: Any) -> Pair:
    """Both read-outs of one evaluation (RAEv2, arXiv 2605.18324).

    Raises:
        ConfigError: a network with one read-out only.
    """
    if not getattr(network, "base_weight", 0.0) > 0:
        kind = getattr(getattr(network, "config", None), "kind", type(network).__name__)
        raise ConfigError(f"guidance.kind 'internal': network '{kind}' has no second read-out; train one "
                          "with network.kind=raev2 and network.base_depth, or set guidance.kind=null")
    return lambda x, t, y: tuple(network(x, t, y, readouts=True))


def auto(network: Any, velocity: Callable[..., Tensor], wrap: Callable[[Any], Callable[..., Tensor]]) -> Pair:
    """The network's velocity and that of the weaker model which was set as its attribute `weaker`
    (autoguidance, arXiv 2406.02507). wrap: network -> velocity of states."""
    if getattr(network, "weaker", None) is None:
        raise ConfigError("guidance.kind 'auto': the weaker model is not loaded; sample through "
                          "vfmlab.sample or "
                          "vfmlab.evaluate, which load guidance.weaker, or set network.weaker = (model,)")
    weak = wrap(network.weaker[0])
    return lambda x, t, y: (velocity(x, t, y), weak(x, t, y))


class Guided:
    """The velocity field that is integrated: v(x, t) for fixed labels.

        v = v_null + scale * (v_cond - v_null)   where low <= t <= high (both ends included; t = 0 data, t = 1
        noise)
        v = v_cond                               elsewhere

    An interval (0, 0.9) therefore leaves the noisiest tenth of the way unguided, (0.1, 1) the last steps.
    With `channels`, only the first so many are guided and the rest is v_cond: the releases' behaviour, kept
    for parity. Where no guidance acts (scale 1, outside the interval, only null labels) the network runs
    once; elsewhere condition and null run as one batch of twice the size. With `always` only null labels are
    such a batch too: encodings that are reused are made anew where the batch changes its size, and when that
    is must not depend on the other rows' labels.

    Args:
        network: called `(x, t B, y B) -> v`, x and v: B C h w, or B D flat states (see
        `vfmlab.diffusion.joint`).
        labels: B, `null` among them means unconditional. null: the null label.
        scales: [D] scale of each value of flat states, in place of `guidance.scale` and `guidance.channels`.
    """

    def __init__(self, network: Callable[..., Tensor], labels: Tensor, guidance: Guidance, null: int,
                 scales: Tensor | None = None, always: bool = False):
        low, high = guidance.interval
        if low > high:
            raise ConfigError(f"guidance.interval ({low}, {high}) is empty; give low <= high (t = 0 is data)")
        self.network, self.labels, self.guidance, self.null = network, labels, guidance, null
        self.scales, self.always = None if scales is None else scales.to(labels.device), always
        changes = guidance.scale != 1 if scales is None else bool((scales != 1).any())
        self.conditional = changes and (always or bool((labels != null).any()))

    def active(self, t: float) -> bool:
        """Whether guidance changes the velocity at time t."""
        low, high = self.guidance.interval
        return self.conditional and low - EDGE <= t <= high + EDGE

    def __call__(self, x: Tensor, t: float) -> Tensor:
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
        if not self.active(t):
            return self.network(x, times, self.labels).float()
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
        return Guided(self.network, self.labels[which], self.guidance, self.null, self.scales, self.always)
