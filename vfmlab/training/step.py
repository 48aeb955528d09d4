"""One training step: device, precision, optimisers, and the gradients of a global batch."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import fnmatch
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, patch_environment, slice_tensors
from torch import Tensor, nn

from vfmlab.config import Train
from vfmlab.errors import ConfigError, TrainingError
from vfmlab.runs import RunDir
from vfmlab.seeding import StepRandom, derive
from vfmlab.training import muon, recompute, sharded
from vfmlab.training.average import Average
from vfmlab.training.task import Task, select

WAIT = datetime.timedelta(hours=4)  # other processes wait so long for the first one's caches and evaluations


def pick_precision(train: Train, device: torch.device, at: str = "train") -> str:
    """accelerate's name for `train.precision` on `device`: "no" (fp32), "bf16" or "fp16". at: where `train`
    stands in the recipe, for the message.

    "auto" is bf16 where it is faster: GPUs with native bf16, and CPUs with AMX; fp32 elsewhere (AVX512-BF16
    alone made matrix products and convolutions 1.4-2x slower than fp32 where it was measured).
    """
    if train.precision == "fp16" and device.type != "cuda":
        raise ConfigError(f"{at}.precision=fp16 needs a CUDA device, this is {device.type}; use auto, bf16 "
                          "or fp32")
    if train.precision != "auto":
        return "no" if train.precision == "fp32" else train.precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "no"


def on_cpu(device: str | None = None) -> bool:
    """Whether that is where a run on `device` ("cpu", or None: the best there is) computes."""
    return device == "cpu" or not torch.accelerator.is_available()


def open_processes(device: str | None = None) -> PartialState:
    """accelerate's state of this process among those that a launcher started; device: see :func:`on_cpu`.

    A group that goes through gloo is closed when the process ends: its threads may abort one that ends with
    the group open.
    """
    state = PartialState(cpu=on_cpu(device), timeout=WAIT)  # without a GPU it finds others only so
    atexit.unregister(_close)
    atexit.register(_close)
    return state


def _close() -> None:
    # not other backends, whose closing may wait for a process that failed
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def make_accelerator(task: Task, run_dir: RunDir | None = None, device: str | None = None) -> Accelerator:
    """An Accelerator for this task. run_dir: of trackers, or None. device: "cpu" keeps off accelerators."""
    # accelerate keeps one state per process; phases that follow each other may differ in precision and
    # device.
    AcceleratorState._reset_state()
    if PartialState._shared_state and PartialState().num_processes == 1:
        PartialState._reset_state()
    if task.discriminators is not None and task.train.precision == "fp16":
        raise ConfigError(f"{task.section}.precision=fp16 scales the loss for one optimiser, and "
                          "adversarial terms bring a second; use bf16, fp32 or auto")
    if task.inner and task.train.precision == "fp16":
        raise ConfigError(f"{task.section}.precision=fp16 does not scale the gradients that {task.inner} "
                          "take inside the forward, and in 16 bits these vanish; use bf16, fp32 or auto")
    precision = pick_precision(task.train, open_processes(device).device, task.section)
    logger = task.train.logger if run_dir is not None else "none"
    if logger != "none" and importlib.util.find_spec(logger) is None:
        raise ConfigError(f"{task.section}.logger={logger} needs a package that is missing: pip install "
                          f"{logger}, or set none")
    # accelerate would shard every model, in half precision throughout, and none on a CPU: see sharded.py
    with patch_environment(**{sharded.SWITCH: "false"}):
        return Accelerator(
            cpu=on_cpu(device),
            mixed_precision=precision,
            log_with=None if logger == "none" else logger,
            project_dir=None if run_dir is None else str(run_dir.path),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=task.find_unused)],
        )


def share(train: Train, at: str, processes: int) -> int:
    """Images of the global batch for each process; :class:`ConfigError` where it does not divide. at: where
    `train` stands in the recipe."""
    if train.batch % (processes * train.accumulation):
        raise ConfigError(f"{at}.batch {train.batch} does not divide into {processes} processes x "
                          f"{train.accumulation} accumulation steps; use a multiple of "
                          f"{processes * train.accumulation}")
    return train.batch // processes


def my_rows(task: Task, accelerator: Accelerator) -> slice:
    """This process's rows of the global batch."""
    rows, rank = share(task.train, task.section, accelerator.num_processes), accelerator.process_index
    return slice(rank * rows, (rank + 1) * rows)


class Prepared:
    """A task's objective and discriminators in accelerate's wrappers, and what a step on them needs.

    Attributes:
        parameters: all of the objective that train. rows: this process's rows of the global batch.
        optimizers: of the objective and, where there are discriminators, theirs.
        sharded: each process has a share of the objective. plain: then, on the first process, weights of its
        own for what needs a whole network.

    average: of the weights, which is sharded with them.
    """

    def __init__(self, task: Task, accelerator: Accelerator, average: Average | None = None):
        self.task, self.accelerator, self.rows = task, accelerator, my_rows(task, accelerator)
        self.sharded, self.plain = sharded.asked(task), None
        self.recomputed = recompute.start(task.weights) if task.train.recompute else []
        if task.train.compile:
            # adaptive weights go through the graph before backward does
            torch._functorch.config.donated_buffer = False
            for module in task.compiled:
                module.compile(dynamic=False)  # equivariance has few sizes: a graph for each
        if self.sharded:
            self.plain = sharded.start(task, average, accelerator.device)
        self.parameters = select(task)
        # of a sharded one accelerate does no more than the precision
        self.objective = accelerator.prepare_model(task.objective, device_placement=not self.sharded,
                                                   evaluation_mode=self.sharded)
        self.discriminators = (
            None if task.discriminators is None else accelerator.prepare(task.discriminators)
        )
        self.optimizers = [accelerator.prepare(each)
                           for each in make_optimizers(task, self.parameters, accelerator.device,
                                                       accelerator.mixed_precision != "no")]

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[nn.Module | None]:
        """`module` (the weights or their average) for a forward pass outside training: itself, or of a
        sharded one a copy on the first process, which all have to make together, and None elsewhere."""
        if not self.sharded:
            yield module
            return
        state = sharded.gathered(module.state_dict())
        if self.plain is None:
            yield None
            return
        self.plain.load_state_dict(state)
        try:
            yield self.plain.to(self.accelerator.device)
        finally:
            self.plain.cpu()

    def release(self) -> None:
        """Undo what was done to the task's modules, and let go of gradients."""
        recompute.stop(self.recomputed)
        for prepared, own in ((self.objective, self.task.objective),
                              (self.discriminators, self.task.discriminators)):
            if prepared is not None:
                self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
                # the class's own again, not a bound copy: a module must stay copyable
                own.__dict__.pop("forward", None)
                own.zero_grad(set_to_none=True)


