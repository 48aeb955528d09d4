"""AlignTok (arXiv 2509.25162) in its three stages, at every tier.

    latent      adapter and decoder; the encoder is frozen
    perceptual  everything; the loss `preservation` holds the latent where stage one had put it
    refine      decoder alone; may as well be trained after the diffusion model

From the paper: what trains in each stage, weights of perceptual term (1), GAN (0.5) and preservation (1,
after the adapter, L2). Not stated there, so ours: adapter, decoder's size, optimiser, budgets, learning
rates, discriminator.
"""

from __future__ import annotations

from vfmlab.presets.conv_vae import GAN
from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import (
    PHOTO_NEEDS,
    PHOTO_VFM,
    POCKET_DECODER,
    POCKET_LOSSES,
    SMALL_DECODER,
    TINY_DECODER,
    TINY_LOSSES,
    Tree,
    base,
    without,
)

ENCODER_LR = {"encoder.*": 0.1}
# A linear start belongs to adapter (what it reads) and decoder (what it writes).
READS, WRITES = ("start.read.*", "start.gain_encode"), ("start.write.*", "start.gain_decode")
OURS = "adapter, decoder's size, optimiser, learning rates, budgets, discriminator"


def stages(latent: int, perceptual: int, refine: int, start: bool = False, tuned: Tree | None = None,
           last: Tree | None = None) -> list[Tree]:
    """The three stages with their budgets in images. start: a linear start. tuned, last: more losses of
    stages 2 and 3."""
    reads, writes = (READS, WRITES) if start else ((), ())
    return [
        {"name": "latent", "trains": ["adapter.*", "decoder.*", *reads, *writes],
         "train": {"samples": latent}},
        {"name": "perceptual", "trains": ["*"], "losses": {"preservation": 1.0} | (tuned or {}),
         "train": {"samples": perceptual, "lr_for": ENCODER_LR}},
        {"name": "refine", "trains": ["decoder.*", *writes], "losses": {"preservation": 0.0} | (last or {}),
         "train": {"samples": refine, "lr_for": {}}},
    ]


PLAYS_ON = {"adversarial": {"start": 0, "warmup": 0}}
PAPER = base(
    "paper", vfm={"name": "dinov2_l14", "upscale": 0.875}, protocol__sampler={"steps": 30, "shift": 1 / 0.3},
    tokenizer={"method": "aligntok", "adapter_width": 1024, "channels": 32, "factor": 16},
    losses={"l1": 1.0, "lpips": 1.0, "adversarial": {**GAN, "start": 2_000_000, "warmup": 1_000_000}},
    stages=stages(20_000_000, 20_000_000, 5_000_000, tuned=PLAYS_ON, last=PLAYS_ON),
)  # fmt: skip

ROWS = (
    Preset(
        "tiny_aligntok", "AlignTok from the bundled pocket VFM, 16 px, a few dozen images in three stages: does it all run?",
        base("tiny", vfm={"name": "pocket"}, losses=without(TINY_LOSSES, "kl"), stages=stages(32, 16, 16),
             tokenizer={"method": "aligntok", "channels": 4, "factor": 4, "adapter_width": 16, "decoder": TINY_DECODER}),
    ),
    Preset(
        "pocket_aligntok", "AlignTok (f4d8) from the pocket VFM: decoder, pixel losses and images in all as pocket_vfm_vae, then the same DiT.",
        # Stage 1 has little to learn after a linear start: 21.1 dB after 2560 images. Stage 2 gains all along; the
        # multi-scale loss is on for half the budget in all, as in the other tokenizers.
        base("pocket", vfm={"name": "pocket"}, losses=without(POCKET_LOSSES, "kl"),
             tokenizer={"method": "aligntok", "channels": 8, "factor": 4, "adapter_width": 64, "linear_start": True, "decoder": POCKET_DECODER},
             stages=stages(2560, 10_240, 2560, True, tuned={"multiscale": {"until": 5120}}, last={"multiscale": 0.0})),
        cost="roughly eight minutes on one core, half of it in stage 2", result="docs/results/tokenizers.md", ours="no GAN, as in the other pocket tokenizers",
    ),
    Preset(
        "pocket_aligntok_random", "Control: AlignTok from an encoder of random weights, with the same anchor. Is it the semantics or the recipe?",
        of="pocket_aligntok+random", cost="as long as pocket_aligntok",
    ),
    Preset(
        "photo_aligntok", "AlignTok (f4d8) from EfficientNet-Lite0 on photographs: decoder, pixel losses and images in all as photo_vfm_vae, then the same DiT.",
        base("photo", vfm=PHOTO_VFM, losses=without(POCKET_LOSSES, "kl"),
             tokenizer={"method": "aligntok", "channels": 8, "factor": 4, "adapter_width": 64, "linear_start": True, "decoder": POCKET_DECODER},
             stages=stages(12_800, 51_200, 12_800, True, tuned={"multiscale": 0.0}, last={"multiscale": 0.0})),
        needs=PHOTO_NEEDS, cost="at two fifths of its budget 27 minutes on a shared core",
        result="at two fifths of its budget, three seeds: 15.9 dB, it does not reconstruct (docs/results/photo.md)",
        ours="no GAN, as in the other tokenizers of the tier; sizes, budgets",
    ),
    Preset(
        "small_aligntok", "AlignTok from DINOv2-S (f4d16) for 32 px images (CIFAR-10), then LightningDiT-S/1.",
        base("small", vfm={"name": "dinov2_s14", "upscale": 7.0}, stages=stages(2_500_000, 1_500_000, 1_000_000, tuned=PLAYS_ON, last=PLAYS_ON),
             tokenizer={"method": "aligntok", "channels": 16, "factor": 4, "adapter_width": 384, "decoder": SMALL_DECODER},
             losses={"l1": 1.0, "lpips": 1.0, "multiscale": 0.1, "adversarial": {**GAN, "start": 500_000, "warmup": 250_000}}),
        needs="the VFM's weights (hub or vfm.weights=FILE), or vfm.name=pocket", ours="sizes",
    ),
    Preset(
        "paper_aligntok", "AlignTok f16d32 from DINOv2-L/14 in three stages; LightningDiT-XL/1, 80 k steps, 30 sampling steps.", PAPER,
        result="published: rFID 0.26, linear probe 35.1, gFID 4.05 (2.17 guided); not run here", ours=OURS,
    ),
    Preset(
        "paper_aligntok_d64", "AlignTok with 64 latent channels (f16d64); everything else as paper_aligntok.", {"tokenizer.channels": 64}, of="paper_aligntok",
        result="published: rFID 0.17, linear probe 47.0, gFID 5.24 (2.34 guided); not run here", ours=OURS,
    ),
)  # fmt: skip
