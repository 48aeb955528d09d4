"""Arguments that several commands take, and what turns them into values. Imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

arg = tyro.conf.arg
Assignments = Annotated[tuple[str, ...], arg(name="set", metavar="FIELD=VALUE ...")]  # a command says of what
PresetArg = Annotated[
    str, tyro.conf.Positional,
    arg(metavar="PRESET", help="a preset, PRESET+VARIANT, PRESET@PRESET, or a config file (.json)")
]
RunArg = Annotated[
    str, tyro.conf.Positional, arg(metavar="RUN", help="id, unique prefix of an id, or directory")
]
Json = Annotated[bool, arg(name="json", help="print JSON")]
Root = Annotated[Path, arg(help="folder of the run directories; runs is $VFMLAB_ROOT where that is set")]
MANY = 5000  # images of which a log says how many are done
Progress = Literal["auto", "bar", "plain", "none"]


def assignments(items: Sequence[str]) -> dict[str, Any]:
    from vfmlab.config import parse_assignments

    return parse_assignments(list(items))


def counting(what: str) -> Callable[[int, int], None]:
    """Called with (done, total): writes a line about it on stderr, on a terminal over the one before;
    elsewhere a line for every tenth of many."""
    said = [-1]

    def say(done: int, total: int) -> None:
        tenth = 10 * done // total
        if sys.stderr.isatty():
            end = "\n" if done >= total else ""
            print(f"\r{done} of {total} {what}", end=end, file=sys.stderr, flush=True)
        elif tenth > said[0] and total >= MANY:
            print(f"{done} of {total} {what}", file=sys.stderr, flush=True)
        said[0] = tenth

    return say


def root_flag(root: Path) -> list[str]:
    """`--root` as it has to be repeated in a command that goes on from here."""
    from vfmlab.config.files import root_folder

    return [] if root == root_folder() else ["--root", str(root)]
