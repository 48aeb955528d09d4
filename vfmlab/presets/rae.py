"""RAE (arXiv 2510.11690) and its multi-layer form (RAEv2, 2605.18324) at every tier.

Only a decoder is trained, against noise on the latent. The diffusion network is RAE's: a DiT whose head is wider than the latent has
channels; times of training and sampling are shifted by sqrt(C h w / 4096). Latents are cached at `pocket` only (0.7 GB): they are larger than the images.

From the papers and the released configurations: what `paper_*` says, unless it is marked. Sizes and budgets of the other tiers: ours.
"""

from __future__ import annotations

from typing import Any

from vfmlab.config import Recipe
from vfmlab.presets.table import preset
from vfmlab.presets.tiers import POCKET_DECODER, SMALL_LOSSES, make, paper, pocket, small, tiny, vae

TINY_VIT = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "hidden": 32}
TINY_DDT = {"kind": "ddt", "width": 16, "depth": 1, "heads": 2, "head_width": 32, "head_depth": 1, "head_heads": 2, "patch": 2}
# The decoder of the other pocket tokenizers, but for its first layer: 128 channels need no widening.
WIDE_DECODER = POCKET_DECODER | {"decompress": "conv", "decompress_factor": 1}
# The other pocket networks' encoder; its head is as wide as a patch of 2 x 2 latents of 128 channels.
POCKET_DDT = {
    "kind": "ddt", "width": 128, "depth": 4, "heads": 4, "rmsnorm": False, "patch": 2, "head_width": 512, "head_depth": 1, "head_heads": 8,
}  # fmt: skip
# Noise averages out over channels: the paper's 0.8 for 768 of them, times sqrt(128 / 768). With 0.8 a pocket decoder loses 2 dB.
POCKET_NOISE = 0.33
SMALL_VIT = {"kind": "vit", "width": 384, "depth": 12, "heads": 6, "hidden": 1536}
SMALL_DDT = {"kind": "ddt", "size": "S", "patch": 1, "head_width": 768, "head_depth": 2, "head_heads": 12}
PAPER_DDT = {"kind": "ddt", "size": "XL", "patch": 1, "head_width": 2048, "head_depth": 2, "head_heads": 16}
EPOCH = 1_281_167  # images of ImageNet


def shifted(base: dict[str, Any], network: dict[str, Any], channels: int, side: int, time: str = "lognormal", cosine: float = 0.0) -> dict[str, Any]:
    """`base` with RAE's network and its time shift in training and sampling."""
    shift = (channels * side**2 / 4096) ** 0.5
    diffusion = base["diffusion"] | {"network": network, "time": {"kind": time, "shift": shift}, "cache": False, "cosine_loss": cosine}
    protocol = base["protocol"] | {"sampler": base["protocol"]["sampler"] | {"shift": shift}}
    return base | {"diffusion": diffusion, "protocol": protocol}


def _tiny(method: str, **more: Any) -> Recipe:
    base = vae(shifted(tiny(), TINY_DDT, 128, 4), 128, 4, method=method, decoder=TINY_VIT, **more)
    return make(f"tiny_{method}", base, vfm={"name": "pocket"}, losses={"l1": 1.0})


def _pocket(method: str, **more: Any) -> Recipe:
    tokenizer = {"method": method, "noise": POCKET_NOISE, "linear_start": True, "decoder": WIDE_DECODER, **more}
    base = vae(shifted(pocket(), POCKET_DDT, 128, 8), 128, 4, **tokenizer)
    base["diffusion"] = base["diffusion"] | {"cache": True}  # the VFM costs twice the network here
    losses = {"l1": 1.0, "l2": 1.0, "multiscale": {"weight": 0.1, "until": 7680}}
    return make(f"pocket_{method}", base, vfm={"name": "pocket"}, losses=losses)


def _small(method: str, **more: Any) -> Recipe:
    base = vae(shifted(small(), SMALL_DDT, 384, 8), 384, 4, method=method, decoder=SMALL_VIT, **more)
    losses = {name: term for name, term in SMALL_LOSSES.items() if name not in ("kl", "multiscale")}
    game = {"weight": 0.75, "discriminator": {"kind": "patchgan", "width": 64}, "adaptive": True, "start": 2_500_000}
    return make(f"small_{method}", base, vfm={"name": "dinov2_s14", "upscale": 3.5}, losses=losses | {"adversarial": game})


