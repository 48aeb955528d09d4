"""How images reach a metric: decided here and nowhere else, and hashed into every number.

A :class:`Resolved` protocol is what a `config.Protocol` means for one data set and one feature space: which images,
which crop, how pixels are rounded, whose features, which sampler. Its hash stands beside every
number; numbers of different hashes cannot be ranked. What a number does not depend on is not in its hash: a PSNR has
the same one in any feature space; batch size and file paths are in none, because they cannot change a result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmlab import config, data
from vfmlab.errors import ConfigError, DataError, nearest
from vfmlab.evaluation.features import FeatureSpace, open_space
from vfmlab.evaluation.frechet import FeatureSet, Moments
from vfmlab.seeding import generator
from vfmlab.weights import io

LOWER, HIGHER = "lower", "higher"
BETTER = {
    "psnr": HIGHER, "psnr_mask": HIGHER, "ssim": HIGHER, "lpips": LOWER, "feature_distance": LOWER,
    "rfd": LOWER, "rkd": LOWER, "gfd": LOWER, "gkd": LOWER, "gfd_own": LOWER, "gkd_own": LOWER,
    "class_accuracy": HIGHER, "class_accuracy_own": HIGHER,
    "inception_score": HIGHER, "precision": HIGHER, "recall": HIGHER,
    "probe_linear": HIGHER, "probe_knn": HIGHER, "cknna": HIGHER,
}  # fmt: skip
"""Every scalar metric and which end of it is good."""

NOT_HASHED = ("source",)


@dataclass(frozen=True)
class Resolved:
    """What a protocol means, section by section. `images`: data and pixels; `features`; `sampling`; `latents`."""

    sections: Mapping[str, Mapping[str, Any]]

    def of(self, *sections: str) -> Resolved:
        """The part that a metric depends on."""
        return Resolved({name: self.sections[name] for name in sections})

    @property
    def hash(self) -> str:
        """Eight hex digits."""
        kept = {name: {k: v for k, v in s.items() if k not in NOT_HASHED} for name, s in self.sections.items()}
        return config.digest(kept)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `n`, `n_real` and `seed` are repeated on top for tables."""
        images = self.sections["images"]
        return {"n": self.n, **{name: dict(section) for name, section in self.sections.items()}, "n_real": images["n"]}

    @property
    def n(self) -> int:
        """Samples of a generation protocol, else images."""
        return self.sections.get("sampling", self.sections["images"])["n"]


LATER = {"sampler": ("reuse",), "guidance": ("token",)}


def dump(protocol: config.Protocol) -> dict[str, Any]:
    """The protocol as JSON. Fields that came later and are null are left out, so that earlier numbers keep their hash."""
    told = protocol.model_dump(mode="json")
    for section, names in LATER.items():
        told[section] = {k: v for k, v in told[section].items() if v is not None or k not in names}
    return told


def resolve(
    protocol: config.Protocol,
    cfg: config.Data,
    source: data.ImageSource,
    space: FeatureSpace | None = None,
    sampling: bool = False,
) -> Resolved:
    """What `protocol` means for held-out images `source` of `cfg`, and for `space`.

    Images: protocol.n of the val split, or all of them where there are fewer; the protocol then says so.
    """
    base = {"version": protocol.version, "ema": protocol.ema, "dtype": "float32", "seed": protocol.seed}
    sections: dict[str, dict[str, Any]] = {
        "images": base
        | {
            "source": cfg.source,
            "fingerprint": source.fingerprint,
            "split": "val",
            "n": min(protocol.n, len(source)),
            "crop": "adm_centre",
            "size": cfg.size,
            "pixels": "uint8",
        }
    }
    if space is not None:
        sections["features"] = space.facts()
    if sampling and protocol.decoder is not None:
        sections["decoder"] = {"run": protocol.decoder}
    if sampling:
        told = dump(protocol)
        sections["sampling"] = {"n": protocol.n, **told["sampler"], "guidance": told["guidance"], "labels": "id modulo classes"}
    return Resolved(sections)


