"""`factors`: what is where in a drawn scene, read off the image by a network; a feature space of named axes.

The judge learns to tell classes apart, so nearly all variance of its features lies between classes and a
distance in them says little about position, size or colour. This network regresses the true factors of
scenes instead. Every factor has the same weight in a distance: its targets have a total variance of 1 over
the training images. It sees blurred and noisy images in training, as the judge does, and shares with it the
kind of blocks, not weights, seed or targets.

| factor | columns | target |
|---|---|---|
| shape, texture | one each | 1 for what is shown, else 0 |
| x, y, scale | 1 | fractions of half the side |
| direction | 2 | cosine and sine of k times the rotation, k: how often the object repeats in a turn; else 0 |
| foreground | 3 | RGB of the object's first tone |
| background | 3 | RGB half way between the background's two colours |
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab import data
from vfmlab.errors import ConfigError
from vfmlab.evaluation import judge
from vfmlab.evaluation.features import FeatureSpace, Seen, run_or_path
from vfmlab.registry import FEATURE_SPACES

# How often an object looks the same in one turn, by shape and by texture; 0: whatever the rotation.
REPEATS = {
    "disc": 0, "ring": 0, "square": 4, "cross": 4, "triangle": 3, "bar": 2, "half": 1, "corner": 1,
    "star": 5, "heart": 1, "hexagon": 6, "arrow": 1, "crescent": 1, "drop": 1, "trefoil": 3, "hourglass": 2,
    "plain": 0, "striped": 2, "shaded": 1, "dotted": 4, "checked": 4,
}  # fmt: skip


def split(class_names: list[str]) -> tuple[list[str], list[str]]:
    """Shapes and textures of classes that are called "TEXTURE SHAPE", each in order of appearance."""
    textures, shapes = zip(*(name.split(" ") for name in class_names), strict=True)
    return list(dict.fromkeys(shapes)), list(dict.fromkeys(textures))


def columns(class_names: list[str]) -> dict[str, int]:
    """Number of columns of each factor, in their order."""
    shapes, textures = split(class_names)
    return {"shape": len(shapes), "texture": len(textures), "x": 1, "y": 1, "scale": 1, "direction": 2,
            "foreground": 3, "background": 3}


def kinds(class_names: list[str]) -> Tensor:
    """Columns of shape and texture of each class: classes x (shapes + textures)."""
    shapes, textures = split(class_names)
    at = [[shapes.index(shape), len(shapes) + textures.index(texture)]
          for texture, shape in (name.split(" ") for name in class_names)]
    return torch.zeros(len(at), len(shapes) + len(textures)).scatter_(1, torch.tensor(at), 1.0)


def targets(source: data.ImageSource, indices: Tensor) -> Tensor:
    """True factors of scenes at `indices` (long B), B K; see the table at the top.

    Raises:
        ConfigError: a source that knows no factors.
    """
    truth = source.factors(indices)
    if truth is None:
        raise ConfigError("pretrain.objective 'regress' needs the true factors of drawn scenes; set "
                          "data.source=scenes:hard")
    labels = source.labels[indices]
    turns = torch.tensor([math.gcd(*(REPEATS[word] for word in name.split(" ")))
                          for name in source.class_names])[labels]
    angle = turns * truth["rotation"]
    direction = torch.stack([angle.cos(), angle.sin()], 1) * (turns > 0)[:, None]
    flat = (truth["background_style"] == 0)[:, None]  # flat comes first everywhere
    background = torch.where(flat, truth["background"], (truth["background"] + truth["background_end"]) / 2)
    places = [truth[name][:, None] for name in ("x", "y", "scale")]
    return torch.cat([kinds(source.class_names)[labels], *places, direction, truth["foreground"], background],
                     1)


class FactorNet(nn.Module):
    """Images in [-1, 1] (B 3 H W) -> (standardised factors B K, logits B classes), both fp32.

    A logit is minus the squared distance of shape and texture to the class's.

    Args:
        class_names: "TEXTURE SHAPE", of the scenes that are learnt. width: channels of the first stage.
    """

    def __init__(self, class_names: list[str], width: int = 24):
        super().__init__()
        self.class_names, self.width = list(class_names), width
        self.columns = columns(self.class_names)
        self.fingerprint = ""  # of the weights; set by load()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(
            judge.Residual(width, width, 2), judge.Residual(width, 2 * width, 2),
            judge.Residual(2 * width, 4 * width, 2), judge.Residual(4 * width, 4 * width, 1),
        )  # fmt: skip
        # all 4 x 4 places: a mean over them would lose where things stand
        self.head = nn.Linear(4 * width * (judge.SIZE // 8) ** 2, self.dim)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("scale", torch.ones(self.dim))

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments that build this network again."""
        return {"class_names": self.class_names, "width": self.width}

    @property
    def dim(self) -> int:
        """Number of columns, K."""
        return sum(self.columns.values())

    def fit_scale(self, truth: Tensor) -> None:
        """Standardise by targets N K: mean 0, and a total variance of 1 over the columns of each factor."""
        self.mean.copy_(truth.mean(0))
        parts = truth.var(0).split(list(self.columns.values()))
        self.scale.copy_(torch.cat([part.sum().sqrt().clamp_min(1e-6).expand(len(part)) for part in parts]))

    def standardise(self, truth: Tensor) -> Tensor:
        """Targets B K as the network gives them."""
        return (truth - self.mean) / self.scale

    def by_factor(self, values: Tensor) -> dict[str, Tensor]:
        """Columns B K, apart: name of the factor -> B k."""
        return dict(zip(self.columns, values.split(list(self.columns.values()), 1), strict=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.stages(self.stem(judge.resized(images))).flatten(1).float()
        with torch.autocast(maps.device.type, enabled=False):  # fp32: Frechet statistics are taken of these
            output = self.head(maps)
            shown = kinds(self.class_names).to(output)
            n = shown.shape[1]
            return output, -torch.cdist(output[:, :n], (shown - self.mean[:n]) / self.scale[:n]).square()


def r2(net: FactorNet, output: Tensor, truth: Tensor) -> dict[str, float]:
    """Per factor, 1 - squared error / variance: standardised predictions and targets, N K both."""
    left = net.by_factor((output - truth).square())
    all_ = net.by_factor((truth - truth.mean(0)).square())
    return {name: 1 - float(left[name].sum() / all_[name].sum()) for name in net.columns}


def load(weights: str | Path | None = None) -> FactorNet:
    """A reader of factors: bundled, or of a run with objective "regress"; see `judge.trained`."""
    return judge.trained(weights, "factors", FactorNet)


@FEATURE_SPACES.register("factors")
class FactorSpace(FeatureSpace):
    """Factors of drawn scenes: bundled, or `factors:RUN` of a run with objective "regress"."""

    def __init__(self, reference: str, size: int, root: str | Path):
        super().__init__()
        self.net = load(run_or_path(reference, root))
        self.version, self.dimension = self.net.fingerprint, self.net.dim
        self.class_names = list(self.net.class_names)
        self.preprocessing = f"bilinear antialiased to {judge.SIZE}"

    def forward(self, images: Tensor) -> Seen:
        return Seen(*self.net(images))
