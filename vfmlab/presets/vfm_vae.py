"""VFM-VAE (arXiv 2510.18457) in its four stages, at every tier.

    strong    all but the VFM; strong alignment (VF loss)
    weak      the same with the alignment at a fifth
    ssim      decoder alone, encoder and so the latent fixed: no KL, no VF, SSIM instead
    patchgan  the decoder's upper resolutions against a PatchGAN with feature matching, without equivariance

From the released configuration: which losses with which weights, budgets and learning rates of each stage;
the first discriminator stays on beside the PatchGAN, whose norms run over virtual batches of 8; gradients are
not clipped; crops are random, from half to all of the short side, and images below 256 px are left out.
Unknown, so ours: everything below `paper`, and that a crop's side (not its area) is drawn uniformly.
"""

from __future__ import annotations

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import (
    EPOCH,
    PHOTO_NEEDS,
    PHOTO_VF,
    PHOTO_VFM,
    POCKET_DECODER,
    POCKET_LOSSES,
    SMALL_DECODER,
    SMALL_LOSSES,
    TINY_DECODER,
    TINY_LOSSES,
    Tree,
    base,
)

# The latent stays as it is when these do not train: everything on the decoder's side, linear start included.
WRITES = ["decoder.*", "start.write.*", "start.gain_decode"]


def stages(weak: int, ssim: int, patchgan: int, *, vf: float, upper: list[str], writes: list[str], lr: float,
           ssim_losses: Tree, patchgan_losses: Tree) -> list[Tree]:
    """The four stages. weak, ssim, patchgan: budgets in images; the first one's is the recipe's own. vf:
    weight in `weak`.

    upper: globs of what the last stage trains. writes: the decoder's side. lr: of the last two.
    """
    return [
        {"name": "strong"},
        {"name": "weak", "losses": {"vf": vf, "multiscale": 0.0}, "train": {"samples": weak}},
        {"name": "ssim", "trains": writes, "losses": {"kl": 0.0, "vf": 0.0, "ssim": 1.0, **ssim_losses}, "train": {"samples": ssim, "lr": lr}},
        {"name": "patchgan", "trains": upper, "losses": {"ssim": 0.0, **patchgan_losses}, "equivariance": {"p_latent": 0.0, "p_prior": 0.0},
         "train": {"samples": patchgan}},
    ]  # fmt: skip


def against(discriminator: Tree, weight: float = 1.0, lr: float | None = None, **others: float) -> Tree:
    """Losses of the last stage: PatchGAN 1 (LSGAN) and feature matching 10, both times `weight`.

    lr: of the discriminator; None: the stage's. others: new weights of other terms.
    """
    game = {"weight": weight, "loss": "lsgan", "lr": lr,
            "discriminator": {"kind": "patchgan", "scales": 3, "layers": 3, **discriminator}}
    return {"adversarial:patch": game,
            "feature_matching": {"weight": 10.0 * weight, "of": "adversarial:patch"}, **others}


TINY_STAGES = stages(32, 16, 16, vf=0.06, upper=["decoder.blocks.1.*"], writes=["decoder.*"], lr=1e-3, ssim_losses={},
                     patchgan_losses=against({"width": 4, "scales": 2, "layers": 2}, l1=0.0))  # fmt: skip
POCKET_STAGES = stages(3840, 960, 2880, vf=0.06, upper=["decoder.blocks.1.*", "decoder.blocks.2.*"], writes=WRITES, lr=1e-3,
                       ssim_losses={"ssim": 0.1}, patchgan_losses=against({"scales": 2}, weight=0.1, lr=4e-3))  # fmt: skip
SMALL_STAGES = stages(1_500_000, 500_000, 500_000, vf=0.2, upper=["decoder.blocks.1.*", "decoder.blocks.2.*"], writes=["decoder.*"], lr=1e-4,
                      ssim_losses={"lpips": 0.2}, patchgan_losses=against({"width": 64, "scales": 2}, l1=0.0, lpips=0.0))  # fmt: skip
PAPER_STAGES = stages(20_000_000, 1_000_000, 3_000_000, vf=1.0, upper=["decoder.blocks.[345].*"], writes=["decoder.*"], lr=5e-5,
                      ssim_losses={"lpips": 2.0}, patchgan_losses=against({"width": 64, "norm": "virtual_batch"}, l1=0.0, lpips=0.0))  # fmt: skip
FOUR, CONTROL = "about four minutes on one core", "as long as pocket_vfm_vae"
SIT = {"kind": "sit", "patch": 1, "qk_norm": True}

