"""AlignTok (arXiv 2509.25162) in its three stages, at every tier.

    latent      adapter and decoder; the encoder is frozen
    perceptual  everything; the loss `preservation` holds the latent where stage one had put it
    refine      decoder alone; may as well be trained after the diffusion model

From the paper: what trains in each stage, weights of perceptual term (1), GAN (0.5) and preservation (1, after the
adapter, L2). Not stated there, so ours: adapter, decoder's size, optimiser, budgets, learning rates, discriminator.
"""

from __future__ import annotations

from typing import Any

from vfmlab.config import Recipe
from vfmlab.presets.conv_vae import GAN
from vfmlab.presets.table import preset
from vfmlab.presets.tiers import (
    POCKET_DECODER,
    POCKET_LOSSES,
    SMALL_DECODER,
    TINY_DECODER,
    TINY_LOSSES,
    make,
    paper,
    pocket,
    small,
    tiny,
    vae,
)

ENCODER_LR = {"encoder.*": 0.1}
# A linear start belongs to adapter (what it reads) and decoder (what it writes).
READS, WRITES = ("start.read.*", "start.gain_encode"), ("start.write.*", "start.gain_decode")


def stages(latent: int, perceptual: int, refine: int, linear_start: bool = False) -> list[dict[str, Any]]:
    """The three stages with their budgets in images."""
    reads, writes = (READS, WRITES) if linear_start else ((), ())
    return [
        {"name": "latent", "trains": ["adapter.*", "decoder.*", *reads, *writes], "train": {"samples": latent}},
        {"name": "perceptual", "trains": ["*"], "losses": {"preservation": 1.0}, "train": {"samples": perceptual, "lr_for": ENCODER_LR}},
        {"name": "refine", "trains": ["decoder.*", *writes], "losses": {"preservation": 0.0}, "train": {"samples": refine, "lr_for": {}}},
    ]


def without(losses: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: term for name, term in losses.items() if name not in names}


@preset
def tiny_aligntok() -> Recipe:
    """AlignTok from the bundled pocket VFM, 16 px, a few dozen images in three stages: does it all run?

    `vfmlab train tiny_aligntok` takes seconds on one core; the pictures are noise.
    """
    tokenizer = {"method": "aligntok", "channels": 4, "factor": 4, "adapter_width": 16, "decoder": TINY_DECODER}
    return make("tiny_aligntok", tiny(), vfm={"name": "pocket"}, tokenizer=tokenizer, losses=without(TINY_LOSSES, "kl"), stages=stages(32, 16, 16))


@preset
def pocket_aligntok() -> Recipe:
    """AlignTok (f4d8) from the pocket VFM: decoder, pixel losses and images in all as pocket_vfm_vae, then the same DiT.

    `vfmlab train pocket_aligntok`: roughly eight minutes on one core, half of it in stage 2. No GAN, as in the other pocket tokenizers.
    """
    tokenizer = {"method": "aligntok", "adapter_width": 64, "linear_start": True, "decoder": POCKET_DECODER}
    # Stage 1 has little to learn after a linear start: 21.1 dB after 2560 images. Stage 2 gains all along.
    recipe = stages(2560, 10_240, 2560, linear_start=True)
    recipe[1]["losses"]["multiscale"] = {"until": 5120}  # in all half the budget, as in the other tokenizers
    recipe[2]["losses"]["multiscale"] = 0.0
    return make("pocket_aligntok", vae(pocket(), 8, 4, **tokenizer), vfm={"name": "pocket"}, losses=without(POCKET_LOSSES, "kl"), stages=recipe)


@preset
def small_aligntok() -> Recipe:
    """AlignTok from DINOv2-S (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1. Sizes are ours.

    `vfmlab train small_aligntok --set data.source=parquet:PATH` on one GPU, hours. Needs the VFM's weights (hub or vfm.weights=FILE),
    or `vfm.name=pocket`. Not run to its end yet: no result is claimed.
    """
    tokenizer = {"method": "aligntok", "adapter_width": 384, "decoder": SMALL_DECODER}
    losses = {"l1": 1.0, "lpips": 1.0, "multiscale": 0.1, "adversarial": {**GAN, "start": 500_000, "warmup": 250_000}}
    recipe = stages(2_500_000, 1_500_000, 1_000_000)
    for later in recipe[1:]:
        later["losses"]["adversarial"] = {"start": 0, "warmup": 0}
    return make("small_aligntok", vae(small(), 16, 4, **tokenizer), vfm={"name": "dinov2_s14", "upscale": 7.0}, losses=losses, stages=recipe)


def _paper(name: str, channels: int) -> Recipe:
    tokenizer = {"method": "aligntok", "adapter_width": 1024}
    losses = {"l1": 1.0, "lpips": 1.0, "adversarial": {**GAN, "start": 2_000_000, "warmup": 1_000_000}}
    recipe = stages(20_000_000, 20_000_000, 5_000_000)
    for later in recipe[1:]:
        later["losses"]["adversarial"] = {"start": 0, "warmup": 0}
    base = paper() | {"protocol": {"n": 50_000, "batch": 64, "sampler": {"steps": 30, "shift": 1 / 0.3}, "features": "inception"}}
    return make(name, vae(base, channels, 16, **tokenizer), vfm={"name": "dinov2_l14", "upscale": 0.875}, losses=losses, stages=recipe)


@preset
def paper_aligntok() -> Recipe:
    """AlignTok f16d32 from DINOv2-L/14 in three stages; LightningDiT-XL/1, 80 k steps, 30 sampling steps.

    `accelerate launch -m vfmlab train paper_aligntok --set data.source=folder:PATH`, many GPUs, days. Published: rFID 0.26, linear
    probe 35.1, gFID 4.05 (2.17 guided). Adapter, decoder's size, optimiser, learning rates, budgets, discriminator: ours.
    """
    return _paper("paper_aligntok", 32)


@preset
def paper_aligntok_d64() -> Recipe:
    """AlignTok with 64 latent channels (f16d64); everything else as paper_aligntok.

    `accelerate launch -m vfmlab train paper_aligntok_d64 --set data.source=folder:PATH`, many GPUs, days. Published: rFID 0.17, linear
    probe 47.0, gFID 5.24 (2.34 guided).
    """
    return _paper("paper_aligntok_d64", 64)
