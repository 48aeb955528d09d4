"""Diffusion-side alignment at every tier: REPA, iREPA, REG, REPA-E, the joint recipe of VFM-VAE, and a split DiT for encoder reuse.

Variants of one recipe share its tokenizer: `vfmlab train pocket_vfm_vae_repa` after `pocket_vfm_vae` trains the diffusion model only.

At `tiny` and `pocket` the target is the bundled pocket VFM, which has never seen the scenes' labels (`pocket_leaky` has). For
VFM-VAE it is the tokenizer's own VFM: its latents are made from the features that the network is then aligned with, so the target
tells the network nothing that is not in the latents; what alignment can add there is the order in which things are learnt. In
the paper the two are different models (SigLIP2 and DINOv2). The plain VAE has never seen the VFM: there the target is news.
"""

from __future__ import annotations

from typing import Any

from vfmlab.config import Run, override
from vfmlab.presets.conv_vae import paper_plain_vae, pocket_plain_vae, tiny_plain_vae
from vfmlab.presets.rae import EPOCH
from vfmlab.presets.table import preset
from vfmlab.presets.tiers import make
from vfmlab.presets.vfm_vae import paper_vfm_vae, pocket_vfm_vae, small_vfm_vae, tiny_vfm_vae

POCKET_TARGET = {"vfm": {"name": "pocket"}}
# Half the network's depth, and a read-out of twice its width; the papers' are block 8 of 28, width 2048.
TINY_REPA = POCKET_TARGET | {"block": 1, "hidden": 32}
POCKET_REPA = POCKET_TARGET | {"block": 2, "hidden": 256}
# At 32 px DINOv2 reads images enlarged to 224: 16 x 16 tokens, brought to the network's 8 x 8.
SMALL_TARGET = {"vfm": {"name": "dinov2_s14", "upscale": 7.0}}
SMALL_REPA = SMALL_TARGET | {"block": 4, "hidden": 2048}
PAPER_TARGET = {"vfm": {"name": "dinov2_b14", "upscale": 0.875}, "cache": False}  # 16 x 16 x 768 an image: too much to keep
PAPER_REPA = PAPER_TARGET | {"block": 8, "hidden": 2048, "weight": 0.5}
IREPA = {"projector": "conv", "spatial_norm": 1.0}


def variant(base: Run, name: str, changes: dict[str, Any]) -> Run:
    """`base` under another name, with its tokenizer, and with changes to its diffusion section; a `network` replaces the whole one."""
    whole = base.model_dump(mode="json")
    whole["diffusion"]["network"] = changes.get("network", whole["diffusion"]["network"])
    fields = {f"diffusion.{key}": value for key, value in changes.items() if key != "network"}
    return override(make(name, whole), {"diffusion.tokenizer_of": base.name, **fields})


def reg(target: dict[str, Any], width: int, **more: Any) -> dict[str, Any]:
    return {"class_token": target | more, "network.token": width}


@preset
def tiny_vfm_vae_repa() -> Run:
    """tiny_vfm_vae with REPA: does it all run? `vfmlab train tiny_vfm_vae_repa`, seconds; the pictures are noise."""
    return variant(tiny_vfm_vae(), "tiny_vfm_vae_repa", {"alignment": TINY_REPA})


@preset
def tiny_vfm_vae_irepa() -> Run:
    """tiny_vfm_vae with iREPA: does it all run? `vfmlab train tiny_vfm_vae_irepa`, seconds; the pictures are noise."""
    return variant(tiny_vfm_vae(), "tiny_vfm_vae_irepa", {"alignment": TINY_REPA | IREPA})


@preset
def tiny_vfm_vae_reg() -> Run:
    """tiny_vfm_vae with REG's class token: does it all run? `vfmlab train tiny_vfm_vae_reg`, seconds; the pictures are noise."""
    return variant(tiny_vfm_vae(), "tiny_vfm_vae_reg", reg(POCKET_TARGET, 128))


