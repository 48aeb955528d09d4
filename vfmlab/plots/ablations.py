"""Tables, figures and sentences about decoder ablations: what each row bought here and in the paper, and rate against distortion."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor

from vfmlab import api
from vfmlab.evaluation.frechet import FeatureSet, frechet_distance
from vfmlab.evaluation.instruments.pixels import psnr as psnr_of
from vfmlab.evaluation.number import quantity
from vfmlab.evaluation.protocol import Resolved, open_setup, real_features
from vfmlab.evaluation.roundtrip import as_saved
from vfmlab.plots import figures, primitives
from vfmlab.presets.variants import PAPER_RFID, TABLE, VARIANTS
from vfmlab.runs import finished
from vfmlab.studies.results import Result, labels, means, sizes, spread
from vfmlab.studies.rows import Row

SHOWN = ("psnr", "psnr_mask", "ssim", "lpips", "feature_distance", "rfd", "probe_linear")
RATE_IMAGES = 500

# -- rows of the decoder table ------------------------------------------------------------------------------------------


def study(preset: str, names: str, overrides: str = "{}", seed: int = 0, seeds: int = 1) -> list[Row]:
    """Rows for the variants `names` ("fusion,no_style") of a preset, with `seeds` seeds from `seed` on, tokenizers' first stage only.

    A variant that changes nothing beside an earlier one (a matched twin whose widths are right already) is left out.
    """
    kept: dict[str, str] = {}
    for name in names.split(","):
        kept.setdefault(api.resolve(f"{preset}+{name.strip()}", overrides, seed).id, name.strip())
    rows = [(s, name) for s in range(seed, seed + seeds) for name in kept.values()]
    return [Row(name, s, api.resolve(f"{preset}+{name}", overrides, s), "first_stage") for s, name in rows]


def sizes_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One record per row of a study: what it is, parameters of its decoder and in all, shape of the latent."""
    found = []
    for row in {row.label: row for row in rows}.values():
        facts = sizes(row)
        count = facts["parameters"]
        about = VARIANTS[row.label].about if row.label in VARIANTS else row.run.name
        found.append({"row": row.label, "what it is": about, "decoder parameters": count["decoder"], "all trained": count["trained"],
                      "latent": " x ".join(map(str, facts["latent"]))})  # fmt: skip
    return found


