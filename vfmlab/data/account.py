"""What a run's images are: written into its directory, and held against what they are later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vfmlab.config.data import Data
from vfmlab.config.files import read_json, write_json
from vfmlab.data.base import ImageSource
from vfmlab.data.open import open_source
from vfmlab.errors import DataError, VfmlabError

FILE = "data.json"
"""In a run's directory: split -> description, first fingerprint, that of captions where they are read,
classes, unreadable and unused files."""


def read(folder: Path) -> dict[str, Any]:
    """The account in the run directory `folder`; {} where there is none that can be read."""
    try:
        content = read_json(folder / FILE, DataError)
    except DataError:
        return {}
    return {split: facts for split, facts in content.items() if isinstance(facts, dict)}


def changes(folder: Path, sources: Mapping[str, ImageSource]) -> list[str]:
    """A line for each split whose images, labels or captions are not those that the run in `folder` had
    first."""
    before, lines = read(folder), []
    for split, source in sources.items():
        first = before.get(split, {}).get("fingerprint", source.fingerprint)
        if source.texts and before.get(split, {}).get("captions", source.texts) not in ("", source.texts):
            lines.append(f"the captions of the {split} images of '{source.what}' have changed since this run "
                         "began; train under another name")
        if first != source.fingerprint:
            lines.append(f"the {split} images of '{source.what}' have changed since this run began (were: "
                         f"{before[split].get('description', first)}; are: {source.describe()}); train under "
                         "another name")
    return lines


def revisit(folder: Path, config: Data) -> list[str]:
    """:func:`changes` of the data of a finished run; also says if they cannot be opened now."""
    splits = read(folder)
    if config.source.startswith("scenes:") or not splits:
        return []  # drawn scenes do not change
    try:
        return changes(folder, {split: open_source(config, split) for split in splits})
    except VfmlabError as error:
        return [f"the images of this run cannot be opened now: {error}"]


def record(folder: Path, sources: Mapping[str, ImageSource]) -> None:
    """Write the account. The fingerprint stays that of the first start; names of unreadable images add up."""
    before, account = read(folder), {}
    for split, source in sources.items():
        old = before.get(split, {})
        account[split] = {"description": source.describe(),
                          "fingerprint": old.get("fingerprint", source.fingerprint),
                          "captions": old.get("captions") or source.texts,
                          "class_names": source.class_names, "notes": source.notes,
                          "unreadable": list(dict.fromkeys([*old.get("unreadable", []), *source.bad])),
                          "not used": {reason: {"count": n, "names": names}
                                       for reason, (n, names) in source.dropped.items()}}
    write_json(folder / FILE, account)


def lost(source: ImageSource) -> str:
    """One line about images that could not be read, where there are any."""
    if not source.bad:
        return ""
    return (f"{len(source.bad)} images could not be read and were replaced (all names: {FILE}): "
            f"{source.bad[0]}")
