"""One pass of a split network's encoder for several sampling steps, and how alike a network's blocks are over
time.

Faster Diffusion (arXiv 2312.09608) and TiUE (arXiv 2505.21960) found that the features of a denoiser's
encoder change little from one step to the next, and reuse them. A DiT with a decoupled head
(`vfmlab.diffusion.ddt`) is made for it: the head sees the current noisy latents and time at every step,
whatever encoding it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.errors import ConfigError

KEYS_50 = (0, 1, 2, 3, 5, 10, 15, 25, 35)  # of 50 steps, as Faster Diffusion's release has them


def scaled_keys(steps: int) -> tuple[int, ...]:
    """The published list for another number of steps: the same places of the way, rounded."""
    return tuple(sorted({min(steps - 1, round(key * steps / 50)) for key in KEYS_50}))


def groups(keys: Sequence[int], steps: int) -> list[list[int]]:
    """Steps that share an encoding: one group from each key step up to the next."""
    ends = [*keys[1:], steps]
    return [list(range(key, end)) for key, end in zip(keys, ends, strict=True)]


class Reused:
    """A split network whose encoder runs at the first of every `every` evaluations, or at those that `every`
    lists (key steps, dense at noise: :data:`KEYS_50`); the rest reuse its output.

    With 1 it computes exactly what the network does. The encoder also runs where the batch changes its size,
    that is where guidance switches on or off. A stateful object: make a new one for each sampling.

    Args:
        network: with `encode(x, t, y) -> [..., tokens]` and `head(x, t, tokens) -> (v, ...)`.
        grid: times of all evaluations and the end; the head then runs for all that share an encoding as one
            batch, on the state at the encoding, and later states are not looked at. None: one by one.

    Attributes:
        encodings, evaluations: how often the encoder and the head have run.

    Raises:
        ConfigError: a network that is not split.
    """

    def __init__(self, network: nn.Module, every: int | Sequence[int], grid: Sequence[float] | None = None):
        if not all(callable(getattr(network, part, None)) for part in ("encode", "head")):
            kind = getattr(getattr(network, "config", None), "kind", type(network).__name__)
            raise ConfigError(f"sampler.reuse {every}: network '{kind}' is not split into encoder and head; "
                              "train one with network.kind=ddt, or leave it null")
        self.network, self.every, self.tokens = network, every, None
        self.grid, self._ahead = grid, []
        self.encodings = self.evaluations = self._since = 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        due = self._since >= self.every if isinstance(self.every, int) else self.evaluations in self.every
        if self.tokens is None or due or len(self.tokens) != len(x):
            self.tokens, self._since = self.network.encode(x, t, y)[-1], 0
            self.encodings += 1
            self._ahead = [] if self.grid is None else self._batch(x)
        self._since += 1
        self.evaluations += 1
        return self.network.head(x, t, self.tokens)[0] if self.grid is None else self._ahead.pop(0)

    def _batch(self, x: Tensor) -> list[Tensor]:
        """Velocities of this evaluation and of those after it that share its encoding, at the state x."""
        now, total = self.evaluations, len(self.grid) - 1
        later = (now + self.every,) if isinstance(self.every, int) else [k for k in self.every if k > now]
        times = self.grid[now:min([total, *later])]
        n, t = len(times), torch.tensor(times, device=x.device).repeat_interleave(len(x))
        v, _ = self.network.head(x.repeat(n, 1, 1, 1), t, self.tokens.repeat(n, 1, 1))
        return list(v.chunk(n))


@dataclass
class Watched:
    """A network that notes what its blocks put out whenever it is called: `seen` is a list of {block: B N
    D}."""

    network: nn.Module
    blocks: tuple[int, ...]
    seen: list[dict[int, Tensor]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, **more: Any) -> Any:
        v, hidden = self.network(x, t, y, features_at=self.blocks, **more)
        self.seen.append({k: h.float().cpu() for k, h in hidden.items()})
        self.times.append(float(t[0]))
        return v


def similarity_over_time(network: nn.Module, sample: Callable[[Watched], object],
                         blocks: tuple[int, ...] | None = None) -> tuple[list[float], dict[int, Tensor]]:
    """How alike each block's tokens are at two times of the way from noise to data.

    Args:
        network: with `features_at` and `depth`. sample: draws samples with the network it is given, for
            example `lambda watched: sampling.sample(watched, labels, random, sampler, null=...,
            latent_shape=...)`, unguided.
        blocks: default all of them.

    Returns:
        the T times at which the network was called, and block -> [T, T] cosine similarity of the same token
        of the same sample at two times, mean over both.
    """
    blocks = tuple(range(1, network.depth + 1)) if blocks is None else blocks
    watched = Watched(network, blocks)
    sample(watched)
    similarity = {}
    for k in blocks:
        unit = torch.stack([F.normalize(one[k], dim=-1).flatten(1) for one in watched.seen])  # T B (N D)
        places = unit.shape[1] * watched.seen[0][k].shape[1]
        similarity[k] = torch.einsum("sbd,tbd->st", unit, unit) / places
    return watched.times, similarity
