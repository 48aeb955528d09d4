"""Tables, figures and sentences about diffusion-side alignment: with and without, block by block over training, and encoder reuse."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from vfmlab import api, config, runs
from vfmlab.diffusion import reuse, sampling
from vfmlab.errors import ConfigError, RunError, nearest
from vfmlab.evaluation import course
from vfmlab.evaluation.instruments import blocks
from vfmlab.evaluation.number import CURVE, TARGET, quantities
from vfmlab.plots import figures, primitives
from vfmlab.presets.variants import SETTINGS
from vfmlab.seeding import SampleRandom
from vfmlab.studies.results import Result, means
from vfmlab.studies.rows import Row
from vfmlab.training.diffusion import TARGET_KEY

MARGIN = {"l": 56, "r": 12, "t": 76, "b": 44}
NONE, SPLIT = "none", "split"  # without alignment; the DiT of encoder and head


# -- rows -------------------------------------------------------------------------------------------------------------


def rows(preset: str, baseline: str, overrides: dict[str, Any], seeds: Sequence[int], names: Sequence[str]) -> list[Row]:
    """One row per tokenizer, setting and seed, labelled "<preset> <setting>"; all settings of a tokenizer share its runs.

    Args:
        preset: with a diffusion section. baseline: a second one, or "". names: of `vfmlab.presets.variants.SETTINGS`; the runs
            without alignment ("none") are added.

    Raises:
        ConfigError: unknown setting, a preset without diffusion.
    """
    found = []
    if unknown := [how for how in names if how not in (NONE, *SETTINGS)]:
        raise ConfigError(f"unknown alignment '{unknown[0]}'{nearest(unknown[0], SETTINGS)}")
    for seed in seeds:
        for name in [preset, *([baseline] if baseline else [])]:
            run = api.resolve(name, overrides, seed=seed)
            if run.diffusion is None:
                raise ConfigError(f"preset '{name}' trains no diffusion model; take one that does, for example pocket_vfm_vae")
            for how in dict.fromkeys([NONE, *names]):
                changed = run if how == NONE else api.resolve(f"{name}+{how}", overrides, seed=seed)
                found.append(Row(label(name, how), seed, changed))
    return found


def label(preset: str, how: str) -> str:
    return f"{preset} {how}"


def split_row(preset: str, overrides: dict[str, Any], seed: int) -> Row:
    """The preset with a split DiT, for the reuse of its encoder."""
    return Row(label(preset, SPLIT), seed, api.resolve(f"{preset}+ddt", overrides, seed=seed))


def plan_records(study: Sequence[Row]) -> list[dict[str, Any]]:
    """One table row per row: what the network is aligned with, and how."""
    found = []
    for row in study:
        d = row.run.diffusion
        a, c = d.alignment, d.class_token
        found.append({
            "row": row.label, "seed": row.seed, "run": row.run.id, "tokenizer": row.run.last.parent, "network": d.network.kind,
            "REPA": "" if a is None else f"{a.vfm.name} layer {a.layer} at block {a.block}, {a.weight:g}, {a.projector}",
            "REG": "" if c is None else f"{c.vfm.name}, {c.weight:g}", "images": d.train.samples,
        })  # fmt: skip
    return found


def _first(study: Sequence[Row]) -> list[Row]:
    """The rows of the first seed."""
    return [row for row in study if row.seed == study[0].seed]


def _folder(row: Row, root: str | Path) -> runs.RunDir:
    return runs.open_run(row.run.id, root)


# -- over training ----------------------------------------------------------------------------------------------------


def convergence(study: Sequence[Row], root: str | Path) -> go.Figure:
    """Quality of samples over training, one line per row (means over seeds); dashed: without alignment."""
    parts, folders = [], {f"{row.label} {row.seed}": (row.label, _folder(row, root)) for row in study}
    logged = {key: course.logged(folder) for key, (_, folder) in folders.items()}
    for name, q in quantities(CURVE).items():
        points: dict[str, dict[int, list[float]]] = {}
        curves = course.together(logged, name)
        for key, c in curves.items():
            for samples, value in zip(c.samples, c.values, strict=True):
                points.setdefault(folders[key][0], {}).setdefault(samples, []).append(value)
        lines = {label: (sorted(at), [statistics.fmean(at[s]) for s in sorted(at)]) for label, at in points.items()}
        missing = sum(c.left_out for c in curves.values())
        if lines:
            parts.append(_curves(lines, name, q.label + (f" ({missing} points of other protocols left out)" if missing else "")))
    if not parts:
        raise ConfigError("convergence: nothing was evaluated during training; set diffusion.train.evaluate_at")
    return primitives.panels(parts, columns=len(parts))


def losses(study: Sequence[Row], root: str | Path) -> go.Figure:
    """The latents' velocity loss of every row, and cosine with the target and the token's loss where they are trained (first seed)."""
    parts = []
    for keys, title in ((("velocity", "loss"), "velocity loss"), (("alignment",), "cosine with the target"), (("token_velocity",), "class token's velocity loss")):
        lines = {}
        for row in _first(study):
            records = _folder(row, root).metrics("step")
            key = next((k for k in keys if records and k in records[0]), None)
            if key is not None:
                lines[row.label] = tuple(zip(*((r["samples"], r[key]) for r in records if key in r), strict=True))
        if lines:
            parts.append(_curves(lines, title, title))
    return primitives.panels(parts, columns=len(parts))


def _curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], y: str, title: str) -> go.Figure:
    """A colour per setting, the same in every panel; dashed without alignment."""
    figure = primitives.curves(lines, y=y, title=title, dashed=[name for name in lines if name.endswith(f" {NONE}")])
    for i, trace in enumerate(figure.data):
        trace.line.color = primitives.PALETTE[i % len(primitives.PALETTE)]
    return figure


def courses(study: Sequence[Row], root: str | Path, target: bool = False) -> dict[str, dict[str, list]]:
    """Agreement of every block over training (first seed): row -> {"samples", "block", "value": a row per block}.

    With the protocol's feature space, which nothing here was trained on; or, for rows with REPA, with the `target` of the loss.
    """
    found = {}
    for row in _first(study):
        try:
            found[row.label] = blocks.over_training(_folder(row, root), TARGET_KEY if target else blocks.BLOCK_KEY)
        except RunError:
            continue
    return found


def dynamics_maps(study: Sequence[Row], root: str | Path, target: bool = False) -> go.Figure:
    """Block x images seen, one map per row on one colour scale: CKNNA at t = 1/2 (see :func:`courses`)."""
    found = courses(study, root, target)
    reference = "the target of REPA" if target else "the judge's features, which nobody was aligned with"
    if not found:
        raise ConfigError("dynamics: no evaluation during training has logged the blocks; set diffusion.train.evaluate_at")
    columns = min(4, len(found))
    count = -(-len(found) // columns)
    sheet = make_subplots(rows=count, cols=columns, subplot_titles=list(found), horizontal_spacing=0.05, vertical_spacing=0.22)
    for i, one in enumerate(found.values()):
        trace = go.Heatmap(z=one["value"], x=[f"{s:,}" for s in one["samples"]], y=[str(k) for k in one["block"]], coloraxis="coloraxis")
        sheet.add_trace(trace, i // columns + 1, i % columns + 1)
    sheet.update_xaxes(title="images seen", row=count)
    sheet.update_yaxes(title="block", col=1)
    title = f"CKNNA of every block with {reference}"
    return sheet.update_layout(template=primitives.TEMPLATE, title=title, coloraxis={"colorscale": "Viridis"}, height=110 + 210 * count, margin=MARGIN)


# -- both sides -------------------------------------------------------------------------------------------------------


def two_sided(study: Sequence[Row], results: Sequence[Result]) -> list[dict[str, Any]]:
    """One table row per setting: gFD and class accuracy on each tokenizer, and what alignment changes against "none" there."""
    gfd, hits = means(results, "gfd"), means(results, "class_accuracy")
    tokenizers = list(dict.fromkeys(row.label.rpartition(" ")[0] for row in study))
    found = []
    for how in dict.fromkeys(row.label.rpartition(" ")[2] for row in study):
        record: dict[str, Any] = {"diffusion side": how}
        for name in tokenizers:
            mine, base = gfd.get(label(name, how)), gfd.get(label(name, NONE))
            if mine:
                record[f"{name}: gFD"] = statistics.fmean(mine)
                record[f"{name}: change"] = f"{100 * (statistics.fmean(mine) / statistics.fmean(base) - 1):+.1f} %" if base else None
                record[f"{name}: class accuracy"] = statistics.fmean(hits[label(name, how)]) if label(name, how) in hits else None
        found.append(record)
    return found


def speed_records(study: Sequence[Row], root: str | Path) -> list[dict[str, Any]]:
    """Median images per second of training, first seed, with its middle half: runs share machines with other work, so no ratio is made of it."""
    found = []
    for row in _first(study):
        seen = [r["samples_per_second"] for r in _folder(row, root).metrics("step") if "samples_per_second" in r]
        low, middle, high = statistics.quantiles(seen, n=4) if len(seen) > 1 else [*seen, *seen, *seen] or [None] * 3
        found.append({"row": row.label, "images a second, as logged": middle, "middle half": f"{low:.0f} to {high:.0f}" if low else None})
    return found


def token_guidance(row: Row, root: str | Path, scales: Sequence[float | None] = (None, 1.0), scale: float = 1.5, n: int = 500) -> list[dict[str, Any]]:
    """gFD and class accuracy of at most n samples when the class token has a guidance scale of its own. None: the latents'."""
    n, found = min(n, row.run.protocol.n), []
    for latents, token in [(1.0, None), *((scale, value) for value in scales)]:
        protocol = {"n": n, "guidance.scale": latents} | ({} if token is None else {"guidance.token": token})
        report = api.evaluate(row.run.id, root, protocol)
        numbers = {key: report.value(key) for key in quantities(TARGET)}
        found.append({"latents": latents, "token": latents if token is None else token, **numbers, "N": n, "protocol": report.hash})
    return found


