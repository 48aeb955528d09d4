"""Encoded images at numbered places (files, table rows, tar members) -> a source that survives unreadable ones."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vfmlab.config import Data, digest
from vfmlab.data.base import UNLABELLED, ImageSource
from vfmlab.data.decode import FORMATS, Unreadable, decode
from vfmlab.errors import DataError, nearest
from vfmlab.seeding import generator

FEW = 10
"""So many unreadable images are always forgiven; beyond them, no more than `SHARE` of all that were tried."""
SHARE = 0.1

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "dev", "test", "testing")  # the first that is there is used


class Records(NamedTuple):
    """The encoded images of one part of a data set.

    count: how many. read: position -> bytes (may raise :class:`Unreadable` or OSError). name: position -> what a
    message calls it. labels: int or str per image, None without labels. names: of the classes, where the format tells
    them. identity: JSON-like value that decides the content. bad: files that were unreadable as a whole.
    """

    count: int
    read: Callable[[int], bytes]
    name: Callable[[int], str]
    labels: Sequence[int] | Sequence[str] | None
    names: list[str] | None
    identity: object
    bad: tuple[str, ...] = ()


class RecordSource(ImageSource):
    """One split of some records.

    An unreadable image is replaced by the next readable one of the split, so that what an index holds stays a function
    of the index. Each is named once in `bad`; too many raise :class:`DataError`.

    Args:
        what: source string, for messages. records: the part. picked: int64, its positions in this split, in the order
        of the split's indices. labels: long, one per index. names: of the classes. mark: the fingerprint.
    """

    def __init__(
        self, what: str, records: Records, picked: np.ndarray, labels: Tensor, names: list[str], size: int, mark: str
    ):
        super().__init__(size, labels, names, mark)
        self.what, self.records, self.picked = what, records, picked
        self.bad = list(records.bad)
        self._state = np.zeros(len(picked), np.uint8)  # 0 not tried, 1 readable, 2 not
        self._tried = 0
        self._decode(0)  # fails here and now if nothing can be read

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        used = torch.empty(len(indices), dtype=torch.long)
        for row, index in enumerate(indices.tolist()):
            images[row], used[row] = self._decode(index)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), used

    def _decode(self, index: int) -> tuple[np.ndarray, int]:
        """The image at `index`, or the first readable one after it, circular; with the index it has."""
        for step in range(len(self)):
            i = (index + step) % len(self)
            if self._state[i] == 2:
                continue
            self._tried += self._state[i] == 0
            position = int(self.picked[i])
            try:
                image = decode(self.records.read(position), self.size)
            except (Unreadable, OSError) as error:
                known, self._state[i] = self._state[i] == 2, 2
                if not known:  # another thread may have met it meanwhile
                    reason = error.strerror or error if isinstance(error, OSError) else error
                    self._note(f"{self.records.name(position)}: {reason}")
            else:
                self._state[i] = 1
                return image, i
        raise DataError(f"{self.what}: none of its {len(self)} images can be read, for example {self.bad[-1]}")

    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the first readable image, before the crop."""
        position = int(self.picked[self._decode(0)[1]])
        with Image.open(io.BytesIO(self.records.read(position)), formats=FORMATS) as image:
            return image.size

    def _note(self, line: str) -> None:
        self.bad.append(line)
        if len(self.bad) > max(FEW, SHARE * self._tried):
            count = f"{len(self.bad)} of {self._tried} images tried"
            raise DataError(f"{self.what}: {count} cannot be read, for example {line}")


def source(config: Data, split: str, what: str, parts: dict[str, Records]) -> RecordSource:
    """The split `split` of `parts`, which is either {"train": ..., "val": ...} or {"all": ...}.

    Where the data has no split of its own, `config.val` images (at most a fifth) are held out, drawn with
    `config.seed`. Caps take a random subset too: files may be sorted by class.
    """
    empty = [name for name, part in parts.items() if part.count == 0]
    if empty:
        raise DataError(f"{what}: no images found" + (f" in its {empty[0]} part" if len(parts) > 1 else ""))
    labels, names = _classes(what, parts)
    part = "all" if "all" in parts else split
    count = parts[part].count
    order = torch.randperm(count, generator=generator("split", config.seed, part)).numpy()
    if part == "all":
        if count < 2:
            raise DataError(f"{what}: one image cannot be split into train and val; add images")
        held = min(config.val, max(1, count // 5))
        order = order[:held] if split == "val" else order[held:]
    picked = order[: config.train if split == "train" else config.val]
    chosen = hashlib.sha256(picked.astype("<i8").tobytes()).hexdigest()
    records = parts[part]._replace(labels=None)  # kept as numbers only
    mark = digest([records.identity, split, config.size, chosen])
    return RecordSource(what, records, picked, torch.from_numpy(labels[part][picked]), names, config.size, mark)


def _classes(what: str, parts: dict[str, Records]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Labels of each part as int64 in [0, number of classes), and the names of the classes."""
    without = [name for name, part in parts.items() if part.labels is None]
    if len(without) == len(parts):
        return {name: np.zeros(part.count, np.int64) for name, part in parts.items()}, list(UNLABELLED)
    if without:
        raise DataError(f"{what}: the {without[0]} part has no labels, the other has")
    found = {name: np.asarray(part.labels) for name, part in parts.items()}
    first = "all" if "all" in parts else "train"
    kinds = {values.dtype.kind for values in found.values()}
    if kinds == {"U"}:
        names, known = np.unique(found[first]), {}
        for name, values in found.items():
            strange = np.setdiff1d(values, names)
            if len(strange):
                raise DataError(f"{what}: class '{strange[0]}' is in the {name} part only{nearest(strange[0], names)}")
            known[name] = np.searchsorted(names, values)
        return known, [str(name) for name in names]
    if not kinds <= {"i", "u"}:
        raise DataError(f"{what}: labels are neither whole numbers nor text; name another column in data.label_column")
    low, high = min(int(v.min()) for v in found.values()), max(int(v.max()) for v in found.values())
    names = parts[first].names
    limit = len(names) if names is not None else 100_000
    if low < 0 or high >= limit:
        raise DataError(f"{what}: label {low if low < 0 else high} is outside 0..{limit - 1}; is it the class column?")
    names = names if names is not None else [str(i) for i in range(high + 1)]
    return {name: values.astype(np.int64) for name, values in found.items()}, list(names)


def existing(what: str, path: str) -> Path:
    """`path` if it exists; otherwise :class:`DataError` with the nearest name where the path breaks off."""
    target = Path(path).expanduser()
    if target.exists():
        return target
    broken = target
    while not broken.parent.exists():
        broken = broken.parent
    parent = broken.parent
    names = [p.name for p in parent.iterdir() if not p.name.startswith(".")] if parent.is_dir() else []
    raise DataError(f"{what}: there is no '{broken.name}' in {parent.absolute()}{nearest(broken.name, names)}")


def split_names(names: Sequence[str]) -> dict[str, list[str]]:
    """Sort file or split names by the words in them: {"train": ..., "val": ...} if both are there, else {"all": ...}.

    The first of `VAL_NAMES` that occurs is used; others (a test part beside a validation part) are left out.
    """
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    train = [name for name in names if words[name] & set(TRAIN_NAMES)]
    for word in VAL_NAMES:
        val = [name for name in names if word in words[name] and name not in train]
        if train and val:
            return {"train": train, "val": val}
    return {"all": train or list(names)}
