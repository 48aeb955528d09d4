"""Latent cache and training forward: what is stored, reused and refused; streams that depend on (seed, step) only."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import cache_together
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from vfmlab.config import Data, Diffusion, TimeSampling, TokenizerConfig
from vfmlab.data import BatchStream, open_source, to_float
from vfmlab.diffusion import latents, shards
from vfmlab.diffusion.dit import LightningDiT
from vfmlab.diffusion.objective import DiffusionObjective
from vfmlab.errors import CheckpointError
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, Tokenizer, measure
from vfmlab.weights import io

COUNT = 20


class Unshuffle(Tokenizer):
    """Latent = pixels, with a spread that depends on them; deterministic on request."""

    def __init__(self, spread=True):
        super().__init__(TokenizerConfig(method="unshuffle", channels=12, factor=2), 16)
        self.gain, self.spread, self.calls = torch.nn.Parameter(torch.tensor(3.0)), spread, 0

    def posterior(self, images, features=None):
        self.calls += 1
        mean = self.gain * F.pixel_unshuffle(images, 2)
        return Posterior(mean, 0.5 * mean - 4 if self.spread else None)


@pytest.fixture(scope="module")
def source():
    return open_source(Data(source="scenes:easy", size=16, train=COUNT), "train")


@pytest.fixture
def tokenizer(source):
    return ready(Unshuffle(), source)


def ready(tokenizer, source):
    images = to_float(source.batch(torch.arange(COUNT)).images)
    tokenizer.set_statistics(measure(tokenizer, [images], source.fingerprint))
    tokenizer.calls = 0
    return tokenizer.eval()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 8)


def run(directory, tokenizer, source, **options):
    steps = list(latents.build(directory, tokenizer, source, batch=3, **options))
    wanted = {k: v for k, v in options.items() if k in ("flip", "sampled")}
    return latents.LatentSource(directory, latents.fingerprint(tokenizer, source, **wanted)), steps


def test_cached_latents_are_the_tokenizers(tmp_path, tokenizer, source):
    cache, steps = run(tmp_path, tokenizer, source, flip=True)
    assert steps[-1] == (COUNT, COUNT)
    assert (len(cache), cache.shape, cache.meta["class_names"]) == (COUNT, (12, 8, 8), source.class_names)
    indices = torch.tensor([19, 0, 7, 8, 7])
    images = source.batch(indices)
    turned = torch.tensor([False, True, False, True, True])
    views = torch.where(turned[:, None, None, None], images.images.flip(-1), images.images)
    posterior = tokenizer.encode(to_float(views))
    noise = torch.randn(5, *cache.shape)
    torch.testing.assert_close(cache.latents(indices, turned), posterior.mode(), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(
        cache.latents(indices, turned, noise), posterior.sample(noise=noise), atol=4e-3, rtol=1e-3
    )
    assert torch.equal(cache.labels(indices), images.labels)
    assert cache.meta["statistics"]["mean"] == tokenizer.statistics.mean.tolist()
    every = cache.latents(torch.arange(COUNT))
    torch.testing.assert_close(every.mean((0, 2, 3)), torch.zeros(12), atol=1e-3, rtol=0)
    torch.testing.assert_close(every.std((0, 2, 3), correction=0), torch.ones(12), atol=1e-3, rtol=0)


@pytest.mark.parametrize("spread", [True, False])
def test_the_mode_alone_takes_half_the_space(tmp_path, source, spread):
    tokenizer = ready(Unshuffle(spread), source)
    cache, _ = run(tmp_path, tokenizer, source, sampled=not spread)
    assert not cache.sampled
    assert sorted(cache.shards[0]) == ["indices", "labels", "mean"]
    indices = torch.arange(4)
    assert torch.equal(cache.latents(indices, noise=torch.randn(4, *cache.shape)), cache.latents(indices))
    with pytest.raises(CheckpointError, match="flip=True"):
        cache.latents(indices, torch.tensor([True, False, False, False]))


def test_the_batch_names_the_image_that_stood_in_for_an_unreadable_one(tmp_path, tokenizer, source, monkeypatch):
    """As fresh latents do: captions are looked up by it."""
    whole = source.batch

    def batch(indices):
        return whole(torch.where(torch.as_tensor(indices) == 3, 4, indices))

    monkeypatch.setattr(source, "batch", batch)
    cache, _ = run(tmp_path, tokenizer, source)
    assert cache.used.tolist() == [0, 1, 2, 4, *range(4, COUNT)]
    seen = next(latents.cached_stream(cache, COUNT, 0))
    assert sorted(seen.indices.tolist()) == sorted(cache.used.tolist())
    assert torch.equal(seen.labels, source.labels[seen.indices])


def test_a_finished_cache_is_reused_and_an_interrupted_one_goes_on(tmp_path, tokenizer, source):
    building = latents.build(tmp_path, tokenizer, source, batch=3)
    while not (tmp_path / "latents-00001.safetensors").exists():
        next(building)
    building.close()
    with pytest.raises(CheckpointError, match=r"latents-00002.safetensors' is missing"):
        latents.LatentSource(tmp_path)
    before = (tmp_path / "latents-00000.safetensors").stat().st_mtime_ns
    tokenizer.calls = 0
    run(tmp_path, tokenizer, source)
    assert tokenizer.calls == 2  # the 4 images of the last shard, in batches of 3
    assert (tmp_path / "latents-00000.safetensors").stat().st_mtime_ns == before
    run(tmp_path, tokenizer, source)
    assert tokenizer.calls == 2
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


def test_two_processes_share_the_work(tmp_path, tokenizer, source, monkeypatch):
    first, second = (latents.build(tmp_path / "two", tokenizer, source, batch=3, rank=rank, world=2) for rank in (0, 1))
    monkeypatch.setattr(shards, "PATIENCE", -1.0)  # in one process nobody works while one waits
    with pytest.raises(CheckpointError, match=r"2 shards of .* are not coming"):
        list(second)
    list(first)
    assert tokenizer.calls == 3 + 3 + 2  # three shards of 8, 8 and 4 images in batches of 3: nothing encoded twice
    list(latents.build(tmp_path / "two", tokenizer, source, rank=1, world=2))
    one, _ = run(tmp_path / "one", tokenizer, source)
    two = latents.LatentSource(tmp_path / "two", one.fingerprint)
    torch.testing.assert_close(two.latents(torch.arange(COUNT)), one.latents(torch.arange(COUNT)))


def test_a_process_that_is_slow_is_not_dead(tmp_path, monkeypatch):
    """A shard takes longer than the patience, a batch of it less: the other process waits, by a clock of its own."""
    meta = {"count": 5, "shard": 5, "fingerprint": "f"}
    clock = itertools.count(step=0.3)
    monkeypatch.setattr(shards, "PATIENCE", 0.9)

    def encode(indices, content):
        time.sleep(0.01)  # a file system knows times to some milliseconds
        return {"rows": content}

    def write(rank):
        return shards.write(tmp_path, "slow", meta, lambda indices: indices, encode, 1, rank, 2)

    slow, waited = write(0), []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) % 2 == 0:  # every .6 on the clock
            next(slow, None)

    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep))
    next(slow)
    assert list(write(1)) == [(5, 5)]
    assert len(waited) == 10
    assert (tmp_path / "slow-00000.safetensors").exists()


def test_a_process_without_a_sign_of_life_is_dead(tmp_path, monkeypatch):
    meta = {"count": 5, "shard": 5, "fingerprint": "f"}
    clock = itertools.count(step=0.3)
    monkeypatch.setattr(shards, "PATIENCE", 0.9)
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    with pytest.raises(CheckpointError, match="1 shards .* are not coming from other processes"):
        list(shards.write(tmp_path, "dead", meta, None, None, 1, 1, 2))


def test_processes_build_what_one_builds_and_one_that_was_killed_goes_on(tmp_path):
    """48 images in six shards of 8 (three batches each); the second of two processes dies in its second shard."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    jobs = [{"folder": one, "world": 1}, {"folder": two, "world": 2, "kill": 5, "patience": 0.0}, {"folder": two, "world": 2}]
    command = [sys.executable, cache_together.__file__, json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert json.loads(done.stdout) == [[0], [1, -9], [0, 0]], done.stderr
    names = sorted(file.name for file in (tmp_path / "one").glob("*.safetensors"))
    assert len(names) == 6
    for name in names:  # the order of the facts in a file's head is arbitrary
        (mine, facts), (theirs, other) = (io.read(tmp_path / folder / name) for folder in ("one", "two"))
        assert (mine.keys(), facts) == (theirs.keys(), other)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    assert (tmp_path / "one" / "meta.json").read_text() == (tmp_path / "two" / "meta.json").read_text()
    assert not list((tmp_path / "two").glob("*.tmp"))
    again = [int((tmp_path / "two" / f"calls.{rank}").read_text()) for rank in (0, 1)]
    assert again == [0, 6], "the first process had all of its shards, the second one of three"


def test_other_tokenizers_data_and_options_are_refused(tmp_path, tokenizer, source):
    run(tmp_path, tokenizer, source)
    message = "another tokenizer, data set or options"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, tokenizer, source, flip=True)
    other = open_source(Data(source="scenes:easy", size=16, train=COUNT, seed=1), "train")
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, tokenizer, other)
    with torch.no_grad():
        tokenizer.gain.mul_(1.001)
    with pytest.raises(CheckpointError, match=message) as refused:
        run(tmp_path, tokenizer, source)
    assert "\n" not in str(refused.value)
    assert "delete the folder" in str(refused.value)


