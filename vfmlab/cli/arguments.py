"""Arguments that several commands take, and what turns them into values. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

arg = tyro.conf.arg
SET_HELP = "dotted fields, e.g. train.samples=50000 tokenizer.channels=8"
Assignments = Annotated[tuple[str, ...], arg(name="set", metavar="FIELD=VALUE ...", help=SET_HELP)]
PresetArg = Annotated[
    str, tyro.conf.Positional,
    arg(metavar="PRESET", help="a preset, PRESET+VARIANT, PRESET@PRESET, or a config file (.json)")
]
RunArg = Annotated[
    str, tyro.conf.Positional, arg(metavar="RUN", help="id, unique prefix of an id, or directory")
]
Json = Annotated[bool, arg(name="json", help="print JSON")]
Root = Annotated[Path, arg(help="folder of the run directories; runs is $VFMLAB_ROOT where that is set")]
Progress = Literal["auto", "bar", "plain", "none"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C with a message: what is saved, and how to go on."""


def assignments(items: Sequence[str]) -> dict[str, Any]:
    from vfmlab.config import parse_assignments

    return parse_assignments(list(items))


def root_flag(root: Path) -> list[str]:
    """`--root` as it has to be repeated in a command that goes on from here."""
    from vfmlab.config.files import root_folder

    return [] if root == root_folder() else ["--root", str(root)]