def samples(study: Sequence[Row], root: str | Path, seed: int = 0) -> go.Figure:
    """One image per class and row, from the same noise (first seed of the study)."""
    return primitives.rows({row.label: figures.class_samples(row.run.id, root, seed=seed) for row in _first(study)}, title="same noise, same classes")


def finding(study: Sequence[Row], results: Sequence[Result]) -> str:
    """What these numbers say about the claims; sentences follow from the numbers."""
    gfd, lines = means(results, "gfd"), []
    gains: dict[str, dict[str, float]] = {}
    for name in gfd:
        tokenizer, _, how = name.rpartition(" ")
        base = gfd.get(label(tokenizer, NONE))
        if how != NONE and base:
            gains.setdefault(how, {})[tokenizer] = 1 - statistics.fmean(gfd[name]) / statistics.fmean(base)
    for how, found in gains.items():
        told = ", ".join(f"{-100 * gain:+.1f} % on {tokenizer}" for tokenizer, gain in found.items())
        verdict = "it helps" if all(g > 0 for g in found.values()) else "it does not help" if all(g <= 0 for g in found.values()) else "it helps one and not the other"
        lines.append(f"{how}: gFD changes by {told}: {verdict}.")
        if len(found) == 2:
            (first, a), (second, b) = found.items()
            lines.append(f"  Latents of {first if a > b else second} gain more.")
    seeds = len({row.seed for row in study})
    lines.append(f"{seeds} seed{'s' if seeds != 1 else ''} a row: " + ("no spread is known." if seeds < 2 else f"spread of gFD over seeds up to {_spread(gfd):.2g}."))
    return "\n".join(lines)


