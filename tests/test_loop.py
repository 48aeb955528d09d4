"""The loop on a toy: what it yields, what it writes, how it is stopped, and that its gradients are means."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from PIL import Image
from tiny import COMMON
from toy import ToyTask, outcome, toy_run, train_toy

import vfmlab
from vfmlab import api, presets, runs
from vfmlab.cli import main as cli
from vfmlab.config import Train, override
from vfmlab.errors import ConfigError, DataError, RunError, Stopped, TrainingError, VfmlabError
from vfmlab.evaluation import generation, reconstruction
from vfmlab.losses.l1 import L1
from vfmlab.nn.resample import BinomialBlur
from vfmlab.training import checkpoint, dryrun, evaluated, loop
from vfmlab.training.average import Average
from vfmlab.training.check import check
from vfmlab.training.guards import Guard
from vfmlab.training.loop import fit
from vfmlab.training.progress import describe
from vfmlab.training.schedule import Clock, rate
from vfmlab.training.step import make_accelerator, my_rows, pick_precision
from vfmlab.training.task import Task
from vfmlab.training.tokenizer import TokenizerTask
from vfmlab.weights import io


def test_events_and_files(tmp_path):
    run_dir, events, task = train_toy(tmp_path, samples=128, evaluate_at=(50, 128))
    kinds = [(event.kind, event.samples) for event in events]
    assert kinds == [
        ("start", 0), ("step", 32), ("step", 64), ("preview", 64), ("evaluation", 64), ("checkpoint", 64),
        ("step", 96), ("step", 128), ("preview", 128), ("evaluation", 128), ("checkpoint", 128), ("finish", 128),
    ]  # fmt: skip
    assert {event.run_id for event in events} == {run_dir.id}
    assert events[-2].seconds_left == 0
    assert events[3].data["images"].shape == (4, 3, 4, 4)
    assert not torch.equal(events[3].data["images"], events[3].data["raw"])
    assert run_dir.status().state == "finished"
    assert run_dir.status().samples == 128
    step = run_dir.metrics("step")[0]
    assert (step["step"], step["samples"], step["lr"], step["seen"]) == (2, 32, 1e-3, 8.0)
    assert [record["samples"] for record in run_dir.metrics("evaluation")] == [64, 128]
    _, metadata = io.read(run_dir.ema)
    assert (metadata["samples"], metadata["ema_samples"], metadata["kind"]) == ("128", "128", "pretrain")
    assert {path.name for path in run_dir.images.iterdir()} == {
        f"{n:010d}_{which}.png" for n in (64, 128) for which in ("raw", "ema")
    }
    assert Image.open(next(run_dir.images.iterdir())).size == (4 * 6 + 2, 8)
    assert task.closed
    assert task.order == list(range(8))
    assert (run_dir.path / "finished.txt").exists()
    assert run_dir.env()["device"] == "cpu"
    assert [event.kind for event in fit(task, run_dir)] == ["skip"]


def test_average_is_another_file_and_shares_the_vfm(tmp_path):
    task = ToyTask(toy_run())
    average = Average(task.weights, task.train)
    assert average.module.frozen["vfm"] is task.shared
    assert task.weights.frozen["vfm"] is task.shared
    assert not average.module.training
    run_dir, *_ = train_toy(tmp_path, samples=64)
    raw, ema = io.read(run_dir.model)[0], io.read(run_dir.ema)[0]
    assert raw.keys() == ema.keys()
    assert not torch.equal(raw["decoder.weight"], ema["decoder.weight"])
    run_dir, *_ = train_toy(tmp_path, samples=64, ema_halflife=0)
    raw, ema = io.read(run_dir.model)[0], io.read(run_dir.ema)[0]
    assert torch.equal(raw["decoder.weight"], ema["decoder.weight"])


def test_average_against_its_definition():
    """Half-life in samples, and timm's warm-up, from the formulas."""
    train = Train(samples=1, batch=10, ema_halflife=40)
    weights = torch.nn.Linear(1, 1, bias=False)
    average, expected = Average(weights, train), 0.0
    for n in range(1, 40):
        with torch.no_grad():
            weights.weight.fill_(n)
        average.update()
        decay = min(0.5 ** (10 / 40), 1 - n ** (-2 / 3)) if n > 1 else 0.0
        expected = decay * expected + (1 - decay) * n
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert average.samples == 390


