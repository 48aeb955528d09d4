"""AlignTok's stages: what each buys, and its ablations beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch.nn import functional as F

from vfmlab import api, data
from vfmlab.errors import ConfigError
from vfmlab.plots import primitives
from vfmlab.studies import show
from vfmlab.studies.results import Result, after, cells, means
from vfmlab.studies.rows import Row, listed, parse
from vfmlab.tokenizers.base import Tokenizer

FIRST, TUNED = "latent", "perceptual"  # the stages after which the ablations compare
HERE = {"psnr": "PSNR (dB)", "rfd": "rFD", "probe_linear": "linear probe"}
BASE = "w_sp 1"  # after the adapter, L2: the method itself
# What changes in its preservation loss against the method, and the paper's rFID, linear probe (%) and guided
# gFD after stage 2 (arXiv 2509.25162, ablations).
ABLATIONS: dict[str, tuple[str, tuple[float, float, float]]] = {
    "w_sp 0": ("weight=0.0", (0.33, 9.50, 3.05)),
    BASE: ("", (0.36, 35.09, 2.19)),
    "w_sp 5": ("weight=5.0", (0.49, 40.55, 2.48)),
    "before the adapter": ("anchor=before", (0.34, 15.61, 2.83)),
    "cosine": ("distance=cosine", (0.37, 37.99, 2.23)),
}
# The paper's rFID and linear probe (%) after each stage; the probe is printed for the first and the last row
# only.
PAPER_STAGES = {FIRST: (1.63, 41.53), TUNED: (0.36, 35.09), "refine": (0.26, 35.09)}


# -- rows ----------------------------------------------------------------------


def ablation_rows(preset: str, overrides: dict[str, Any] | str, seeds: Sequence[int],
                  names: str | Sequence[str]) -> list[Row]:
    """One row per ablation and seed, up to stage 2; `BASE` has all its stages. Rows share the first stage.

    Raises:
        ConfigError: a name that is not in `ABLATIONS`, a preset without a stage 2 and its preservation loss.
    """
    names = listed(names)
    if unknown := [name for name in names if name not in ABLATIONS]:
        raise ConfigError(f"ablations: unknown '{unknown[0]}' (choose from: {', '.join(ABLATIONS)})")
    if TUNED not in [stage.name for stage in api.resolve(preset, overrides).stages]:
        way = "take one of AlignTok's, for example pocket_aligntok"
        raise ConfigError(f"preset '{preset}' has no stage '{TUNED}'; {way}")
    changes = {name: ABLATIONS[name][0] for name in dict.fromkeys([BASE, *names])}
    specs = [f"{name}={preset}" + (f":stages.{TUNED}.losses.preservation.{change}" if change else "")
             for name, change in changes.items()]
    return [row if row.label == BASE else replace(row, until=TUNED)
            for row in parse(specs, seeds, overrides, "tokenizer")]


def plan_records(row: Row) -> list[dict[str, Any]]:
    """One record per stage of `row`: what trains, with which losses and budget."""
    records = []
    for phase in row.tokenizers:
        factors = ", ".join(f"{glob} x {factor:g}" for glob, factor in phase.train.lr_for.items())
        losses = ", ".join(f"{name} {term.weight:g}" for name, term in phase.losses.items())
        records.append({"stage": phase.stage, "run": phase.id, "trains": ", ".join(phase.trains),
                        "losses": losses, "images": phase.budget,
                        "learning rate": f"{phase.train.lr:g}" + (f" ({factors})" if factors else "")})
    return records


# -- what the stages buy ----------------------------------------------------------------------


@torch.no_grad()
def distances(row: Row, root: str | Path, n: int = 256) -> dict[str, dict[str, float]]:
    """How far each stage of `row` has moved, over `n` held-out images: stage -> numbers.

    "latent": mean squared difference to the first stage's latent, in units of that latent's variance per
    channel. "encoder": 1 - cosine between the encoder's maps and those of the VFM it began as.
    """
    images, _, _ = data.examples(row.run.data, n)
    moves: dict[str, dict[str, float]] = {}
    first = None
    for phase in row.tokenizers:
        tokenizer = api.load_tokenizer(phase.id, root)
        x = images.to(tokenizer.stat_mean.device)
        own = tokenizer.own_features(x)
        z = tokenizer.posterior(x, own).mode().float()
        first = z if first is None else first
        layer = list(own)[-1]
        cosine = F.cosine_similarity(own[layer], tokenizer.vfm.features(x, (layer,)).maps[layer], dim=1)
        moved = (z - first).square().mean((0, 2, 3)) / first.var((0, 2, 3)).clamp_min(1e-8)
        moves[phase.stage] = {"latent": float(moved.mean()), "encoder": float(1 - cosine.mean())}
    return moves


def stage_records(rows: Sequence[Row], results: Sequence[Result], root: str | Path) -> list[dict[str, Any]]:
    """One record per stage: numbers here (mean and each seed), distances (first seed), the paper's."""
    mine = [result for result in results if result.label == BASE]
    moved = distances(next(row for row in rows if row.label == BASE), root)
    records = []
    for stage, (rfid, probe) in PAPER_STAGES.items():
        seconds = [s.seconds for r in mine for s in r.stages if s.stage == stage]
        records.append({
            "after stage": stage, **dict.fromkeys(HERE.values()), **cells(after(mine, stage), BASE, HERE),
            "latent moved": moved[stage]["latent"], "encoder moved": moved[stage]["encoder"],
            "seconds": round(statistics.fmean(seconds)) if seconds else None,
            "paper: rFID": rfid, "paper: linear probe (%)": probe,
        })  # fmt: skip
    return records


