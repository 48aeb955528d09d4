"""Diffusion-side alignment: with and without, block by block over training, and encoder reuse."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

from vfmlab import api, runs
from vfmlab.diffusion import reuse, sampling
from vfmlab.errors import ConfigError, RunError, nearest
from vfmlab.evaluation.instruments import blocks
from vfmlab.plots import figures, primitives
from vfmlab.presets.variants import SETTINGS
from vfmlab.seeding import SampleRandom
from vfmlab.studies import show
from vfmlab.studies.results import Result, means, spread
from vfmlab.studies.rows import Row, listed, parse
from vfmlab.training.diffusion import TARGET_KEY

NONE, SPLIT = "none", "split"  # without alignment; the DiT of encoder and head


# -- rows ----------------------------------------------------------------------


def rows(preset: str, baseline: str, overrides: dict[str, Any] | str, seeds: Sequence[int],
         names: str | Sequence[str]) -> list[Row]:
    """One row per tokenizer, setting and seed, labelled "<preset> <setting>"; its settings share a tokenizer.

    Args:
        preset: with a diffusion section. baseline: a second one, or "". names: of
            `vfmlab.presets.variants.SETTINGS`; the runs without alignment ("none") are added.

    Raises:
        ConfigError: unknown setting, a preset without diffusion.
    """
    names = listed(names)
    if unknown := [how for how in names if how not in (NONE, *SETTINGS)]:
        raise ConfigError(f"unknown alignment '{unknown[0]}'{nearest(unknown[0], SETTINGS)}")
    specs = []
    for name in filter(None, [preset, baseline]):
        if api.resolve(name, overrides).diffusion is None:
            way = "take one that does, for example pocket_vfm_vae"
            raise ConfigError(f"preset '{name}' trains no diffusion model; {way}")
        specs.append(f"{label(name, NONE)}={name}")
        specs += [f"{label(name, how)}={name}+{how}" for how in dict.fromkeys(names) if how != NONE]
    return parse(specs, seeds, overrides)


def label(preset: str, how: str) -> str:
    return f"{preset} {how}"


def split_row(preset: str, overrides: dict[str, Any] | str, seed: int) -> Row:
    """The preset with a split DiT, for the reuse of its encoder."""
    return parse([f"{label(preset, SPLIT)}={preset}+ddt"], [seed], overrides)[0]


def plan_records(study: Sequence[Row]) -> list[dict[str, Any]]:
    """One table row per row: what the network is aligned with, and how."""
    records = []
    for row in study:
        d = row.run.diffusion
        a, c = d.alignment, d.class_token
        repa = f"{a.vfm.name} layer {a.layer} at block {a.block}, {a.weight:g}, {a.projector}" if a else ""
        records.append({"row": row.label, "seed": row.seed, "run": row.run.id,
                        "tokenizer": row.run.last.parent, "network": d.network.kind, "REPA": repa,
                        "REG": f"{c.vfm.name}, {c.weight:g}" if c else "", "images": d.train.samples})
    return records


def _first(study: Sequence[Row]) -> list[Row]:
    """The rows of the first seed."""
    return [row for row in study if row.seed == study[0].seed]


def _folder(row: Row, root: str | Path) -> runs.RunDir:
    return runs.open_run(row.run.id, root)


# -- over training ----------------------------------------------------------------------


def convergence(study: Sequence[Row], root: str | Path) -> go.Figure:
    """Quality of samples over training, one line per row (means over seeds); dashed: without alignment."""
    folders = [_folder(row, root) for row in study]
    figure = figures.convergence(folders, _dashed(study), labels=[row.label for row in study])
    if not figure.data:
        raise ConfigError("convergence: no evaluation during training; set diffusion.train.evaluate_at")
    return figure


def losses(study: Sequence[Row], root: str | Path) -> go.Figure:
    """Losses of velocity and class token, and cosine with the target, where they are trained (first seed)."""
    names = {"velocity loss": ("velocity", "loss"), "cosine with the target": ("alignment",),
             "class token's velocity loss": ("token_velocity",)}
    parts, logs = [], {row.label: _folder(row, root).metrics("step") for row in _first(study)}
    for title, keys in names.items():
        key_of = {name: next((k for k in keys if log and k in log[0]), None) for name, log in logs.items()}
        points = {name: [(r["samples"], r[key]) for r in logs[name] if key in r]
                  for name, key in key_of.items() if key}
        lines = {name: tuple(zip(*own, strict=True)) for name, own in points.items()}
        if lines:
            parts.append(primitives.curves(lines, y=title, title=title, dashed=_dashed(study), by_place=True))
    return primitives.panels(parts, columns=max(1, len(parts)))


def _dashed(study: Sequence[Row]) -> list[str]:
    return [row.label for row in study if row.label.endswith(f" {NONE}")]


def dynamics_maps(study: Sequence[Row], root: str | Path, target: bool = False) -> go.Figure:
    """Block x images seen, one map per row on one colour scale: CKNNA at t = 1/2 (first seed).

    With the protocol's feature space, which no row is trained on; or, for rows with REPA, with its `target`.
    """
    maps, key = {}, TARGET_KEY if target else blocks.BLOCK_KEY
    for row in _first(study):
        with suppress(RunError):  # a row that logged no blocks
            maps[row.label] = blocks.over_training(_folder(row, root), key)
    if not maps:
        raise ConfigError("dynamics: no evaluation has logged the blocks; set diffusion.train.evaluate_at")
    reference = "the target of REPA" if target else "the judge's features, which no row is aligned with"
    return figures.dynamics_maps(maps, f"CKNNA of every block with {reference}")


# -- both sides ----------------------------------------------------------------------


def two_sided(study: Sequence[Row], results: Sequence[Result]) -> list[dict[str, Any]]:
    """One table row per setting: gFD and class accuracy on each tokenizer (mean, each seed).

    "change": of gFD against "none" on that tokenizer, seed by seed: the two runs of a seed share tokenizer,
    noise and order of images. Signs that differ between the seeds, or one seed, show no effect.
    """
    gfd, hits = means(results, "gfd"), means(results, "class_accuracy")
    by_seed = {(r.label, r.seed): r.numbers["gfd"].value for r in results if "gfd" in r.numbers}
    tokenizers = list(dict.fromkeys(row.label.rpartition(" ")[0] for row in study))
    records = []
    for how in dict.fromkeys(row.label.rpartition(" ")[2] for row in study):
        record: dict[str, Any] = {"diffusion side": how}
        for name in (name for name in tokenizers if label(name, how) in gfd):
            own, base = label(name, how), label(name, NONE)
            record[f"{name}: gFD"] = spread(gfd[own])
            seeds = sorted(seed for row, seed in by_seed if row == own and (base, seed) in by_seed)
            if how != NONE:
                changes = [f"{100 * (by_seed[own, s] / by_seed[base, s] - 1):+.1f} %" for s in seeds]
                record[f"{name}: change"] = ", ".join(changes) or None
            record[f"{name}: class accuracy"] = spread(hits[own]) if own in hits else None
        records.append(record)
    return records


def speed_records(study: Sequence[Row], root: str | Path) -> list[dict[str, Any]]:
    """Median images per second of training (first seed) with its middle half, as logged."""
    records = []
    for row in _first(study):
        steps = _folder(row, root).metrics("step")
        speeds = [r["samples_per_second"] for r in steps if "samples_per_second" in r]
        low, middle, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3 or [None] * 3
        half = f"{low:.0f} to {high:.0f}" if low else None
        records.append({"row": row.label, "images a second, as logged": middle, "middle half": half})
    return records


def samples(study: Sequence[Row], root: str | Path, seed: int = 0) -> go.Figure:
    """One image per class and row, from the same noise (first seed of the study)."""
    images = {row.label: show.class_samples(row.run.id, root, seed=seed) for row in _first(study)}
    return primitives.rows(images, title="same noise, same classes")


# -- encoder reuse ----------------------------------------------------------------------


@torch.no_grad()
def block_similarity(row: Row, root: str | Path, n: int = 16,
                     seed: int = 0) -> tuple[list[float], dict[int, torch.Tensor]]:
    """Similarity of blocks over time (`vfmlab.diffusion.reuse`) on a run's own sampling path, unguided."""
    loaded = api.load_diffusion(row.run.id, root)
    labels = torch.arange(n, device=loaded.device) % loaded.num_classes
    sampler = row.run.protocol.sampler.model_copy(update={"solver": "euler", "reuse": None, "parallel": None})

    def draw(watched: reuse.Watched) -> None:
        shape = loaded.tokenizer.latent_shape
        sampling.sample(watched, labels, SampleRandom(seed, range(n), loaded.device), sampler,
                        latent_shape=shape, null=loaded.num_classes)

    return reuse.similarity_over_time(loaded.network, draw)
