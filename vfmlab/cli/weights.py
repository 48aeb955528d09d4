"""Commands that bring weights in and out: `vfmlab import`, `vfmlab export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vfmlab.cli.arguments import Assignments, Json, Progress, Root, RunArg, assignments, root_flag
from vfmlab.errors import ConfigError

arg = tyro.conf.arg
Form = Literal["hub", "diffusers"]
Name = Annotated[str | None, tyro.conf.Positional,
                 arg(metavar="NAME", help="a release; none: list those that are known")]


def import_(name: Name = None, /, file: Path | None = None, config: Path | None = None,
            statistics: str | None = None, tokenizer: str | None = None, sets: Assignments = (),
            root: Root = Path("runs"), progress: Progress = "auto", as_json: Json = False,
            accept_licence: bool = False) -> int:
    """Import released weights into a run that everything else can use.

    Args:
        file: the checkpoint (.safetensors, its index, .pt, .pth, .ckpt) or diffusers' folder, instead of the
            hub's.
        config: the release's own config (.yaml, .json); a family's name with --file and --config takes any
            checkpoint of it.
        statistics: a file with the latents' mean and std, or "measured" for the run's own images; none: the
            release's.
        tokenizer: for a diffusion model, the run whose latents it samples; none: the imported one it was
            trained on.
        sets: changes to the run's config, e.g. data.source=folder:PATH vfm.weights=FILE.
        progress: auto takes a bar on a terminal and a line every few seconds elsewhere.
        accept_licence: the release's non-commercial licence allows what you do; asked on a terminal.
    """
    if name is None:
        return _known(as_json)
    _agree(name, accept_licence)
    from vfmlab.training.progress import watch
    from vfmlab.weights import import_release

    changes = assignments(sets)
    release = import_release.open_release(name, file, config, changes.pop("imported.sha256", None))
    run = import_release.draft(release, changes, root, tokenizer)
    for _ in watch(import_release.import_run(run, root, statistics_from=statistics, release=release),
                   progress):
        pass
    following = ["eval" if run.generator is None else "sample", run.id, *root_flag(root)]
    print(f"imported {run.id} in {root}\nnext: {shlex.join(['vfmlab', *following])}")
    return 0


def _agree(name: str, accepted: bool) -> None:
    """Non-commercial releases are taken only where the user says that the licence allows it."""
    import sys

    from vfmlab.weights import table

    licence = table.get(name).licence
    if accepted or "non-commercial" not in licence:
        return
    question = f"'{name}' is released under: {licence}. Does it allow your use? [y/N] "
    if sys.stdin.isatty() and input(question).strip().lower() in ("y", "yes"):
        return
    raise ConfigError(f"'{name}' is released under: {licence}. If it allows your use, say so: "
                      "--accept-licence")


def _known(as_json: bool) -> int:
    """The table of releases."""
    import dataclasses
    import json

    from vfmlab.weights import table

    rows = [table.get(name) for name in table.names()]
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    width, method = max(len(row.name) for row in rows), max(len(row.method) for row in rows)
    for row in rows:
        where = f"{row.repo}: {row.file}" if row.repo else f"{row.file} (not on the hub)"
        size = f" ({row.size / 1e6:.0f} MB)" if row.size else ""
        print(f"{row.name:<{width}}  {row.method:<{method}}  {row.kind:<9}  {row.licence:<21}  {where}{size}")
    print("\nnext: vfmlab import NAME, or vfmlab import NAME --file PATH where the hub cannot be reached")
    return 0


def export(run: RunArg, /, to: Path | None = None, form: Form = "hub", push: str | None = None,
           private: bool = False, licence: str | None = None, data_licence: str | None = None,
           overwrite: bool = False, root: Root = Path("runs")) -> int:
    """Export a run with a model card.

    Args:
        to: folder to write to: new, empty, or an earlier export; none: exported/ (diffusers/) in the run's
            directory.
        form: hub: the run's tokenizer as config.json and model.safetensors; diffusers: what its
            from_pretrained loads, a tokenizer as an autoencoder, a diffusion run as a pipeline.
        push: hub repository (user/name) to upload to.
        private: make that repository private, if it is new.
        licence: under which the weights are passed on, e.g. mit; none: that of an imported release, else none
            is stated.
        data_licence: of the training images, for the card.
        overwrite: write into a folder that holds other files, too.
    """
    from vfmlab.weights import export as exporting

    save, back = exporting.save_pretrained, "vfmlab.weights.export.from_pretrained"
    if form == "diffusers":
        try:
            from vfmlab.weights import pipeline
        except ImportError:
            raise ConfigError("--form diffusers needs diffusers; pip install 'vfmlab[hub]'") from None
        save, back = pipeline.save, "vfmlab.weights.pipeline"
    if push is not None:
        if to is not None:
            raise ConfigError("--to and --push: one of the two; exporting and uploading are separate")
        address = exporting.push_to_hub(run, push, root, private, licence, None, save, data_licence)
        print(f"uploaded: {address}")
        return 0
    folder = save(run, to, root, licence=licence, overwrite=overwrite, data_licence=data_licence)
    print(f"exported: {folder}\nback: {back} (see {folder / exporting.CARD})")
    return 0