def chosen(resolved: Resolved, source: data.ImageSource) -> Tensor:
    """Which images of the split: all in order, or a seeded choice (files are often sorted by class). long n."""
    n, total = resolved.sections["images"]["n"], len(source)
    if n == total:
        return torch.arange(total)
    order = torch.randperm(total, generator=generator("evaluation images", resolved.sections["images"]["seed"]))
    return order[:n].sort().values


@dataclass
class Setup:
    """What evaluations of one data set under one protocol share, opened once."""

    cfg: config.Data
    protocol: config.Protocol
    source: data.ImageSource
    space: FeatureSpace

    def resolved(self, sampling: bool = False) -> Resolved:
        return resolve(self.protocol, self.cfg, self.source, self.space, sampling)

    def images(self, device: str | torch.device) -> Iterator[tuple[data.Batch, Tensor]]:
        """The protocol's real images in [-1, 1], batch by batch."""
        for part in chosen(self.resolved(), self.source).split(self.protocol.batch):
            found = self.source.batch(part)
            yield found, data.to_float(found.images).to(device)

    @property
    def judged(self) -> str | None:
        """Why the feature space cannot tell the classes of this data; None where it can."""
        known = self.space.class_names
        if known is None:
            return f"feature space '{self.space.name}' knows no classes"
        missing = [name for name in self.source.class_names if name not in known]
        if missing:
            return f"feature space '{self.space.name}' has not learnt class '{missing[0]}' of '{self.cfg.source}'"
        return None

    def told(self, logits: Tensor) -> Tensor:
        """Labels (long B, on the CPU) that the judge gives, among the classes of this data; only where `judged` is None."""
        columns = [self.space.class_names.index(name) for name in self.source.class_names]
        return logits[:, columns].argmax(1).cpu()


def open_setup(
    cfg: config.Data, protocol: config.Protocol, root: str | Path = "runs", device: str | torch.device = "cpu"
) -> Setup:
    """Held-out images and feature space of a protocol; errors as :func:`~vfmlab.evaluation.features.open_space`."""
    space = open_space(protocol.features, cfg.size, root).to(device)
    return Setup(cfg, protocol, data.open_source(cfg, "val"), space)


def as_saved(images: Tensor) -> Tensor:
    """Model output as a metric sees it: clipped and rounded to 8 bits, as in an image file, and back in [-1, 1].

    Raises:
        DataError: not finite (8 bits would turn that into black).
    """
    if not torch.isfinite(images).all():
        bad = (~torch.isfinite(images).flatten(1).all(1)).nonzero().flatten().tolist()
        raise DataError(f"{len(bad)} of {len(images)} images are not finite (the first: number {bad[0]} of its batch)")
    return data.to_float(data.to_uint8(images))


# -- real images' features, kept on disk -------------------------------------------------------------------------------


