"""Tab: inside one tokenizer: nearest latents, its channels, and what resembles a patch at any depth."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from apps import cards, models, pictures, share
from apps.common import COMPUTE, LIGHT, number, problem
from vfmlab import api
from vfmlab.plots import primitives
from vfmlab.studies import explore

SHOWN = 512  # side of the picture that is clicked


def build(root: Path, examples: list[str], whose: str) -> share.Tab:
    """Lay the tab out. root: folder of runs. examples: image files offered, and `whose` they are."""
    with share.columns("look inside") as tab:
        run = models.dropdown(root, ("tokenizer",), "tokenizer")
        image = pictures.picture("picture", examples, height=200, value=examples[0])
        gr.Examples(examples, image, label=whose, cache_examples=False)
        neighbours = gr.Slider(1, 16, 8, step=1, label="neighbours")
        pooled = gr.Checkbox(False, label="compare means over positions (places do not count)")
        with tab.right, gr.Row():
            with gr.Column(min_width=280):
                look = {"elem_classes": "vl-pixels", "elem_id": "vl-canvas", "buttons": [], "height": 300}
                canvas = gr.Image(label="click a patch", interactive=False, format="png", **look)
                with gr.Row():
                    across = gr.Slider(0, 1, 0.5, step=0.02, label="across (0: left)", min_width=120)
                    down = gr.Slider(0, 1, 0.5, step=0.02, label="down (0: top)", min_width=120)
            with gr.Column(scale=2, min_width=300):
                alike = gr.HTML(label="similarity")

    def look_inside(run: str, image: str | None, neighbours: int, pooled: bool, across: float, down: float):
        """Inside a tokenizer: nearest held-out images in its latent space, channels of the latent, and by
        layer what resembles the patch at (across, down).

        Returns HTML, the picture with the marked patch, HTML of similarity maps, a PNG, a link, Python lines,
        the state with distances as JSON.
        """
        path, began = pictures.given(image), time.monotonic()
        one, bank = models.opened(root, run, "tokenizer"), models.bank(root, run)
        tokenizer, picture = one.model, api.images_for(one.model, [path])
        z = explore.encode(tokenizer, picture)
        near = explore.nearest(bank, z, neighbours, pooled)
        channels = explore.channel_maps(z, tokenizer.size, count=32)
        where = "means over positions" if pooled else "all values"
        c, h, w = tokenizer.map_shape
        restored = explore.decode(tokenizer, z)
        both = [cards.figure(picture, "picture"), cards.figure(restored, "reconstruction")]
        captions = [f"{name}, {d:.2f}" for name, d in zip(near.labels, near.distances, strict=True)]
        nearest = [cards.figure(near.images[i : i + 1], caption) for i, caption in enumerate(captions)]
        maps = [cards.figure(channels[i : i + 1], f"channel {i}") for i in range(len(channels))]
        seconds = f"{time.monotonic() - began:.1f} s"
        among = f"among N = {len(bank)} held-out images, {tokenizer.size} px, EMA weights, {seconds}"
        distance = f"root mean square distance over {where}, in standard deviations; {among}"
        ends = f"black -{explore.SHOWN_STD}, white {explore.SHOWN_STD} standard deviations"
        shades = f"latent {c} x {h} x {w}; {ends}" + ("; the first 32" if c > 32 else "")
        parts = [one.card(both + nearest, distance, more=": nearest in the latent space"),
                 one.card(maps, shades, more=": channels of the latent")]
        state = {"run": run, "neighbours": neighbours, "pooled": pooled, "across": across, "down": down}
        numbers = {"indices": near.indices, "labels": near.labels, "distances": near.distances}
        state |= pictures.named(examples, image=path) | {"numbers": numbers}
        code = [
            "import vfmlab", "from vfmlab.studies import explore", "", f"RUN, ROOT = {run!r}, {str(root)!r}",
            "tokenizer = vfmlab.load_tokenizer(RUN, ROOT)", "z = explore.encode(tokenizer, ['picture.png'])",
            f"bank = explore.bank(tokenizer, vfmlab.runs.open_run(RUN, ROOT).config().data, {models.BANK})",
            f"print(explore.nearest(bank, z, {neighbours}, pooled={pooled}))",
            "maps = explore.layer_maps(tokenizer, ['picture.png'])",
            f"alike = {{name: explore.likeness(m, ({down:g}, {across:g})) for name, m in maps.items()}}",
        ]  # fmt: skip
        shared = share.outputs("explore", state, code, primitives.tile(channels, scale=1))
        return cards.cards(parts), *_similar(one, picture, (down, across)), *shared

    def similarity(run: str, image: str | None, across: float, down: float):
        """How much every place resembles the patch at (across, down), 0 to 1, by layer and in the latent."""
        one = models.opened(root, run, "tokenizer")
        return _similar(one, api.images_for(one.model, [pictures.given(image)]), (down, across))

    def click(event: gr.SelectData):
        place = event.index if isinstance(event.index, list | tuple) else ()
        if len(place) != 2:
            raise problem("Click into the picture.")
        return [min(max(number(x, -1e6, 1e6, "place") / SHOWN, 0), 1) for x in place]

    fields = [run, image, neighbours, pooled, across, down]
    query, results = [run, image, across, down], [canvas, alike]
    quiet = {"show_progress": "hidden", "trigger_mode": "always_last", **COMPUTE}
    clicked = canvas.select(click, None, [across, down], **LIGHT)
    clicked.then(similarity, query, results, api_name="similarity", **quiet)
    for slider in (across, down):
        slider.release(similarity, query, results, api_visibility="private", **quiet)
    outputs = [tab.shown, *results, *tab.panel]
    return share.connect("explore", look_inside, tab, fields, outputs, endpoint="explore")


def _similar(one: models.Shown, picture: Any, place: tuple[float, float]) -> tuple[Image.Image, str]:
    began, figures, tokenizer = time.monotonic(), [], one.model
    for layer, maps in explore.layer_maps(tokenizer, picture).items():
        grey = explore.grey(explore.likeness(maps, place), tokenizer.size)
        figures.append(cards.figure(grey, f"{layer}, {maps.shape[-2]} x {maps.shape[-1]}"))
        figures.append(cards.figure(primitives.pca_maps(maps, tokenizer.size), f"{layer}: PCA as colours"))
    seconds = f"{time.monotonic() - began:.1f} s"
    facts = f"cosine similarity to the marked patch: black -1, white 1; N = 1, EMA weights, {seconds}"
    layers = "" if tokenizer.vfm is None else f" (layers of {tokenizer.vfm.facts.name})"
    marked = primitives.tile(explore.marked(picture, place), scale=1).resize((SHOWN, SHOWN), 0)
    return marked, cards.cards([one.card(figures, facts, more=f": what resembles the patch{layers}")])
