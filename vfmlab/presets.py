"""Presets: functions that return a whole :class:`~vfmlab.config.Run`. A docstring says the command, the cost and what to expect.

Four tiers, same code: `tiny` (automated tests, seconds), `pocket` (two CPU cores, minutes, nothing downloaded), `small` (one
GPU, hours), `paper` (ImageNet 256, the published sizes and schedules). What a paper does not state is marked "ours".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vfmlab.config import Run, parse
from vfmlab.errors import ConfigError, nearest

TABLE: dict[str, Callable[[], Run]] = {}


def preset(function: Callable[[], Run]) -> Callable[[], Run]:
    """File a preset under its function's name."""
    TABLE[function.__name__] = function
    return function


def names() -> list[str]:
    return list(TABLE)


def get(name: str) -> Run:
    """The run called `name`; :class:`ConfigError` with the nearest known name otherwise."""
    if name not in TABLE:
        raise ConfigError(f"unknown preset '{name}'{nearest(name, TABLE)}")
    return TABLE[name]()


def summary(name: str) -> str:
    """First line of the preset's docstring."""
    return (TABLE[name].__doc__ or "").strip().splitlines()[0]


# -- shared parts -----------------------------------------------------------------------------------------------------

#          images                                    tokenizer phase                      diffusion phase
# tier     source          size  train    val    f  d   samples      batch lr        samples      batch lr      evaluation
# tiny     scenes:easy     16    64       32     4  4   64           8     2e-3      64           8     2e-3    32, 4 steps
# pocket   scenes:medium   32    20 000   1000   4  8   15 360       32    2e-3      76 800       64    1e-3    1000, 20 steps
# small    parquet:cifar10 32    50 000   10000  4  16  5 000 000    256   2e-4      20 000 000   256   2e-4    10 000, 50 steps
# paper    folder:imagenet 256   1.28 M   50000  16 32  20 000 000   512   1e-4      82 000 000   1024  2e-4    50 000, 250 steps

TINY_DECODER = {
    "kind": "progressive", "blocks": 2, "channel_base": 4096, "channel_max": 16, "num_res_blocks": 0, "decompress_factor": 4, "style_width": 16,
    "fusion_blocks": [0, 1], "fusion_widths": [16, 8], "attention_blocks": [0], "attention_depths": [1], "heads": 2, "gelu": "erf", "kernels": [3],
    "activation": "silu", "expansion": 2,
}
# Widths 64, 32, 16 at 8, 16, 32 px. The published layer scale of 1e-5 needs more steps than a pocket run has.
POCKET_DECODER = {
    "kind": "progressive", "blocks": 3, "channel_base": 4096, "channel_max": 64, "num_res_blocks": 1, "res_layers": [2, 1, 0], "decompress_factor": 8,
    "gelu": "erf", "kernels": [5], "taps": [3], "expansion": 2, "layer_scale": 0.1, "fusion_blocks": [0, 1, 2], "fusion_widths": [48, 24, 12],
    "style_width": 64, "attention_blocks": [0], "attention_depths": [1], "heads": 4,
}


def _tiny() -> dict[str, Any]:
    return {
        "tier": "tiny",
        "data": {"source": "scenes:easy", "size": 16, "train": 64, "val": 32},
        "train": {"samples": 64, "batch": 8, "lr": 2e-3, "ema_halflife": 32, "log_every": 8, "preview_every": 32, "checkpoint_every": 32},
        "diffusion": {
            "network": {"kind": "lightningdit", "width": 32, "depth": 2, "heads": 2, "patch": 2},
            "train": {
                "samples": 64, "batch": 8, "lr": 2e-3, "ema_halflife": 32, "log_every": 8, "preview_every": 32, "checkpoint_every": 32,
                "evaluate_at": [32, 64],
            },
        },
        "protocol": {"n": 32, "sampler": {"steps": 4}, "batch": 32},
    }


def _pocket() -> dict[str, Any]:
    return {
        "tier": "pocket",
        "data": {"source": "scenes:medium", "size": 32, "train": 20_000, "val": 1000},
        "train": {
            "samples": 15_360, "batch": 32, "lr": 2e-3, "schedule": "cosine", "warmup": 640, "ema_halflife": 1600, "log_every": 320,
            "preview_every": 3840, "checkpoint_every": 3840,
        },
        "diffusion": {
            "network": {"kind": "lightningdit", "width": 128, "depth": 4, "heads": 4, "patch": 2, "rmsnorm": False},
            "train": {
                "samples": 76_800, "batch": 64, "lr": 1e-3, "warmup": 3200, "ema_halflife": 6400, "log_every": 1280, "preview_every": 25_600,
                "checkpoint_every": 12_800, "evaluate_at": [25_600, 51_200, 76_800],
            },
        },
        "protocol": {"n": 1000, "sampler": {"steps": 20}},
    }


