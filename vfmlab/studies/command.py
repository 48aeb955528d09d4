"""What to type to have a page again; a page is read elsewhere, so it names no folder of this machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def shown_source(source: str) -> str:
    """A data source without the folders of this machine."""
    kind, colon, rest = source.partition(":")
    return f"{kind}{colon}{Path(rest).name if kind in ('folder', 'parquet', 'wds') else rest}"


def command(verb: str, words: Sequence[str], flags: Mapping[str, Sequence[Any]]) -> str:
    """flags: name -> values; those without any are left out."""
    parts = ["vfmlab", verb, *words]
    for flag, values in flags.items():
        for part in (flag, *map(str, values)) if values else ():
            name, equals, value = part.partition("=")
            parts.append(f"{name}={shown_source(value)}" if equals and name == "data.source" else part)
    return shlex.join(parts)
