"""SD-VAE: diffusers' AutoencoderKL, trained here at the offline tiers and imported with its released weights at the others."""

from __future__ import annotations

from vfmlab.config import Recipe
from vfmlab.presets.aligntok import without
from vfmlab.presets.table import preset
from vfmlab.presets.tiers import POCKET_LOSSES, TINY_LOSSES, make, paper, pocket, small, tiny, vae


@preset
def tiny_sd_vae() -> Recipe:
    """SD-VAE's network in miniature, trained here, 16 px, a few dozen images: does it all run? Needs diffusers.

    `vfmlab train tiny_sd_vae` takes seconds on one core; the pictures are noise.
    """
    tokenizer = {"method": "sd_vae", "block_out_channels": [8, 8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    return make("tiny_sd_vae", vae(tiny(), 4, 4, **tokenizer), losses=without(TINY_LOSSES, "multiscale"))


@preset
def pocket_sd_vae() -> Recipe:
    """SD-VAE's network (f4d8) in miniature, trained here at the budget of pocket_vfm_vae, then the same DiT. Needs diffusers.

    `vfmlab train pocket_sd_vae`: a little longer than pocket_plain_vae. Its decoder is the network's own convolutional one, not the
    one that the other pocket tokenizers share.
    """
    tokenizer = {"method": "sd_vae", "block_out_channels": [16, 32, 48], "layers_per_block": 1, "norm_num_groups": 8, "linear_start": True}
    return make("pocket_sd_vae", vae(pocket(), 8, 4, **tokenizer), losses=without(POCKET_LOSSES, "multiscale"))


def _imported(name: str, base: dict, network: dict) -> Recipe:
    base = {key: value for key, value in base.items() if key != "train"}
    diffusion = {**base["diffusion"], "network": base["diffusion"]["network"] | network}
    return make(name, vae(base, 4, 8, method="sd_vae") | {"diffusion": diffusion, "imported": {"name": "sd-vae"}})


@preset
def small_sd_vae() -> Recipe:
    """The released SD-VAE (f8d4), not trained, on 32 px images (CIFAR-10); LightningDiT-S/1 on its 4 x 4 latents.

    `vfmlab train small_sd_vae --set data.source=parquet:PATH` on one GPU, hours. Needs the released weights (hub) and diffusers. The
    weights were made for larger images. Not run to its end yet: no result is claimed.
    """
    return _imported("small_sd_vae", small(), {})


@preset
def paper_sd_vae() -> Recipe:
    """The released SD-VAE (f8d4), not trained; LightningDiT-XL/2 (as many tokens as the f16 tokenizers), 64 epochs.

    `accelerate launch -m vfmlab train paper_sd_vae --set data.source=folder:PATH`, many GPUs, days. Needs the released weights (hub)
    and diffusers. Listed: rFID 0.62, gFID 7.13 at 80 epochs with another DiT.
    """
    return _imported("paper_sd_vae", paper(), {"patch": 2})
