"""Figures of runs and models, as the notebooks, the report and the app show them: compute with the library, draw with viz."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from vfmlab import api, config, data, runs
from vfmlab.diffusion import path as flow
from vfmlab.evaluation import course
from vfmlab.evaluation.instruments.time_loss import time_losses
from vfmlab.evaluation.number import CURVE, TARGET, Report, quantities, quantity
from vfmlab.plots import primitives
from vfmlab.seeding import SampleRandom, generator
from vfmlab.studies import explore
from vfmlab.studies.results import head
from vfmlab.tokenizers.base import Tokenizer

# -- data and VFM -----------------------------------------------------------------------------------------------------


def examples(cfg: config.Data, n: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """`n` held-out images [n 3 S S] in [-1, 1], class by class as far as they go, with labels and class names."""
    source = data.open_source(cfg, "val")
    order = torch.randperm(len(source), generator=generator("examples", seed)).tolist()
    by_class: dict[int, list[int]] = {}
    for index in order:
        by_class.setdefault(int(source.labels[index]), []).append(index)
    picked: list[int] = []
    while len(picked) < min(n, len(source)):
        for label in sorted(by_class):
            if by_class[label] and len(picked) < n:
                picked.append(by_class[label].pop(0))
    batch = source.batch(torch.tensor(picked))
    return data.to_float(batch.images), batch.labels, [source.class_names[i] for i in batch.labels.tolist()]


def noising(images: Tensor, times: Sequence[float], seed: int = 0) -> go.Figure:
    """Images on the path from data (t = 0) to noise (t = 1), one row per t."""
    noise = SampleRandom(seed, range(len(images))).randn(*images.shape[1:])
    shown = {}
    for t in times:
        x = flow.interpolate(images, noise, torch.full((len(images),), float(t))).x
        shown[f"t = {t:g}"] = x / (((1 - t) ** 2 + t**2) ** 0.5 * 1.6)  # one contrast for all rows
    return primitives.rows(shown, title="from data to noise")


@torch.no_grad()
def feature_maps(vfm: Any, images: Tensor) -> go.Figure:
    """Images and, for each of the VFM's layers, the first three principal components of its features."""
    shown = {"image": images, **explore.colours(explore.layer_maps(vfm, images), images.shape[-1])}
    return primitives.rows(shown, title=f"{vfm.facts.name}: principal components of the features")


@torch.no_grad()
def _features(vfm: Any, source: data.ImageSource, n: int) -> tuple[dict[int, list[Tensor]], Tensor, Tensor]:
    maps: dict[int, list[Tensor]] = {layer: [] for layer in vfm.layers}
    images, labels = [], []
    for part in torch.arange(min(n, len(source))).split(100):
        batch = source.batch(part)
        x = data.to_float(batch.images)
        for layer, value in vfm.features(x, vfm.layers).maps.items():
            maps[layer].append(value.float())
        images.append(x)
        labels.append(batch.labels)
    return maps, torch.cat(images), torch.cat(labels)


