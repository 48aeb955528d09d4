"""How images reach a metric: decided here and nowhere else, and hashed into every number.

A :class:`Resolved` protocol is what a `config.Protocol` means for one data set and one feature space: which
images, which crop, how pixels are rounded, whose features, which sampler. Its hash stands beside every
number; numbers of different hashes cannot be ranked. What a number does not depend on is not in its hash: a
PSNR has the same one in any feature space; batch size and file paths are in none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmlab import config, data
from vfmlab.errors import DataError
from vfmlab.evaluation import cache, prompts
from vfmlab.evaluation.features import FeatureSpace, open_space
from vfmlab.evaluation.frechet import FeatureSet, Moments
from vfmlab.evaluation.npz import STATISTICS, Reference, open_reference
from vfmlab.evaluation.number import NOT_HASHED
from vfmlab.evaluation.precision import tf32
from vfmlab.evaluation.ranks import ALONE, Ranks
from vfmlab.seeding import generator


@dataclass(frozen=True)
class Resolved:
    """What a protocol means, by section: `images` (data, pixels), `features`, `sampling`, `latents`."""

    sections: Mapping[str, Mapping[str, Any]]

    def of(self, *sections: str) -> Resolved:
        """The part that a metric depends on."""
        return Resolved({name: self.sections[name] for name in sections})

    @property
    def hash(self) -> str:
        """Eight hex digits."""
        sections = {name: {k: v for k, v in s.items() if k not in NOT_HASHED}
                    for name, s in self.sections.items()}
        return config.digest(sections)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `n`, `n_real` and `seed` are repeated on top for tables."""
        images = self.sections["images"]
        return {"n": self.n, **{name: dict(section) for name, section in self.sections.items()},
                "n_real": images["n"]}

    @property
    def n(self) -> int:
        """Samples of a generation protocol, else images."""
        return self.sections.get("sampling", self.sections["images"])["n"]


LATER = {"sampler": ("reuse", "parallel", "prior_noise"), "guidance": ("token", "kind", "weaker")}
LATER_DEFAULTS = {"noise": "protocol", "token_sampler": None, "labels": "balanced", "reference": None,
                  "precision": "fp32", "prompts": None}
DTYPES = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}
LABELS = {"balanced": "id modulo classes", "random": "drawn by id"}


def dump(protocol: config.Protocol) -> dict[str, Any]:
    """The protocol as JSON; fields that came later are absent at their defaults, as in earlier hashes."""
    fields = protocol.model_dump(mode="json")
    fields = {name: value for name, value in fields.items() if LATER_DEFAULTS.get(name, ...) != value}
    for section, names in LATER.items():
        fields[section] = {k: v for k, v in fields[section].items() if v is not None or k not in names}
    return fields


def exact(protocol: config.Protocol) -> config.Protocol:
    """The protocol of what is computed in fp32 whatever its precision, such as instruments."""
    return protocol.model_copy(update={"precision": "fp32"})


def resolve(protocol: config.Protocol, cfg: config.Data, source: data.ImageSource,
            space: FeatureSpace | None = None, sampling: bool = False,
            reference: Reference | TrainingImages | None = None) -> Resolved:
    """What `protocol` means for held-out images `source` of `cfg`, and for `space`.

    Images: protocol.n of the val split, or all of them where there are fewer; the protocol then says so.
    reference: what is compared with in their place.
    """
    base = {"version": protocol.version, "ema": protocol.ema,
            "dtype": DTYPES[protocol.precision], "seed": protocol.seed}
    sections: dict[str, dict[str, Any]] = {"images": base
                                           | {"source": cfg.source, "fingerprint": source.fingerprint,
                                              "split": "val", "n": min(protocol.n, len(source)),
                                              "crop": "adm_centre", "size": cfg.size, "pixels": "uint8"}}
    if space is not None:
        sections["features"] = space.facts()
    if reference is not None:
        sections["reference"] = reference.facts()
    if sampling and protocol.decoder is not None:
        sections["decoder"] = {"run": protocol.decoder}
    if sampling:
        fields = dump(protocol)
        labels = {"guidance": fields["guidance"], "labels": LABELS[protocol.labels]}
        if protocol.prompts is not None:
            labels["prompts"] = prompts.mark(protocol, source)
        if protocol.token_sampler is not None:
            labels["guidance"] = {"scale": protocol.guidance.scale}
        how = fields.get("token_sampler") or fields["sampler"]
        noise = {"noise": fields["noise"]} if "noise" in fields else {}
        sections["sampling"] = {"n": protocol.n, **how, **labels, **noise}
    return Resolved(sections)


