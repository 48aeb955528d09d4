"""What presets cost beside what GPUs can do at most: images a second and hours, from `vfmlab plan`.

Expected figures, all of them: FLOPs are counted, the peak is a data sheet's, and the share of it that is
reached is assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vfmlab.config import Recipe
from vfmlab.plots.primitives import Table
from vfmlab.studies.page import Page
from vfmlab.training.price import IMAGENET, PEAK, price

MEMORY = {"A100": 80e9, "H100": 80e9, "H200": 141e9}  # bytes, of the large variants: the vendors' data sheets
LEAD = """Computed, not measured: the FLOPs of one training step (matrix products, convolutions and
attention; a multiply-add is two), over the dense bf16 peak of a GPU. "At most" is 100 % of that peak, the
physical limit. The other figures take {mfu:.0%} of it, an assumption: what a run reaches (MFU) is
measured on one's own machine by `vfmlab plan PRESET --measure`; on an H200 LightningDiT-XL reached 17 %
without `train.compile` ([steps on a GPU](results/gpu_steps.md)). H100 and H200 have the same peak and
differ in memory."""


def steps(plans: Iterable[tuple[Recipe, Mapping[str, Any]]], mfu: float) -> list[dict[str, Any]]:
    """A row for each phase that trains: its step, its memory, and images a second on one GPU. A phase that
    several presets share has one row."""
    rows = {}
    for recipe, plan in plans:
        for phase in plan["phases"]:
            if not phase["steps"]:
                continue
            flops, memory = phase["flops"]["step_per_image"], phase["memory"]
            fixed, image = memory["total"] - memory["activations"], phase["activations_per_image"]
            row = {"preset": recipe.name, "phase": phase["phase"], "batch": phase["batch"],
                   "trains, M": f"{phase['trained'] / 1e6:,.0f}", "GFLOP an image": f"{flops / 1e9:,.0f}",
                   "GB but for images": f"{fixed / 1e9:.1f}", "GB an image": f"{image / 1e9:.2f}",
                   "at a time, 80 / 141 GB": " / ".join(_fits(fixed, image, MEMORY[gpu])
                                                        for gpu in ("H100", "H200"))}
            for gpu in ("A100", "H100"):
                most = PEAK[gpu] / flops
                row[f"{gpu}: images/s at most"] = _round(most)
                row[f"{gpu}: at {mfu:.0%}"] = _round(mfu * most)
            rows.setdefault(phase["id"], row | {"run": phase["id"].rpartition("-")[2]})
    return list(rows.values())


def wholes(plans: Iterable[tuple[Recipe, Mapping[str, Any]]], gpus: int, mfu: float) -> list[dict[str, Any]]:
    """A row for each preset: hours of all that it trains with the latents, and of its evaluation."""
    rows = []
    for recipe, plan in plans:
        n = recipe.protocol.n
        work = price(plan, n, recipe.data.train or IMAGENET, gpus, mfu)["rows"][:-1]
        samples = sum(row["flops"] for row in work if row["what"].endswith("samples"))
        training = sum(row["flops"] for row in work) - samples
        coder = [phase["flops"] for phase in plan["phases"] if phase["kind"] == "tokenizer"][-1]
        encode, decode = coder.get("vfm", 0) + coder.get("encode", 0), coder.get("decode", 0)
        drawn = any(phase["kind"] != "tokenizer" for phase in plan["phases"])
        open_ = drawn and not samples
        measure = samples + n * (encode + decode * (2 if drawn else 1))
        row = {"preset": recipe.name, "training, EFLOP": f"{training / 1e18:,.0f}"}
        for gpu in ("A100", "H100"):
            hours = training / PEAK[gpu] / gpus / 3600
            row[f"{gpus} {gpu}: hours at most"] = _round(hours)
            row[f"{gpus} {gpu}: at {mfu:.0%}"] = _round(hours / mfu)
        row[f"evaluation of {n:,}, PFLOP"] = "–" if open_ else f"{measure / 1e15:,.0f}"
        row[f"hours on {gpus} H100 at {mfu:.0%}"] = (
            "–" if open_ else _round(measure / PEAK["H100"] / gpus / mfu / 3600))
        rows.append(row)
    return rows


def page(plans: list[tuple[Recipe, Mapping[str, Any]]], gpus: int, mfu: float, command: str) -> Page:
    """Both tables. The page `docs/throughput.md` has those of the tier `paper`."""
    document = Page("Throughput expected", lead=LEAD.format(mfu=mfu).replace("\n", " "), command=command)
    document.add("GPUs", "", Table([{"GPU": gpu, "dense bf16, TFLOP/s": round(PEAK[gpu] / 1e12),
                                  "memory, GB": round(MEMORY[gpu] / 1e9)} for gpu in MEMORY]))
    document.add("A training step, one GPU",
              "But for images: parameters that train, with gradients, average and AdamW's moments, and "
              "frozen ones, in fp32. An image: what autograd stores, by shapes; kernels' own memory and "
              "the allocator's slack come on top, so fewer fit than the column says. 0: not even one "
              "([shares](scale.md#networks-that-do-not-fit-one-gpu)). A last column names the run, so that "
              "a page of other settings is noticed.", Table(steps(plans, mfu)))
    document.add("The whole preset",
              "Training: all phases, and the latents of the data set where they are cached. Evaluation: as "
              "many samples as the protocol draws, by its solver and guidance, decoded, and as many images "
              "reconstructed; the judge's own network is left out, and a decoder that draws in several steps "
              "counts as in a training step. An autoregressive generator reads all of its weights for every "
              "token, so that its samples come nowhere near a limit of FLOPs.",
              Table(wholes(plans, gpus, mfu)))
    return document


def _fits(fixed: float, image: float, memory: float) -> str:
    return f"{max(0, int((memory - fixed) // image)):,}"


def _round(value: float) -> str:
    return "< 0.01" if value < 0.01 else f"{value:.2g}" if value < 10 else f"{value:,.0f}"