def cache_folder() -> Path:
    """`VFMLAB_CACHE`, or `vfmlab` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vfmlab"
    return Path(os.environ.get("VFMLAB_CACHE", default)).expanduser()


@torch.no_grad()
def real_features(setup: Setup, cache: bool = True) -> FeatureSet:
    """Features of the real images, computed once per (images, feature space) and kept in :func:`cache_folder`."""
    sections, space = setup.resolved().sections, setup.space
    relevant = {k: v for k, v in sections["images"].items() if k not in ("ema", *NOT_HASHED)}
    path = cache_folder() / "real_features" / f"{config.digest([relevant, sections['features']])}.safetensors"
    if cache and (found := _read(path, space.dimension, relevant["n"])) is not None:
        return found
    device = next((p.device for p in space.parameters()), "cpu")
    features = FeatureSet.empty(space.dimension)
    for _, images in setup.images(device):
        features.update(space(images).features)
    if cache:
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = features.moments
        tensors = {"mean": moments.mean, "scatter": moments.scatter, "rows": features.features()}
        io.write(path, tensors, {"count": moments.count})
    return features


def _read(path: Path, dimension: int, n: int) -> FeatureSet | None:
    """The kept features, or None where there are none or the file is damaged (it is then written anew)."""
    if (stored := io.cached(path)) is None:
        return None
    try:
        tensors, facts = stored
        count, moments = int(facts["count"]), Moments(dimension)
        moments.count, moments.mean, moments.scatter = count, tensors["mean"], tensors["scatter"]
        found = FeatureSet(moments, [tensors["rows"]])
    except (KeyError, ValueError):
        return None
    return found if count == n and moments.mean.shape == (dimension,) else None


# -- numbers -----------------------------------------------------------------------------------------------------------


class Report:
    """Numbers with the hash of what they depend on: `numbers[metric] = {"value", "protocol", "n", "spread"?}`.

    A number that could not be had is there too, with value None and a reason: never 0, never left out silently.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, dict[str, Any]] = {}
        self.protocols: dict[str, dict[str, Any]] = {}

    def add(
        self, metric: str, value: Any, protocol: Resolved, n: int, spread: float | None = None, **more: Any
    ) -> None:
        entry = {"value": value, "protocol": protocol.hash, "n": n}
        self.protocols[protocol.hash] = protocol.as_dict()
        self.numbers[metric] = entry | ({} if spread is None else {"spread": spread}) | more

    def absent(self, metric: str, reason: str) -> None:
        self.numbers[metric] = {"value": None, "reason": reason}


def rank(reports: Mapping[str, Mapping[str, Any]], metric: str) -> list[tuple[str, float]]:
    """Runs from best to worst by one metric: [(name, value)].

    Args:
        reports: name -> report (as in report.json), or name -> its metrics. Runs without the number are left out.

    Raises:
        ConfigError: unknown metric, or numbers measured under different protocols.
    """
    if metric not in BETTER:
        raise ConfigError(f"unknown metric '{metric}'{nearest(metric, BETTER)}")
    values, hashes = {}, {}
    for name, report in reports.items():
        entry = report.get("metrics", report).get(metric)
        if entry is not None and entry.get("value") is not None:
            values[name], hashes[name] = float(entry["value"]), entry["protocol"]
    if not values:
        raise DataError(f"none of the {len(reports)} reports has a value of '{metric}'; evaluate the runs first")
    if len(set(hashes.values())) > 1:
        (one, first), (other, second) = _two_that_differ(hashes)
        known = [reports[name].get("protocols", {}).get(h) for name, h in ((one, first), (other, second))]
        why = f": {difference(*known)}" if all(known) else ""
        raise ConfigError(
            f"'{metric}' of '{one}' (protocol {first}) and '{other}' (protocol {second}) cannot be ranked{why}; "
            "evaluate both under one protocol"
        )
    return sorted(values.items(), key=lambda item: item[1], reverse=BETTER[metric] == HIGHER)


def groups(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that may stand in one table: no metric of two of them was measured under different protocols.

    Args:
        results: {"metrics": {name: {"value", "protocol", ...}}, ...} each. Rows without any number are left out.
    """
    found: list[tuple[dict[str, str], list[dict[str, Any]]]] = []
    for result in results:
        hashes = {k: v["protocol"] for k, v in result["metrics"].items()}
        if not hashes:
            continue
        for known, members in found:
            common = hashes.keys() & known.keys()
            if common and all(hashes[k] == known[k] for k in common):
                known.update(hashes)
                members.append(result)
                break
        else:
            found.append((dict(hashes), [result]))
    return [members for _, members in found]


def _two_that_differ(hashes: Mapping[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    items = list(hashes.items())
    return items[0], next(item for item in items if item[1] != items[0][1])


def difference(a: Mapping[str, Any], b: Mapping[str, Any], at: str = "") -> str:
    """Fields in which two protocols differ: "sampling.steps 25 / 50"."""
    found = []
    for key in [*a, *(k for k in b if k not in a)]:
        one, two = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found.append(difference(one, two, f"{at}{key}."))
        elif one != two and key not in NOT_HASHED and (at or key not in ("n", "n_real")):
            found.append(f"{at}{key} {one} / {two}")
    return ", ".join(part for part in found if part)
