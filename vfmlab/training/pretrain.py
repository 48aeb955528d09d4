"""Pretraining of the small networks that make the project work offline: pocket VFM, judge, reader of factors.

Objectives (`pretrain.objective`), all on any image source unless said otherwise:

| name        | network    | learns                                                                                    |
|-------------|------------|-------------------------------------------------------------------------------------------|
| factors+mae | pocket VFM | shapes and textures of `scenes:other`, nuisance factors, masked reconstruction            |
| leaky       | pocket VFM | the same with the source's own labels: a control that knows what the generator is told    |
| mae         | pocket VFM | masked reconstruction only; needs no labels                                               |
| classify    | judge      | the source's labels, under blur, noise and colour changes                                 |
| regress     | factors    | the true factors of drawn scenes, under blur and noise                                    |
| groups      | groups     | what stands on the places of `scenes:groups`, under blur and noise                        |
| contrast    | text tower | which caption belongs to which image, as the pocket VFM sees it                           |

The pocket VFM that ships never saw the classes on which generators are conditioned: `factors+mae` takes
shape and texture labels from `scenes:other` alone, which has neither a shape nor a texture of the other
styles. A finished run holds a file of the network's kind, such as `judge.safetensors`, readable through
`vfm.weights`, `diffusion.text.encoder` and each one's `load`; `python -m
vfmlab.training.pretrain export RUN_DIR NAME` puts it among the bundled weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config, runs
from vfmlab.data import Batch, ImageSource, open_source, to_float
from vfmlab.data.stream import BatchStream
from vfmlab.errors import CheckpointError, ConfigError, VfmlabError, nearest
from vfmlab.evaluation import factors, groups, judge, linear
from vfmlab.evaluation.features import over
from vfmlab.seeding import StepRandom, derive
from vfmlab.training import augment
from vfmlab.training.contrast import ContrastObjective
from vfmlab.training.task import Task
from vfmlab.vfm import pocket, pocket_text
from vfmlab.weights import io

OBJECTIVES = ("factors+mae", "leaky", "mae", "classify", "regress", "groups", "contrast")
# Name of the file and of the entry in its metadata -> network, and how it is read.
NETWORKS = {"pocket": (pocket.PocketNet, pocket.read), "judge": (judge.Judge, judge.load),
            "factors": (factors.FactorNet, factors.load), "groups": (groups.GroupNet, groups.load),
            "text": (pocket_text.TextNet, pocket_text.read)}
# `hard` has all classes of the easier styles and more: whoever learns its labels also sees those, at every
# size.
MIXED = {"scenes:hard": ("scenes:hard", "scenes:medium", "scenes:easy")}
COLOURS = ("foreground", "background", "background_end")
PLACES = ("x", "y", "scale")


class Mixed(ImageSource):
    """Several sources as one, one image of each in turn; labels are those of the first, matched by class
    name."""

    def __init__(self, sources: list[ImageSource]):
        first = sources[0]
        n = len(sources)
        labels = torch.empty(n * min(map(len, sources)), dtype=torch.long)
        for k, source in enumerate(sources):
            position = torch.tensor([first.class_names.index(name) for name in source.class_names])
            labels[k::n] = position[source.labels[: len(labels) // n]]
        self.sources = sources
        super().__init__(first.size, labels, first.class_names,
                         config.digest([s.fingerprint for s in sources]))
        self.what, self.sizes = first.what, tuple(sum(sizes)
                                                  for sizes in zip(*(s.sizes for s in sources), strict=True))

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        for rows, source, at in self._split(indices):
            images[rows] = source.batch(at).images
        return images, indices

    def masks(self, indices: Tensor) -> Tensor:
        masks = torch.empty(len(indices), 1, self.size, self.size, dtype=torch.bool)
        for rows, source, at in self._split(indices):
            masks[rows] = source.masks(at)
        return masks

    def factors(self, indices: Tensor) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for rows, source, at in self._split(indices):
            for name, value in source.factors(at).items():
                values.setdefault(name,
                                 torch.zeros(len(indices), *value.shape[1:], dtype=value.dtype))[rows] = value
        return values

    def _split(self, indices: Tensor) -> Iterable[tuple[Tensor, ImageSource, Tensor]]:
        for k, source in enumerate(self.sources):
            rows = torch.nonzero(indices % len(self.sources) == k).squeeze(1)
            if len(rows):
                yield rows, source, indices[rows] // len(self.sources)


def open_mixed(data: config.Data, objective: str, split: str) -> ImageSource:
    """The run's source, together with the easier styles where their labels are learnt too."""
    if objective not in ("classify", "regress", "leaky") or data.source not in MIXED:
        return open_source(data, split)
    names = MIXED[data.source]
    share = {
        part: None if size is None else max(1, size // len(names))
        for part, size in (("train", data.train), ("val", data.val))
    }
    return Mixed([open_source(data.model_copy(update={"source": name, **share}), split) for name in names])


class ClassifyObjective(nn.Module):
    """The judge's cross-entropy (label smoothing 0.05), on images as generators make them: soft, noisy,
    off-colour."""

    def __init__(self, source: ImageSource):
        super().__init__()
        self.net = judge.Judge(source.class_names)

    def forward(self, batch: Batch, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch.images.device.type, enabled=False):  # pixels have 8 bits, and so has bf16
            x = to_float(batch.images)
            x = augment.zoom(x, rng, p=0.5, most=1.15, shift=0.08)
            x, _, _ = augment.colour(x, rng, p=0.6, strength=0.25)
            x = augment.noise(augment.blur(x, rng, p=0.5, most=1.6), rng, p=0.5, most=0.3)
            x = x.clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        logits = self.net(x)[1]
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.05)
        return loss, {"accuracy": (logits.detach().argmax(1) == batch.labels).float().mean()}


