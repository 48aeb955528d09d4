"""The parts of one training step that training and the dry run share: device, precision, optimiser, gradients."""

from __future__ import annotations

import contextlib
import datetime
import fnmatch
import importlib.util
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from vfmlab.config import Train
from vfmlab.errors import ConfigError
from vfmlab.runs import RunDir
from vfmlab.seeding import StepRandom, derive
from vfmlab.training.task import Task, apply

WAIT = datetime.timedelta(hours=4)  # other processes wait so long for the first one's caches and evaluations


def pick_precision(train: Train, device: torch.device) -> str:
    """accelerate's name for `train.precision` on `device`: "no" (fp32), "bf16" or "fp16".

    "auto" is bf16 where it is faster: GPUs with native bf16, and CPUs with AMX; fp32 elsewhere (AVX512-BF16
    alone made matrix products and convolutions 1.4-2x slower than fp32 where it was measured).
    """
    if train.precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"train.precision=fp16 needs a CUDA device, this is {device.type}; use auto, bf16 or fp32")
    if train.precision != "auto":
        return "no" if train.precision == "fp32" else train.precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "no"


def make_accelerator(task: Task, run_dir: RunDir | None = None, device: str | None = None) -> Accelerator:
    """An Accelerator for this task. run_dir: where trackers write; None: none. device: "cpu" keeps off accelerators."""
    # accelerate keeps one state per process; phases that follow each other may differ in precision and device.
    AcceleratorState._reset_state()
    if PartialState._shared_state and PartialState().num_processes == 1:
        PartialState._reset_state()
    if task.opponent is not None and task.train.precision == "fp16":
        raise ConfigError("train.precision=fp16 scales the loss for one optimiser, and adversarial terms bring a second; use bf16, fp32 or auto")
    precision = pick_precision(task.train, PartialState(cpu=device == "cpu", timeout=WAIT).device)
    logger = task.train.logger if run_dir is not None else "none"
    if logger != "none" and importlib.util.find_spec(logger) is None:
        raise ConfigError(f"train.logger={logger} needs a package that is missing: pip install {logger}, or set none")
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=precision,
        log_with=None if logger == "none" else logger,
        project_dir=None if run_dir is None else str(run_dir.path),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.find_unused)],
    )


def release(task: Task, objective: nn.Module, opponent: nn.Module | None, accelerator: Accelerator) -> None:
    """Undo what accelerate's prepare did to the task's modules, and let go of gradients and accelerate's references."""
    for prepared, own in ((objective, task.objective), (opponent, task.opponent)):
        if prepared is not None:
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
            own.__dict__.pop("forward", None)  # the class's own again, not a bound copy: a module must stay copyable
            own.zero_grad(set_to_none=True)
    accelerator.free_memory()


def my_rows(train: Train, accelerator: Accelerator) -> slice:
    """This process's rows of the global batch; :class:`ConfigError` where the batch does not divide."""
    processes = accelerator.num_processes
    if train.batch % (processes * train.accumulation):
        raise ConfigError(
            f"train.batch {train.batch} does not divide into {processes} processes x {train.accumulation} "
            f"accumulation steps; use a multiple of {processes * train.accumulation}"
        )
    share = train.batch // processes
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def make_optimizer(task: Task, parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """Adam or AdamW over `parameters`; weight decay, if any, acts on matrices only; `lr_for` makes groups."""
    train = task.train
    factors = lr_factors(train.lr_for, [name for name, _ in task.weights.named_parameters()])
    by_id = {id(p): factors.get(name, 1.0) for name, p in task.weights.named_parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        decay = train.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((by_id.get(id(parameter), 1.0), decay), []).append(parameter)
    listed = [{"params": of, "lr": train.lr * factor, "weight_decay": decay} for (factor, decay), of in groups.items()]
    return _adam(listed, train, device)


def make_opponent_optimizer(task: Task, device: torch.device) -> torch.optim.Optimizer:
    """The discriminators' optimiser: the run's kind, with their own learning rates and betas, without weight decay."""
    return _adam(task.opponent.groups(task.train), task.train, device)


def _adam(groups: list[dict[str, Any]], train: Train, device: torch.device) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    found = kind(groups, lr=train.lr, betas=train.betas, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))
    for group in found.param_groups:
        group["initial_lr"] = group["lr"]  # what the schedule multiplies
    return found


def lr_factors(globs: dict[str, float], names: list[str]) -> dict[str, float]:
    """`train.lr_for` on parameter names: name -> factor; :class:`ConfigError` for a glob that matches nothing."""
    found: dict[str, float] = {}
    for glob, value in globs.items():
        hits = fnmatch.filter(names, glob)
        if not hits:
            raise ConfigError(f"train.lr_for: '{glob}' matches no parameter; name a part such as '{names[0].split('.')[0]}.*'")
        found |= dict.fromkeys(hits, value)
    return found


def backward(
    task: Task,
    objective: nn.Module,
    accelerator: Accelerator,
    batch: Any,
    rows: slice,
    step: int,
    opponent: nn.Module | None = None,
    samples: int | None = None,
) -> dict[str, Tensor]:
    """Forward and backward of all accumulation steps of step `step`; gradients are means over the global batch.

    objective, opponent: `task.objective` and, if it takes this step, `task.opponent`, as accelerate prepared them.
    batch: rows `rows` of the global batch, on the device. samples: images seen before; None: all of the steps before.
    Returns this process's means of the loss and the metrics.
    """
    train, samples = task.train, step * task.train.batch if samples is None else samples
    size = (rows.stop - rows.start) // train.accumulation
    means: dict[str, Tensor] = {}
    for part in range(train.accumulation):
        low, high = part * size, (part + 1) * size
        micro = batch if train.accumulation == 1 else apply(batch, lambda tensor, a=low, b=high: tensor[a:b])
        cut = slice(rows.start + low, rows.start + high)
        rng = StepRandom(task.seed, step, train.batch, cut, accelerator.device)
        with contextlib.ExitStack() as stack:
            if part < train.accumulation - 1:
                stack.enter_context(accelerator.no_sync(objective))
                if opponent is not None:
                    stack.enter_context(accelerator.no_sync(opponent))
            loss, metrics, *handed = objective(micro, rng, samples)
            accelerator.backward(loss / train.accumulation)
            if opponent is not None:
                other, more = opponent(*handed, StepRandom(derive("opponent", task.seed), step, train.batch, cut, accelerator.device), samples)
                accelerator.backward(other / train.accumulation)
                metrics = metrics | more
        for key, value in {"loss": loss, **metrics}.items():
            value = value.detach().float() / train.accumulation
            means[key] = means[key] + value if key in means else value
    return means
