"""`folder:PATH`: image files in one folder per class, as in torchvision's ImageFolder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from PIL import Image

from vfmlab.config import Data
from vfmlab.data.records import TRAIN_NAMES, VAL_NAMES, Records, RecordSource, existing, source
from vfmlab.errors import DataError


def open_folder(config: Data, path: str, split: str) -> RecordSource:
    """PATH/CLASS/**/IMAGE, or PATH/train/CLASS/... beside PATH/val (valid, validation, dev, test).

    Without a split of its own a random part is held out. Images that lie directly in the folder of a split are used
    only if it has no class folders; they then form one class. Hidden files and unknown file types are passed over.
    """
    what = f"folder:{path}"
    root = existing(what, path)
    if not root.is_dir():
        raise DataError(f"{what}: that is a file; name the folder that holds one folder per class")
    parts = {part: [root / name for name in names if (root / name).is_dir()] for part, names in _NAMES.items()}
    if all(parts.values()):
        return source(config, split, what, {part: _scan(found[0]) for part, found in parts.items()})
    if parts["train"]:
        root = parts["train"][0]
    return source(config, split, what, {"all": _scan(root)})


_NAMES = {"train": TRAIN_NAMES, "val": VAL_NAMES}


def _scan(root: Path) -> Records:
    """Every image file below `root`, by name; class = first folder."""
    types = Image.registered_extensions()
    files: list[tuple[str, int]] = []
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in types:
                size = os.stat(path).st_size if os.path.exists(path) else -1  # a dangling link is a bad image
                files.append((os.path.relpath(path, root).replace(os.sep, "/"), size))
    nested = [file for file in files if "/" in file[0]]
    files = sorted(nested or files)
    names = [name for name, _ in files]
    listing = "\n".join(f"{name}\t{size}" for name, size in files)
    labels = [name.partition("/")[0] for name in names] if nested else None
    mark = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
    listed = _Files(root, names)
    return Records(len(files), listed.read, listed.name, labels, None, ["folder", mark])


class _Files:
    """Access by position; a class, because loader processes may have to pickle it."""

    def __init__(self, root: Path, names: list[str]):
        self.root, self.names = root, names

    def name(self, position: int) -> str:
        return str(self.root / self.names[position])

    def read(self, position: int) -> bytes:
        return (self.root / self.names[position]).read_bytes()