def _small() -> dict[str, Any]:
    schedule = {"log_every": 12_800, "preview_every": 256_000, "checkpoint_every": 256_000}
    return {
        "tier": "small",
        "data": {"source": "parquet:data/cifar10", "size": 32, "val": 10_000, "flip": True},
        "train": {"samples": 5_000_000, "batch": 256, "lr": 4e-4, "schedule": "cosine", "warmup": 50_000, "ema_halflife": 50_000, **schedule},
        "diffusion": {
            "network": {"kind": "lightningdit", "size": "S", "patch": 1},
            "train": {
                "samples": 20_000_000, "batch": 256, "lr": 2e-4, "betas": [0.9, 0.95], "warmup": 50_000, "ema_halflife": 500_000,
                "evaluate_at": [1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000], **schedule,
            },
        },
        "protocol": {"n": 10_000, "batch": 500, "sampler": {"steps": 50}, "features": "inception"},
    }


def _paper() -> dict[str, Any]:
    # Diffusion: LightningDiT-XL/1, 64 epochs; sampling with 250 Euler steps and shift 0.3 in the release's time (1 / 0.3 in ours).
    return {
        "tier": "paper",
        "data": {"source": "folder:data/imagenet", "size": 256, "val": 50_000, "flip": True, "workers": 8},
        "train": {
            "samples": 20_000_000, "batch": 512, "optimizer": "adam", "lr": 1e-4, "betas": [0.0, 0.99], "ema_halflife": 160_000,
            "log_every": 51_200, "preview_every": 512_000, "checkpoint_every": 512_000,
        },
        "diffusion": {
            "network": {"kind": "lightningdit", "size": "XL", "patch": 1},
            "cosine_loss": 1.0,
            "train": {
                "samples": 81_995_000, "batch": 1024, "lr": 2e-4, "betas": [0.9, 0.95], "ema_halflife": 7_000_000, "log_every": 102_400,
                "preview_every": 5_120_000, "checkpoint_every": 2_560_000,
            },
        },
        "protocol": {"n": 50_000, "batch": 64, "sampler": {"steps": 250, "shift": 1 / 0.3}, "features": "inception"},
    }


def _run(name: str, base: dict[str, Any], **changes: Any) -> Run:
    return parse({"name": name, **base, **changes}, f"preset {name}")


def _vae(base: dict[str, Any], channels: int, factor: int, **more: Any) -> dict[str, Any]:
    return base | {"tokenizer": {"channels": channels, "factor": factor, **more}}


# -- tiny: automated tests --------------------------------------------------------------------------------------------

TINY_LOSSES = {"l1": 1.0, "kl": 1e-6, "multiscale": 0.1}


@preset
def tiny_vfm_vae() -> Run:
    """VFM-VAE on the bundled pocket VFM, 16 px, a few dozen images: does it all run?

    `vfmlab train tiny_vfm_vae` takes seconds on one core; the pictures are noise.
    """
    tokenizer = {"method": "vfm_vae", "channels": 4, "factor": 4, "widths": [16], "gelu": "erf", "decoder": TINY_DECODER}
    losses = TINY_LOSSES | {"vf": {"weight": 0.3}}
    return _run("tiny_vfm_vae", _tiny(), vfm={"name": "pocket"}, tokenizer=tokenizer, losses=losses,
                equivariance={"p_latent": 0.25, "p_prior": 0.25, "scales": [0.5, 1.0]})  # fmt: skip


@preset
def tiny_plain_vae() -> Run:
    """Plain convolutional VAE, 16 px, a few dozen images: does it all run?

    `vfmlab train tiny_plain_vae` takes seconds on one core; the pictures are noise.
    """
    tokenizer = {"method": "plain_vae", "channels": 4, "factor": 4, "width": 8, "multipliers": [1, 1, 2], "blocks": 1, "attention": [],
                 "decoder": TINY_DECODER}  # fmt: skip
    return _run("tiny_plain_vae", _tiny(), tokenizer=tokenizer, losses=TINY_LOSSES)


# -- pocket: two CPU cores, minutes, offline --------------------------------------------------------------------------

