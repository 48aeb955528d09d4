"""Commands that train many settings and write down what came out: `vfmlab compare` and `vfmlab correlate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import arg

from vfmlab.cli.arguments import Assignments, Root, RunArg, assignments
from vfmlab.errors import ConfigError, RunError

Rows = Annotated[tuple[str, ...], tyro.conf.Positional, arg(metavar="ROW ...", help="[LABEL=]PRESET[+VARIANT...][@PRESET][:field=value,...]")]


def compare(
    rows: Rows,
    /,
    sets: Assignments = (),
    seeds: tuple[int, ...] = (0, 1),
    root: Root = Path("runs"),
    out: Path = Path("comparison"),
    jobs: int = 2,
    title: str = "Comparison",
    until: Literal["first_stage", "tokenizer"] | None = None,
) -> int:
    """Train several settings with several seeds under one protocol and write tables and curves.

    Args:
        sets: changes that hold for all rows.
        seeds: every row is trained with each.
        out: where to write; .md, .json and .html are added.
        jobs: runs at a time, one thread each where there are several.
        title: heading of the page.
        until: leave diffusion out, or all but the first stage of each recipe.
    """
    from vfmlab.studies import compare as comparing

    if not rows:
        raise ConfigError("no rows; name at least one preset, for example: vfmlab compare pocket_plain_vae pocket_vfm_vae")
    print(f"written: {comparing.run(rows, seeds, root, out, jobs, assignments(sets), title, until)}")
    return 0


def correlate(
    rows: Rows,
    /,
    sets: Assignments = (),
    seeds: tuple[int, ...] = (0, 1),
    root: Root = Path("runs"),
    out: Path = Path("correlation"),
    jobs: int = 2,
    target: str = "gfd",
    names: Annotated[tuple[str, ...], arg(name="instruments")] = (),
    compared_with: str | None = None,
) -> int:
    """Which numbers of a tokenizer go along with how well diffusion trains on it: measures, rank correlations, figures.

    Args:
        sets: changes that hold for all rows.
        seeds: every row is trained with each.
        out: where to write; .md, .json and .html are added.
        jobs: runs at a time, one thread each where there are several.
        target: gfd, gfd_own or class_accuracy.
        names: what to measure beside the report; docs/instruments.md lists them.
        compared_with: reference model of all rows in place of each row's default.
    """
    from vfmlab.studies import compare as comparing

    if len(rows) < comparing.correlation.LEAST:
        raise ConfigError(f"{len(rows)} rows; rank correlations need at least {comparing.correlation.LEAST} settings")
    more = {"names": names} if names else {}
    print(f"written: {comparing.correlate(rows, seeds, root, out, jobs, assignments(sets), target, compared_with=compared_with, **more)}")
    return 0


def stop(run: RunArg, /, root: Root = Path("runs")) -> int:
    """Ask a run to save and end, whichever process or machine trains it; started again, it goes on."""
    from vfmlab import runs

    folder = runs.open_run(run, root)
    if (state := folder.status().state) != "running":
        raise RunError(f"run '{folder.id}' is not being trained (state: {state}), so there is nothing to stop")
    folder.request_stop()
    print(f"run '{folder.id}' saves and ends after the step it is in")
    return 0