def test_broken_caches_say_so(tmp_path, tokenizer, source):
    with pytest.raises(CheckpointError, match="no latent cache"):
        latents.LatentSource(tmp_path)
    run(tmp_path, tokenizer, source)
    file = tmp_path / "latents-00001.safetensors"
    whole = latents.LatentSource(tmp_path).latents(torch.arange(COUNT))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="missing or broken"):
        latents.LatentSource(tmp_path)
    file.unlink()
    run(tmp_path, tokenizer, source)
    assert torch.equal(latents.LatentSource(tmp_path).latents(torch.arange(COUNT)), whole)
    (tmp_path / "meta.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError, match="does not describe a latent cache"):
        latents.LatentSource(tmp_path)


def flipped_bit(tensors):
    tensors["mean"].view(torch.uint8).view(-1)[5] ^= 1


DAMAGES = {
    "a flipped bit": flipped_bit,
    "zeros": lambda tensors: tensors["std"].zero_(),
    "half the rows": lambda tensors: tensors.update({key: value[: len(value) // 2].clone() for key, value in tensors.items()}),
    "no std": lambda tensors: tensors.pop("std"),
    "another label": lambda tensors: tensors["labels"].add_(1),
    "another name": lambda tensors: tensors.update(mean_flip=tensors["mean"].clone()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [0, 2])
def test_shards_that_changed_are_refused(tmp_path, tokenizer, source, damage, number):
    """Content is held against the digest that was written with it: a well-formed file is not enough."""
    run(tmp_path, tokenizer, source)
    file = tmp_path / f"latents-{number:05d}.safetensors"
    with safe_open(file, framework="pt") as shard:
        facts, tensors = shard.metadata(), {key: shard.get_tensor(key).clone() for key in shard.keys()}  # noqa: SIM118
    DAMAGES[damage](tensors)
    save_file(tensors, file, facts)
    with pytest.raises(CheckpointError, match=rf"latents-0000{number}.safetensors' is damaged.*delete it") as refused:
        latents.LatentSource(tmp_path)
    assert "\n" not in str(refused.value)
    file.unlink()
    run(tmp_path, tokenizer, source)


def test_of_several_processes_each_checks_its_own_shards(tmp_path, tokenizer, source, monkeypatch):
    """What is hashed is read from the disk: every shard once, whatever the number of processes."""
    run(tmp_path, tokenizer, source)
    digest, seen = io.digest, []
    monkeypatch.setattr(io, "digest", lambda tensors: seen.append(len(tensors["labels"])) or digest(tensors))
    found = [latents.LatentSource(tmp_path, rank=rank, world=2) for rank in range(2)]
    assert len(seen) == len(found[0].shards) == 3
    file = tmp_path / "latents-00001.safetensors"
    facts, tensors = io.metadata(file), {key: value.clone() for key, value in io.read(file)[0].items()}
    tensors["labels"] += 1
    save_file(tensors, file, facts)
    latents.LatentSource(tmp_path, rank=0, world=2)
    with pytest.raises(CheckpointError, match="latents-00001.safetensors' is damaged"):
        latents.LatentSource(tmp_path, rank=1, world=2)


def test_shards_of_earlier_versions_are_encoded_anew(tmp_path, tokenizer, source):
    run(tmp_path, tokenizer, source)
    file = tmp_path / "latents-00001.safetensors"
    with safe_open(file, framework="pt") as shard:
        facts, tensors = shard.metadata(), {key: shard.get_tensor(key).clone() for key in shard.keys()}  # noqa: SIM118
    del facts["digest"]
    save_file(tensors, file, facts)
    tokenizer.calls = 0
    run(tmp_path, tokenizer, source)
    assert tokenizer.calls == 3  # the 8 images of this shard alone, in batches of 3


def test_leftovers_of_killed_processes_are_swept_and_others_waited_for(tmp_path, tokenizer, source):
    (tmp_path / ".latents-00001.safetensors.4711.tmp").write_bytes(b"half")
    first = latents.build(tmp_path, tokenizer, source, batch=3)
    next(first)
    second = latents.build(tmp_path, tokenizer, source, batch=3)
    assert next(second) == (0, COUNT)  # waits: what the first encodes is not encoded twice
    list(first)
    assert list(second)[-1] == (COUNT, COUNT)
    assert tokenizer.calls == 3 + 3 + 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_statistics_and_finite_latents_are_required(tmp_path, tokenizer, source):
    with pytest.raises(CheckpointError, match="no latent statistics"):
        list(latents.build(tmp_path / "a", Unshuffle(), source))
    with torch.no_grad():
        tokenizer.gain.fill_(1e9)  # beyond fp16 once normalised by the old statistics
    with pytest.raises(CheckpointError, match="not finite in fp16"):
        list(latents.build(tmp_path / "b", tokenizer, source))
    assert not list((tmp_path / "b").glob("*.safetensors"))


def take(stream, count):
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


@pytest.mark.parametrize("sampled", [True, False])
def test_streams_depend_on_seed_and_step_only_and_agree(tmp_path, tokenizer, source, sampled):
    cache, _ = run(tmp_path, tokenizer, source, flip=True, sampled=sampled)
    whole = take(latents.cached_stream(cache, 8, seed=4), 6)
    assert whole[0].z.shape == (8, 12, 8, 8)
    for later, batch in zip(take(latents.cached_stream(cache, 8, seed=4, start_step=3), 3), whole[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(later, batch, strict=True))
    halves = [take(latents.cached_stream(cache, 8, seed=4, rows=rows), 6) for rows in (slice(0, 4), slice(4, 8))]
    for a, b, batch in zip(*halves, whole, strict=True):
        assert torch.equal(torch.cat([a.z, b.z]), batch.z)
        assert torch.equal(torch.cat([a.labels, b.labels]), batch.labels)
    images = BatchStream(source, 8, seed=4, start_step=2, flip=True)
    fresh = take(latents.fresh_stream(images, tokenizer, 8, seed=4, start_step=2, sampled=sampled), 4)
    for now, batch in zip(fresh, whole[2:], strict=True):
        assert torch.equal(now.indices, batch.indices)
        assert torch.equal(now.labels, batch.labels)
        torch.testing.assert_close(now.z, batch.z, atol=4e-3, rtol=1e-3)
    repeats = torch.cat([batch.indices for batch in whole])[:COUNT]
    assert sorted(repeats.tolist()) == list(range(COUNT))  # an epoch sees every image once
    other = take(latents.cached_stream(cache, 8, seed=5), 1)[0]
    assert not torch.equal(other.indices, whole[0].indices)


# -- the training forward ----------------------------------------------------------------------------------------------


class Recording(torch.nn.Module):
    num_classes = 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, y):
        self.seen = (x, t, y)
        return self.scale * x


def config(**more):
    return Diffusion.model_validate(
        {"network": {"kind": "lightningdit", "width": 32, "depth": 2, "heads": 2}, "train": {"samples": 8}, **more}
    )


def batch(n=64, shape=(4, 4, 4)):
    g = torch.Generator().manual_seed(0)
    return latents.LatentBatch(
        torch.randn(n, *shape, generator=g), torch.randint(0, 3, (n,), generator=g), torch.arange(n)
    )


def test_objective_is_the_stated_loss():
    network = Recording()
    objective = DiffusionObjective(network, config(time={"kind": "uniform"}, class_dropout=0.0))
    data = batch()
    loss, metrics = objective(data, StepRandom(0, 5, 64), 0)
    x, t, y = network.seen
    again = StepRandom(0, 5, 64)
    noise = again.randn(4, 4, 4)
    assert torch.equal(y, data.labels)
    torch.testing.assert_close(t, again.rand())
    torch.testing.assert_close(x, data.z + t[:, None, None, None] * (noise - data.z))
    torch.testing.assert_close(loss, (0.5 * x - (noise - data.z)).square().mean())
    weights = {"loss_data": 1 / 3, "loss_middle": 1 / 3, "loss_noise": 1 / 3}  # of uniform times
    assert sum(weights[k] * metrics[k] for k in weights).item() == pytest.approx(loss.item(), rel=1e-4)
    assert not any(value.requires_grad for value in metrics.values())


def test_class_dropout_has_its_rate():
    network = Recording()
    data = batch(4000)
    DiffusionObjective(network, config(class_dropout=0.25))(data, StepRandom(0, 0, 4000), 0)
    dropped = network.seen[2] == 3
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(network.seen[2][~dropped], data.labels[~dropped])


@pytest.mark.parametrize("time", [TimeSampling(), TimeSampling(kind="uniform", shift=2.0)], ids=str)
def test_ranks_agree_with_one_process(time):
    torch.manual_seed(0)
    network = LightningDiT(LightningDiT.Config(width=32, depth=2, heads=2), (4, 4, 4), 3)
    objective = DiffusionObjective(network, config(time=time.model_dump(), cosine_loss=1.0))
    data = batch(8)
    loss, metrics = objective(data, StepRandom(1, 2, 8), 0)
    parts = [
        objective(latents.LatentBatch(*(p[rows] for p in data)), StepRandom(1, 2, 8, rows), 0)
        for rows in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, loss)
    for key, value in metrics.items():
        torch.testing.assert_close(sum(part[1][key] for part in parts) / 2, value)


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    network = LightningDiT(LightningDiT.Config(width=32, depth=2, heads=2), (4, 4, 4), 3)
    objective = DiffusionObjective(network, config())
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
    data = batch(32)
    data = data._replace(z=data.labels[:, None, None, None].float().expand_as(data.z) - 1)
    losses = []
    for step in range(60):
        optimiser.zero_grad()
        loss, _ = objective(data, StepRandom(0, step, 32), 0)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
