"""`parquet:PATH` and `hf:NAME`: images in the rows of a table."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vfmlab.config.data import Data
from vfmlab.config.files import read_bytes
from vfmlab.data.columns import (
    caption_column,
    class_names,
    class_values,
    holds_images,
    image_column,
    label_column,
)
from vfmlab.data.decode import MAX_BYTES, Unreadable
from vfmlab.data.records import HASHED, Records, RecordSource, existing, stamp
from vfmlab.data.split import source, split_names
from vfmlab.errors import DataError

IN_MEMORY = 2 * 2**30
"""Parquet files of no more bytes are read into memory; larger ones go through `datasets`' Arrow cache."""

UNPACKED = 4 * 2**30
"""A column of a parquet file that unpacks to more bytes than this is refused."""


def open_parquet(config: Data, path: str, split: str) -> RecordSource:
    """Parquet files with a column of encoded images (binary, or a struct of `bytes`, `path`).

    In a folder, files with "train" and "val" / "validation" / "test" in their names are the splits. Without a
    label column all images are of one class.
    """
    what = f"parquet:{path}"
    root = existing(what, path)
    files = sorted(file for file in root.rglob("*.parquet") if file.is_file()) if root.is_dir() else [root]
    if not files or not root.exists():
        raise DataError(f"{what}: no .parquet file in this folder")
    if not all(file.is_file() for file in files):
        raise DataError(f"{what}: not a regular file")
    names = [file.relative_to(root).as_posix() for file in files]
    groups = split_names(names) if root.is_dir() else {"all": [""]}
    groups = {part: [root / name for name in names] for part, names in groups.items()}
    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        wanted = {part: [str(file) for file in group] for part, group in groups.items()}
        loaded = _load_datasets(what, "parquet", data_files=wanted)
        return source(config, split, _hf_parts(config, what, loaded))
    return source(config, split, {part: _read_parquet(config, what, group) for part, group in groups.items()})


def open_hf(config: Data, name: str, split: str) -> RecordSource:
    """A data set of the Hugging Face hub, `hf:OWNER/NAME` or `hf:OWNER/NAME:CONFIG`, or a local directory.

    A local directory is one written by `save_to_disk`, or any that `datasets.load_dataset` reads.
    """
    what = f"hf:{name}"
    local = Path(name).expanduser()
    if local.exists() or name.startswith((".", "/", "~")):
        loaded = _load_datasets(what, str(existing(what, name)))
    else:
        loaded = _load_datasets(what, *name.split(":", 1))
    return source(config, split, _hf_parts(config, what, loaded))


def _read_parquet(config: Data, what: str, files: list[Path]) -> TableRecords:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole, damaged = [], []
    for file in files:
        try:
            pq.read_schema(file)
            whole.append(file)
        except (pa.ArrowException, OSError) as error:
            damaged.append(f"{file}: {_first_line(error)}")
    if not whole:
        raise DataError(f"{what}: no readable parquet file, for example {damaged[0]}")
    records = TableRecords(config, what, ParquetTable(what, whole))
    for line in damaged:
        records.drop("damaged files", line)
    return records