def _paper(method: str, channels: int, vfm: dict[str, Any], **more: Any) -> Recipe:
    base = shifted(paper(), PAPER_DDT, channels, 16, time="uniform")
    # Decoder: 16 epochs of AdamW, learning rate falling by a cosine (in the release to a tenth, here to zero), gradients not clipped.
    base["train"] |= {
        "samples": 16 * EPOCH, "batch": 512, "optimizer": "adamw", "lr": 2e-4, "betas": [0.9, 0.95], "schedule": "cosine", "warmup": EPOCH,
        "ema_halflife": 161_000, "clip": 1e9,
    }  # fmt: skip
    base["diffusion"]["train"] |= {"samples": 80 * EPOCH, "batch": 1024, "lr": 2e-4, "betas": [0.9, 0.95], "ema_halflife": 1_420_000}
    base["protocol"]["sampler"] |= {"steps": 50}
    game = {
        "weight": 0.75, "discriminator": "rae_dino", "adaptive": True, "start": 8 * EPOCH, "discriminator_start": 6 * EPOCH, "lr": 2e-4,
        "betas": [0.9, 0.95],
    }  # fmt: skip
    tokenizer = {"method": method, "noise_law": "uniform", **more}
    return make(f"paper_{method}", vae(base, channels, 16, **tokenizer), vfm=vfm, losses={"l1": 1.0, "lpips": 1.0, "adversarial": game})


@preset
def tiny_rae() -> Recipe:
    """RAE on the bundled pocket VFM, 16 px, a few dozen images: does it all run?

    `vfmlab train tiny_rae` takes seconds on one core; the pictures are noise.
    """
    return _tiny("rae")


@preset
def tiny_multi_layer_rae() -> Recipe:
    """Multi-layer RAE on the bundled pocket VFM, 16 px: does it all run?

    `vfmlab train tiny_multi_layer_rae` takes seconds on one core; the pictures are noise.
    """
    return _tiny("multi_layer_rae", last=2, pooled=True)


@preset
def pocket_rae() -> Recipe:
    """RAE on the last block of the pocket VFM (f4d128): only a decoder is trained, then a DiT with a wide head.

    `vfmlab train pocket_rae`: about fifteen minutes on one core, most of it in the wide head. Ours: the decoder of the other pocket
    tokenizers in place of a ViT, noise of 0.33, no GAN. The last block keeps less of the pixels than what the other tokenizers read.
    """
    return _pocket("rae")


@preset
def pocket_multi_layer_rae() -> Recipe:
    """pocket_rae on the mean of all four blocks of the pocket VFM.

    `vfmlab train pocket_multi_layer_rae`: about fifteen minutes on one core. K: ours.
    """
    return _pocket("multi_layer_rae", last=4)


@preset
def small_rae() -> Recipe:
    """RAE on DINOv2-S (f4d384) for 32 px images (CIFAR-10), ViT-S decoder, then DiT-S/1 with a wide head. Sizes are ours.

    `vfmlab train small_rae --set data.source=parquet:PATH` on one GPU, hours. Needs the VFM's weights (hub or vfm.weights=FILE).
    Not run to its end yet: no result is claimed.
    """
    return _small("rae")


@preset
def small_multi_layer_rae() -> Recipe:
    """small_rae on the mean of the last six blocks. K: ours.

    `vfmlab train small_multi_layer_rae --set data.source=parquet:PATH` on one GPU, hours. Not run to its end yet: no result is claimed.
    """
    return _small("multi_layer_rae", last=6)


@preset
def paper_rae() -> Recipe:
    """RAE on DINOv2-B with registers (f16d768), ViT-XL decoder; DiT-XL/1 with DDT head, 80 epochs, 50 Euler steps.

    `accelerate launch -m vfmlab train paper_rae --set data.source=folder:PATH`, many GPUs, days. Published: gFID 2.16 at 80 epochs,
    1.51 at 800 (1.13 guided by a weaker model). Of the diffusion training the learning rate's decay is left out.
    """
    return _paper("rae", 768, {"name": "dinov2_b14_reg", "upscale": 0.875})


@preset
def paper_multi_layer_rae() -> Recipe:
    """RAEv2's tokenizer with K = 7 (every second block of DINOv3-L, f16d1024), ViT-XL decoder; then the network of paper_rae.

    `accelerate launch -m vfmlab train paper_multi_layer_rae --set data.source=folder:PATH`, many GPUs, days. Published: rFID 0.29; gFID
    1.65 at 80 epochs with a wider network, clean-image prediction and an alignment head, which are not part of this preset.
    """
    return _paper("multi_layer_rae", 1024, {"name": "dinov3_l16"}, last=7, stride=2, pooled=True)