# One decoder, one set of pixel losses and the same linear start for every tokenizer, so that encoders are what is compared.
POCKET_LOSSES = {"l1": 1.0, "l2": 1.0, "kl": 1e-6, "multiscale": {"weight": 0.1, "until": 7680}}
POCKET_CONV = {"width": 32, "multipliers": [1, 3], "blocks": 1, "attention": [], "middle": False, "middle_attention": False, "patch": 2}


@preset
def pocket_vfm_vae() -> Run:
    """VFM-VAE on the frozen pocket VFM (f4d8), then a small LightningDiT: the demo's pipeline.

    `vfmlab train pocket_vfm_vae`: about six minutes on one core; see docs/comparison.md for what to expect.
    """
    # 1x1 projections, the paper's second option: attention projections took a third of the step here.
    tokenizer = {"method": "vfm_vae", "widths": [32], "projection": "conv", "linear_start": True, "decoder": POCKET_DECODER}
    return _run("pocket_vfm_vae", _vae(_pocket(), 8, 4, **tokenizer), vfm={"name": "pocket"},
                losses=POCKET_LOSSES | {"vf": {"weight": 0.3, "adaptive": False}})  # fmt: skip


@preset
def pocket_plain_vae() -> Run:
    """Plain convolutional VAE (f4d8) with the decoder, losses and budget of pocket_vfm_vae, then the same DiT: the baseline.

    `vfmlab train pocket_plain_vae`: about six minutes on one core; see docs/comparison.md for what to expect.
    """
    tokenizer = {"method": "plain_vae", **POCKET_CONV, "linear_start": True, "decoder": POCKET_DECODER}
    return _run("pocket_plain_vae", _vae(_pocket(), 8, 4, **tokenizer), losses=POCKET_LOSSES)


@preset
def pocket_va_vae() -> Run:
    """VA-VAE (f4d8): the plain VAE's network, aligned with the pocket VFM by the VF loss.

    `vfmlab train pocket_va_vae`: about six minutes on one core; see docs/comparison.md for what to expect.
    """
    tokenizer = {"method": "va_vae", **POCKET_CONV, "linear_start": True, "decoder": POCKET_DECODER}
    return _run("pocket_va_vae", _vae(_pocket(), 8, 4, **tokenizer), vfm={"name": "pocket"},
                losses=POCKET_LOSSES | {"vf": {"weight": 0.3, "cos_margin": 0.5, "distance_margin": 0.25, "adaptive": False}})  # fmt: skip


def _pretrain(name: str, objective: str, source: str, seed: int, lr: float, samples: int = 51_200, val: int = 2000) -> Run:
    return parse({
        "name": name, "tier": "pocket", "seed": seed, "data": {"source": source, "size": 32, "train": samples, "val": val},
        "train": {
            "samples": samples, "batch": 64, "lr": lr, "betas": [0.9, 0.99], "weight_decay": 0.05, "schedule": "cosine", "warmup": samples // 20,
            "ema_halflife": samples * 10 // 256, "precision": "fp32", "log_every": samples // 16, "checkpoint_every": samples // 4,
            "evaluate_at": [samples],
        },
        "pretrain": {"objective": objective, "mask": 0.5},
    }, f"preset {name}")  # fmt: skip


@preset
def pocket_vfm() -> Run:
    """Pretraining of the bundled pocket VFM: other shapes' labels and masked reconstruction, never the generator's classes.

    `vfmlab train pocket_vfm`: about six minutes on one core; accuracies in docs/pocket_vfm.md. The weights are shipped: there is no need to run it.
    """
    return _pretrain("pocket_vfm", "factors+mae", "scenes:other", 0, 2e-3)


@preset
def pocket_vfm_leaky() -> Run:
    """Pretraining of the leaky control (VFM `pocket_leaky`): the same, with the generator's own classes as labels.

    `vfmlab train pocket_vfm_leaky`: about six minutes on one core; accuracies in docs/pocket_vfm.md.
    """
    return _pretrain("pocket_vfm_leaky", "leaky", "scenes:hard", 0, 2e-3)


@preset
def pocket_judge() -> Run:
    """Training of the judge whose features the pocket Frechet distances use; with blur, noise and colour changes.

    `vfmlab train pocket_judge`: a few minutes on one core; `--set data.source=folder:PATH` makes one for other images, to be named
    as protocol.features=judge:RUN_DIRECTORY. Accuracies in docs/pocket_vfm.md.
    """
    return _pretrain("pocket_judge", "classify", "scenes:hard", 1, 3e-3, 102_400, 3000)


# -- small: one GPU, hours --------------------------------------------------------------------------------------------