def reconstructions(rows: Sequence[Row], root: str | Path, n: int = 8) -> go.Figure:
    """The same held-out images through every row's tokenizer (first seed), with four-fold error maps."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.label, row)
    chosen = {label: api.load_tokenizer(row.tokenizers[-1].id, root) for label, row in first.items() if finished(row.tokenizers[-1], Path(root))}
    images, _, _ = figures.examples(rows[0].run.data, n)
    return figures.reconstructions(chosen, images)


def table(results: Sequence[Result]) -> primitives.Table:
    """One line per row: parameters of the decoder, numbers as mean and each seed, seconds of training."""
    lines = []
    for label in labels(results):
        mine = [r for r in results if r.label == label]
        counts = mine[0].parameters
        line: dict[str, Any] = {"row": label, "decoder parameters": counts["decoder"], "all trained": counts["trained"]}
        for key in SHOWN:
            if label in (values := means(results, key)):
                line[quantity(key).title] = spread(values[label])
        seconds = [r.seconds["tokenizer"] for r in mine if "tokenizer" in r.seconds]
        lines.append(line | {"seconds": round(statistics.fmean(seconds)) if seconds else None, "protocol": mine[0].hash})
    return primitives.table(lines)


def steps(results: Sequence[Result], order: Sequence[str] = TABLE) -> list[dict[str, Any]]:
    """The decoder table's rows that are in `results`, with rFD here and rFID in the paper, and the change from the row before.

    Changes are shares of the value before (-0.92: it fell by 92 %). The two distances have different units; only changes compare.
    """
    here = means(results, "rfd")
    found: list[dict[str, Any]] = []
    for label in (name for name in order if name in here):
        line: dict[str, Any] = {"row": label, "rFID in the paper": PAPER_RFID[label], "rFD here": statistics.fmean(here[label]), "each seed": here[label]}
        if found:
            before = found[-1]
            line["change in the paper"] = line["rFID in the paper"] / before["rFID in the paper"] - 1
            line["change here"] = line["rFD here"] / before["rFD here"] - 1
        found.append(line)
    return found


def paper_beside(results: Sequence[Result]) -> primitives.Table:
    """:func:`steps` as a table."""
    lines = []
    for step in steps(results):
        line = {**step, "rFD here": spread(step["each seed"])}
        line.pop("each seed")
        lines.append({k: f"{100 * v:+.0f} %" if k.startswith("change") else v for k, v in line.items()})
    return primitives.table(lines)


def bars(results: Sequence[Result], metric: str = "rfd") -> go.Figure:
    """One bar per row with every seed as a dot."""
    values = means(results, metric)
    figure = primitives.bars({k: statistics.fmean(v) for k, v in values.items()}, y=quantity(metric).title)
    names = [k for k, v in values.items() for _ in v]
    dots = {"color": "#1b1f23", "size": 7, "symbol": "circle-open"}
    figure.add_scatter(x=names, y=[x for v in values.values() for x in v], mode="markers", marker=dots, name="each seed", showlegend=False)
    return figure


def finding(results: Sequence[Result]) -> str:
    """What the paper's table says and what these results say, as sentences that follow from the numbers."""
    found = steps(results)
    lines = []
    for before, after in itertools.pairwise(found):
        apart = _apart(before["each seed"], after["each seed"])
        word = "fell" if after["change here"] < 0 else "rose"
        said = f"{before['row']} -> {after['row']}: rFD {word} by {abs(100 * after['change here']):.0f} %"
        lines.append(f"{said} here ({apart}); in the paper rFID fell by {abs(100 * after['change in the paper']):.0f} %.")
    change = {step["row"]: step.get("change here") for step in found}
    fusion, modern = change.get("fusion"), change.get("modern_blocks")
    if fusion is not None and modern is not None:
        verdict = "agrees with" if modern < fusion and fusion < 0 else "does not agree with"
        lines.append(f"Modern blocks {100 * modern:+.0f} %, fusion {100 * fusion:+.0f} %: this {verdict} the paper's 'fusion helps, modern blocks dominate'.")
    best = {k: (max if k == "psnr" else min)(((statistics.fmean(v), n) for n, v in means(results, k).items()), default=None) for k in ("psnr", "rfd")}
    lines += [f"Best {quantity(k).title}: {pair[1]} ({pair[0]:.3g})." for k, pair in best.items() if pair]
    seeds = max((len(step["each seed"]) for step in found), default=0)
    return "\n".join([*lines, f"{seeds} seed{'s' if seeds != 1 else ''} a row: " + ("no spread is known." if seeds < 2 else "read changes against the spread.")])


def _apart(a: Sequence[float], b: Sequence[float]) -> str:
    if min(len(a), len(b)) < 2:
        return "one seed, spread unknown"
    return "seeds do not overlap" if max(a) < min(b) or max(b) < min(a) else "seeds overlap: no difference is shown"


# -- rate and distortion ------------------------------------------------------------------------------------------------


