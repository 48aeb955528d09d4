"""PAE (arXiv 2605.07915) and SVG (2510.15301): small latents and small branches made from a frozen VFM's
tokens.

From the authors' code: the networks' sizes at `paper`. PAE's training is not published: losses' weights are
ours.
"""

from __future__ import annotations

from vfmlab.presets.rae import POCKET_DDT, SMALL_VIT, TINY_DDT, TINY_VIT, WIDE_DECODER
from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import EPOCH, HUB, NOT_RUN, PHOTO_NEEDS, PHOTO_VFM, POCKET_CONV, Tree, base

PRIORS = {"gram": 1.0, "cascade": 0.1, "semantic": {"weight": 1.0, "distance": "cosine"}}
TRAINS = ["encoder.*", "compressor.*", "decompressor.*", "decoder.*"]


def _stages(losses: Tree) -> list[Tree]:
    """The teacher alone; then the rest, with reconstruction and the three priors."""
    return [{"name": "teacher", "trains": ["teacher.*"]},
            {"name": "autoencoder", "trains": TRAINS, "losses": {"teacher": 0.0, **losses, **PRIORS}}]


PAE_TINY = {"method": "pae", "channels": 4, "factor": 4, "depth": 1, "heads": 4, "teacher": {"heads": 4},
            "decoder": TINY_VIT}
PAE_POCKET = {"method": "pae", "channels": 8, "factor": 4, "depth": 2, "heads": 4, "teacher": {"heads": 4},
              "decoder": {"kind": "conv", **POCKET_CONV}}
SVG_TINY = {"method": "svg", "channels": 132, "factor": 4, "extra": 4, "width": 16, "depth": 1, "heads": 2,
            "hidden": 32, "decoder": TINY_VIT}
SVG_POCKET = {"method": "svg", "channels": 136, "factor": 4, "extra": 8, "width": 96, "depth": 3,
              "heads": 4, "hidden": 192, "decoder": {"kind": "conv", **POCKET_CONV}}
ROWS = (
    Preset("tiny_pae", "PAE on the bundled pocket VFM with its three priors, 16 px, a few dozen images in two stages: does it all run?",
           base("tiny", tokenizer=PAE_TINY, vfm={"name": "pocket"}, losses={"teacher": 1.0}, stages=_stages({"l1": 1.0}), train__samples=32)),
    Preset("pocket_pae", "PAE (f4d8) on the pocket VFM: a teacher, then delta encoder, compressor and decoder with the three priors.",
           base("pocket", tokenizer=PAE_POCKET, vfm={"name": "pocket"}, losses={"teacher": 1.0}, stages=_stages({"l1": 1.0, "l2": 1.0}),
                train__samples=7680), result="docs/results/claims_continuous.md: 18.9 dB, gFD 14.0 (three seeds, N = 4000)",
           ours="sizes, the teacher, all weights; no LPIPS in the cascade"),
    Preset("photo_pae", "PAE (f4d8) on EfficientNet-Lite0's last block for 32 px photographs: a teacher, then delta encoder, compressor and decoder.",
           base("photo", tokenizer=PAE_POCKET | {"layer": -2, "teacher": {"heads": 4, "layer": -2}, "decoder": WIDE_DECODER}, vfm=PHOTO_VFM,
                losses={"teacher": 1.0}, stages=_stages({"l1": 1.0, "l2": 1.0}), train__samples=38_400),
           needs=PHOTO_NEEDS, cost="not timed", result=NOT_RUN,
           ours="the decoder of the tier's other rows, sizes, the teacher, all weights; no LPIPS in the cascade"),
    Preset("paper_pae", "PAE on DINOv2-L (f16d32), delta encoder of six blocks, ViT-XL decoder; then LightningDiT-XL/1.",
           base("paper", tokenizer={"method": "pae", "teacher": {}}, vfm={"name": "dinov2_l14", "upscale": 0.875}, losses={"teacher": 1.0},
                stages=_stages({"l1": 1.0, "lpips": 1.0}), diffusion__train__samples=80 * EPOCH),
           needs=HUB, result="published: rFID 0.26, gFID 1.80 at 80 epochs (1.27 guided), 1.43 at 800; not run here",
           ours="the teacher, all weights and budgets of the training; no LPIPS in the cascade"),
    Preset("tiny_svg", "SVG on the bundled pocket VFM, 16 px, a few dozen images: does it all run?",
           base("tiny", tokenizer=SVG_TINY, vfm={"name": "pocket"}, losses={"l1": 1.0}, diffusion__network=TINY_DDT)),
    Preset("pocket_svg", "SVG (f4d136): the pocket VFM's tokens and eight channels beside them, then a DiT with a wide head.",
           base("pocket", tokenizer=SVG_POCKET, vfm={"name": "pocket"}, losses={"l1": 1.0, "l2": 1.0}, diffusion__network=POCKET_DDT),
           cost="about fifteen minutes on one core, most of it in the wide head",
           result="docs/results/claims_continuous.md: 25.4 dB; under pocket_plain_vae's DiT gFD 66.9 (three seeds, N = 4000)", ours="sizes, fixed statistics, no GAN"),
    Preset("photo_svg", "SVG (f4d328) on 32 px photographs: EfficientNet-Lite0's last block and eight channels beside it, then the tier's LightningDiT.",
           base("photo", tokenizer=SVG_POCKET | {"channels": 328, "layer": -2, "decoder": WIDE_DECODER}, vfm=PHOTO_VFM, losses={"l1": 1.0, "l2": 1.0}),
           needs=PHOTO_NEEDS, cost="not timed", result=NOT_RUN,
           ours="the tier's generator in place of one with a wide head, the decoder of its other rows, sizes, fixed statistics, no GAN"),
    Preset("small_svg", "SVG on DINOv2-S (f4d392) for 32 px images (CIFAR-10), ViT-S decoder.",
           base("small", tokenizer={"method": "svg", "channels": 392, "factor": 4, "decoder": SMALL_VIT},
                vfm={"name": "dinov2_s14", "upscale": 3.5}, losses={"l1": 1.0, "lpips": 1.0}), needs=HUB, ours="sizes, fixed statistics, no GAN"),
)  # fmt: skip