class RegressObjective(nn.Module):
    """Squared error of the true factors, each in units of its variance, on soft and noisy images."""

    def __init__(self, source: ImageSource):
        super().__init__()
        self.source = source
        truth = factors.targets(source, torch.arange(min(len(source), 10_000)))
        self.net = factors.FactorNet(source.class_names)
        self.net.fit_scale(truth)

    def forward(self, batch: Batch, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch.images.device.type, enabled=False):  # pixels have 8 bits, and so has bf16
            x = augment.blur(to_float(batch.images), rng, p=0.5, most=1.6)
            x = augment.noise(x, rng, p=0.5, most=0.3)
            x = x.clamp(-1, 1).contiguous(memory_format=torch.channels_last)
        output = self.net(x)[0]
        truth = factors.targets(self.source, batch.indices.cpu()).to(output.device)
        errors = self.net.by_factor((output - self.net.standardise(truth)).square())
        errors = {name: value.sum(1).mean() for name, value in errors.items()}
        return torch.stack(list(errors.values())).mean(), {k: v.detach() for k, v in errors.items()}


class GroupsObjective(nn.Module):
    """Cross-entropies of shape (or nothing), texture and colour on each place, of soft, noisy and moved
    images."""

    def __init__(self, source: ImageSource):
        super().__init__()
        if not hasattr(source, "cells"):
            raise ConfigError(f"pretrain.objective 'groups' needs what stands on each place, which "
                              f"'{source.what}' does not say; set data.source=scenes:groups")
        self.source, self.net = source, groups.GroupNet()

    def forward(self, batch: Batch, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch.images.device.type, enabled=False):  # pixels have 8 bits, and so has bf16
            x = augment.zoom(to_float(batch.images), rng, p=0.5, most=1.1, shift=0.05)
            x = augment.noise(augment.blur(x, rng, p=0.5, most=1.6), rng, p=0.5, most=0.3).clamp(-1, 1)
        output = {name: part.flatten(0, 1) for name, part in groups.parts(self.net(x)).items()}
        losses = {}
        for name, truth in self.source.cells(batch.indices.cpu()).items():
            truth = truth.flatten().to(x.device)
            if name == "shape":  # -1, nothing, is a class of its own; it has no texture and no colour
                truth = truth.where(truth >= 0, groups.NOTHING)
            losses[name] = F.cross_entropy(output[name], truth, ignore_index=-1)
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}


