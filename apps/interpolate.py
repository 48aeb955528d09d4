"""Tab: what lies between two images, two noises or two classes, for several runs on the same pair."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import gradio as gr

from apps import cards, models, pictures, share
from apps.common import COMPUTE, number, problem, told, whole
from vfmlab import api
from vfmlab.studies import explore, interpolate

KINDS = ("linear", "spherical")


def build(root: Path, examples: list[str]) -> tuple[list[share.Tab], gr.Tabs]:
    """Lay the tab out, as two parts of one: between images (tokenizers), between noises or classes (diffusion); the parts and their tabs."""
    with gr.Tabs() as tabs:
        with gr.Tab("two images", id="interpolate"):
            images = _images(root, examples)
        with gr.Tab("noises, classes", id="interpolate_samples"):
            samples = _samples(root)
    return [images, samples], tabs


def _images(root: Path, examples: list[str]) -> share.Tab:
    ids = models.finished(root, "tokenizer")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            with gr.Row():
                first = pictures.picture("from", examples, height=180, value=examples[0], min_width=130)
                second = pictures.picture("to", examples, height=180, value=examples[1], min_width=130)
            gr.Examples([examples[:2], examples[2:4]], [first, second], label="pairs", cache_examples=False)
            runs = gr.Dropdown(ids, value=ids[:2], multiselect=True, allow_custom_value=True, label="tokenizers", max_choices=models.MOST_RUNS)
            kind = gr.Radio(KINDS, value="linear", label="path through the latent space")
            frames = gr.Slider(3, 25, 9, step=1, label="frames")
            with gr.Row():
                go = gr.Button("interpolate", variant="primary", min_width=120)
                stop = gr.Button("stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(label="results")
            told_as = share.panel()

    sources = (first, second)

    @told
    def interpolate_images(first: str | None, second: str | None, runs: list[str], kind: str, frames: int):
        """Between two images in the latent space of tokenizers, and between their pixels: strips, playback, length and roughness of the path.

        kind: linear or spherical. Returns HTML, a link, Python lines, the state with the numbers as JSON.
        """
        paths, run_ids = [[pictures.given(path)] for path in (first, second)], models.several(root, runs, "tokenizer")
        if kind not in KINDS:
            raise problem(f"There is no path '{kind}'; choose linear or spherical.")
        frames, parts, numbers, pixels = whole(frames, 3, 25, "frames"), [], {}, False
        for run_id in run_ids:
            began = time.monotonic()
            tokenizer = models.tokenizer(root, run_id)
            if not pixels:
                pixels = True
                ends = [explore.side(tokenizer, path) for path in paths]
                parts.append(_card("pixels, blended", None, interpolate.pixels(*ends, frames), "what a latent space has to beat"))
            walk = interpolate.images(tokenizer, *paths, frames, kind)
            numbers[run_id] = {"length": walk.length, "roughness": walk.roughness}
            facts = f"{kind}; N = 1 pair, EMA weights, {time.monotonic() - began:.1f} s"
            parts.append(_card(run_id, models.method(root, run_id, "tokenizer"), walk, facts))
            yield cards.cards(parts), *(gr.skip() for _ in told_as)
        names = {key: box.name_of(path[0]) for key, box, path in zip(("first", "second"), sources, paths, strict=True)}
        state = {k: v for k, v in names.items() if v} | {"runs": run_ids, "kind": kind, "frames": frames, "numbers": numbers}
        code = (
            f"import vfmlab\nfrom vfmlab.studies import interpolate\n\ntokenizer = vfmlab.load_tokenizer({run_ids[0]!r}, {root.name!r})\n"
            f"walk = interpolate.images(tokenizer, ['first.png'], ['second.png'], {frames}, {kind!r})  # walk.frames, walk.length"
        )
        yield cards.cards(parts), *share.tell("interpolate", state, code)

    inputs = [first, second, runs, kind, frames]
    started = go.click(interpolate_images, inputs, [shown, *told_as], api_name="interpolate_images", **COMPUTE)
    stop.click(None, None, None, cancels=[started], api_visibility="private")
    fields = dict(zip(("first", "second", "runs", "kind", "frames"), inputs, strict=True))
    return share.Tab("interpolate", fields, lambda: {"runs": models.finished(root, "tokenizer")})


def _card(title: str, method: str | None, walk: interpolate.Walk, facts: str) -> str:
    lines = [] if walk.length is None else [("path length", f"{walk.length:.2f}"), ("roughness", f"{walk.roughness:.2f}")]
    figures = [cards.strip(walk.frames, f"{len(walk.frames)} frames"), cards.playback(walk.frames, "there and back")]
    return cards.card(title, method, figures, lines, facts, full=True)


def _samples(root: Path) -> share.Tab:
    ids = models.finished(root, "diffusion")
    names = models.class_names(root, ids[0]) if ids else []
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            runs = gr.Dropdown(ids, value=ids[:2], multiselect=True, allow_custom_value=True, label="diffusion runs", max_choices=models.MOST_RUNS)
            what = gr.Radio(["noises", "classes"], value="noises", label="between two")
            with gr.Row():
                label = gr.Number(0, label=_label("class", names, 0), precision=0, minimum=0, maximum=9999, min_width=130)
                other = gr.Number(min(1, max(0, len(names) - 1)), label="other class (between classes)", precision=0, minimum=0, maximum=9999, min_width=130)
            with gr.Row():
                seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=130)
                other_seed = gr.Number(1, label="other seed (between noises)", precision=0, minimum=0, maximum=2**31 - 1, min_width=130)
            kind = gr.Radio(KINDS, value="spherical", label="path")
            frames = gr.Slider(3, 25, 9, step=1, label="frames")
            with gr.Row():
                steps = gr.Slider(1, 100, 20, step=1, label="sampling steps", min_width=130)
                scale = gr.Slider(0, 8, 1.5, step=0.1, label="guidance scale", min_width=130)
            with gr.Row():
                go = gr.Button("interpolate", variant="primary", min_width=120)
                stop = gr.Button("stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(label="results")
            told_as = share.panel()

    @told
    def interpolate_samples(
        runs: list[str], what: str, label: int, other: int, seed: int, other_seed: int, kind: str, frames: int, steps: int, scale: float
    ):  # fmt: skip
        """Samples between two noises (seed, other_seed; one class) or two classes (label, other; one seed) of diffusion runs, streamed.

        label, other: class numbers. frames: how many, both ends included. Returns HTML, a link, Python lines, the state as JSON.
        """
        run_ids = models.several(root, runs, "diffusion")
        if what not in ("noises", "classes") or kind not in KINDS:
            raise problem(f"There is no path '{kind}' between '{what}'; choose linear or spherical, noises or classes.")
        ends = whole(label, 0, 9999, "class"), whole(other, 0, 9999, "other class")
        seeds = whole(seed, 0, 2**31 - 1, "seed"), whole(other_seed, 0, 2**31 - 1, "other seed")
        frames = whole(frames, 3, 25, "frames")
        how = {"steps": whole(steps, 1, 100, "sampling steps"), "guidance": number(scale, 0, 8, "guidance scale"), "sampler": {"solver": "euler"}}
        arguments = {"noises": (ends[0], seeds), "classes": (ends, seeds[0])}[what]
        done: dict[str, str] = {}
        for run_id in run_ids:
            began, model = time.monotonic(), models.diffusion(root, run_id)
            method = models.method(root, run_id, "diffusion")
            with closing(getattr(interpolate, what)(model, *arguments, frames, kind, **how)) as stream:
                for preview in stream:
                    done[run_id] = _forming(run_id, method, preview, _between(model, what, ends, seeds), kind, time.monotonic() - began)
                    yield cards.cards(list(done.values())), *(gr.skip() for _ in told_as)
        state = {
            "runs": run_ids, "what": what, "label": ends[0], "other": ends[1], "seed": seeds[0], "other_seed": seeds[1], "kind": kind, "frames": frames,
            "steps": how["steps"], "scale": how["guidance"],
        }  # fmt: skip
        code = (
            f"import vfmlab\nfrom vfmlab.studies import interpolate\n\nmodel = vfmlab.load_diffusion({run_ids[0]!r}, {root.name!r})\n"
            f"*_, last = interpolate.{what}(model, {', '.join(map(repr, arguments))}, {frames}, {kind!r}, **{how})  # last.images"
        )
        yield cards.cards(list(done.values())), *share.tell("interpolate_samples", state, code)

    inputs = [runs, what, label, other, seed, other_seed, kind, frames, steps, scale]
    started = go.click(interpolate_samples, inputs, [shown, *told_as], api_name="interpolate_samples", **COMPUTE)
    stop.click(None, None, None, cancels=[started], api_visibility="private")
    keys = ("runs", "what", "label", "other", "seed", "other_seed", "kind", "frames", "steps", "scale")
    return share.Tab("interpolate_samples", dict(zip(keys, inputs, strict=True)), lambda: {"runs": models.finished(root, "diffusion")})


def _label(what: str, names: list[str], index: int) -> str:
    return f"{what} (0 to {len(names) - 1})" if names else what


def _between(model: api.LoadedDiffusion, what: str, ends: tuple[int, int], seeds: tuple[int, int]) -> str:
    names = [model.class_names[i] if i < model.num_classes else str(i) for i in ends]
    return f"{names[0]}, from seed {seeds[0]} to seed {seeds[1]}" if what == "noises" else f"from {names[0]} to {names[1]}, seed {seeds[0]}"


def _forming(run_id: str, method: str, preview: api.Preview, between: str, kind: str, seconds: float) -> str:
    state = "done" if preview.final else f"step {preview.step} of {preview.total}"
    figures = [cards.strip(preview.images, f"{between}: {state}")]
    if preview.final:
        figures.append(cards.playback(preview.images, "there and back"))
    return cards.card(run_id, method, figures, (), f"{kind}; N = {len(preview.images)} frames, EMA weights, {seconds:.1f} s", full=True)