def test_schedule():
    train = Train(samples=1000, batch=10, warmup=100, schedule="cosine")
    assert [rate(train, n) for n in (0, 40, 90, 100, 550, 1000)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])
    assert rate(Train(samples=1000, schedule="linear"), 250) == 0.75
    assert rate(Train(samples=1000), 990) == 1.0


def test_time_left_ignores_a_slow_start():
    clock = Clock()
    assert clock.left(10, {}) is None
    for seconds in (60.0, 0.5, 0.5, 0.5):
        clock.step(seconds)
    clock.extra("preview", 3.0)
    assert clock.left(10, {"preview": 2, "evaluate": 1}) == pytest.approx(11.0)


def test_no_time_below_zero_is_left(tmp_path):
    """The last batch is a whole one, beyond the budget where this is no multiple of it."""
    _, events, _ = train_toy(tmp_path, samples=70, preview_every=16, checkpoint_every=16)
    assert min(event.seconds_left for event in events if event.seconds_left is not None) >= 0


def test_a_long_evaluation_shows_that_the_run_lives(tmp_path, monkeypatch):
    """To another machine a run without a sign of life is dead after some minutes."""
    monkeypatch.setattr(loop, "BEAT", 0.0)
    run_dir = runs.create(toy_run(), tmp_path)
    seen = []

    def long(*given, **more):
        progress, before = next(part for part in given if callable(part)), run_dir.status().heartbeat
        progress(1, 2)
        seen.append(run_dir.status().heartbeat > before)
        return SimpleNamespace(record=dict)

    for module, name in ((reconstruction, "measure"), (reconstruction, "evaluate_reconstruction"), (generation, "evaluate_generation")):
        monkeypatch.setattr(module, name, long)
    run = SimpleNamespace(id=run_dir.id, data=None, protocol=None, seed=0)
    task = SimpleNamespace(root=str(tmp_path), run=run, _setup="shared", _baseline=None, tokenizer=None, num_classes=3, source=None, seed=0)
    evaluated.generated(task, None, None)
    TokenizerTask.evaluate(task, SimpleNamespace(config=SimpleNamespace(radius=None)), 0)
    assert seen == [True, True, True]


