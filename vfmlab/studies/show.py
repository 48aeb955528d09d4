"""From models to figures in one call, for notebooks, widgets and pages; drawn by `vfmlab.plots`.

Images are N 3 S S in [-1, 1]; every figure has one row of images per name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from vfmlab import api, config, runs
from vfmlab.diffusion import path as flow
from vfmlab.errors import ConfigError
from vfmlab.evaluation.number import of_run
from vfmlab.evaluation.subject import Maps
from vfmlab.plots import primitives
from vfmlab.seeding import SampleRandom
from vfmlab.studies import explore
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.vfm.base import VisionModel

FEATURES = ("principal components", "similarity")
SAMPLING = ("samples", "forming")

# -- runs ----------------------------------------------------------------------


def describe_run(run: config.Recipe | config.Phase) -> dict[str, Any]:
    """The settings a reader wants to see before a run starts."""
    run = run if isinstance(run, config.Phase) else run.last
    facts: dict[str, Any] = {"run": run.id, "images": f"{run.data.source}, {run.data.size} px"}
    if (t := run.tokenizer) is not None:
        facts |= {"tokenizer": t.method, "latent": t.latent_text(run.data.size),
                  "VFM": run.vfm.name if run.vfm else "none",
                  "losses": ", ".join(f"{k} {v.weight:g}" for k, v in run.losses.items())}
    if run.generator is not None:
        facts["network"] = run.generator.network.kind
    if run.recipe.parts:
        facts["your own parts"] = ", ".join(f"{k} ({part.source})" for k, part in run.recipe.parts.items())
    if run.imported is not None:
        return facts | {"weights": f"released: {run.imported.name}", "seed": run.seed}
    return facts | {"images seen": run.budget, "batch": run.train.batch, "learning rate": run.train.lr,
                    "seed": run.seed}


def run_card(ref: str | Path, root: str | Path = "runs") -> primitives.Table:
    """What a run is, how far it got, and its numbers with the hash of their protocol."""
    folder = runs.open_run(ref, root)
    status, report = folder.status(), of_run(folder)
    progress = f"{status.samples:,} of {status.total:,} images, {status.seconds:,.0f} s"
    facts = [*describe_run(folder.config()).items(), ("state", f"{status.state}, {progress}")]
    if report is not None:
        facts += [(v.label, primitives.number(v.value)) for v in report.measured.values()]
        facts.append(("protocol", f"{report.hash}, N = {report.protocol.get('n')}"))
    return primitives.table([{"what": k, "value": v} for k, v in facts])


# -- VFM and tokenizer ----------------------------------------------------------------------


def noising(images: Tensor, times: Sequence[float], seed: int = 0) -> go.Figure:
    """Images on the path from data (t = 0) to noise (t = 1), one row per t."""
    noise = SampleRandom(seed, range(len(images))).randn(*images.shape[1:])
    rows = {}
    for t in times:
        x = flow.interpolate(images, noise, torch.full((len(images),), float(t))).x
        rows[f"t = {t:g}"] = x / (((1 - t) ** 2 + t**2) ** 0.5 * 1.6)  # one contrast for all rows
    return primitives.rows(rows, title="from data to noise")


def features(model: Tokenizer | VisionModel, images: Tensor, view: str = FEATURES[0],
             query: tuple[float, float] = (0.5, 0.5), layers: Sequence[int] | None = None) -> go.Figure:
    """One row per depth: principal components, or similarity to the position `query` (y, x in 0..1)."""
    size, maps = images.shape[-1], explore.layer_maps(model, images, layers)
    if view == "similarity":
        rows = {"query": explore.marked(images, query)}
        rows |= {k: explore.grey(explore.likeness(m, query), size) for k, m in maps.items()}
    else:
        rows = {"image": images} | explore.colours(maps, size)
    return primitives.rows(rows)


def reconstructions(tokenizers: Mapping[str, Tokenizer], images: Tensor,
                    disturbance: explore.Disturbance | None = None, banks: Mapping[str, Maps] | None = None,
                    errors: bool = True) -> go.Figure:
    """Images, their reconstructions by each tokenizer (with mean PSNR), and the error four times enlarged.

    disturbance: of the latents. banks: name -> latents of other images, which rounding needs.
    """
    rows = {"original": images}
    for i, (name, tokenizer) in enumerate(tokenizers.items()):
        rebuilt = explore.reconstruct(tokenizer, images, disturbance, (banks or {}).get(name), space=None)
        psnr = rebuilt.metrics["psnr"]
        rows[f"{name}  {sum(psnr) / len(psnr):.1f} dB"] = rebuilt.images
        if errors:
            # a name of its own for each row, and room for the images
            rows["error x4" + " " * i] = rebuilt.error()
    return primitives.rows(rows)


def latent_channels(tokenizer: Tokenizer, images: Tensor, channels: int = 8) -> go.Figure:
    """Images and the first channels of their normalised latents (black -2.5, white 2.5 deviations)."""
    z, size = explore.encode(tokenizer, images), images.shape[-1]
    rows = {"image": images, "PCA of z": primitives.pca_maps(z, size)}
    for c in range(min(channels, z.shape[1])):
        rows[f"channel {c}"] = explore.grey(z[:, c] / explore.SHOWN_STD, size)
    return primitives.rows(rows, title="normalised latent")


def latent_maps(tokenizers: Mapping[str, Tokenizer], images: Tensor) -> go.Figure:
    """The first three principal components of each latent as colours."""
    latents = {name: explore.encode(tokenizer, images) for name, tokenizer in tokenizers.items()}
    rows = {"image": images} | explore.colours(latents, images.shape[-1])
    return primitives.rows(rows, title="principal components of the latent")


def noisy(tokenizers: Mapping[str, Tokenizer], images: Tensor, sigma: float = 0.5,
          seed: int = 0) -> go.Figure:
    """Images decoded from z + sigma noise, one row per run."""
    disturbance, rows = explore.Disturbance(sigma=sigma, seed=seed), {"image": images}
    for name, tokenizer in tokenizers.items():
        rows[name] = explore.decode(tokenizer, disturbance(explore.encode(tokenizer, images)))
    return primitives.rows(rows, title=f"decoded with noise of {sigma:g} standard deviations")


# -- diffusion ----------------------------------------------------------------------


def class_samples(model: api.LoadedDiffusion | str | Path, root: str | Path = "runs", per_class: int = 1,
                  seed: int = 0, limit: int = 10, ema: bool = True, **how: Any) -> Tensor:
    """Samples [classes * per_class, 3, S, S]; the same seed gives the same noise for every model and setting.

    model: loaded, or a reference to a run under `root`, whose EMA weights are taken unless `ema` is False.
    limit: classes. how: as in `api.sample`.
    """
    loaded = model if isinstance(model, api.LoadedDiffusion) else api.load_generator(model, root, ema=ema)
    labels = [label for label in range(min(limit, loaded.num_classes)) for _ in range(per_class)]
    *_, last = api.sample(loaded, labels, seed=seed, previews=0, **how)
    return last.images


def sample_rows(model: api.LoadedDiffusion | str | Path, root: str | Path = "runs",
                variants: Mapping[str, Mapping[str, Any]] = {}, per_class: int = 1,
                seed: int = 0) -> go.Figure:
    """One row per variant of `api.sample`'s arguments (or `ema`), same noise and classes in every row."""
    drawn = {name: class_samples(model, root, per_class, seed, **how) for name, how in variants.items()}
    return primitives.rows(drawn)


