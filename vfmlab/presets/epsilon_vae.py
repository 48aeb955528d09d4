"""Epsilon-VAE (arXiv 2410.04081) at four tiers: a decoder that denoises in up to three steps.

From the paper: decoder sizes, gamma, steps, losses and their weights at `paper`; the discriminator judges
pairs of estimate and noisy state, non-saturating with R1, from the first step on, at a fixed weight.
"""

from __future__ import annotations

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import NOT_RUN, PHOTO_NEEDS, base

TINY = {
    "method": "epsilon_vae", "channels": 4, "factor": 4, "width": 8, "multipliers": [1, 1, 1], "blocks": 1,
    "attention": [],
    "decoder": {"kind": "diffusion", "base": 8, "multipliers": [1, 1], "blocks": 1, "steps": 2},
}
POCKET = {
    "method": "epsilon_vae", "channels": 8, "factor": 4, "width": 16, "multipliers": [1, 2, 2], "blocks": 1,
    "attention": [], "decoder": {"kind": "diffusion", "base": 32, "multipliers": [1, 2], "blocks": 1},
}
def gan(width: int, layers: int) -> dict:
    """The trajectory's discriminator. Network and weight of R1 are ours."""
    return {"weight": 0.5, "loss": "nonsaturating", "r1": 1.0,
            "discriminator": {"kind": "trajectory", "width": width, "layers": layers}}


ROWS = (
    Preset("tiny_epsilon_vae", "Epsilon-VAE, 16 px, a few dozen images, two decoding steps: does it all run?",
           base("tiny", tokenizer=TINY, losses={"denoising": 1.0, "l1": 0.5})),
    Preset("pocket_epsilon_vae", "Epsilon-VAE (f4d8): a small U-Net decodes in three steps; then the same DiT.",
           base("pocket", tokenizer=POCKET, losses={"denoising": 1.0, "l1": 0.5}),
           result=NOT_RUN, ours="sizes; L1 in the place of LPIPS, no GAN"),
    Preset("tiny_epsilon_vae_gan", "Epsilon-VAE with its discriminator of pairs of estimate and noisy state, 16 px.",
           of="tiny_epsilon_vae", config={"losses.adversarial": gan(8, 2)}),
    Preset("pocket_epsilon_vae_gan", "Epsilon-VAE (f4d8) with its discriminator of pairs of estimate and noisy state.",
           of="pocket_epsilon_vae", config={"losses.adversarial": gan(16, 3)},
           result=NOT_RUN, ours="sizes; L1 in the place of LPIPS; the discriminator's network"),
    Preset("photo_epsilon_vae", "Epsilon-VAE (f4d8) on 32 px photographs: a small U-Net decodes in three steps; then the tier's DiT.",
           base("photo", tokenizer=POCKET, losses={"denoising": 1.0, "l1": 0.5}),
           needs=PHOTO_NEEDS, cost="not timed", result=NOT_RUN, ours="sizes; L1 in the place of LPIPS, no GAN"),
    Preset("photo_epsilon_vae_gan", "Epsilon-VAE (f4d8) on photographs, with its discriminator of pairs of estimate and noisy state.",
           of="photo_epsilon_vae", config={"losses.adversarial": gan(16, 3)}, needs=PHOTO_NEEDS,
           cost="not timed", result=NOT_RUN, ours="sizes; L1 in the place of LPIPS; the discriminator's network"),
    Preset("paper_epsilon_vae", "Epsilon-VAE (f16d8) with the decoder of size M, three steps; then LightningDiT-XL/1.",
           base("paper", tokenizer={"method": "epsilon_vae", "channels": 8, "factor": 16, "width": 64, "multipliers": [1, 1, 2, 2, 4],
                                    "decoder": {"kind": "diffusion", "base": 96}},
                losses={"denoising": 1.0, "lpips": 0.5, "adversarial": gan(64, 5)}, train__samples=256_000_000, train__batch=256, train__betas=[0.0, 0.999],
                train__warmup=1_280_000, train__ema_halflife=177_000),
           result="published: rFID 1.91 (f16); not run here", ours="the discriminator's network, the weight of R1"),
)  # fmt: skip
