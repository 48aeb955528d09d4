"""Tables, figures and sentences about AlignTok's stages: what each buys, and its ablations beside the paper's."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch.nn import functional as F

from vfmlab import api, config
from vfmlab.errors import ConfigError
from vfmlab.plots import figures, primitives
from vfmlab.studies.results import Result, means, spread
from vfmlab.studies.rows import Row

FIRST, TUNED = "latent", "perceptual"  # the stages by which the ablations are told
HERE = {"psnr": "PSNR (dB)", "rfd": "rFD", "probe_linear": "linear probe"}
BASE = "w_sp 1"  # after the adapter, L2: the method itself
_FIELD = f"stages.{TUNED}.losses.preservation"
# What changes against the method, and the paper's rFID, linear probe (%) and guided gFD after stage 2 (arXiv 2509.25162, ablations).
ABLATIONS: dict[str, tuple[dict[str, Any], tuple[float, float, float]]] = {
    "w_sp 0": ({f"{_FIELD}.weight": 0.0}, (0.33, 9.50, 3.05)),
    BASE: ({}, (0.36, 35.09, 2.19)),
    "w_sp 5": ({f"{_FIELD}.weight": 5.0}, (0.49, 40.55, 2.48)),
    "before the adapter": ({f"{_FIELD}.anchor": "before"}, (0.34, 15.61, 2.83)),
    "cosine": ({f"{_FIELD}.distance": "cosine"}, (0.37, 37.99, 2.23)),
}
# The paper's rFID and linear probe (%) after each stage; the probe is printed for the first and the last row only.
PAPER_STAGES = {FIRST: (1.63, 41.53), TUNED: (0.36, 35.09), "refine": (0.26, 35.09)}


# -- rows -------------------------------------------------------------------------------------------------------------


def ablation_rows(preset: str, overrides: dict[str, Any], seeds: Sequence[int], names: Sequence[str]) -> list[Row]:
    """One row per ablation and seed, up to stage 2; `BASE` has all its stages. Rows share the first stage.

    Raises:
        ConfigError: a name that is not in `ABLATIONS`, a preset without a stage 2 and its preservation loss.
    """
    found = []
    if unknown := [name for name in names if name not in ABLATIONS]:
        raise ConfigError(f"ablations: unknown '{unknown[0]}' (choose from: {', '.join(ABLATIONS)})")
    for name in dict.fromkeys([BASE, *names]):
        for seed in seeds:
            run = api.resolve(preset, overrides, seed=seed)
            if TUNED not in [stage.name for stage in run.stages]:
                raise ConfigError(f"preset '{preset}' has no stage '{TUNED}'; take one of AlignTok's, for example pocket_aligntok")
            run = config.override(run, ABLATIONS[name][0]).model_copy(update={"diffusion": None})
            if name != BASE:
                last = [stage.name for stage in run.stages].index(TUNED)
                run = run.model_copy(update={"stages": run.stages[: last + 1]})
            found.append(Row(name, seed, run, "tokenizer"))
    return found


def plan_records(row: Row) -> list[dict[str, Any]]:
    """One record per stage of `row`: what trains, with which losses and budget."""
    found = []
    for phase in row.tokenizers:
        factors = ", ".join(f"{glob} x {factor:g}" for glob, factor in phase.train.lr_for.items())
        losses = ", ".join(f"{name} {term.weight:g}" for name, term in phase.losses.items())
        found.append({"stage": phase.stage, "run": phase.id, "trains": ", ".join(phase.trains), "losses": losses, "images": phase.budget,
                      "learning rate": f"{phase.train.lr:g}" + (f" ({factors})" if factors else "")})  # fmt: skip
    return found


def after(results: Sequence[Result], stage: str = TUNED) -> list[Result]:
    """`results` as they stood after `stage`: the numbers of that stage's run in place of the last one's."""
    of = {id(result): next((s.numbers for s in result.stages if s.stage == stage), {}) for result in results}
    return [result.replace(numbers=of[id(result)]) for result in results]


# -- what the stages buy ----------------------------------------------------------------------------------------------


@torch.no_grad()
def distances(row: Row, root: str | Path, n: int = 256) -> dict[str, dict[str, float]]:
    """How far each stage of `row` has moved, over `n` held-out images: stage -> numbers.

    "latent": mean squared difference to the first stage's latent, in units of that latent's variance per channel.
    "encoder": 1 - cosine between the encoder's maps and those of the frozen VFM it began as, mean over places.
    """
    images, _, _ = figures.examples(row.run.data, n)
    found: dict[str, dict[str, float]] = {}
    first = None
    for phase in row.tokenizers:
        tokenizer = api.load_tokenizer(phase.id, root)
        x = images.to(tokenizer.stat_mean.device)
        own = tokenizer.own_features(x)
        z = tokenizer.posterior(x, own).mode().float()
        first = z if first is None else first
        layer = list(own)[-1]
        kept = F.cosine_similarity(own[layer], tokenizer.vfm.features(x, (layer,)).maps[layer], dim=1)
        moved = (z - first).square().mean((0, 2, 3)) / first.var((0, 2, 3)).clamp_min(1e-8)
        found[phase.stage] = {"latent": float(moved.mean()), "encoder": float(1 - kept.mean())}
    return found


def stage_records(rows: Sequence[Row], results: Sequence[Result], root: str | Path) -> list[dict[str, Any]]:
    """One record per stage of the method: numbers here (mean and each seed), distances (first seed), and the paper's."""
    mine = [result for result in results if result.label == BASE]
    moved = distances(next(row for row in rows if row.label == BASE), root)
    found = []
    for stage, (rfid, probe) in PAPER_STAGES.items():
        record: dict[str, Any] = {"after stage": stage}
        values = {key: means(after(mine, stage), key).get(BASE) for key in HERE}
        record |= {HERE[key]: spread(v) if v else None for key, v in values.items()}
        record |= {"latent moved": moved[stage]["latent"], "encoder moved": moved[stage]["encoder"]}
        record["seconds"] = round(statistics.fmean(s.seconds for r in mine for s in r.stages if s.stage == stage))
        found.append(record | {"paper: rFID": rfid, "paper: linear probe (%)": probe})
    return found


