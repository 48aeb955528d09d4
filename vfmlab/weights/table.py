"""Known released checkpoints, one row each: where they are, whose they are, how they were built.

What is not known is None or is said in `note`: no revision, hash or file name here is a guess. Repositories
and file names are those of the releases' own pages and READMEs; configurations are those of their published
config files. A checkpoint without a row is imported under its family's name, with `--file` and `--config`;
the family's name alone stands for its best known row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from vfmlab.errors import ConfigError, nearest
from vfmlab.registry import IMPORTERS


@dataclass(frozen=True)
class Statistics:
    """A file of latent statistics, of `repo` or the row's. eps: added to a variance before its root."""

    file: str
    repo: str | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class Row:
    """One released checkpoint.

    Attributes:
        name: what `vfmlab import` takes. method: as papers call it. family: importer of `vfmlab.weights`.
            config: the release's own argument names. file, repo, revision: on the Hugging Face hub; repo
            None: elsewhere, see `note`. sha256, size (bytes): of the file, where its publisher or several
            of its users state the same. licence: of the release. statistics: of the latents; None: those of
            the config (diffusers' `scaling_factor`), else measured on the run's images. vfm: the `vfm`
            section its tokenizer reads. tokenizer: of a diffusion model: the row of the tokenizer it was
            trained on. protocol: how the release samples, in our terms.
    """

    name: str
    method: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    file: str | None = None
    repo: str | None = None
    revision: str | None = None
    sha256: str | None = None
    size: int | None = None
    licence: str = "not stated"
    statistics: Statistics | None = None
    vfm: dict[str, Any] | None = None
    tokenizer: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def kind(self) -> str:
        """'tokenizer', 'diffusion' or 'ar'."""
        if self.family in AR_FAMILIES:
            return "ar"
        return "tokenizer" if self.family in TOKENIZER_FAMILIES else "diffusion"


AR_FAMILIES = ("llamagen-gpt",)
TOKENIZER_FAMILIES = ("vfm-vae", "va-vae", "sd-vae", "rae-decoder", "vfmtok", "llamagen-vq", "gae", "hae",
                      "pae")
# Families that take any checkpoint from --file and --config, with the licence of their releases.
OPEN_FAMILIES = {
    "llamagen-gpt": "mit", "gae": "apache-2.0 (by its README)", "hae": "mit", "pae": "mit (of the port)",
    "raev2-ddt": "CC BY-NC 4.0 (non-commercial)", "rjf": "not stated",
}  # fmt: skip

_VFM_VAE = {
    "img_resolution": 256, "img_channels": 3, "conditional": False, "scale_factor": 2.0,
    "vfm_name": "google/siglip2-large-patch16-512", "patch_from_layers": [0, 12, -1],
    "patch_in_dimensions": [1024, 1024, 1024], "patch_out_dimensions": [64, 64, 64],
    "compression_mode": "continuous", "how_to_compress": "attnproj", "how_to_decompress": "attnproj",
    "attnproj_quant_layers": 1, "attnproj_post_quant_layers": 1, "decompress_factor": 16,
    "resolution_compression_factor": 16, "z_dimension": 32, "z_pooled_resolution": 1, "z_dim_for_mapping_mlp_output": 512,
    "concat_z_block_indices": [0, 1, 2, 3], "concat_z_mapped_dims": [512, 256, 128, 128],
    "how_to_process_concat_z": "unshuffle", "activation_for_concat_z": "lrelu", "attn_block_indices": [0, 1, 2],
    "attn_depths": [2, 2, 2], "use_self_attn": True, "use_cross_attn": False, "use_convnext": True,
    "use_gaussian_blur": True, "add_additional_convnext": True, "num_blocks": 6, "use_kl_loss": True, "use_vf_loss": True,
    "legacy": True,
    "synthesis_kwargs": {"channel_base": 32768, "channel_max": 512, "num_res_blocks": 2, "architecture": "skip"},
}  # fmt: skip


def _autoencoder(channels: int) -> dict[str, Any]:
    """The f16 network of VA-VAE and of its baselines without alignment."""
    return {
        "embed_dim": channels,
        "ddconfig": {
            "double_z": True, "z_channels": channels, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
            "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0,
        },
    }  # fmt: skip


