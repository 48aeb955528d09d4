"""The plain convolutional VAE (SD-VAE's network, arXiv 2112.10752) and VA-VAE (2501.01423) at every tier."""

from __future__ import annotations

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import (
    EPOCH,
    PHOTO_NEEDS,
    PHOTO_VF,
    PHOTO_VFM,
    POCKET_CONV,
    POCKET_DECODER,
    POCKET_LOSSES,
    SMALL_DECODER,
    SMALL_LOSSES,
    TINY_DECODER,
    TINY_LOSSES,
    base,
)

# VA-VAE's: margins, weight, scaled by the gradients at the encoder's last layer; a GAN of weight 0.5. Its
# discriminator is LDM's PatchGAN; when it starts is ours (LDM's 50 k steps are more than a fifth of this
# budget).
VF = {"weight": 0.1, "cos_margin": 0.5, "distance_margin": 0.25}
LDM_GAN = {"kind": "patchgan", "width": 64, "scales": 1, "norm": "batch"}
GAN = {"weight": 0.5, "adaptive": True, "discriminator": LDM_GAN}
TINY = {"channels": 4, "factor": 4, "width": 8, "multipliers": [1, 1, 2], "blocks": 1, "attention": [],
        "decoder": TINY_DECODER}
TINY_GAN = GAN | {"start": 32, "discriminator": {"kind": "patchgan", "width": 4, "layers": 2, "scales": 1}}
POCKET = {"channels": 8, "factor": 4, **POCKET_CONV, "linear_start": True, "decoder": POCKET_DECODER}
SMALL = {"channels": 16, "factor": 4, "width": 96, "multipliers": [1, 2, 4], "blocks": 2, "attention": [8],
         "decoder": SMALL_DECODER}  # fmt: skip
PAPER = {"channels": 32, "factor": 16}
# LDM and VA-VAE sum the reconstruction over the 3 x 256 x 256 values of an image; here it is their mean.
PAPER_LOSSES = {"l1": 1.0, "lpips": 1.0, "kl": 1e-6 / (3 * 256**2)}
PAPER_GAN = GAN | {"start": 2_000_000}
DINO = {"name": "dinov2_s14", "upscale": 7.0}
OFF = {"l1": 0.0, "l2": 0.0, "multiscale": 0.0}
APART_PIXELS = {name: POCKET_LOSSES[name] for name in ("l1", "l2", "multiscale")}


def apart(first: int, second: int, third: int, pixels: dict, batch: int, crowd: int) -> list[dict]:
    """Joint compression and classification (arXiv 2310.19675): the encoder learns to tell classes apart,
    then the decoder learns pixels, then both. Budgets in images. Weights are ours; the augmentations of the
    first stage are left out. Its batch is `crowd`, of the others `batch`: classes need many images beside
    each other (see the loss), pixels many steps."""
    return [
        {"name": "apart", "trains": ["encoder.*", "quant.*"], "losses": OFF | {"coding_rate": 1.0},
         "train": {"samples": first, "batch": crowd}},
        {"name": "pixels", "trains": ["decoder.*"], "losses": pixels | {"coding_rate": 0.0},
         "train": {"samples": second, "batch": batch}},
        {"name": "together", "trains": ["*"], "losses": {"coding_rate": 0.01, "multiscale": 0.0},
         "train": {"samples": third}},
    ]



