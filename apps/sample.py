"""Tab: samples form before the eyes."""

from __future__ import annotations

import time
from pathlib import Path

import gradio as gr

from apps import models
from vfmlab import api, viz
from vfmlab.errors import VfmlabError


def build(root: Path) -> None:
    """Lay the tab out. root: folder of runs."""
    ids = models.finished(root, "diffusion")
    with gr.Row():
        with gr.Column(scale=1):
            run = gr.Dropdown(ids, value=ids[0] if ids else None, label="diffusion run")
            label = gr.Dropdown([("every class", -1)], value=-1, label="class", type="value")
            count = gr.Slider(1, 16, 4, step=1, label="samples per class")
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31 - 1)
            steps = gr.Slider(1, 100, 25, step=1, label="steps")
            solver = gr.Radio(["euler", "heun", "sde"], value="euler", label="solver")
            scale = gr.Slider(0, 8, 1.5, step=0.1, label="guidance scale")
            with gr.Row():
                low = gr.Slider(0, 1, 0.0, step=0.05, label="guided from t")
                high = gr.Slider(0, 1, 1.0, step=0.05, label="to t (1 = noise)")
            ema = gr.Checkbox(True, label="EMA weights")
            with gr.Row():
                go = gr.Button("sample", variant="primary")
                stop = gr.Button("stop")
                refresh = gr.Button("refresh the list")
        with gr.Column(scale=2):
            picture = gr.Image(label="samples", format="png", height=480)
            note = gr.Markdown()

    def classes(run_id: str | None):
        if not run_id:
            return gr.Dropdown(choices=[("every class", -1)], value=-1)
        names = models.diffusion(root, run_id).class_names
        return gr.Dropdown(choices=[("every class", -1), *((name, i) for i, name in enumerate(names))], value=-1)

    def draw(run_id, label, count, seed, steps, solver, scale, low, high, ema):
        loaded = models.diffusion(root, run_id, bool(ema))
        labels = [int(label)] * int(count) if int(label) >= 0 else [i for i in range(loaded.num_classes) for _ in range(int(count))]
        if low >= high:
            raise gr.Error(f"The guidance interval is empty: it begins at t = {low} and ends at {high}.")
        guidance = {"scale": float(scale), "interval": [float(low), float(high)]}
        began = time.monotonic()
        stream = api.sample(loaded, labels[:160], seed=int(seed), guidance=guidance, sampler={"solver": solver}, steps=int(steps))
        try:
            for preview in stream:
                seconds = time.monotonic() - began
                state = "done" if preview.final else f"step {preview.step} of {preview.total}, t = {preview.t:.2f}"
                yield viz.tile(preview.images, columns=int(count) if int(label) < 0 else 8, scale=3), (
                    f"{state}; {len(labels[:160])} samples, {'EMA' if ema else 'raw'} weights, {seconds:.1f} s\n\n"
                    f"```python\nimport vfmlab\n*_, last = vfmlab.sample({run_id!r}, {labels[:8]}, seed={int(seed)}, guidance={guidance}, "
                    f"sampler={{'solver': {solver!r}}}, steps={int(steps)}, root='runs')\n```"
                )
        except VfmlabError as error:
            raise gr.Error(str(error)) from None
        finally:
            stream.close()  # a cancelled browser stops the sampler and frees its memory

    run.change(classes, run, label, api_name=False)
    started = go.click(
        draw, [run, label, count, seed, steps, solver, scale, low, high, ema], [picture, note], api_name="sample", concurrency_id="compute"
    )
    stop.click(None, None, None, cancels=[started], api_name=False)
    refresh.click(lambda: gr.Dropdown(choices=models.finished(root, "diffusion")), None, run, api_name=False)
