"""`parquet:PATH` and `hf:NAME`: images in the rows of a table."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vfmlab.config import Data
from vfmlab.data.decode import Unreadable
from vfmlab.data.records import Records, RecordSource, existing, source, split_names
from vfmlab.errors import ConfigError, DataError, nearest

IN_MEMORY = 2 * 2**30
"""Parquet files of no more bytes than this are read into memory; larger ones go through `datasets`' Arrow cache."""

IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "picture", "pixels", "bytes")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_id", "cls", "target", "category", "y")


def _asked(what: str, field: str, name: str, columns: list[str]) -> str:
    if name not in columns:
        raise ConfigError(f"field 'data.{field}' = '{name}': {what} has no such column{nearest(name, columns)}")
    return name


def _image_column(what: str, asked: str | None, columns: list[str], fitting: list[str]) -> str:
    """The column asked for, else of those that hold images the one with a usual name, else the first."""
    if asked is not None:
        return _asked(what, "image_column", asked, columns)
    if not fitting:
        raise DataError(f"{what}: no column of images among {', '.join(columns)}; name it in data.image_column")
    return next((name for name in IMAGE_NAMES if name in fitting), fitting[0])


def _label_column(what: str, asked: str | None, columns: list[str], fitting: list[str]) -> str | None:
    """The column asked for, else of those of whole numbers or text the one with a usual name, else None: no labels."""
    if asked is not None:
        return _asked(what, "label_column", asked, columns)
    return next((name for name in LABEL_NAMES if name in fitting), None)


def open_parquet(config: Data, path: str, split: str) -> RecordSource:
    """One parquet file, or a folder of them, with a column of encoded images (binary, or a struct with `bytes`).

    In a folder, files with "train" and "val" / "validation" / "test" in their names are the splits. Without a label
    column all images are of one class.
    """
    what = f"parquet:{path}"
    root = existing(what, path)
    files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
    if not files:
        raise DataError(f"{what}: no .parquet file in this folder")
    groups = split_names([file.relative_to(root).as_posix() for file in files]) if root.is_dir() else {"all": [""]}
    groups = {part: [root / name for name in names] for part, names in groups.items()}
    if sum(file.stat().st_size for file in files) > IN_MEMORY:
        loaded = _load_datasets(what, "parquet", data_files={p: [str(f) for f in g] for p, g in groups.items()})
        return source(config, split, what, _hf_parts(config, what, loaded))
    parts = {part: _Parquet(config, what, group).records() for part, group in groups.items()}
    return source(config, split, what, parts)


