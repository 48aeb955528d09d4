"""The state of a run between two steps: all that is saved, and all that a resumed run needs.

Random numbers and data of step k are made from (seed, k), so no random state is in here.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.utils import get_total_norm

from vfmlab.errors import TrainingError
from vfmlab.runs import RunDir
from vfmlab.training import checkpoint, sharded
from vfmlab.training.average import Average
from vfmlab.training.guards import Guard
from vfmlab.training.task import Task
from vfmlab.weights import io

RECORDS = {"log": "step", "evaluate": "evaluation"}  # what is done between steps -> kind of record it leaves


class State:
    """Counts and running means from the start; the average joins in :meth:`restore`, optimisers in
    :meth:`begin`.

    Attributes:
        step: completed steps. done: what has been done since the last of them; a resumed run does the rest.
        sums: metric -> [sum, count] since the last log. seconds: spent training.
        guard, average: as in their own files. optimizers: of the objective and, where there are any, of the
        discriminators.
        scaler: that of fp16, or None.
    """

    average: Average
    optimizers: list[torch.optim.Optimizer]
    scaler: Any = None

    def __init__(self, task: Task):
        self.task = task
        self.guard = Guard(task.train, task.section)
        self.step, self.seconds = 0, 0.0
        self.done: list[str] = []
        self.sums: dict[str, list[float]] = {}
        self._saved: dict[str, Any] | None = None

    @property
    def samples(self) -> int:
        return self.step * self.task.train.batch

    @property
    def resumed(self) -> bool:
        return self._saved is not None

    def load(self, run_dir: RunDir) -> None:
        """Read the run's checkpoint, if there is one: weights and step now, the rest in `restore` and
        `begin`."""
        saved = checkpoint.load(run_dir)
        if saved is not None:
            model, ema, state = saved
            io.load(self.task.weights, model, "model.safetensors")
            self.step, self._saved = state["step"], {"ema": ema, **state}

    @torch.no_grad()
    def restore(self) -> None:
        """Average weights from here on; average, losses and discriminators take what :meth:`load` read."""
        self.average = Average(self.task.weights, self.task.train)
        if self._saved is None:
            return
        saved = self._saved
        if self.average.ema is not None:
            io.load(self.average.module, saved["ema"], "ema.safetensors")
        del saved["ema"]
        others = self._others()
        io.check(others, saved["others"], "state.pt")
        for key, value in others.items():
            value.copy_(saved["others"][key])
        if self.task.discriminators is not None:
            io.load(self.task.discriminators, saved["discriminators"], "state.pt")

    def begin(self, optimizers: list[torch.optim.Optimizer], scaler: Any) -> None:
        """Take up optimisers and scaler, and restore the rest of what :meth:`load` read."""
        self.optimizers, self.scaler = optimizers, scaler
        saved, self._saved = self._saved, None
        if saved is None:
            return
        optimizers[0].load_state_dict(sharded.cut(saved["optimizer"], optimizers[0]))
        if self.task.discriminators is not None:
            optimizers[1].load_state_dict(saved["discriminator_optimizer"])
        self.guard.load_state_dict(saved["guard"])
        self.average.updates, self.sums, self.seconds = saved["updates"], saved["sums"], saved["seconds"]
        self.done = saved["done"]
        if scaler is not None and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])

    def save(self, run_dir: RunDir) -> None:
        """Write the checkpoint; :class:`TrainingError` if weights are not finite or the disk is full.

        The first process calls it; of a sharded run all do, and the first one writes.
        """
        trained = [p for p in self.task.objective.parameters() if p.requires_grad]
        size = sharded.whole(get_total_norm(trained))
        model, ema, optimizer, others = sharded.gathered(
            [self.task.weights.state_dict(), self.average.module.state_dict(),
             self.optimizers[0].state_dict(), self._others()])
        if not PartialState().is_main_process:
            return
        floats = [value for state in (model, ema) for value in state.values() if value.is_floating_point()]
        if not torch.isfinite(size + get_total_norm(floats)):
            at, lr = self.task.section, self.task.train.lr
            raise TrainingError(f"weights are not finite at step {self.step}, so they are not saved; the "
                                f"last checkpoint is intact: lower {at}.lr (now {lr:g}) or set "
                                f"{at}.precision=fp32")
        state = {
            "step": self.step,
            "done": self.done,
            "sums": self.sums,
            "seconds": self.seconds,
            "updates": self.average.updates,
            "optimizer": optimizer,
            **self._discriminators(),
            "guard": self.guard.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "others": {key: value.detach().cpu() for key, value in others.items()},
        }
        facts = {"samples": self.samples, "ema_samples": self.average.samples, **self.task.facts()}
        checkpoint.save(run_dir, model, ema, state, facts)

    def records_done(self) -> set[str]:
        """Kinds of records that belong to the last step: what else a killed run had logged is dropped."""
        return {"bad", *(RECORDS.get(name, name) for name in self.done)}

    def add(self, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            entry = self.sums.setdefault(key, [0.0, 0])
            entry[0], entry[1] = entry[0] + value, entry[1] + 1

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        means = {key: total / count for key, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def buffers(self) -> dict[str, Tensor]:
        """Buffers that a forward may change (running statistics), by name."""
        values = {}
        for prefix, module in zip(("", "discriminators."), self.task.modules, strict=False):
            state = module.state_dict()
            values |= {prefix + name: buffer for name, buffer in module.named_buffers() if name in state}
        return values

    def _discriminators(self) -> dict[str, Any]:
        if self.task.discriminators is None:
            return {}
        weights = {key: value.detach().cpu() for key, value in self.task.discriminators.state_dict().items()}
        return {"discriminators": weights, "discriminator_optimizer": self.optimizers[1].state_dict()}

    def _others(self) -> dict[str, Tensor]:
        """Tensors of the objective that are not part of the weights: parameters and buffers of losses."""
        objective, weights = self.task.objective, self.task.weights
        prefix = next(name for name, module in objective.named_modules() if module is weights)
        every = objective.state_dict()
        return {key: value for key, value in every.items() if prefix and not key.startswith(prefix + ".")}
