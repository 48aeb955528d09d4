"""GAE (arXiv 2603.10365) in its two stages: a teacher made from the VFM, then the autoencoder near to its
codes.

From the release: sizes, losses and weights, noise, budgets at `paper`. Its training loop was not published;
what it leaves open is marked.
"""

from __future__ import annotations

from typing import Any

from vfmlab.presets.conv_vae import LDM_GAN
from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import EPOCH, NOT_RUN, PHOTO_NEEDS, PHOTO_VFM, Tree, base

PAPER_GAN = {"weight": 0.5, "discriminator": LDM_GAN, "start": 5000 * 1024}


def stages(losses: Tree, second: Tree) -> list[Tree]:
    """The teacher alone; then the rest, with `losses` on pixels, held near to the teacher's codes."""
    return [
        {"name": "teacher", "trains": ["teacher.*"]},
        {"name": "autoencoder", "trains": ["encoder.*", "adapter.*", "decoder.*"],
         "losses": {"teacher": 0.0, "semantic": 1.0, **losses}, "train": second},
    ]


def _gae(tier: str, tokenizer: Tree, losses: Tree, second: Tree, **changes: Any) -> Tree:
    return base(tier, tokenizer={"method": "gae", **tokenizer}, losses={"teacher": 1.0},
                stages=stages(losses, second), **changes)


TINY = {"channels": 4, "factor": 4, "width": 16, "depth": 1, "heads": 2, "features": 16,
        "teacher": {"heads": 2}, "decoder": {"kind": "plain_vit", "width": 16, "depth": 1, "heads": 2}}
POCKET = {"channels": 8, "factor": 4, "width": 96, "depth": 3, "heads": 4, "features": 96,
          "teacher": {"heads": 4}, "decoder": {"kind": "plain_vit", "width": 96, "depth": 3, "heads": 4}}

ROWS = (
    Preset("tiny_gae", "GAE taught by the bundled pocket VFM, 16 px, a few dozen images in two stages: does it all run?",
           _gae("tiny", TINY, {"l1": 1.0}, {}, vfm={"name": "pocket"}, train__samples=32)),
    Preset("pocket_gae", "GAE (f4d8): a teacher from the pocket VFM, then a small ViT autoencoder trained from scratch.",
           _gae("pocket", POCKET, {"l1": 1.0, "l2": 1.0}, {}, vfm={"name": "pocket"}, train__samples=7680),
           result="docs/results/claims_continuous.md: 19.9 dB, gFD 19.4 (three seeds, N = 4000)", ours="sizes, no GAN"),
    Preset("photo_gae", "GAE (f4d8) on 32 px photographs: a teacher from EfficientNet-Lite0's last block, then a small ViT autoencoder trained from scratch.",
           _gae("photo", POCKET | {"teacher": {"heads": 4, "layer": -2}}, {"l1": 1.0, "l2": 1.0}, {}, vfm=PHOTO_VFM, train__samples=38_400),
           needs=PHOTO_NEEDS, cost="not timed", result=NOT_RUN, ours="sizes, no GAN"),
    Preset(
        "paper_gae", "GAE (f16d32), teacher DINOv2-L, 24 + 24 blocks 1024 wide; then LightningDiT-XL/1 on standardised latents.",
        _gae("paper", {"channels": 32, "factor": 16, "teacher": {}},
             {"l1": 1.0, "lpips": 1.0, "adversarial": PAPER_GAN},
             {"samples": 200 * EPOCH, "batch": 1024, "lr": 1e-5, "weight_decay": 0.05, "schedule": "constant", "warmup": 0},
             vfm={"name": "dinov2_l14", "upscale": 0.875}, train__samples=100 * EPOCH, train__batch=1024,
             train__optimizer="adamw", train__lr=1e-4, train__betas=[0.9, 0.98], train__weight_decay=0.05, train__schedule="cosine",
             train__warmup=5 * EPOCH, protocol__sampler__solver="sde", protocol__sampler__shift=1 / 0.4,
             diffusion__network__qk_norm=False,
             diffusion__time={"kind": "lognormal", "shift": 1 / 0.7}, diffusion__train__samples=80 * EPOCH),
        result="published: rFID 0.44, gFID 1.82 at 80 epochs (1.48 guided), 1.31 at 800; not run here",
        ours="the discriminator's sizes (LDM's), a learning rate of 1e-5 for all parts; the release has a factor of 20 that nothing reads",
    ),
)  # fmt: skip
