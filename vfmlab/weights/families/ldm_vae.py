"""The convolutional autoencoder of LDM and VA-VAE (`AutoencoderKL` in the releases) -> tokenizer `va_vae`."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from vfmlab.errors import ConfigError
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.weights import io
from vfmlab.weights.family import STATISTICS, check_fixed, family, find, needed, rewritten

RENAMES = [
    (r"\bnin_shortcut\b", "shortcut"),
    (r"\battn\.(\d+)\.", r"attentions.\1."),
    (r"\bblock\.(\d+)\.", r"blocks.\1."),
    (r"\bmid\.attn_1\b", "middle.attention"),
    (r"\bmid\.block_(\d)\b", r"middle.block\1"),
    (r"\bproj_out\b", "proj"),
    (r"\b(?:down|up)sample\.conv\b", "resample.conv"),
    (r"^encoder\.down\.", "encoder.stages."),
    (r"^quant_conv\b", "quant"),
    (r"^post_quant_conv\b", "decoder.post_quant"),
]
NEEDED = ("ch_mult", "num_res_blocks", "embed_dim", "resolution", "ch", "attn_resolutions")
TRAINING_ONLY = ("loss.", "linear_proj.", "foundation_model.", "logvar", "model_ema.")
"""Prefixes of what training checkpoints carry beside the autoencoder: discriminator, projection, VFM,
averages."""


def arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """LDM's YAML: `model.params` with `embed_dim` and `ddconfig`."""
    section = find(tree, "embed_dim", "ddconfig") or find(tree, "embed_dim", "ch_mult")
    if section is None:
        raise ConfigError("va-vae config: no section has 'embed_dim' and 'ddconfig'; give the release's YAML")
    return {"embed_dim": section["embed_dim"], **section.get("ddconfig", section)}


@family("va-vae", arguments=arguments)
def va_vae(state_dict: dict[str, Tensor], config: dict[str, Any]) -> Tokenizer:
    """Release names and values -> :class:`vfmlab.tokenizers.plain_vae.VAVAE`; SD-VAE checkpoints have the
    same names.

    Args:
        config: `embed_dim` and the fields of the release's `ddconfig` (flat, or nested under that name):
            `ch`, `ch_mult`, `num_res_blocks`, `attn_resolutions`, `resolution`, and optionally `z_channels`,
            `in_channels`, `out_ch`, `double_z`, `dropout`. Weights trained at one resolution fit every other.

    The tokenizer has no latent statistics yet: measure them, or set the released ones with `set_statistics`.
    """
    flat = {**config, **config.get("ddconfig", {})}
    needed(flat, NEEDED, "va-vae")
    levels, blocks = tuple(flat["ch_mult"]), int(flat["num_res_blocks"])
    channels, size = int(flat["embed_dim"]), int(flat["resolution"])
    shared = {"width": int(flat["ch"]), "multipliers": levels, "attention": tuple(flat["attn_resolutions"]),
              "inner": int(flat.get("z_channels", channels))}
    check_fixed(flat, {"in_channels": 3, "out_ch": 3, "double_z": True, "dropout": 0.0}, "va-vae config")
    method = TOKENIZERS.get("va_vae")
    options = method.Config.model_validate({"channels": channels, "factor": 2 ** (len(levels) - 1),
                                            "blocks": blocks, **shared,
                                            "decoder": {"kind": "conv", "blocks": blocks + 1, **shared}})
    tokenizer = method(options, size)
    renamed = {rename(key, len(levels)): value for key, value in state_dict.items()
               if not key.startswith(TRAINING_ONLY)}
    return io.load(tokenizer, renamed, "va-vae checkpoint", keep=STATISTICS)


def rename(key: str, levels: int) -> str:
    """A key of the release -> the tokenizer's. The release counts decoder levels from the finest."""
    key = rewritten(key, RENAMES)
    if match := re.match(r"decoder\.up\.(\d+)\.(.*)", key):
        return f"decoder.net.stages.{levels - 1 - int(match[1])}.{match[2]}"
    return re.sub(r"^decoder\.(?!post_quant\b)", "decoder.net.", key)
