"""`wds:PATTERN`: tar shards in the layout of webdataset, with random access.

The headers of all shards are read once, when the source is opened; after that an image is one seek and one read. Other
loaders draw shards with replacement and shuffle in a buffer, which a resumed run cannot repeat; here each epoch is a
true permutation of all images, and step k of a run gets the same images whenever and in however many processes it runs.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from pathlib import Path

from vfmlab.config import Data
from vfmlab.data.records import FEW, SHARE, Records, RecordSource, existing, source, split_names
from vfmlab.errors import DataError

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "gif")
LABEL_TYPES = ("cls", "json")


def open_shards(config: Data, pattern: str, split: str) -> RecordSource:
    """Local tar files by a pattern with braces (`train-{0000..0012}.tar`) and wildcards, or a folder of them.

    Shards with "train" and "val" / "validation" / "test" in their names are the splits; otherwise images are held out.
    A sample is KEY.jpg (or another image type) with KEY.cls, or KEY.json with a field `label` (`data.label_column`).
    """
    what = f"wds:{pattern}"
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{what}: shards are read with random access; download them and give their local path")
    files = _expand(what, pattern)
    parts = {part: _Shards(what, names, config.label_column or "label") for part, names in split_names(files).items()}
    return source(config, split, what, {part: shards.records() for part, shards in parts.items()})


def _expand(what: str, pattern: str) -> list[str]:
    try:
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError:
        raise DataError(f"{what}: needs the package 'webdataset'; run: pip install 'vfmlab[data]'") from None
    try:
        wanted = [os.path.expanduser(name) for name in braceexpand(pattern)]
    except UnbalancedBracesError:
        raise DataError(f"{what}: the braces are not balanced; write for example train-{{0000..0012}}.tar") from None
    files: list[str] = []
    for name in wanted:
        path = Path(name)
        if path.is_dir():
            files += sorted(str(file) for file in path.glob("*.tar"))
        elif "*" in path.name or "?" in path.name:
            files += sorted(str(file) for file in existing(what, str(path.parent)).glob(path.name))
        else:
            files.append(str(path))
    if not any(Path(file).exists() for file in files):
        if files:
            existing(what, files[0])
        raise DataError(f"{what}: no .tar file matches")
    return files


def _block(file: str, offset: int) -> bytes:
    with open(file, "rb") as shard:
        shard.seek(offset)
        return shard.read(tarfile.BLOCKSIZE)


class _Shards:
    """Index of some shards: where each image lies, and its label."""

    def __init__(self, what: str, files: list[str], label: str):
        self.what, self.label_field, self.files = what, label, files
        self.shard, self.offset, self.bytes = array("l"), array("q"), array("q")  # of each image; millions fit
        self.labels: list[int | str | None] = []
        self.bad: list[str] = []
        self.listing: list[list] = []
        for number, file in enumerate(files):
            self._index(number, file)
        if len(self.bad) > max(FEW, SHARE * len(files)) or (self.bad and not self.labels):
            count = f"{len(self.bad)} of {len(files)} shards"
            raise DataError(f"{what}: {count} cannot be read, for example {self.bad[-1]}")

    def _index(self, number: int, file: str) -> None:
        """Append the samples of one shard; of a damaged one, those before the damage."""
        samples: dict[str, tuple[list, list]] = {}
        try:
            with tarfile.open(file, "r:") as tar:  # "r:": compressed tars have no random access and are refused
                for member in tar:
                    base, _, kind = os.path.basename(member.name).partition(".")
                    kind = kind.lower()
                    if not member.isfile() or not base or kind not in IMAGE_TYPES + LABEL_TYPES:
                        continue
                    images, labels = samples.setdefault(f"{os.path.dirname(member.name)}/{base}", ([], []))
                    if kind in IMAGE_TYPES:
                        images.append((member.offset_data, member.size))
                    else:
                        labels.append(self._label(kind, tar.extractfile(member).read()))
                if _block(file, tar.offset) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("damaged or cut off before its end mark")
        except (tarfile.TarError, OSError, EOFError) as error:
            self.bad.append(f"{file}: {str(error) or type(error).__name__}")
            if samples:
                samples.popitem()  # the last one may have lost its label or the end of its image
        for images, labels in samples.values():
            for offset, size in images[:1]:
                self.shard.append(number)
                self.offset.append(offset)
                self.bytes.append(size)
                self.labels.append(next((label for label in labels if label is not None), None))
        if samples:
            self.listing.append([os.path.basename(file), os.path.getsize(file)])

    def _label(self, kind: str, data: bytes) -> int | str | None:
        try:
            text = data.decode().strip()
            value = json.loads(text).get(self.label_field) if kind == "json" else text
        except (UnicodeDecodeError, ValueError, AttributeError):
            return None
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    def read(self, position: int) -> bytes:
        with open(self.files[self.shard[position]], "rb") as shard:
            shard.seek(self.offset[position])
            return shard.read(self.bytes[position])

    def name(self, position: int) -> str:
        """Shard and member; looked up in the shard, since names are wanted for bad images only."""
        file = self.files[self.shard[position]]
        with tarfile.open(file, "r:") as tar:
            members = (member.name for member in tar if member.offset_data == self.offset[position])
            return f"{file}/{next(members)}"

    def records(self) -> Records:
        labels, self.labels = self.labels, []
        if all(label is None for label in labels):
            labels = None
        elif None in labels:
            raise DataError(f"{self.what}: {self.name(labels.index(None))} has no label, others have")
        return Records(len(self.shard), self.read, self.name, labels, None, ["wds", self.listing], tuple(self.bad))
