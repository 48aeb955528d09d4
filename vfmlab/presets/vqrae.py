"""VQRAE (arXiv 2511.23386) in its two stages, at every tier.

    pixels   quantiser and decoder; the encoder is frozen; no discriminator
    tune     everything, held by self-distillation on the continuous features; a discriminator late

From the paper: weights, rates, batch, steps of the SigLIP2 version, data BLIP3-o (36 M; ImageNet here).
Not stated, so ours: kind of the discriminator. LPIPS stands in for a perceptual loss in ConvNeXt-S, and rates
fall to 0 where the paper's fall to a quarter and a tenth.
"""

from __future__ import annotations

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import HUB, PHOTO_NEEDS, PHOTO_VFM, SMALL_LOSSES, Tree
from vfmlab.presets.vqgan import codes

FROZEN = ["quant*", "post_quant.*", "decoder.*"]  # "quant*": the map and the quantiser, if it has weights
DISTILLED = {"preservation": {"weight": 1.0, "anchor": "before", "distance": "l2"}}


def stages(pixels: int, tune: int, encoder: float, late: Tree | None = None, **train: Tree) -> list[Tree]:
    """Both stages with their budgets in images. encoder: factor on the rate of the tuned encoder. late: more
    losses of the second stage; train: more of its fields."""
    return [
        {"name": "pixels", "trains": FROZEN, "train": {"samples": pixels}},
        {"name": "tune", "trains": ["*"], "losses": DISTILLED | (late or {}),
         "train": {"samples": tune, "lr_for": {"encoder.*": encoder}, **train}},
    ]


GAN = {"weight": 0.1, "discriminator": {"kind": "patchgan", "width": 64}}
STEP = 1024  # images of a step
ROWS = (
    Preset(
        "tiny_vqrae", "VQRAE from the bundled pocket VFM, 16 px, a few dozen images in two stages: does it all run?",
        codes("tiny", vfm={"name": "pocket"}, losses={"l2": 1.0, "codebook": 1.0}, stages=stages(32, 16, 0.1),
              tokenizer={"method": "vqrae", "channels": 16, "factor": 4, "quantizer": {"kind": "simvq", "size": 32},
                         "decoder": {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "hidden": 32}}),
    ),
    Preset(
        "pocket_vqrae", "VQRAE from the pocket VFM (1024 codes of width 128, 64 an image), decoder of the encoder's shape, budget of pocket_vfm_vae.",
        codes("pocket", vfm={"name": "pocket"}, losses={"l1": 1.0, "l2": 1.0, "codebook": 1.0}, stages=stages(10_240, 5120, 0.1),
              tokenizer={"method": "vqrae", "channels": 128, "factor": 4, "quantizer": {"kind": "simvq", "size": 1024},
                         "decoder": {"kind": "vit", "width": 128, "depth": 4, "heads": 4, "hidden": 512}}),
        cost="not timed", result="no result is claimed", ours="sizes, L1 beside L2, no discriminator",
    ),
    Preset(
        "pocket_vqrae_no_distillation", "Control: pocket_vqrae whose second stage lets the encoder go. What is left of the VFM?",
        {"stages.tune.losses.preservation.weight": 0.0}, of="pocket_vqrae", cost="not timed", result="no result is claimed",
    ),
    Preset(
        "photo_vqrae", "VQRAE from EfficientNet-Lite0 (1024 codes of width 128, 64 an image) for 32 px photographs, ViT decoder, budget of photo_vfm_vae.",
        codes("photo", vfm=PHOTO_VFM, losses={"l1": 1.0, "l2": 1.0, "codebook": 1.0}, stages=stages(51_200, 25_600, 0.1),
              tokenizer={"method": "vqrae", "channels": 128, "factor": 4, "layer": -2, "quantizer": {"kind": "simvq", "size": 1024},
                         "decoder": {"kind": "vit", "width": 128, "depth": 4, "heads": 4, "hidden": 512}}),
        needs=PHOTO_NEEDS, cost="not timed", result="no result is claimed", ours="sizes, L1 beside L2, no discriminator",
    ),
    Preset(
        "small_vqrae", "VQRAE from DINOv2-S (4096 codes of width 512) for 32 px images (CIFAR-10).",
        codes("small", vfm={"name": "dinov2_s14", "upscale": 3.5}, losses={"l2": 1.0, "lpips": SMALL_LOSSES["lpips"], "codebook": 1.0},
              stages=stages(3_000_000, 2_000_000, 0.1, {"adversarial": GAN | {"start": 1_000_000}}),
              tokenizer={"method": "vqrae", "channels": 512, "factor": 4, "quantizer": {"kind": "simvq", "size": 4096},
                         "decoder": {"kind": "vit", "width": 384, "depth": 12, "heads": 6, "hidden": 1536}}),
        needs=HUB, ours="sizes",
    ),
    Preset(
        "paper_vqrae", "VQRAE from SigLIP2-so400m/16 at 256 px: SimVQ with 16384 codes of width 1536, ViT decoder of the same shape, 100 k + 70 k steps.",
        codes("paper", vfm={"name": "siglip2_so400m_256", "layers": [-1]}, losses={"l2": 1.0, "lpips": 1.1, "codebook": 1.0}, tokenizer={"method": "vqrae"},
              train={"samples": 100_000 * STEP, "batch": STEP, "optimizer": "adamw", "lr": 4e-4, "betas": [0.9, 0.999], "weight_decay": 1e-4,
                     "schedule": "cosine", "warmup": 2000 * STEP, "clip": 1.0, "ema_halflife": 1_000_000, "log_every": 51_200,
                     "preview_every": 512_000, "checkpoint_every": 1_024_000},
              stages=stages(100_000 * STEP, 70_000 * STEP, 0.1, {"adversarial": GAN | {"start": 50_000 * STEP, "lr": 4e-5}}, lr=1e-4)),
        needs=HUB, result="published: rFID 1.31, PSNR 22.23, SSIM 0.762; not run here",
        ours="LPIPS for a ConvNeXt-S perceptual loss, the discriminator, the average, rates that fall to 0, centre crops (random there), ImageNet for BLIP3-o",
    ),
)  # fmt: skip
