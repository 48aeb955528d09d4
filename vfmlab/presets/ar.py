"""Generators of codes, token by token (LlamaGen, arXiv 2406.06525; RAR's orders, 2411.00776), at every tier.

Each stands on VQGAN's codes; on those of another tokenizer: `PRESET@pocket_ar`. From LlamaGen's release:
sizes, optimiser, constant rate, ten crops, guidance of the published numbers. `paper_vfmtok_ar_*` are
VFMTok's (2507.08441): the same network, another batch, codes of random crops and flips encoded at every step.
The guidance of its numbers is unknown; LlamaGen's is taken. Below `paper` all is ours.
"""

from __future__ import annotations

from typing import Any

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import BASES, EPOCH, PHOTO_NEEDS, Tree

POCKET = {"kind": "llamagen", "width": 128, "depth": 4, "heads": 4, "multiple": 64}


def _train(tier: str, **changes: Any) -> Tree:
    """Budget and rhythm of the tier's diffusion phase, with AdamW and other fields."""
    return {**BASES[tier]["diffusion"]["train"], "optimizer": "adamw", **changes}


def _paper(size: str, epochs: int) -> Tree:
    """LlamaGen's training at 256 px."""
    train = _train("paper", samples=epochs * EPOCH, batch=256, lr=1e-4, betas=[0.9, 0.95], weight_decay=0.05,
                   ema_halflife=1_770_000)
    return {"network": {"kind": "llamagen", "size": size}, "train": train, "ten_crops": 1.1}


def _on(tokenizer: str, ar: Tree, **protocol: Any) -> Tree:
    """Changes to the preset of a tokenizer."""
    return {"ar": ar | {"tokenizer_of": tokenizer}} | {f"protocol.{k}": v for k, v in protocol.items()}


def _published(size: str, epochs: int, guidance: float) -> Tree:
    """LlamaGen's, on its tokenizer, with the labels and the guidance of its numbers."""
    return _on("paper_vqgan", _paper(size, epochs), **{"guidance.scale": guidance, "labels": "random"})


def _vfmtok(size: str, epochs: int, guidance: float) -> Tree:
    """VFMTok's training over its own codes, with LlamaGen's labels and guidance."""
    train = _paper(size, epochs)["train"] | {"batch": 512, "ema_halflife": 3_550_000}
    ar = {"network": {"kind": "llamagen", "size": size}, "train": train, "cache": False}
    return _on("paper_vfmtok", ar, **{"guidance.scale": guidance, "labels": "random"})


# size, parameters, epochs, LlamaGen's guidance (of 2B: 3B's), published gFID with and without guidance
VFMTOK = (
    ("B", "111 M", 300, 2.0, "gFID 3.43 guided, 3.09 without"),
    ("L", "343 M", 300, 2.0, "gFID 2.75 guided, 2.11 without"),
    ("XL", "775 M", 300, 1.75, "gFID 2.41 guided"),
    ("XXL", "1.4 B", 200, 1.75, "gFID 2.19 guided, 1.95 without"),
    ("2B", "2.2 B", 200, 1.65, ""),
    ("3B", "3.1 B", 200, 1.65, "gFID 2.07 guided, 2.04 without"),
)
TINY = {"network": {"kind": "llamagen", "width": 32, "depth": 2, "heads": 2, "multiple": 32},
        "train": _train("tiny"), "ten_crops": 1.25}
OURS = "the half-life of the average"

