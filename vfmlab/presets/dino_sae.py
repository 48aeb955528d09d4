"""HAE / DINO-SAE (arXiv 2601.22904) in its two stages, then a diffusion model on a sphere.

    align   stem and decoder; tokens held in the VFM's directions
    smooth  decoder alone, on tokens with noise

From the paper (v2): what `paper_dino_sae` says. Sizes and budgets below it: ours. The paper's radius is the
mean length of a normal vector of 1024 channels, its decoded length 14, its path has a radial penalty of 0.1.
"""

from __future__ import annotations

from typing import Any

from vfmlab.nn.sphere import mean_length
from vfmlab.presets.rae import PAPER_DDT, POCKET_DDT, TINY_DDT
from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import EPOCH, Tree, base

# The discriminator learns alone at first.
PAPER_GAN = {"weight": 0.5, "discriminator": "rae_dino", "discriminator_start": 0, "start": 2 * EPOCH}


def _sae(tier: str, network: Tree, tokenizer: Tree, side: int, second: Tree, train: Tree,
         **changes: Any) -> Tree:
    channels = tokenizer["channels"]
    shift = (channels * side**2 / 4096) ** 0.5
    return base(
        tier, tokenizer={"method": "dino_sae", "radius": mean_length(channels), **tokenizer},
        stages=[{"name": "align", "trains": ["stem.*", "decoder.*"]},
                {"name": "smooth", "trains": ["decoder.*"], "losses": {"token_cosine": 0.0, **second}, "train": train}],
        diffusion__network=network, diffusion__path={"kind": "sphere"}, diffusion__cosine_loss=0.0,
        diffusion__train__precision="fp32", diffusion__time={"kind": "lognormal", "shift": shift},
        protocol__sampler__shift=shift, **changes,
    )  # fmt: skip


TINY = {"channels": 128, "factor": 4, "stem": [16], "noise": 0.3,
        "decoder": {"kind": "dc_ae", "widths": [16, 16, 32], "depths": [1, 1, 1],
                    "blocks": ["residual", "residual", "vit"],
                    "in_shortcut": False}}
POCKET = {"channels": 128, "factor": 4, "stem": [64], "noise": 0.2, "noise_end": 0.33, "noise_rise": 5000,
          "decoder": {"kind": "dc_ae", "widths": [24, 48, 96], "depths": [1, 2, 2],
                      "blocks": ["residual", "residual", "vit"], "in_shortcut": False}}
LOSSES = {"l1": 1.0, "token_cosine": 0.5}
ROWS = (
    Preset("tiny_dino_sae", "HAE on the bundled pocket VFM, 16 px, a few dozen images in two stages, a sphere: does it all run?",
           _sae("tiny", TINY_DDT, TINY, 4, {}, {},
                vfm={"name": "pocket"}, losses=LOSSES, train__samples=32)),
    Preset("pocket_dino_sae", "HAE (f4d128): a stem on the pocket VFM and a DC-AE decoder in two stages, then a DiT with a wide head on a sphere.",
           _sae("pocket", POCKET_DDT, POCKET, 8, {}, {}, vfm={"name": "pocket"}, losses={**LOSSES, "l2": 1.0}, train__samples=7680,
                diffusion__cache=True),
           cost="about fifteen minutes on one core, most of it in the wide head",
           result="docs/results/claims_continuous.md: 26.2 dB; under pocket_plain_vae's DiT, on the sphere, gFD 25.3 (three seeds, N = 4000)",
           ours="sizes, noise, no GAN, the mean length of tokens at decoding"),
    Preset(
        "paper_dino_sae", "HAE on DINOv3-L (f16d1024), 172 M decoder; then a flow on spheres, 80 epochs, 50 Euler steps, tokens decoded at length 14.",
        _sae("paper", PAPER_DDT,
             {"channels": 1024, "factor": 16, "noise": 0.8, "noise_end": 1.2, "noise_rise": 20 * EPOCH, "decode_length": 14.0}, 16,
             {"adversarial": PAPER_GAN},
             {"samples": 40 * EPOCH, "lr": 5e-5, "betas": [0.5, 0.9], "ema_halflife": 142_000},
             vfm={"name": "dinov3_l16"}, losses={"l1": 1.0, "lpips": 1.0, "token_cosine": 0.5}, train__samples=20 * EPOCH,
             train__optimizer="adamw", train__lr=1e-5, train__betas=[0.9, 0.999], train__ema_halflife=3_550_000,
             diffusion__cache=False, diffusion__train__samples=80 * EPOCH, diffusion__train__betas=[0.9, 0.95], diffusion__train__ema_halflife=1_420_000,
             protocol__sampler__steps=50),
        result="published: rFID 0.78, PSNR 25.2, gFID 2.65 at 80 epochs; not run here",
        ours="the network is a DiT with a wide head (an earlier version's), not LightningDiT-XL",
    ),
)  # fmt: skip