ROWS = (
    Preset(
        "tiny_vfm_vae", "VFM-VAE on the bundled pocket VFM, 16 px, a few dozen images: does it all run?",
        base("tiny", vfm={"name": "pocket"}, losses=TINY_LOSSES | {"vf": {"weight": 0.3}},
             tokenizer={"method": "vfm_vae", "channels": 4, "factor": 4, "widths": [16], "gelu": "erf", "decoder": TINY_DECODER},
             equivariance={"p_latent": 0.25, "p_prior": 0.25, "scales": [0.5, 1.0]}),
    ),
    Preset("tiny_vfm_vae_stages", "tiny_vfm_vae in its four stages: do they all run?", {"stages": TINY_STAGES}, of="tiny_vfm_vae"),
    Preset("tiny_vfm_vae_discrete", "tiny_vfm_vae with a quantised latent.", of="tiny_vfm_vae+discrete"),
    Preset("tiny_vfm_vae_random", "Control at 16 px: VFM-VAE on a VFM of random weights.", of="tiny_vfm_vae+random"),
    Preset("tiny_vfm_vae_no_vf", "Control at 16 px: VFM-VAE without the VF loss.", of="tiny_vfm_vae+no_vf"),
    Preset("tiny_vfm_vae_last_layer", "Control at 16 px: VFM-VAE on the last layer alone.", of="tiny_vfm_vae+last_layer"),
    Preset("tiny_vfm_vae_repa", "tiny_vfm_vae with REPA: does it all run?", of="tiny_vfm_vae+repa"),
    Preset("tiny_vfm_vae_irepa", "tiny_vfm_vae with iREPA: does it all run?", of="tiny_vfm_vae+irepa"),
    Preset("tiny_vfm_vae_reg", "tiny_vfm_vae with REG's class token: does it all run?", of="tiny_vfm_vae+reg"),
    Preset("tiny_vfm_vae_joint", "tiny_vfm_vae with REPA and REG: does it all run?", of="tiny_vfm_vae+joint"),
    Preset("tiny_vfm_vae_ddt", "tiny_vfm_vae with a split DiT: does it all run?", of="tiny_vfm_vae+ddt"),
    Preset(
        "pocket_vfm_vae", "VFM-VAE on the frozen pocket VFM (f4d8), its first stage alone, then a small LightningDiT: the demo's pipeline.",
        # 1x1 projections, the paper's second option: attention projections took a third of the step here.
        base("pocket", vfm={"name": "pocket"}, losses=POCKET_LOSSES | {"vf": {"weight": 0.3, "adaptive": False}},
             tokenizer={"method": "vfm_vae", "channels": 8, "factor": 4, "widths": [32], "projection": "conv", "linear_start": True, "decoder": POCKET_DECODER}),
    ),
    Preset(
        "pocket_vfm_vae_stages", "VFM-VAE (f4d8) in its four stages with the images of pocket_vfm_vae in all, then the same DiT.",
        {"stages": POCKET_STAGES, "train.samples": 7680, "train.schedule": "constant"}, of="pocket_vfm_vae",
        cost="about seven minutes on one core", result="docs/results/tokenizers.md",
        ours="pixel losses stay on in the last stage, and the game has a tenth of its weight: the discriminator sees two thousand images only",
    ),
    Preset(
        "pocket_vfm_vae_discrete", "VFM-VAE's discrete mode (f4, 2 codebooks of 512 entries, 18 bits a token), budget and DiT of pocket_vfm_vae.",
        of="pocket_vfm_vae+discrete", result="no result is claimed", ours="numbers of codebooks and entries",
    ),
    Preset(
        "pocket_vfm_vae_random", "Control: a pocket VFM of random weights, as encoder and as target of the VF loss. What did pretraining bring?",
        of="pocket_vfm_vae+random", cost=CONTROL,
    ),
    Preset(
        "pocket_vfm_vae_no_vf", "Control: VFM-VAE with VF weight 0. Is it the alignment loss that helps, or the frozen encoder?",
        of="pocket_vfm_vae+no_vf", cost=CONTROL,
    ),
    Preset(
        "pocket_vfm_vae_last_layer", "Control: VFM-VAE that reads the last layer alone. What do the early and middle layers bring?",
        of="pocket_vfm_vae+last_layer", cost=CONTROL,
        result="blurred images: the pocket VFM's last layer predicts pixels linearly at 20 dB, its first at 38 dB",
    ),
    Preset("pocket_vfm_vae_repa", "REPA to the tokenizer's own VFM (block 2 of 4, weight 0.5).", of="pocket_vfm_vae+repa", cost=FOUR,
           result="docs/results/alignment.md"),
    Preset("pocket_vfm_vae_irepa", "pocket_vfm_vae_repa with iREPA's convolution and spatially normalised targets.", of="pocket_vfm_vae+irepa", cost=FOUR,
           result="docs/results/alignment.md"),
    Preset("pocket_vfm_vae_reg", "REG's class token, here the mean of the pocket VFM's last layer; without REPA.", of="pocket_vfm_vae+reg", cost=FOUR,
           result="docs/results/alignment.md"),
    Preset("pocket_vfm_vae_joint", "The joint recipe in small: aligned latents, REPA (weight 0.5) and REG's class token (weight 0.03).",
           of="pocket_vfm_vae+joint", cost=FOUR, result="docs/results/alignment.md"),
    Preset("pocket_vfm_vae_ddt", "A split DiT: three of four blocks are the encoder, whose output can serve several steps (eval --set sampler.reuse=2).",
           of="pocket_vfm_vae+ddt", cost=FOUR, result="docs/results/reuse.md"),
    Preset(
        "photo_vfm_vae", "VFM-VAE (f4d8) on frozen EfficientNet-Lite0 for 32 px photographs: an early, a middle and the last layer; then LightningDiT with Muon.",
        base("photo", vfm=PHOTO_VFM, losses=POCKET_LOSSES | {"vf": PHOTO_VF},
             tokenizer={"method": "vfm_vae", "channels": 8, "factor": 4, "widths": [32], "projection": "conv", "linear_start": True, "decoder": POCKET_DECODER}),
        needs=PHOTO_NEEDS, ours="sizes, budgets, layers",
    ),
    Preset("photo_vfm_vae_random", "Control: EfficientNet-Lite0 of random weights, as encoder and as target. What did ImageNet bring?", of="photo_vfm_vae+random"),
    Preset("photo_vfm_vae_no_vf", "Control: photo_vfm_vae with VF weight 0. Is it the alignment loss, or the frozen encoder?", of="photo_vfm_vae+no_vf"),
    Preset("photo_vfm_vae_last_layer", "Control: photo_vfm_vae that reads the last layer alone.", of="photo_vfm_vae+last_layer"),
    Preset(
        "small_vfm_vae", "VFM-VAE on DINOv2-S (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1.",
        base("small", vfm={"name": "dinov2_s14", "upscale": 7.0}, losses=SMALL_LOSSES | {"vf": {"weight": 1.0}}, stages=SMALL_STAGES,
             tokenizer={"method": "vfm_vae", "channels": 16, "factor": 4, "widths": [64], "decoder": SMALL_DECODER},
             train__samples=2_500_000, train__schedule="constant", equivariance={"p_latent": 0.5, "p_prior": 0.25}),
        needs="the VFM's weights (hub or vfm.weights=FILE), or vfm.name=pocket", ours="sizes",
    ),
    Preset(
        "small_vfm_vae_joint", "The joint recipe on small_vfm_vae: SiT-S/1, REPA and REG with DINOv2-S; here too both sides see one VFM.",
        {"diffusion.network": SIT | {"size": "S", "token": 384}}, of="small_vfm_vae+joint", ours="sizes",
    ),
    Preset(
        "paper_vfm_vae", "VFM-VAE f16d32 on SigLIP2-L/16 at 512 px in four stages (44 M images); LightningDiT-XL/1, 64 epochs.",
        base("paper", tokenizer={"method": "vfm_vae", "channels": 32, "factor": 16}, stages=PAPER_STAGES,
             vfm={"name": "siglip2_l16_512", "layers": [0, 12, -1], "upscale": 2.0}, equivariance={"p_latent": 0.5, "p_prior": 0.25}, train__clip=None,
             data__crop=[0.5, 1.0], data__least_side=256,
             losses={"l1": 1.0, "lpips": 10.0, "kl": 1e-6, "multiscale": {"weight": 0.1, "until": 5_000_000}, "vf": {"weight": 5.0},
                     "adversarial": {"weight": 1.0, "loss": "hinge", "discriminator": "projected"}}),
        result="published: rFID 0.52, gFID 3.80 without guidance; not run here", ours="learning-rate schedule, weight decay and the DiT's EMA",
    ),
    Preset(
        "paper_vfm_vae_joint", "The paper's joint recipe: SiT-XL/1 with REG and REPA to DINOv2-B (block 8), 80 epochs, SDE of 250 steps.",
        {"diffusion.network": SIT | {"size": "XL", "token": 768}, "diffusion.class_token": {"weight": 0.03, "normalise": False},
         "diffusion.cosine_loss": 0.0, "diffusion.time": {"kind": "uniform"}, "diffusion.train.samples": 80 * EPOCH,
         "protocol.sampler": {"solver": "sde", "steps": 250, "shift": 1.0}},
        of="paper_vfm_vae+joint", ours="the EMA and uniform times (SiT's)",
        result="published: gFID 2.22 without guidance at 80 epochs, 1.62 at 640 (1.31 guided); not run here",
    ),
)  # fmt: skip
