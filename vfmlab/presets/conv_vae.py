"""The plain convolutional VAE (SD-VAE's network, arXiv 2112.10752) and VA-VAE (2501.01423) at every tier."""

from __future__ import annotations

from vfmlab.config import Recipe
from vfmlab.presets.table import preset
from vfmlab.presets.tiers import (
    POCKET_CONV,
    POCKET_DECODER,
    POCKET_LOSSES,
    SMALL_DECODER,
    SMALL_LOSSES,
    TINY_DECODER,
    TINY_LOSSES,
    make,
    paper,
    pocket,
    small,
    tiny,
    vae,
)

# VA-VAE's: margins, weight, scaled by the gradients at the encoder's last layer; a GAN of weight 0.5. Its discriminator is
# LDM's PatchGAN; when it starts is ours (LDM's 50 k steps are more than a fifth of this budget).
VF = {"weight": 0.1, "cos_margin": 0.5, "distance_margin": 0.25}
GAN = {"weight": 0.5, "adaptive": True, "discriminator": {"kind": "patchgan", "width": 64, "scales": 1, "norm": "batch"}}


@preset
def tiny_plain_vae() -> Recipe:
    """Plain convolutional VAE, 16 px, a few dozen images: does it all run?

    `vfmlab train tiny_plain_vae` takes seconds on one core; the pictures are noise.
    """
    tokenizer = {"method": "plain_vae", "channels": 4, "factor": 4, "width": 8, "multipliers": [1, 1, 2], "blocks": 1, "attention": [],
                 "decoder": TINY_DECODER}  # fmt: skip
    return make("tiny_plain_vae", tiny(), tokenizer=tokenizer, losses=TINY_LOSSES)


@preset
def tiny_va_vae() -> Recipe:
    """VA-VAE with a discriminator, 16 px, a few dozen images: does it all run? `vfmlab train tiny_va_vae`, seconds; the pictures are noise."""
    base = tiny_plain_vae().model_dump(mode="json")
    game = {"weight": 0.5, "adaptive": True, "start": 32, "discriminator": {"kind": "patchgan", "width": 4, "layers": 2, "scales": 1}}
    return make("tiny_va_vae", base, tokenizer=base["tokenizer"] | {"method": "va_vae"}, vfm={"name": "pocket"},
                losses=TINY_LOSSES | {"vf": VF, "adversarial": game})  # fmt: skip


@preset
def pocket_plain_vae() -> Recipe:
    """Plain convolutional VAE (f4d8) with the decoder, losses and budget of pocket_vfm_vae, then the same DiT: the baseline.

    `vfmlab train pocket_plain_vae`: about six minutes on one core; see docs/results/comparison.md for what to expect.
    """
    tokenizer = {"method": "plain_vae", **POCKET_CONV, "linear_start": True, "decoder": POCKET_DECODER}
    return make("pocket_plain_vae", vae(pocket(), 8, 4, **tokenizer), losses=POCKET_LOSSES)


@preset
def pocket_va_vae() -> Recipe:
    """VA-VAE (f4d8): the plain VAE's network, aligned with the pocket VFM by the VF loss.

    `vfmlab train pocket_va_vae`: about six minutes on one core; see docs/results/comparison.md for what to expect.
    """
    tokenizer = {"method": "va_vae", **POCKET_CONV, "linear_start": True, "decoder": POCKET_DECODER}
    return make("pocket_va_vae", vae(pocket(), 8, 4, **tokenizer), vfm={"name": "pocket"},
                losses=POCKET_LOSSES | {"vf": VF | {"weight": 0.3, "adaptive": False}})  # fmt: skip


@preset
def small_plain_vae() -> Recipe:
    """Plain convolutional VAE (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1. Sizes are ours.

    `vfmlab train small_plain_vae --set data.source=parquet:PATH` on one GPU, hours. Not run to its end yet: no result is claimed.
    """
    tokenizer = {"method": "plain_vae", "width": 96, "multipliers": [1, 2, 4], "blocks": 2, "attention": [8], "decoder": SMALL_DECODER}
    return make("small_plain_vae", vae(small(), 16, 4, **tokenizer), losses=SMALL_LOSSES)


@preset
def small_va_vae() -> Recipe:
    """VA-VAE (f4d16, DINOv2-S) for 32 px images (CIFAR-10), then LightningDiT-S/1. Sizes are ours.

    `vfmlab train small_va_vae --set data.source=parquet:PATH` on one GPU, hours. Needs the VFM's weights (hub or vfm.weights=FILE),
    or `vfm.name=pocket`. Not run to its end yet: no result is claimed.
    """
    base = small_plain_vae().model_dump(mode="json")
    return make("small_va_vae", base, tokenizer=base["tokenizer"] | {"method": "va_vae"}, vfm={"name": "dinov2_s14", "upscale": 7.0},
                losses=SMALL_LOSSES | {"vf": VF, "adversarial": GAN | {"start": 1_000_000}})  # fmt: skip


@preset
def paper_va_vae() -> Recipe:
    """VA-VAE f16d32 (convolutional, VF loss to DINOv2-L); LightningDiT-XL/1, 64 epochs.

    `accelerate launch -m vfmlab train paper_va_vae --set data.source=folder:PATH`, many GPUs, days. Published: rFID 0.28-0.30, gFID 5.14.
    Not run here: no result is claimed. Batch, optimiser, budget and the start of the discriminator are ours.
    """
    losses = {"l1": 1.0, "lpips": 1.0, "kl": 1e-6, "vf": VF, "adversarial": GAN | {"start": 2_000_000}}
    return make("paper_va_vae", vae(paper(), 32, 16, method="va_vae"), vfm={"name": "dinov2_l14", "upscale": 0.875}, losses=losses)


@preset
def paper_plain_vae() -> Recipe:
    """Plain convolutional VAE f16d32, the same network as VA-VAE without alignment; LightningDiT-XL/1, 64 epochs.

    `accelerate launch -m vfmlab train paper_plain_vae --set data.source=folder:PATH`, many GPUs, days. Published: rFID 0.26, gFID 10.17 at 80 k steps.
    Not run here: no result is claimed. Batch, optimiser, budget and the start of the discriminator are ours.
    """
    losses = {"l1": 1.0, "lpips": 1.0, "kl": 1e-6, "adversarial": GAN | {"start": 2_000_000}}
    return make("paper_plain_vae", vae(paper(), 32, 16, method="plain_vae"), losses=losses)
