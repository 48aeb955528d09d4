"""The stream of training batches: each a pure function of (seed, step)."""

from __future__ import annotations

import gc
import threading
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmlab.data import BatchStream
from vfmlab.data.scenes import SceneSource
from vfmlab.data.stream import Order
from vfmlab.errors import DataError


@pytest.fixture(scope="module")
def source():
    return SceneSource("easy", "train", 8, 50)


def take(stream, count):
    try:
        return list(islice(stream, count))
    finally:
        stream.close()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=60)
@given(count=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation(count, batch, seed):
    order = Order(count, batch, seed)
    flat = torch.cat([order(step) for step in range(3 * count // batch + 2)])
    for epoch in range(3):
        assert sorted(flat[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


def test_epochs_and_seeds_differ():
    assert not torch.equal(Order(50, 50, 0)(0), Order(50, 50, 0)(1))
    assert not torch.equal(Order(50, 50, 0)(0), Order(50, 50, 1)(0))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 7])
def test_starting_at_a_step_equals_running_to_it(source, start, workers):
    whole = take(BatchStream(source, 12, seed=3, flip=True), start + 3)
    later = take(BatchStream(source, 12, seed=3, flip=True, start_step=start, workers=workers), 3)
    assert all(same(a, b) for a, b in zip(whole[start:], later, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_halves_equal_the_whole(source, workers):
    whole = take(BatchStream(source, 12, seed=1, flip=True), 6)
    halves = [
        take(BatchStream(source, 12, seed=1, flip=True, rows=rows, workers=workers), 6)
        for rows in (slice(0, 6), slice(6, 12))
    ]
    for step in range(6):
        joined = [torch.cat(parts) for parts in zip(halves[0][step], halves[1][step], strict=True)]
        assert same(whole[step], joined)


def test_flips_mirror_about_half_of_the_images(source):
    plain = take(BatchStream(source, 50, seed=0), 8)
    flipped = take(BatchStream(source, 50, seed=0, flip=True), 8)
    turned = 0
    for a, b in zip(plain, flipped, strict=True):
        assert torch.equal(a.labels, b.labels)
        kept = (a.images == b.images).flatten(1).all(1)
        mirrored = (a.images.flip(-1) == b.images).flatten(1).all(1)
        assert (kept | mirrored).all()
        turned += int((~kept).sum())
    assert 150 < turned < 250  # 400 coins, 5 standard deviations


def test_a_batch_larger_than_the_set_repeats_it():
    tiny = SceneSource("easy", "train", 8, 3)
    (batch,) = take(BatchStream(tiny, 9, seed=0), 1)
    assert torch.bincount(batch.indices).tolist() == [3, 3, 3]


def test_the_thread_ends_with_the_stream(source):
    def alive():
        return [t for t in threading.enumerate() if t.name.startswith("vfmlab-data")]

    before = len(alive())
    stream = BatchStream(source, 4, seed=0)
    next(stream)
    assert len(alive()) == before + 1
    del stream
    gc.collect()
    assert len(alive()) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_while_loading_stays_one_line(workers):
    class Failing(SceneSource):
        def read(self, indices):
            raise DataError("shard 7 is gone; put it back")

    stream = BatchStream(Failing("easy", "train", 8, 20), 4, seed=0, workers=workers)
    with pytest.raises(DataError, match=r"^shard 7 is gone; put it back$"):
        next(stream)