def selection(resolved: Resolved, source: data.ImageSource) -> Tensor:
    """Which images of the split, long n: all in order, or a seeded choice (files are sorted by class)."""
    n, total = resolved.sections["images"]["n"], len(source)
    if n == total:
        return torch.arange(total)
    order = torch.randperm(total,
                           generator=generator("evaluation images", resolved.sections["images"]["seed"]))
    return order[:n].sort().values


@dataclass(frozen=True)
class TrainingImages:
    """All training images, without flips, as the reference in place of an npz file. A Frechet distance to
    more images is less biased; samples that repeat training images are not punished by it."""

    source: data.ImageSource
    size: int
    path: str = "the training images"

    @property
    def n(self) -> int:
        return len(self.source)

    def facts(self) -> dict[str, Any]:
        return {"split": "train", "fingerprint": self.source.fingerprint, "n": self.n}

    @property
    def key(self) -> dict[str, Any]:
        return {**self.facts(), "size": self.size}

    @property
    def digest(self) -> str:
        return config.digest(self.key)

    def moments(self, of: str) -> None:
        """No statistics are given: they are made from the images."""

    def images(self, batch: int) -> Iterator[Tensor]:
        """In order, uint8 B 3 H W."""
        for ids in torch.arange(self.n).split(batch):
            yield self.source.batch(ids).images


def open_compared(protocol: config.Protocol, cfg: config.Data) -> Reference | TrainingImages | None:
    """What samples are compared with by `protocol.reference`; None: the held-out images.

    Raises:
        DataError: as :func:`~vfmlab.evaluation.npz.open_reference`, or one image without statistics.
    """
    if protocol.reference is None:
        return None
    if protocol.reference == "train":
        return TrainingImages(data.open_source(cfg, "train"), cfg.size)
    reference = open_reference(protocol.reference, cfg.size)
    if reference.n == 1 and reference.moments("features") is None:
        raise DataError(f"'{reference.path}' holds one image, which has no covariance; give a reference of "
                        "at least 2 images, or one with mu and sigma")
    return reference


@dataclass
class Setup:
    """What evaluations of one data set under one protocol share, opened once.

    ranks: the processes that measure together. drawn: the samples, where they lie in a file already.
    """

    cfg: config.Data
    protocol: config.Protocol
    source: data.ImageSource
    space: FeatureSpace
    reference: Reference | TrainingImages | None = None
    ranks: Ranks = ALONE
    drawn: Reference | None = None

    def resolved(self, sampling: bool = False, compared: bool = False) -> Resolved:
        """sampling: of numbers of samples. compared: of numbers against the reference, as those of samples
        are where there is one."""
        reference = self.reference if sampling or compared else None
        return resolve(self.protocol, self.cfg, self.source, self.space, sampling, reference)

    def images(self, device: str | torch.device) -> Iterator[tuple[data.Batch, Tensor]]:
        """The protocol's real images in [-1, 1], batch by batch."""
        for part in selection(self.resolved(), self.source).split(self.protocol.batch):
            batch = self.source.batch(part)
            yield batch, data.to_float(batch.images).to(device)

    def shares(self, device: str | torch.device) -> Iterator[tuple[data.Batch, Tensor, Tensor]]:
        """The same in larger batches, each process's share of them, with the ids of the whole batch."""
        for ids in selection(self.resolved(), self.source).split(self.protocol.batch * self.ranks.count):
            batch = self.source.batch(self.ranks.share(ids))
            yield batch, data.to_float(batch.images).to(device), ids

    def joined(self, ids: Tensor, images: Tensor, restored: Tensor, *more: Tensor | None) -> list[Any]:
        """Rows of all processes for a batch of `ids`; images, restored (8 bits, in [-1, 1]) go as bytes."""
        if self.ranks.count == 1:
            return [images, restored, *more]
        pixels = self.ranks.join(len(ids), data.to_uint8(images), data.to_uint8(restored))
        return [*map(data.to_float, pixels), *self.ranks.join(len(ids), *more)]

    @property
    def unknown_classes(self) -> str | None:
        """Why the feature space cannot classify this data; None where it can."""
        known = self.space.class_names
        if known is None:
            return f"feature space '{self.space.name}' knows no classes"
        missing = [name for name in self.source.class_names if name not in known]
        if missing:
            name = self.space.name
            return f"feature space '{name}' has not learnt class '{missing[0]}' of '{self.cfg.source}'"
        return None

    def classify(self, logits: Tensor) -> Tensor:
        """Labels (long B, on the CPU) that the judge gives, among the classes of this data."""
        columns = [self.space.class_names.index(name) for name in self.source.class_names]
        return logits[:, columns].argmax(1).cpu()


