"""FAE, the feature auto-encoder (arXiv 2512.07829), in its two stages at every tier.

    features  encoder and feature decoder rebuild the VFM's map; pixels play no part
    pixels    the pixel decoder alone, on rebuilt maps; the latent is fixed

From the paper: the stages, what trains in each, losses (L2 on features, KL; then pixels, perceptual and GAN), sizes at `paper`.
Not stated there, so ours: weights of KL, perceptual and GAN terms, the discriminator, and everything below `paper`.
"""

from __future__ import annotations

from typing import Any

from vfmlab.config import Recipe
from vfmlab.presets.rae import SMALL_VIT, WIDE_DECODER
from vfmlab.presets.table import preset
from vfmlab.presets.tiers import TINY_DECODER, make, paper, pocket, small, tiny, vae

FEATURES = {"feature_reconstruction": 1.0, "kl": 1e-6}
READS, WRITES = ("start.read.*", "start.gain_encode", "start.logvar"), ("start.write.*", "start.gain_decode")


def stages(pixels: dict[str, Any], linear_start: bool = False, **second: Any) -> list[dict[str, Any]]:
    """pixels: losses of the second stage, which replace those on features. second: fields of `train` that change in it."""
    reads, writes = (READS, WRITES) if linear_start else ((), ())
    return [
        {"name": "features", "trains": ["encoder.*", "feature_decoder.*", *reads]},
        {"name": "pixels", "trains": ["decoder.*", *writes], "losses": dict.fromkeys(FEATURES, 0.0) | pixels, "train": second},
    ]


@preset
def tiny_fae() -> Recipe:
    """FAE on the bundled pocket VFM, 16 px, a few dozen images in two stages: does it all run?

    `vfmlab train tiny_fae` takes seconds on one core; the pictures are noise.
    """
    tokenizer = {"method": "fae", "channels": 4, "factor": 4, "heads": 2, "head_width": 8, "feature_depth": 1,
                 "decoder": TINY_DECODER | {"decompress": "conv", "decompress_factor": 1}}  # fmt: skip
    base = tiny()
    return make("tiny_fae", base | {"tokenizer": tokenizer}, vfm={"name": "pocket"}, losses=FEATURES, stages=stages({"l1": 1.0}, samples=32),
                train=base["train"] | {"samples": 32})  # fmt: skip


@preset
def pocket_fae() -> Recipe:
    """FAE (f4d8) on the last layer of the pocket VFM, in two stages with the images of pocket_vfm_vae in all, then the same DiT.

    `vfmlab train pocket_fae`: about six minutes on one core. No GAN, as in the other pocket tokenizers.
    """
    tokenizer = {"method": "fae", "heads": 4, "head_width": 32, "feature_depth": 1, "linear_start": True, "decoder": WIDE_DECODER}
    base = vae(pocket(), 8, 4, **tokenizer)
    recipe = stages({"l1": 1.0, "l2": 1.0, "multiscale": {"weight": 0.1, "until": 3840}}, linear_start=True)
    return make("pocket_fae", base, vfm={"name": "pocket"}, losses=FEATURES, stages=recipe, train=base["train"] | {"samples": 7680})


@preset
def small_fae() -> Recipe:
    """FAE on DINOv2-S (f4d16) for 32 px images (CIFAR-10), ViT-S pixel decoder, then LightningDiT-S/1. Sizes are ours.

    `vfmlab train small_fae --set data.source=parquet:PATH` on one GPU, hours. Needs the VFM's weights (hub or vfm.weights=FILE).
    Not run to its end yet: no result is claimed.
    """
    tokenizer = {"method": "fae", "heads": 6, "head_width": 256, "feature_depth": 6, "decoder": SMALL_VIT}
    base = vae(small(), 16, 4, **tokenizer)
    game = {"weight": 0.5, "discriminator": {"kind": "patchgan", "width": 64}, "adaptive": True, "start": 1_250_000}
    return make("small_fae", base, vfm={"name": "dinov2_s14", "upscale": 3.5}, losses=FEATURES, train=base["train"] | {"samples": 2_500_000},
                stages=stages({"l1": 1.0, "lpips": 1.0, "adversarial": game}))  # fmt: skip


@preset
def paper_fae() -> Recipe:
    """FAE on DINOv2-g/14 (f16d32), ViT-L pixel decoder; LightningDiT-XL/1, 80 epochs, time shift 0.4 in its time (1 / 0.4 in ours).

    `accelerate launch -m vfmlab train paper_fae --set data.source=folder:PATH`, many GPUs, weeks. Published: rFID 0.68, gFID 2.08
    (1.70 guided). Left out: the pixel decoder's first training on the VFM's own, noisy maps.
    """
    base = vae(paper(), 32, 16, method="fae")
    # A million steps each, as we read the paper's table: 1024 images a step for features, 512 for pixels.
    base["train"] |= {
        "samples": 1_024_000_000, "batch": 1024, "optimizer": "adamw", "lr": 1e-4, "betas": [0.9, 0.999], "schedule": "cosine",
        "warmup": 1_024_000, "checkpoint_every": 2_560_000, "preview_every": 5_120_000,
    }  # fmt: skip
    base["diffusion"]["train"] |= {"samples": 102_493_000, "batch": 512, "lr": 1e-4, "betas": [0.9, 0.999]}
    base["protocol"]["sampler"] |= {"shift": 1 / 0.4}
    game = {"weight": 0.75, "discriminator": "rae_dino", "adaptive": True, "start": 256_000_000}
    recipe = stages({"l1": 1.0, "lpips": 1.0, "adversarial": game}, samples=512_000_000, batch=512, warmup=512_000)
    return make("paper_fae", base, vfm={"name": "dinov2_g14", "upscale": 0.875}, losses=FEATURES, stages=recipe)