class PocketObjective(nn.Module):
    """What the pocket VFM learns from one batch; see the table at the top.

    About every second row has a share `mask` of its patches hidden. Pixels of hidden patches (and, at a
    quarter of the weight, of visible ones, so that detail survives to the end) are read linearly from the
    last layer, as clean as they were before blur and noise; factors and classes are read linearly from its
    mean.
    """

    def __init__(self, source: ImageSource, objective: str, mask: float):
        super().__init__()
        self.source, self.mask, self.objective = source, mask, objective
        self.net = pocket.PocketNet()
        for block in self.net.blocks:
            block.silence()
        self.pixels = nn.Linear(self.net.width, 3 * pocket.PATCH**2)
        self.supervised = objective != "mae"
        if not self.supervised:
            return
        if source.factors(torch.arange(1)) is None:
            raise ConfigError(
                f"pretrain.objective '{objective}' needs the true factors of procedural scenes; "
                "set data.source=scenes:other, or pretrain.objective=mae"
            )
        self.places = nn.Linear(self.net.width, len(PLACES))
        self.colours = nn.Linear(self.net.width, 3 * len(COLOURS))
        self.coverage = nn.Linear(self.net.width, 1)
        own = objective == "leaky" or not set(source.class_names) & _generator_classes()
        self.classes = nn.Linear(self.net.width, source.num_classes) if own else None

    def forward(self, batch: Batch, rng: StepRandom, samples: int) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(batch.images.device.type, enabled=False):  # pixels have 8 bits, and so has bf16
            clean, mix, shift = augment.colour(to_float(batch.images), rng, p=0.6)
            x = augment.noise(augment.blur(clean, rng, p=0.2, most=1.2), rng, p=0.3, most=0.2)
            hidden = self._hidden(x, rng)
        maps = self.net(x.contiguous(memory_format=torch.channels_last), hidden)
        last = maps[-1].float().flatten(2).transpose(1, 2)  # B N C
        losses = {"mae": self._pixels(last, clean, hidden)}
        if self.supervised:
            losses.update(self._factors(last, batch, mix, shift))
        report = {name: value.detach() for name, value in losses.items()}
        if "class" in losses:
            report["accuracy"] = self._accuracy
        return sum(losses.values()), report

    def _hidden(self, x: Tensor, rng: StepRandom) -> Tensor:
        h, w = x.shape[-2] // pocket.PATCH, x.shape[-1] // pocket.PATCH
        share = self.mask * (rng.rand(1, 1, 1) < 0.5)
        return rng.rand(1, h, w) < share

    def _pixels(self, last: Tensor, clean: Tensor, hidden: Tensor) -> Tensor:
        target = F.pixel_unshuffle(clean, pocket.PATCH).flatten(2).transpose(1, 2)
        weight = torch.where(hidden, 1.0, 0.25).flatten(1)
        error = (self.pixels(last) - target).square().mean(2)
        return 2.0 * (weight * error).sum() / weight.sum()

    def _factors(self, last: Tensor, batch: Batch, mix: Tensor, shift: Tensor) -> dict[str, Tensor]:
        indices = batch.indices.cpu()
        factors = {name: value.to(last.device) for name, value in self.source.factors(indices).items()}
        covered = self.source.masks(indices).to(last.device).float()
        pooled = last.mean(1)
        places = torch.stack([factors[name] for name in PLACES], 1)
        colours = torch.stack([factors[name] * 2 - 1 for name in COLOURS], 1)  # B 3 3: colour, channel
        colours = torch.einsum("bij,bkj->bki", mix, colours) + shift[:, None]
        share = F.avg_pool2d(covered, pocket.PATCH).flatten(1)
        losses = {
            "places": 4.0 * (self.places(pooled) - places).square().mean(),
            "colours": 0.5 * (self.colours(pooled).view_as(colours) - colours).square().mean(),
            "coverage": 0.5 * F.binary_cross_entropy_with_logits(self.coverage(last).squeeze(2), share),
        }
        if self.classes is not None:
            logits = self.classes(pooled)
            losses["class"] = F.cross_entropy(logits, batch.labels, label_smoothing=0.05)
            self._accuracy = (logits.detach().argmax(1) == batch.labels).float().mean()
        return losses


def _generator_classes() -> set[str]:
    from vfmlab.data.scenes import STYLES

    return {
        f"{t} {s}" for name in ("easy", "medium", "hard") for s in STYLES[name].shapes
        for t in STYLES[name].textures
    }


