"""`folder:PATH`: image files in one folder per class, as in torchvision's ImageFolder."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from tqdm import tqdm

from vfmlab.config.data import Data
from vfmlab.config.files import read_bytes
from vfmlab.data.decode import MAX_BYTES, suffixes
from vfmlab.data.records import Records, RecordSource, existing, readable, stamp
from vfmlab.data.split import VAL_NAMES, source, split_of
from vfmlab.errors import DataError

CAPTION, LONGEST = ".txt", 2**16  # of an image, beside it; bytes
LOOKED = 100_000
"""After so many entries of which not one in a hundred is an image, this is no folder of images."""


def open_folder(config: Data, path: str, split: str) -> RecordSource:
    """PATH/CLASS/**/IMAGE, or PATH/train/CLASS/... beside PATH/val (or another of `VAL_NAMES`).

    Without a split of its own a part is held out. Images directly in the folder of a split are used only if
    it has no class folders; they form one class. Hidden files are passed over, others not read are counted.
    """
    what = f"folder:{path}"
    root = existing(what, path)
    if not root.is_dir():
        raise DataError(f"{what}: that is a file; name the folder that holds one folder per class")
    below = sorted(entry.name for entry in os.scandir(root) if entry.is_dir()
                   and not entry.name.startswith("."))
    train = [name for name in below if split_of(name) == "train"]
    val = sorted((name for name in below if split_of(name) == "val"), key=_preference)
    unused, parts = [], {}
    if train and val:
        parts = {"train": FolderRecords(what, root / train[0]), "val": FolderRecords(what, root / val[0])}
        unused = [name for name in below if name not in (train[0], val[0])]
    elif train and (len(below) == 1 or any(entry.is_dir() for entry in os.scandir(root / train[0]))):
        parts = {"all": FolderRecords(what, root / train[0])}
        unused = [name for name in below if name != train[0]]
    else:
        parts = {"all": FolderRecords(what, root)}
        parts["all"].look_at_classes()
    if unused:
        names = ", ".join(f"'{readable(name)}'" for name in unused[:5])
        for part in parts.values():
            more = ", ..." * (len(unused) > 5)
            part.notes.append(f"not read, beside the folders of the splits: {names}{more}")
    return source(config, split, parts)


def _preference(name: str) -> int:
    return min(VAL_NAMES.index(word) for word in re.split(r"[^a-z]+", name.lower()) if word in VAL_NAMES)


class FolderRecords(Records):
    """Every image file below `root`, by name; class = first folder.

    Links are followed once all that is no link has been listed; a file or folder that is there already, under
    whatever name, is not taken again.
    """

    captioned = "write it into a .txt of the image's name beside it"

    def __init__(self, what: str, root: Path):
        super().__init__(what)
        self.root = root
        files = self._list()
        nested = [file for file in files if "/" in file]
        if nested:
            for file in files:
                if "/" not in file:
                    self.drop("loose beside class folders", file)
            self.labels = [file.partition("/")[0] for file in sorted(nested)]
        self.files = sorted(nested or files)

    def _list(self) -> list[str]:
        files, texts, seen, looked = [], [], set(), 0
        queue, links = [""], []
        with tqdm(desc=f"listing {self.what}", unit=" files", delay=2, disable=None, leave=False) as bar:
            while queue or links:
                name = queue.pop() if queue else links.pop()
                path = os.path.join(self.root, name)
                suffix = os.path.splitext(name)[1].lower()
                looked += 1
                bar.update()
                if looked > LOOKED and len(files) * 100 < looked:
                    raise DataError(f"{self.what}: {looked:,} entries hold {len(files)} images; name the "
                                    "folder of the classes")
                try:
                    info = os.stat(path)
                    if stat.S_ISDIR(info.st_mode):
                        if (info.st_dev, info.st_ino) in seen:
                            self.drop("folders linked twice", name)
                            continue
                        seen.add((info.st_dev, info.st_ino))
                        for entry in sorted(os.scandir(path), key=lambda entry: entry.name, reverse=True):
                            if not entry.name.startswith("."):
                                below = f"{name}/{entry.name}".lstrip("/")
                                (links if entry.is_symlink() else queue).append(below)
                        continue
                except OSError as error:
                    self.drop(f"not there or closed ({error.strerror})", name)
                    continue
                if suffix == CAPTION:
                    texts.append(name)
                elif suffix not in suffixes():
                    self.drop(f"{readable(suffix) or 'without suffix'} not read", name)
                elif not stat.S_ISREG(info.st_mode):
                    self.drop("not regular files", name)
                elif info.st_size > MAX_BYTES:
                    self.drop(f"larger than {MAX_BYTES >> 20} MiB", name)
                elif (info.st_dev, info.st_ino) in seen:
                    self.drop("linked twice", name)
                else:
                    seen.add((info.st_dev, info.st_ino))
                    self.bytes += info.st_size
                    files.append(name)
        images = {os.path.splitext(name)[0] for name in files}
        for name in texts:
            if os.path.splitext(name)[0] not in images:
                self.drop(f"{CAPTION} not read", name)
        return files

    def look_at_classes(self) -> None:
        """Note what looks like folders of splits, or like classes one level too deep."""
        names = sorted(set(self.labels or ()))
        alike = [name for name in names if re.search("train|test|valid|val(?![a-z])", name.lower())]
        if len(names) == 2 and len(alike) == 2:
            self.notes.append(readable(f"the classes '{names[0]}' and '{names[1]}' look like splits; ")
                              + "if they are, call them train and val")
        if len(names) == 1:
            deeper = sorted({"/".join(file.split("/")[:2]) for file in self.files if file.count("/") > 1})
            hint = f"; its folders look like classes: name folder:{self.root / names[0]}"
            line = f"one class only, '{names[0]}', after the only folder with images"
            self.notes.append(readable(line + hint * (len(deeper) > 1)))

    def __len__(self) -> int:
        return len(self.files)

    def key(self, position: int) -> str:
        return self.files[position]

    def name(self, position: int) -> str:
        return str(self.root / self.files[position])

    def stamp(self, position: int) -> str:
        return stamp(self.root / self.files[position])

    def caption(self, position: int) -> str | None:
        image = self.root / self.files[position]
        beside = (image.with_suffix(suffix) for suffix in (CAPTION, CAPTION.upper()))
        path = next((path for path in beside if path.is_file()), None)
        if path is None:
            return None
        try:
            return read_bytes(path, LONGEST).decode("utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{self.what}: the caption {readable(str(path))} cannot be read: "
                            f"{error}") from None

    def read(self, position: int) -> bytes:
        return read_bytes(self.root / self.files[position], MAX_BYTES)
