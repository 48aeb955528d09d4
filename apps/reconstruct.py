"""Tab: the same image through several tokenizers, side by side."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from apps import models
from vfmlab import api, viz
from vfmlab.errors import VfmlabError


def build(root: Path, examples: list[str]) -> None:
    """Lay the tab out. root: folder of runs. examples: image files offered to people who bring none."""
    ids = models.finished(root, "tokenizer")
    with gr.Row():
        with gr.Column(scale=1):
            image = gr.Image(type="filepath", label="image", sources=["upload", "clipboard", "webcam"], height=260)
            chosen = gr.CheckboxGroup(ids, value=ids[:2], label="tokenizers")
            with gr.Row():
                go = gr.Button("reconstruct", variant="primary")
                refresh = gr.Button("refresh the list")
            if examples:
                gr.Examples(examples, image, label="examples", cache_examples=False)
        with gr.Column(scale=2):
            gallery = gr.Gallery(label="original, then each tokenizer: reconstruction and error x4", columns=3, object_fit="contain", height=420)
            note = gr.Markdown()

    def run(path: str | None, run_ids: list[str]):
        if not path:
            raise gr.Error("Choose an image first: upload one, paste one, or take an example.")
        if not run_ids:
            raise gr.Error("Choose at least one tokenizer.")
        shown, lines = [], []
        for run_id in run_ids:
            tokenizer = models.tokenizer(root, run_id)
            try:
                original, restored, psnr = api.reconstruct(tokenizer, [path])
            except VfmlabError as error:
                raise gr.Error(str(error)) from None
            if not shown:
                shown.append((viz.tile(original, scale=8), "original"))
            shown.append((viz.tile(restored, scale=8), f"{run_id}: {float(psnr[0]):.1f} dB"))
            shown.append((viz.tile(viz.error_map(original, restored), scale=8), "error x4"))
            c, h, w = tokenizer.latent_shape
            lines.append(f"- `{run_id}`: latent {c}x{h}x{w}, PSNR {float(psnr[0]):.2f} dB, EMA weights, N = 1")
        lines.append(f"\n```python\nimport vfmlab\noriginal, restored, psnr = vfmlab.reconstruct({run_ids[0]!r}, ['image.png'], root='runs')\n```")
        return shown, "\n".join(lines)

    go.click(run, [image, chosen], [gallery, note], api_name="reconstruct", concurrency_id="compute")
    refresh.click(lambda: gr.CheckboxGroup(choices=models.finished(root, "tokenizer")), None, chosen, api_name=False)
