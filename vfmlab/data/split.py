"""What the classes are, which images are held out, and the fingerprint of a split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch

from vfmlab.config.data import Data
from vfmlab.data.base import UNLABELLED
from vfmlab.data.records import Records, RecordSource, readable
from vfmlab.errors import ConfigError, DataError, nearest

VERSION = 2  # raised when the split or the fingerprint of folders, tables and shards changes
ENOUGH = 5  # training images of a class; fewer are worth a warning

TRAIN_NAMES = ("train", "training", "trainset", "trn")
VAL_NAMES = (
    "val", "valid", "validation", "valset", "validset", "dev", "test", "testing", "testset", "eval",
    "evaluation", "holdout", "heldout",
)  # the first that is there is used  # fmt: skip
FILLERS = ("set", "data", "split", "images", "imgs", "")


def source(config: Data, split: str, parts: dict[str, Records]) -> RecordSource:
    """The split `split` of `parts`, which is either {"train": ..., "val": ...} or {"all": ...}.

    Where the data has no split of its own, `config.val` images (at most a fifth) are held out. Both this and
    a cap take every class in proportion, by a hash of `config.seed` and the images' names: an image more
    moves hardly any other.
    """
    what = next(iter(parts.values())).what
    for name, part in parts.items():
        if not len(part):
            where = f" in its {name} part" if len(parts) > 1 else ""
            raise DataError(f"{what}: no images found{where}{_besides(part)}")
    labels, names = classes(what, parts)
    every = {name: np.arange(len(part)) for name, part in parts.items()}
    hashes = {}
    if "all" in parts:
        count = len(parts["all"])
        if count < 2:
            raise DataError(f"{what}: one image cannot be split into train and val; add images")
        hashes["all"] = _hashes(parts["all"], config.seed)
        order = stratified(hashes["all"], labels["all"], spare=True)
        held = min(config.val, max(1, count // 5))
        every = {"train": np.sort(order[held:]), "val": np.sort(order[:held])}
    part = "all" if "all" in parts else split
    records, mine = parts[part], labels[part]
    if part not in hashes:
        hashes[part] = _hashes(records, config.seed)
    caps = {"train": config.train, "val": config.val}
    picked = every[split][stratified(hashes[part][every[split]], mine[every[split]])][: caps[split]]
    values = {name: labels.get(name, mine)[rows] for name, rows in (every | {split: picked}).items()}
    counts = {name: np.bincount(rows, minlength=len(names)) for name, rows in values.items()}
    records.labels = None  # from here on they are numbers
    made = RecordSource(records, picked, torch.from_numpy(mine[picked]), names, config.size,
                        _mark(config, records, picked, mine, names))
    there, val = len(every["train"]), len(every["val"])
    made.sizes = (min(there, config.train or there), there, min(val, config.val))
    made.notes += _sparse(counts["train"], counts["val"], names)
    return made


def stratified(hashes: np.ndarray, labels: np.ndarray, spare: bool = False) -> np.ndarray:
    """Positions in an order of which every prefix holds the classes in proportion, one of each first.

    Args:
        hashes: uint64 N, the order within a class. labels: int64 N. spare: the last image of every class
            comes at the end, so that a prefix that is cut off leaves each class one.
    """
    by_class = np.lexsort((hashes, labels))
    counts = np.bincount(labels)
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[by_class]]
    place = rank / counts[labels]
    if spare:
        place[rank == counts[labels] - 1] += 1
    return np.lexsort((hashes, place))


def _hashes(records: Records, seed: int) -> np.ndarray:
    def value(position: int) -> int:
        key = f"{seed}/{records.key(position)}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big")

    return np.fromiter(map(value, range(len(records))), np.uint64, len(records))


def _mark(config: Data, records: Records, picked: np.ndarray, labels: np.ndarray, names: list[str]) -> str:
    """Digest of names, labels and content of the picked images."""
    mark = hashlib.sha256(repr((VERSION, config.size, names)).encode())
    for position in picked.tolist():
        row = f"{records.key(position)}\0{labels[position]}\0{records.content(position)}\n"
        mark.update(row.encode("utf-8", "surrogateescape"))
    return mark.hexdigest()[:16]


def _sparse(train: np.ndarray, val: np.ndarray, names: list[str]) -> list[str]:
    """Sentences about classes with too few images on either side."""
    notes = []
    sparse = {"no held-out image": val < 1, f"fewer than {ENOUGH} training images": train < ENOUGH}
    for what, few in sparse.items():
        if len(names) > 1 and few.any():
            shown = ", ".join(f"'{names[i]}'" for i in np.flatnonzero(few)[:5])
            more = ", ..." if few.sum() > 5 else ""
            notes.append(f"{few.sum()} of {len(names)} classes have {what}: {shown}{more}")
    return notes


def _besides(part: Records) -> str:
    seen = ", ".join(f"{count:,} {reason}" for reason, (count, _) in part.dropped.items())
    return f" ({seen})" if seen else ""


def classes(what: str, parts: dict[str, Records]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Labels of each part as int64 in [0, number of classes), and the names of the classes.

    Text is sorted by name, or by number where all names are whole numbers.
    """
    without = [name for name, part in parts.items() if part.labels is None]
    first = parts["all" if "all" in parts else "train"]
    if len(without) == len(parts):
        first.notes.append("no classes: all images are of one class 'all'; samples cannot be chosen by class")
        for part in parts.values():
            part.notes = first.notes
        return {name: np.zeros(len(part), np.int64) for name, part in parts.items()}, list(UNLABELLED)
    if without:
        raise DataError(f"{what}: the {without[0]} part has no labels, the other has")
    labels = {name: np.asarray(part.labels) for name, part in parts.items()}
    kinds = {values.dtype.kind for values in labels.values()}
    if kinds == {"U"}:
        names, known = np.unique(labels["all" if "all" in parts else "train"]).tolist(), {}
        if all(re.fullmatch(r"[0-9]{1,9}", name) for name in names):
            names.sort(key=lambda name: (int(name), name))
        number = {name: i for i, name in enumerate(names)}
        for name, values in labels.items():
            strange = next((str(value) for value in np.unique(values) if str(value) not in number), None)
            if strange is not None:
                strange, near = readable(strange), nearest(strange, names)
                raise DataError(f"{what}: class '{strange}' is in the {name} part only{readable(near)}")
            unique, places = np.unique(values, return_inverse=True)
            known[name] = np.array([number[str(value)] for value in unique], np.int64)[places]
        return known, [readable(name) for name in names]
    if not kinds <= {"i", "u"}:
        raise DataError(f"{what}: labels are neither whole numbers nor text; name another data.label_column")
    low, high = min(int(v.min()) for v in labels.values()), max(int(v.max()) for v in labels.values())
    limit = len(first.names) if first.names is not None else 100_000
    if low < 0 or high >= limit:
        odd = low if low < 0 else high
        raise DataError(f"{what}: label {odd} is outside 0..{limit - 1}; is it the class column?")
    names = first.names if first.names is not None else [str(i) for i in range(high + 1)]
    numbers = {name: values.astype(np.int64) for name, values in labels.items()}
    return numbers, [readable(name) for name in names]


def class_number(text: str, names: Sequence[str]) -> int:
    """The class that `text` means: the one of this name, else of this number (unchecked).

    Raises:
        ConfigError: neither; names the nearest class.
    """
    if text in names:
        return list(names).index(text)
    if re.fullmatch(r"-?[0-9]{1,9}", text):
        return int(text)
    raise ConfigError(f"unknown class '{text}'{nearest(text, names)}; give names or numbers")


def split_of(name: str) -> str | None:
    """The part that a folder called like a split is, in any case ("Train", "testing_set", "val2017")."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word not in FILLERS]
    if len(words) != 1:
        return None
    return "train" if words[0] in TRAIN_NAMES else "val" if words[0] in VAL_NAMES else None


def split_names(names: Sequence[str]) -> dict[str, list[str]]:
    """Sort file or split names by their words: {"train": ..., "val": ...} if both are there, else {"all":
    ...}.

    The first of `VAL_NAMES` that occurs is used; others (a test part beside a validation part) are left out.
    """
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in names}
    train = [name for name in names if words[name] & set(TRAIN_NAMES)]
    for word in VAL_NAMES:
        val = [name for name in names if word in words[name] and name not in train]
        if train and val:
            return {"train": train, "val": val}
    return {"all": train or list(names)}