def _spread(values: Mapping[str, list[float]]) -> float:
    return max((max(v) - min(v) for v in values.values()), default=0.0)


# -- encoder reuse ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def block_similarity(row: Row, root: str | Path, n: int = 16, seed: int = 0) -> tuple[list[float], dict[int, torch.Tensor]]:
    """:func:`vfmlab.diffusion.reuse.similarity_over_time` of a trained run on its own sampling path, unguided."""
    loaded = api.load_diffusion(row.run.id, root)
    labels = torch.arange(n, device=loaded.device) % loaded.num_classes
    sampler = row.run.protocol.sampler.model_copy(update={"solver": "euler", "reuse": None})

    def draw(watched: reuse.Watched) -> None:
        shape = loaded.tokenizer.latent_shape
        sampling.sample(watched, labels, SampleRandom(seed, range(n), loaded.device), sampler, latent_shape=shape, null=loaded.num_classes)

    return reuse.similarity_over_time(loaded.network, draw)


def similarity_figure(times: Sequence[float], found: Mapping[int, torch.Tensor], encoder: int | None = None) -> go.Figure:
    """Left: cosine of each block's tokens with those one step before, over t. Right: any two times, for the encoder's last block."""
    last = encoder if encoder is not None else max(found)
    sheet = make_subplots(rows=1, cols=2, subplot_titles=["one step apart", f"block {last}, any two times"], horizontal_spacing=0.12)
    for i, (block, matrix) in enumerate(found.items()):
        colour = primitives.PALETTE[i % len(primitives.PALETTE)]
        name = f"block {block}" + (" (head)" if encoder is not None and block > encoder else "")
        sheet.add_trace(go.Scatter(x=list(times[1:]), y=matrix.diagonal(1).tolist(), name=name, mode="lines+markers", line={"color": colour}), 1, 1)
    shown = [f"{t:.2f}" for t in times]
    heat = go.Heatmap(z=found[last].numpy(), x=shown, y=shown, colorscale="Viridis", zmax=1)
    sheet.add_trace(heat, 1, 2)
    sheet.update_xaxes(title="t (1 noise, 0 data)", autorange="reversed", row=1, col=1)
    sheet.update_yaxes(title="cosine", row=1, col=1)
    sheet.update_xaxes(title="t", row=1, col=2)
    sheet.update_layout(legend={"orientation": "h", "y": -0.25})
    return sheet.update_layout(template=primitives.TEMPLATE, title="how alike the blocks are over the way from noise to data", height=420, margin=MARGIN)


