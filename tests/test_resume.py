"""2N steps = N steps, kill -9 in the middle of a step, resume, the rest: bit for bit on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from tiny import KINDS, make_task, tiny_run, train_tiny
from toy import ToyTask, flat, outcome, toy_run

from vfmlab import runs
from vfmlab.training.loop import fit
from vfmlab.weights import io

KILLED = {kind: {"kind": kind, "kill_step": 7} for kind in KINDS}
KILLED |= {rename: {"kind": "toy", "kill_rename": rename} for rename in (8, 10, 12)}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs, each of a process that was killed with signal 9: name in KILLED -> folder."""
    folders = {name: tmp_path_factory.mktemp(f"killed-{name}") for name in KILLED}
    jobs = json.dumps([{"root": str(folders[name]), **options} for name, options in KILLED.items()])
    done = subprocess.run([sys.executable, tiny.__file__, jobs], capture_output=True, text=True, timeout=280)
    assert json.loads(done.stdout) == [-signal.SIGKILL] * len(KILLED), done.stderr
    for folder in folders.values():
        (run_dir,) = runs.scan(folder)
        assert run_dir.status().state == "interrupted"
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, killed, kind):
    (broken,) = runs.scan(killed[kind])
    assert broken.metrics("step")[-1]["step"] > 4, "it should have gone past its checkpoint"
    again, events = train_tiny(kind, killed[kind])
    assert again.path == broken.path
    (start,) = [event for event in events if event.kind == "start" and "resumed" in event.data]
    assert start.data["resumed"] == 4 * again.config().train.batch
    whole, _ = train_tiny(kind, tmp_path / "whole")
    assert outcome(again) == outcome(whole)
    steps = [record["step"] for record in again.metrics("step")]
    assert steps == sorted(set(steps)), "curves must have no doubles"
    if kind in ("game", "vfm_vae"):
        assert flat(io.read(again.latent_stats)) == flat(io.read(whole.latent_stats))


@pytest.mark.parametrize(("rename", "resumed"), [(8, 64), (10, 128), (12, 128)])
def test_killed_between_the_renames_of_a_checkpoint(tmp_path, killed, rename, resumed):
    """The first checkpoint takes six renames; the second is whole from its third on."""
    again, events = train_tiny("toy", killed[rename])
    assert events[0].data["resumed"] == resumed
    whole, _ = train_tiny("toy", tmp_path / "whole")
    assert outcome(again) == outcome(whole)


def busy_toy():
    """A log, preview, evaluation or checkpoint is due after many of its 6 steps, alone and together."""
    return toy_run(samples=96, log_every=32, preview_every=48, checkpoint_every=64, evaluate_at=(32, 48, 80))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = busy_toy()
    run_dir = runs.create(run, tmp_path_factory.mktemp("whole"))
    return list(fit(ToyTask(run), run_dir, device="cpu")), outcome(run_dir)


def test_interrupted_at_every_event_equals_uninterrupted(tmp_path, uninterrupted):
    """Whatever the generator has just yielded when it is closed, nothing is lost and nothing is done twice."""
    events, expected = uninterrupted
    for n in range(1, len(events)):
        run = busy_toy()
        run_dir = runs.create(run, tmp_path / str(n))
        generator = fit(ToyTask(run), run_dir, device="cpu")
        for _ in range(n):
            next(generator)
        generator.close()
        rest = list(fit(ToyTask(run), run_dir, device="cpu"))
        kinds = [event.kind for event in rest if event.kind != "start"]
        assert kinds == [event.kind for event in events[n:] if event.kind != "start"]
        assert outcome(run_dir) == expected, f"after {events[n - 1].kind}"


def test_a_run_closed_at_its_last_event_is_finished(tmp_path, uninterrupted):
    """As by the stop button of a notebook, pressed in the last step."""
    run = busy_toy()
    run_dir = runs.create(run, tmp_path)
    generator = fit(ToyTask(run), run_dir, device="cpu")
    while next(generator).kind != "finish":
        pass
    generator.close()
    assert run_dir.status().state == "finished"
    assert outcome(run_dir) == uninterrupted[1]


