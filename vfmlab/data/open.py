"""One string -> one source: `scenes:`, `folder:`, `parquet:`, `hf:`, `wds:`."""

from __future__ import annotations

import os
from typing import Literal

from vfmlab.config.data import Data
from vfmlab.config.files import expand
from vfmlab.data.base import ImageSource
from vfmlab.data.folder import open_folder
from vfmlab.data.groups import open_scenes
from vfmlab.data.records import readable
from vfmlab.data.shards import open_shards
from vfmlab.data.tables import open_hf, open_parquet
from vfmlab.errors import ConfigError, DataError, nearest

OPENERS = {"scenes": open_scenes, "folder": open_folder, "parquet": open_parquet, "hf": open_hf,
           "wds": open_shards}


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
    try:
        source = OPENERS[kind](config, rest, split)
    except (OSError, ValueError) as error:  # of the file system: no permission, a loop of links, ...
        reason = f"'{error.filename}': {error.strerror}" if getattr(error, "filename", None) else str(error)
        raise DataError(f"field 'data.source' = '{readable(config.source)}': {reason}; check the "
                        "path") from None
    source.what = config.source
    return source