class ParquetTable:
    """Columns of parquet files, each read when needed. folder: that paths in the table start from."""

    def __init__(self, what: str, files: list[Path]):
        import pyarrow.parquet as pq

        self.what, self.files, self.folder = what, files, files[0].parent
        self.schema = pq.read_schema(files[0])
        self.rows = sum(pq.read_metadata(file).num_rows for file in files)
        self.version = " ".join(f"{file.name} {stamp(file)}" for file in files)
        self.bytes = sum(file.stat().st_size for file in files)

    def column(self, name: str) -> Any:
        """A pyarrow ChunkedArray; a small file that unpacks to more than memory should hold is refused."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        parts, limit = [], 2 * UNPACKED  # counted once as stated, once as read
        kind = self.schema.field(name).type
        try:
            for path in self.files:
                with pq.ParquetFile(path) as file:
                    if name not in file.schema_arrow.names:
                        raise DataError(f"{self.what}: {path} has no column '{name}', {self.files[0].name} "
                                        "has; add it, or move the file away")
                    groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
                    cells = [group.column(i) for group in groups for i in range(group.num_columns)]
                    cells = [cell for cell in cells if cell.path_in_schema.split(".")[0] == name]
                    size = sum(cell.total_uncompressed_size for cell in cells)
                    batches = file.iter_batches(1024, columns=[name])
                    while size <= limit and (batch := next(batches, None)) is not None:
                        part = batch.column(0)
                        parts.append(part if part.type == kind else part.cast(kind))
                        size += batch.nbytes
                    if size > limit:
                        much = f"unpacks to more than {limit >> 30} GiB"
                        raise DataError(f"{self.what}: column '{name}' of {path} {much}")
            return pa.chunked_array(parts, kind)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.what}: column '{name}' of {path} cannot be read as {kind}: "
                            f"{_first_line(error)}") from None


class HubTable:
    """Columns of a `datasets.Dataset`, mapped from its files."""

    def __init__(self, data: Any):
        self.data, self.schema, self.rows, self.folder = data, data.features.arrow_schema, len(data), Path()
        self.version, self.bytes = data._fingerprint, 0

    def column(self, name: str) -> Any:
        return self.data.select_columns([name]).with_format("arrow")[:][name]


class TableRecords(Records):
    """Rows of a table with a column of images, as bytes or named files, and perhaps one of classes and one of
    captions."""

    captioned = "name another column in data.caption_column"

    def __init__(self, config: Data, what: str, table: ParquetTable | HubTable):
        super().__init__(what)
        columns = table.schema.names
        fitting = [field.name for field in table.schema if holds_images(field.type)]
        self.table, self.image = table, image_column(what, config.image_column, columns, fitting)
        others = [name for name in columns if name != self.image]
        label = label_column(what, config.label_column, others)
        self.text = caption_column(what, config.caption_column, others)
        if label is None:
            known = ", ".join(columns)
            self.notes.append(f"no column of classes among {known}; name one in data.label_column")
        else:
            self.labels = class_values(what, label, table.column(label))
            self.names = class_names(table.schema.metadata, label)
        self.bytes = table.bytes or sum(chunk.nbytes for chunk in self._chunks)
        if table.rows and _holds_path(self._value(0)):
            self.bytes = HASHED + 1  # the files themselves are not counted: known by size and time
        self._contents: dict[int, str] = {}

    @cached_property
    def _chunks(self) -> list:
        return [chunk for chunk in self.table.column(self.image).chunks if len(chunk)]

    @cached_property
    def _captions(self) -> list:
        """Text or None of each row; a list of texts (several captions) stands for its first."""
        values = [] if self.text is None else self.table.column(self.text).to_pylist()
        firsts = [next(iter(value), None) if isinstance(value, list) else value for value in values]
        if odd := [value for value in firsts if not isinstance(value, str | None)]:
            raise DataError(f"{self.what}: column '{self.text}' holds {type(odd[0]).__name__}, not captions; "
                            "name another in data.caption_column")
        return firsts

    def caption(self, row: int) -> str | None:
        return None if self.text is None else self._captions[row]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._chunks)])

    def __getstate__(self) -> dict:
        large = ("_chunks", "_captions")  # another process reads its own
        return {k: v for k, v in self.__dict__.items() if k not in large}

    def _value(self, row: int) -> Any:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._chunks[chunk][row - int(self._starts[chunk])].as_py()

    def __len__(self) -> int:
        return self.table.rows

    def name(self, row: int) -> str:
        return f"{self.what} row {row}"

    def key(self, row: int) -> str:
        return f"row {row}" if self.bytes > HASHED else self.content(row)

    def stamp(self, row: int) -> str:
        value = self._value(row)
        return stamp(self._path(value)) if _holds_path(value) else self.table.version

    def content(self, row: int) -> str:
        if row not in self._contents:
            self._contents[row] = super().content(row)
        return self._contents[row]

    def _path(self, value: dict) -> str:
        return os.path.join(self.table.folder, value["path"])

    def read(self, row: int) -> bytes:
        value = self._value(row)
        if _holds_path(value):
            return read_bytes(self._path(value), MAX_BYTES)
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise Unreadable("the row holds no bytes")
        if len(value) > MAX_BYTES:
            raise Unreadable(f"{len(value)} bytes, more than the limit of {MAX_BYTES}")
        return value


def _holds_path(value: Any) -> bool:
    return isinstance(value, dict) and value.get("bytes") is None and bool(value.get("path"))


def _load_datasets(what: str, *args: str, **options: Any) -> dict:
    """`datasets.load_dataset` or `load_from_disk` -> {split name: dataset}, with a one-line error."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{what}: needs the package 'datasets'; run: pip install 'vfmlab[data]'") from None
    marks = ("dataset_dict.json", "state.json")
    saved = not options and any((Path(args[0]) / mark).is_file() for mark in marks)
    try:
        loaded = datasets.load_from_disk(args[0]) if saved else datasets.load_dataset(*args, **options)
    except Exception as error:  # the library raises many types, for wrong names and a missing network alike
        reason = f"cannot be loaded ({_first_line(error)})"
        raise DataError(f"{what}: {reason}; check name and network, or give a local directory") from None
    return dict(loaded) if isinstance(loaded, dict) else {"all": loaded}


def _hf_parts(config: Data, what: str, loaded: dict) -> dict[str, Records]:
    import datasets

    groups = split_names(list(loaded))
    joined = {part: datasets.concatenate_datasets([loaded[n] for n in g]) for part, g in groups.items()}
    return {part: TableRecords(config, what, HubTable(data)) for part, data in joined.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
