"""VFM-VAE (arXiv 2510.18457) in its four stages, at every tier.

    strong    all but the VFM; strong alignment (VF loss)
    weak      the same with the alignment at a fifth
    ssim      decoder alone, encoder and so the latent fixed: no KL, no VF, SSIM instead
    patchgan  the decoder's upper resolutions against a PatchGAN with feature matching, without equivariance

From the released configuration: which losses with which weights, budgets and learning rates of each stage. Unknown, so
ours: the weight of the first discriminator's term (1), that it goes when the PatchGAN comes, and everything below `paper`.
"""

from __future__ import annotations

from typing import Any

from vfmlab.config import Recipe, override
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

# The latent stays as it is when these do not train: everything on the decoder's side, linear start included.
WRITES = ["decoder.*", "start.write.*", "start.gain_decode"]


def stages(weak: int, ssim: int, patchgan: int, *, vf: float, upper: list[str], writes: list[str], lr: float, ssim_losses: dict[str, Any],
           patchgan_losses: dict[str, Any]) -> list[dict[str, Any]]:  # fmt: skip
    """The four stages. weak, ssim, patchgan: budgets in images; the first one's is the run's own. vf: weight in `weak`.

    upper: globs of what the last stage trains. writes: the decoder's side. lr: of the last two.
    """
    return [
        {"name": "strong"},
        {"name": "weak", "losses": {"vf": vf, "multiscale": 0.0}, "train": {"samples": weak}},
        {"name": "ssim", "trains": writes, "losses": {"kl": 0.0, "vf": 0.0, "ssim": 1.0, **ssim_losses}, "train": {"samples": ssim, "lr": lr}},
        {"name": "patchgan", "trains": upper, "losses": {"ssim": 0.0, **patchgan_losses}, "equivariance": {"p_latent": 0.0, "p_prior": 0.0},
         "train": {"samples": patchgan}},
    ]  # fmt: skip


def against(discriminator: dict[str, Any], weight: float = 1.0, lr: float | None = None, **others: float) -> dict[str, Any]:
    """Losses of the last stage: PatchGAN 1 (LSGAN) and feature matching 10, both times `weight`; others: new weights of other terms.

    lr: of the discriminator; None: the stage's.
    """
    game = {"weight": weight, "loss": "lsgan", "lr": lr, "discriminator": {"kind": "patchgan", "scales": 3, "layers": 3, **discriminator}}
    return {"adversarial:patch": game, "feature_matching": {"weight": 10.0 * weight, "of": "adversarial:patch"}, **others}


def _discrete(single: Recipe, codebooks: int, vocabulary: int) -> Recipe:
    """`single` with a multi-codebook quantiser in place of the Gaussian: codebook loss (beta 0.25) with a little entropy instead of KL."""
    changes = {"tokenizer.discrete": True, "tokenizer.codebooks": codebooks, "tokenizer.vocabulary": vocabulary}
    terms = {"losses.kl": 0.0, "losses.codebook": {"weight": 1.0, "entropy": 0.1}}
    return override(single, {"name": f"{single.name}_discrete", **changes, **terms})


def _staged(single: Recipe, recipe: list[dict[str, Any]], **train: Any) -> Recipe:
    """`single`, a recipe of one stage, as the first of these; train: fields that change for all of them."""
    whole = single.model_dump(mode="json")
    return make(f"{single.name}_stages", whole | {"stages": recipe, "train": whole["train"] | train})


@preset
def tiny_vfm_vae() -> Recipe:
    """VFM-VAE on the bundled pocket VFM, 16 px, a few dozen images: does it all run?

    `vfmlab train tiny_vfm_vae` takes seconds on one core; the pictures are noise.
    """
    tokenizer = {"method": "vfm_vae", "channels": 4, "factor": 4, "widths": [16], "gelu": "erf", "decoder": TINY_DECODER}
    losses = TINY_LOSSES | {"vf": {"weight": 0.3}}
    return make("tiny_vfm_vae", tiny(), vfm={"name": "pocket"}, tokenizer=tokenizer, losses=losses,
                equivariance={"p_latent": 0.25, "p_prior": 0.25, "scales": [0.5, 1.0]})  # fmt: skip


@preset
def tiny_vfm_vae_stages() -> Recipe:
    """tiny_vfm_vae in its four stages: do they all run? `vfmlab train tiny_vfm_vae_stages`, seconds; the pictures are noise."""
    recipe = stages(32, 16, 16, vf=0.06, upper=["decoder.blocks.1.*"], writes=["decoder.*"], lr=1e-3, ssim_losses={},
                    patchgan_losses=against({"width": 4, "scales": 2, "layers": 2}, l1=0.0))  # fmt: skip
    return _staged(tiny_vfm_vae(), recipe)