def reconstructions(rows: Sequence[Row], root: str | Path, n: int = 8) -> go.Figure:
    """The same held-out images after each stage of the method (first seed), with four-fold error maps."""
    row = next(row for row in rows if row.label == BASE)
    images, _, _ = figures.examples(row.run.data, n)
    return figures.reconstructions({phase.stage: api.load_tokenizer(phase.id, root) for phase in row.tokenizers}, images)


@torch.no_grad()
def latents(rows: Sequence[Row], root: str | Path, n: int = 8) -> go.Figure:
    """Principal components of the latent of the same images, after stage 1 and after stage 2 of every ablation (first seed)."""
    images, _, _ = figures.examples(rows[0].run.data, n)
    shown = {"image": images}
    first = {row.label: row for row in reversed(rows)}
    for label in dict.fromkeys(row.label for row in rows):
        for phase in first[label].tokenizers:
            name = "stage 1" if phase.stage == FIRST else f"{label}, {phase.stage}"
            if name not in shown and (phase.stage == FIRST or phase.stage == TUNED):
                tokenizer = api.load_tokenizer(phase.id, root)
                shown[name] = primitives.pca_maps(tokenizer.encode(images.to(tokenizer.stat_mean.device)).mode().cpu(), images.shape[-1])
    return primitives.rows(shown, title="principal components of the latent")


# -- ablations --------------------------------------------------------------------------------------------------------


def ablation_records(rows: Sequence[Row], results: Sequence[Result], root: str | Path) -> list[dict[str, Any]]:
    """One record per ablation, all after stage 2: numbers here, how far the latent moved, and the paper's numbers."""
    tuned, first = after(results), {row.label: row for row in reversed(rows)}
    values = {key: means(tuned, key) for key in HERE}
    found = []
    for label in (name for name in ABLATIONS if name in first):
        record: dict[str, Any] = {"stage 2": label}
        record |= {HERE[key]: spread(values[key][label]) if label in values[key] else None for key in HERE}
        if label in values["psnr"]:
            record["latent moved"] = distances(first[label], root)[TUNED]["latent"]
        rfid, probe, gfid = ABLATIONS[label][1]
        found.append(record | {"paper: rFID": rfid, "paper: linear probe (%)": probe, "paper: gFID, guided": gfid})
    return found