@preset
def tiny_vfm_vae_joint() -> Run:
    """tiny_vfm_vae with REPA and REG: does it all run? `vfmlab train tiny_vfm_vae_joint`, seconds; the pictures are noise."""
    return variant(tiny_vfm_vae(), "tiny_vfm_vae_joint", {"alignment": TINY_REPA, **reg(POCKET_TARGET, 128)})


@preset
def tiny_plain_vae_repa_e() -> Run:
    """tiny_plain_vae tuned by REPA-E: does it all run? `vfmlab train tiny_plain_vae_repa_e`, seconds; the pictures are noise."""
    return variant(tiny_plain_vae(), "tiny_plain_vae_repa_e", {"alignment": TINY_REPA, "tune": {}, "cache": False})


@preset
def tiny_vfm_vae_ddt() -> Run:
    """tiny_vfm_vae with a split DiT: does it all run? `vfmlab train tiny_vfm_vae_ddt`, seconds; the pictures are noise."""
    network = {"kind": "ddt", "width": 32, "depth": 2, "heads": 2, "patch": 2, "head_width": 32, "head_depth": 1, "head_heads": 2}
    return variant(tiny_vfm_vae(), "tiny_vfm_vae_ddt", {"network": network})


@preset
def pocket_vfm_vae_repa() -> Run:
    """pocket_vfm_vae with REPA to the tokenizer's own VFM (block 2 of 4, weight 0.5).

    `vfmlab train pocket_vfm_vae_repa`: about four minutes on one core once pocket_vfm_vae's tokenizer is there.
    """
    return variant(pocket_vfm_vae(), "pocket_vfm_vae_repa", {"alignment": POCKET_REPA})


@preset
def pocket_vfm_vae_irepa() -> Run:
    """pocket_vfm_vae_repa with iREPA's convolution and spatially normalised targets.

    `vfmlab train pocket_vfm_vae_irepa`: about four minutes on one core once pocket_vfm_vae's tokenizer is there.
    """
    return variant(pocket_vfm_vae(), "pocket_vfm_vae_irepa", {"alignment": POCKET_REPA | IREPA})


@preset
def pocket_plain_vae_repa() -> Run:
    """pocket_plain_vae with REPA: the target is the pocket VFM, which this tokenizer has never seen.

    `vfmlab train pocket_plain_vae_repa`: about four minutes on one core once pocket_plain_vae's tokenizer is there.
    """
    return variant(pocket_plain_vae(), "pocket_plain_vae_repa", {"alignment": POCKET_REPA})


@preset
def pocket_vfm_vae_reg() -> Run:
    """pocket_vfm_vae with REG's class token, which here is the mean of the pocket VFM's last layer; without REPA.

    `vfmlab train pocket_vfm_vae_reg`: about four minutes on one core once pocket_vfm_vae's tokenizer is there.
    """
    return variant(pocket_vfm_vae(), "pocket_vfm_vae_reg", reg(POCKET_TARGET, 128))


@preset
def pocket_vfm_vae_joint() -> Run:
    """The joint recipe of VFM-VAE in small: aligned latents, REPA (weight 0.5) and REG's class token (weight 0.03).

    `vfmlab train pocket_vfm_vae_joint`: about four minutes on one core once pocket_vfm_vae's tokenizer is there.
    """
    return variant(pocket_vfm_vae(), "pocket_vfm_vae_joint", {"alignment": POCKET_REPA, **reg(POCKET_TARGET, 128)})


@preset
def pocket_plain_vae_joint() -> Run:
    """The same diffusion side on the plain VAE's latents: what of the joint recipe is the tokenizer's part?

    `vfmlab train pocket_plain_vae_joint`: about four minutes on one core once pocket_plain_vae's tokenizer is there.
    """
    return variant(pocket_plain_vae(), "pocket_plain_vae_joint", {"alignment": POCKET_REPA, **reg(POCKET_TARGET, 128)})


