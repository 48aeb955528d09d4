"""What evaluations during training share: opened once, because real images do not change between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from vfmlab.runs import RunDir
from vfmlab.training import loop
from vfmlab.training.task import Task

if TYPE_CHECKING:  # imported where a run is evaluated
    from vfmlab.evaluation.number import Report
    from vfmlab.evaluation.protocol import Setup


def setup(task: Task) -> Setup:
    """Held-out images, feature space and reference of the run's protocol."""
    from vfmlab.evaluation.protocol import open_setup

    if task._setup is None:
        task._setup = open_setup(task.run.data, task.run.protocol, task.root, task.device)
    return task._setup


def alive(task: Task) -> Callable[[int, int], None]:
    """The progress of an evaluation: signs of life in the run's status. Some evaluations take longer than the
    time after which another machine counts a silent run as dead."""
    folder, last = RunDir(Path(task.root) / task.run.id), time.time()

    def progress(done: int, of: int) -> None:
        nonlocal last
        if time.time() - last > loop.BEAT:
            last = time.time()
            folder.set_status()

    return progress


def generated(task: Task, network: nn.Module, tokenizer: nn.Module) -> Report:
    """Numbers of a generator's samples. Reconstructions change only where the tokenizer trains too."""
    from vfmlab.evaluation.generation import evaluate_generation
    from vfmlab.evaluation.reconstruction import measure

    data, protocol, progress = task.run.data, task.run.protocol, alive(task)
    if task._baseline is None or tokenizer is not task.tokenizer:
        task._baseline = measure(tokenizer, data, protocol, setup(task), progress)
    return evaluate_generation(network, tokenizer, data, protocol, task.num_classes, progress, setup(task),
                               task._baseline, task.run.seed)