@functools.cache
def gaussian_step(bits: int) -> float:
    """Step of the uniform quantiser with 2^bits levels that has the least squared error for N(0, 1) (Max 1960, table II)."""
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
def rate_distortion(rows: Sequence[Row], root: str | Path, bits: Iterable[int] = (2, 3, 4, 6, 8), n: int = RATE_IMAGES) -> list[dict[str, Any]]:
    """PSNR and rFD when the latent is stored with so many bits per value: one record per row and number of bits.

    rate: bits of the latent per pixel, C h w bits / (H W); no entropy coding. Latents are the posterior's mean, normalised;
    "protocol" is the hash of images, feature space and quantiser, so records of one hash compare.
    """
    records = []
    for row in rows:
        run, levels = row.run, tuple(bits)
        tokenizer = api.load_tokenizer(row.tokenizers[-1].id, root)
        device = tokenizer.stat_mean.device
        protocol = run.protocol.model_copy(update={"n": min(n, run.protocol.n), "batch": 50})
        setup = open_setup(run.data, protocol, root, device)
        resolved = Resolved({**setup.resolved().sections, "latents": {"quantiser": "uniform, least squared error for N(0, 1)"}})
        real, own, psnr = real_features(setup), {b: FeatureSet.empty(setup.space.dimension) for b in levels}, {b: [] for b in levels}
        for _, images in setup.images(device):
            z = tokenizer.encode(images).mode()
            for b in levels:
                restored = as_saved(tokenizer.decode(quantise(z, b)))
                psnr[b].append(psnr_of(images, restored))
                own[b].update(setup.space(restored).features)
        channels, side, _ = tokenizer.latent_shape
        for b in levels:
            records.append({
                "row": row.label, "seed": row.seed, "channels": channels, "bits": b, "rate": channels * side**2 * b / run.data.size**2,
                "psnr": float(torch.cat(psnr[b]).mean()), "rfd": frechet_distance(own[b], real), "protocol": resolved.hash,
            })  # fmt: skip
    return records


def rate_curves(records: Sequence[Mapping[str, Any]]) -> go.Figure:
    """PSNR and rFD against bits per pixel, one line per latent width (mean over seeds), one point per number of bits."""
    parts = []
    for key, log in (("psnr", False), ("rfd", True)):
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for label in dict.fromkeys(r["row"] for r in records):
            by_rate: dict[float, list[float]] = {}
            for r in records:
                if r["row"] == label:
                    by_rate.setdefault(r["rate"], []).append(r[key])
            rates = sorted(by_rate)
            lines[label] = (rates, [statistics.fmean(by_rate[rate]) for rate in rates])
        positive = all(y > 0 for _, ys in lines.values() for y in ys)
        parts.append(primitives.curves(lines, x="bits per pixel of the latent", y=quantity(key).title, title=quantity(key).title, log_y=log and positive))
    return primitives.panels(parts, columns=2)


def rate_table(records: Sequence[Mapping[str, Any]]) -> primitives.Table:
    """One line per width and number of bits: PSNR and rFD as mean and each seed."""
    lines = []
    for label, bits in dict.fromkeys((r["row"], r["bits"]) for r in records):
        mine = [r for r in records if (r["row"], r["bits"]) == (label, bits)]
        numbers = {quantity(k).title: spread([r[k] for r in mine]) for k in ("psnr", "rfd")}
        lines.append({"row": label, "channels": mine[0]["channels"], "bits per value": bits, "bits per pixel": mine[0]["rate"], **numbers})
    return primitives.table(lines)


def rate_finding(records: Sequence[Mapping[str, Any]]) -> str:
    """Which width gives the best PSNR at about the same number of bits, and where more bits per value stop paying."""
    lines = []
    for rate in sorted({r["rate"] for r in records}):
        at = {label: [r["psnr"] for r in records if r["row"] == label and r["rate"] == rate] for label in dict.fromkeys(r["row"] for r in records)}
        at = {label: statistics.fmean(values) for label, values in at.items() if values}
        if len(at) > 1:
            best = max(at, key=at.__getitem__)
            lines.append(f"{rate:.3g} bits per pixel: {best} is best ({', '.join(f'{k} {v:.1f} dB' for k, v in at.items())}).")
    for label in dict.fromkeys(r["row"] for r in records):
        mine = {b: statistics.fmean(r["psnr"] for r in records if r["row"] == label and r["bits"] == b) for b in {r["bits"] for r in records if r["row"] == label}}
        enough = min(b for b, value in mine.items() if value > mine[max(mine)] - 0.1)
        lines.append(f"{label}: {enough} bits per value are within 0.1 dB of {max(mine)} bits.")
    return "\n".join(lines)