def reconstructions(rows: Sequence[Row], root: str | Path, n: int = 8) -> go.Figure:
    """The same held-out images after each stage of the method (first seed), with four-fold error maps."""
    row = next(row for row in rows if row.label == BASE)
    images, _, _ = data.examples(row.run.data, n)
    tokenizers = {phase.stage: api.load_tokenizer(phase.id, root) for phase in row.tokenizers}
    return show.reconstructions(tokenizers, images)


def latents(rows: Sequence[Row], root: str | Path, n: int = 8) -> go.Figure:
    """Principal components of the latent after stage 1, and after stage 2 of every ablation (first seed)."""
    images, _, _ = data.examples(rows[0].run.data, n)
    shown: dict[str, Tokenizer] = {}
    first = {row.label: row for row in reversed(rows)}
    for label in dict.fromkeys(row.label for row in rows):
        for phase in first[label].tokenizers:
            name = "stage 1" if phase.stage == FIRST else f"{label}, {phase.stage}"
            if name not in shown and (phase.stage == FIRST or phase.stage == TUNED):
                shown[name] = api.load_tokenizer(phase.id, root)
    return show.latent_maps(shown, images)


# -- ablations ----------------------------------------------------------------------


def ablation_records(rows: Sequence[Row], results: Sequence[Result],
                     root: str | Path) -> list[dict[str, Any]]:
    """One record per ablation, all after stage 2: numbers here, distance of the latent, the paper's."""
    tuned, first, records = after(results, TUNED), {row.label: row for row in reversed(rows)}, []
    for label in (name for name in ABLATIONS if name in first):
        record = {"stage 2": label, **dict.fromkeys(HERE.values()), **cells(tuned, label, HERE)}
        if record[HERE["psnr"]]:
            record["latent moved"] = distances(first[label], root)[TUNED]["latent"]
        paper = zip(("rFID", "linear probe (%)", "gFID, guided"), ABLATIONS[label][1], strict=True)
        records.append(record | {f"paper: {name}": value for name, value in paper})
    return records


def trade_off(results: Sequence[Result]) -> go.Figure:
    """Linear probe against rFD after stage 1, and after stage 2 of each ablation (means over seeds)."""
    points = []
    for stage, names in ((TUNED, ABLATIONS), (FIRST, [BASE])):
        rfd, probe = (means(after(results, stage), key) for key in ("rfd", "probe_linear"))
        for name in (name for name in names if name in rfd and name in probe):
            point = {"rFD": statistics.fmean(rfd[name]), "linear probe": statistics.fmean(probe[name])}
            points.append({"name": "stage 1" if stage == FIRST else name, **point})
    title = "better reconstruction is left, more of the semantics is up"
    return primitives.scatter(points, "rFD", "linear probe", title=title)
