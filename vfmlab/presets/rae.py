"""RAE (arXiv 2510.11690) and its multi-layer form (RAEv2, 2605.18324) at every tier.

Only a decoder is trained, against noise on the latent. The diffusion network is RAE's: a DiT whose head is
wider than the latent has channels; times of training and sampling are shifted by sqrt(C h w / 4096). Latents
are cached at `pocket` only (0.7 GB): they are larger than the images. From the papers and the released
configurations: what `paper_*` says, unless it is marked. Sizes and budgets of the other tiers: ours.
"""

from __future__ import annotations

from typing import Any

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import (
    EPOCH,
    HUB,
    PHOTO_NEEDS,
    PHOTO_VFM,
    POCKET_DECODER,
    SMALL_LOSSES,
    Tree,
    base,
    without,
)

TINY_VIT = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "hidden": 32}
TINY_DDT = {"kind": "ddt", "width": 16, "depth": 1, "heads": 2, "head_width": 32, "head_depth": 1,
            "head_heads": 2, "patch": 2}
# The decoder of the other pocket tokenizers, but for its first layer: 128 channels need no widening.
WIDE_DECODER = POCKET_DECODER | {"decompress": "conv", "decompress_factor": 1}
# The other pocket networks' encoder; its head is as wide as a patch of 2 x 2 latents of 128 channels.
POCKET_DDT = {"kind": "ddt", "width": 128, "depth": 4, "heads": 4, "rmsnorm": False, "patch": 2, "head_width": 512,
              "head_depth": 1, "head_heads": 8}  # fmt: skip
# Noise averages out over channels: the paper's 0.8 for 768, times sqrt(128 / 768). With 0.8 a pocket decoder
# loses 2 dB.
POCKET_NOISE = 0.33
PHOTO_NOISE = 0.5  # by the same rule for 320 channels
SMALL_VIT = {"kind": "vit", "width": 384, "depth": 12, "heads": 6, "hidden": 1536}
SMALL_DDT = {"kind": "ddt", "size": "S", "patch": 1, "head_width": 768, "head_depth": 2, "head_heads": 12}
PAPER_DDT = {"kind": "ddt", "size": "XL", "patch": 1, "head_width": 2048, "head_depth": 2, "head_heads": 16}
SMALL_GAN = {"weight": 0.75, "discriminator": {"kind": "patchgan", "width": 64}, "adaptive": True,
             "start": 2_500_000}
PAPER_GAN = {"weight": 0.75, "discriminator": "rae_dino", "adaptive": True, "start": 8 * EPOCH, "discriminator_start": 6 * EPOCH, "lr": 2e-4,
             "betas": [0.9, 0.95]}  # fmt: skip


def _with(tier: str, network: Tree, channels: int, side: int, **changes: Any) -> Tree:
    """The tier's recipe with RAE's network and its time shift in training and sampling."""
    shift = (channels * side**2 / 4096) ** 0.5
    return base(
        tier, diffusion__network=network, diffusion__time={"kind": "lognormal", "shift": shift}, protocol__sampler__shift=shift,
        **{"diffusion__cache": False, "diffusion__cosine_loss": 0.0, **changes},
    )  # fmt: skip


def _tiny(method: str, **more: Any) -> Tree:
    tokenizer = {"channels": 128, "factor": 4, "method": method, "decoder": TINY_VIT, **more}
    return _with("tiny", TINY_DDT, 128, 4, tokenizer=tokenizer, vfm={"name": "pocket"}, losses={"l1": 1.0})


def _pocket(method: str, **more: Any) -> Tree:
    tokenizer = {"channels": 128, "factor": 4, "method": method, "noise": POCKET_NOISE, "linear_start": True,
                 "decoder": WIDE_DECODER, **more}
    losses = {"l1": 1.0, "l2": 1.0, "multiscale": {"weight": 0.1, "until": 7680}}
    # The VFM costs twice the network here, so latents are cached.
    return _with("pocket", POCKET_DDT, 128, 8, tokenizer=tokenizer, vfm={"name": "pocket"}, losses=losses,
                 diffusion__cache=True)


def _small(method: str, **more: Any) -> Tree:
    tokenizer = {"channels": 384, "factor": 4, "method": method, "decoder": SMALL_VIT, **more}
    losses = without(SMALL_LOSSES, "kl", "multiscale") | {"adversarial": SMALL_GAN}
    return _with("small", SMALL_DDT, 384, 8, tokenizer=tokenizer, vfm={"name": "dinov2_s14", "upscale": 3.5},
                 losses=losses)


def _paper(method: str, channels: int, vfm: Tree, crop: list[float] | None = None, **more: Any) -> Tree:
    tree = _with(
        "paper", PAPER_DDT, channels, 16, vfm=vfm, losses={"l1": 1.0, "lpips": 1.0, "adversarial": PAPER_GAN},
        tokenizer={"channels": channels, "factor": 16, "method": method, "noise_law": "uniform", **more}, protocol__sampler__steps=50, data__crop=crop,
    )  # fmt: skip
    # Decoder: 16 epochs of AdamW, rate falling by a cosine (in the release to a tenth, here to zero),
    # gradients not clipped.
    tree["train"] |= {
        "samples": 16 * EPOCH, "batch": 512, "optimizer": "adamw", "lr": 2e-4, "betas": [0.9, 0.95], "schedule": "cosine", "warmup": EPOCH,
        "ema_halflife": 161_000, "clip": None,
    }  # fmt: skip
    tree["diffusion"]["train"] |= {"samples": 80 * EPOCH, "batch": 1024, "lr": 2e-4, "betas": [0.9, 0.95],
                                   "ema_halflife": 1_420_000}
    return tree


