"""Commands that train and measure: `vfmlab train` and `vfmlab eval`; `vfmlab stop` is beside the studies."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

from vfmlab.cli.arguments import (
    Assignments,
    Json,
    PresetArg,
    Progress,
    Root,
    RunArg,
    assignments,
    counting,
    root_flag,
)
from vfmlab.errors import ConfigError, Interrupted, Stopped

RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
# as accelerate reads them
SWITCHES = ("y", "yes", "t", "true", "on", "1", "n", "no", "f", "false", "off", "0")


def train(preset: PresetArg, /, sets: Assignments = (), root: Root = Path("runs"), until: str | None = None,
          progress: Progress = "auto") -> int:
    """Train a preset, phase by phase; started again, it goes on where it stopped.

    Args:
        sets: dotted fields, e.g. train.samples=50000 tokenizer.channels=8.
        until: stop after this phase: a stage's name, or "tokenizer" for all of its stages.
        progress: auto takes a bar on a terminal and a line every few seconds elsewhere.
    """
    check_environment()
    from vfmlab import api
    from vfmlab.training import progress as bars

    run = api.resolve(preset, assignments(sets))
    if os.environ.get("RANK", "0") != "0":
        progress = "none"  # one of several processes speaks
    last = ""
    events = api.train(run, root, until=until)
    try:
        with contextlib.closing(events), bars.Progress(progress) as show:
            for event in events:
                show(event)
                last = event.run_id
                if "remark" in event.data:
                    print(f"{last}: {event.data['remark']}")
    except (KeyboardInterrupt, Stopped):
        again = (shlex.join(["vfmlab", *sys.argv[1:]]) if sys.argv[1:2] == ["train"]
                 else f"vfmlab train {preset}")
        saved = f"run '{last}' is saved" if last else "nothing was trained yet"
        raise Interrupted(f"interrupted; {saved}. To go on: {again}") from None
    if progress != "none":
        print(f"trained {last} in {root}\nnext: {shlex.join(['vfmlab', 'eval', last, *root_flag(root)])}")
    return 0


def check_environment() -> None:
    """Check the variables of torchrun and accelerate; :class:`ConfigError` for one that cannot be."""
    for name in RANKS:
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdecimal()):
            raise ConfigError(f"environment variable {name} = '{value}' is not a number; unset it, or use a "
                              "launcher")
    for name in filter(lambda name: name.startswith("ACCELERATE_USE_"), os.environ):
        if os.environ[name].lower() not in SWITCHES:
            raise ConfigError(f"environment variable {name} = '{os.environ[name]}' is neither true nor "
                              "false; unset it")


def evaluate(run: RunArg, /, sets: Assignments = (), root: Root = Path("runs"), again: bool = False,
             as_json: Json = False) -> int:
    """Measure a run under its protocol; numbers that were measured before are read from its report.

    Args:
        sets: changes to the protocol, e.g. n=500 guidance.scale=2.
        again: measure anew.
    """
    from vfmlab import api

    check_environment()
    report = api.evaluate(run, root, protocol=assignments(sets), again=again, progress=counting("images"))
    if os.environ.get("RANK", "0") != "0":
        return 0
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
        return 0
    print(report)
    for line in report.warnings:
        print(f"warning: {line}", file=sys.stderr)
    return 0
