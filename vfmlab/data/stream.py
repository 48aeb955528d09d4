"""Training batches without end, each a pure function of (seed, step)."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vfmlab.data.base import Batch, ImageSource
from vfmlab.errors import VfmlabError
from vfmlab.seeding import generator

AHEAD = 2  # batches prepared before they are asked for


class Order:
    """Which images make up step k: consecutive pieces of permutations, one per epoch.

    Args:
        count: images. batch: global batch; it may span the end of an epoch, and may be larger than `count`.
    """

    def __init__(self, count: int, batch: int, seed: int):
        self.count, self.batch, self.seed = count, batch, seed
        self._epochs: dict[int, Tensor] = {}

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[epoch] = torch.randperm(self.count, generator=generator("epoch", self.seed, epoch))
        return self._epochs[epoch]

    def __call__(self, step: int) -> Tensor:
        """Indices of the global batch of `step`: long `batch`."""
        places = torch.arange(step * self.batch, (step + 1) * self.batch)
        epochs = places.div(self.count, rounding_mode="floor")
        return torch.cat([self._epoch(int(e))[places[epochs == e] % self.count] for e in epochs.unique()])


class _Steps(Dataset):
    """Step -> this rank's rows of its batch."""

    def __init__(self, source: ImageSource, batch: int, seed: int, rows: slice, flip: bool,
                 crop: tuple[float, float] | None = None):
        self.source, self.order, self.rows, self.flip = source, Order(len(source), batch, seed), rows, flip
        self.seed, self.total, self.crop = seed, batch, crop

    def _images(self, step: int) -> Batch:
        indices = self.order(step)[self.rows]
        if self.crop is None:
            return self.source.batch(indices)
        low, high = self.crop
        draws = torch.rand(self.total, 3, generator=generator("crop", self.seed, step))[self.rows]
        draws[:, 0] = low + (high - low) * draws[:, 0]
        return self.source.cropped(indices, draws)

    def __getitem__(self, step: int) -> Batch:
        batch = self._images(step)
        if not self.flip:
            return batch
        turned = torch.rand(self.total, generator=generator("flip", self.seed, step))[self.rows] < 0.5
        images = torch.where(turned[:, None, None, None], batch.images.flip(-1), batch.images)
        return batch._replace(images=images)


class _Reporting(_Steps):
    """In a loader process: errors come back as values (one line stays one line), with unreadable images."""

    def __getitem__(self, step: int) -> tuple[Batch | VfmlabError, list[str]]:
        try:
            return super().__getitem__(step), list(self.source.bad)
        except VfmlabError as error:
            return error, list(self.source.bad)


class BatchStream(Iterator[Batch]):
    """Batches of step `start_step`, `start_step` + 1, ... prepared in the background.

    Args:
        source: the images. batch: global batch over all ranks and accumulation steps. seed: of the order and
        the flips. start_step: a stream started at k goes on exactly like one that has run to k. rows: this
        rank's rows of each global batch. flip: mirror each image left-right with probability 1/2, drawn from
        (seed, step). crop: smallest and largest share of the short side, of a random square of each image,
        drawn from (seed, step); None: the centre crop. workers: loader processes; 0 prepares batches in a
        thread of this process.

    Raises:
        DataError: too many unreadable images, when the batch that meets them is asked for.
    """

    def __init__(self, source: ImageSource, batch: int, seed: int, start_step: int = 0,
                 rows: slice | None = None, flip: bool = False, workers: int = 0,
                 crop: tuple[float, float] | None = None):
        self.source = source
        args = (source, batch, seed, rows if rows is not None else slice(0, batch), flip, crop)
        if workers:
            source.share()
            self._loader = DataLoader(_Reporting(*args), batch_size=None, sampler=itertools.count(start_step),
                                      num_workers=workers, collate_fn=_as_it_is, prefetch_factor=AHEAD)
            self._batches = self._from_processes()
        else:
            self._batches = from_thread(_Steps(*args), start_step)

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Stop preparing batches; loader processes end."""
        self._batches.close()

    def _from_processes(self) -> Iterator[Batch]:
        known = set(self.source.bad)
        for batch, bad in self._loader:
            for line in bad:
                if line not in known:
                    known.add(line)
                    self.source.bad.append(line)
            if isinstance(batch, VfmlabError):
                raise batch
            yield batch


def _as_it_is(value):
    return value


def from_thread(steps: Any, start: int, stop: int | None = None) -> Iterator[Any]:
    """`steps[start]`, ... from a thread that works `AHEAD` of the reader. The generator owns the thread and
    ends it. stop: the first number that is not asked for; None: there is no end."""
    with ThreadPoolExecutor(1, thread_name_prefix="vfmlab-data") as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for step in itertools.count(start) if stop is None else range(start, stop):
                waiting.append(pool.submit(steps.__getitem__, step))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
