"""VFMTok (arXiv 2507.08441) at every tier.

From paper and release: sizes, weights of the terms, optimiser of the paper (AdamW, decay 0.05, batch 256), 50
epochs at 336 px, random crops. The release counts the squared error twice, trains with Adam and a batch of
16, and leaves registers where nothing sees them; its dropout of .1 in the decoder's attention is not here.
"""

from __future__ import annotations

from typing import Any

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import EPOCH, HUB, PHOTO_NEEDS, PHOTO_VFM, Tree
from vfmlab.presets.vqgan import codes

# DINO ViT-S/16 with its class token and statistics of 8 images, windows half of the time, no augmentation.
GAN = {"weight": 0.5, "start": 20_000 * 256, "loss": "softplus_hinge",
       "discriminator": {"kind": "projected", "interpolation": "bicubic", "augment": []}}
FEATURES = {"feature_reconstruction": {"weight": 1.0, "l2": 0.0, "cosine": 1.0}}
# Ours, for budgets a thousandth of the paper's. With AdamW and no entropy term the codebook collapses
# to 1 %: 13.9 dB after 3,840 images. With the entropy term it is used whole: 14.4 dB; with Muon too: 16.1.
SHORT = {
    "losses": {"l1": 1.0, "l2": 1.0, "codebook": {"weight": 1.0, "entropy": 0.1}} | FEATURES,
    "train__optimizer": "muon", "train__lr": 1e-3,
}  # fmt: skip


def sizes(channels: int, tokens: int, width: int, depth: int, heads: int, hidden: int, gated: int,
          entries: int, **more: Any) -> Tree:
    """f4; encoder and decoder of one depth and number of heads."""
    return {"method": "vfmtok", "channels": channels, "factor": 4, "tokens": tokens, "width": width,
            "depth": depth, "heads": heads, "hidden": hidden, "decoder_depth": depth, "decoder_heads": heads,
            "decoder_hidden": gated, "quantizer": {"kind": "cosine", "size": entries}, **more}


TINY = sizes(4, 16, 16, 1, 2, 32, 32, 32, points=2, registers=1, pixel_width=8, pixel_multipliers=[1, 1, 2],
             pixel_blocks=1)
POCKET = sizes(8, 64, 96, 2, 4, 192, 256, 1024, pixel_width=24, pixel_multipliers=[1, 2, 3], pixel_blocks=1)
SMALL = sizes(8, 64, 384, 4, 6, 768, 1024, 4096, pixel_width=96, pixel_multipliers=[1, 2, 4])
ROWS = (
    Preset(
        "tiny_vfmtok", "VFMTok on the bundled pocket VFM, 16 px, a few dozen images: does it all run?",
        codes("tiny", vfm={"name": "pocket", "layers": [0, 2, -1]}, tokenizer=TINY, losses={"l2": 1.0, "codebook": 1.0} | FEATURES),
    ),
    Preset(
        "pocket_vfmtok", "VFMTok on four levels of the pocket VFM: 64 region tokens of 1024 codes, features rebuilt beside pixels, budget of pocket_vfm_vae.",
        codes("pocket", vfm={"name": "pocket", "layers": [0, 1, 2, -1]}, tokenizer=POCKET, **SHORT),
        cost="6 min on one core", result="docs/results/claims_codes.md: 19.5 dB, rFD 2.86, all codes in use, linear probe .96 (three seeds, N = 4000)",
        ours="sizes, L1 beside L2, entropy term, Muon, no discriminator",
    ),
    Preset(
        "pocket_vfmtok_no_features", "Control: pocket_vfmtok without the feature loss. What does it give a generator?",
        {"losses.feature_reconstruction": 0.0}, of="pocket_vfmtok", cost="not timed", result="no result is claimed",
    ),
    Preset(
        "pocket_vfmtok_cross", "Control: pocket_vfmtok with plain attention on all places of all levels.", {"tokenizer.attends": "cross"},
        of="pocket_vfmtok", cost="not timed", result="no result is claimed", ours="the paper's control has a window of 16 x 16",
    ),
    Preset(
        "photo_vfmtok", "VFMTok on three levels of EfficientNet-Lite0 for 32 px photographs: 64 region tokens of 1024 codes, features rebuilt beside pixels.",
        # not the level of photo_vfm_vae that is finer than the image's own grid: it makes a step 2.3 times as long
        codes("photo", vfm=PHOTO_VFM | {"layers": [2, 4, -2]}, tokenizer=POCKET, **SHORT),
        needs=PHOTO_NEEDS, cost="not timed", result="no result is claimed", ours="sizes, L1 beside L2, entropy term, Muon, no discriminator",
    ),
    Preset(
        "small_vfmtok", "VFMTok on DINOv2-S for 32 px images (CIFAR-10): 64 region tokens of 4096 codes.",
        codes("small", vfm={"name": "dinov2_s14", "layers": [3, 6, 9, -1], "upscale": 3.5}, tokenizer=SMALL,
              losses={"l2": 1.0, "lpips": 1.0, "codebook": 1.0} | FEATURES),
        needs=HUB, ours="sizes, no discriminator",
    ),
    Preset(
        "paper_vfmtok", "VFMTok on DINOv2-L/14 with registers at 336 px: 256 region tokens of 16384 codes, 50 epochs.",
        codes("paper", data__size=336, data__crop=[0.8, 1.0], vfm={"name": "dinov2_l14_reg", "layers": [6, 12, 18, -1]}, tokenizer={"method": "vfmtok"},
              losses={"l2": 1.0, "lpips": 1.0, "codebook": 1.0, **FEATURES, "adversarial": GAN},
              train={"samples": 50 * EPOCH, "batch": 256, "optimizer": "adamw", "lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.05,
                     "warmup": 4 * EPOCH, "clip": 1.0, "ema_halflife": 1_774_000, "log_every": 51_200, "preview_every": 512_000,
                     "checkpoint_every": 512_000}),
        needs=HUB, result="published: rFID 0.89 (at 256 px after resizing), rIS 215.4, use 100 %; not run here",
        ours="registers in front, no dropout in attention (the release has .1 in the decoder), the share of a random crop uniform, numbers at 336 px, not resized to 256",
    ),
)  # fmt: skip
