"""Tab: the same image through several tokenizers, side by side; whole, rounded or noised."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gradio as gr

from apps import cards, models, pictures, share
from apps.common import COMPUTE, told, whole
from apps.common import number as checked_number
from vfmlab.studies import explore

NAMES = {"psnr": ("PSNR", "{:.2f} dB"), "ssim": ("SSIM", "{:.3f}"), "lpips": ("LPIPS", "{:.3f}"), "feature_distance": ("feature distance", "{:.2g}")}


def build(root: Path, examples: list[str]) -> share.Tab:
    """Lay the tab out. root: folder of runs. examples: image files offered to people who bring none."""
    ids = models.finished(root, "tokenizer")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = pictures.picture("picture", examples, height=240, value=examples[0])
            gr.Examples(examples, image, label="held-out images of the newest run", cache_examples=False)
            runs = gr.Dropdown(ids, value=ids[:2], multiselect=True, allow_custom_value=True, label="tokenizers", max_choices=models.MOST_RUNS)
            with gr.Accordion("Disturb the latent", open=False):
                sigma = gr.Slider(0, 2, 0, step=0.05, label="noise (standard deviations of the latent)")
                seed = gr.Number(0, label="seed of the noise", precision=0, minimum=0, maximum=2**31 - 1)
                bits = gr.Slider(0, 8, 0, step=1, label="bits per value (0: not rounded)")
                keep = gr.Slider(0, 64, 0, step=1, label="principal channels kept (0: all)")
            layers = gr.Checkbox(True, label="show what the VFM's layers see")
            with gr.Row():
                go = gr.Button("reconstruct", variant="primary", min_width=120)
                stop = gr.Button("stop", min_width=80)
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(label="results")
            told_as = share.panel()

    def state_of(*values: Any) -> dict[str, Any]:
        image, runs, sigma, seed, bits, keep, layers = values
        found = {"image": box.name_of(image), "runs": runs, "sigma": sigma, "seed": seed, "bits": bits, "keep": keep, "layers": layers}
        return {k: v for k, v in found.items() if v is not None}

    box = image

    @told
    def reconstruct(image: str | None, runs: list[str], sigma: float, seed: int, bits: int, keep: int, layers: bool):
        """An image through tokenizers and back: cards with both images, error map, latent, PSNR, SSIM, LPIPS or feature distance.

        runs: ids of tokenizer runs. sigma: noise on the latent, in its standard deviations, drawn from seed. bits: of each value (0: not
        rounded). keep: principal channels (0: all). Returns HTML, a link, Python lines, and the state with all numbers as JSON.
        """
        path, run_ids = pictures.given(image), models.several(root, runs, "tokenizer")
        how = explore.Disturbance(
            checked_number(sigma, 0, 2, "noise"), whole(keep, 0, 64, "channels kept") or None, whole(bits, 0, 8, "bits") or None, whole(seed, 0, 2**31 - 1, "seed")
        )
        parts, depths, numbers, seen = [], [], {}, set()
        for run_id in run_ids:
            began = time.monotonic()
            tokenizer = models.tokenizer(root, run_id)
            c, h, w = tokenizer.latent_shape
            mine = explore.Disturbance(how.sigma, how.keep if (how.keep or c) < c else None, how.bits, how.seed)
            made = explore.reconstruct(tokenizer, [path], mine, models.bank(root, run_id) if mine.rounds else None)
            numbers[run_id] = {name: values[0] for name, values in made.metrics.items()}
            lines = [(NAMES[k][0], NAMES[k][1].format(v)) for k, v in numbers[run_id].items()]
            if "lpips" in made.missing:
                lines.append(("LPIPS", "no weights here" if tokenizer.size >= 32 else "needs 32 px"))
            facts = f"latent {c} x {h} x {w}, {_words(mine)}; N = 1, EMA weights, 8-bit pixels, {time.monotonic() - began:.1f} s"
            method = models.method(root, run_id, "tokenizer")
            parts.append(cards.card(run_id, method, [
                cards.before_after(made.target, made.images, run_id), cards.figure(made.error(), "error x 4"), cards.figure(made.latent_map(), "latent, PCA as colours"),
            ], lines, facts))  # fmt: skip
            if layers and tokenizer.vfm is not None and tokenizer.vfm.fingerprint not in seen:
                seen.add(tokenizer.vfm.fingerprint)
                maps = explore.colours(explore.layer_maps(tokenizer.vfm, made.target), tokenizer.size)
                figures = [cards.figure(made.target, "image"), *(cards.figure(m, name) for name, m in maps.items())]
                facts = f"principal components of each layer as colours; read by {run_id}; N = 1"
                depths.append(cards.card(f"what the VFM '{tokenizer.vfm.facts.name}' sees", None, figures, (), facts))
            yield cards.cards(parts + depths), *(gr.skip() for _ in told_as)
        state = state_of(image, run_ids, how.sigma, how.seed, how.bits or 0, how.keep or 0, bool(layers))
        yield cards.cards(parts + depths), *share.tell("reconstruct", {**state, "numbers": numbers}, _code(root, run_ids[0], how))

    inputs = [image, runs, sigma, seed, bits, keep, layers]
    started = go.click(reconstruct, inputs, [shown, *told_as], api_name="reconstruct", **COMPUTE)
    stop.click(None, None, None, cancels=[started], api_visibility="private")
    fields = {"image": image, "runs": runs, "sigma": sigma, "seed": seed, "bits": bits, "keep": keep, "layers": layers}
    return share.Tab("reconstruct", fields, lambda: {"runs": models.finished(root, "tokenizer")})


def _words(how: explore.Disturbance) -> str:
    words = [f"noise {how.sigma:g}"] if how.sigma else []
    words += [f"{how.bits} bits a value"] if how.bits else []
    words += [f"{how.keep} principal channels"] if how.keep else []
    return ", ".join(words) or "undisturbed"


def _code(root: Path, run_id: str, how: explore.Disturbance) -> str:
    bank = "\nbank = explore.bank(tokenizer, vfmlab.runs.open_run(RUN, ROOT).config().data, 400)" if how.rounds else ""
    asked = f", explore.{how}{', bank' if how.rounds else ''}" if _words(how) != "undisturbed" else ""
    return (
        f"import vfmlab\nfrom vfmlab.studies import explore\n\nRUN, ROOT = {run_id!r}, {root.name!r}\ntokenizer = vfmlab.load_tokenizer(RUN, ROOT){bank}\n"
        f"made = explore.reconstruct(tokenizer, ['picture.png']{asked})\nprint(made.metrics)  # made.images, made.error(), made.latent_map()"
    )