SMALL_DECODER = {
    "kind": "progressive", "blocks": 3, "channel_base": 65_536, "channel_max": 384, "num_res_blocks": 1, "layer_scale": 0.1,
    "fusion_blocks": [0, 1, 2], "fusion_widths": [256, 128, 64], "style_width": 256, "attention_blocks": [0], "attention_depths": [2],
}
SMALL_LOSSES = {"l1": 1.0, "lpips": 1.0, "kl": 1e-6, "multiscale": 0.1}


@preset
def small_vfm_vae() -> Run:
    """VFM-VAE on DINOv2-S (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1. Sizes are ours.

    `vfmlab train small_vfm_vae --set data.source=parquet:PATH` on one GPU, hours. Needs the VFM's weights (hub or vfm.weights=FILE),
    or `vfm.name=pocket`. Not run to its end yet: no result is claimed.
    """
    tokenizer = {"method": "vfm_vae", "widths": [64], "decoder": SMALL_DECODER}
    return _run("small_vfm_vae", _vae(_small(), 16, 4, **tokenizer), vfm={"name": "dinov2_s14", "upscale": 7.0},
                losses=SMALL_LOSSES | {"vf": {"weight": 1.0}}, equivariance={"p_latent": 0.5, "p_prior": 0.25})  # fmt: skip


@preset
def small_plain_vae() -> Run:
    """Plain convolutional VAE (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1. Sizes are ours.

    `vfmlab train small_plain_vae --set data.source=parquet:PATH` on one GPU, hours. Not run to its end yet: no result is claimed.
    """
    tokenizer = {"method": "plain_vae", "width": 96, "multipliers": [1, 2, 4], "blocks": 2, "attention": [8], "decoder": SMALL_DECODER}
    return _run("small_plain_vae", _vae(_small(), 16, 4, **tokenizer), losses=SMALL_LOSSES)


# -- paper: ImageNet 256 ----------------------------------------------------------------------------------------------


@preset
def paper_vfm_vae() -> Run:
    """VFM-VAE f16d32 on SigLIP2-L/16 at 512 px, first stage (strong alignment, 20 M images); LightningDiT-XL/1, 64 epochs.

    `accelerate launch -m vfmlab train paper_vfm_vae --set data.source=folder:PATH`, many GPUs, days. The paper reports rFID 0.52 (after all
    four stages) and gFID 3.80 without guidance; without the adversarial terms and later stages, which this preset does
    not have, those numbers are not to be expected. Learning-rate schedule, weight decay and the DiT's EMA: ours.
    """
    losses = {"l1": 1.0, "lpips": 10.0, "kl": 1e-6, "multiscale": {"weight": 0.1, "until": 5_000_000}, "vf": {"weight": 5.0}}
    return _run("paper_vfm_vae", _vae(_paper(), 32, 16, method="vfm_vae"), vfm={"name": "siglip2_l16_512", "layers": [0, 12, -1], "upscale": 2.0},
                losses=losses, equivariance={"p_latent": 0.5, "p_prior": 0.25})  # fmt: skip


@preset
def paper_va_vae() -> Run:
    """VA-VAE f16d32 (convolutional, VF loss to DINOv2-L); LightningDiT-XL/1, 64 epochs.

    `accelerate launch -m vfmlab train paper_va_vae --set data.source=folder:PATH`, many GPUs, days. Published: rFID 0.28-0.30, gFID 5.14. The
    adversarial term (weight 0.5) is not part of this preset; batch and optimiser are the VFM-VAE tokenizer's, not the paper's.
    """
    losses = {"l1": 1.0, "lpips": 1.0, "kl": 1e-6, "vf": {"weight": 0.1, "cos_margin": 0.5, "distance_margin": 0.25}}
    return _run("paper_va_vae", _vae(_paper(), 32, 16, method="va_vae"), vfm={"name": "dinov2_l14", "upscale": 0.875}, losses=losses)


@preset
def paper_plain_vae() -> Run:
    """Plain convolutional VAE f16d32, the same network as VA-VAE without alignment; LightningDiT-XL/1, 64 epochs.

    `accelerate launch -m vfmlab train paper_plain_vae --set data.source=folder:PATH`, many GPUs, days. Published: rFID 0.26, gFID 10.17 at 80 k steps. The
    adversarial term is not part of this preset; batch and optimiser are the VFM-VAE tokenizer's, not the paper's.
    """
    losses = {"l1": 1.0, "lpips": 1.0, "kl": 1e-6}
    return _run("paper_plain_vae", _vae(_paper(), 32, 16, method="plain_vae"), losses=losses)
