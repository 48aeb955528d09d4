"""Decoder ablations: rows, their numbers beside the paper's, and rate against distortion."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from vfmlab import api, data
from vfmlab.evaluation.frechet import FeatureSet, frechet_distance
from vfmlab.evaluation.number import quantity
from vfmlab.evaluation.pixels import psnr
from vfmlab.evaluation.protocol import Resolved, exact, open_setup, real_features
from vfmlab.evaluation.roundtrip import as_saved
from vfmlab.plots import primitives
from vfmlab.presets.variants import PAPER_RFID, TABLE, VARIANTS
from vfmlab.runs import finished
from vfmlab.studies import show
from vfmlab.studies.results import Result, cells, labels, means, sizes, spread
from vfmlab.studies.rows import Row, listed, parse

SHOWN = ("psnr", "psnr_mask", "ssim", "lpips", "feature_distance", "rfd", "probe_linear")
RATE_IMAGES = 500

# -- rows of the decoder table ----------------------------------------------------------------------


def study(preset: str, names: str, overrides: str = "{}", seed: int = 0, seeds: int = 1) -> list[Row]:
    """Rows for the variants `names` ("fusion,no_style") of a preset, tokenizers' first stage only.

    `seeds` seeds from `seed` on. A variant that changes nothing beside an earlier one (a matched twin whose
    widths are right already) is left out.
    """
    distinct: dict[str, str] = {}
    for name in listed(names):
        distinct.setdefault(api.resolve(f"{preset}+{name}", overrides).id, f"{name}={preset}+{name}")
    return parse(list(distinct.values()), range(seed, seed + seeds), overrides, "first_stage")


def sizes_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One record per row: what it is, parameters of its decoder and in all, shape of the latent."""
    records = []
    for row in {row.label: row for row in rows}.values():
        facts = sizes(row)
        count = facts["parameters"]
        about = VARIANTS[row.label].about if row.label in VARIANTS else row.run.name
        records.append({"row": row.label, "what it is": about, "decoder parameters": count["decoder"],
                        "all trained": count["trained"], "latent": " x ".join(map(str, facts["latent"]))})
    return records


def reconstructions(rows: Sequence[Row], root: str | Path, n: int = 8) -> go.Figure:
    """The same held-out images through every trained row (first seed), with four-fold error maps."""
    phases = {row.label: row.tokenizers[-1] for row in rows if row.seed == rows[0].seed}
    chosen = {k: api.load_tokenizer(p.id, root) for k, p in phases.items() if finished(p, root)}
    images, _, _ = data.examples(rows[0].run.data, n)
    return show.reconstructions(chosen, images)


def table(results: Sequence[Result]) -> primitives.Table:
    """One line per row: parameters of the decoder, numbers as mean and each seed, seconds of training."""
    lines = []
    for label in labels(results):
        mine = [r for r in results if r.label == label]
        counts = mine[0].parameters
        seconds = [r.seconds["tokenizer"] for r in mine if "tokenizer" in r.seconds]
        numbers = cells(results, label, {key: quantity(key).title for key in SHOWN})
        lines.append({"row": label, "decoder parameters": counts["decoder"], "all trained": counts["trained"],
                      **numbers, "seconds": round(statistics.fmean(seconds)) if seconds else None,
                      "protocol": mine[0].hash})
    return primitives.table(lines)


def steps(results: Sequence[Result], order: Sequence[str] = TABLE) -> list[dict[str, Any]]:
    """The decoder table's rows in `results`: rFD here, rFID in the paper, and the change from the row before.

    Changes are shares of the value before. The two distances have different units; only changes compare.
    """
    here = means(results, "rfd")
    records: list[dict[str, Any]] = []
    for label in (name for name in order if name in here):
        line: dict[str, Any] = {"row": label, "rFID in the paper": PAPER_RFID[label]}
        line |= {"rFD here": statistics.fmean(here[label]), "each seed": here[label]}
        if records:
            before = records[-1]
            line["change in the paper"] = line["rFID in the paper"] / before["rFID in the paper"] - 1
            line["change here"] = line["rFD here"] / before["rFD here"] - 1
        records.append(line)
    return records


