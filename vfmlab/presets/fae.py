"""FAE, the feature auto-encoder (arXiv 2512.07829), in its two stages at every tier.

    features  encoder and feature decoder rebuild the VFM's map; pixels play no part
    pixels    the pixel decoder alone, on rebuilt maps; the latent is fixed

From the paper: the stages, what trains in each, losses (L2 on features, KL; then pixels, perceptual and GAN),
sizes at `paper`. Not stated there, so ours: weights of KL, perceptual and GAN terms, the discriminator,
everything below `paper`.
"""

from __future__ import annotations

from typing import Any

from vfmlab.presets.rae import SMALL_VIT, WIDE_DECODER
from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import HUB, PHOTO_NEEDS, PHOTO_VFM, TINY_DECODER, Tree, base

FEATURES = {"feature_reconstruction": 1.0, "kl": 1e-6}
READS, WRITES = ("start.read.*", "start.gain_encode", "start.logvar"), ("start.write.*", "start.gain_decode")


def stages(pixels: Tree, linear_start: bool = False, **second: Any) -> list[Tree]:
    """pixels: losses of the second stage, in place of those on features. second: fields of `train` that
    change in it."""
    reads, writes = (READS, WRITES) if linear_start else ((), ())
    return [
        {"name": "features", "trains": ["encoder.*", "feature_decoder.*", *reads]},
        {"name": "pixels", "trains": ["decoder.*", *writes], "losses": dict.fromkeys(FEATURES, 0.0) | pixels,
         "train": second},
    ]


SMALL_GAN = {"weight": 0.5, "discriminator": {"kind": "patchgan", "width": 64}, "adaptive": True,
             "start": 1_250_000}
PAPER_GAN = {"weight": 0.75, "discriminator": "rae_dino", "adaptive": True, "start": 256_000_000}
PAPER = base(
    "paper", tokenizer={"method": "fae", "channels": 32, "factor": 16}, vfm={"name": "dinov2_g14", "upscale": 0.875}, losses=FEATURES,
    # A million steps each, as we read the paper's table: 1024 images a step for features, 512 for pixels.
    stages=stages({"l1": 1.0, "lpips": 1.0, "adversarial": PAPER_GAN}, samples=512_000_000, batch=512, warmup=512_000),
    train__samples=1_024_000_000, train__batch=1024, train__optimizer="adamw", train__lr=1e-4, train__betas=[0.9, 0.999], train__schedule="cosine",
    train__warmup=1_024_000, train__checkpoint_every=2_560_000, train__preview_every=5_120_000,
    diffusion__train__samples=102_493_000, diffusion__train__batch=512, diffusion__train__lr=1e-4, diffusion__train__betas=[0.9, 0.999],
    protocol__sampler__shift=1 / 0.4,
)  # fmt: skip

ROWS = (
    Preset(
        "tiny_fae", "FAE on the bundled pocket VFM, 16 px, a few dozen images in two stages: does it all run?",
        base("tiny", vfm={"name": "pocket"}, losses=FEATURES, stages=stages({"l1": 1.0}, samples=32), train__samples=32,
             tokenizer={"method": "fae", "channels": 4, "factor": 4, "heads": 2, "head_width": 8, "feature_depth": 1,
                        "decoder": TINY_DECODER | {"decompress": "conv", "decompress_factor": 1}}),
    ),
    Preset(
        "pocket_fae", "FAE (f4d8) on the last layer of the pocket VFM, in two stages with the images of pocket_vfm_vae in all, then the same DiT.",
        base("pocket", vfm={"name": "pocket"}, losses=FEATURES, train__samples=7680,
             stages=stages({"l1": 1.0, "l2": 1.0, "multiscale": {"weight": 0.1, "until": 3840}}, linear_start=True),
             tokenizer={"method": "fae", "channels": 8, "factor": 4, "heads": 4, "head_width": 32, "feature_depth": 1, "linear_start": True,
                        "decoder": WIDE_DECODER}),
        result="docs/results/tokenizers.md", ours="no GAN, as in the other pocket tokenizers",
    ),
    Preset(
        "photo_fae", "FAE (f4d8) on the last block of EfficientNet-Lite0 (320 channels) for 32 px photographs, in two stages with the tier's images in all.",
        base("photo", vfm=PHOTO_VFM, losses=FEATURES, train__samples=38_400,
             stages=stages({"l1": 1.0, "l2": 1.0, "multiscale": {"weight": 0.1, "until": 3840}}, linear_start=True),
             tokenizer={"method": "fae", "layer": -2, "channels": 8, "factor": 4, "heads": 4, "head_width": 32, "feature_depth": 1, "linear_start": True,
                        "decoder": WIDE_DECODER}),
        needs=PHOTO_NEEDS, ours="the last block and not the head's 1280 channels, sizes, budgets; no GAN, as in the other tokenizers of the tier",
    ),
    Preset(
        "small_fae", "FAE on DINOv2-S (f4d16) for 32 px images (CIFAR-10), ViT-S pixel decoder, then LightningDiT-S/1.",
        base("small", vfm={"name": "dinov2_s14", "upscale": 3.5}, losses=FEATURES, train__samples=2_500_000,
             tokenizer={"method": "fae", "channels": 16, "factor": 4, "heads": 6, "head_width": 256, "feature_depth": 6, "decoder": SMALL_VIT},
             stages=stages({"l1": 1.0, "lpips": 1.0, "adversarial": SMALL_GAN})),
        needs=HUB, ours="sizes",
    ),
    Preset(
        "paper_fae", "FAE on DINOv2-g/14 (f16d32), ViT-L pixel decoder; LightningDiT-XL/1, 80 epochs, time shift 0.4 in its time (1 / 0.4 in ours).", PAPER,
        cost="weeks on many GPUs", result="published: rFID 0.68, gFID 2.08 (1.70 guided); not run here",
        ours="left out: the pixel decoder's first training on the VFM's own, noisy maps",
    ),
)  # fmt: skip