def formation(model: api.LoadedDiffusion, labels: Sequence[int], steps: int = 12, seed: int = 0,
              **how: Any) -> go.Figure:
    """The decoded estimate of the clean image along sampling: one row per label, noise on the left.

    how: as in `api.sample`.
    """
    previews = api.sample(model, list(labels), seed=seed, steps=steps, previews=min(steps, 16), **how)
    stack = torch.stack([preview.images for preview in previews], 1)  # label, step, 3 H W
    rows = {model.class_names[label]: stack[i] for i, label in enumerate(labels)}
    return primitives.rows(rows, title=f"estimate of the clean image over {steps} steps")


def sampling(model: api.LoadedDiffusion, labels: Sequence[int], view: str = SAMPLING[0], seed: int = 0,
             scale: float | None = None, interval: tuple[float, float] | None = None,
             steps: int | None = None, solver: str | None = None) -> go.Figure:
    """Samples of `labels` as chosen above those of the run's own protocol (same noise); or how they form.

    What is None is as in the protocol. interval: of t, in which guidance acts.

    Raises:
        ConfigError: a generator of codes, which has none of these but a scale.
    """
    if model.run.ar is not None:
        raise ConfigError(f"run '{model.folder.id}' draws codes one after the other and has no steps, solver "
                          "or interval to choose; draw from it with vfmlab.sample(RUN, guidance=2)")
    own = model.run.protocol
    scale = own.guidance.scale if scale is None else scale
    interval = own.guidance.interval if interval is None else interval
    steps, solver = steps or own.sampler.steps, solver or own.sampler.solver
    how = {"guidance": {"scale": scale, "interval": list(interval)}, "sampler": {"solver": solver}}
    if view == "forming":
        return formation(model, labels, steps=steps, seed=seed, **how)
    *_, chosen = api.sample(model, labels, seed=seed, steps=steps, previews=0, **how)
    *_, usual = api.sample(model, labels, seed=seed, previews=0)
    rows = {f"{solver} {steps}, guidance {scale:g}": chosen.images}
    rows[f"protocol: {own.sampler.solver} {own.sampler.steps}, {own.guidance.scale:g}"] = usual.images
    return primitives.rows(rows, title=", ".join(model.class_names[label] for label in labels))
