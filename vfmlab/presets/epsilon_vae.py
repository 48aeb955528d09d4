"""Epsilon-VAE (arXiv 2410.04081) at three tiers: a decoder that denoises in up to three steps.

From the paper: decoder sizes, gamma, steps and losses at `paper`, but for its discriminator of pairs of
estimate and state, which is left out.
"""

from __future__ import annotations

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import base

TINY = {
    "method": "epsilon_vae", "channels": 4, "factor": 4, "width": 8, "multipliers": [1, 1, 1], "blocks": 1,
    "attention": [],
    "decoder": {"kind": "diffusion", "base": 8, "multipliers": [1, 1], "blocks": 1, "steps": 2},
}
POCKET = {
    "method": "epsilon_vae", "channels": 8, "factor": 4, "width": 16, "multipliers": [1, 2, 2], "blocks": 1,
    "attention": [], "decoder": {"kind": "diffusion", "base": 32, "multipliers": [1, 2], "blocks": 1},
}
ROWS = (
    Preset("tiny_epsilon_vae", "Epsilon-VAE, 16 px, a few dozen images, two decoding steps: does it all run?",
           base("tiny", tokenizer=TINY, losses={"denoising": 1.0, "l1": 0.5})),
    Preset("pocket_epsilon_vae", "Epsilon-VAE (f4d8): a small U-Net decodes in three steps; then the same DiT.",
           base("pocket", tokenizer=POCKET, losses={"denoising": 1.0, "l1": 0.5}),
           result="not run to its end yet: no result is claimed", ours="sizes; L1 in the place of LPIPS, no GAN"),
    Preset("paper_epsilon_vae", "Epsilon-VAE (f16d8) with the decoder of size M, three steps; then LightningDiT-XL/1.",
           base("paper", tokenizer={"method": "epsilon_vae", "channels": 8, "factor": 16, "width": 64, "multipliers": [1, 1, 2, 2, 4],
                                    "decoder": {"kind": "diffusion", "base": 96}},
                losses={"denoising": 1.0, "lpips": 0.5}, train__samples=256_000_000, train__batch=256, train__betas=[0.0, 0.999],
                train__warmup=1_280_000),
           result="published, with a discriminator: rFID 1.91 (f16); not run here", ours="no trajectory discriminator"),
)  # fmt: skip
