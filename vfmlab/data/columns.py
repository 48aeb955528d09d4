"""Columns of a table: which holds the images, which the classes, and what can be a class."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from vfmlab.errors import ConfigError, DataError, nearest

IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "picture", "pixels", "bytes")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_id", "cls", "target", "category", "y")
CAPTION_NAMES = ("caption", "captions", "text", "prompt", "description")
LABEL_WORDS = {"label", "labels", "class", "classes", "cls", "target", "category"}


def holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return "path" in fields if "bytes" not in fields else holds_images(fields["bytes"])
    names = ("binary", "large_binary", "binary_view", "fixed_size_binary")
    return any(getattr(types, f"is_{name}")(kind) for name in names)


def image_column(what: str, wanted: str | None, columns: list[str], fitting: list[str]) -> str:
    """The column `wanted`, else of those that hold images the one with a usual name, else the first."""
    if wanted is not None:
        return _known(what, "image_column", wanted, columns)
    if not fitting:
        known = ", ".join(columns)
        raise DataError(f"{what}: no column of images among {known}; name it in data.image_column")
    return next((name for name in IMAGE_NAMES if name in fitting), fitting[0])


def label_column(what: str, wanted: str | None, columns: list[str]) -> str | None:
    """The column `wanted`, else one with a usual name or word ("class_name"); None: no labels, as for ""."""
    if wanted is not None:
        return _known(what, "label_column", wanted, columns) if wanted else None
    words = (name for name in columns if LABEL_WORDS & set(re.split(r"[^a-z]+", name.lower())))
    return next((name for name in LABEL_NAMES if name in columns), next(words, None))


def caption_column(what: str, wanted: str | None, columns: list[str]) -> str | None:
    """The column `wanted`, else one with a usual name; None: no captions."""
    if wanted is not None:
        return _known(what, "caption_column", wanted, columns)
    return next((name for name in CAPTION_NAMES if name in columns), None)


def _known(what: str, field: str, name: str, columns: list[str]) -> str:
    if name not in columns:
        near = nearest(name, columns)
        raise ConfigError(f"field 'data.{field}' = '{name}': {what} has no such column{near}")
    return name


def class_values(what: str, column: str, values: Any) -> list | np.ndarray:
    """Labels of a pyarrow ChunkedArray: whole numbers, text, categories and truth values can be classes."""
    import pyarrow as pa
    from pyarrow import types

    other = "name another in data.label_column, or none: data.label_column="
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if values.null_count:
        raise DataError(f"{what}: column '{column}' has rows without a label; {other}")
    kind = values.type
    if types.is_integer(kind):
        return values.to_numpy()
    text = ("boolean", "string", "large_string", "string_view")
    if any(getattr(types, f"is_{name}")(kind) for name in text):
        return values.cast(pa.large_string()).to_pylist()
    if types.is_floating(kind) and len(values):
        numbers = values.to_numpy()
        if np.isfinite(numbers).all() and (numbers == np.floor(numbers)).all() and abs(numbers).max() < 2**53:
            return numbers.astype(np.int64)
    raise DataError(f"{what}: column '{column}' of type {kind} does not hold classes; {other}")


def class_names(metadata: dict | None, label: str) -> list[str] | None:
    """Class names in the `huggingface` entry of a table's schema."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
