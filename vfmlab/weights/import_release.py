"""A released checkpoint -> an ordinary run directory, which everything else can use.

    release = open_release("va_vae_f16d32")              # or a family's name with file and config_file
    run = draft(release, {"data.source": "folder:PATH"})  # its config, made from what was read
    for event in import_run(run, "runs", release=release): ...

The directory holds config.json (with `imported`), both weights files (equal: a release is one set of
weights), latent statistics, and the state "finished".
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab import config, data, runs
from vfmlab.ar.llamagen import CodeShape
from vfmlab.config.files import read_mapping
from vfmlab.errors import CheckpointError, ConfigError, RunError, TrainingError, VfmlabError
from vfmlab.registry import IMPORTERS, NETWORKS, TOKEN_NETWORKS
from vfmlab.tokenizers.base import Statistics, measure
from vfmlab.training import checkpoint
from vfmlab.training.events import Event
from vfmlab.weights import as_released, import_state_dict, io, load, statistics, table
from vfmlab.weights.family import agree

MEASURED_IMAGES = 4096  # as many as a training takes
MEASURED = "measured"


@dataclass(frozen=True)
class Release:
    """A checkpoint that has been read. module: the importer's; settings: the release's config."""

    row: table.Row
    path: Path
    sha256: str
    settings: dict[str, Any]
    module: nn.Module


def open_release(name: str, file: str | Path | None = None, config_file: str | Path | None = None,
                 sha256: str | None = None) -> Release:
    """Find, check and read a checkpoint, and import it.

    Args:
        name: a row of the table, or a family ("va-vae", ...). file: instead of the hub's; also the index of
            weights in several files, or a folder as diffusers writes it, whose config.json then counts.
            config_file: the release's YAML or JSON, instead of the row's. sha256: that the file must have; by
            default the row's, where it is known.

    Raises:
        ConfigError: unknown name; a config that is missing or of another family. CheckpointError: not to be
        had, unsafe, truncated, unexpected, or tensors that do not fit.
    """
    row, path = table.get(name), None
    if file is not None:
        path = Path(file).expanduser()
        if path.is_dir():
            path, own_config = io.in_folder(path)
            config_file = config_file or own_config
        elif not path.is_file():
            raise CheckpointError(f"--file: no file '{path}'")
    if file is not None and config_file is not None and row.family == name:
        row = table.unlisted(name)
    settings = row.config
    if config_file is not None:
        with as_released(row.family):
            settings = IMPORTERS.get(row.family).arguments(read_mapping(config_file, "--config"))
    if not settings:
        raise ConfigError(f"'{name}' has no config of its own; give the release's: --config FILE")
    if path is None and row.repo is None:
        where, what = f" ({row.note})" if row.note else "", f"'{row.file}'" if row.file else "it"
        raise CheckpointError(f"'{name}' is not on the hub{where}; download {what} and pass it: --file PATH")
    path = path or io.fetch(row.repo, row.file, row.revision)
    digest = io.sha256(path, sha256 or row.sha256)
    state = io.unwrap(io.read_released(path), path)
    return Release(row, path, digest, settings, import_state_dict(row.family, state, settings))


# -- the run's config --------------------------------------------------------------------------------------


def draft(release: Release, overrides: dict[str, Any] | str | None = None, root: str | Path = "runs",
          tokenizer: str | Path | None = None) -> config.Phase:
    """The config of the run that `release` becomes: of kind "tokenizer", or a generator on a tokenizer under
    `root`.

    Args:
        overrides: dotted fields, e.g. `{"data.source": "folder:PATH", "vfm.weights": "FILE"}`. tokenizer: the
            run of the tokenizer whose latents or codes a generator makes; by default the imported one that
            it was trained on.
    """
    if release.row.kind == "tokenizer":
        return _tokenizer_run(release, overrides)
    return _generator_run(release, overrides, root, tokenizer)


def _imported(release: Release) -> dict[str, Any]:
    return {"name": release.row.name, "sha256": release.row.sha256}


def _tokenizer_run(release: Release, overrides: dict[str, Any] | str | None) -> config.Phase:
    sections = IMPORTERS.get(release.row.family).sections(release.module, release.settings)
    run = config.parse({"name": f"{release.row.name.replace('-', '_')}_imported", "tier": "paper",
                        "data": {"size": sections["size"], "train": 20_000},
                        "vfm": release.row.vfm or sections["vfm"], "tokenizer": sections["tokenizer"],
                        "imported": _imported(release), "protocol": {"features": "inception", "batch": 64}},
                       f"import {release.row.name}")
    return config.override(run, overrides).phases()[0]


def _generator_run(release: Release, overrides: dict[str, Any] | str | None, root: str | Path,
                   tokenizer: str | Path | None) -> config.Phase:
    folder = _tokenizer_folder(release.row, root, tokenizer)
    parent, network, kind = folder.config(), release.module, release.row.kind
    if kind == "ar":
        made, expected = tuple(network.codes), tuple(_codes(parent))
        what = "codes (entries, tokens, grid, codebooks)"
    else:
        made, what = tuple(network.latent_shape), "latents (C, h, w)"
        expected = (parent.tokenizer.channels, *(parent.data.size // parent.tokenizer.factor,) * 2)
    if made != expected:
        raise ConfigError(f"'{release.row.name}' makes {what} {made}, tokenizer run '{folder.id}' has "
                          f"{expected}; name another run: --tokenizer RUN")
    section = {"network": network.config.model_dump(mode="json"), "train": None,
               "imported": _imported(release)}
    if (path := IMPORTERS.get(release.row.family).path) is not None:
        section["path"] = {"kind": path}
        _check_radius(release.row.name, parent, made[0] ** 0.5)
    changes = {"name": parent.name.removesuffix(f"_{parent.stage}"), "stage": None, kind: section,
               "protocol": {**parent.protocol.model_dump(mode="json"), **release.row.protocol}}
    run = config.parse({**parent.recipe.model_dump(mode="json"), **changes}, f"import {release.row.name}")
    run = config.override(run, overrides).last
    if run.parent != folder.id:
        raise ConfigError(f"tokenizer run '{folder.id}' cannot carry an imported generator: with this "
                          f"config its own run would be '{run.parent}'; import the tokenizer, or train it as "
                          "part of a pipeline")
    return run


def _check_radius(name: str, parent: config.Phase, radius: float) -> None:
    own = parent.tokenizer.radius
    if own is None or abs(own - radius) > 1e-3 * radius:
        raise ConfigError(f"'{name}' works on tokens of length sqrt(C) = {radius:.5g}, tokenizer run "
                          f"'{parent.id}' has tokenizer.radius {own}; name a run with that radius: "
                          "--tokenizer RUN")


def _codes(tokenizer: config.Phase) -> CodeShape:
    """Those of a tokenizer run, found without its weights."""
    recipe = tokenizer.recipe
    with torch.device("meta"):
        return CodeShape.of(load.build_tokenizer(
            recipe if recipe.vfm is None else config.override(recipe, {"vfm.weights": "random"})))


def _tokenizer_folder(row: table.Row, root: str | Path, ref: str | Path | None) -> runs.RunDir:
    if ref is not None:
        folder = runs.open_run(ref, root, kind="tokenizer")
    elif row.tokenizer is None:
        raise ConfigError(f"'{row.name}' samples latents of a tokenizer that the table does not name; give "
                          "--tokenizer RUN")
    else:
        imported = [run for run in runs.scan(root) if config.kind_of(run.raw_config) == "tokenizer"
                    and (run.raw_config.get("imported") or {}).get("name") == row.tokenizer
                    and not run.raw_config.get("stages")]
        if not imported:
            raise RunError(f"'{row.name}' samples latents of '{row.tokenizer}', which is not in '{root}'; "
                           f"first: vfmlab import {row.tokenizer}, or name a run: --tokenizer RUN")
        folder = imported[-1]
    if not isinstance(folder.config(), config.TokenizerPhase):
        raise RunError(f"--tokenizer: run '{folder.id}' is a {folder.kind} run; name a tokenizer run")
    return folder


# -- the run's directory -----------------------------------------------------------------------------------


def import_run(run: config.Phase, root: str | Path = "runs", statistics_from: str | Path | None = None,
               release: Release | None = None) -> Iterator[Event]:
    """Make the directory of `run`, whose weights are imported, and fill it; ends with "finish".

    Args:
        run: a phase with imported weights. release: one that is open already. statistics_from: a file with
            the latents' mean and std; "measured": on the run's images even if the release has some. By
            default the release's, else measured.

    Raises:
        VfmlabError: one line; the run is then marked as failed and can be imported again, as one that was
        stopped by hand.
    """
    if run.imported is None:
        raise ConfigError(f"run '{run.id}' has no imported weights; train it instead")
    with _first_alone():
        folder = runs.create(run, root)
        if folder.status().state == "finished":
            _same_files(folder, release, statistics_from)
            yield Event("skip", run.id, run.stage)
        else:
            yield from _import(run, folder, release, statistics_from)


def _first_alone() -> contextlib.AbstractContextManager:
    """Of several processes one imports, the others then find the run finished."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return contextlib.nullcontext()
    from vfmlab.training.step import open_processes

    return open_processes().main_process_first()


