"""VQGAN (arXiv 2012.09841) and LlamaGen's tokenizer (2406.06525): a convolutional autoencoder with codes."""

from __future__ import annotations

from typing import Any

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import (
    EPOCH,
    PHOTO_NEEDS,
    POCKET_CONV,
    POCKET_DECODER,
    POCKET_LOSSES,
    SMALL_DECODER,
    SMALL_LOSSES,
    TINY_DECODER,
    TINY_LOSSES,
    Tree,
    base,
    without,
)

# Both losses of the quantiser, weighted by its own beta.
CODES = {"codebook": 1.0}


def codes(tier: str, **changes: Any) -> Tree:
    """The tier's recipe without diffusion, which makes no codes, and its solver."""
    tree = without(base(tier, **changes), "diffusion")
    return tree | {"protocol": without(tree["protocol"], "sampler")}


# LlamaGen: MSE, LPIPS (VGG) and a PatchGAN of weight 0.5 (hinge) from step 20 000 at batch 128;
# the rate is constant.
LLAMAGEN_GAN = {"weight": 0.5, "start": 20_000 * 128,
                "discriminator": {"kind": "patchgan", "width": 64, "layers": 3, "scales": 1, "norm": "batch"}}

ROWS = (
    Preset(
        "tiny_vqgan", "VQGAN with LlamaGen's cosine quantiser, 16 px, a few dozen images: does it all run?",
        codes("tiny", losses=without(TINY_LOSSES, "kl") | CODES,
              tokenizer={"method": "vqgan", "channels": 4, "factor": 4, "width": 8, "multipliers": [1, 1, 2], "blocks": 1, "attention": [],
                         "inner": 16, "quantizer": {"kind": "cosine", "size": 32}, "decoder": TINY_DECODER}),
    ),
    Preset(
        "pocket_vqgan", "VQGAN (f4, 1024 codes of width 8, cosine) with decoder, losses and budget of pocket_vfm_vae: 64 codes an image.",
        codes("pocket", losses=without(POCKET_LOSSES, "kl") | CODES,
              tokenizer={"method": "vqgan", "channels": 8, "factor": 4, **POCKET_CONV, "inner": 32, "quantizer": {"kind": "cosine", "size": 1024},
                         "decoder": POCKET_DECODER}),
        result="23.6 dB, rFD .93, 55 % of the codes in use (three seeds, N = 4000)", ours="sizes",
    ),
    Preset(
        "photo_vqgan", "VQGAN (f4, 1024 codes of width 8, cosine) on photographs, with decoder, losses and budget of photo_vfm_vae: 64 codes an image.",
        codes("photo", losses=without(POCKET_LOSSES, "kl") | CODES,
              tokenizer={"method": "vqgan", "channels": 8, "factor": 4, **POCKET_CONV, "inner": 32, "quantizer": {"kind": "cosine", "size": 1024},
                         "decoder": POCKET_DECODER}),
        needs=PHOTO_NEEDS, cost="not timed", result="no result is claimed", ours="sizes",
    ),
    Preset(
        "small_vqgan", "VQGAN (f4, 4096 codes of width 8, cosine) for 32 px images (CIFAR-10).",
        codes("small", losses=without(SMALL_LOSSES, "kl") | CODES,
              tokenizer={"method": "vqgan", "channels": 8, "factor": 4, "width": 96, "multipliers": [1, 2, 4], "blocks": 2, "attention": [8],
                         "quantizer": {"kind": "cosine", "size": 4096}, "decoder": SMALL_DECODER}),
        ours="sizes",
    ),
    Preset(
        "paper_vqgan", "LlamaGen's tokenizer (f16, 16384 codes of width 8, cosine), 40 epochs.",
        codes("paper", data__crop=[0.8, 1.0], losses={"l2": 1.0, "lpips": 1.0, "adversarial": LLAMAGEN_GAN} | CODES,
              tokenizer={"method": "vqgan", "decoder": {"kind": "conv", "inner": 256}},
              train__samples=40 * EPOCH, train__batch=128, train__optimizer="adamw", train__weight_decay=0.05, train__betas=[0.9, 0.95]),
        result="published: rFID 2.19, PSNR 20.79, use 97 %; not run here",
        ours="the half-life of the average, the share of a random crop uniform; the release uses Adam without decay, the paper AdamW 0.05",
    ),
)  # fmt: skip