ROWS = (
    Preset(
        "tiny_plain_vae", "Plain convolutional VAE, 16 px, a few dozen images: does it all run?",
        base("tiny", tokenizer={"method": "plain_vae", **TINY}, losses=TINY_LOSSES),
    ),
    Preset(
        "tiny_va_vae", "VA-VAE with a discriminator, 16 px, a few dozen images: does it all run?",
        base("tiny", tokenizer={"method": "va_vae", **TINY}, vfm={"name": "pocket"}, losses=TINY_LOSSES | {"vf": VF, "adversarial": TINY_GAN}),
    ),
    Preset(
        "pocket_plain_vae", "The baseline: plain convolutional VAE (f4d8) with decoder, losses, budget and DiT of pocket_vfm_vae.",
        base("pocket", tokenizer={"method": "plain_vae", **POCKET}, losses=POCKET_LOSSES),
    ),
    Preset(
        "pocket_va_vae", "VA-VAE (f4d8): the plain VAE's network, aligned with the pocket VFM by the VF loss.",
        base("pocket", tokenizer={"method": "va_vae", **POCKET}, vfm={"name": "pocket"},
             losses=POCKET_LOSSES | {"vf": VF | {"weight": 0.3, "adaptive": False}}),
    ),
    Preset(
        "photo_plain_vae", "The baseline on photographs: plain convolutional VAE (f4d8) with decoder, losses, budget and DiT of photo_vfm_vae.",
        base("photo", tokenizer={"method": "plain_vae", **POCKET}, losses=POCKET_LOSSES), needs=PHOTO_NEEDS, ours="sizes, budgets",
    ),
    Preset(
        "photo_va_vae", "VA-VAE (f4d8) on photographs: the plain VAE's network, aligned with EfficientNet-Lite0 by the VF loss, margins 0.5 and 0.25.",
        base("photo", tokenizer={"method": "va_vae", **POCKET}, vfm=PHOTO_VFM,
             losses=POCKET_LOSSES | {"vf": VF | PHOTO_VF}),
        needs=PHOTO_NEEDS, ours="sizes, budgets, weight of the VF loss",
    ),
    Preset(
        "photo_va_vae_no_margins", "photo_va_vae with margins of 0: every token is aligned, all the way.",
        {"losses.vf.cos_margin": 0.0, "losses.vf.distance_margin": 0.0}, of="photo_va_vae", needs=PHOTO_NEEDS,
    ),
    Preset(
        "small_plain_vae", "Plain convolutional VAE (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1.",
        base("small", tokenizer={"method": "plain_vae", **SMALL}, losses=SMALL_LOSSES), ours="sizes",
    ),
    Preset(
        "small_va_vae", "VA-VAE (f4d16, DINOv2-S) for 32 px images (CIFAR-10), then LightningDiT-S/1.",
        base("small", tokenizer={"method": "va_vae", **SMALL}, vfm=DINO, losses=SMALL_LOSSES | {"vf": VF, "adversarial": GAN | {"start": 1_000_000}}),
        needs="the VFM's weights (hub or vfm.weights=FILE), or vfm.name=pocket", ours="sizes",
    ),
    Preset(
        "paper_va_vae", "VA-VAE f16d32 (convolutional, VF loss to DINOv2-L); LightningDiT-XL/1, 64 epochs.",
        base("paper", tokenizer={"method": "va_vae", **PAPER}, vfm={"name": "dinov2_l14", "upscale": 0.875},
             losses=PAPER_LOSSES | {"vf": VF, "adversarial": PAPER_GAN}),
        result="published: rFID 0.28-0.30, gFID 5.14; not run here", ours="batch, optimiser, budget and the start of the discriminator",
    ),
    Preset(
        "paper_plain_vae", "Plain convolutional VAE f16d32, the network of VA-VAE without alignment; LightningDiT-XL/1, 64 epochs.",
        base("paper", tokenizer={"method": "plain_vae", **PAPER}, losses=PAPER_LOSSES | {"adversarial": PAPER_GAN}),
        result="published: rFID 0.26, gFID 10.17 at 80 k steps; not run here", ours="batch, optimiser, budget and the start of the discriminator",
    ),
    Preset(
        "tiny_plain_vae_apart", "Classes apart first, then pixels, then both, on the plain VAE, 16 px: does it all run?",
        {"stages": apart(16, 16, 16, {"l1": 1.0}, 8, 8)}, of="tiny_plain_vae",
    ),
    Preset(
        "pocket_plain_vae_apart", "Joint compression and classification: coding-rate reduction first, then the decoder, then both, on the plain VAE.",
        {"tokenizer.linear_start": False, "stages": apart(5120, 7680, 2560, APART_PIXELS, 32, 64)}, of="pocket_plain_vae",
        cost="the tokenizer under a minute on one core",
        result="probe .83 at one bit a pixel and 18.4 dB; plain VAE, also without linear start: .52 and 24.0 (docs/results/claims_joint_scenes.md)",
        ours="weights, budgets, no augmentations",
    ),
    Preset(
        "photo_plain_vae_apart", "Joint compression and classification on photographs: as pocket_plain_vae_apart, with the images of photo_plain_vae.",
        {"tokenizer.linear_start": False, "stages": apart(25_600, 38_400, 12_800, APART_PIXELS, 32, 64)}, of="photo_plain_vae",
        needs=PHOTO_NEEDS, cost="not timed", result="at two fifths of its budget a probe at one bit a pixel gains .02 (docs/results/claims_joint_photo.md)",
        ours="weights, budgets, no augmentations",
    ),
    Preset(
        "tiny_plain_vae_repa_e", "tiny_plain_vae tuned by REPA-E: does it all run?", of="tiny_plain_vae+repa_e",
    ),
    Preset(
        "pocket_plain_vae_repa", "REPA to the pocket VFM, which this tokenizer has never seen: there the target is news.",
        of="pocket_plain_vae+repa", cost="about four minutes on one core",
    ),
    Preset(
        "pocket_plain_vae_joint", "The diffusion side of the joint recipe on plain latents: what of it is the tokenizer's part?",
        of="pocket_plain_vae+joint", cost="about four minutes on one core",
    ),
    Preset(
        "pocket_plain_vae_repa_e", "pocket_plain_vae tuned by REPA-E while its diffusion model is trained.",
        {"diffusion.train.lr_for": {"tokenizer.*": 0.2}}, of="pocket_plain_vae+repa_e", cost="not timed", result="not run to its end yet",
        ours="the tokenizer's rate, a fifth",
    ),
    Preset(
        "paper_plain_vae_repa_e", "REPA-E on the plain VAE (f16d32): SiT-XL/1 and the tokenizer together, REPA to DINOv2-B with 0.5 and 1.5, 80 epochs.",
        {"diffusion.network": {"kind": "sit", "size": "XL", "patch": 1, "qk_norm": True}, "diffusion.cosine_loss": 0.0,
         "diffusion.time": {"kind": "uniform"}, "diffusion.train.samples": 80 * EPOCH, "diffusion.tune.statistics": "batch"},
        of="paper_plain_vae+repa_e", ours="batch, learning rates; the published models tune SD-VAE and others",
    ),
)  # fmt: skip