class PretrainTask(Task):
    """A run with a `pretrain` section, as the training loop wants it. `weights` is the network without its
    heads."""

    name = "pretrain"

    def __init__(self, run: config.Phase):
        if run.pretrain is None:
            raise ConfigError(
                f"run '{run.name}' has no 'pretrain' section; set for example pretrain.objective=factors+mae"
            )
        objective = run.pretrain.objective
        if objective not in OBJECTIVES:
            raise ConfigError(f"pretrain.objective '{objective}': unknown{nearest(objective, OBJECTIVES)}")
        judging = {"classify": ClassifyObjective, "regress": RegressObjective,
                   "groups": GroupsObjective, "contrast": ContrastObjective}.get(objective)
        if objective in ("regress", "groups", "contrast") and run.data.flip:
            raise ConfigError("data.flip True: factors of scenes are not mirrored with them; leave it out")
        if judging is None and (run.data.size % pocket.PATCH or run.data.flip):
            raise ConfigError(
                f"data.size {run.data.size}, data.flip {run.data.flip}: the pocket VFM needs a size that is "
                "a multiple "
                f"of {pocket.PATCH}, and no flips (the factors of scenes are not mirrored with them)"
            )
        self.run, self.train = run, run.train
        self.source = open_mixed(run.data, objective, "train")
        self.held_out = open_mixed(run.data, objective, "val")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("pretrain", run.seed))
            if judging is not None:
                self.objective: nn.Module = judging(self.source)
            else:
                self.objective = PocketObjective(self.source, objective, run.pretrain.mask)
        self.objective.to(memory_format=torch.channels_last)
        self.weights: nn.Module = self.objective.net

    def facts(self) -> dict[str, str]:
        return {"fingerprint": self.source.fingerprint}

    def stream(self, start_step: int, rows: slice) -> BatchStream:
        data = self.run.data
        return BatchStream(self.source, self.train.batch, self.run.seed, start_step, rows, data.flip,
                           data.workers)

    @torch.no_grad()
    def evaluate(self, weights: nn.Module, samples: int) -> dict[str, float]:
        """On held-out images: the judge's accuracy; R^2 of every factor; shares of captions that are read
        right, or found; or the accuracy of a ridge classifier on the pocket VFM's global mean."""
        device, every = next(weights.parameters()).device, torch.arange(len(self.held_out))
        weights = weights.eval()

        def seen(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            return over(self.held_out, every, lambda x: function(weights(x.to(device))), 128)

        if isinstance(weights, judge.Judge):
            logits, labels = seen(lambda out: out[1])
            return {"accuracy": float((logits.argmax(1) == labels).float().mean())}
        if isinstance(weights, factors.FactorNet):
            output, _ = seen(lambda out: out[0])
            truth = factors.targets(self.held_out, every).to(device)
            scores = factors.r2(weights, output, weights.standardise(truth).cpu())
            return {f"r2_{name}": value for name, value in scores.items()}
        if isinstance(weights, pocket_text.TextNet):
            return self.objective.measure(weights, self.held_out)
        if isinstance(weights, groups.GroupNet):
            output, _ = seen(groups.probabilities)
            return groups.shares(self.held_out.captions(every), output)
        pooled, labels = seen(lambda maps: maps[-1].float().mean(dim=(2, 3)))
        return {"ridge_accuracy": ridge_accuracy(pooled, labels)}

    def finish(self, weights: nn.Module, run_dir: runs.RunDir) -> None:
        """Write the network into the run directory, in a file named after its kind."""
        kind = next(kind for kind, (network, _) in NETWORKS.items() if isinstance(weights, network))
        write(run_dir.path / f"{kind}.safetensors", weights, {kind: weights.spec}, self.run,
              self.source.fingerprint)


def ridge_accuracy(features: Tensor, labels: Tensor) -> float:
    """Accuracy of a ridge classifier fitted to the first half of features N D, on the other half."""
    half = len(features) // 2
    return linear.classify(features[:half], labels[:half], features[half:], labels[half:])


def write(path: Path, net: nn.Module, spec: dict[str, Any], run: config.Phase, fingerprint: str) -> None:
    """Weights as fp16 safetensors, with what is needed to build the network and to train it again.

    The metadata name neither a date nor a version of the code: the same recipe gives the same file.
    """
    # fp16 has 11 bits of mantissa, and batch-norm variances and weights lie well inside its range: halving
    # the file moves features by less than bf16 arithmetic does. Counters are of no use to a frozen network.
    tensors = {
        key: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for key, value in net.state_dict().items()
    }
    recipe = run.recipe.model_dump(mode="json", include={"name", "seed", "data", "train", "pretrain"})
    facts = {
        "format": "vfmlab/1",
        **spec,
        "recipe": recipe,
        "samples": run.train.samples,
        "seed": run.seed,
        "data_fingerprint": fingerprint,
    }
    # One entry: safetensors writes several in an order that changes from process to process.
    metadata = {io.METADATA: json.dumps(facts, sort_keys=True)}
    io.write(path, tensors, metadata)


def export(run_dir: str | Path, name: str) -> Path:
    """Copy a finished run's network into the package as `assets/NAME.safetensors`, after checking that it
    loads."""
    files = [Path(run_dir) / f"{kind}.safetensors" for kind in NETWORKS]
    present = [path for path in files if path.is_file()]
    if not present:
        names = " or ".join(path.name for path in files)
        raise CheckpointError(f"'{run_dir}' holds no finished pretraining ({names})")
    NETWORKS[present[0].stem][1](present[0])
    target = io.ASSETS / f"{name}.safetensors"
    target.write_bytes(present[0].read_bytes())
    return target


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "export":
        raise SystemExit("usage: python -m vfmlab.training.pretrain export RUN_DIR NAME")
    try:
        sys.stdout.write(f"{export(*sys.argv[2:])}\n")
    except VfmlabError as error:
        raise SystemExit(f"error: {error}") from None