ROWS = (
    Preset("tiny_ar", "A transformer over the codes of tiny_vqgan, from ten crops: does it all run?", _on("tiny_vqgan", TINY), of="tiny_vqgan"),
    Preset("tiny_ar_orders", "tiny_ar in random orders at first, with guidance that grows: does it all run?",
           {"ar.network.target_places": True, "ar.permuted": {"until": 16, "raster": 48}, "protocol.guidance.scale": 2.0,
            "protocol.token_sampler": {"guidance_power": 1.0, "top_k": 8}}, of="tiny_ar"),
    Preset("pocket_ar", "LlamaGen's transformer, small, over the 64 codes of pocket_vqgan, with the budget of the pocket DiT.",
           _on("pocket_vqgan", {"network": POCKET, "train": _train("pocket")}), of="pocket_vqgan",
           result="no result is claimed", ours="sizes and schedule"),
    Preset("pocket_ar_orders", "pocket_ar trained in RAR's random orders for the first half of its images, more and more in raster order after it.",
           {"ar.network.target_places": True, "ar.permuted": {"until": 25_600, "raster": 38_400}}, of="pocket_ar",
           result="no result is claimed", ours="sizes and schedule"),
    Preset("photo_ar", "LlamaGen's transformer, small, over the 64 codes of photo_vqgan, with the budget of the photo tier's DiT.",
           _on("photo_vqgan", {"network": POCKET, "train": _train("photo")}), of="photo_vqgan", needs=PHOTO_NEEDS,
           cost="not timed", result="no result is claimed", ours="sizes and schedule"),
    Preset("tiny_rar", "RAR's own network over the codes of tiny_vqgan, in random orders at first: does it all run?",
           {"ar.network": {"kind": "rar", "width": 32, "depth": 2, "heads": 2}}, of="tiny_ar_orders"),
    Preset("pocket_rar", "RAR's own network, small, over the 64 codes of pocket_vqgan, trained as pocket_ar_orders.",
           {"ar.network": {"kind": "rar", "width": 128, "depth": 4, "heads": 4}}, of="pocket_ar_orders",
           result="no result is claimed", ours="sizes and schedule"),
    Preset("small_ar", "LlamaGen's transformer of a DiT-S's size over the 64 codes of small_vqgan (CIFAR-10).",
           _on("small_vqgan", {"network": {"kind": "llamagen", "width": 384, "depth": 12, "heads": 6}, "train": _train("small")}),
           of="small_vqgan", ours="sizes and schedule"),
    Preset("paper_ar_b", "LlamaGen-B (111 M) over 256 codes of its tokenizer, 300 epochs.", _published("B", 300, 2.0),
           of="paper_vqgan", result="published: gFID 7.39 at 50 epochs with guidance 2 (31.35 without); not run here", ours=OURS),
    Preset("paper_ar_l", "LlamaGen-L (343 M) over 256 codes of its tokenizer, 300 epochs.", _published("L", 300, 2.0),
           of="paper_vqgan", result="published: gFID 4.32 at 50 epochs with guidance 2 (21.81 without); not run here", ours=OURS),
    Preset("paper_ar_xl", "LlamaGen-XL (775 M) over 256 codes of its tokenizer, 50 epochs.", _published("XL", 50, 1.75),
           of="paper_vqgan", result="published: gFID 3.39 with guidance 1.75; not run here", ours=OURS),
    Preset("paper_ar_xxl", "LlamaGen-XXL (1.4 B) over 256 codes of its tokenizer, 50 epochs.", _published("XXL", 50, 1.75),
           of="paper_vqgan", result="published: gFID 3.09 with guidance 1.75; not run here", ours=OURS),
    Preset("paper_ar_3b", "LlamaGen-3B over 256 codes of its tokenizer, 50 epochs.", _published("3B", 50, 1.65),
           of="paper_vqgan", result="published: gFID 3.06 with guidance 1.75; not run here", ours=OURS),
    *(Preset(f"paper_vfmtok_ar_{size.lower()}", f"LlamaGen-{size} ({count}) over the 256 codes of paper_vfmtok, encoded anew from random crops, {epochs} epochs.",
             _vfmtok(size, epochs, scale), of="paper_vfmtok",
             result=f"published: {numbers}, at 256 px after resizing; not run here" if numbers else "no number is known here; not run here",
             ours="the scale of guidance and the labels, both LlamaGen's; numbers at 336 px, not resized to 256")
      for size, count, epochs, scale, numbers in VFMTOK),
    *(Preset(f"paper_rar_{size.lower()}", f"RAR-{size} over 256 codes, 400 epochs, random orders up to 200, raster from 300, guidance that grows.",
             {"ar.network": {"kind": "rar", "size": size}, "protocol.guidance.scale": scale, "protocol.token_sampler": {"guidance_power": power}},
             of="paper_ar_l_orders", result="published on another tokenizer (MaskGIT-VQGAN) and on VFMTok; not run here",
             ours="the pairing with LlamaGen's tokenizer; the average; the rate ends at 0, not 1e-5")
      for size, scale, power in (("L", 16.0, 2.75), ("XL", 6.5, 1.0))),
    Preset("paper_ar_l_orders", "LlamaGen-L in RAR's orders with its optimiser, 400 epochs, random up to 200 and raster from 300, guidance that grows.",
           {"ar.network.target_places": True, "ar.permuted": {"until": 200 * EPOCH, "raster": 300 * EPOCH}, "ar.ten_crops": None,
            "ar.train": {"samples": 400 * EPOCH, "batch": 2048, "lr": 4e-4, "betas": [0.9, 0.96], "weight_decay": 0.03, "schedule": "cosine", "warmup": 100 * EPOCH},
            "protocol.guidance.scale": 16.0, "protocol.token_sampler": {"guidance_power": 2.75}},
           of="paper_ar_l", result="no number is published for it",
           ours="the pairing: RAR's own network is paper_rar_l; the average; the rate ends at 0, not 1e-5"),
)  # fmt: skip
