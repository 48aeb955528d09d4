"""The explorers: their controls, and the figure that these choose."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from vfmlab import api, config, runs
from vfmlab.errors import RunError
from vfmlab.evaluation.subject import Maps
from vfmlab.studies import explore, interpolate, show
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.vfm.base import VisionModel
from vfmlab.widgets.panel import Panel, controls

BANK = 200  # images on which rounding chooses channels and levels


def pick_run(root: str | Path = "runs", kind: str | None = None, headless: bool = False) -> Any:
    """Choose one of the runs under `root`, newest first, and see what it is; `.value["run"]` is its id.

    kind: "tokenizer", "diffusion", "ar" or "pretrain"; None: all. headless: the card of the newest run.
    """

    def listed() -> list[str]:
        return [folder.id for folder in reversed(runs.scan(root)) if kind in (None, folder.kind)]

    if not (ids := listed()):
        what = f"{kind} run" if kind else "run"
        raise RunError(f"no {what} in '{root}' yet; begin with: vfmlab train tiny_vfm_vae")
    if headless:
        return show.run_card(ids[0], root)
    widgets = controls()
    chosen = widgets.Dropdown(options=ids, description="run", layout=widgets.Layout(width="28em"))
    again = widgets.Button(description="refresh", icon="refresh")
    panel = Panel(lambda run: show.run_card(run, root), {"run": chosen}, [again])

    def refresh(_: Any) -> None:
        with panel.together():
            before, chosen.options = chosen.value, listed()
            if before in chosen.options:
                chosen.value = before

    again.on_click(refresh)
    return panel


def reconstructions(tokenizers: Mapping[str, Tokenizer], images: Tensor, headless: bool = False,
                    data: config.Data | None = None) -> Any:
    """Images N 3 S S through any of the tokenizers, with noise on the latent, fewer channels, fewer bits.

    data: other images, which rounding needs; None: noise only. headless: all tokenizers, undisturbed.
    """
    if headless:
        return show.reconstructions(tokenizers, images)
    widgets = controls()

    @functools.cache
    def bank(name: str) -> Maps:
        return explore.bank(tokenizers[name], data, BANK)

    def figure(shown: Sequence[str], sigma: float, channels: int = 0, bits: int = 0,
               errors: bool = True) -> go.Figure:
        disturbance = explore.Disturbance(sigma=sigma, channels=channels or None, bits=bits or None)
        banks = {name: bank(name) for name in shown} if disturbance.rounds else None
        chosen = {name: tokenizers[name] for name in shown}
        return show.reconstructions(chosen, images, disturbance, banks, errors)

    used = {"shown": widgets.SelectMultiple(options=list(tokenizers), value=tuple(tokenizers),
                                            description="tokenizers", rows=min(6, len(tokenizers))),
            "sigma": _slider(0.0, 2.0, 0.05, 0.0, "noise on z"),
            "errors": widgets.Checkbox(True, description="errors x4")}
    if data is not None:
        most = max(tokenizer.map_shape[0] for tokenizer in tokenizers.values())
        for name, numbers in (("channels", range(1, most + 1)), ("bits", (1, 2, 3, 4, 6, 8))):
            options = [("all", 0), *((str(k), k) for k in numbers)]
            used[name] = widgets.Dropdown(options=options, description=name)
    return Panel(figure, used)


def features(model: Tokenizer | VisionModel, images: Tensor, headless: bool = False,
             view: str = show.FEATURES[0], query: tuple[float, float] = (0.5, 0.5)) -> Any:
    """What a VFM, or a tokenizer, sees at each depth: principal components, or what looks like one position.

    view: one of `show.FEATURES`. query: the position (y, x in 0..1). headless: just that.
    """
    if headless:
        return show.features(model, images, view, query)
    widgets = controls()
    return Panel(lambda view, y, x: show.features(model, images, view, (y, x)),
                 {"view": widgets.Dropdown(options=show.FEATURES, value=view, description="view"),
                  "y": _slider(0.0, 1.0, 0.05, query[0], "query y"),
                  "x": _slider(0.0, 1.0, 0.05, query[1], "query x")})


def sampling(model: api.LoadedDiffusion, headless: bool = False, classes: int = 8, seed: int = 0,
             **how: Any) -> Any:
    """Samples as chosen above samples of the same noise under the run's protocol, or how they form.

    classes: how many are shown. how: what to begin with, as in `show.sampling`. headless: just that.
    """
    labels = list(range(min(classes, model.num_classes)))
    if headless:
        return show.sampling(model, labels, seed=seed, **how)
    widgets, own = controls(), model.run.protocol
    start = {"view": show.SAMPLING[0], "scale": own.guidance.scale, "interval": own.guidance.interval,
             "steps": own.sampler.steps, "solver": own.sampler.solver, **how}
    return Panel(lambda **chosen: show.sampling(model, labels, **chosen),
                 {"view": widgets.Dropdown(options=show.SAMPLING, value=start["view"], description="view"),
                  "scale": _slider(0.0, max(8.0, start["scale"]), 0.1, start["scale"], "guidance"),
                  "interval": widgets.FloatRangeSlider(value=start["interval"], min=0.0, max=1.0, step=0.05,
                                                       description="in t", continuous_update=False),
                  "steps": widgets.IntSlider(value=start["steps"], min=1, max=max(100, start["steps"]),
                                             description="steps", continuous_update=False),
                  "solver": widgets.Dropdown(options=["euler", "heun", "dopri5", "sde"],
                                             value=start["solver"], description="solver"),
                  "seed": widgets.BoundedIntText(value=seed, min=0, max=2**31 - 1, description="seed")})


def interpolation(tokenizers: Mapping[str, Tokenizer], images: Tensor, headless: bool = False, first: int = 0,
                  second: int = 1) -> Any:
    """From one image to another, through the latent space of each tokenizer.

    headless: from `first` to `second`, straight.
    """
    if headless:
        return interpolate.figure(tokenizers, images, first, second)
    widgets = controls()

    def index(value: int, name: str) -> Any:
        return widgets.BoundedIntText(value=value, min=0, max=len(images) - 1, description=name)

    return Panel(functools.partial(interpolate.figure, tokenizers, images), {
        "first": index(first, "from image"), "second": index(second, "to image"),
        "frames": widgets.IntSlider(value=9, min=3, max=17, description="frames", continuous_update=False),
        "kind": widgets.Dropdown(options=["linear", "spherical"], description="line")})


def _slider(low: float, high: float, step: float, value: float, name: str) -> Any:
    return controls().FloatSlider(value=value, min=low, max=high, step=step, description=name,
                                  continuous_update=False)