def open_setup(cfg: config.Data, protocol: config.Protocol, root: str | Path = "runs",
               device: str | torch.device = "cpu", ranks: Ranks = ALONE) -> Setup:
    """Held-out images, feature space and reference of a protocol; errors as
    :func:`~vfmlab.evaluation.features.open_space` and :func:`open_compared`."""
    space = open_space(protocol.features, cfg.size, root).to(device)
    space.prepare(cfg)
    reference = open_compared(protocol, cfg)
    setup = Setup(cfg, protocol, data.open_source(cfg, "val"), space, reference, ranks)
    if reference is not None:
        given(setup, "features")
    return setup


# -- real images' features, cached on disk -------------------------------------------------------------------


@torch.no_grad()
def real_features(setup: Setup, cached: bool = True, of: str = "features") -> FeatureSet:
    """Features of the real images, cached by (images, feature space); of: which output of the space."""
    images = setup.resolved().sections["images"]
    images = {k: v for k, v in images.items() if k not in ("ema", *NOT_HASHED)} | {"dtype": "float32"}
    device = next((p.device for p in setup.space.parameters()), "cpu")
    batches = ((batch, len(ids)) for _, batch, ids in setup.shares(device))
    return _features(setup, images, batches, images["n"], cached, of)


def compared_features(setup: Setup, of: str = "features") -> FeatureSet:
    """What samples are compared with: the reference where the protocol names one, else the real images."""
    reference = setup.reference
    if reference is None:
        return real_features(setup, of=of)
    moments, rows = given(setup, of), []
    if reference.n and (moments is None or of == "features"):
        device = next((p.device for p in setup.space.parameters()), "cpu")
        ranks, batch = setup.ranks, setup.protocol.batch
        parts = reference.images(batch * ranks.count)
        batches = ((data.to_float(ranks.share(part)).to(device), len(part)) for part in parts)
        features = _features(setup, reference.key, batches, reference.n, True, of)
        moments, rows = moments or features.moments, features.rows
    if moments is None:
        raise DataError(f"'{reference.path}' has neither images nor {' and '.join(STATISTICS[of])}")
    return FeatureSet(moments, rows)


def given(setup: Setup, of: str) -> Moments | None:
    """The statistics that the reference gives of an output of the space; None where it gives none.

    Raises:
        DataError: of another space.
    """
    moments, space = setup.reference.moments(of), setup.space
    if moments is None:
        return None
    if space.name != "inception" or (of == "features" and len(moments.mean) != space.dimension):
        raise DataError(f"'{setup.reference.path}' gives statistics of {len(moments.mean)} Inception "
                        f"features, protocol.features '{space.name}' has {space.dimension} of its own; set "
                        "protocol.features=inception")
    return moments


@torch.no_grad()
def _features(setup: Setup, images: Mapping[str, Any], batches: Iterator[tuple[Tensor, int]], n: int,
              cached: bool, of: str) -> FeatureSet:
    """Features of n images, kept under what `images` says of them. batches: this process's share of each
    (B 3 H W in [-1, 1]), and how many images it has in all."""
    space = setup.space
    key = [images, space.facts(), *([of] if of != "features" else [])]
    path = cache.folder() / "real_features" / f"{config.digest(key)}.safetensors"
    tensors = cache.read(path) if cached else None
    if tensors is not None and {"count", "mean", "scatter", "rows"} <= tensors.keys():
        moments = Moments(len(tensors["mean"]))
        moments.count, moments.mean, moments.scatter = int(
            tensors["count"]), tensors["mean"], tensors["scatter"]
        if moments.count == n and (of != "features" or moments.mean.shape == (space.dimension,)):
            return FeatureSet(moments, [tensors["rows"]])
    features = None
    with tf32(False):
        for batch, count in batches:
            (seen,) = setup.ranks.join(count, getattr(space(batch), of))
            features = features or FeatureSet.empty(seen.shape[1], n if images.get("rows") else None)
            features.update(seen)
    if cached:
        moments = features.moments
        count = torch.tensor(moments.count)
        cache.write(path, {"count": count, "mean": moments.mean, "scatter": moments.scatter,
                           "rows": features.features()})
    return features
