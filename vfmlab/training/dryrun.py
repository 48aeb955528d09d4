"""Memory: a few real steps before the long run, and the one line that says what to change when it is out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import psutil
import torch
from accelerate.utils import recursively_apply
from torch import Tensor

from vfmlab.config import Train
from vfmlab.errors import TrainingError
from vfmlab.training.step import Prepared, backward, make_accelerator, make_optimizers
from vfmlab.training.task import Task, section

# What torch says where the CPU has not so much memory, or no number is large enough for the size asked for.
EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory", "calculation overflowed",
             "would overflow")


def measure(task: Task, device: str | None = None, steps: int = 3) -> dict[str, Any]:
    """Seconds and peak memory of a training step of `task`, which is left as it was.

    Runs whole steps (forward, backward, optimiser) at the full batch on `task.example(rows)`, those of
    `task.costly_steps` (full resolution where steps differ), with the memory of the average set aside.

    Returns:
        "seconds_per_step" (median without the first), "peak_bytes" (device memory on CUDA, of the process
        elsewhere), "device", "precision", "batch", "parameters" (those that train).

    Raises:
        TrainingError: out of memory, with what to change.
    """
    accelerator = make_accelerator(task, None, device)
    for module in task.modules:
        module.to(accelerator.device).train()
    prepared = Prepared(task, accelerator)
    try:
        with exhaustion(task.name, task.train):
            average = [value.detach().clone() for value in task.weights.state_dict().values()]
        costs = measure_prepared(prepared, steps)
        del average
        return costs
    finally:
        prepared.release()


def measure_prepared(on: Prepared, steps: int = 3) -> dict[str, Any]:
    """:func:`measure` for modules that accelerate has prepared, with whatever average there is; all processes
    take part."""
    task, device = on.task, on.accelerator.device
    before = [{key: value.detach().cpu().clone() for key, value in module.state_dict().items()}
              for module in task.modules]
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with exhaustion(task.name, task.train):
            half = on.accelerator.mixed_precision != "no"
            optimizers = make_optimizers(task, on.parameters, device, half)  # whose state is thrown away
            batch = recursively_apply(Tensor.to, task.example(on.rows), device)
            for step in task.costly_steps(steps):
                begin = time.perf_counter()
                samples = (
                    step * task.train.batch if task.discriminators is None else task.discriminators.all_on()
                )
                backward(on, batch, step, samples)
                torch.nn.utils.clip_grad_norm_(on.parameters, task.train.clip or math.inf)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - begin)
            memory = (
                torch.cuda.max_memory_allocated(device) if device.type == "cuda"
                else psutil.Process().memory_info().rss
            )
    finally:
        optimizers = None
        for module, state in zip(task.modules, before, strict=True):
            module.zero_grad(set_to_none=True)
            module.load_state_dict(state)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {
        "seconds_per_step": median(seconds[1:] or seconds),
        "peak_bytes": int(memory),
        "device": str(device),
        "precision": {"no": "fp32"}.get(on.accelerator.mixed_precision, on.accelerator.mixed_precision),
        "batch": task.train.batch,
        "parameters": sum(parameter.numel() for parameter in on.parameters),
    }


@contextlib.contextmanager
def exhaustion(name: str, train: Train) -> Iterator[None]:
    """Turns running out of memory into a :class:`TrainingError` of one line that says what to change.

    name: of the phase.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(part in text.lower() for part in EXHAUSTED):
            raise
        half, at = max(1, train.batch // 2), section(name)
        advice = f"set {at}.accumulation={2 * train.accumulation} (same result), {at}.batch={half}"
        if train.precision == "fp32":
            advice += f", {at}.precision=auto"
        first = f" ({text.splitlines()[0][:100]})" if text else ""
        where = f"{name} training at batch {train.batch}, accumulation {train.accumulation}"
        raise TrainingError(f"out of memory in {where}: {advice}, or a smaller model{first}") from None