def _import(run: config.Phase, folder: runs.RunDir, release: Release | None,
            statistics_from: str | Path | None) -> Iterator[Event]:
    started = time.monotonic()
    with folder.lock():
        folder.set_status(state="running", message="importing")
        folder.save_env()
        try:
            yield Event("start", run.id, run.stage)
            fill = _fill_tokenizer if run.generator is None else _fill_generator
            facts = {}
            release = release or open_release(run.imported.name, sha256=run.imported.sha256)
            for event in fill(run, folder, release, statistics_from):
                facts |= event.data if event.kind == "step" else {}
                yield event
        except BaseException as error:
            state, message = "failed", str(error) if isinstance(error, VfmlabError) else type(error).__name__
            if isinstance(error, GeneratorExit | KeyboardInterrupt | SystemExit):
                state, message = "interrupted", "stopped by hand; start it again to import it"
            with contextlib.suppress(OSError, TrainingError):
                folder.set_status(state=state, message=message)
            raise
        folder.set_status(state="finished", message="", seconds=time.monotonic() - started)
    yield Event("finish", run.id, run.stage, data=facts)


def _same_files(folder: runs.RunDir, release: Release | None, statistics_from: str | Path | None) -> None:
    """:class:`RunError` where a run that is there was made of other files than it would be now."""
    facts = io.metadata(folder.ema)
    before, way = facts.get("imported_sha256", ""), "give this one a name of its own: --set name=NAME"
    if release is not None and release.sha256 != before:
        raise RunError(f"run '{folder.id}' holds the weights of another file (SHA-256 {before[:16]}...); "
                       f"{way}")
    if statistics_from is not None and any(facts.get(k, v) != v for k, v in _marked(statistics_from).items()):
        raise RunError(f"run '{folder.id}' has other latent statistics ({facts['statistics']}) than "
                       f"'{statistics_from}'; {way}")


