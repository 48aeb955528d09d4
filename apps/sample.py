"""Tab: samples form before the eyes; two diffusion runs from the same noise."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from apps import models, share
from apps.cards import escape
from apps.common import COMPUTE, LIGHT, number, problem, told, whole
from vfmlab import api
from vfmlab.plots import primitives
from vfmlab.studies import interpolate
from vfmlab.weights import bundled

MOST = 64  # images of one job and run
EVERY = "every class"
NONE = "none"


def build(root: Path) -> share.Tab:
    """Lay the tab out. root: folder of runs."""
    ids = models.finished(root, "diffusion")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            run = gr.Dropdown(ids, value=ids[0] if ids else None, label="diffusion run", allow_custom_value=True)
            beside = gr.Dropdown([NONE, *ids], value=NONE, label="beside it, from the same noise", allow_custom_value=True)
            label = gr.Dropdown([EVERY, *(models.class_names(root, ids[0]) if ids else [])], value=EVERY, label="class", allow_custom_value=True)
            with gr.Row():
                count = gr.Slider(1, 16, 2, step=1, label="samples per class", min_width=130)
                seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=100)
            with gr.Row():
                steps = gr.Slider(1, 250, 20, step=1, label="steps", min_width=130)
                scale = gr.Slider(0, 8, 1.5, step=0.1, label="guidance scale (1: off)", min_width=130)
            solver = gr.Radio(["euler", "heun", "sde"], value="euler", label="sampler")
            with gr.Accordion("Interval of guidance, time shift, weights", open=False):
                low = gr.Slider(0, 1, 0.0, step=0.05, label="guided from t (0: data)")
                high = gr.Slider(0, 1, 1.0, step=0.05, label="to t (1: noise)")
                shift = gr.Slider(0.1, 10, 1.0, step=0.1, label="time shift (above 1: more steps at the noise)")
                ema = gr.Checkbox(True, label="EMA weights")
            with gr.Row():
                go = gr.Button("sample", variant="primary", min_width=120)
                stop = gr.Button("stop", min_width=80)
            with gr.Group(visible=not ids) as nothing:
                gr.Markdown("There is no diffusion run here yet. A small one on the bundled tokenizer takes one to two minutes to make; its samples are shown meanwhile.")
                make = gr.Button("make a small diffusion run now")
                progress = gr.Markdown()
        with gr.Column(scale=3, min_width=300):
            note = gr.HTML()
            with gr.Row():
                look = {"format": "png", "show_label": False, "interactive": False, "elem_classes": "vl-pixels", "min_width": 260, "buttons": ["download", "fullscreen"]}
                first = gr.Image(label="samples", **look)
                second = gr.Image(label="beside", visible=False, **look)
            told_as = share.panel()

    def classes(run_id: Any):
        names = models.class_names(root, run_id) if run_id in models.finished(root, "diffusion") else []
        return gr.update(choices=[EVERY, *names], value=EVERY)

    @told
    def sample(
        run: str, beside: str, label: str, count: int, seed: int, steps: int, solver: str, scale: float, low: float, high: float, shift: float, ema: bool
    ):  # fmt: skip
        """Samples of a diffusion run, streamed as they form; the last message holds the finished images.

        run, beside: ids of diffusion runs ("none": only one). label: a class's name, its number, or "every class". count: images per class.
        Guidance acts for t in [low, high], t = 0 data, t = 1 noise. Returns a note, one or two PNG grids, a link, Python lines, the state as JSON.
        """
        names = [run] if beside in (None, "", NONE) else [run, beside]
        if len(set(names)) < len(names):
            raise problem("Both sides show the same run; choose another one beside it, or none.")
        low, high = number(low, 0, 1, "guided from t"), number(high, 0, 1, "guided to t")
        if low >= high:
            raise problem(f"The guidance interval is empty: it begins at t = {low:g} and ends at t = {high:g}.")
        if solver not in ("euler", "heun", "sde"):
            raise problem(f"There is no sampler '{solver}'; choose euler, heun or sde.")
        how = {
            "seed": whole(seed, 0, 2**31 - 1, "seed"), "guidance": {"scale": number(scale, 0, 8, "guidance scale"), "interval": [low, high]},
            "steps": whole(steps, 1, 250, "steps"), "sampler": {"solver": solver, "shift": number(shift, 0.1, 10, "time shift")},
        }  # fmt: skip
        count = whole(count, 1, 16, "samples per class")
        loaded = {name: models.diffusion(root, name, bool(ema)) for name in names}
        labels = {name: _labels(model, label, count) for name, model in loaded.items()}
        columns = _columns(len(labels[names[0]]), count if label in (None, EVERY) else 1, 10 if len(names) == 1 else 6)
        began = time.monotonic()
        streams = {name: api.sample(model, labels[name], **how) for name, model in loaded.items()}
        weights = "EMA" if ema else "raw"
        state = {
            "run": run, "beside": beside or NONE, "label": str(label), "count": count, "seed": how["seed"], "steps": how["steps"], "solver": solver,
            "scale": how["guidance"]["scale"], "low": low, "high": high, "shift": how["sampler"]["shift"], "ema": bool(ema),
        }  # fmt: skip
        with closing(interpolate.together(streams)) as stream:  # a cancelled job stops the samplers and frees their memory
            for shown in stream:
                done = all(preview.final for preview in shown.values())
                pictures = [primitives.tile(preview.images, columns=columns, scale=_zoom(preview.images)) for preview in shown.values()]
                yield (
                    _note(root, shown, loaded, labels, weights, time.monotonic() - began),
                    gr.update(value=pictures[0], label=names[0]),
                    gr.update(value=pictures[1], label=names[1], visible=True) if len(pictures) > 1 else gr.update(visible=False, value=None),
                    *(share.tell("sample", state, _code(root, names, labels[names[0]], how, bool(ema))) if done else (gr.skip() for _ in told_as)),
                )

    @told
    def train():
        for event, text, images in bundled.make(root):
            picture = gr.skip() if images is None else gr.update(value=primitives.tile(images, columns=8, scale=_zoom(images)), label="samples while it trains")
            done = event == "finish"
            yield (
                text, picture, *(gr.update(choices=c, value=c[0]) if done else gr.skip() for c in [models.finished(root, "diffusion")]),
                gr.update(choices=[NONE, *models.finished(root, "diffusion")]) if done else gr.skip(), gr.update(visible=not done),
            )  # fmt: skip

    run.change(classes, run, label, **LIGHT)
    inputs = [run, beside, label, count, seed, steps, solver, scale, low, high, shift, ema]
    started = go.click(sample, inputs, [note, first, second, *told_as], api_name="sample", **COMPUTE)
    making = make.click(train, None, [progress, first, run, beside, nothing], api_visibility="private", **COMPUTE)
    stop.click(None, None, None, cancels=[started, making], api_visibility="private")

    def fresh() -> dict[str, list[str]]:
        ids = models.finished(root, "diffusion")
        return {"run": ids, "beside": [NONE, *ids]}

    names = ("run", "beside", "label", "count", "seed", "steps", "solver", "scale", "low", "high", "shift", "ema")
    return share.Tab("sample", dict(zip(names, inputs, strict=True)), fresh, free=("label",))


def _zoom(images: Any) -> int:
    return max(1, 96 // images.shape[-1])


def _columns(n: int, together: int, most: int) -> int:
    """As many columns as fill every row, `together` images of a class never apart; at most `most` where that can be."""
    return max((c for c in range(together, max(most, together) + 1, together) if n % c == 0), default=min(n, most))


def _labels(model: api.LoadedDiffusion, label: Any, count: int) -> list[int]:
    if label in (None, EVERY):
        return [i for i in range(model.num_classes) for _ in range(count)][:MOST]
    text = str(label)
    number = model.class_names.index(text) if text in model.class_names else int(text) if text.isdecimal() and len(text) < 9 else -1
    if not 0 <= number < model.num_classes:
        raise problem(f"'{text[:60]}' is not one of this run's {model.num_classes} classes: {', '.join(model.class_names[:12])}")
    return [number] * count


def _note(
    root: Path, shown: dict[str, api.Preview], loaded: dict[str, api.LoadedDiffusion], labels: dict[str, list[int]], weights: str, seconds: float
) -> str:  # fmt: skip
    lines, places = [], ["first", "second"] if len(shown) > 1 else [""]
    for (name, p), place in zip(shown.items(), places, strict=True):
        state = "done" if p.final else f"step {p.step} of {p.total}, t = {p.t:.2f}"
        colour = primitives.colour(models.method(root, name, "diffusion"))
        lines.append(f'<span style="color: {colour}">&#9679;</span> {place} <b>{escape(name)}</b>: {state}; N = {len(p.images)}, {weights} weights')
    model = next(iter(loaded.values()))
    drawn = ", ".join(dict.fromkeys(model.class_names[i] for i in next(iter(labels.values()))))
    lines.append(f"row by row: {escape(drawn)}; images of one place start from the same noise; {seconds:.1f} s")
    return f'<p class="vl-facts">{"<br>".join(lines)}</p>'


def _code(root: Path, names: list[str], labels: list[int], how: dict[str, Any], ema: bool) -> str:
    asked = ", ".join(f"{key}={value!r}" for key, value in how.items())
    return "\n".join(
        ["import vfmlab", "", *(f"*_, last = vfmlab.sample({name!r}, {labels}, {asked}, ema={ema}, root={root.name!r})  # last.images" for name in names)]
    )
