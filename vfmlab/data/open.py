"""One string -> one source: `scenes:`, `folder:`, `parquet:`, `hf:`, `wds:`."""

from __future__ import annotations

import importlib
import os
from typing import Literal

from vfmlab.config.data import Data
from vfmlab.config.files import expand
from vfmlab.data.base import ImageSource
from vfmlab.data.records import readable
from vfmlab.errors import ConfigError, DataError, nearest

OPENERS = {
    "scenes": "vfmlab.data.groups:open_scenes",
    "folder": "vfmlab.data.folder:open_folder",
    "parquet": "vfmlab.data.tables:open_parquet",
    "hf": "vfmlab.data.tables:open_hf",
    "wds": "vfmlab.data.shards:open_shards",
}


def open_source(config: Data, split: Literal["train", "val"]) -> ImageSource:
    """Open one split of `config.source`.

    Args:
        config: the data section of a run. split: "train" or "val"; no image is in both.

    Raises:
        ConfigError: unknown kind of source, unknown style or column.
        DataError: nothing there, or nothing that can be read.
    """
    if split not in ("train", "val"):
        raise ConfigError(f"unknown split '{split}'{nearest(split, ('train', 'val'))}")
    kind, sign, rest = config.source.partition(":")
    if kind not in OPENERS or not sign or not rest:
        hint = nearest(kind, OPENERS) if kind not in OPENERS else f" (write '{kind}:...')"
        if os.path.isdir(expand(config.source)):
            hint = f" (write 'folder:{config.source}')"
        raise ConfigError(f"field 'data.source' = '{config.source}': not a known source{hint}")
    module, name = OPENERS[kind].split(":")
    try:
        source = getattr(importlib.import_module(module), name)(config, rest, split)
    except (OSError, ValueError) as error:  # of the file system: no permission, a loop of links, ...
        reason = f"'{error.filename}': {error.strerror}" if getattr(error, "filename", None) else str(error)
        raise DataError(f"field 'data.source' = '{readable(config.source)}': {reason}; check the "
                        "path") from None
    source.what = config.source
    return source
