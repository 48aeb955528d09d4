"""Networks that do not fit one device: every process holds a share of parameters, gradients, average and
optimiser state.

`accelerate launch --use_fsdp` asks for it; torch's `fully_shard` (FSDP2) does it, block by block. Precision
is autocast's as without it: shares, reductions and losses are fp32. Checkpoints hold whole tensors, so that a
run goes on with any number of processes, sharded or not.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vfmlab.errors import ConfigError
from vfmlab.training import recompute
from vfmlab.training.average import Average
from vfmlab.training.task import Task

SWITCH = "ACCELERATE_USE_FSDP"
# accelerate's options that would change what a run computes or where -> what does it here
REFUSED = {"FSDP_OFFLOAD_PARAMS": "use more processes, or {at}.recompute=true",
           "FSDP_ACTIVATION_CHECKPOINTING": "set {at}.recompute=true"}


def asked(task: Task) -> bool:
    """Whether this launch shards `task`; :class:`ConfigError` for what cannot be done sharded.

    What trains a tokenizer is not sharded: it trains as without the option.
    """
    if not (parse_flag_from_env(SWITCH) and task.shards and PartialState().num_processes > 1):
        return False
    for name, way in REFUSED.items():
        if parse_flag_from_env(name):
            raise ConfigError(f"FSDP with {name}=true is not supported; {way.format(at=task.section)}")
    if task.train.compile:
        raise ConfigError(f"FSDP with {task.section}.compile is not supported; set it to false, or launch "
                          "without --use_fsdp")
    if task.train.precision == "fp16":
        raise ConfigError(f"FSDP with {task.section}.precision=fp16 is not supported; use bf16, fp32 or "
                          "auto")
    return True


def start(task: Task, average: Average | None, device: torch.device) -> nn.Module | None:
    """Leave each process its share of the task's objective and of the average, on `device`.

    Both come from the host's memory, where every process has them whole.

    Returns:
        a copy of the weights on the host, for what needs a whole network; the first process has it alone.
    """
    plain = None
    if PartialState().is_main_process:
        plain = copy.deepcopy(task.weights).requires_grad_(False).eval()
    mesh = init_device_mesh(device.type, (PartialState().num_processes,))
    reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "").lower() != "false"
    for block in recompute.blocks(task.weights):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(task.objective, mesh=mesh)
    if average is not None and average.ema is not None:
        fully_shard(average.ema.module, mesh=mesh)
        average.ema.foreach = False  # one operation takes shares or buffers, not both
    return plain


def whole(value: Any) -> Any:
    """A tensor as it is without shards; all processes take part. Other values stay as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(state: Any) -> Any:
    """A nest of tensors (a state dict, an optimiser's state) with the shares in it made whole, on the first
    process's host; on the others None stands for them. All processes take part."""
    main = PartialState().is_main_process

    def gather(value: Tensor) -> Tensor | None:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if main else None

    return recursively_apply(gather, state)


def cut(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole optimiser's state as `optimizer`, whose parameters may be shares, takes it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {}
    for number, entries in state["state"].items():
        like = parameters[number]
        shards[number] = {key: share(value, like) if value.shape == like.shape else value
                         for key, value in entries.items()}
    return {**state, "state": shards}


def share(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of a tensor that all have, cut as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
