"""The judge: a small convolutional classifier that scores images and whose features are the offline Frechet
space.

It is independent of the pocket VFM: another architecture (a residual convolutional net without attention),
another data order and another seed, so that a tokenizer built on the VFM is not judged by its own features.
It is trained with blur and noise, so that softness alone is not punished: a judge trained on clean images
only falls from .90 to .53 accuracy under a 3x3 blur. The bundled weights know the scenes' classes; another
data set gets its own judge from a run whose `pretrain.objective` is "classify"
(:mod:`vfmlab.training.pretrain`), loaded here from the run directory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.errors import ConfigError, nearest
from vfmlab.weights import io

Net = TypeVar("Net", bound=nn.Module)
SIZE = 32  # pixels a side; other sizes are resized to it


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm around a skip; `stride` 2 halves the resolution."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.a = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm_a = nn.BatchNorm2d(out)
        self.b = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm_b = nn.BatchNorm2d(out)
        self.skip = (nn.Conv2d(channels, out, 1, bias=False) if stride > 1 or channels != out
                     else nn.Identity())
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return F.relu(y + self.skip(F.avg_pool2d(x, self.stride) if self.stride > 1 else x))


class Judge(nn.Module):
    """Images in [-1, 1] (B 3 H W) -> (features B D, logits B classes), both fp32.

    Args:
        class_names: what the logits stand for, in their order.
        width: channels of the first stage; the features have 4 * width dimensions.
    """

    def __init__(self, class_names: list[str], width: int = 24):
        super().__init__()
        self.class_names, self.width = list(class_names), width
        self.fingerprint = ""  # of the weights; set by load()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.Sequential(Residual(width, width, 2), Residual(width, 2 * width, 2),
                                    Residual(2 * width, 4 * width, 2), Residual(4 * width, 4 * width, 1))
        self.head = nn.Linear(4 * width, len(self.class_names))

    @property
    def spec(self) -> dict[str, Any]:
        """Arguments that build this network again."""
        return {"class_names": self.class_names, "width": self.width}

    @property
    def dim(self) -> int:
        """Dimensions of the features."""
        return self.head.in_features

    def columns(self, class_names: list[str]) -> list[int]:
        """Which logits stand for `class_names`, for data that show only some of the judge's classes.

        Raises:
            ConfigError: a class that the judge has not learnt.
        """
        unknown = [name for name in class_names if name not in self.class_names]
        if unknown:
            raise ConfigError("the judge has not learnt class "
                              f"'{unknown[0]}'{nearest(unknown[0], self.class_names)}; train one on this "
                              "data with pretrain.objective=classify and give its run directory")
        return [self.class_names.index(name) for name in class_names]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stages(self.stem(resized(images))).mean(dim=(2, 3)).float()
        with torch.autocast(features.device.type, enabled=False):  # fp32: statistics are taken of these
            return features, self.head(features)


def resized(images: Tensor) -> Tensor:
    """Images B 3 H W as the small networks take them: fp32, of SIZE pixels a side."""
    x = images.float()
    if x.shape[-2:] == (SIZE, SIZE):
        return x
    return F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)


def trained(weights: str | Path | None, kind: str, make: Callable[..., Net]) -> Net:
    """A small network, frozen and in eval mode.

    Args:
        weights: None for the bundled one, a safetensors file, or the directory of the run that trained it.
        kind: "judge", "factors" or "groups". make: its class.

    Raises:
        CheckpointError: no such file, not safetensors, or not a network of this kind.
    """
    path = io.ASSETS / f"{kind}.safetensors" if weights is None else weights
    net, net.fingerprint = io.network(path, kind, make, kind)
    return net.eval().requires_grad_(False)


def load(weights: str | Path | None = None) -> Judge:
    """A judge: bundled, or of a run with objective "classify"; see :func:`trained`."""
    return trained(weights, "judge", Judge)
