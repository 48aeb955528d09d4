"""VFM-VAE (arXiv 2510.18457) at every tier."""

from __future__ import annotations

from vfmlab.config import Run
from vfmlab.presets.table import preset
from vfmlab.presets.tiers import (
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


@preset
def tiny_vfm_vae() -> Run:
    """VFM-VAE on the bundled pocket VFM, 16 px, a few dozen images: does it all run?

    `vfmlab train tiny_vfm_vae` takes seconds on one core; the pictures are noise.
    """
    tokenizer = {"method": "vfm_vae", "channels": 4, "factor": 4, "widths": [16], "gelu": "erf", "decoder": TINY_DECODER}
    losses = TINY_LOSSES | {"vf": {"weight": 0.3}}
    return make("tiny_vfm_vae", tiny(), vfm={"name": "pocket"}, tokenizer=tokenizer, losses=losses,
                equivariance={"p_latent": 0.25, "p_prior": 0.25, "scales": [0.5, 1.0]})  # fmt: skip


@preset
def pocket_vfm_vae() -> Run:
    """VFM-VAE on the frozen pocket VFM (f4d8), then a small LightningDiT: the demo's pipeline.

    `vfmlab train pocket_vfm_vae`: about six minutes on one core; see docs/comparison.md for what to expect.
    """
    # 1x1 projections, the paper's second option: attention projections took a third of the step here.
    tokenizer = {"method": "vfm_vae", "widths": [32], "projection": "conv", "linear_start": True, "decoder": POCKET_DECODER}
    return make("pocket_vfm_vae", vae(pocket(), 8, 4, **tokenizer), vfm={"name": "pocket"},
                losses=POCKET_LOSSES | {"vf": {"weight": 0.3, "adaptive": False}})  # fmt: skip


@preset
def small_vfm_vae() -> Run:
    """VFM-VAE on DINOv2-S (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1. Sizes are ours.

    `vfmlab train small_vfm_vae --set data.source=parquet:PATH` on one GPU, hours. Needs the VFM's weights (hub or vfm.weights=FILE),
    or `vfm.name=pocket`. Not run to its end yet: no result is claimed.
    """
    tokenizer = {"method": "vfm_vae", "widths": [64], "decoder": SMALL_DECODER}
    return make("small_vfm_vae", vae(small(), 16, 4, **tokenizer), vfm={"name": "dinov2_s14", "upscale": 7.0},
                losses=SMALL_LOSSES | {"vf": {"weight": 1.0}}, equivariance={"p_latent": 0.5, "p_prior": 0.25})  # fmt: skip


@preset
def paper_vfm_vae() -> Run:
    """VFM-VAE f16d32 on SigLIP2-L/16 at 512 px, first stage (strong alignment, 20 M images); LightningDiT-XL/1, 64 epochs.

    `accelerate launch -m vfmlab train paper_vfm_vae --set data.source=folder:PATH`, many GPUs, days. The paper reports rFID 0.52 (after all
    four stages) and gFID 3.80 without guidance; without the adversarial terms and later stages, which this preset does
    not have, those numbers are not to be expected. Learning-rate schedule, weight decay and the DiT's EMA: ours.
    """
    losses = {"l1": 1.0, "lpips": 10.0, "kl": 1e-6, "multiscale": {"weight": 0.1, "until": 5_000_000}, "vf": {"weight": 5.0}}
    return make("paper_vfm_vae", vae(paper(), 32, 16, method="vfm_vae"), vfm={"name": "siglip2_l16_512", "layers": [0, 12, -1], "upscale": 2.0},
                losses=losses, equivariance={"p_latent": 0.5, "p_prior": 0.25})  # fmt: skip
