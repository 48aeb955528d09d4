"""A task small enough to train in a test, with everything that makes resuming hard: noise, dropout, batch norm, a loss
with parameters of its own.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from vfmlab import runs
from vfmlab.config import parse
from vfmlab.nn.frozen import Frozen
from vfmlab.seeding import generator
from vfmlab.training.loop import Task, fit
from vfmlab.weights import io

TIMING = ("seconds", "samples_per_second")  # what differs between the metrics of equal runs


class ToyBatch(NamedTuple):
    x: torch.Tensor
    indices: torch.Tensor


class Net(nn.Module):
    def __init__(self, norm: bool):
        super().__init__()
        norm_layer = nn.BatchNorm1d(16) if norm else nn.LayerNorm(16)
        self.encoder = nn.Sequential(nn.Linear(8, 16), norm_layer, nn.Tanh(), nn.Dropout(0.1 if norm else 0.0))
        self.decoder = nn.Linear(16, 8)

    def forward(self, x):
        return self.decoder(self.encoder(x))


class Objective(nn.Module):
    def __init__(self, net: Net, task: ToyTask):
        super().__init__()
        self.net, self.gain = net, nn.Parameter(torch.ones(8))
        self.__dict__["task"] = task

    def forward(self, batch, rng, samples):
        noisy = batch.x + 0.1 * rng.randn(8)
        error = (self.net(noisy).float() * self.gain - batch.x).square().mean()
        loss = error * self.task.poison.get(samples // self.task.train.batch, 1.0)
        return loss, {"error": error.detach(), "seen": torch.tensor(float(samples))}


class ToyTask(Task):
    """Reconstruct rows of numbers. poison: step -> factor on its loss; spoilt: steps whose inputs are not numbers."""

    name = "pretrain"

    spoilt: tuple[int, ...] = ()

    def __init__(self, run, norm=True, poison=None, delay=0.0):
        self.run, self.train, self.trains = run, run.train, run.trains
        self.poison, self.delay, self.order, self.closed = poison or {}, delay, [], False
        self.shared = nn.Linear(3, 3)
        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            self.weights = Net(norm)
        self.weights.frozen = Frozen(vfm=self.shared)  # referred to, not owned, as a tokenizer does with its VFM
        self.objective = Objective(self.weights, self)

    def stream(self, start_step, rows):
        step = start_step
        try:
            while True:
                draw = generator("toy", self.run.seed, step)
                n = self.train.batch
                batch = ToyBatch(torch.randn(n, 8, generator=draw), torch.arange(n) + n * step)
                if step in self.spoilt:
                    batch.x.fill_(float("nan"))
                self.order.append(step)
                time.sleep(self.delay)
                yield ToyBatch(*(part[rows] for part in batch))
                step += 1
        finally:
            self.closed = True

    def preview(self, weights):
        assert not weights.training
        return weights(torch.linspace(-1, 1, 8).repeat(24, 1)).view(4, 3, 4, 4)

    def evaluate(self, weights, samples):
        return {"error": float(weights(torch.ones(1, 8)).square().mean())}

    def finish(self, weights, run_dir):
        (run_dir.path / "finished.txt").write_text("yes")


def toy_run(name="toy", trains=("*",), seed=0, **train):
    train = {"samples": 256, "batch": 16, "log_every": 32, "preview_every": 64, "checkpoint_every": 64, **train}
    return parse({"name": name, "seed": seed, "pretrain": {}, "trains": list(trains), "train": train}).last


def train_toy(root, norm=True, poison=None, until=None, delay=0.0, **config):
    """Train to the end (or `until`); returns (run directory, events, task)."""
    run = toy_run(**config)
    task, run_dir = ToyTask(run, norm, poison, delay), runs.create(run, root)
    return run_dir, list(fit(task, run_dir, until=until, device="cpu")), task


def outcome(run_dir):
    """All that must not depend on how often a run was interrupted: weights, averages, state, metrics without times."""
    files = {path.name: flat(io.read(path)) for path in (run_dir.model, run_dir.ema)}
    state = torch.load(run_dir.checkpoints / "state.pt", weights_only=True)
    state.pop("seconds")
    metrics = [{k: v for k, v in record.items() if k not in TIMING} for record in run_dir.metrics()]
    images = {path.name: path.read_bytes() for path in run_dir.images.iterdir()}
    return {"files": files, "state": flat(state), "metrics": metrics, "images": images}


def flat(value):
    """Tensors as lists, so that == compares them bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value