_SD_VAE = {
    "sample_size": 256, "latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "norm_num_groups": 32, "scaling_factor": 0.18215,
}  # fmt: skip
_LIGHTNING = {
    "input_size": 16, "patch_size": 1, "in_channels": 32, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "num_classes": 1000, "use_qknorm": False, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True,
    "wo_shift": False,
}  # fmt: skip
_DIT_DH = {
    "input_size": 16, "patch_size": 1, "in_channels": 768, "hidden_size": [1152, 2048], "depth": [28, 2],
    "num_heads": [16, 16], "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "use_qknorm": False,
    "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False, "use_pos_embed": True,
}  # fmt: skip
_VITXL_DECODER = {
    "hidden_size": 768, "decoder_hidden_size": 1152, "decoder_intermediate_size": 4096, "decoder_num_attention_heads": 16,
    "decoder_num_hidden_layers": 28, "num_channels": 3, "patch_size": 16, "image_size": 256, "layer_norm_eps": 1e-12,
    "hidden_act": "gelu", "qkv_bias": True, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip


def _sit(width: int, depth: int, heads: int) -> dict[str, Any]:
    return {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": width, "depth": depth,
            "num_heads": heads, "num_classes": 1000}


# The release's 250 counts points of time, hence 249 intervals; its shift of 0.3 is 1 / 0.3 in our direction
# of time.
_LIGHTNING_SAMPLER = {"sampler": {"solver": "euler", "steps": 249, "shift": 1 / 0.3}}
_RAE_REPO, _VAVAE_REPO = "nyu-visionx/RAE-collections", "hustvl/vavae-imagenet256-f16d32-dinov2"
_VARIANTS, _SIT_REPO = "hustvl/va-vae-imagenet256-experimental-variants", "nyu-visionx/SiT-collections"
_SD_FILE, _SD_BYTES = "diffusion_pytorch_model.safetensors", 334_643_276
_VFM_VAE_FOLDER = "checkpoints_imagenet256"

ROWS = (
    Row(
        "vfm_vae_f16d32", "VFM-VAE", "vfm-vae", _VFM_VAE,
        f"{_VFM_VAE_FOLDER}/vfm_vae/vfm_vae_f16d32_siglip2_44m_after_stage_3_patchgan_fine_tuning_legacy.pth",
        "tiancibi/VFM-VAE", licence="NVIDIA non-commercial",
        statistics=Statistics(f"{_VFM_VAE_FOLDER}/diffusions/lightningdit_with_vfm_vae/latents_stats.pt"),
        note="44 M images, after stage 3; with the legacy noise buffers",
    ),
    Row(
        "va_vae_f16d32", "VA-VAE", "va-vae", _autoencoder(32), "vavae-imagenet256-f16d32-dinov2.pt", _VAVAE_REPO,
        licence="mit", statistics=Statistics("latents_stats.pt"), note="DINOv2; ImageNet 256",
    ),
    *(
        Row(
            f"ldm_f16d{d}_50ep", "plain VAE", "va-vae", _autoencoder(d), f"ldm-imagenet256-f16d{d}-50ep.ckpt", _VARIANTS,
            licence="mit", note="VA-VAE's network without alignment, 50 epochs; no statistics are published",
        )
        for d in (16, 32, 64)
    ),
    Row(
        "sd_vae_mse", "SD-VAE", "sd-vae", _SD_VAE, _SD_FILE, "stabilityai/sd-vae-ft-mse",
        "31f26fdeee1355a5c34592e401dd41e45d25a493", "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        _SD_BYTES, licence="mit",
    ),
    Row(
        "sd_vae_ema", "SD-VAE", "sd-vae", _SD_VAE, _SD_FILE, "stabilityai/sd-vae-ft-ema",
        "f04b2c4b98319346dad8c65879f680b1997b204a", size=_SD_BYTES, licence="mit",
        note="the one that SiT, REPA and REG sample with",
    ),
    Row(
        "rae_dinov2_b", "RAE", "rae-decoder", _VITXL_DECODER, "decoders/dinov2/wReg_base/ViTXL_n08/model.pt", _RAE_REPO,
        licence="mit", statistics=Statistics("stats/dinov2/wReg_base/imagenet1k/stat.pt", eps=1e-5),
        vfm={"name": "dinov2_b14_reg", "upscale": 0.875},
        note="decoder ViT-XL with noise 0.8 on frozen DINOv2-B with registers at 224 px",
    ),
    Row(
        "lightningdit_xl_64ep", "LightningDiT", "lightningdit", _LIGHTNING, "lightningdit-xl-imagenet256-64ep.pt",
        "hustvl/lightningdit-xl-imagenet256-64ep", licence="mit", tokenizer="va_vae_f16d32", protocol=_LIGHTNING_SAMPLER,
        note="guidance of the release: scale 10, interval from 0.1 of its time, first 3 channels",
    ),
    Row(
        "lightningdit_xl_800ep", "LightningDiT", "lightningdit", _LIGHTNING, "lightningdit-xl-imagenet256-800ep.pt",
        "hustvl/lightningdit-xl-imagenet256-800ep", licence="mit", tokenizer="va_vae_f16d32", protocol=_LIGHTNING_SAMPLER,
        note="guidance of the release: scale 6.7, interval from 0.125 of its time, first 3 channels",
    ),
    Row(
        "dit_dh_xl", "RAE DiT-DH", "dit-dh", _DIT_DH, "DiTs/Dinov2/wReg_base/ImageNet256/DiTDH-XL/stage2_model.pt",
        _RAE_REPO, licence="mit", tokenizer="rae_dinov2_b",
        protocol={"sampler": {"solver": "euler", "steps": 49, "shift": (768 * 16 * 16 / 4096) ** 0.5}},
    ),
    *(
        Row(
            f"sit_{size.lower()}_2", "SiT", "sit", _sit(*sizes), f"SiT-{size}-2-256.pt", _SIT_REPO, licence="mit",
            tokenizer="sd_vae_ema", protocol={"sampler": {"solver": "sde", "steps": 250}},
        )
        for size, sizes in {"S": (384, 12, 6), "B": (768, 12, 12), "XL": (1152, 28, 16)}.items()
    ),
    Row(
        "repa_xl_2", "REPA", "repa", {**_sit(1152, 28, 16), "encoder_depth": 8, "z_dims": [768]}, "last.pt",
        licence="mit", tokenizer="sd_vae_ema", protocol={"sampler": {"solver": "sde", "steps": 250}},
        note="SiT-XL/2, 4 M steps; not on the hub: the link is in sihyun-yu/REPA",
    ),
)  # fmt: skip

_TABLE = {row.name: row for row in ROWS}
_DEFAULTS = {
    "vfm-vae": "vfm_vae_f16d32", "va-vae": "va_vae_f16d32", "sd-vae": "sd_vae_ema", "rae-decoder": "rae_dinov2_b",
    "lightningdit": "lightningdit_xl_800ep", "dit-dh": "dit_dh_xl", "sit": "sit_xl_2", "repa": "repa_xl_2",
}  # fmt: skip
# The one factor of SD-VAE is what SiT and REPA were trained with; others want zero mean and unit variance per
# channel.
_CHANGES = {
    "sd-vae": {
        "config": {key: value for key, value in _SD_VAE.items() if key != "scaling_factor"},
        "note": "statistics are measured, one for each channel",
    }
}
# Families whose file names and repositories are not known here: the importer's defaults are the release's,
# for --file alone.
_OF_RELEASES = {"llamagen-vq": {"image_size": 256}, "vfmtok": {"image_size_out": 336}}


def names() -> list[str]:
    """Names of the rows, as they stand in the table."""
    return list(_TABLE)


def get(name: str) -> Row:
    """The row called `name`, or the row that stands for an importer's name ("va-vae", ...).

    Raises:
        ConfigError: neither; with the nearest known name.
    """
    if name in _TABLE:
        return _TABLE[name]
    if name in _DEFAULTS:
        return replace(_TABLE[_DEFAULTS[name]], name=name, **_CHANGES.get(name, {}))
    if name in _OF_RELEASES:
        return replace(unlisted(name), config=_OF_RELEASES[name])
    if name in OPEN_FAMILIES:
        return unlisted(name)
    if name in IMPORTERS:
        raise ConfigError(f"'{name}' is no tokenizer and no network that samples latents alone, so it makes "
                          f"no run; from Python: vfmlab.weights.import_state_dict('{name}', state_dict, "
                          "config)")
    if os.path.exists(name):
        raise ConfigError(f"'{name}' is a path; name the release or family it is of, and --file '{name}'")
    raise ConfigError(f"unknown release '{name}'{nearest(name, [*_TABLE, *_DEFAULTS])}")


def unlisted(family: str) -> Row:
    """A row for a file and a config that are given, of which nothing else is known."""
    licence = OPEN_FAMILIES.get(family, "not stated")
    return Row(family, family, family, licence=licence, note="given by --file and --config")
