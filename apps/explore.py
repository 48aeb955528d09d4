"""Tab: inside one tokenizer: nearest neighbours in its latent space, its channels, and what resembles a patch at every depth."""

from __future__ import annotations

import time
from pathlib import Path

import gradio as gr

from apps import cards, models, pictures, share
from apps.common import COMPUTE, LIGHT, number, told, whole
from vfmlab.plots import primitives
from vfmlab.studies import explore

SHOWN = 512  # side of the picture that is clicked


def build(root: Path, examples: list[str]) -> share.Tab:
    """Lay the tab out. root: folder of runs."""
    ids = models.finished(root, "tokenizer")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            run = gr.Dropdown(ids, value=ids[0] if ids else None, label="tokenizer", allow_custom_value=True)
            image = pictures.picture("picture", examples, height=240, value=examples[0])
            gr.Examples(examples, image, label="held-out images of the newest run", cache_examples=False)
            neighbours = gr.Slider(1, 16, 8, step=1, label="neighbours")
            pooled = gr.Checkbox(False, label="compare means over positions (where a thing is does not count)")
            with gr.Row():
                go = gr.Button("look inside", variant="primary", min_width=120)
                stop = gr.Button("stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(label="results")
            with gr.Row():
                with gr.Column(min_width=280):
                    canvas = gr.Image(label="click a patch", interactive=False, format="png", height=300, elem_classes="vl-pixels", elem_id="vl-canvas", buttons=[])
                    with gr.Row():
                        across = gr.Slider(0, 1, 0.5, step=0.02, label="across (0: left)", min_width=120)
                        down = gr.Slider(0, 1, 0.5, step=0.02, label="down (0: top)", min_width=120)
                with gr.Column(scale=2, min_width=300):
                    alike = gr.HTML(label="similarity")
            told_as = share.panel()

    box = image

    @told
    def look_inside(run: str, image: str | None, neighbours: int, pooled: bool, across: float, down: float):
        """Inside a tokenizer: nearest held-out images in its latent space, channels of the latent, maps by layer similar to the patch at (across, down).

        Returns HTML, the picture with the marked patch, HTML of similarity maps, a link, Python lines, the state with distances as JSON.
        """
        path, began = pictures.given(image), time.monotonic()
        k = whole(neighbours, 1, 16, "neighbours")
        tokenizer, bank, method = models.tokenizer(root, run), models.bank(root, run), models.method(root, run, "tokenizer")
        picture = explore.side(tokenizer, [path])
        z = explore.encode(tokenizer, picture)
        near = explore.nearest(bank, z, k, bool(pooled))
        restored = explore.decode(tokenizer, z)
        channels = explore.channel_maps(z, tokenizer.size, count=32)
        where = "means over positions" if pooled else "all values"
        c, h, w = tokenizer.latent_shape
        first = [cards.figure(picture, "picture"), cards.figure(restored, "reconstruction")]
        parts = [
            cards.card(f"{run}: nearest in the latent space", method, first + [
                cards.figure(near.images[i : i + 1], f"{near.labels[i]}, {near.distances[i]:.2f}") for i in range(len(near.distances))
            ], (), f"root mean square distance over {where}, in standard deviations; among N = {len(bank)} held-out images, EMA weights, "
                   f"{time.monotonic() - began:.1f} s"),
            cards.card(f"{run}: channels of the latent", method, [
                cards.figure(channels[i : i + 1], f"channel {i}") for i in range(len(channels))
            ], (), f"latent {c} x {h} x {w}; black -{explore.SHOWN_STD}, white {explore.SHOWN_STD} standard deviations" + ("; the first 32" if c > 32 else "")),
        ]  # fmt: skip
        marked, maps = _similar(tokenizer, picture, method, run, across, down)
        state = {"run": run, "image": box.name_of(path), "neighbours": k, "pooled": bool(pooled), "across": across, "down": down}
        state = {key: value for key, value in state.items() if value is not None}
        code = (
            f"import vfmlab\nfrom vfmlab.studies import explore\n\ntokenizer = vfmlab.load_tokenizer({run!r}, {root.name!r})\n"
            f"z = explore.encode(tokenizer, ['picture.png'])\n"
            f"bank = explore.bank(tokenizer, vfmlab.runs.open_run({run!r}, {root.name!r}).config().data, {models.BANK})\n"
            f"print(explore.nearest(bank, z, {k}, pooled={bool(pooled)}))\nmaps = explore.layer_maps(tokenizer, ['picture.png'])\n"
            f"alike = {{name: explore.likeness(m, ({down:g}, {across:g})) for name, m in maps.items()}}"
        )
        numbers = {"indices": near.indices, "labels": near.labels, "distances": near.distances}
        return cards.cards(parts), marked, maps, *share.tell("explore", {**state, "numbers": numbers}, code)

    @told
    def similarity(run: str, image: str | None, across: float, down: float):
        """How much every place resembles the patch at (across, down), 0 to 1, layer by layer of the VFM and in the latent."""
        tokenizer = models.tokenizer(root, run)
        return _similar(tokenizer, explore.side(tokenizer, [pictures.given(image)]), models.method(root, run, "tokenizer"), run, across, down)

    def click(event: gr.SelectData):
        x, y = event.index
        return min(max(x / SHOWN, 0), 1), min(max(y / SHOWN, 0), 1)

    inputs = [run, image, neighbours, pooled, across, down]
    started = go.click(look_inside, inputs, [shown, canvas, alike, *told_as], api_name="explore", **COMPUTE)
    query, results = [run, image, across, down], [canvas, alike]
    moved = canvas.select(click, None, [across, down], **LIGHT).then(
        similarity, query, results, api_name="similarity", show_progress="hidden", trigger_mode="always_last", **COMPUTE
    )
    slid = [s.release(similarity, query, results, api_visibility="private", show_progress="hidden", trigger_mode="always_last", **COMPUTE) for s in (across, down)]
    stop.click(None, None, None, cancels=[started, moved, *slid], api_visibility="private")
    names = ("run", "image", "neighbours", "pooled", "across", "down")
    return share.Tab("explore", dict(zip(names, inputs, strict=True)), lambda: {"run": models.finished(root, "tokenizer")})


def _similar(tokenizer, picture, method: str, run: str, across: float, down: float):
    began = time.monotonic()
    query = number(down, 0, 1, "down"), number(across, 0, 1, "across")
    figures = []
    for name, maps in explore.layer_maps(tokenizer, picture).items():
        figures.append(cards.figure(explore.grey(explore.likeness(maps, query), tokenizer.size), f"{name}, {maps.shape[-2]} x {maps.shape[-1]}"))
        figures.append(cards.figure(primitives.pca_maps(maps, tokenizer.size), f"{name}: PCA as colours"))
    facts = f"cosine similarity to the marked patch: black -1, white 1; N = 1, EMA weights, {time.monotonic() - began:.1f} s"
    title = f"{run}: what resembles the patch" + ("" if tokenizer.vfm is None else f" (layers of {tokenizer.vfm.facts.name})")
    marked = primitives.tile(explore.marked(picture, query), scale=1).resize((SHOWN, SHOWN), 0)
    return marked, cards.cards([cards.card(title, method, figures, (), facts)])