def test_accumulation_equals_the_whole_batch(tmp_path):
    """Gradients are means over the global batch, never sums over its parts."""
    one, *_ = train_toy(tmp_path, norm=False, precision="fp32", samples=128)
    four, *_ = train_toy(tmp_path, norm=False, precision="fp32", samples=128, accumulation=4)
    left, right = io.read(one.model)[0], io.read(four.model)[0]
    for key in left:
        torch.testing.assert_close(left[key], right[key], rtol=1e-5, atol=1e-6)
    for a, b in zip(one.metrics("step"), four.metrics("step"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_batches_that_do_not_divide(tmp_path, monkeypatch):
    """Those of a generator are refused before its tokenizer is trained."""
    with pytest.raises(ConfigError, match=r"train\.batch 16 does not divide.*3 accumulation.*multiple of 3"):
        train_toy(tmp_path, accumulation=3)
    recipe = override(presets.get("tiny_plain_vae"), {"diffusion.train.batch": 7})
    check(recipe.phases())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^diffusion\.train\.batch 7 does not divide into 2 processes"):
        check(recipe.phases())


def test_what_trains(tmp_path):
    before = ToyTask(toy_run()).weights.state_dict()
    run_dir, *_ = train_toy(tmp_path, trains=("decoder.*",), samples=64)
    after, _ = io.read(run_dir.model)
    changed = {key for key in before if "num_batches" not in key and not torch.equal(before[key], after[key])}
    assert changed == {"decoder.weight", "decoder.bias", "encoder.1.running_mean", "encoder.1.running_var"}
    with pytest.raises(ConfigError, match=r"'decodr\.\*' matches no parameter of the pretrain .did you mean 'decoder"):
        train_toy(tmp_path, trains=("encoder.*", "decodr.*"))
    with pytest.raises(ConfigError, match="leaves nothing of the pretrain to train"):
        train_toy(tmp_path, trains=())


def test_precision(monkeypatch):
    def pick(precision, device="cpu"):
        return pick_precision(Train(samples=1, precision=precision), torch.device(device))

    assert (pick("fp32"), pick("bf16"), pick("auto", "mps")) == ("no", "bf16", "no")
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        pick("fp16")
    for avx, amx, expected in ((True, False, "no"), (True, True, "bf16"), (False, False, "no")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert pick("auto") == expected


def test_gradients_inside_the_forward_are_not_scaled():
    """Of l1 at 256 px a batch of 32 gives each value 1.6e-7, where the least number of fp16 is 6e-8."""
    run = override(presets.get("tiny_vfm_vae"), COMMON | {"train.precision": "fp16", "vfm.weights": "random"}).phases()[0]
    with pytest.raises(ConfigError, match=r"fp16 does not scale the gradients that adaptive weights take"):
        make_accelerator(TokenizerTask(run), device="cpu")
    plain = override(run, {"losses.vf.adaptive": False})
    with pytest.raises(ConfigError, match=r"fp16 needs a CUDA device"):
        make_accelerator(TokenizerTask(plain), device="cpu")


def test_phases_of_different_precision_in_one_process(tmp_path):
    order = ("bf16", "fp32", "bf16")
    seen = [train_toy(tmp_path, seed=i, samples=32, precision=p)[1][0].data["precision"] for i, p in enumerate(order)]
    assert seen == ["bf16", "no", "bf16"]


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    run = toy_run(samples=32)
    task, run_dir = ToyTask(run), runs.create(run, tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(fit(task, run_dir, device="cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_closing_the_generator_saves_and_frees(tmp_path):
    run = toy_run()
    run_dir, task = runs.create(run, tmp_path), ToyTask(run)
    events = fit(task, run_dir, device="cpu")
    while next(events).samples < 96:
        pass
    events.close()
    status = run_dir.status()
    assert (status.state, status.samples) == ("interrupted", 96)
    assert torch.load(run_dir.checkpoints / "state.pt", weights_only=True)["step"] == 6
    assert task.closed
    assert all(parameter.grad is None for parameter in task.objective.parameters())
    assert "forward" not in task.objective.__dict__
    gone = weakref.ref(task.weights)
    del task, events
    gc.collect()
    assert gone() is None
    again = list(fit(ToyTask(run), run_dir, device="cpu"))
    assert (again[0].data["resumed"], again[-1].kind) == (96, "finish")


class Interrupting(ToyTask):
    """Sends a signal to its own process in one of its phases."""

    def __init__(self, run, phase, number=signal.SIGINT):
        super().__init__(run)
        self.phase, self.number = phase, number
        self.objective.register_forward_hook(lambda *_: self.strike("step") if len(self.order) == 5 else None)

    def strike(self, phase):
        if phase == self.phase:
            self.phase = ""
            os.kill(os.getpid(), self.number)

    def prepare(self, run_dir, fresh):
        yield "cache", 0, 1
        self.strike("prepare")
        yield "cache", 1, 1

    def preview(self, weights):
        self.strike("preview")
        return super().preview(weights)

    def evaluate(self, weights, samples):
        self.strike("evaluate")
        return super().evaluate(weights, samples)

    def finish(self, weights, run_dir):
        self.strike("finish")
        super().finish(weights, run_dir)

    def stream(self, start_step, rows):
        for step, batch in enumerate(super().stream(start_step, rows), start_step):
            if step == 3:
                self.strike("data")
            yield batch


@pytest.mark.parametrize(
    ("phase", "saved"), [("prepare", 0), ("data", 3), ("step", 5), ("preview", 4), ("evaluate", 7), ("finish", 8)]
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_in_each_phase_lose_nothing(tmp_path, phase, saved, number):
    """The step under way is completed and saved; the run goes on and ends like an uninterrupted one."""
    run = toy_run(samples=128, evaluate_at=(100,))
    run_dir = runs.create(run, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        list(fit(Interrupting(run, phase, number), run_dir, device="cpu"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run_dir.status().state == "interrupted"
    assert run_dir.status().samples == 16 * saved
    list(fit(Interrupting(run, ""), run_dir, device="cpu"))
    whole = runs.create(run, tmp_path / "b")
    list(fit(Interrupting(run, ""), whole, device="cpu"))
    assert outcome(run_dir) == outcome(whole)


class Requesting(Interrupting):
    """Its run is asked to stop, by somebody who knows its directory only."""

    def strike(self, phase):
        if phase == self.phase:
            self.phase = ""
            runs.RunDir(self.number).request_stop()


@pytest.mark.parametrize(
    ("phase", "saved"), [("prepare", 0), ("data", 4), ("step", 5), ("preview", 5), ("evaluate", 8)]
)
def test_a_stop_request_in_each_phase_loses_nothing(tmp_path, phase, saved):
    run = toy_run(samples=128, evaluate_at=(100,))
    run_dir = runs.create(run, tmp_path / "a")
    run_dir.request_stop()  # for an earlier process: dropped
    with pytest.raises(Stopped, match="goes on"):
        list(fit(Requesting(run, phase, run_dir.path), run_dir, device="cpu"))
    assert (run_dir.status().state, run_dir.status().samples) == ("interrupted", 16 * saved)
    list(fit(Interrupting(run, ""), run_dir, device="cpu"))
    whole = runs.create(run, tmp_path / "b")
    list(fit(Interrupting(run, ""), whole, device="cpu"))
    assert outcome(run_dir) == outcome(whole)


def test_ctrl_c_in_the_consumer_is_the_consumers(tmp_path):
    """Between events the loop's handler is off: an abandoned generator swallows nobody's Ctrl-C."""
    run = toy_run()
    events = fit(ToyTask(run), runs.create(run, tmp_path), device="cpu")
    next(events)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the signal arrives a moment later
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    events.close()


def test_in_another_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.extend(train_toy(tmp_path, samples=64)[1]))
    thread.start()
    thread.join(120)
    assert done[-1].kind == "finish"


def test_errors_mark_the_run_failed(tmp_path):
    class Broken(ToyTask):
        def stream(self, start_step, rows):
            return iter([])

    run = toy_run()
    run_dir = runs.create(run, tmp_path)
    with pytest.raises(DataError, match="ended at step 0"):
        list(fit(Broken(run), run_dir, device="cpu"))
    assert run_dir.status().state == "failed"
    assert "ended at step 0" in run_dir.status().message


def test_two_processes_cannot_train_one_run(tmp_path):
    run = toy_run()
    run_dir = runs.create(run, tmp_path)
    events = fit(ToyTask(run), run_dir, device="cpu")
    next(events)
    with pytest.raises(RunError, match="is being trained by process"):
        next(fit(ToyTask(run), run_dir, device="cpu"))
    events.close()
    assert run_dir.status().state == "interrupted"


def test_out_of_memory_says_what_to_change(tmp_path):
    class Greedy(ToyTask):
        def preview(self, weights):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")

    run = toy_run()
    run_dir = runs.create(run, tmp_path)
    with pytest.raises(TrainingError, match=r"out of memory.*train\.accumulation=2.*train\.batch=8") as caught:
        list(fit(Greedy(run), run_dir, device="cpu"))
    assert "\n" not in str(caught.value)
    assert run_dir.status().state == "failed"


@pytest.mark.parametrize(("kind", "at"), [("diffusion", "diffusion.train"), ("ar", "ar.train"), ("tokenizer", "train")])
def test_advice_names_the_field_of_the_phase(kind, at):
    """`train` in the recipe of a generator is its tokenizer's: changed, it would be trained anew, and nothing be mended."""
    train = Train(samples=16, batch=16, accumulation=3, guard_patience=1)
    section = Task.section.fget(SimpleNamespace(name=kind))
    with pytest.raises(ConfigError, match=rf"^{at}\.batch 16 does not divide"):
        my_rows(SimpleNamespace(train=train, section=section), SimpleNamespace(num_processes=1, process_index=0))
    with pytest.raises(TrainingError, match=rf"set {at}\.accumulation=6 .*, {at}\.batch=8"), dryrun.exhaustion(kind, train):
        raise MemoryError
    keeper = Guard(train, section)
    keeper.in_a_row = 1
    with pytest.raises(TrainingError, match=rf"a lower {at}\.lr .*{at}\.precision=fp32, {at}\.clip .*{at}\.warmup"):
        keeper.check_patience("loss is nan", "x")


def test_dry_run_measures_and_restores(tmp_path):
    task = ToyTask(toy_run())
    before = {key: value.clone() for key, value in task.objective.state_dict().items()}
    facts = dryrun.measure(task, device="cpu")
    assert facts["seconds_per_step"] > 0
    assert facts["peak_bytes"] > 1e6
    assert (facts["batch"], facts["device"], facts["parameters"]) == (16, "cpu", 8 * 16 + 16 + 32 + 16 * 8 + 8 + 8)
    after = task.objective.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "forward" not in task.objective.__dict__


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("feature_matching", r"losses\.feature_matching reads the discriminator of losses\.adversarial, which is off"),
        ("preservation", r"losses\.preservation keeps the latent where the stage before had put it, but there is none"),
    ],
)
def test_terms_that_nothing_feeds_are_refused(name, complaint):
    run = override(presets.get("tiny_plain_vae").phases()[0], {f"losses.{name}": 1.0})
    with pytest.raises(ConfigError, match=complaint):
        TokenizerTask(run)


@pytest.mark.parametrize("changes", [{"losses.l1.until": 16, "losses.kl.until": 16, "losses.multiscale.until": 8},
                                     {"losses.l1": 0, "losses.multiscale": 0, "trains": ["decoder.*"]}])
def test_a_loss_that_reaches_nothing_is_one_line(tmp_path, changes):
    """All terms are over, or what they read is frozen."""
    run = override(presets.get("tiny_plain_vae"), COMMON | changes).phases()[0]
    with pytest.raises(TrainingError, match=r"after (16|0) images no term of the tokenizer's loss depends on anything"):
        list(fit(TokenizerTask(run), runs.create(run, tmp_path), device="cpu"))


def test_compile_keeps_the_names(tmp_path):
    """The averaged weights' names carry no compiler prefix, and the average moves."""
    run = toy_run(samples=32, compile=True)
    task = ToyTask(run)
    task.weights.compile = lambda **options: type(task.weights).compile(task.weights, backend="eager")
    list(fit(task, runs.create(run, tmp_path), device="cpu"))
    run_dir = runs.create(run, tmp_path)
    raw, ema = io.read(run_dir.model)[0], io.read(run_dir.ema)[0]
    assert raw.keys() == ema.keys() == ToyTask(run).weights.state_dict().keys()
    assert not torch.equal(ema["decoder.weight"], ToyTask(run).weights.decoder.weight)


@pytest.mark.parametrize("name", ["tiny_plain_vae", "tiny_vfm_vae", "tiny_vqgan"])
def test_a_whole_tokenizer_trains_compiled(tmp_path, monkeypatch, name):
    """Traced forward and backward, as compilers do: the numbers of the same steps without, and no step is traced anew."""
    compile_, losses = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend="aot_eager", **options))
    limits = {"recompile_limit": 8, "fail_on_recompile_limit_hit": True}  # sizes of equivariance, evaluation
    for compiled in (False, True):
        changes = {"train.samples": 96, "train.log_every": 8, "train.compile": compiled, "train.evaluate_at": []}
        run = override(presets.get(name), COMMON | changes).phases()[0]
        run_dir = runs.create(run, tmp_path / str(compiled))
        with torch._dynamo.config.patch(**limits):
            list(fit(TokenizerTask(run), run_dir, device="cpu"))
        losses.append([record["loss"] for record in run_dir.metrics("step")])
    assert len(losses[0]) == 12
    assert losses[1][:2] == pytest.approx(losses[0][:2], rel=1e-4)  # later ones show what Adam makes of roundings


@pytest.mark.parametrize("taps", [3, 5])
def test_blurs_compile_with_their_gradients(taps):
    """Traced forward and backward, as compilers do, the graph gone through twice, as adaptive weights do; same numbers."""
    blur, x = BinomialBlur(taps), torch.randn(2, 3, 6, 6, requires_grad=True)
    radius = taps // 2
    padded = torch.nn.functional.pad(x, (radius,) * 4, mode="replicate")
    kernel = torch.outer(blur.row, blur.row).expand(3, 1, -1, -1)
    expected = torch.nn.functional.conv2d(padded, kernel, groups=3)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    with torch._functorch.config.patch(donated_buffer=False):
        out = torch.compile(blur, backend="aot_eager")(x)
        assert torch.equal(out, expected)
        for _ in range(2):
            (own,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
            torch.testing.assert_close(own, gradient)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    run_dir, *_ = train_toy(tmp_path, samples=32, logger="tensorboard")
    assert list(run_dir.path.rglob("events.out.tfevents.*"))


def test_a_missing_logger_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.logger=trackio needs a package"):
        train_toy(tmp_path, samples=32, logger="trackio")


def test_numbers_that_cannot_be_had_do_not_end_a_run(tmp_path):
    """Whatever is wrong with the images that are measured: the evaluation is absent, with its reason."""

    class Unmeasured(ToyTask):
        def evaluate(self, weights, samples):
            raise DataError("all images are black") if samples == 64 else torch.linalg.LinAlgError("singular\nmore")

    run = toy_run(samples=128, evaluate_at=(64, 128))
    run_dir = runs.create(run, tmp_path)
    events = list(fit(Unmeasured(run), run_dir, device="cpu"))
    assert events[-1].kind == "finish"
    messages = [event.data["message"] for event in events if event.kind == "warning"]
    assert messages == ["no evaluation at 64 images: all images are black", "no evaluation at 128 images: singular"]
    assert [record["reason"] for record in run_dir.metrics("evaluation")] == ["all images are black", "singular"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"diffusion.alignment.block": 99}, r"alignment\.block 99: the network has blocks"),
        ({"protocol.features": "incepton"}, "protocol.features 'incepton' is no feature space.*inception"),
        ({"protocol.guidance.interval": [0.8, 0.2]}, r"interval \[0.8, 0.2\]: needs 0 <= low <= high <= 1"),
        ({"diffusion.network.patch": 3}, "network.patch 3 does not divide"),
        ({"data.val": 3}, "data.val: there are 3 held-out images; a protocol needs at least 4 .*: raise it, or"),
        ({"protocol.n": 2}, "protocol.n = 2; a protocol needs at least 4"),
        ({"protocol.reference": "/nowhere.npz", "diffusion.train.evaluate_at": []}, "'/nowhere.npz' does not exist; set protocol.reference"),
    ],
)
def test_faults_of_later_phases_show_before_the_first_step(tmp_path, changes, complaint):
    """Of the diffusion model, of its evaluation: not after the tokenizer has been trained."""
    with pytest.raises(VfmlabError, match=complaint):
        next(iter(api.train(override(presets.get("tiny_vfm_vae_repa"), {"vfm.weights": "random", **changes}), tmp_path)))
    assert not runs.scan(tmp_path)


@pytest.mark.parametrize("completes", [False, True])
def test_the_last_checkpoint_is_written_again_only_where_the_end_fills_the_weights_in(tmp_path, monkeypatch, completes):
    steps = []
    monkeypatch.setattr(checkpoint, "save", lambda run_dir, model, ema, state, facts: steps.append(state["step"]))
    monkeypatch.setattr(ToyTask, "completes", completes)
    train_toy(tmp_path, samples=32, checkpoint_every=16)
    assert steps == [1, 2] + [2] * completes


class Spied(torch.autograd.Function):
    """Passes a value through, and writes down the project's own frames that lead to its backward."""

    frames: ClassVar[list[str]] = []

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(os.path.dirname(vfmlab.__file__))]
        Spied.frames = [f"{Path(frame.filename).stem}.{frame.name}" for frame in own]
        return gradient


def test_six_frames_from_the_command_line_to_backward(tmp_path, monkeypatch):
    value = L1.value
    monkeypatch.setattr(L1, "value", lambda self, r: Spied.apply(value(self, r)))
    sets = ["train.samples=8", "train.evaluate_at=[]", "data.train=16", "data.val=8", "protocol.n=8"]
    flags = ["--until", "tokenizer", "--root", str(tmp_path), "--progress", "none", "--set", *sets]
    assert cli.main(["train", "tiny_plain_vae", *flags]) == 0
    expected = ["main.main", "training.train", "api.train", "loop.fit", "loop.take_step", "step.backward"]
    assert Spied.frames == expected, "from vfmlab train to backward: at most six frames, which read downwards"


def test_the_start_says_what_it_trains_on_and_starts_from(tmp_path):
    changes = {"tokenizer.linear_start": True, "train.samples": 8, "train.evaluate_at": [], "data.train": 16, "data.val": 8, "protocol.n": 8}
    run = override(presets.get("tiny_plain_vae"), changes)
    events = list(api.train(run, tmp_path, until="tokenizer"))
    (start,) = [event for event in events if event.kind == "start" and "resumed" in event.data]
    assert "16 images, 8 held out" in start.data["data"]
    assert "solved in closed form" in start.data["note"]
    assert "dB before the first step" in describe(start)
    assert start.data["data"] in describe(start)
    assert runs.scan(tmp_path)[0].status().data == start.data["data"]


def test_parts_that_no_memory_holds_are_one_line(tmp_path):
    """Out of memory while a part is built, before the loop begins; what no machine holds is refused as a field."""
    run = override(presets.get("tiny_plain_vae"), {"tokenizer.width": 2**44})
    with pytest.raises(TrainingError, match="out of memory in tokenizer training") as refused:
        list(api.train(run, tmp_path, until="tokenizer"))
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="'train.batch' = 1125899906842624"):
        override(run, {"train.batch": 2**50})


@pytest.mark.parametrize("field", ["train.betas", "losses.adversarial.betas"])
def test_betas_outside_their_range_are_refused(field):
    with pytest.raises(ConfigError, match="betas"):
        override(presets.get("tiny_plain_vae"), {field: [0.9, 1.0]})


def test_training_imports_no_optional_package():
    code = (
        "import sys, tempfile; from toy import train_toy; train_toy(tempfile.mkdtemp(), samples=16);"
        "bad = {'gradio', 'jupyter', 'plotly', 'papermill', 'tensorboard', 'matplotlib', 'torch_fidelity'};"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
