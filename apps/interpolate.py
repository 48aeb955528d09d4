"""Tab: what lies between two images, two noises or two classes, for several runs on the same pair."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from apps import cards, models, pictures, share
from apps.common import LIGHT, SEED
from apps.page import stopped, until_stopped
from vfmlab import api
from vfmlab.plots import primitives
from vfmlab.studies import interpolate

KINDS = ("linear", "spherical")


def build(root: Path, examples: list[str]) -> tuple[list[share.Tab], gr.Tabs]:
    """Lay the tab out: between images (tokenizers), noises or classes (diffusion); parts and their tabs."""
    with gr.Tabs() as tabs:
        with gr.Tab("two images", id="interpolate"):
            images = _images(root, examples)
        with gr.Tab("noises, classes", id="interpolate_samples"):
            samples = _samples(root)
    return [images, samples], tabs


def _images(root: Path, examples: list[str]) -> share.Tab:
    with share.columns("interpolate") as tab:
        with gr.Row():
            first = pictures.picture("from", examples, height=160, value=examples[0], min_width=130)
            second = pictures.picture("to", examples, height=160, value=examples[:2][-1], min_width=130)
        pairs = [pair for pair in (examples[:2], examples[2:4]) if pair]
        gr.Examples(pairs, [first, second], label="pairs", cache_examples=False)
        runs = models.dropdown(root, ("tokenizer",), "tokenizers", most=models.MOST_RUNS)
        kind = gr.Radio(KINDS, value="linear", label="path through the latent space")
        frames = gr.Slider(3, 25, 9, step=1, label="frames")

    def interpolate_images(first: str | None, second: str | None, runs: list[str], kind: str, frames: int):
        """Between two images in the latent space of tokenizers, and between their pixels: strips, playback,
        length and roughness of the path.

        kind: linear or spherical. Returns HTML, a PNG, a link, Python lines, the state with numbers as JSON.
        """
        paths = [[pictures.given(path)] for path in (first, second)]
        run_ids = models.several(root, runs, "tokenizer")
        parts, numbers, walks = [], {}, []
        for run_id in run_ids:
            if stopped():
                break
            began, one = time.monotonic(), models.opened(root, run_id, "tokenizer")
            px = f"{one.model.size} px"
            if not parts:
                ends = [api.images_for(one.model, path) for path in paths]
                facts, blend = f"{px}; what a latent space has to beat", interpolate.pixels(*ends, frames)
                parts.append(_card(models.Shown("pixels, blended", ""), blend, facts))
            walks.append(interpolate.images(one.model, *paths, frames, kind))
            numbers[run_id] = {"length": walks[-1].length, "roughness": walks[-1].roughness}
            facts = f"{kind}; {px}, N = 1 pair, EMA weights, {time.monotonic() - began:.1f} s"
            parts.append(_card(one, walks[-1], facts))
            yield {tab.shown: cards.cards(parts)}
        parts += cards.early(len(walks), len(run_ids))
        state = pictures.named(examples, first=first, second=second)
        state |= {"runs": run_ids, "kind": kind, "frames": frames, "numbers": numbers}
        code = ["import vfmlab", "from vfmlab.studies import interpolate", "",
                f"tokenizer = vfmlab.load_tokenizer({run_ids[0]!r}, {str(root)!r})",
                f"walk = interpolate.images(tokenizer, ['first.png'], ['second.png'], {frames}, {kind!r})",
                "print(walk.length, walk.roughness)  # walk.frames"]
        sheet = cards.stack([primitives.tile(walk.frames, columns=25, scale=1) for walk in walks])
        yield cards.cards(parts), *share.outputs("interpolate", state, code, sheet)

    fields = [first, second, runs, kind, frames]
    return share.connect("interpolate", interpolate_images, tab, fields)


def _samples(root: Path) -> share.Tab:
    with share.columns("interpolate") as tab:
        runs = models.dropdown(root, ("diffusion",), "diffusion runs", most=models.MOST_RUNS)
        what = gr.Radio(["noises", "classes"], value="noises", label="between two")
        look = {"allow_custom_value": True, "min_width": 130}
        names = models.class_names(root, next(iter(runs.value), None))
        ends = (names[0], names[1 % len(names)]) if names else (None, None)
        with gr.Row():
            label = gr.Dropdown(names, value=ends[0], label="class", **look)
            other = gr.Dropdown(names, value=ends[1], label="other class (between classes)", **look)
        look = {"precision": 0, "minimum": 0, "maximum": SEED, "min_width": 130}
        with gr.Row():
            seed = gr.Number(0, label="seed", **look)
            other_seed = gr.Number(1, label="other seed (between noises)", **look)
        kind = gr.Radio(KINDS, value="spherical", label="path")
        with gr.Row():
            frames = gr.Slider(3, 25, 9, step=1, label="frames", min_width=90)
            steps = gr.Slider(1, 100, 20, step=1, label="steps", min_width=90)
            scale = gr.Slider(0, 8, 1.5, step=0.1, label="guidance", min_width=90)

    def interpolate_samples(runs: list[str], what: str, label: str, other: str, seed: int, other_seed: int,
                            kind: str, frames: int, steps: int, scale: float):
        """Samples between two noises (seed, other_seed; one class) or classes (label, other; one seed).

        runs: ids of diffusion runs. label, other: names or numbers of classes. frames: with both ends.
        Returns HTML, a PNG, a link, Python lines, the state as JSON.
        """
        run_ids = models.several(root, runs, "diffusion")
        how = {"steps": steps, "guidance": scale, "sampler": {"solver": "euler"}}
        done: dict[str, str] = {}
        lines, walks = [], []
        for run_id in run_ids:
            began, one, last = time.monotonic(), models.opened(root, run_id, "diffusion"), None
            chosen = (label, other) if what == "classes" else (label, label)
            ends = tuple(models.class_index(one.model, name) for name in chosen)
            first, second = (one.model.class_names[i] for i in ends)
            if what == "classes":
                between = f"from {first} to {second}, seed {seed}"
                draw, arguments = interpolate.classes, (ends, seed)
            else:
                between = f"{first}, from seed {seed} to seed {other_seed}"
                draw, arguments = interpolate.noises, (ends[0], (seed, other_seed))
            with closing(draw(one.model, *arguments, frames, kind, **how)) as stream:
                for last in until_stopped(stream):
                    done[run_id] = _forming(one, last, between, kind, time.monotonic() - began)
                    yield {tab.shown: cards.cards(list(done.values()))}
            walks.append(primitives.tile(last.images, columns=25, scale=1))
            given = f"model, *{arguments}, {frames}, {kind!r}, **{how}"
            lines += [f"model = vfmlab.load_diffusion({run_id!r}, {str(root)!r})",
                      f"*_, last = interpolate.{draw.__name__}({given})"]
            if stopped():
                done[run_id] = _forming(one, last, between, kind, time.monotonic() - began, True)
                break
        state = {"runs": run_ids, "what": what, "label": str(label), "other": str(other), "seed": seed,
                 "other_seed": other_seed, "kind": kind, "frames": frames, "steps": steps, "scale": scale}
        code = ["import vfmlab", "from vfmlab.studies import interpolate", "", *lines]
        shared = share.outputs("interpolate_samples", state, code, cards.stack(walks))
        yield cards.cards(list(done.values())), *shared

    def classes(run_ids: list[str] | None, *chosen: Any):
        run_id = run_ids[0] if isinstance(run_ids, list) and run_ids else None
        names = models.class_names(root, run_id)
        firsts = [names[i % len(names)] if names else None for i in (0, 1)]
        return [gr.update(choices=names, value=one if models.fits(root, run_id, one, names) else first)
                for one, first in zip(chosen, firsts, strict=True)]

    runs.change(classes, [runs, label, other], [label, other], **LIGHT)
    fields = [runs, what, label, other, seed, other_seed, kind, frames, steps, scale]
    free = ("label", "other")
    return share.connect("interpolate_samples", interpolate_samples, tab, fields, free=free)


def _card(one: models.Shown, walk: interpolate.Walk, facts: str) -> str:
    values = {"path length": walk.length, "roughness": walk.roughness}
    lines = [(name, f"{value:.2f}") for name, value in values.items() if value is not None]
    figures = [cards.strip(walk.frames, f"{len(walk.frames)} frames"), *cards.moving(walk.frames)]
    return one.card(figures, facts, lines, full=True)


def _forming(one: models.Shown, preview: api.Preview, between: str, kind: str, seconds: float,
             early: bool = False) -> str:
    figures = [cards.strip(preview.images, f"{between}: {cards.state(preview, early)}")]
    figures += cards.moving(preview.images) if preview.final or early else []
    n, _, px, _ = preview.images.shape
    return one.card(figures, f"{kind}; {px} px, N = {n} frames, EMA weights, {seconds:.1f} s", full=True)
