"""Random numbers that depend on what they are for, never on when, in which batch or on which device rank they
are drawn.

Two rules carry reproducibility: training step k draws from a generator made from (seed, k), so a resumed run
needs no saved RNG state; sample i of an evaluation draws from a generator made from (seed, i), so batch size
changes nothing.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any mix of integers and names; stable over processes and versions."""
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A fresh generator on the CPU, seeded with :func:`derive`."""
    return torch.Generator().manual_seed(derive(*parts))


class StepRandom:
    """The random numbers of one training step, drawn for the global batch and cut to this rank's rows.

    Every rank draws the same global numbers and keeps its own rows, so that several processes see what one
    process with the same global batch sees. Numbers are drawn on the CPU: the stream is then the same on
    every device.

    Args:
        seed: the run's seed. step: optimiser step, from 0. total: rows of the global batch. rows: this rank's
        rows.

    Attributes:
        samples: images seen before this step, where every step has `total`.
    """

    def __init__(self, seed: int, step: int, total: int, rows: slice | None = None,
                 device: str | torch.device = "cpu"):
        self.generator, self.samples = generator("step", seed, step), step * total
        self.total, self.rows, self.device = total, rows if rows is not None else slice(0, total), device

    def _keep(self, value: Tensor) -> Tensor:
        return value[self.rows].to(self.device, non_blocking=True)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, one row per sample of this rank: [rows, *shape]."""
        return self._keep(torch.randn(self.total, *shape, generator=self.generator))

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), one row per sample of this rank: [rows, *shape]."""
        return self._keep(torch.rand(self.total, *shape, generator=self.generator))

    def number(self) -> float:
        """One uniform number in [0, 1), the same on every rank: for decisions that hold for the whole
        batch."""
        return float(torch.rand((), generator=self.generator))


class SampleRandom:
    """Noise for evaluation: row i comes from a stream of its own, made from (seed, ids[i]).

    Args:
        seed: of the protocol. ids: which samples, e.g. `range(200, 300)`; the same id always gets the same
        numbers.
    """

    def __init__(self, seed: int, ids, device: str | torch.device = "cpu"):
        self.streams = [generator("sample", seed, int(i)) for i in ids]
        self.device = device

    def __len__(self) -> int:
        return len(self.streams)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal [len(ids), *shape]; a second call goes on in each stream."""
        return torch.stack([torch.randn(*shape, generator=g) for g in self.streams]).to(self.device)

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1): [len(ids), *shape]; a second call goes on in each stream."""
        return torch.stack([torch.rand(*shape, generator=g) for g in self.streams]).to(self.device)