def paper_beside(results: Sequence[Result]) -> primitives.Table:
    """:func:`steps` as a table."""
    lines = []
    for step in steps(results):
        shown = spread(step.pop("each seed"))
        changes = {k: f"{100 * v:+.0f} %" for k, v in step.items() if k.startswith("change")}
        lines.append({**step, "rFD here": shown, **changes})
    return primitives.table(lines)


# -- rate and distortion ----------------------------------------------------------------------


@functools.cache
def gaussian_step(bits: int) -> float:
    """Step of the uniform quantiser with 2^bits levels of least error for N(0, 1) (Max 1960, table II)."""
    x = torch.linspace(-8, 8, 32_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    density = density / density.sum()

    def error(step: float) -> float:
        return float(((quantise(x, bits, step) - x).square() * density).sum())

    low, high, golden = 1e-3, 3.0, (5**0.5 - 1) / 2
    while high - low > 1e-5:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return (low + high) / 2


def quantise(z: Tensor, bits: int, step: float | None = None) -> Tensor:
    """Normalised latents rounded to the nearest of 2^bits levels, which lie symmetrically around 0."""
    step, half = step or gaussian_step(bits), 2 ** (bits - 1)
    return ((z / step).floor().clamp(-half, half - 1) + 0.5) * step


@torch.no_grad()
def rate_distortion(rows: Sequence[Row], root: str | Path, bits: Sequence[int] = (2, 3, 4, 6, 8),
                    n: int = RATE_IMAGES) -> list[dict[str, Any]]:
    """PSNR and rFD of latents stored with so many bits per value: a record per row and number of bits.

    rate: bits of the latent per pixel, C h w bits / (H W); no entropy coding. Latents are the posterior's
    mean, normalised. Records compare where "protocol" (images, feature space, quantiser) is the same.
    """
    records = []
    for row in rows:
        run = row.run
        tokenizer = api.load_tokenizer(row.tokenizers[-1].id, root)
        device = tokenizer.stat_mean.device
        protocol = exact(run.protocol).model_copy(update={"n": min(n, run.protocol.n), "batch": 50})
        setup = open_setup(run.data, protocol, root, device)
        quantiser = {"quantiser": "uniform, least squared error for N(0, 1)"}
        resolved = Resolved({**setup.resolved().sections, "latents": quantiser})
        real, decoded = real_features(setup), {b: FeatureSet.empty(setup.space.dimension) for b in bits}
        quality: dict[int, list[Tensor]] = {b: [] for b in bits}
        for _, images in setup.images(device):
            z = tokenizer.encode(images).mode()
            for b in bits:
                restored = as_saved(tokenizer.decode(quantise(z, b)))
                quality[b].append(psnr(images, restored))
                decoded[b].update(setup.space(restored).features)
        channels, side, _ = tokenizer.map_shape
        records += [{"row": row.label, "seed": row.seed, "channels": channels, "bits": b,
                     "rate": channels * side**2 * b / run.data.size**2,
                     "psnr": float(torch.cat(quality[b]).mean()),
                     "rfd": frechet_distance(decoded[b], real), "protocol": resolved.hash} for b in bits]
    return records


def rate_table(records: Sequence[Mapping[str, Any]]) -> primitives.Table:
    """One line per width and number of bits: PSNR and rFD as mean and each seed."""
    lines = []
    for label, bits in dict.fromkeys((r["row"], r["bits"]) for r in records):
        mine = [r for r in records if (r["row"], r["bits"]) == (label, bits)]
        numbers = {quantity(k).title: spread([r[k] for r in mine]) for k in ("psnr", "rfd")}
        lines.append({"row": label, "channels": mine[0]["channels"], "bits per value": bits,
                      "bits per pixel": mine[0]["rate"], **numbers})
    return primitives.table(lines)
