"""Diffusion-side alignment at every tier: REPA, iREPA, REG, REPA-E, the joint recipe of VFM-VAE, and a split DiT for encoder reuse.

Variants of one recipe share its tokenizer: `vfmlab train pocket_vfm_vae_repa` after `pocket_vfm_vae` trains the diffusion model only.

At `tiny` and `pocket` the target is the bundled pocket VFM, which has never seen the scenes' labels (`pocket_leaky` has). For
VFM-VAE it is the tokenizer's own VFM: its latents are made from the features that the network is then aligned with, so the target
tells the network nothing that is not in the latents; what alignment can add there is the order in which things are learnt. In
the paper the two are different models (SigLIP2 and DINOv2). The plain VAE has never seen the VFM: there the target is news.
"""

from __future__ import annotations

from typing import Any

from vfmlab.config import Recipe, override
from vfmlab.errors import ConfigError, nearest
from vfmlab.presets.conv_vae import paper_plain_vae, pocket_plain_vae, tiny_plain_vae
from vfmlab.presets.rae import EPOCH
from vfmlab.presets.table import preset
from vfmlab.presets.tiers import make
from vfmlab.presets.vfm_vae import paper_vfm_vae, pocket_vfm_vae, small_vfm_vae, tiny_vfm_vae

POCKET_TARGET = {"vfm": {"name": "pocket"}}
# At 32 px DINOv2 reads images enlarged to 224: 16 x 16 tokens, brought to the network's 8 x 8.
SMALL_TARGET = {"vfm": {"name": "dinov2_s14", "upscale": 7.0}}
PAPER_TARGET = {"vfm": {"name": "dinov2_b14", "upscale": 0.875}, "cache": False}  # 16 x 16 x 768 an image: too much to keep
# tier: (target, width of its global token, block and width of the read-out). The papers' are block 8 of 28 and width 2048; at `pocket`
# half the depth and twice the width.
TIERS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "tiny": (POCKET_TARGET, 128, {"block": 1, "hidden": 32}),
    "pocket": (POCKET_TARGET, 128, {"block": 2, "hidden": 256}),
    "small": (SMALL_TARGET, 384, {"block": 4, "hidden": 2048}),
    "paper": (PAPER_TARGET, 768, {"block": 8, "hidden": 2048, "weight": 0.5}),
}
IREPA = {"projector": "conv", "spatial_norm": 1.0}
SETTINGS = ("repa", "irepa", "reg", "joint")  # joint: REPA and REG


def variant(base: Recipe, name: str, changes: dict[str, Any]) -> Recipe:
    """`base` under another name, with its tokenizer, and with changes to its diffusion section; a `network` replaces the whole one."""
    whole = base.model_dump(mode="json")
    whole["diffusion"]["network"] = changes.get("network", whole["diffusion"]["network"])
    fields = {f"diffusion.{key}": value for key, value in changes.items() if key != "network"}
    return override(make(name, whole), {"diffusion.tokenizer_of": base.name, **fields})


def sections(tier: str, how: str) -> dict[str, Any]:
    """What setting `how` changes in the diffusion section at a tier.

    Raises:
        ConfigError: no such setting.
    """
    if how not in SETTINGS:
        raise ConfigError(f"unknown alignment '{how}'{nearest(how, SETTINGS)}")
    target, width, readout = TIERS[tier]
    align = {"alignment": target | readout | (IREPA if how == "irepa" else {})}
    token = {"class_token": target, "network.token": width}
    return {"reg": token, "joint": align | token}.get(how, align)


def aligned(run: Recipe, how: str) -> Recipe:
    """`run` with setting `how` of its tier: another diffusion model on the same tokenizer, named `<run>_<how>`."""
    return variant(run, f"{run.name}_{how}", sections(run.tier, how))