class _Parquet:
    """Files of one split: labels at once, images when the first one is asked for."""

    def __init__(self, config: Data, what: str, files: list[Path]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.what, self.bad, self.files, schemas = what, [], [], []
        for file in files:
            try:
                schemas.append(pq.read_schema(file))
                self.files.append(file)
            except (pa.ArrowException, OSError) as error:
                self.bad.append(f"{file}: {_first_line(error)}")
        if not schemas:
            raise DataError(f"{what}: no readable parquet file, for example {self.bad[0]}")
        schema = schemas[0]
        fitting = [field.name for field in schema if _holds_images(field.type)]
        self.image = _image_column(what, config.image_column, schema.names, fitting)
        fitting = [field.name for field in schema if pa.types.is_integer(field.type) or pa.types.is_string(field.type)]
        self.label = _label_column(what, config.label_column, schema.names, fitting)
        self.names = _class_names(schema.metadata, self.label)

    def _read(self, column: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pa.concat_tables([pq.read_table(f, columns=[column]) for f in self.files])[column]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.what}: column '{column}' cannot be read: {_first_line(error)}") from None

    @cached_property
    def _images(self) -> list:
        """Binary arrays, one per chunk, and where each starts."""
        import pyarrow as pa

        chunks = self._read(self.image).chunks
        return [chunk.field("bytes") if pa.types.is_struct(chunk.type) else chunk for chunk in chunks]

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self._images)])

    def read(self, row: int) -> bytes:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        value = self._images[chunk][row - int(self._starts[chunk])].as_py()
        if value is None:
            raise Unreadable("the row holds no bytes")
        return value

    def row_name(self, row: int) -> str:
        return f"{self.what} row {row}"

    def records(self) -> Records:
        import pyarrow.parquet as pq

        count = sum(pq.read_metadata(file).num_rows for file in self.files)
        labels = _label_values(self.what, self.label, self._read(self.label).to_pylist()) if self.label else None
        listing = [[file.name, file.stat().st_size] for file in self.files]
        return Records(
            count, self.read, self.row_name, labels, self.names,
            ["table", listing, self.image, self.label], tuple(self.bad),
        )  # fmt: skip


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _class_names(metadata: dict | None, label: str | None) -> list[str] | None:
    """Class names in the `huggingface` entry of a parquet schema."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _label_values(what: str, column: str, values: list) -> list:
    if any(value is None for value in values):
        raise DataError(f"{what}: column '{column}' has rows without a label; name another in data.label_column")
    return values


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
    return source(config, split, what, _hf_parts(config, what, loaded))


def _load_datasets(what: str, *args: str, **options: Any) -> dict:
    """`datasets.load_dataset` or `load_from_disk` -> {split name: dataset}, with a one-line error."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{what}: needs the package 'datasets'; run: pip install 'vfmlab[data]'") from None
    saved = not options and any((Path(args[0]) / mark).is_file() for mark in ("dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(args[0]) if saved else datasets.load_dataset(*args, **options)
    except Exception as error:  # the library raises many types, for wrong names and for a missing network alike
        raise DataError(
            f"{what}: cannot be loaded ({_first_line(error)}); check name and network, or give a local directory"
        ) from None
    return dict(loaded) if isinstance(loaded, dict) else {"all": loaded}


def _hf_parts(config: Data, what: str, loaded: dict) -> dict[str, Records]:
    import datasets

    groups = split_names(list(loaded))
    joined = {part: datasets.concatenate_datasets([loaded[n] for n in names]) for part, names in groups.items()}
    return {part: _hf_records(config, what, data) for part, data in joined.items()}


def _hf_records(config: Data, what: str, data: Any) -> Records:
    import datasets

    columns = list(data.column_names)
    kinds = {name: "image" if _holds_pixels(kind) else _scalar(kind) for name, kind in data.features.items()}
    fitting = [name for name, kind in kinds.items() if kind in ("image", "binary", "large_binary")]
    image = _image_column(what, config.image_column, columns, fitting)
    fitting = [name for name, kind in kinds.items() if kind.startswith(("int", "uint", "string", "large_string"))]
    label = _label_column(what, config.label_column, columns, fitting)
    values = _label_values(what, label, list(data[label])) if label else None
    names = getattr(data.features[label], "names", None) if label else None
    images = data.select_columns([image])
    if isinstance(data.features[image], datasets.Image):
        images = images.cast_column(image, datasets.Image(decode=False))
    rows = _Rows(what, images, image)
    mark = hashlib.sha256(json.dumps(values, default=str).encode())
    for row in np.unique(np.linspace(0, len(data) - 1, 64).astype(int)):  # the content itself would take too long
        try:
            mark.update(rows.read(int(row)))
        except (Unreadable, OSError):
            mark.update(b"unreadable")
    return Records(len(data), rows.read, rows.name, values, names, ["hf", len(data), image, label, mark.hexdigest()])


class _Rows:
    """Encoded images of a `datasets` table."""

    def __init__(self, what: str, data: Any, column: str):
        self.what, self.data, self.column = what, data, column

    def name(self, row: int) -> str:
        return f"{self.what} row {row}"

    def read(self, row: int) -> bytes:
        value = self.data[row][self.column]
        if isinstance(value, dict):
            value = Path(value["path"]).read_bytes() if value["bytes"] is None and value["path"] else value["bytes"]
        if not isinstance(value, bytes):
            raise Unreadable("the row holds no bytes")
        return value


def _holds_pixels(kind: Any) -> bool:
    """Whether a `datasets` feature is an image, decoded by the library or not."""
    import datasets

    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def _scalar(kind: Any) -> str:
    """Name of a scalar `datasets` feature, e.g. "int64"; empty for any other."""
    return getattr(kind, "dtype", None) or ""


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
