"""Hours that a plan takes on named GPUs: its FLOPs over the peak rate times a stated utilisation.

Utilisation (MFU) is what a run reaches of the peak. It is an assumption here, said beside each price; a step
that was measured with `--measure` tells what it really is on one's own machine.
"""

from __future__ import annotations

from typing import Any

from vfmlab.errors import ConfigError

# Dense bf16 (no sparsity), FLOP/s, from the vendors' data sheets.
PEAK = {"RTX 4090": 165e12, "A100": 312e12, "L40S": 362e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
MFU, GPUS = 0.35, 8
IMAGENET = 1_281_167  # images of a data set of unknown size


def check(gpus: int, mfu: float) -> None:
    """ConfigError where nothing can be priced: no GPU, or a share outside (0, 1]."""
    if gpus < 1 or not 0 < mfu <= 1:
        raise ConfigError(f"gpus = {gpus}, mfu = {mfu:g}: give at least one GPU, and a share of its peak "
                          "above 0 and up to 1")


def price(costs: dict[str, Any], n: int, images: int, gpus: int = GPUS, mfu: float = MFU) -> dict[str, Any]:
    """What :func:`~vfmlab.training.plan.plan` found, in hours on `gpus` GPUs of each kind in `PEAK`.

    Args:
        n: samples of the protocol. images: of the data, which a generator's cache encodes once. gpus, mfu:
            how many, and the share of their peak that is reached.

    Returns:
        "rows": of each phase its training, the latent cache and the samples where it is a generator's, then
        their sum: "what", "flops", "hours" (GPU -> hours). Work that the plan has no FLOPs of is left out.

    Raises:
        ConfigError: as :func:`check`.
    """
    check(gpus, mfu)
    work: list[tuple[str, float]] = []
    encode = 0
    for phase in costs["phases"]:
        flops = phase["flops"]
        if phase["kind"] == "tokenizer":
            encode = flops.get("vfm", 0) + flops.get("encode", 0)
        elif phase["cached"]:
            what = f"{phase['phase']}: latents of {images:,} images"
            work.append((what, encode * images * phase["views"]))  # mirrored copies, crops
        if phase["total_flops"]:
            work.append((f"{phase['phase']}: training", phase["total_flops"]))
        if "sampling_flops" in phase:
            work.append((f"{phase['phase']}: {n:,} samples", phase["sampling_flops"] * n))
    work.append(("in all", sum(flops for _, flops in work)))
    rows = [{"what": what, "flops": flops,
             "hours": {name: flops / (peak * mfu * gpus) / 3600 for name, peak in PEAK.items()}}
            for what, flops in work]
    return {"gpus": gpus, "mfu": mfu, "peak": PEAK, "rows": rows}


def table(priced: dict[str, Any]) -> str:
    """The prices as text."""
    width = max(len(row["what"]) for row in priced["rows"])
    many = "GPU" if priced["gpus"] == 1 else "GPUs"
    lines = [f"hours on {priced['gpus']} {many} at {priced['mfu']:.0%} of their dense bf16 peak (assumed, "
             "not measured; no evaluation but the samples)",
             "  " + " " * width + "".join(f"{name:>10}" for name in priced["peak"])]
    for row in priced["rows"]:
        hours = "".join(f"{_hours(row['hours'][name]):>10}" for name in priced["peak"])
        lines.append(f"  {row['what']:<{width}}{hours}")
    return "\n".join(lines)


def _hours(value: float) -> str:
    return "< 0.01" if value < 0.01 else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
