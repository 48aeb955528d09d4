"""Memory dry run: a few real steps before the long run, so that it does not run out of memory hours in."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from vfmlab.errors import TrainingError
from vfmlab.training.step import backward, make_accelerator, make_opponent_optimizer, make_optimizer, my_rows, release
from vfmlab.training.task import Task, apply, select


def measure(task: Task, device: str | None = None, steps: int = 3) -> dict[str, Any]:
    """Seconds and peak memory of a training step of `task`, which is left as it was.

    Runs whole steps (forward, backward, optimiser) at the full batch on `task.example(rows)`, those of
    `task.costly_steps` (full resolution where steps differ), with the memory of the average set aside.

    Returns:
        "seconds_per_step" (median without the first), "peak_bytes" (device memory on CUDA, of the process elsewhere),
        "device", "precision", "batch", "parameters" (those that train).

    Raises:
        TrainingError: out of memory, with what to change.
    """
    accelerator = make_accelerator(task, None, device)
    task.objective.to(accelerator.device).train()
    objective = accelerator.prepare(task.objective)
    opponent = None if task.opponent is None else accelerator.prepare(task.opponent.to(accelerator.device).train())
    try:
        return measure_prepared(task, objective, opponent, accelerator, steps)
    finally:
        release(task, objective, opponent, accelerator)


def measure_prepared(
    task: Task, objective: nn.Module, opponent: nn.Module | None, accelerator: Accelerator, steps: int = 3
) -> dict[str, Any]:
    """:func:`measure` for modules that accelerate has prepared; all processes take part."""
    rows, device = my_rows(task.train, accelerator), accelerator.device
    parameters = select(task)
    modules = [module for module in (task.objective, task.opponent) if module is not None]
    before = [{key: value.detach().cpu().clone() for key, value in module.state_dict().items()} for module in modules]
    samples = None if opponent is None else task.opponent.all_on()
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        optimizer = make_optimizer(task, parameters, device)
        other = None if opponent is None else make_opponent_optimizer(task, device)
        batch = apply(task.example(rows), lambda tensor: tensor.to(device))
        average = [value.detach().clone() for value in task.weights.state_dict().values()]  # what the average takes
        for step in task.costly_steps(steps):
            begin = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            backward(task, objective, accelerator, batch, rows, step, opponent, samples)
            torch.nn.utils.clip_grad_norm_(parameters, task.train.clip)
            optimizer.step()
            if other is not None:
                other.step()
                other.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
        del average
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise out_of_memory(task, str(error)) from None
    finally:
        optimizer = other = None
        for module, state in zip(modules, before, strict=True):
            module.zero_grad(set_to_none=True)
            module.load_state_dict(state)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "seconds_per_step": median(seconds[1:] or seconds),
        "peak_bytes": int(peak),
        "device": str(device),
        "precision": {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "batch": task.train.batch,
        "parameters": sum(parameter.numel() for parameter in parameters),
    }


def out_of_memory(task: Task, detail: str = "") -> TrainingError:
    """The error that says what to change."""
    train, half = task.train, max(1, task.train.batch // 2)
    advice = f"set train.accumulation={2 * train.accumulation} (same result), train.batch={half}"
    if train.precision == "fp32":
        advice += ", train.precision=auto"
    first = f" ({detail.splitlines()[0][:100]})" if detail else ""
    where = f"{task.name} training at batch {train.batch}, accumulation {train.accumulation}"
    return TrainingError(f"out of memory in {where}: {advice}{first}")
