"""One training step in pieces, for notebooks: the batch, every tensor between images and loss, every term.

    step = vfmlab.open_step("tiny_vfm_vae")
    step.images, step.features, step.posterior, step.z, step.decoded, step.terms
    step.explain()                  # term, value, weight, share, gradient norms
    step.loss.backward()

The pieces are those of the training objective itself, for the images and the noise that training takes at
this step, so that `step.loss` is the number which training logs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from vfmlab import api, config, runs
from vfmlab.data import open_source, some_images, to_float
from vfmlab.errors import ConfigError, nearest
from vfmlab.losses.base import Reconstruction
from vfmlab.losses.terms import Pieces, Term
from vfmlab.seeding import StepRandom, derive
from vfmlab.tokenizers.base import Posterior, Tokenizer, measure
from vfmlab.training.ar import ARTask
from vfmlab.training.diffusion import DiffusionTask
from vfmlab.training.repa_e import Tuned
from vfmlab.training.state import State
from vfmlab.training.step import make_accelerator, make_optimizers
from vfmlab.training.task import Task, select
from vfmlab.training.tokenizer import TokenizerTask

if TYPE_CHECKING:
    from vfmlab.plots.primitives import Table

FEW = 256  # images on which the latents of an untrained tokenizer are normalised


@dataclass
class Step:
    """Step `number` (from 0) of a training phase, forward done, nothing updated.

    Attributes:
        task: what trains, with `objective`, `weights` and the data. batch: as the objective takes it.
        samples: images seen before. pieces: see :class:`vfmlab.losses.terms.Pieces`.
        parameters: those that train. note: what differs from a training, "" where nothing does.
    """

    task: Task
    number: int
    device: str | None = None
    note: str = ""
    batch: Any = field(init=False, repr=False)
    pieces: Pieces = field(init=False, repr=False)
    parameters: list[nn.Parameter] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        task, train = self.task, self.task.train
        accelerator = make_accelerator(task, None, self.device)
        rows = slice(0, train.batch)
        self.batch = recursively_apply(Tensor.to, task.batch_of(self.number, rows), accelerator.device)
        self.parameters = select(task)
        rng = StepRandom(task.seed, self.number, train.batch, rows, accelerator.device)
        with torch.random.fork_rng(devices=[]), accelerator.autocast():
            torch.manual_seed(derive("global", task.seed, self.number, 0))
            self.pieces = task.objective.pieces(self.batch, rng, self.samples)

    @property
    def samples(self) -> int:
        return self.number * self.task.train.batch

    def next(self) -> Step:
        """The step after this one, with the weights as they are now."""
        return Step(self.task, self.number + 1, self.device, self.note)

    # -- what is in it --------------------------------------------------------------------------------------

    @property
    def loss(self) -> Tensor:
        """Scalar with gradients: the sum of the terms times their weights."""
        return self.pieces.loss

    @property
    def terms(self) -> dict[str, Term]:
        """Name -> (value without its weight, weight as it came out)."""
        return self.pieces.terms

    @property
    def tokenizer(self) -> Tokenizer:
        """What is trained, or what the generator is trained on."""
        if isinstance(self.task.weights, Tuned):
            return self.task.weights.tokenizer
        return self.task.weights if isinstance(self.task, TokenizerTask) else self.task.tokenizer

    @property
    def network(self) -> nn.Module:
        """The generator. Raises ConfigError in a tokenizer's phase."""
        if not isinstance(self.task, ARTask):
            self._need("flow", "network")
        return self.task.weights.network if isinstance(self.task.weights, Tuned) else self.task.weights

    @property
    def labels(self) -> Tensor:
        """Classes, long B."""
        return self.batch.labels

    @property
    def images(self) -> Tensor:
        """The images of the batch, B 3 H W in [-1, 1]; those of a mirrored latent are not mirrored."""
        images = getattr(self.batch, "images", None)
        if images is None:
            images = self.task.source.batch(self.batch.indices.cpu()).images.to(self.labels.device)
        return to_float(images)

    @property
    def reconstruction(self) -> Reconstruction:
        """What the tokenizer's losses read. Raises ConfigError in a generator's phase."""
        return self._need("reconstruction", "reconstruction")

    @property
    def features(self) -> dict[int, Tensor]:
        """VFM maps by layer, B D h' w'."""
        return self.reconstruction.features

    @property
    def posterior(self) -> Posterior:
        """Of raw latents, B C h w."""
        return self.reconstruction.posterior

    @property
    def z(self) -> Tensor:
        """B C h w: raw latents drawn from the posterior; in a phase of diffusion normalised ones."""
        if self.pieces.flow is None or self.pieces.reconstruction is not None:
            return self.reconstruction.z
        return self.batch.z

    @property
    def decoded(self) -> Tensor:
        """B 3 H W in about [-1, 1], what the decoder makes of z."""
        return self.reconstruction.images[0]

    @property
    def t(self) -> Tensor:
        """Times B, 0 data to 1 noise."""
        return self._need("flow", "t").t

    @property
    def noisy(self) -> Tensor:
        """The generator's input: latents B C h w at times t."""
        return self._need("flow", "noisy").point.x

    @property
    def target(self) -> Tensor:
        """The velocity to be predicted, B C h w."""
        return self._need("flow", "target").point.v

    @property
    def velocity(self) -> Tensor:
        """The velocity that the network predicts, B C h w."""
        return self._need("flow", "velocity").prediction

    @property
    def codes(self) -> Tensor:
        """Codes in the order in which the generator draws them, long B T: what it should predict."""
        return self._need("drawn", "codes").codes

    @property
    def logits(self) -> Tensor:
        """The generator's logits of these codes, each given those before it: B T K."""
        return self._need("drawn", "logits").logits

    def _need(self, part: str, name: str) -> Any:
        value = getattr(self.pieces, part)
        if value is None:
            other = {"flow": "diffusion", "drawn": "ar"}.get(part, "tokenizer")
            raise ConfigError(f"'{name}' is not part of a step of the phase '{self.task.name}', but of one "
                              f"of the phase '{other}'")
        return value

    # -- what it does ---------------------------------------------------------------------------------------

    def explain(self) -> Table:
        """One row per term: value, weight (an adaptive one as it came out), weight times value, its share of
        the loss, and the norm of the gradient of weight times value at a few places.

        Places: the encoder's and the decoder's last layer, where adaptive weights are taken; the first and
        the last block and the output layer of a generator (a fresh one's output is zero, and so are the
        velocity's gradients before it); all that trains. A place that is frozen has no column.
        """
        from vfmlab.plots import primitives  # plotly is for people who look, not for training

        places, loss = self._places(), self.loss.item()
        rows = []
        for name, term in self.terms.items():
            weighted = term.weighted.item()
            row = {"term": name, "value": term.value.item(), "weight": float(term.weight)}
            row |= {"weight x value": weighted, "share": weighted / loss if loss else 0.0}
            rows.append(row | {f"gradient at {place}": _norm(term.weighted, parameters)
                               for place, parameters in places.items()})
        return primitives.table(rows, f"{self.task.run.id}, step {self.number}: loss {loss:.6g}")

    def _places(self) -> dict[str, list[nn.Parameter]]:
        places: dict[str, list[nn.Parameter]] = {}
        if self.pieces.reconstruction is not None:
            for place in ("encoder", "decoder"):
                try:
                    places[place] = [getattr(self.tokenizer, f"last_{place}_layer")()]
                except ConfigError:  # a tokenizer that trains no encoder
                    continue
        if self.pieces.flow is not None or self.pieces.drawn is not None:
            blocks = [*getattr(self.network, "blocks", ()), *getattr(self.network, "head_blocks", ())]
            ends = {1: blocks[0], len(blocks): blocks[-1]} if blocks else {}
            places |= {f"block {k}": list(block.parameters()) for k, block in ends.items()}
            # a network given from a cell has neither: all of it
            last = getattr(self.network, "final", getattr(self.network, "head", self.network))
            places["output"] = list(last.parameters())
        places["all parameters"] = self.parameters
        trained = {name: [p for p in parameters if p.requires_grad] for name, parameters in places.items()}
        return {name: parameters for name, parameters in trained.items() if parameters}