class Struck(ToyTask):
    """Gets Ctrl-C inside the forward of a step, or the n-th time that something else of it is called."""

    def __init__(self, run, what, at):
        super().__init__(run)
        self.what, self.at, self.calls = what, at, 0
        self.objective.register_forward_hook(lambda *_: self.strike("forward"))

    def strike(self, what):
        self.calls += what == self.what
        if what == self.what and self.calls == self.at:
            signal.raise_signal(signal.SIGINT)

    def stream(self, start_step, rows):
        for batch in super().stream(start_step, rows):
            self.strike("data")
            yield batch

    def preview(self, weights):
        self.strike("preview")
        return super().preview(weights)

    def evaluate(self, weights, samples):
        self.strike("evaluate")
        return super().evaluate(weights, samples)

    def facts(self):  # of every checkpoint
        self.strike("save")
        return super().facts()

    def finish(self, weights, run_dir):
        self.strike("finish")
        super().finish(weights, run_dir)


STRIKES = {"forward": 6, "data": 6, "preview": 4, "evaluate": 3, "save": 2, "finish": 1}


@pytest.mark.parametrize(("what", "at"), [(what, n) for what, most in STRIKES.items() for n in range(1, most + 1)])
def test_interrupted_inside_every_step_equals_uninterrupted(tmp_path, uninterrupted, what, at):
    """Also where a log is due right after the step, which then is the first thing that the resumed run does; and twice."""
    run = busy_toy()
    run_dir = runs.create(run, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(fit(Struck(run, what, at), run_dir, device="cpu"))
    assert run_dir.status().state == "interrupted"
    again = fit(ToyTask(run), run_dir, device="cpu")
    next(again)
    again.close()  # before it has taken a step
    list(fit(ToyTask(run), run_dir, device="cpu"))
    assert outcome(run_dir) == uninterrupted[1]


def test_resumed_runs_see_the_same_data(tmp_path):
    seen = {}
    for name, stops in {"whole": (None,), "parts": (24, 40, None)}.items():
        seen[name] = []
        run = tiny_run("game")
        for until in stops:
            task = make_task(run, tmp_path)
            task.objective.register_forward_pre_hook(
                lambda _, args, name=name: seen[name].append((args[0].indices.tolist(), args[0].images.sum().item()))
            )
            list(fit(task, runs.create(run, tmp_path / name), until=until, device="cpu"))
    assert len(seen["whole"]) == 8
    assert seen["whole"] == seen["parts"]


def test_interrupted_while_latents_are_cached(tmp_path):
    run = tiny_run("diffusion")
    run_dir = runs.create(run, tmp_path / "a")
    events = fit(make_task(run, tmp_path / "a"), run_dir, device="cpu")
    assert (next(events).phase, next(events).phase) == ("latents", "latents")
    events.close()
    assert (run_dir.status().state, run_dir.status().samples) == ("interrupted", 0)
    again = list(fit(make_task(run, tmp_path / "a"), run_dir, device="cpu"))
    assert again[-1].kind == "finish"
    assert outcome(run_dir) == outcome(train_tiny("diffusion", tmp_path / "b")[0])


def test_latent_statistics_are_in_the_weights(tmp_path):
    run_dir, events = train_tiny("vfm_vae", tmp_path)
    assert events[-1].kind == "finish"
    for path in (run_dir.model, run_dir.ema):
        tensors, metadata = io.read(path)
        assert tensors["stat_count"] == 48
        assert (tensors["stat_std"] > 0).all()
        assert metadata["fingerprint"]
        assert metadata["vfm_fingerprint"]
        assert not any(key.startswith("vfm.") for key in tensors)
    stats, facts = io.read(run_dir.latent_stats)
    assert torch.equal(stats["mean"], io.read(run_dir.ema)[0]["stat_mean"])
    assert facts["fingerprint"] == io.metadata(run_dir.ema)["fingerprint"]
    assert os.path.getsize(run_dir.ema) < 1_000_000
