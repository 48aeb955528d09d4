"""The decoder of HAE / DINO-SAE as released (wkdgnsgo/HAE, MIT; arXiv 2601.22904) -> our `dc_ae` decoder.

Its blocks of linear attention hold no norm, whatever the release's configuration says of one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.decoders.dc_ae import DCDecoder
from vfmlab.weights import io
from vfmlab.weights.family import check_fixed, chosen, family, needed, rewritten, section

DEFAULTS = {  # of the release's configuration; other values of these are not supported
    "in_channels": 3, "norm": "trms2d", "act": "silu", "upsample_match_channel": True,
    "upsample_shortcut": "duplicating", "out_norm": "trms2d", "out_act": "relu",
}  # fmt: skip
NEEDED = ("latent_channels", "width_list", "depth_list", "block_type")
BLOCKS = {"ResBlock": "residual", "EViT_GLU": "vit"}
UPSAMPLE = {"InterpolateConv": "interpolate", "ConvPixelShuffle": "shuffle"}
RENAMES = [
    (r"^project_in\.(main\.)?conv\.", "project_in.conv."),
    (r"^project_out\.op_list\.0\.", "norm_out."),
    (r"^project_out\.op_list\.2\.conv\.conv\.", "conv_out.conv."),
    (r"^project_out\.op_list\.2\.conv\.", "conv_out."),
    (r"\.op_list\.", "."),
    (r"\bcontext_module\.main\.(qkv|proj)\.conv\.", r"context.\1."),
    (r"\blocal_module\.main\.(inverted|depth|point)_conv\.conv\.", r"local.\1."),
    (r"\.main\.conv2\.norm\.", ".norm."),
    (r"\.main\.(conv[12])\.conv\.", r".\1."),
    (r"\.main\.conv\.conv\.", ".conv."),
]


@family("dc-ae-decoder", arguments=section("dc-ae-decoder", "width_list", "depth_list"))
def import_dc_ae(state_dict: dict[str, Tensor], config: dict[str, Any]) -> DCDecoder:
    """Release names and values -> :class:`vfmlab.decoders.dc_ae.DCDecoder`.

    Args:
        config: `latent_channels`, `width_list`, `depth_list`, `block_type` (one, or a list, finest first),
            `in_shortcut`, `upsample_block_type`; `latent_side`, ours: of the latents (default 16).
    """
    check_fixed(config, DEFAULTS, "dc-ae-decoder config")
    needed(config, NEEDED, "dc-ae-decoder")
    widths, kinds = tuple(config["width_list"]), config["block_type"]
    kinds = [kinds] * len(widths) if isinstance(kinds, str) else kinds
    blocks = tuple(chosen({"block_type": kind}, "block_type", BLOCKS, "dc-ae-decoder") for kind in kinds)
    options = DCDecoder.Config(
        widths=widths, depths=tuple(config["depth_list"]), blocks=blocks,
        upsample=chosen({"upsample_block_type": "InterpolateConv"} | config, "upsample_block_type", UPSAMPLE,
                        "dc-ae-decoder"),
        in_shortcut=config.get("in_shortcut", "duplicating") is not None,
    )  # fmt: skip
    side = int(config.get("latent_side", 16))
    decoder = DCDecoder(options, int(config["latent_channels"]), side, side * 2 ** (len(widths) - 1))
    state = {rename(key): value for key, value in state_dict.items()}
    return io.load(decoder, state, "dc-ae-decoder checkpoint")


def rename(key: str) -> str:
    """A key of the release under our name."""
    return rewritten(key, RENAMES)