def _norm(value: Tensor, parameters: list[nn.Parameter]) -> float:
    """Norm of the gradient of `value`; 0 where it depends on none of the parameters."""
    if not value.requires_grad:
        return 0.0
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    squares = [grad.float().square().sum() for grad in grads if grad is not None]
    return float(sum(squares)) ** 0.5 if squares else 0.0


def open_step(
    described: api.Described, root: str | Path = "runs", overrides: dict[str, Any] | str | None = None,
    phase: str | None = None, number: int | None = None, device: str | None = None, fp32: bool = False,
) -> Step:  # fmt: skip
    """One training step of a recipe (its weights fresh) or of a run (its weights as they are), in pieces.

    Args:
        described: a recipe, phase, preset or config as in `vfmlab.train`; or a run: its id, the beginning
            of one with its dash, or its directory.
        overrides: dotted names, not for a run. phase: of a recipe: a stage's name, "tokenizer",
        "diffusion" or "ar"; None: the first. number: of the step, which decides images and noise; None: the
        next one, 0 for fresh weights. device: "cpu" keeps off accelerators. fp32: whatever precision the
        training has, for comparisons by hand.

    A phase builds on others: they are taken from `root` where they are trained, and caches are made there as
    training makes them. Otherwise the tokenizer is an untrained one, and `note` says so.

    Raises:
        ConfigError: an unknown preset, phase or field. RunError, CheckpointError: a damaged run.
    """
    text = "" if isinstance(described, config.Recipe | config.Phase | dict) else str(described)
    folder = None
    if text and not text.endswith(".json") and ("-" in text or Path(text).is_dir()):
        if overrides:
            raise ConfigError(f"overrides: '{text}' is a run, whose config is settled; give its preset")
        folder = runs.open_run(text, root)
        chosen, root = folder.config(), folder.path.parent
    elif isinstance(described, config.Phase) and not overrides and phase is None:
        chosen = described
    else:
        chosen = _phase(api.resolve(described, overrides), phase)
    if chosen.train is None or chosen.imported is not None:
        raise ConfigError(f"'{chosen.id}' is imported and not trained: it has no steps; open one of a stage "
                          "that trains it, or of a generator on it")
    task, note = _task(chosen, root)
    if not hasattr(task.objective, "pieces"):
        raise ConfigError(f"a step of the phase '{chosen.kind}' cannot be opened; tokenizers and generators "
                          "can")
    if fp32:
        task.train = task.train.model_copy(update={"precision": "fp32"})
    return _start(task, folder, root, number, device, note)