def _marked(statistics_from: str | Path) -> dict[str, str]:
    """What a run remembers of the statistics that were asked for."""
    if str(statistics_from) == MEASURED:
        return {"statistics": MEASURED}
    path = Path(statistics_from).expanduser()
    return {"statistics": path.name, "statistics_sha256": io.sha256(path) if path.is_file() else "no file"}


def _fill_tokenizer(run: config.Phase, folder: runs.RunDir, release: Release,
                    statistics_from: str | Path | None) -> Iterator[Event]:
    known: tuple[Tensor, Tensor, str] | None
    if statistics_from is None:
        known = statistics.released(release.row, release.settings)
    elif str(statistics_from) == MEASURED:
        known = None
    else:
        eps = release.row.statistics.eps if release.row.statistics else 0.0
        known = (*statistics.read(statistics_from, eps), Path(statistics_from).name)
    tokenizer = load.build_tokenizer(run).eval()
    channels = run.tokenizer.channels
    if known is not None and known[0].shape not in ((1,), (channels,), tokenizer.map_shape):
        raise CheckpointError(f"statistics of {known[2]} are for latents of {tuple(known[0].shape)}, the run "
                              f"has {tokenizer.map_shape}")
    tokenizer.to(load.device())
    where = tokenizer.stat_mean.device
    release.module.to(where)

    def batches() -> Iterable[Tensor]:
        source = data.open_source(run.data, "train")  # those that a training would take
        return data.some_images(source, MEASURED_IMAGES, "statistics", run.seed, batch=64, device=where)

    left = IMPORTERS.get(release.row.family).put(tokenizer, release.module, known and known[:2], batches)
    if left is None:
        message = (f"latent statistics are measured on {run.data.source}; the release publishes none, or "
                   "they were not asked for")
        yield Event("warning", run.id, run.stage, data={"message": message})
        fingerprint = data.open_source(run.data, "train").fingerprint
        moments, origin = measure(tokenizer, batches(), fingerprint), MEASURED
    else:
        mean, std = (value.cpu().clone() if value.ndim == 3 else value.cpu().expand(channels).clone()
                     for value in left)
        origin = known[2]
        moments = Statistics(mean.float(), std.float(), statistics.COUNT, f"release {release.row.name}")
    tokenizer.set_statistics(moments)
    facts = {"fingerprint": moments.fingerprint, "statistics": origin}
    if statistics_from is not None:
        facts |= _marked(statistics_from)
    if tokenizer.vfm is not None:
        facts["vfm_fingerprint"] = tokenizer.vfm.fingerprint
    write(folder, tokenizer.state_dict(), release, facts)
    latent = {"mean": moments.mean, "std": moments.std}
    io.write(folder.latent_stats, latent, {"count": moments.count, **facts})
    yield Event("step", run.id, run.stage, data={"statistics": origin, "sha256": release.sha256})


