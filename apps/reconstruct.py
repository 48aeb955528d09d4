"""Tab: one image through several tokenizers, side by side; whole, rounded or noised; one against another."""

from __future__ import annotations

import time
from itertools import combinations
from pathlib import Path

import gradio as gr

from apps import cards, models, pictures, share
from apps.common import SEED
from apps.page import stopped
from vfmlab.plots import primitives
from vfmlab.studies import explore

UNITS = {"psnr": "{:.2f} dB", "ssim": "{:.3f}", "lpips": "{:.3f}", "feature_distance": "{:.2g}"}


def build(root: Path, examples: list[str], whose: str) -> share.Tab:
    """Lay the tab out. root: folder of runs. examples: image files for people who bring none, and `whose`."""
    with share.columns("reconstruct") as tab:
        image = pictures.picture("picture", examples, height=200, value=examples[0])
        gr.Examples(examples, image, label=whose, cache_examples=False)
        runs = models.dropdown(root, ("tokenizer",), "tokenizers", most=models.MOST_RUNS)
        with gr.Accordion("Disturb the latent", open=False):
            sigma = gr.Slider(0, 2, 0, step=0.05, label="noise (standard deviations of the latent)")
            seed = gr.Number(0, label="seed of the noise", precision=0, minimum=0, maximum=SEED)
            bits = gr.Slider(0, 8, 0, step=1, label="bits per value (0: not rounded)")
            channels = gr.Slider(0, 64, 0, step=1, label="principal channels (0: all)")
        layers = gr.Checkbox(True, label="show the layers of the VFM")

    def reconstruct(image: str | None, runs: list[str], sigma: float, seed: int, bits: int, channels: int,
                    layers: bool):
        """An image through tokenizers and back: cards with both images, error map, latent, PSNR, SSIM, LPIPS.

        runs: ids of tokenizer runs. sigma: noise on the latent, in its standard deviations, drawn from seed.
        bits: of each value (0: not rounded). channels: principal channels (0: all). Returns HTML, a PNG, a
        link, Python lines, and the state with all numbers as JSON.
        """
        path, run_ids = pictures.given(image), models.several(root, runs, "tokenizer")
        parts, depths, numbers, done, vfms, taken = [], [], {}, {}, set(), []
        for run_id in run_ids:
            if stopped():
                break
            began, one = time.monotonic(), models.opened(root, run_id, "tokenizer")
            tokenizer, name = one.model, one.name
            c, h, w = tokenizer.map_shape
            taken.append(channels if 0 < channels < c else None)
            how = explore.Disturbance(sigma, taken[-1], bits or None, seed)
            bank = models.bank(root, run_id) if how.rounds else None
            result = explore.reconstruct(tokenizer, [path], how, bank)
            numbers[run_id] = {metric: values[0] for metric, values in result.metrics.items()}
            px = f"{tokenizer.size} px"
            lines = [(k.replace("_", " "), UNITS[k].format(v)) for k, v in numbers[run_id].items()]
            lines = [(k.upper() if len(k) < 6 else k, f"{v} at {px}" if k == "psnr" else v) for k, v in lines]
            if "lpips" in result.missing:
                lines.append(("LPIPS", "no weights here" if tokenizer.size >= 32 else "needs 32 px"))
            seconds = f"{time.monotonic() - began:.1f} s"
            weights = f"N = 1, EMA weights, 8-bit pixels, {seconds}"
            facts = f"{px}, latent {c} x {h} x {w}, {_words(how)}; {weights}"
            figures = [cards.before_after(result.target, result.images, "original", name),
                       cards.figure(result.error(), "error x 4"),
                       cards.figure(result.latent_map(), "latent, PCA as colours")]
            parts.append(one.card(figures, facts, lines))
            done[run_id] = (name, result)
            if layers and tokenizer.vfm is not None and tokenizer.vfm.fingerprint not in vfms:
                vfms.add(tokenizer.vfm.fingerprint)
                maps = explore.colours(explore.layer_maps(tokenizer.vfm, result.target), tokenizer.size)
                figures = [cards.figure(x, layer) for layer, x in {"image": result.target, **maps}.items()]
                facts = f"principal components of each layer as colours; read by {name}; N = 1"
                title = f"layers of the VFM '{tokenizer.vfm.facts.name}'"
                depths.append(cards.card(title, None, figures, (), facts))
            yield {tab.shown: cards.cards(parts + depths, True)}
        parts += [*_against(list(done.values())), *cards.early(len(done), len(run_ids))]
        state = {"runs": run_ids, "sigma": sigma, "seed": seed, "bits": bits, "channels": channels}
        state |= {"layers": layers, "numbers": numbers} | pictures.named(examples, image=image)
        pairs = [x for _, result in done.values() for x in (result.target, result.images)]
        sheet = cards.stack([primitives.tile(x, scale=1) for x in pairs])
        bank = f"explore.bank(tokenizer, vfmlab.runs.open_run(RUN, ROOT).config().data, {models.BANK})"
        taken = next(iter(taken), None)  # by the first run, which the lines are about
        how = f"sigma={sigma}, channels={taken}, bits={bits or None}, seed={seed}"
        code = [
            "import vfmlab", "from vfmlab.studies import explore", "",
            f"RUN, ROOT = {run_ids[0]!r}, {str(root)!r}", "tokenizer = vfmlab.load_tokenizer(RUN, ROOT)",
            f"bank = {bank if taken or bits else None}", f"how = explore.Disturbance({how})",
            "result = explore.reconstruct(tokenizer, ['picture.png'], how, bank)",
            "print(result.metrics)  # result.images, result.error(), result.latent_map()",
        ]  # fmt: skip
        shared = share.outputs("reconstruct", state, code, sheet)
        yield cards.cards(parts + depths, True), *shared

    fields = [image, runs, sigma, seed, bits, channels, layers]
    return share.connect("reconstruct", reconstruct, tab, fields)


def _against(results: list[tuple[str, explore.Rebuilt]]) -> list[str]:
    """A card for each of the first pairs: one reconstruction against the other."""
    parts = []
    for (a, first), (b, second) in list(combinations(results, 2))[:3]:
        if first.images.shape == second.images.shape:
            figures = [cards.before_after(first.images, second.images, a, b),
                       cards.figure(primitives.error_map(first.images, second.images), "difference x 4")]
            facts = f"both at {first.images.shape[-1]} px"
            parts.append(cards.card(f"{a} against {b}", None, figures, (), facts))
    return parts


def _words(how: explore.Disturbance) -> str:
    words = [f"noise {how.sigma:g}"] if how.sigma else []
    words += [f"{how.bits} bits a value"] if how.bits else []
    words += [f"{how.channels} principal channels"] if how.channels else []
    return ", ".join(words) or "undisturbed"