@preset
def pocket_plain_vae_repa_e() -> Run:
    """pocket_plain_vae tuned by REPA-E while its diffusion model is trained. The tokenizer's rate (a fifth): ours.

    `vfmlab train pocket_plain_vae_repa_e`: about fifteen minutes on one core, most of it in the tokenizer's own losses.
    """
    changes = {"alignment": POCKET_REPA, "tune": {}, "cache": False, "train.lr_for": {"tokenizer.*": 0.2}}
    return variant(pocket_plain_vae(), "pocket_plain_vae_repa_e", changes)


@preset
def pocket_vfm_vae_ddt() -> Run:
    """pocket_vfm_vae with a split DiT: three of its four blocks are the encoder, whose output can serve several sampling steps.

    `vfmlab train pocket_vfm_vae_ddt`: about four minutes on one core once pocket_vfm_vae's tokenizer is there; then
    `vfmlab evaluate pocket_vfm_vae_ddt --set sampler.reuse=2`.
    """
    network = {"kind": "ddt", "width": 128, "depth": 3, "heads": 4, "patch": 2, "rmsnorm": False, "qk_norm": True, "head_width": 128,
               "head_depth": 1, "head_heads": 4}  # fmt: skip
    return variant(pocket_vfm_vae(), "pocket_vfm_vae_ddt", {"network": network})


@preset
def small_vfm_vae_joint() -> Run:
    """The joint recipe on small_vfm_vae: SiT-S/1, REPA and REG with DINOv2-S. Sizes are ours; here too both sides see one VFM.

    `vfmlab train small_vfm_vae_joint --set data.source=parquet:PATH` on one GPU, hours. Not run to its end yet: no result is claimed.
    """
    network = {"kind": "sit", "size": "S", "patch": 1, "qk_norm": True}
    changes = {"network": network, "alignment": SMALL_REPA, **reg(SMALL_TARGET, 384)}
    return variant(small_vfm_vae(), "small_vfm_vae_joint", changes)


@preset
def paper_vfm_vae_joint() -> Run:
    """The paper's joint recipe: paper_vfm_vae's latents, SiT-XL/1 with REG and REPA to DINOv2-B (block 8), 80 epochs, SDE of 250 steps.

    `accelerate launch -m vfmlab train paper_vfm_vae_joint --set data.source=folder:PATH`, many GPUs, days. Published: gFID 2.22 without
    guidance at 80 epochs, 1.62 at 640 (1.31 guided). Not run here: no result is claimed. The EMA and uniform times: ours (SiT's).
    """
    changes = {
        "network": {"kind": "sit", "size": "XL", "patch": 1, "qk_norm": True},
        "alignment": PAPER_REPA,
        **reg(PAPER_TARGET, 768, weight=0.03, normalise=False),
        "cosine_loss": 0.0,
        "time": {"kind": "uniform"},
        "train.samples": 80 * EPOCH,
    }
    run = variant(paper_vfm_vae(), "paper_vfm_vae_joint", changes)
    return override(run, {"protocol.sampler": {"solver": "sde", "steps": 250, "shift": 1.0}})


@preset
def paper_plain_vae_repa_e() -> Run:
    """REPA-E on the plain VAE (f16d32): SiT-XL/1 and the tokenizer together, REPA to DINOv2-B with 0.5 and 1.5, 80 epochs.

    `accelerate launch -m vfmlab train paper_plain_vae_repa_e --set data.source=folder:PATH`, many GPUs, days. Not run here: no result is
    claimed. The published models tune SD-VAE and others; batch, learning rates and running statistics in place of a batch norm: ours.
    """
    changes = {
        "network": {"kind": "sit", "size": "XL", "patch": 1, "qk_norm": True},
        "alignment": PAPER_REPA,
        "tune": {"weight": 1.5},
        "cache": False,
        "cosine_loss": 0.0,
        "time": {"kind": "uniform"},
        "train.samples": 80 * EPOCH,
    }
    return variant(paper_plain_vae(), "paper_plain_vae_repa_e", changes)