@torch.no_grad()
def reuse_records(row: Row, root: str | Path, every: Sequence[int] = (1, 2, 3, 4), n: int = 500, batch: int = 64) -> list[dict[str, Any]]:
    """Quality and speed when the encoder runs at every first, second, ... step, and at fewer steps without reuse for comparison.

    gFD by the run's protocol with at most n samples; images a second: of the network and sampler alone, median of three
    batches on this machine.
    """
    loaded, n = api.load_diffusion(row.run.id, root), min(n, row.run.protocol.n)
    steps, found = row.run.protocol.sampler.steps, []
    plans = [(k, steps) for k in every] + [(1, max(1, round(steps / k))) for k in every if k > 1]
    for k, count in dict.fromkeys(plans):
        changes = {"n": n, "sampler.steps": count} | ({"sampler.reuse": k} if k > 1 else {})
        report = api.evaluate(row.run.id, root, changes)
        sampler = row.run.protocol.sampler.model_copy(update={"reuse": k if k > 1 else None, "steps": count})
        found.append({
            "encoder at every": k, "steps": count, "images a second": _speed(loaded, sampler, batch),
            "gFD": report.value("gfd"), "class accuracy": report.value("class_accuracy"), "N": n, "protocol": report.hash,
        })  # fmt: skip
    return found


def _speed(loaded: api.LoadedDiffusion, sampler: config.Sampler, batch: int) -> float:
    labels = torch.arange(batch, device=loaded.device) % loaded.num_classes
    seconds = []
    for _ in range(3):
        random, begin = SampleRandom(0, range(batch), loaded.device), time.perf_counter()
        z = sampling.sample(loaded.network, labels, random, sampler, latent_shape=loaded.tokenizer.latent_shape, null=loaded.num_classes)
        z.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return batch / statistics.median(seconds)


def reuse_figure(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """gFD against speed: the encoder reused (solid), and plainly fewer steps (dashed)."""
    steps = max(r["steps"] for r in records)
    groups = {"encoder reused": [r for r in records if r["steps"] == steps], "fewer steps": [r for r in records if r["encoder at every"] == 1]}
    figure = go.Figure()
    for i, (name, found) in enumerate(groups.items()):
        found = sorted(found, key=lambda r: r["images a second"])
        text = [f"every {r['encoder at every']}" if i == 0 else f"{r['steps']} steps" for r in found]
        line = {"color": primitives.PALETTE[i], "dash": "dash" if i else "solid"}
        figure.add_trace(go.Scatter(
            x=[r["images a second"] for r in found], y=[r["gFD"] for r in found], text=text, name=name, mode="lines+markers+text",
            textposition="top center", line=line,
        ))  # fmt: skip
    figure.update_xaxes(title="images a second")
    figure.update_yaxes(title="gFD")
    return figure.update_layout(template=primitives.TEMPLATE, title="quality against speed", height=400, margin={"l": 56, "r": 12, "t": 44, "b": 44})