@preset
def pocket_vfm_vae() -> Recipe:
    """VFM-VAE on the frozen pocket VFM (f4d8), its first stage alone, then a small LightningDiT: the demo's pipeline.

    `vfmlab train pocket_vfm_vae`: about six minutes on one core; see docs/results/comparison.md for what to expect.
    """
    # 1x1 projections, the paper's second option: attention projections took a third of the step here.
    tokenizer = {"method": "vfm_vae", "widths": [32], "projection": "conv", "linear_start": True, "decoder": POCKET_DECODER}
    return make("pocket_vfm_vae", vae(pocket(), 8, 4, **tokenizer), vfm={"name": "pocket"},
                losses=POCKET_LOSSES | {"vf": {"weight": 0.3, "adaptive": False}})  # fmt: skip


@preset
def pocket_vfm_vae_stages() -> Recipe:
    """VFM-VAE (f4d8) in its four stages with the images of pocket_vfm_vae in all, then the same DiT.

    `vfmlab train pocket_vfm_vae_stages`: about seven minutes on one core; see docs/results/tokenizers.md. Ours: pixel losses stay
    on in the last stage, and the game has a tenth of its weight: the small discriminator sees two thousand images only.
    """
    recipe = stages(3840, 960, 2880, vf=0.06, upper=["decoder.blocks.1.*", "decoder.blocks.2.*"], writes=WRITES, lr=1e-3,
                    ssim_losses={"ssim": 0.1}, patchgan_losses=against({"scales": 2}, weight=0.1, lr=4e-3))  # fmt: skip
    return _staged(pocket_vfm_vae(), recipe, samples=7680, schedule="constant")


@preset
def tiny_vfm_vae_discrete() -> Recipe:
    """tiny_vfm_vae with a quantised latent. `vfmlab train tiny_vfm_vae_discrete`, seconds; the pictures are noise."""
    return _discrete(tiny_vfm_vae(), codebooks=2, vocabulary=64)


@preset
def pocket_vfm_vae_discrete() -> Recipe:
    """VFM-VAE's discrete mode (f4, 2 codebooks of 512 entries, 18 bits a token), budget and DiT of pocket_vfm_vae.

    `vfmlab train pocket_vfm_vae_discrete`: about six minutes on one core. Numbers of codebooks and entries: ours.
    """
    return _discrete(pocket_vfm_vae(), codebooks=2, vocabulary=1024)


@preset
def small_vfm_vae() -> Recipe:
    """VFM-VAE on DINOv2-S (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1. Sizes are ours.

    `vfmlab train small_vfm_vae --set data.source=parquet:PATH` on one GPU, hours. Needs the VFM's weights (hub or vfm.weights=FILE),
    or `vfm.name=pocket`. Not run to its end yet: no result is claimed.
    """
    tokenizer = {"method": "vfm_vae", "widths": [64], "decoder": SMALL_DECODER}
    recipe = stages(1_500_000, 500_000, 500_000, vf=0.2, upper=["decoder.blocks.1.*", "decoder.blocks.2.*"], writes=["decoder.*"], lr=1e-4,
                    ssim_losses={"lpips": 0.2}, patchgan_losses=against({"width": 64, "scales": 2}, l1=0.0, lpips=0.0))  # fmt: skip
    base = vae(small(), 16, 4, **tokenizer)
    return make("small_vfm_vae", base, vfm={"name": "dinov2_s14", "upscale": 7.0}, losses=SMALL_LOSSES | {"vf": {"weight": 1.0}}, stages=recipe,
                train=base["train"] | {"samples": 2_500_000, "schedule": "constant"}, equivariance={"p_latent": 0.5, "p_prior": 0.25})  # fmt: skip


@preset
def paper_vfm_vae() -> Recipe:
    """VFM-VAE f16d32 on SigLIP2-L/16 at 512 px in four stages (44 M images); LightningDiT-XL/1, 64 epochs.

    `accelerate launch -m vfmlab train paper_vfm_vae --set data.source=folder:PATH`, many GPUs, days. Published: rFID 0.52, gFID 3.80 without
    guidance. Not run here: no result is claimed. Learning-rate schedule, weight decay and the DiT's EMA: ours.
    """
    losses = {"l1": 1.0, "lpips": 10.0, "kl": 1e-6, "multiscale": {"weight": 0.1, "until": 5_000_000}, "vf": {"weight": 5.0},
              "adversarial": {"weight": 1.0, "loss": "hinge", "discriminator": "projected"}}  # fmt: skip
    recipe = stages(20_000_000, 1_000_000, 3_000_000, vf=1.0, upper=["decoder.blocks.[345].*"], writes=["decoder.*"], lr=5e-5,
                    ssim_losses={"lpips": 2.0}, patchgan_losses=against({"width": 64, "norm": "batch"}, l1=0.0, lpips=0.0, adversarial=0.0))  # fmt: skip
    return make("paper_vfm_vae", vae(paper(), 32, 16, method="vfm_vae"), vfm={"name": "siglip2_l16_512", "layers": [0, 12, -1], "upscale": 2.0},
                losses=losses, stages=recipe, equivariance={"p_latent": 0.5, "p_prior": 0.25})  # fmt: skip
