"""Parts with known answers: a lossless tokenizer, a network that knows its targets, a space that knows its classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config, data
from vfmlab.config import TokenizerConfig
from vfmlab.evaluation.features import FeatureSpace, Seen
from vfmlab.evaluation.protocol import Setup
from vfmlab.tokenizers.base import Posterior, Statistics, Tokenizer

SIZE = 16
CFG = config.Data(source="scenes:easy", size=SIZE, train=200, val=60)


class Lossless(Tokenizer):
    """Pixels of 2 x 2 as channels; `error` is added to every pixel on the way back."""

    def __init__(self, error: float = 0.0, size: int = SIZE, statistics: bool = True):
        super().__init__(TokenizerConfig(method="lossless", channels=12, factor=2), size)
        self.error = error
        if statistics:
            mean, std = torch.linspace(-0.2, 0.2, 12), torch.linspace(0.4, 0.6, 12)
            self.set_statistics(Statistics(mean, std, 10, "toy"))

    def posterior(self, images: Tensor, features=None) -> Posterior:
        return Posterior(F.pixel_unshuffle(images, 2))

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        return [F.pixel_shuffle(z, 2) + self.error]


class Toy(FeatureSpace):
    """A fixed random projection of 4 x 4 colours; classes by the nearest of given prototypes."""

    name, version, dimension, preprocessing = "toy", "1", 10, "4 x 4"

    def __init__(self, class_names: list[str] | None = None, prototypes: Tensor | None = None):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("weight", torch.randn(48, 10, generator=draw) / 7)
        self.class_names, self.prototypes = class_names, prototypes
        self.seen = 0

    def forward(self, images: Tensor) -> Seen:
        self.seen += len(images)
        logits = None
        if self.prototypes is not None:
            logits = -torch.cdist(images.flatten(1), self.prototypes.flatten(1))
        return Seen(F.adaptive_avg_pool2d(images, 4).flatten(1) @ self.weight, logits)


class Knows(nn.Module):
    """The velocity field whose samples are exactly `targets[label]` (K C h w): v = (x - target) / t."""

    def __init__(self, targets: Tensor, noise: float = 0.0):
        super().__init__()
        self.targets, self.noise = nn.Parameter(targets), noise
        self.latent_shape, self.num_classes = tuple(targets.shape[1:]), len(targets)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        y = y.clamp_max(self.num_classes - 1)
        return (x - self.noise * x - self.targets[y]) / t.view(-1, 1, 1, 1).clamp_min(1e-3)


def setup(protocol: config.Protocol, cfg: config.Data = CFG, space: FeatureSpace | None = None) -> Setup:
    source = data.open_source(cfg, "val")
    return Setup(cfg, protocol, source, space or Toy())


def one_per_class(source: data.ImageSource) -> Tensor:
    """The first image of each class, in [-1, 1]."""
    first = [int((source.labels == k).nonzero()[0]) for k in range(source.num_classes)]
    return data.to_float(source.batch(torch.tensor(first)).images)
