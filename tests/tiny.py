"""Tiny real runs for tests of training, and a program that trains one and is killed in the middle of a step."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from toy import ToyTask, outcome, toy_run

from vfmlab import api, presets, runs
from vfmlab.config import override
from vfmlab.registry import TOKENIZERS
from vfmlab.seeding import generator
from vfmlab.tokenizers.base import Statistics
from vfmlab.training.ar import ARTask
from vfmlab.training.diffusion import DiffusionTask
from vfmlab.training.loop import fit
from vfmlab.training.tokenizer import TokenizerTask

KINDS = ("toy", "game", "vfm_vae", "diffusion", "diffusion_fresh", "ar")
GAME = {"vfm.weights": "random", "losses.adversarial.start": 16, "equivariance": {"p_latent": 0.25, "p_prior": 0.25, "scales": [0.5, 1.0]}}
COMMON = {"data.train": 48, "data.val": 16, "data.flip": True, "protocol.n": 16}


def common(run):
    """COMMON for a recipe: captions are not mirrored."""
    return COMMON | ({} if getattr(run.generator, "text", None) is None else {"data.flip": False})


def tiny_run(kind, **overrides):
    """The config of the one phase that `kind` trains: 8 steps of 8 images, a checkpoint after 4."""
    if kind == "toy":
        return toy_run(samples=128, batch=16, checkpoint_every=64, evaluate_at=(64, 128))
    if kind == "vfm_vae":
        run = override(presets.get("tiny_vfm_vae"), {"vfm.weights": "random"} | COMMON | overrides)
    elif kind == "game":  # VF loss and discriminator, both weighed by gradients; the game begins with the third step
        run = override(presets.get("tiny_va_vae"), GAME | COMMON | overrides)
    elif kind in ("ar", "text"):
        run = presets.get({"ar": "tiny_ar_orders", "text": "tiny_t2i_plain_vae"}[kind])
        run = override(run, common(run) | overrides)
    else:
        fresh = {"diffusion.cache": False} if kind == "diffusion_fresh" else {}
        run = override(presets.get("tiny_plain_vae"), COMMON | fresh | overrides)
    return run.last if kind.startswith(("diffusion", "ar", "text")) else run.phases()[0]


def make_task(run, root):
    """The task of `run`; generators get an untrained tokenizer with made-up statistics."""
    tasks = {"pretrain": ToyTask, "tokenizer": TokenizerTask}
    if run.kind in tasks:
        return tasks[run.kind](run)
    return {"diffusion": DiffusionTask, "ar": ARTask}[run.kind](run, untrained(run), cache_root=root / ".latents")


def untrained(run):
    """The tokenizer of `run` with seeded weights and statistics, so that every process makes the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tokenizer = TOKENIZERS.get(run.tokenizer.method)(run.tokenizer, run.data.size, api.build_tokenizer(run).vfm)
    ones = torch.ones(run.tokenizer.channels)
    tokenizer.set_statistics(Statistics(0.1 * ones, 2 * ones, 5, "made up"))
    return tokenizer


def train_tiny(kind, root, until=None, **overrides):
    run = tiny_run(kind, **overrides)
    run_dir = runs.create(run, root)
    task = make_task(run, root)
    return run_dir, list(fit(task, run_dir, until=until, device="cpu"))


def outcome_of(root, run):
    """What must not depend on how often `run` was interrupted."""
    return outcome(runs.create(run, root))


def main():
    """argv: JSON of one job, see :func:`work`, or of a list of them, each for a process of its own.

    Of a list, it writes how each process ended: a list of exit codes, minus the signal where one killed it. Jobs with
    a `port` are for all processes of a launcher: they meet there, and each writes its code to the file `root`.rank.
    """
    jobs = json.loads(sys.argv[1])
    if isinstance(jobs, dict):
        work(jobs)
        return
    for name in ("torch._dynamo", "timm"):  # what optimisers and networks import: once for all
        importlib.import_module(name)
    ends = []
    for job in jobs:
        port = job.pop("port", None)
        if (process := os.fork()) == 0:
            if port is not None:  # the launcher's own store would hold what the job before wrote
                os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="False")
            work(job)
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        if port is not None:
            Path(f"{job['root']}.{os.environ['RANK']}").write_text(str(ends[-1]))
    sys.stdout.write(json.dumps(ends))


def work(options):
    """Train as `options` say: kind, root, `overrides` (of real runs) or fields of the toy, and what should go wrong.

    kill_step, kill_rename: signal 9 in the middle of that step, at that rename. poison_rank: the process whose loss is
    not finite in step 4. interrupt_step: in the middle of that step the first process sends Ctrl-C to its launcher.
    stops: samples after which training stops, to go on from there by a task of its own; None: its end.
    """
    root, kind, overrides = Path(options.pop("root")), options.pop("kind"), options.pop("overrides", {})
    kill_step, kill_rename = options.pop("kill_step", None), options.pop("kill_rename", None)
    rank, interrupt_step = int(os.environ.get("RANK", 0)), options.pop("interrupt_step", None)
    poison = {3: float("nan")} if options.pop("poison_rank", None) == rank else None
    stops = options.pop("stops", [None])
    if options:
        extra = {key: options.pop(key) for key in ("norm", "delay") if key in options}
        run = toy_run(**options)
        task = ToyTask(run, poison=poison, **extra)
    else:
        run = tiny_run(kind, **overrides)
        task = make_task(run, root)
    count = {"forward": 0, "rename": 0}

    def strike(what, at):
        count[what] += 1
        if count[what] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        if (what, rank, count[what]) == ("forward", 0, interrupt_step):
            os.kill(os.getppid(), signal.SIGINT)

    replace = os.replace

    def rename(old, new):
        if "checkpoints" in str(new):
            strike("rename", kill_rename)
        replace(old, new)

    os.replace = rename
    task.objective.register_forward_hook(lambda *_: strike("forward", kill_step))
    for until in stops:
        list(fit(task or make_task(run, root), runs.create(run, root), until=until, device="cpu"))
        task = None


def awake(network):
    """`network` without its zero initialisation, so that the output depends on everything."""
    g = generator("awake")
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))
    return network


if __name__ == "__main__":
    main()