def _start(task: Task, folder: runs.RunDir | None, root: str | Path, number: int | None, device: str | None,
           note: str) -> Step:
    """The step of a task that begins as the training loop begins it."""
    accelerator, state = make_accelerator(task, None, device), State(task)
    if folder is not None:
        state.load(folder)
    for module in task.modules:
        module.to(accelerator.device).train()
    with torch.no_grad():
        task.objective.eval()
        where = runs.RunDir(runs.root_folder(root) / task.run.id)
        for _ in task.prepare(where, not state.resumed):
            pass
        task.objective.train()
    if state.resumed:
        state.restore()
        state.begin(make_optimizers(task, select(task), accelerator.device), None)
    return Step(task, state.step if number is None else number, device, note)


def _phase(recipe: config.Recipe, name: str | None) -> config.Phase:
    phases = recipe.phases()
    if name is None:
        return next((phase for phase in phases if phase.imported is None), phases[0])
    for phase in phases:
        if name in (phase.stage, phase.kind) and phase.imported is None:
            return phase
    known = list(dict.fromkeys(name for phase in phases for name in (phase.stage, phase.kind)))
    raise ConfigError(f"phase = '{name}': this run's phases are {', '.join(known)}{nearest(name, known)}")


def _task(phase: config.Phase, root: str | Path) -> tuple[Task, str]:
    """What trains the phase, and what differs from a training."""
    if phase.parent is None or phase.before.imported is not None or runs.finished(phase.before, root):
        return api.open_task(phase, root), ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("tokenizer", phase.seed))
        tokenizer = api.build_tokenizer(phase)
    note = f"the tokenizer is untrained: '{phase.parent}' is not trained under '{root}'"
    if isinstance(phase, config.TokenizerPhase):
        return TokenizerTask(phase, tokenizer), note
    # What a training caches is of the centre crop.
    centre = {"data.crop": None} if phase.generator.cache and not phase.tuned else {}
    if phase.ar is not None:  # codes need no statistics
        phase = config.override(phase.recipe, centre | {"ar.cache": False, "ar.ten_crops": None}).last
        return ARTask(phase, tokenizer, runs.root_folder(root)), note
    source = open_source(phase.data, "train")
    images = some_images(source, FEW, "statistics", phase.seed, batch=64)
    tokenizer.set_statistics(measure(tokenizer.eval(), images, source.fingerprint))
    uncached = centre | {"diffusion.cache": False}
    uncached |= {f"diffusion.{part}.cache": False for part in ("alignment", "class_token")
                 if getattr(phase.diffusion, part) is not None}
    phase = config.override(phase.recipe, uncached).last
    return DiffusionTask(phase, tokenizer, runs.root_folder(root)), note