def make_optimizers(task: Task, parameters: list[nn.Parameter], device: torch.device,
                    half: bool = False) -> list[torch.optim.Optimizer]:
    """The optimiser of `parameters`, and another of the discriminators' (Adam or AdamW) where there are any.

    Weight decay acts on matrices only; `train.lr_for` makes groups. Discriminators have their own learning
    rates and betas, and no weight decay. half: Muon's products in bf16, as where the run's own are.
    """
    train = task.train
    factors = lr_factors(train.lr_for, [name for name, _ in task.weights.named_parameters()], task.section)
    by_id = {id(p): factors.get(name, 1.0) for name, p in task.weights.named_parameters()}
    is_muon = train.optimizer == "muon"
    inside = muon.matrices(task.weights) if is_muon else set()
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        decay = train.weight_decay if parameter.ndim > 1 else 0.0
        key = (by_id.get(id(parameter), 1.0), decay, id(parameter) in inside)
        groups.setdefault(key, []).append(parameter)
    listed = []
    for (factor, decay, matrices), of in groups.items():
        lr = (train.matrix_lr or muon.LR) if matrices else train.lr
        listed.append({"params": of, "lr": lr * factor, "weight_decay": decay}
                      | ({"matrices": matrices} if is_muon else {}))
    options = {"lr": train.lr, "betas": train.betas, "weight_decay": 0.0,
               "fused": device.type in ("cpu", "cuda")}
    adam = torch.optim.Adam if train.optimizer == "adam" else torch.optim.AdamW
    if is_muon:
        optimizers = [muon.Muon(listed, torch.bfloat16 if half else torch.float32, **options)]
    else:
        optimizers = [adam(listed, **options)]
    if task.discriminators is not None:
        optimizers.append(adam(task.discriminators.groups(train), **options))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["initial_lr"] = group["lr"]  # what the schedule multiplies
    return optimizers


def lr_factors(globs: dict[str, float], names: list[str], at: str = "train") -> dict[str, float]:
    """`train.lr_for`: name -> factor; :class:`ConfigError` for a glob that matches no parameter. at: where
    `train` stands in the recipe."""
    factors: dict[str, float] = {}
    for glob, value in globs.items():
        hits = fnmatch.filter(names, glob)
        if not hits:
            part = names[0].split(".")[0]
            raise ConfigError(f"{at}.lr_for: '{glob}' matches no parameter; name a part such as '{part}.*'")
        factors |= dict.fromkeys(hits, value)
    return factors


def backward(on: Prepared, batch: Any, step: int, samples: int) -> dict[str, Tensor]:
    """Forward and backward of all accumulation steps of step `step`; gradients are means over the global
    batch.

    Args:
        batch: this process's rows of the global batch, on the device. samples: images seen before; they
            decide which terms are on and whether the discriminators learn.

    Returns:
        this process's means of the loss and the metrics.

    Raises:
        TrainingError: the loss depends on nothing that trains.
    """
    task, acc, train = on.task, on.accelerator, on.task.train
    others = (
        on.discriminators if on.discriminators is not None and task.discriminators.learns(samples) else None
    )
    size = (on.rows.stop - on.rows.start) // train.accumulation
    means: dict[str, Tensor] = {}
    for part in range(train.accumulation):
        low, high = part * size, (part + 1) * size
        micro = batch if train.accumulation == 1 else slice_tensors(batch, slice(low, high))
        cut = slice(on.rows.start + low, on.rows.start + high)
        with contextlib.ExitStack() as stack:
            if part < train.accumulation - 1:
                for module in (on.objective, *([] if others is None else [others])):
                    stack.enter_context(acc.no_sync(module))
            loss, metrics, *pairs = on.objective(micro,
                                                 StepRandom(task.seed, step, train.batch, cut, acc.device),
                                                 samples)
            if not loss.requires_grad:
                raise TrainingError(f"after {samples} images no term of the {task.name}'s loss depends on "
                                    "anything that trains: its terms are over ('until') or have not begun "
                                    "('start'), or 'trains' leaves out what they read; change one of these")
            acc.backward(loss / train.accumulation)
            if others is not None:  # their random numbers keep the name they had in earlier versions
                rng = StepRandom(derive("opponent", task.seed), step, train.batch, cut, acc.device)
                other, more = others(*pairs, rng, samples)
                acc.backward(other / train.accumulation)
                metrics = metrics | more
        for key, value in {"loss": loss, **metrics}.items():
            value = value.detach().float() / train.accumulation
            means[key] = means[key] + value if key in means else value
    return means