def split(run: Recipe) -> Recipe:
    """`run` with a DiT of encoder and head in place of its network, of about its size, named `<run>_ddt`."""
    width, depth, heads = run.diffusion.network.sizes
    head = max(1, depth // 4)
    network = {"kind": "ddt", "width": width, "depth": max(1, depth - head), "heads": heads, "patch": run.diffusion.network.patch, "qk_norm": True,
               "rmsnorm": run.diffusion.network.rmsnorm, "head_width": width, "head_depth": head, "head_heads": heads}  # fmt: skip
    return variant(run, f"{run.name}_ddt", {"network": network})


@preset
def tiny_vfm_vae_repa() -> Recipe:
    """tiny_vfm_vae with REPA: does it all run? `vfmlab train tiny_vfm_vae_repa`, seconds; the pictures are noise."""
    return aligned(tiny_vfm_vae(), "repa")


@preset
def tiny_vfm_vae_irepa() -> Recipe:
    """tiny_vfm_vae with iREPA: does it all run? `vfmlab train tiny_vfm_vae_irepa`, seconds; the pictures are noise."""
    return aligned(tiny_vfm_vae(), "irepa")


@preset
def tiny_vfm_vae_reg() -> Recipe:
    """tiny_vfm_vae with REG's class token: does it all run? `vfmlab train tiny_vfm_vae_reg`, seconds; the pictures are noise."""
    return aligned(tiny_vfm_vae(), "reg")


@preset
def tiny_vfm_vae_joint() -> Recipe:
    """tiny_vfm_vae with REPA and REG: does it all run? `vfmlab train tiny_vfm_vae_joint`, seconds; the pictures are noise."""
    return aligned(tiny_vfm_vae(), "joint")


@preset
def tiny_plain_vae_repa_e() -> Recipe:
    """tiny_plain_vae tuned by REPA-E: does it all run? `vfmlab train tiny_plain_vae_repa_e`, seconds; the pictures are noise."""
    return variant(tiny_plain_vae(), "tiny_plain_vae_repa_e", sections("tiny", "repa") | {"tune": {}, "cache": False})


@preset
def tiny_vfm_vae_ddt() -> Recipe:
    """tiny_vfm_vae with a split DiT: does it all run? `vfmlab train tiny_vfm_vae_ddt`, seconds; the pictures are noise."""
    return split(tiny_vfm_vae())


@preset
def pocket_vfm_vae_repa() -> Recipe:
    """pocket_vfm_vae with REPA to the tokenizer's own VFM (block 2 of 4, weight 0.5).

    `vfmlab train pocket_vfm_vae_repa`: about four minutes on one core once pocket_vfm_vae's tokenizer is there.
    """
    return aligned(pocket_vfm_vae(), "repa")


@preset
def pocket_vfm_vae_irepa() -> Recipe:
    """pocket_vfm_vae_repa with iREPA's convolution and spatially normalised targets.

    `vfmlab train pocket_vfm_vae_irepa`: about four minutes on one core once pocket_vfm_vae's tokenizer is there.
    """
    return aligned(pocket_vfm_vae(), "irepa")


@preset
def pocket_plain_vae_repa() -> Recipe:
    """pocket_plain_vae with REPA: the target is the pocket VFM, which this tokenizer has never seen.

    `vfmlab train pocket_plain_vae_repa`: about four minutes on one core once pocket_plain_vae's tokenizer is there.
    """
    return aligned(pocket_plain_vae(), "repa")


@preset
def pocket_vfm_vae_reg() -> Recipe:
    """pocket_vfm_vae with REG's class token, which here is the mean of the pocket VFM's last layer; without REPA.

    `vfmlab train pocket_vfm_vae_reg`: about four minutes on one core once pocket_vfm_vae's tokenizer is there.
    """
    return aligned(pocket_vfm_vae(), "reg")


@preset
def pocket_vfm_vae_joint() -> Recipe:
    """The joint recipe of VFM-VAE in small: aligned latents, REPA (weight 0.5) and REG's class token (weight 0.03).

    `vfmlab train pocket_vfm_vae_joint`: about four minutes on one core once pocket_vfm_vae's tokenizer is there.
    """
    return aligned(pocket_vfm_vae(), "joint")


@preset
def pocket_plain_vae_joint() -> Recipe:
    """The same diffusion side on the plain VAE's latents: what of the joint recipe is the tokenizer's part?

    `vfmlab train pocket_plain_vae_joint`: about four minutes on one core once pocket_plain_vae's tokenizer is there.
    """
    return aligned(pocket_plain_vae(), "joint")


@preset
def pocket_plain_vae_repa_e() -> Recipe:
    """pocket_plain_vae tuned by REPA-E while its diffusion model is trained. The tokenizer's rate (a fifth): ours.

    `vfmlab train pocket_plain_vae_repa_e`: not run to its end yet, so no time and no result is told.
    """
    changes = sections("pocket", "repa") | {"tune": {}, "cache": False, "train.lr_for": {"tokenizer.*": 0.2}}
    return variant(pocket_plain_vae(), "pocket_plain_vae_repa_e", changes)


@preset
def pocket_vfm_vae_ddt() -> Recipe:
    """pocket_vfm_vae with a split DiT: three of its four blocks are the encoder, whose output can serve several sampling steps.

    `vfmlab train pocket_vfm_vae_ddt`: about four minutes on one core once pocket_vfm_vae's tokenizer is there; then
    `vfmlab evaluate pocket_vfm_vae_ddt --set sampler.reuse=2`.
    """
    return split(pocket_vfm_vae())


@preset
def small_vfm_vae_joint() -> Recipe:
    """The joint recipe on small_vfm_vae: SiT-S/1, REPA and REG with DINOv2-S. Sizes are ours; here too both sides see one VFM.

    `vfmlab train small_vfm_vae_joint --set data.source=parquet:PATH` on one GPU, hours. Not run to its end yet: no result is claimed.
    """
    network = {"kind": "sit", "size": "S", "patch": 1, "qk_norm": True}
    changes = {"network": network, **sections("small", "joint")}
    return variant(small_vfm_vae(), "small_vfm_vae_joint", changes)


@preset
def paper_vfm_vae_joint() -> Recipe:
    """The paper's joint recipe: paper_vfm_vae's latents, SiT-XL/1 with REG and REPA to DINOv2-B (block 8), 80 epochs, SDE of 250 steps.

    `accelerate launch -m vfmlab train paper_vfm_vae_joint --set data.source=folder:PATH`, many GPUs, days. Published: gFID 2.22 without
    guidance at 80 epochs, 1.62 at 640 (1.31 guided). Not run here: no result is claimed. The EMA and uniform times: ours (SiT's).
    """
    changes = {
        "network": {"kind": "sit", "size": "XL", "patch": 1, "qk_norm": True},
        **sections("paper", "joint"),
        "class_token": PAPER_TARGET | {"weight": 0.03, "normalise": False},
        "cosine_loss": 0.0,
        "time": {"kind": "uniform"},
        "train.samples": 80 * EPOCH,
    }
    run = variant(paper_vfm_vae(), "paper_vfm_vae_joint", changes)
    return override(run, {"protocol.sampler": {"solver": "sde", "steps": 250, "shift": 1.0}})


@preset
def paper_plain_vae_repa_e() -> Recipe:
    """REPA-E on the plain VAE (f16d32): SiT-XL/1 and the tokenizer together, REPA to DINOv2-B with 0.5 and 1.5, 80 epochs.

    `accelerate launch -m vfmlab train paper_plain_vae_repa_e --set data.source=folder:PATH`, many GPUs, days. Not run here: no result is
    claimed. The published models tune SD-VAE and others; batch, learning rates and running statistics in place of a batch norm: ours.
    """
    changes = {
        "network": {"kind": "sit", "size": "XL", "patch": 1, "qk_norm": True},
        **sections("paper", "repa"),
        "tune": {"weight": 1.5},
        "cache": False,
        "cosine_loss": 0.0,
        "time": {"kind": "uniform"},
        "train.samples": 80 * EPOCH,
    }
    return variant(paper_plain_vae(), "paper_plain_vae_repa_e", changes)
