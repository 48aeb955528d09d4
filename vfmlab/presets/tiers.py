"""What the presets of a tier share: data, budgets, evaluation, decoders and pixel losses.

Five tiers, same code: `tiny` (automated tests, seconds), `pocket` (two CPU cores, minutes, nothing
downloaded), `photo` (the same on photographs, with a VFM trained on ImageNet that a package ships), `small`
(one GPU, hours), `paper` (ImageNet 256, the published sizes and schedules).
"""

from __future__ import annotations

import copy
from typing import Any

Tree = dict[str, Any]
TIERS = ("tiny", "pocket", "photo", "small", "paper")
# What rows say of needs and results.
HUB = "the VFM's weights (hub or vfm.weights=FILE)"
# The judge's features, and the VFM where a row has one.
PHOTO_NEEDS = "the extra `photo` (EfficientNet-Lite0) and the package of MobileNetV2's weights: vfmlab doctor"
NOT_RUN = "not run to its end yet: no result is claimed"
COST = {"tiny": "seconds on one core", "pocket": "about six minutes on one core", "small": "hours on one GPU",
        "photo": "tens of minutes on one core; two fifths of it are timed", "paper": "days on many GPUs"}  # fmt: skip
RESULT = {
    "tiny": "it runs; the pictures are noise", "pocket": "docs/results/scenes.md",
    "photo": "docs/results/photo.md, at a part of the budget",
    "small": NOT_RUN, "paper": "not run here: no result is claimed",
}  # fmt: skip
SOURCE = {"tiny": "", "pocket": "", "photo": " --set data.source=parquet:PATH",
          "small": " --set data.source=parquet:PATH",
          "paper": " --set data.source=folder:PATH"}
EPOCH = 1_281_167  # images of ImageNet

TINY_DECODER = {
    "kind": "progressive", "blocks": 2, "channel_base": 4096, "channel_max": 16, "num_res_blocks": 0,
    "decompress_factor": 4, "style_width": 16,
    "fusion_blocks": [0, 1], "fusion_widths": [16, 8], "attention_blocks": [0], "attention_depths": [1],
    "heads": 2, "gelu": "erf", "kernels": [3],
    "activation": "silu", "expansion": 2,
}
# Widths 64, 32, 16 at 8, 16, 32 px. The published layer scale of 1e-5 needs more steps than a pocket run has.
POCKET_DECODER = {
    "kind": "progressive", "blocks": 3, "channel_base": 4096, "channel_max": 64, "num_res_blocks": 1,
    "res_layers": [2, 1, 0], "decompress_factor": 8,
    "gelu": "erf", "kernels": [5], "taps": [3], "expansion": 2, "layer_scale": 0.1,
    "fusion_blocks": [0, 1, 2], "fusion_widths": [48, 24, 12],
    "style_width": 64, "attention_blocks": [0], "attention_depths": [1], "heads": 4,
}
TINY_LOSSES = {"l1": 1.0, "kl": 1e-6, "multiscale": 0.1}

# One decoder, one set of pixel losses and the same linear start for every tokenizer, so that encoders are
# what is compared.
POCKET_LOSSES = {"l1": 1.0, "l2": 1.0, "kl": 1e-6, "multiscale": {"weight": 0.1, "until": 7680}}
POCKET_CONV = {"width": 32, "multipliers": [1, 3], "blocks": 1, "attention": [], "middle": False,
               "middle_attention": False, "patch": 2}
# EfficientNet-Lite0 on images enlarged to 128 px: maps of 64 x 64 x 16, whose best linear code of 8 channels
# keeps the pixels at 28.8 dB (of the next stage 25.4, of the pixels themselves 29.2), 8 x 8 x 112, and
# 8 x 8 x 320 for the meaning (the last stage dilated: the latent's grid). In fp16 3.7 GB for 20,000 images.
PHOTO_VFM = {"name": "efficientnet_lite0", "layers": [1, 4, -2], "upscale": 4.0, "stride": 16}
PHOTO_VF = {"weight": 0.3, "adaptive": False, "layer": -2}
SMALL_DECODER = {
    "kind": "progressive", "blocks": 3, "channel_base": 65_536, "channel_max": 384, "num_res_blocks": 1,
    "layer_scale": 0.1,
    "fusion_blocks": [0, 1, 2], "fusion_widths": [256, 128, 64], "style_width": 256, "attention_blocks": [0],
    "attention_depths": [2],
}
SMALL_LOSSES = {"l1": 1.0, "lpips": 1.0, "kl": 1e-6, "multiscale": 0.1}