def trade_off(results: Sequence[Result]) -> go.Figure:
    """Linear probe against rFD after stage 2, one point per ablation (means over seeds), and after stage 1."""
    tuned = after(results)
    rfd, probe = means(tuned, "rfd"), means(tuned, "probe_linear")
    points = [{"name": k, "rFD": statistics.fmean(rfd[k]), "linear probe": statistics.fmean(probe[k])} for k in rfd if k in probe]
    start = after(results, FIRST)
    if BASE in (at := means(start, "rfd")) and BASE in (told := means(start, "probe_linear")):
        points.append({"name": "stage 1", "rFD": statistics.fmean(at[BASE]), "linear probe": statistics.fmean(told[BASE])})
    return primitives.scatter(points, "rFD", "linear probe", title="better reconstruction is left, more of the semantics is up")


def finding(results: Sequence[Result]) -> str:
    """The paper's claims about stages and preservation, and whether these numbers bear them out; sentences follow from the numbers."""
    tuned = after(results)
    probe, rfd = means(tuned, "probe_linear"), means(tuned, "rfd")
    stages = [(stage, means(after(results, stage), "rfd").get(BASE)) for stage in PAPER_STAGES]
    lines = []
    if all(values for _, values in stages):
        here = [statistics.fmean(values) for _, values in stages]
        verdict = "each stage lowers it" if here[0] > here[1] > here[2] else "not every stage lowers it"
        lines.append(f"Stages add up? The paper: rFID 1.63 -> 0.36 -> 0.26. Here: rFD {' -> '.join(f'{v:.3g}' for v in here)}: {verdict}.")
    lines += _claim("Does preservation stop forgetting?", probe, ("w_sp 0", BASE, "w_sp 5"), "the probe rises with w_sp")
    lines += _claim("Does it cost reconstruction?", rfd, ("w_sp 0", BASE, "w_sp 5"), "rFD rises with w_sp")
    lines += _claim("Must the anchor sit after the adapter?", probe, ("before the adapter", BASE), "the probe is higher with the anchor after it")
    if "cosine" in probe and BASE in probe:
        apart = _apart(probe["cosine"], probe[BASE])
        values = f"{statistics.fmean(probe['cosine']):.3g} with cosine, {statistics.fmean(probe[BASE]):.3g} with L2"
        lines.append(f"Is L2 about cosine? The paper: linear probe 37.99 and 35.09. Here: {values} ({apart}).")
    seeds = max((len(values) for values in probe.values()), default=0)
    return "\n".join([*lines, f"{seeds} seed{'s' if seeds != 1 else ''} a row: " + ("no spread is known." if seeds < 2 else "read differences against the spread.")])


def _claim(question: str, values: Mapping[str, list[float]], order: Sequence[str], claim: str) -> list[str]:
    """A sentence on whether the means rise along `order`, the paper's order; nothing without all of them."""
    if any(name not in values for name in order):
        return []
    column = 0 if claim.startswith("rFD") else 1
    paper = " < ".join(f"{ABLATIONS[name][1][column]:g}" for name in order)
    here = [statistics.fmean(values[name]) for name in order]
    word = "yes" if all(a < b for a, b in itertools.pairwise(here)) else "no"
    apart = _apart(values[order[0]], values[order[-1]])
    shown = ", ".join(f"{value:.3g} ({name})" for name, value in zip(order, here, strict=True))
    return [f"{question} The paper: {claim}, {paper}. Here: {word}: {shown}; the ends: {apart}."]


def _apart(a: Sequence[float], b: Sequence[float]) -> str:
    if len(a) < 2 or len(b) < 2:
        return "one seed, so no spread to hold it against"
    return "seeds do not overlap" if max(a) < min(b) or max(b) < min(a) else "seeds overlap"
