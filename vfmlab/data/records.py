"""Encoded images at numbered places (files, rows, tar members) -> a source that survives unreadable ones."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vfmlab.data.base import Batch, ImageSource
from vfmlab.data.decode import Cut, TooSmall, Unreadable, decode, dimensions
from vfmlab.errors import DataError, nearest

FEW = 10
"""So many unreadable images are always forgiven; beyond them, no more than `SHARE` of all that were tried."""
SHARE = 0.1
NAMED = 1000
"""So many names are listed for each reason why something is not used; all are counted."""
HASHED = 2**30
"""Images of no more bytes than this are known by their content; larger sets by size and time of change."""


class Records:
    """The encoded images of one part of a data set; a subclass reads them.

    Attributes:
        labels: int or str per image, None without labels. names: of the classes, where the format states
        them. bytes: of all images together. dropped: reason -> [count, names] of what lies there and is not
        used; the reason reads well behind the count. notes: sentences about the part that a user should see.
    """

    names: list[str] | None = None
    bytes: int = 0
    captioned = "captions are read from folders and tables"  # what to do about a missing one

    labels: Sequence[int] | Sequence[str] | None = None

    def __init__(self, what: str):
        self.what = what
        self.dropped: dict[str, list] = {}
        self.notes: list[str] = []

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, position: int) -> bytes:
        """Encoded image; may raise :class:`Unreadable` or OSError."""
        raise NotImplementedError

    def name(self, position: int) -> str:
        """What a message calls the image."""
        raise NotImplementedError

    def key(self, position: int) -> str:
        """Name within the data set, wherever it is stored and whatever is added to it; decides the split."""
        raise NotImplementedError

    def stamp(self, position: int) -> str:
        """Text that changes when the image is written anew, without reading it: size and time."""
        raise NotImplementedError

    def content(self, position: int) -> str:
        """Digest of the image; of a large set, its stamp."""
        if self.bytes > HASHED:
            return self.stamp(position)
        try:
            return hashlib.sha256(self.read(position)).hexdigest()
        except (Unreadable, OSError):
            return self.stamp(position)

    def caption(self, position: int) -> str | None:
        """Text that came with the image; None: there is none."""
        return None

    def drop(self, reason: str, name: str) -> None:
        entry = self.dropped.setdefault(reason, [0, []])
        entry[0] += 1
        if len(entry[1]) < NAMED:
            entry[1].append(readable(name))


class RecordSource(ImageSource):
    """One split of some records.

    An unreadable image is replaced by the next readable one of the split, so that what an index holds stays a
    function of the index. Each is named once in `bad`; too many raise :class:`DataError`.

    Args:
        records: the part. picked: int64, its positions in this split, in the order of the split's indices.
        labels: long, one per index. names: of the classes. mark: the fingerprint.
    """

    def __init__(self, records: Records, picked: np.ndarray, labels: Tensor, names: list[str], size: int,
                 mark: str):
        super().__init__(size, labels, names, mark)
        self.what, self.records, self.picked = records.what, records, picked
        self.dropped, self.notes = records.dropped, list(records.notes)
        self._state = np.zeros(len(picked), np.uint8)  # 0 not tried, 1 readable, 2 not
        self._tried = 0
        self._decode(0)  # fails here and now if nothing can be read

    def read(self, indices: Tensor, cuts: Sequence[Cut | None] | None = None) -> tuple[Tensor, Tensor]:
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        used = torch.empty(len(indices), dtype=torch.long)
        for row, index in enumerate(indices.tolist()):
            images[row], used[row] = self._decode(index, None if cuts is None else cuts[row])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), used

    def at_least(self, side: int | None) -> ImageSource:
        if side is not None:
            self.least = side
            self.notes.append(f"images with a side below {side} px are left out when they are met; the next "
                              "one stands in")
            self._decode(0)  # fails here and now if none is left
        return self

    def cropped(self, indices: Tensor, draws: Tensor) -> Batch:
        images, used = self.read(indices, [Cut(*row) for row in draws.tolist()])
        return Batch(images, self.labels[used], used)

    def _decode(self, index: int, cut: Cut | None = None) -> tuple[np.ndarray, int]:
        """The image at `index`, or the first readable one after it, circular; with the index it has."""
        for step in range(len(self)):
            i = (index + step) % len(self)
            if self._state[i] == 2:
                continue
            self._tried += self._state[i] == 0
            position = int(self.picked[i])
            try:
                image = decode(self.records.read(position), self.size, cut, self.least)
            except TooSmall:
                self._state[i] = 2
            except (Unreadable, OSError) as error:
                known, self._state[i] = self._state[i] == 2, 2
                if not known:  # another thread may have met it meanwhile
                    reason = error.strerror or error if isinstance(error, OSError) else error
                    self._note(f"{readable(self.records.name(position))}: {reason}")
            else:
                self._state[i] = 1
                return image, i
        example = self.bad[-1] if self.bad else f"all have a side below {self.least} px (data.least_side)"
        raise DataError(f"{self.what}: none of its {len(self)} images can be read, for example {example}")

    def captions(self, indices: Tensor) -> list[str] | None:
        positions = self.picked[np.asarray(indices, dtype=np.int64)].tolist()
        texts = [self.records.caption(position) for position in positions]
        if all(text is None for text in texts):
            return None
        if None in texts:
            name = readable(self.records.name(positions[texts.index(None)]))
            raise DataError(f"{self.what}: {name} has no caption, others have; {self.records.captioned}")
        return [" ".join(text.split()) for text in texts]

    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the first readable image, before the crop."""
        return dimensions(self.records.read(int(self.picked[self._decode(0)[1]])))

    def _note(self, line: str) -> None:
        self.bad.append(line)
        if len(self.bad) > max(FEW, SHARE * self._tried):
            count = f"{len(self.bad)} of {self._tried} images tried"
            raise DataError(f"{self.what}: {count} cannot be read, for example {line}")


def readable(name: str) -> str:
    """`name` with control characters and bytes that are not UTF-8 escaped, fit for a terminal and JSON."""
    odd = ("Cc", "Cs")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in odd else c for c in name)


def stamp(path: str | Path) -> str:
    """Size and time of change of a file; "gone" if there is none."""
    try:
        info = os.stat(path)
    except OSError:
        return "gone"
    return f"{info.st_size} {info.st_mtime_ns}"


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
    near = nearest(broken.name, names)
    raise DataError(readable(f"{what}: there is no '{broken.name}' in {parent.absolute()}{near}"))
