"""What the loop trains: a task brings objective, data and pictures; the loop brings everything else."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.config import Phase, Train
from vfmlab.data import ImageSource
from vfmlab.errors import ConfigError, nearest
from vfmlab.nn import parts
from vfmlab.runs import RunDir


class Task:
    """Base of the training phases.

    Attributes:
        name: "tokenizer", "diffusion", "ar" or "pretrain".
        objective: module whose `forward(batch, rng, samples) -> (loss, metrics)` is the training forward of
            one (micro-)batch: a scalar loss, a mean over the batch's images in fp32, and a dict of detached
            scalar tensors. batch: this rank's rows on the device; rng: a :class:`vfmlab.seeding.StepRandom`
            for exactly these rows; samples: images seen before this step. It draws random numbers from `rng`
            only.
        weights: the part of `objective` that is averaged, and saved as model.safetensors.
        trains: globs on `weights`' parameter names; what no glob matches is frozen. Parameters of the
            objective outside `weights` (of losses) always train.
        compiled: modules that `train.compile` compiles, in place, so that no name changes.
        find_unused: some parameters get no gradient in some steps (DistributedDataParallel has to look for
            them).
        discriminators: those of adversarial terms, which have an optimiser of their own, or None. The
            objective then returns a third value, and `discriminators(third, rng, samples) -> (loss, metrics)`
            is their training forward (:class:`vfmlab.losses.discriminators.training.Discriminators`).
        completes: `finish` fills buffers of the weights, which are then saved once more.
        shards: the network may be cut over processes (:mod:`vfmlab.training.sharded`).
        inner: what takes gradients inside the forward ("adaptive weights"), or "".
        columns: images per row of a preview.
        started: facts about the start, for the event of it. root: folder of the runs.
    """

    name: str
    run: Phase
    train: Train
    objective: nn.Module
    weights: nn.Module
    trains: tuple[str, ...] = ("*",)
    find_unused: bool = False
    discriminators: nn.Module | None = None
    completes: bool = False
    shards: bool = False
    inner: str = ""
    columns: int = 8
    started: Mapping[str, Any] = {}
    root: str = "runs"
    _setup: Any = None  # what evaluations share, of vfmlab.training.evaluated
    _baseline: Any = None

    @property
    def seed(self) -> int:
        """Random numbers of step k are made from (seed, k)."""
        return self.run.seed

    @property
    def section(self) -> str:
        return section(self.name)

    def say(self, note: str) -> None:
        """Add a note to the event of the start."""
        self.started = {"note": "; ".join(filter(None, (self.started.get("note"), note)))}

    @property
    def device(self) -> torch.device:
        return next(self.weights.parameters()).device

    @property
    def modules(self) -> list[nn.Module]:
        """Objective and, where there are any, discriminators."""
        return [module for module in (self.objective, self.discriminators) if module is not None]

    @property
    def share(self) -> dict[str, int]:
        """Which of how many processes this is, as caches take it."""
        from accelerate import PartialState  # a config is read without it

        state = PartialState()
        return {"rank": state.process_index, "world": state.num_processes}

    @property
    def images(self) -> dict[str, ImageSource]:
        """The data of the run by split, for the account in its directory."""
        sources = {"train": getattr(self, "source", None), "val": getattr(self, "held_out", None)}
        return {split: source for split, source in sources.items() if isinstance(source, ImageSource)}

    @property
    def compiled(self) -> list[nn.Module]:
        return [self.weights]

    def prepare(self, run_dir: RunDir, fresh: bool) -> Iterator[tuple[str, int, int]]:
        """Work before step 0, with everything on its device: caches; starts of weights, if `fresh` (not
        resumed).

        Yields (what, done, of). Must be deterministic. On several processes every one calls it.
        """
        return iter(())

    def stream(self, start_step: int, rows: slice) -> Iterable[Any]:
        """Batches of steps start_step, start_step + 1, ...: this rank's `rows` of the global batch of
        `train.batch`.

        A batch is a (named) tuple, list or dict of tensors with one row per image; what it holds depends on
        the run's seed and the step only. An iterator with `close()` is closed at the end.
        """
        raise NotImplementedError

    def example(self, rows: slice) -> Any:
        """A batch as large as any, for the memory dry run; may be random where real ones need other runs."""
        return self.batch_of(0, rows)

    def batch_of(self, step: int, rows: slice) -> Any:
        """The batch of one step."""
        batches = iter(self.stream(step, rows))
        try:
            return next(batches)
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def costly_steps(self, n: int) -> list[int]:
        """Step numbers whose random choices make the most expensive steps, for the dry run."""
        return list(range(n))

    def preview(self, weights: nn.Module) -> Tensor | None:
        """Pictures that show how far `weights` are, always of the same inputs: N 3 H W in [-1, 1]."""
        return None

    def evaluate(self, weights: nn.Module, samples: int) -> dict[str, Any] | None:
        """Numbers by the run's protocol, at the sample counts in `train.evaluate_at`."""
        return None

    def stepped(self, step: int, numbers: Mapping[str, float]) -> None:
        """After every step, of which `step` are done: a callback given from a notebook's cell.

        numbers: the loss and its parts, means over the global batch.
        """
        part = (self.run.recipe.parts or {}).get("on_step")
        if part is not None:
            parts.fetch("on_step", part)(self, step, numbers)

    def finish(self, weights: nn.Module, run_dir: RunDir) -> None:
        """Last act, once, with the averaged weights: files besides the weights, buffers that need trained
        weights.

        A task that `completes` fills those of `self.weights` (not averaged) too; both are saved after this.
        """

    def remark(self) -> str:
        """One line for the run's status after its end, if something went another way than meant, or ""."""
        return ""

    def facts(self) -> dict[str, str]:
        """More metadata of the weights files: "fingerprint", "vfm_fingerprint"."""
        return {}


def section(kind: str) -> str:
    """Where the `train` of a phase stands in its recipe, for messages: a generator has its own."""
    return f"{kind}.train" if kind in ("diffusion", "ar") else "train"


def select(task: Task) -> list[nn.Parameter]:
    """:func:`trainable` of a task."""
    return trainable(task.objective, task.weights, task.trains, task.name)


def trainable(objective: nn.Module, weights: nn.Module, trains: Iterable[str],
              name: str) -> list[nn.Parameter]:
    """Freeze the parameters of `weights` that no glob of `trains` matches, and return all of the objective
    that train.

    name: of the phase, for messages. Raises :class:`ConfigError` for a glob that matches nothing, or if
    nothing is left.
    """
    named = dict(weights.named_parameters())
    chosen: set[str] = set()
    for glob in trains:
        hits = fnmatch.filter(named, glob)
        if not hits:
            hint = nearest(glob, {key.split(".")[0] + ".*" if "." in key else key for key in named})
            raise ConfigError(f"trains: '{glob}' matches no parameter of the {name}{hint}")
        chosen |= set(hits)
    for key, parameter in named.items():
        if key not in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ConfigError(f"trains: {list(trains)} leaves nothing of the {name} to train; name a part of it")
    return [parameter for parameter in objective.parameters() if parameter.requires_grad]


def indices(batch: Any) -> list[int]:
    """The data indices of a batch, where it knows them."""
    value = batch.get("indices") if isinstance(batch, dict) else getattr(batch, "indices", None)
    return value.tolist() if isinstance(value, torch.Tensor) else []
