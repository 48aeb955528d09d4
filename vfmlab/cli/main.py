"""The command line. Its commands stand in the other files of this room, thin over `vfmlab.api`.

Everything heavy is imported inside the commands, so that help and mistakes are quick. What the library raises
on bad input, and what the machine refuses (files, disk, memory), becomes one line on stderr and exit code 2;
anything else keeps its traceback.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from vfmlab import __version__
from vfmlab.cli.listing import doctor, plan, presets, runs
from vfmlab.cli.pictures import reconstruct, sample
from vfmlab.cli.serve import app
from vfmlab.cli.studies import choose, claims, compare, correlate, demo, guide, reuse, site, stop, sweep
from vfmlab.cli.training import evaluate, train
from vfmlab.cli.weights import export, import_
from vfmlab.config.files import expand, root_folder
from vfmlab.errors import ConfigError, VfmlabError, nearest, of_the_machine

COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "stop": stop,
    "eval": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "import": import_,
    "export": export,
    "runs": runs,
    "presets": presets,
    "plan": plan,
    "doctor": doctor,
    "compare": compare,
    "choose": choose,
    "claims": claims,
    "guide": guide,
    "reuse": reuse,
    "sweep": sweep,
    "correlate": correlate,
    "app": app,
    "demo": demo,
    "site": site,
}
FIELD = re.compile(r"[a-z_]+(\.[\w:]+)+=.*", re.DOTALL)
QUICK = ("runs", "presets", "stop", "doctor", "demo")  # they begin to speak at once


def gather(argv: Sequence[str]) -> list[str]:
    """Move the values of all `--set` flags, which may be repeated and stand anywhere, behind a last one."""
    rest: list[str] = []
    values: list[str] = []
    inside = False
    for token in argv:
        if token == "--set":
            inside = True
        elif token.startswith("--set="):
            values.append(token.removeprefix("--set="))
            inside = False
        elif inside and "=" in token and not token.startswith("--"):
            values.append(token)
        else:
            inside = False
            rest.append(token)
    loose = next((token for token in rest if FIELD.fullmatch(token)), None)
    if loose is not None and argv[0] in ("train", "eval", "plan"):
        raise ConfigError(f"'{loose}': fields are given behind --set: --set {shlex.join([loose, *values])}")
    return [*rest, "--set", *values] if values else list(argv)


def _with_paths(name: str, command: Callable[..., int], asked: bool) -> Callable[..., Callable[[], int]]:
    """Arguments -> the call of `command`, with `~` expanded in paths, after a line on a terminal.

    asked: whether this is the command that was called; of others the help has the first words only.
    """

    def path(key: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(path(key, each) for each in value)
        if not isinstance(value, Path):
            return value
        return root_folder(value) if key == "root" else expand(value)

    @functools.wraps(command)
    def call(*args: Any, **options: Any) -> Callable[[], int]:
        if name not in QUICK and sys.stderr.isatty():
            print(f"vfmlab {name}: starting, some seconds ...", file=sys.stderr, flush=True)
        options = {key: path(key, value) for key, value in options.items()}
        return functools.partial(command, *(path("", arg) for arg in args), **options)

    if not asked:  # in the list of commands
        call.__doc__ = (command.__doc__ or "").partition("\n\n")[0]
    return call


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 doctor found faults, 2 bad input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        argv = ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that the terminal's encoding does not know are escaped
            stream.reconfigure(errors="backslashreplace")
    if argv == ["--version"]:
        print(f"vfmlab {__version__}")
        return 0
    try:
        if not argv[0].startswith("-") and argv[0] not in COMMANDS:
            raise ConfigError(f"unknown command '{argv[0]}'{nearest(argv[0], COMMANDS)}")
        command = tyro.extras.subcommand_cli_from_dict(
            {name: _with_paths(name, command, argv[0] == name) for name, command in COMMANDS.items()},
            prog="vfmlab",
            description="Visual tokenizers from vision foundation models, and latent diffusion on them.",
            args=gather(argv), config=(tyro.conf.OmitArgPrefixes,)
        )
        return command()
    except VfmlabError as error:
        line = str(error)
    except ModuleNotFoundError as error:
        from vfmlab.cli.doctor import EXTRAS

        package = (error.name or "").split(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        way = f"uv pip install -c constraints.txt -e '.[{extra}]'"
        line = f"'{argv[0]}' needs {package}, which is not installed: {way}"
    except KeyboardInterrupt as stop:
        print(f"\nvfmlab: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = of_the_machine(error)
        if not line:
            raise
    print(f"vfmlab: error: {' '.join(line.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