def probe_layers(vfms: Mapping[str, Any], cfg: config.Data, n: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Linear-probe and kNN accuracy of each layer (mean over positions) of each VFM, on held-out images."""
    from vfmlab.evaluation import probes

    source, rows = data.open_source(cfg, "val"), []
    for name, vfm in vfms.items():
        maps, _, labels = _features(vfm, source, n)
        for layer in vfm.layers:
            pooled = torch.cat([m.mean((2, 3)) for m in maps[layer]])
            accuracy = probes.probe(pooled, labels, seed=seed)
            rows.append({"VFM": name, "layer": layer, "linear probe": accuracy["linear"], "kNN": accuracy["knn"], "images": len(labels)})
    return rows


def probe_figure(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Bars of :func:`probe_layers`: one group per layer, one bar per VFM and probe."""
    figure = go.Figure()
    for i, vfm in enumerate(dict.fromkeys(row["VFM"] for row in rows)):
        for probe, pattern in (("linear probe", ""), ("kNN", "/")):
            mine = [row for row in rows if row["VFM"] == vfm]
            figure.add_trace(go.Bar(
                x=[f"layer {row['layer']}" for row in mine], y=[row[probe] for row in mine], name=f"{vfm}, {probe}",
                marker={"color": primitives.PALETTE[i], "pattern": {"shape": pattern}},
            ))
    figure.update_yaxes(title="accuracy", range=[0, 1])
    return figure.update_layout(template=primitives.TEMPLATE, height=360, barmode="group", margin={"l": 56, "r": 12, "t": 16, "b": 44})


def linear_decodability(vfm: Any, cfg: config.Data, n: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """PSNR of pixels predicted linearly (ridge) from the features of one position, by layer and for all layers together.

    Each position of a feature map predicts its own patch of the image; fitted on the first half of `n` held-out images,
    measured on the second.
    """
    source = data.open_source(cfg, "val")
    maps, images, _ = _features(vfm, source, n)
    half = len(images) // 2
    whole = {layer: torch.cat(parts) for layer, parts in maps.items()}
    smallest = min(m.shape[-1] for m in whole.values())
    joint = torch.cat([torch.nn.functional.pixel_unshuffle(m, m.shape[-1] // smallest) for m in whole.values()], 1)
    rows = []
    for name, value in [*((f"layer {k}", m) for k, m in whole.items()), ("all layers", joint)]:
        patch = images.shape[-1] // value.shape[-1]
        x = value.permute(0, 2, 3, 1).flatten(1, 2).double()
        y = torch.nn.functional.pixel_unshuffle(images, patch).permute(0, 2, 3, 1).flatten(1, 2).double()
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        fit_x, fit_y = x[:half].flatten(0, 1), y[:half].flatten(0, 1)
        gram = fit_x.T @ fit_x
        gram.diagonal().add_(1e-4 * gram.diagonal().mean())
        error = (x[half:] @ torch.linalg.solve(gram, fit_x.T @ fit_y) - y[half:]).square().mean() / 4
        rows.append({"features": name, "channels": value.shape[1], "grid": f"{value.shape[-2]}x{value.shape[-1]}", "PSNR (dB)": float(-10 * error.log10())})
    return rows


# -- runs -------------------------------------------------------------------------------------------------------------


def describe_run(run: config.Recipe | config.Phase) -> dict[str, Any]:
    """The settings a reader wants to see before a run starts."""
    run = run if isinstance(run, config.Phase) else run.last
    facts: dict[str, Any] = {"run": run.id, "images": f"{run.data.source}, {run.data.size} px"}
    if run.tokenizer is not None:
        t = run.tokenizer
        side = run.data.size // t.factor
        facts |= {"tokenizer": t.method, "latent": f"{t.channels} x {side} x {side} (f{t.factor}d{t.channels})"}
        facts["VFM"] = run.vfm.name if run.vfm else "none"
        facts["losses"] = ", ".join(f"{k} {v.weight:g}" for k, v in run.losses.items())
    if run.diffusion is not None:
        facts["network"] = run.diffusion.network.kind
    if run.imported is not None:
        return facts | {"weights": f"released: {run.imported.name}", "seed": run.seed}
    return facts | {"images seen": run.budget, "batch": run.train.batch, "learning rate": run.train.lr, "seed": run.seed}


def training_curves(folders: Sequence[runs.RunDir]) -> go.Figure:
    """Every metric of the training records, one panel each, one line per run."""
    records = {folder.id: folder.metrics("step") for folder in folders}
    skipped = {"step", "samples", "seconds", "samples_per_second", "kind", "lr", "bad_steps", "ema_samples", "parameter_norm"}
    names = [k for k in dict.fromkeys(k for rows in records.values() for r in rows for k in r) if k not in skipped]
    parts = []
    for name in names:
        lines = {}
        for run_id, rows in records.items():
            points = [(r["samples"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
            if points:
                lines[run_id] = tuple(zip(*points, strict=True))
        if lines:
            positive = all(v > 0 for _, ys in lines.values() for v in ys)
            parts.append(primitives.curves(lines, y=name, title=name, log_y=positive and name.startswith(("loss", "l1", "l2"))))
    return primitives.panels(parts, columns=3)


def convergence(folders: Sequence[runs.RunDir], dashed: Sequence[str] = ()) -> go.Figure:
    """Quality of samples over training, from the evaluations that were logged on the way; one line per run.

    All under the protocol that most runs ended with; points of others, or without one, are left out, and the panel says so.
    """
    logged, parts = {folder.id: course.logged(folder) for folder in folders}, []
    for name, q in quantities(CURVE).items():
        curves = course.together(logged, name)
        lines = {run: (c.samples, c.values) for run, c in curves.items() if c.samples}
        missing = sum(c.left_out for c in curves.values())
        if lines:
            title = q.label + (f" ({missing} points of other protocols left out)" if missing else "")
            parts.append(primitives.curves(lines, y=name, title=title, dashed=dashed))
    return primitives.panels(parts, columns=3)


# -- tokenizers -------------------------------------------------------------------------------------------------------


def reconstructions(tokenizers: Mapping[str, Tokenizer], images: Tensor, errors: bool = True) -> go.Figure:
    """Originals, and for each tokenizer its reconstructions (with mean PSNR) and four-fold error maps."""
    shown = {"original": images}
    for name, tokenizer in tokenizers.items():
        _, restored, psnr = api.reconstruct(tokenizer, images)
        shown[f"{name}  {psnr.mean():.1f} dB"] = restored
        if errors:
            shown[f"{name}  error x4"] = primitives.error_map(images, restored)
    return primitives.rows(shown)


@torch.no_grad()
def latent_channels(tokenizer: Tokenizer, images: Tensor, channels: int = 8) -> go.Figure:
    """Images and the first channels of their normalised latents (black -2.5 .. white 2.5 standard deviations)."""
    z, size = explore.encode(tokenizer, images), images.shape[-1]
    shown = {"image": images, "PCA of z": primitives.pca_maps(z, size)}
    for c in range(min(channels, z.shape[1])):
        shown[f"channel {c}"] = explore.grey(z[:, c] / explore.SHOWN_STD, size)
    return primitives.rows(shown, title="normalised latent")


def latent_statistics(tokenizer: Tokenizer) -> go.Figure:
    """Per-channel mean and standard deviation of the raw latent, as kept in the checkpoint."""
    s = tokenizer.statistics
    names = [str(c) for c in range(len(s.mean))]
    figure = go.Figure(go.Bar(
        x=names, y=s.mean.tolist(), error_y={"type": "data", "array": s.std.tolist()}, marker_color=primitives.colour(tokenizer.config.method)
    ))
    figure.update_xaxes(title="latent channel")
    figure.update_yaxes(title="raw mean ± std")
    title = f"raw latent over {s.count} training images (data {s.fingerprint[:12]})"
    return figure.update_layout(template=primitives.TEMPLATE, title=title, height=320, margin={"l": 56, "r": 12, "t": 44, "b": 44})


@torch.no_grad()
def error_spectrum(tokenizers: Mapping[str, Tokenizer], cfg: config.Data, n: int = 256, seed: int = 0) -> go.Figure:
    """Power of the reconstruction error by spatial frequency, as a share of the image's own power there."""
    images, _, _ = examples(cfg, n, seed)
    size = images.shape[-1]
    f = torch.fft.fftfreq(size)
    radius = (f[:, None].square() + f[None].square()).sqrt().mul(size).round().long().clamp_max(size // 2)

    def power(x: Tensor) -> Tensor:
        p = torch.fft.fft2(x.mean(1)).abs().square().mean(0)
        return torch.zeros(size // 2 + 1).scatter_add_(0, radius.flatten(), p.flatten())

    base, lines = power(images), {}
    for name, tokenizer in tokenizers.items():
        _, restored, _ = api.reconstruct(tokenizer, images)
        lines[name] = (list(range(1, size // 2 + 1)), (power(restored - images) / base)[1:].tolist())
    return primitives.curves(lines, x="spatial frequency (cycles per image)", y="error power / image power", log_y=True)


def robustness(reports: Mapping[str, Report]) -> go.Figure:
    """PSNR of decoding against the noise added to the normalised latent, from the reports."""
    curves = {name: report.curves["noise_psnr"] for name, report in reports.items() if "noise_psnr" in report.curves}
    lines = {name: (curve.facts["sigma"], curve.value) for name, curve in curves.items() if not curve.absent}
    return primitives.curves(lines, x="noise added to z (standard deviations)", y="PSNR (dB)")


# -- reports ----------------------------------------------------------------------------------------------------------


def report_rows(reports: Mapping[str, Report]) -> list[dict[str, Any]]:
    """One table row per report: every number, its guidance where it sampled, N and the protocol hash."""
    rows = []
    for name, report in reports.items():
        size = report.protocol.get("images", {}).get("size")
        row: dict[str, Any] = {"run": name}
        row |= {head(quantity(key), size): one.value for key, one in report.items()}
        if sampling := report.protocol.get("sampling"):
            row["guidance"] = sampling["guidance"]["scale"]
        rows.append(row | {"N": report.protocol.get("n"), "protocol": report.hash})
    return rows


def trade_off(reports: Mapping[str, Report]) -> go.Figure:
    """Reconstruction (rFD) against generation (gFD), one point per run."""
    points = [{"name": name, "rFD": r.value("rfd"), "gFD": r.value("gfd")} for name, r in reports.items()]
    return primitives.scatter(points, "rFD", "gFD", title="better reconstruction is left, better generation is down")


# -- diffusion --------------------------------------------------------------------------------------------------------


def class_samples(model: Any, root: str | Path = "runs", per_class: int = 1, seed: int = 0, limit: int = 10, **how: Any) -> Tensor:
    """Samples [classes * per_class, 3, S, S]; the same seed gives the same noise for every model and setting."""
    loaded = model if isinstance(model, api.LoadedDiffusion) else api.load_diffusion(model, root, ema=how.pop("ema", True))
    how.pop("ema", None)
    labels = [label for label in range(min(limit, loaded.num_classes)) for _ in range(per_class)]
    *_, last = api.sample(loaded, labels, seed=seed, previews=0, **how)
    return last.images


def sample_rows(model: Any, root: str | Path = "runs", variants: Mapping[str, Mapping[str, Any]] = {}, per_class: int = 1, seed: int = 0) -> go.Figure:
    """One row per variant of `api.sample`'s arguments (or `ema`), same noise and classes in every row."""
    return primitives.rows({name: class_samples(model, root, per_class, seed, **how) for name, how in variants.items()})


def formation(model: api.LoadedDiffusion, labels: Sequence[int], steps: int = 12, seed: int = 0, **how: Any) -> go.Figure:
    """The decoded estimate of the clean image along sampling: one row per label, noise on the left. how: as in `api.sample`."""
    frames = [p.images for p in api.sample(model, list(labels), seed=seed, steps=steps, previews=min(steps, 16), **how)]
    stack = torch.stack(frames, 1)  # label, step, 3 H W
    return primitives.rows({model.class_names[label]: stack[i] for i, label in enumerate(labels)}, title=f"estimate of the clean image over {steps} steps")


@torch.no_grad()
def loss_by_time(ref: str | Path, root: str | Path = "runs", n: int = 256, bins: int = 10, seed: int = 0) -> go.Figure:
    """Velocity error of the EMA network on held-out images by t, in units of the target's mean square."""
    loaded = api.load_diffusion(ref, root)
    source = data.open_source(loaded.run.data, "val")
    batch = source.batch(torch.arange(min(n, len(source))))
    z = loaded.tokenizer.encode(data.to_float(batch.images).to(loaded.device)).mode()
    times, errors = time_losses(loaded.network, z, batch.labels, range(len(z)), seed, bins)
    return primitives.curves({loaded.folder.id: (times, errors)}, x="t (0 data, 1 noise)", y="velocity error / target power")


def guidance_rows(ref: str | Path, root: str | Path, settings: Mapping[str, Mapping[str, Any]], n: int = 500) -> list[dict[str, Any]]:
    """Class accuracy and Frechet distances of at most n samples for several guidance settings, each with its own protocol hash."""
    rows = []
    n = min(n, runs.open_run(ref, root).config().protocol.n)
    for name, fields in settings.items():
        report = api.evaluate(ref, root, protocol={"n": n, **{f"guidance.{k}": v for k, v in fields.items()}})
        metrics = {k: report.value(k) for k in quantities(TARGET) if k in report}
        rows.append({"guidance": name, **metrics, "N": report.protocol["n"], "protocol": report.hash})
    return rows