_SMALL_LOG = {"log_every": 12_800, "preview_every": 256_000, "checkpoint_every": 256_000}
BASES: dict[str, Tree] = {
    "tiny": {
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
    },
    "pocket": {
        "tier": "pocket",
        "data": {"source": "scenes:medium", "size": 32, "train": 20_000, "val": 1000},
        "train": {
            "samples": 15_360, "batch": 32, "lr": 2e-3, "schedule": "cosine", "warmup": 640, "ema_halflife": 1600, "log_every": 320,
            "preview_every": 3840, "checkpoint_every": 3840,
        },
        "diffusion": {
            "network": {"kind": "lightningdit", "width": 128, "depth": 4, "heads": 4, "patch": 2, "rmsnorm": False},
            "train": {
                "samples": 51_200, "batch": 64, "optimizer": "muon", "lr": 1e-3, "warmup": 3200, "ema_halflife": 6400, "log_every": 1280,
                "preview_every": 25_600, "checkpoint_every": 12_800, "evaluate_at": [12_800, 25_600, 51_200],
            },
        },
        "protocol": {"n": 1000, "sampler": {"steps": 20}},
    },
    "photo": {
        "tier": "photo",
        "data": {"source": "parquet:data/cifar10", "size": 32, "train": 20_000, "val": 1000},
        "train": {
            "samples": 76_800, "batch": 32, "lr": 2e-3, "schedule": "cosine", "warmup": 640, "ema_halflife": 1600, "log_every": 640,
            "preview_every": 19_200, "checkpoint_every": 6400, "vfm_cache": 6.0,
        },
        "diffusion": {
            "network": {"kind": "lightningdit", "width": 128, "depth": 4, "heads": 4, "patch": 2, "rmsnorm": False},
            "train": {
                "samples": 204_800, "batch": 64, "optimizer": "muon", "lr": 1e-3, "warmup": 3200, "ema_halflife": 6400, "log_every": 2560,
                "preview_every": 51_200, "checkpoint_every": 25_600, "evaluate_at": [51_200, 102_400, 204_800],
            },
        },
        "protocol": {"n": 1000, "sampler": {"steps": 20}, "features": "classifier:mobilenetv2@128"},
    },
    "small": {
        "tier": "small",
        "data": {"source": "parquet:data/cifar10", "size": 32, "val": 10_000, "flip": True},
        "train": {"samples": 5_000_000, "batch": 256, "lr": 4e-4, "schedule": "cosine", "warmup": 50_000, "ema_halflife": 50_000, **_SMALL_LOG},
        "diffusion": {
            "network": {"kind": "lightningdit", "size": "S", "patch": 1},
            "train": {
                "samples": 20_000_000, "batch": 256, "lr": 2e-4, "betas": [0.9, 0.95], "warmup": 50_000, "ema_halflife": 500_000,
                "evaluate_at": [1_000_000, 2_000_000, 5_000_000, 10_000_000, 20_000_000], **_SMALL_LOG,
            },
        },
        "protocol": {"n": 10_000, "batch": 500, "sampler": {"steps": 50}, "features": "inception"},
    },
    # Diffusion: LightningDiT-XL/1, 64 epochs; 250 Euler steps and shift 0.3 in the release's time (1 / 0.3 in ours).
    "paper": {
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
    },
}  # fmt: skip


def base(tier: str, **changes: Any) -> Tree:
    """The tier's recipe with other sections; `a__b=...` changes field b of section a."""
    tree = copy.deepcopy(BASES[tier])
    for name, value in changes.items():
        *path, last = name.split("__")
        node = tree
        for key in path:
            node = node[key]
        node[last] = value
    return tree


def without(losses: Tree, *names: str) -> Tree:
    return {name: term for name, term in losses.items() if name not in names}
