"""One picture for one choice: what the widgets show, as functions that need none. Computed by `explore` and `interpolate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from torch import Tensor

from vfmlab import api, runs
from vfmlab.evaluation.number import of_run
from vfmlab.evaluation.subject import Maps
from vfmlab.plots import figures, primitives
from vfmlab.studies import explore, interpolate
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.vfm.base import VisionModel

VIEWS = ("principal components", "similarity")
SAMPLING = ("samples", "forming")


def run_card(ref: str | Path, root: str | Path = "runs") -> primitives.Table:
    """What a run is, how far it got, and its numbers with the hash of their protocol."""
    folder = runs.open_run(ref, root)
    status, report = folder.status(), of_run(folder)
    rows = [{"what": k, "value": v} for k, v in figures.describe_run(folder.config()).items()]
    rows.append({"what": "state", "value": f"{status.state}, {status.samples:,} of {status.total:,} images, {status.seconds:,.0f} s"})
    if report is not None:
        rows += [{"what": one.label, "value": primitives.number(one.value)} for one in report.measured.values()]
        rows.append({"what": "protocol", "value": f"{report.hash}, N = {report.protocol.get('n')}"})
    return primitives.table(rows)


def reconstructions(
    tokenizers: Mapping[str, Tokenizer], images: Tensor, disturbance: explore.Disturbance | None = None, banks: Mapping[str, Maps] | None = None, errors: bool = True
) -> go.Figure:
    """Images N 3 S S and, for each tokenizer, what it makes of them (with mean PSNR), and the error four times enlarged.

    disturbance: of the latents, on the way. banks: name -> latents of other images, for one that rounds.
    """
    shown = {"original": images}
    for i, (name, tokenizer) in enumerate(tokenizers.items()):
        rebuilt = explore.reconstruct(tokenizer, images, disturbance, (banks or {}).get(name), space=None)
        psnr = rebuilt.metrics["psnr"]
        shown[f"{name}  {sum(psnr) / len(psnr):.1f} dB"] = rebuilt.images
        if errors:
            shown["error x4" + " " * i] = rebuilt.error()  # a name of its own for each row, and room for the images
    return primitives.rows(shown)


def features(
    model: Tokenizer | VisionModel, images: Tensor, view: str = VIEWS[0], query: tuple[float, float] = (0.5, 0.5), layers: Sequence[int] | None = None
) -> go.Figure:
    """Images N 3 S S and one row per depth: colours of principal components, or likeness to the position `query` (y, x in 0..1)."""
    size, maps = images.shape[-1], explore.layer_maps(model, images, layers)
    if view == "similarity":
        shown = {"query": explore.marked(images, query)} | {k: explore.grey(explore.likeness(m, query), size) for k, m in maps.items()}
    else:
        shown = {"image": images} | explore.colours(maps, size)
    return primitives.rows(shown)


def sampling(
    model: api.LoadedDiffusion,
    labels: Sequence[int],
    view: str = SAMPLING[0],
    seed: int = 0,
    scale: float | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    steps: int | None = None,
    solver: str | None = None,
) -> go.Figure:
    """Samples of `labels` as chosen, and below them the same noise under the run's own protocol; or how the chosen ones form.

    What is None is as in the protocol. interval: of t, in which guidance acts.
    """
    own = model.run.protocol
    scale, steps, solver = own.guidance.scale if scale is None else scale, steps or own.sampler.steps, solver or own.sampler.solver
    how = {"guidance": {"scale": scale, "interval": list(interval)}, "sampler": {"solver": solver}}
    if view == "forming":
        return figures.formation(model, labels, steps=steps, seed=seed, **how)
    *_, chosen = api.sample(model, labels, seed=seed, steps=steps, previews=0, **how)
    *_, usual = api.sample(model, labels, seed=seed, previews=0)
    shown = {f"{solver} {steps}, guidance {scale:g}": chosen.images}
    shown[f"protocol: {own.sampler.solver} {own.sampler.steps}, {own.guidance.scale:g}"] = usual.images
    return primitives.rows(shown, title=", ".join(model.class_names[label] for label in labels))


def interpolation(
    tokenizers: Mapping[str, Tokenizer], images: Tensor, first: int = 0, second: int = 1, frames: int = 9, kind: interpolate.Kind = "linear"
) -> go.Figure:
    """From one of the images N 3 S S to another: between their pixels, and through the latent space of each tokenizer."""
    a, b = images[first : first + 1], images[second : second + 1]
    shown = {"pixels": interpolate.pixels(a, b, frames).frames}
    for name, tokenizer in tokenizers.items():
        walk = interpolate.images(tokenizer, a, b, frames, kind)
        shown[name if walk.length is None else f"{name}  path {walk.length:.2f}"] = walk.frames
    return primitives.rows(shown, title="path: length of the images' way over their distance")
