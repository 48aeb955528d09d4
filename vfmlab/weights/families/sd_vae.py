"""SD-VAE as diffusers saves it (`AutoencoderKL`, MIT weights of stabilityai/sd-vae-ft-*) -> tokenizer
`sd_vae`.

The tokenizer keeps diffusers' parameter names.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.errors import ConfigError
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.tokenizers.sd_vae import renamed
from vfmlab.weights import io
from vfmlab.weights.family import STATISTICS, check_fixed, family, settings

SAME_HERE = ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention")
FIXED = {  # arguments of diffusers' constructor that our tokenizer has in one form only
    "in_channels": 3, "out_channels": 3, "act_fn": "silu",
}  # fmt: skip
CONVOLUTIONS = ("use_quant_conv", "use_post_quant_conv")  # both or neither
NOT_READ = (
    "force_upcast", "sample_size",
    "scaling_factor", "shift_factor", "latents_mean", "latents_std",  # read by weights/statistics.py
)  # fmt: skip


@family("sd-vae")
def import_sd_vae(state_dict: dict[str, Tensor], config: dict[str, Any]) -> Tokenizer:
    """A tokenizer without latent statistics yet.

    Args:
        state_dict: keys as diffusers has them. config: diffusers' config.json; `sample_size` is the size of
            the images.
    """
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    blocks = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    known = {"latent_channels", *SAME_HERE, *FIXED, *CONVOLUTIONS, *NOT_READ, *blocks}
    settings(config, dict.fromkeys(known), "sd-vae config")
    check_fixed(config, FIXED, "sd-vae config")
    for field, kind in blocks.items():
        if set(config.get(field, [kind])) != {kind}:
            raise ConfigError(f"sd-vae config: {field} = {config[field]!r} is not supported, only {kind}")
    around = {config.get(field, True) for field in CONVOLUTIONS}
    if len(around) > 1:
        raise ConfigError(f"sd-vae config: {' and '.join(CONVOLUTIONS)} differ, which is not supported")
    method = TOKENIZERS.get("sd_vae")
    fields = {field: config[field] for field in SAME_HERE if field in config}
    if around == {False}:
        fields["quant_conv"] = False
    if "block_out_channels" in fields:
        fields["factor"] = 2 ** (len(fields["block_out_channels"]) - 1)
    options = method.Config.model_validate({"channels": config.get("latent_channels", 4), **fields})
    tokenizer = method(options, int(config.get("sample_size", 256)))
    state = renamed(state_dict, tokenizer.state_dict())
    return io.load(tokenizer, state, "sd-vae checkpoint", keep=STATISTICS)
