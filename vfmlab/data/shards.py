"""`wds:PATTERN`: tar shards in the layout of webdataset, with random access.

The headers of all shards are read once, when the source is opened; after that an image is one seek and one
read. Other loaders draw shards with replacement and shuffle in a buffer, which a resumed run cannot repeat;
here each epoch is a true permutation of all images, and step k of a run gets the same images whenever and in
however many processes it runs.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from array import array
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from vfmlab.config.data import Data
from vfmlab.data.decode import MAX_BYTES, Unreadable, suffixes
from vfmlab.data.records import FEW, SHARE, Records, RecordSource, existing, readable, stamp
from vfmlab.data.split import source, split_names
from vfmlab.errors import DataError
from vfmlab.seeding import derive

LABEL_TYPES = (".cls", ".json")
MAX_LABEL = 2**20  # bytes of a label member
MAX_SHARDS = 100_000


def open_shards(config: Data, pattern: str, split: str) -> RecordSource:
    """Local tar files by a pattern with braces (`train-{0000..0012}.tar`) and wildcards, or a folder of them.

    Shards with "train" and "val" / "validation" / "test" in their names (below the folder that the pattern
    begins with) are the splits; otherwise images are held out. A sample is KEY.jpg (or another image type)
    with KEY.cls, or KEY.json with a field `label` (`data.label_column`).
    """
    what = f"wds:{pattern}"
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{what}: shards are read at random; download them and give their local path")
    files = _expand(what, pattern)
    fixed = os.path.expanduser(re.split(r"[{*?\[]", pattern)[0])
    root = fixed if os.path.isdir(fixed) else os.path.dirname(fixed) or "."
    groups = split_names([os.path.relpath(file, root) for file in files])
    field = "label" if config.label_column is None else config.label_column
    parts = {part: ShardRecords(what, root, names, field) for part, names in groups.items()}
    return source(config, split, parts)


def _expand(what: str, pattern: str) -> list[str]:
    try:
        from braceexpand import UnbalancedBracesError, braceexpand
    except ImportError:
        raise DataError(f"{what}: needs the package 'webdataset'; run: pip install 'vfmlab[data]'") from None
    ranges = (abs(int(b) - int(a)) for a, b in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern))
    try:
        many = max(ranges, default=0) >= MAX_SHARDS  # braceexpand lists a range before its first name
        wanted = [] if many else list(islice(braceexpand(pattern), MAX_SHARDS + 1))
    except (UnbalancedBracesError, ValueError):
        raise DataError(f"{what}: the braces are not balanced; write for example x-{{00..12}}.tar") from None
    if many or len(wanted) > MAX_SHARDS:
        raise DataError(f"{what}: the pattern means more than {MAX_SHARDS:,} shards; check its braces")
    files: list[str] = []
    for name in map(os.path.expanduser, wanted):
        path = Path(name)
        if path.is_dir():
            files += sorted(str(file) for file in path.glob("*.tar"))
        elif re.search(r"[*?[]", path.name) and not path.exists():
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


class ShardRecords(Records):
    """Index of some shards, `files` below `root`: where each image lies, and its label (field `label`; empty:
    none)."""

    def __init__(self, what: str, root: str, files: list[str], label: str):
        super().__init__(what)
        self.label_field, self.root, self.files = label, root, files
        self.shard, self.offset, self.length = array("l"), array("q"), array("q")  # of millions of images
        self.keys = array("Q")  # of their names
        labels: list[int | str | None] = []
        bar = tqdm(files, f"listing {what}", unit=" shards", delay=2, disable=None, leave=False)
        for number, file in enumerate(bar):
            self._index(number, file, labels)
        broken, examples = self.dropped.get("damaged shards", (0, []))
        if broken > max(FEW, SHARE * len(files)) or (broken and not labels):
            count = f"{broken} of {len(files)} shards"
            raise DataError(f"{what}: {count} cannot be read, for example {examples[-1]}")
        self.bytes = sum(self.length)
        if not label:
            return
        if odd := [i for i, label in enumerate(labels) if not isinstance(label, int | str | None)]:
            raise DataError(f"{what}: {self.name(odd[0])} has the label {str(labels[odd[0]])[:40]}, which is "
                            "no class; name another field in data.label_column")
        if any(label is not None for label in labels):
            if None in labels:
                raise DataError(f"{what}: {self.name(labels.index(None))} has no label, others have")
            self.labels = [str(label) for label in labels] if str in map(type, labels) else labels

    def _index(self, number: int, file: str, into: list) -> None:
        """Append the samples of one shard; of a damaged one, those before the damage."""
        samples: dict[str, tuple[list, list]] = {}
        path = os.path.join(self.root, file)
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise tarfile.ReadError("not a regular file")
            with tarfile.open(path, "r:") as tar:  # compressed tars have no random access and are refused
                for member in tar:
                    stem, kind = os.path.splitext(member.name)
                    kind = kind.lower()
                    limit = MAX_LABEL if kind in LABEL_TYPES else MAX_BYTES
                    if kind not in LABEL_TYPES and kind not in suffixes():
                        if not member.isdir():
                            reason = f"{readable(kind) or 'without suffix'} not read"
                            self.drop(reason, f"{file}/{member.name}")
                    elif not member.isreg() or member.issparse() or member.size > limit:
                        self.drop("not regular, or too large", f"{file}/{member.name}")
                    elif kind in LABEL_TYPES:
                        label = self._label(kind, tar.extractfile(member).read())
                        samples.setdefault(stem, ([], []))[1].append(label)
                    else:
                        samples.setdefault(stem, ([], []))[0].append((member.offset_data, member.size))
                if _block(path, tar.offset) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("damaged or cut off before its end mark")
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self.drop("damaged shards", f"{path}: {reason}")
            if samples:
                samples.popitem()  # the last one may have lost its label or the end of its image
        for stem, (images, labels) in samples.items():
            folder, base = os.path.split(stem)
            whole = os.path.join(folder, base.partition(".")[0])
            if whole != stem and not labels and samples.get(whole, ([],))[0]:
                self.drop("further images of a sample", f"{file}/{stem}")  # KEY.seg.png beside KEY.jpg
                continue
            for offset, size in images[:1]:
                self.shard.append(number)
                self.offset.append(offset)
                self.length.append(size)
                self.keys.append(derive(stem.encode("utf-8", "surrogateescape").hex()))
                into.append(next((label for label in labels if label is not None), None))

    def _label(self, kind: str, data: bytes) -> int | str | None:
        try:
            text = data.decode("utf-8-sig").strip()
            value = json.loads(text).get(self.label_field) if kind == ".json" else text
        except (UnicodeDecodeError, ValueError, AttributeError, RecursionError):
            return None
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            return int(value)
        if isinstance(value, bool):
            return str(value)
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def __len__(self) -> int:
        return len(self.shard)

    def key(self, position: int) -> str:
        return f"{os.path.basename(self.files[self.shard[position]])}/{self.keys[position]:x}"

    def name(self, position: int) -> str:
        """Shard and member; looked up in the shard, since names are wanted for bad images only."""
        file = self._file(position)
        with tarfile.open(file, "r:") as tar:
            members = (member.name for member in tar if member.offset_data == self.offset[position])
            return f"{file}/{next(members, self.offset[position])}"

    def _file(self, position: int) -> str:
        return os.path.join(self.root, self.files[self.shard[position]])

    def stamp(self, position: int) -> str:
        return f"{stamp(self._file(position))} {self.offset[position]}"

    def read(self, position: int) -> bytes:
        with open(self._file(position), "rb") as shard:
            shard.seek(self.offset[position])
            data = shard.read(self.length[position])
        if len(data) < self.length[position]:
            raise Unreadable("the shard has become shorter")
        return data
