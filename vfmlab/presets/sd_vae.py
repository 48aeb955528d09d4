"""SD-VAE: diffusers' AutoencoderKL, trained here at the offline tiers and imported with its released weights
at the others."""

from __future__ import annotations

from typing import Any

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import PHOTO_NEEDS, POCKET_LOSSES, TINY_LOSSES, Tree, base, without


def _released(tier: str, **changes: Any) -> Tree:
    tree = base(tier, tokenizer={"method": "sd_vae", "channels": 4, "factor": 8}, imported={"name": "sd-vae"},
                **changes)
    return without(tree, "train")


ROWS = (
    Preset(
        "tiny_sd_vae", "SD-VAE's network in miniature, trained here, 16 px, a few dozen images: does it all run?",
        base("tiny", losses=without(TINY_LOSSES, "multiscale"),
             tokenizer={"method": "sd_vae", "channels": 4, "factor": 4, "block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4}),
        needs="diffusers",
    ),
    Preset(
        "pocket_sd_vae", "SD-VAE's network (f4d8) in miniature, trained here at the budget of pocket_vfm_vae, then the same DiT.",
        base("pocket", losses=without(POCKET_LOSSES, "multiscale"),
             tokenizer={"method": "sd_vae", "channels": 8, "factor": 4, "block_out_channels": [16, 32, 48], "layers_per_block": 1, "norm_num_groups": 8,
                        "linear_start": True}),
        cost="a little longer than pocket_plain_vae", result="docs/results/tokenizers.md", needs="diffusers",
        ours="its decoder is the network's own convolutional one, not the one that the other pocket tokenizers share",
    ),
    Preset(
        "photo_sd_vae", "SD-VAE's network (f4d8) in miniature on photographs, at the budget of photo_vfm_vae, then the same DiT.",
        base("photo", losses=without(POCKET_LOSSES, "multiscale"),
             tokenizer={"method": "sd_vae", "channels": 8, "factor": 4, "block_out_channels": [16, 32, 48], "layers_per_block": 1, "norm_num_groups": 8,
                        "linear_start": True}),
        needs=f"diffusers; {PHOTO_NEEDS}", ours="its decoder is the network's own convolutional one; sizes, budgets",
    ),
    Preset(
        "small_sd_vae", "The released SD-VAE (f8d4), not trained, on 32 px images (CIFAR-10); LightningDiT-S/1 on its 4 x 4 latents.",
        _released("small"), needs="the released weights (hub) and diffusers", ours="the weights were made for larger images",
    ),
    Preset(
        "paper_sd_vae", "The released SD-VAE (f8d4), not trained; LightningDiT-XL/2 (as many tokens as the f16 tokenizers), 64 epochs.",
        _released("paper", diffusion__network__patch=2), needs="the released weights (hub) and diffusers",
        result="listed: rFID 0.62, gFID 7.13 at 80 epochs with another DiT; not run here",
    ),
)  # fmt: skip
