"""PS-VAE (arXiv 2512.17909) in its two stages at four tiers.

    semantic  feature autoencoder on the frozen VFM; the pixel decoder on latents that it does not shape
    pixels    everything, the VFM's copy too; rebuilt tokens near to the original VFM's

From the paper: stages, losses, widths and rates at `paper`. Its weights contradict each other between
sections; those of the text (features 1, pixels 0.1) are taken. Weight of KL and everything below `paper`:
ours.
"""

from __future__ import annotations

from vfmlab.presets.conv_vae import GAN
from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import HUB, NOT_RUN, PHOTO_NEEDS, PHOTO_VFM, POCKET_CONV, POCKET_DECODER, Tree, base

FEATURES = {"feature_reconstruction": {"weight": 1.0, "l2": 1.0, "cosine": 1.0}, "kl": 1e-6}


def _stages(second: Tree, losses: Tree | None = None) -> list[Tree]:
    """second, losses: of the second stage, what changes."""
    first = ["encoder.*", "moments.*", "widen.*", "feature_decoder.*", "decoder.*"]
    return [{"name": "semantic", "trains": first},
            {"name": "pixels", "trains": ["*"], "train": second, "losses": losses or {}}]


TINY = {"method": "ps_vae", "channels": 8, "factor": 4, "depth": 1, "heads": 4,
        "decoder": {"kind": "conv", "width": 8, "multipliers": [1, 1, 1], "blocks": 1, "attention": []}}
POCKET = {"method": "ps_vae", "channels": 16, "factor": 4, "depth": 1, "heads": 4,
          "decoder": {"kind": "conv", **POCKET_CONV}}
# LDM's. It is scaled by the gradients of the reconstruction, whose weight of 0.1 is in them.
PAPER_GAN = GAN | {"start": 5_000_000}
ROWS = (
    Preset("tiny_ps_vae", "PS-VAE on the bundled pocket VFM, 16 px, a few dozen images in two stages: does it all run?",
           base("tiny", tokenizer=TINY, vfm={"name": "pocket"}, losses={**FEATURES, "l1": 0.1}, stages=_stages({}), train__samples=32)),
    Preset("pocket_ps_vae", "PS-VAE (f4d16) on the pocket VFM: features first, then pixels and the VFM through the latent.",
           base("pocket", tokenizer=POCKET, vfm={"name": "pocket"}, losses={**FEATURES, "l1": 1.0, "l2": 1.0},
                stages=_stages({"lr": 5e-4}), train__samples=7680),
           result="docs/results/claims_continuous.md: 20.2 dB, gFD 12.0 (three seeds, N = 4000)",
           ours="sizes, weights, no perceptual term, no GAN"),
    Preset("photo_ps_vae", "PS-VAE (f4d16) on EfficientNet-Lite0's last block for 32 px photographs: features first, then pixels and the VFM.",
           base("photo", tokenizer=POCKET | {"layer": -2, "decoder": POCKET_DECODER}, vfm=PHOTO_VFM, losses={**FEATURES, "l1": 1.0, "l2": 1.0},
                stages=_stages({"lr": 5e-4}), train__samples=38_400),
           needs=PHOTO_NEEDS, cost="not timed", result=NOT_RUN, ours="the decoder of the tier's other rows, sizes, weights, no perceptual term, no GAN"),
    Preset("paper_ps_vae", "PS-VAE on DINOv2-B (f16d96) in two stages; then LightningDiT-XL/1.",
           base("paper", tokenizer={"method": "ps_vae"}, vfm={"name": "dinov2_b14", "upscale": 0.875},
                losses={**FEATURES, "l1": 0.1, "lpips": 0.1, "adversarial": PAPER_GAN}, stages=_stages({}, {"adversarial": {"start": 0}}), train__batch=96,
                train__optimizer="adamw", train__lr=1e-4, diffusion__time={"kind": "lognormal", "shift": 96**0.5 / 4},
                protocol__sampler__shift=96**0.5 / 4),
           needs=HUB,
           result="published: rFID 0.203, PSNR 28.8; no class-conditional gFID; not run here",
           ours="weight of KL, when the discriminator begins, budgets; one linear layer each way in the place of an MLP; the published generator is text to image"),
)  # fmt: skip