FIFTEEN = "about fifteen minutes on one core, most of it in the wide head"
ROWS = (
    Preset("tiny_rae", "RAE on the bundled pocket VFM, 16 px, a few dozen images: does it all run?", _tiny("rae")),
    Preset("tiny_multi_layer_rae", "Multi-layer RAE on the bundled pocket VFM, 16 px: does it all run?", _tiny("multi_layer_rae", last=2, pooled=True)),
    Preset("tiny_hirae", "RAE with HiRAE's bounded fusion of layers and statistics per place, 16 px: does it all run?",
           _tiny("multi_layer_rae", last=3, fusion={}, places=True)),
    Preset("paper_hirae", "HiRAE: bounded fusion of all 24 blocks of DINOv3-L (f16d1024), ViT-XL decoder; then RAEv2's network.",
           {"tokenizer.last": 24, "tokenizer.stride": 1, "tokenizer.pooled": False, "tokenizer.fusion": {},
            "train.batch": 128, "diffusion.tokenizer_of": None},
           of="paper_multi_layer_rae_raev2", result="published: rFID 0.209; gFID 2.129 at 80 epochs, 1.038 with internal guidance; not run here",
           ours="losses, epochs and rates are those of RAEv2, as the paper says; AdamW in place of Muon"),
    Preset("tiny_multi_layer_rae_raev2", "tiny_multi_layer_rae with RAEv2's network and internal guidance: does it all run?",
           of="tiny_multi_layer_rae+raev2"),
    Preset("pocket_multi_layer_rae_raev2", "pocket_multi_layer_rae with RAEv2's network, of the same width and depth, and internal guidance.",
           of="pocket_multi_layer_rae+raev2", cost="about fifteen minutes on one core",
           result="not run to its end yet; at the size of pocket_plain_vae's DiT, unguided: 22.8 dB, gFD 16.0 "
                  "(docs/results/claims_continuous.md)", ours="sizes"),
    Preset(
        "pocket_rae", "RAE on the last block of the pocket VFM (f4d128): only a decoder is trained, then a DiT with a wide head.", _pocket("rae"),
        cost=FIFTEEN, result="the last block keeps less of the pixels than what the other tokenizers read; docs/results/tokenizers.md",
        ours="the decoder of the other pocket tokenizers in place of a ViT, noise of 0.33, no GAN",
    ),
    Preset(
        "pocket_multi_layer_rae", "pocket_rae on the mean of all four blocks of the pocket VFM.", _pocket("multi_layer_rae", last=4),
        cost=FIFTEEN, result="docs/results/tokenizers.md", ours="K",
    ),
    Preset(
        "photo_rae", "RAE on the last block of EfficientNet-Lite0 (f4d320) for 32 px photographs: only a decoder is trained, then the tier's LightningDiT.",
        base("photo", vfm=PHOTO_VFM, losses={"l1": 1.0, "l2": 1.0, "multiscale": {"weight": 0.1, "until": 7680}},
             tokenizer={"channels": 320, "factor": 4, "method": "rae", "noise": PHOTO_NOISE, "linear_start": True, "decoder": WIDE_DECODER}),
        needs=PHOTO_NEEDS, ours="the tier's generator in place of one with a wide head, the decoder of the other tokenizers in place of a ViT, noise of 0.5, no GAN",
    ),
    Preset("small_rae", "RAE on DINOv2-S (f4d384) for 32 px images (CIFAR-10), ViT-S decoder, then DiT-S/1 with a wide head.", _small("rae"),
           needs=HUB, ours="sizes"),
    Preset("small_multi_layer_rae", "small_rae on the mean of the last six blocks.", _small("multi_layer_rae", last=6), needs=HUB, ours="K, sizes"),
    Preset(
        "paper_rae", "RAE on DINOv2-B with registers (f16d768), ViT-XL decoder; DiT-XL/1 with DDT head, 80 epochs, 50 Euler steps.",
        # Its training images are crops of 256 from 384 px.
        _paper("rae", 768, {"name": "dinov2_b14_reg", "upscale": 0.875}, crop=[2 / 3, 2 / 3]),
        ours="of the diffusion training the decay of the rate is left out; it has random crops too",
        result="published: gFID 2.16 at 80 epochs, 1.51 at 800 (1.13 guided by a weaker model); not run here",
    ),
    Preset(
        "paper_multi_layer_rae", "RAEv2's tokenizer with K = 7 (every second block of DINOv3-L, f16d1024), ViT-XL decoder; then the network of paper_rae.",
        _paper("multi_layer_rae", 1024, {"name": "dinov3_l16"}, last=7, stride=2, pooled=True, places=True, noise_on="raw"),
        result="published: rFID 0.29; gFID 1.65 at 80 epochs (1.06 with internal guidance) with the network of paper_multi_layer_rae_raev2",
    ),
    Preset(
        "paper_multi_layer_rae_raev2", "RAEv2 with K = 7 and its own network: 28 blocks 1440 wide, a head 2048 wide, a second read-out at block 8.",
        {"diffusion.network": {"kind": "raev2", "width": 1440, "depth": 28, "heads": 20}, "diffusion.time.kind": "lognormal",
         "diffusion.tokenizer_of": "paper_multi_layer_rae",
         "protocol.sampler.steps": 100, "protocol.guidance": {"kind": "internal", "scale": 1.78, "interval": [0.1, 1.0]}},
        of="paper_multi_layer_rae", result="published: gFID 1.65 at 80 epochs, 1.06 with internal guidance; not run here",
        ours="AdamW in place of Muon, and no decay of its rate",
    ),
)  # fmt: skip
