"""`classifier:VFM@SIDE`: a judge for any labelled data, made of a vision model and a linear head.

The vision model is frozen, a row of the VFM table or `timm:NAME`, and looks at images of SIDE pixels (its
native side where none is given). The head is fitted in closed form (ridge regression on the classes) to a
seeded part of the data set's training images; its accuracy on held-out images stands in the protocol.
Features are the vision model's global token. Heads are stored in the cache folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vfmlab import config, data
from vfmlab.evaluation import cache, linear
from vfmlab.evaluation.features import FeatureSpace, Seen, VisionModelSpace, over
from vfmlab.registry import FEATURE_SPACES
from vfmlab.seeding import generator

FITTED = 4000  # training images
HELD_OUT = 1000
SEED = 0
BATCH = 50


@FEATURE_SPACES.register("classifier")
class ClassifierSpace(FeatureSpace):
    """Global features of a vision model, and logits of a linear head that :meth:`prepare` fits."""

    def __init__(self, reference: str, size: int, root: str | Path):
        super().__init__()
        self.plain = VisionModelSpace(reference, size, root)
        self.plain.name = reference
        self.dimension, self.preprocessing = self.plain.dimension, self.plain.preprocessing
        self.version = self.plain.version
        self.register_buffer("weight", torch.zeros(0, self.dimension), persistent=False)
        self.register_buffer("bias", torch.zeros(0), persistent=False)
        self.accuracy: float | None = None

    def facts(self) -> dict[str, str | int | float]:
        fitted = {} if self.accuracy is None else {"accuracy": round(self.accuracy, 4)}
        return super().facts() | {"name": self.name} | fitted

    def forward(self, images: Tensor) -> Seen:
        features = self.plain(images).features
        return Seen(features, features @ self.weight.T + self.bias if self.class_names else None)

    @torch.no_grad()
    def prepare(self, cfg: config.Data) -> None:
        """Fit the head to the training images of `cfg`, or read it from the cache; none where they have no
        classes."""
        source = data.open_source(cfg, "train")
        if source.num_classes < 2:
            return
        n = min(FITTED, len(source))
        what = [self.plain.facts(), source.fingerprint, source.class_names, n, HELD_OUT, SEED, linear.FACTS]
        key = config.digest(what)
        path = cache.folder() / "heads" / f"{key}.safetensors"
        head = cache.read(path)
        if head is None or head.get("weight", torch.zeros(0)).shape != (source.num_classes, self.dimension):
            head = self._fit(source, data.open_source(cfg, "val"), n)
            cache.write(path, head)
        self.weight, self.bias = head["weight"].to(self.weight), head["bias"].to(self.bias)
        self.accuracy, self.class_names = float(head["accuracy"]), list(source.class_names)
        self.version = f"{self.plain.version} {key}"

    def _fit(self, source: data.ImageSource, held_out: data.ImageSource, n: int) -> dict[str, Tensor]:
        x, labels = self._seen(source, n, "classifier head")
        fitted = linear.Ridge(x).fit(torch.nn.functional.one_hot(labels, source.num_classes))
        bias = fitted(x.new_zeros(1, x.shape[1]))  # an affine map, read off at 0 and at the unit vectors
        weight = (fitted(torch.eye(x.shape[1])) - bias).T
        seen, truth = self._seen(held_out, HELD_OUT, "classifier held out")
        accuracy = (fitted(seen).argmax(1) == truth).double().mean()
        return {"weight": weight.float(), "bias": bias[0].float(), "accuracy": accuracy}

    def _seen(self, source: data.ImageSource, n: int, name: str) -> tuple[Tensor, Tensor]:
        """Features N D and labels N of a seeded part of the images, on the CPU."""
        order = torch.randperm(len(source), generator=generator(name, SEED))[:n].sort().values
        return over(source, order, lambda x: self.plain(x.to(self.weight.device)).features, BATCH)