def _fill_generator(run: config.Phase, folder: runs.RunDir, release: Release,
                    statistics_from: str | Path | None) -> Iterator[Event]:
    if statistics_from is not None:
        raise ConfigError("--statistics belongs to a tokenizer; import its tokenizer again with them")
    parent = runs.open_run(run.parent, root=folder.path.parent)
    if not parent.ema.exists():
        raise CheckpointError(f"tokenizer run '{parent.id}' has no weights yet (state: "
                              f"{parent.status().state})")
    tokenizer = io.metadata(parent.ema)
    if run.ar is None and tokenizer.get("statistics") == MEASURED:
        message = (f"the latent statistics of '{parent.id}' are measured, not the release's: what the "
                   "network samples is then scaled differently from what it learned")
        yield Event("warning", run.id, run.stage, data={"message": message})
    module = release.module
    registry, shape = (NETWORKS, "latent_shape") if run.ar is None else (TOKEN_NETWORKS, "codes")
    wanted = run.generator.network
    agree(wanted, module.config, f"{run.kind}.network")
    network = registry.get(wanted.kind)(wanted, getattr(module, shape), module.num_classes)
    io.load(network, module.state_dict(), f"imported '{release.row.name}'")
    facts = {key: tokenizer[key] for key in ("fingerprint", "vfm_fingerprint") if key in tokenizer}
    names = json.dumps(class_names(module.num_classes))
    write(folder, network.state_dict(), release, {**facts, "tokenizer": parent.id, "class_names": names})
    yield Event("step", run.id, run.stage, data={"sha256": release.sha256, "tokenizer": parent.id})


def write(folder: runs.RunDir, tensors: dict[str, Tensor], release: Release | None,
          facts: dict[str, str]) -> None:
    """Both weights files of a run, with equal tensors. facts: metadata beside what every run has."""
    what = {"format": checkpoint.FORMAT, "run_id": folder.id, "kind": folder.kind, "samples": 0,
            "ema_samples": 0, **facts}
    if release is not None:
        row = release.row
        what |= {"imported": row.name, "imported_sha256": release.sha256, "licence": row.licence}
        what |= {"imported_repo": row.repo or "", "imported_file": row.file or ""}
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    for path in (folder.model, folder.ema):
        io.write(path, tensors, what)


def class_names(count: int) -> list[str]:
    """Of a released class-conditional network: ImageNet's for a thousand classes, else numbers."""
    if count != 1000:
        return [str(i) for i in range(count)]
    from timm.data import ImageNetInfo

    return [description.split(",")[0] for description in ImageNetInfo().label_descriptions()]
