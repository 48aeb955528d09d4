"""Released VFM-VAE weights (arXiv 2510.18457) -> :class:`vfmlab.tokenizers.vfm_vae.VFMVAE`.

The state dict and the arguments are taken in the release's own names. Left out on purpose, because nothing
here uses them: `zero_k_bias` (a constant zero), `mapping.x_avg` (the mean style), the VFM's own weights under
`vfm_encoder.`. The fixed blur kernels are compared with ours. Arguments that concern training only (losses,
precision, `train_mode`) are not read; everything else has to fit key by key.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from vfmlab.decoders.progressive import ProgressiveConfig
from vfmlab.errors import CheckpointError, ConfigError, nearest
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.tokenizers.shapes import LayerShape
from vfmlab.tokenizers.vfm_vae import VFMVAE
from vfmlab.vfm.table import TABLE
from vfmlab.weights import io
from vfmlab.weights.family import (
    STATISTICS,
    check_fixed,
    chosen,
    family,
    find,
    headed,
    layers_put,
    needed,
    plain_sections,
    scalar,
    section,
)

NAME = "vfm-vae"

VFMS = {  # names of vision models in releases' configs -> our table's
    "siglip2-base-patch16-256": "siglip2_b16_256", "siglip2-base-patch16-384": "siglip2_b16_384",
    "siglip2-base-patch16-512": "siglip2_b16_512", "siglip2-large-patch16-256": "siglip2_l16_256",
    "siglip2-large-patch16-384": "siglip2_l16_384", "siglip2-large-patch16-512": "siglip2_l16_512",
    "dinov2-small": "dinov2_s14", "dinov2-base": "dinov2_b14", "dinov2-large": "dinov2_l14", "dinov2-giant": "dinov2_g14",
    "vit-mae-base": "mae_b16", "vit-mae-large": "mae_l16",
}  # fmt: skip

NEEDED = (
    "img_resolution", "resolution_compression_factor", "z_dimension", "patch_from_layers", "patch_in_dimensions",
    "patch_out_dimensions", "decompress_factor", "num_blocks", "z_dim_for_mapping_mlp_output", "concat_z_block_indices",
    "concat_z_mapped_dims",
)  # fmt: skip
FIXED = {"architecture": "skip", "use_convnext": True, "how_to_process_concat_z": "unshuffle",
         "img_channels": 3, "conditional": False}
DEFAULTS = {  # of the release's constructors
    "compression_mode": "continuous", "how_to_compress": "attnproj", "how_to_decompress": "attnproj",
    "attnproj_quant_layers": 1, "num_res_blocks": 2, "add_additional_convnext": True,
    "activation_for_concat_z": "lrelu", "attn_block_indices": (), "attn_depths": (), "legacy": False,
}  # fmt: skip
FIELDS = {  # of the release's constructors -> of our decoder, which has the same defaults
    "decompress_factor": "decompress_factor", "attnproj_post_quant_layers": "decompress_layers", "num_blocks": "blocks",
    "channel_base": "channel_base", "channel_max": "channel_max", "num_res_blocks": "num_res_blocks",
    "use_gaussian_blur": "blur", "use_multiscale_output": "multiscale", "concat_z_block_indices": "fusion_blocks",
    "concat_z_mapped_dims": "fusion_widths", "z_dim_for_mapping_mlp_output": "style_width",
    "z_pooled_resolution": "style_pool", "use_self_attn": "attention", "attn_block_indices": "attention_blocks",
    "attn_depths": "attention_depths", "use_cross_attn": "cross_attention",
}  # fmt: skip
PROJECTIONS = {"attnproj": "attention", "conv": "conv"}

IGNORED = re.compile(r"vfm_encoder\..*|.*\.attn\.zero_k_bias|mapping\.x_avg|.*\.blur_weight")

# One attention projection, in the release's names and ours.
PROJECTION = {
    "norm1": "norm_attention",
    "norm2": "norm_mlp",
    "norm3": "norm_linear",
    "proj": "linear",
    "attn.qkv": "attention.qkv",
    "attn.q_bias": "attention.q_bias",
    "attn.v_bias": "attention.v_bias",
    "attn.proj": "attention.out",
    "mlp.norm": "mlp.norm",
    "mlp.w0": "mlp.gate",
    "mlp.w1": "mlp.value",
    "mlp.w2": "mlp.out",
}
LAYER = {
    "affine_pw1.proj": "style.linear",
    "dwconv": "depthwise",
    "norm": "norm",
    "pwconv1.weight": "expand_weight",
    "pwconv1.bias": "expand_bias",
    "pwconv2": "contract",
    "gamma": "scale",
    "noise_const": "noise",
    "noise_strength": "noise_strength",
}
ATTENTION = {
    "attn.norm.gamma": "attention.norm.gain",
    "attn.norm_context.gamma": "attention.norm_context.gain",
    "attn.null_kv": "attention.null",
    "attn.to_q": "attention.q",
    "attn.to_k": "attention.k",
    "attn.to_v": "attention.v",
    "attn.to_kv": "attention.kv",
    "attn.to_out": "attention.out",
    "ff.0.gamma": "norm.gain",
    "ff.1": "expand",
    "ff.3": "contract",
}
TO_RGB = {"affine.proj": "style.linear", "weight": "weight", "bias": "bias"}
UPSAMPLE = {"norm": "norm", "depthwise": "depthwise", "pointwise": "pointwise"}
FUSION_FIRST = {"0": "depthwise", "1": "pointwise", "2": "norm"}
FUSION_LAST = {"0": "mix", "1": "norm_out"}
ACTIVATIONS = {"lrelu": "leaky_relu", "relu": "relu", "silu": "silu", "gelu": "gelu"}
_BLOCK = r"synthesis\.blocks\.(\d+)\."
# Where a key begins in the release and here, and the table of what follows; the first that fits counts.
PLACES = (
    (r"ldm_adapter\.patch_quants\.(\d+)\.0\.blocks\.(\d+)\.", r"projections.\1.layers.\2.", PROJECTION),
    (r"ldm_adapter\.patch_quants\.(\d+)\.0\.", r"projections.\1.", {}),  # a 1x1 convolution
    (r"ldm_adapter\.final_quant\.blocks\.(\d+)\.", r"final_projection.layers.\1.", PROJECTION),
    (r"ldm_adapter\.final_quant\.", "final_projection.", {}),
    (r"ldm_adapter\.post_quant\.blocks\.(\d+)\.", r"decoder.decompress.layers.\1.", PROJECTION),
    (r"ldm_adapter\.post_quant\.", "decoder.decompress.", {}),
    (r"ldm_adapter\.linear_proj\.", "alignment.", {}),
    (r"ldm_adapter\.quantizer\.codebooks\.(\d+)\.", r"quantizer.codebooks.\1.",
     {"codebook.weight": "weight", "vocab_usage": "usage"}),
    (r"mapping\.mlp\.fc(\d+)\.", r"decoder.mapping.layers.\1.", {}),
    (_BLOCK + r"seperate_upsample_conv\.", r"decoder.blocks.\1.upsample.", UPSAMPLE),
    (_BLOCK + r"last_upsample_conv\.", r"decoder.blocks.\1.sum_upsample.", UPSAMPLE),
    (_BLOCK + r"conv0\.", r"decoder.blocks.\1.layers.0.", LAYER),
    (_BLOCK + r"convs1\.(\d+)\.", lambda m: f"decoder.blocks.{m[1]}.layers.{int(m[2]) + 1}.", LAYER),
    (_BLOCK + r"torgb\.", r"decoder.blocks.\1.to_rgb.", TO_RGB),
    (_BLOCK + r"self_attns\.(\d+)\.", r"decoder.blocks.\1.attention.\2.", ATTENTION),
    (_BLOCK + r"cross_attns\.(\d+)\.", r"decoder.blocks.\1.cross_attention.\2.", ATTENTION),
)


def _renamed(key: str, fusion: dict[int, tuple[int, bool]]) -> str:
    """The release's key -> ours. fusion: index in `z_convs` -> block, and whether it unshuffles first."""
    for pattern, ours, table in PLACES:
        if match := re.match(pattern, key):
            return re.sub(pattern, ours, match[0]) + headed(key[match.end():], table)
    match = re.match(r"synthesis\.z_convs\.(\d+)\.(\d+)\.", key)
    if match is None or int(match[1]) not in fusion:
        return key
    block, unshuffles = fusion[int(match[1])]
    # A pixel-unshuffle takes the first place, a pixel-shuffle the second; neither has weights.
    table = FUSION_FIRST if int(match[2]) == int(unshuffles) else FUSION_LAST
    return f"decoder.fusion.{block}.{headed(key[match.end():], table)}"


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The release's arguments, flat, over its defaults."""
    config = config.get("G_kwargs", config)
    flat = DEFAULTS | config | config.get("synthesis_kwargs", {})
    needed(flat, NEEDED, NAME)
    check_fixed(flat, FIXED, NAME)
    return flat


def _count(state: dict[str, Tensor], pattern: str) -> int:
    """How many different numbers stand in the first group of `pattern` among the keys."""
    return len({m[1] for key in state if (m := re.fullmatch(pattern, key))})


def _rows(state: dict[str, Tensor], key: str, axis: int = 0) -> int:
    if key not in state or state[key].ndim <= axis:
        raise CheckpointError(f"{NAME}: the weights have no '{key}'; is this the generator of that config?")
    return state[key].shape[axis]


def _decoder(c: dict[str, Any], state: dict[str, Tensor]) -> ProgressiveConfig:
    blocks, per_layer = c["num_blocks"], c["num_res_blocks"]
    res_layers: tuple[int, ...] = (3, 3, 3, 3, 2)
    if not c["add_additional_convnext"] and per_layer:
        counts = [_count(state, rf"synthesis\.blocks\.{i}\.convs1\.(\d+)\..*") for i in range(blocks)]
        res_layers = tuple(n // per_layer for n in counts)
    width, first = c["z_dim_for_mapping_mlp_output"], state.get("mapping.mlp.fc0.weight")
    nulls = [v for k, v in state.items() if k.endswith(".attn.null_kv")]
    contexts = [v for k, v in state.items() if k.endswith(".attn.norm_context.gamma")]
    return ProgressiveConfig(
        **{ours: c[theirs] for theirs, ours in FIELDS.items() if theirs in c},
        decompress=chosen(c, "how_to_decompress", PROJECTIONS, NAME), res_layers=res_layers,
        fusion_activation=chosen(c, "activation_for_concat_z", ACTIVATIONS, NAME),
        style_hidden=None if first is None or first.shape[0] == width else first.shape[0],
        heads=nulls[0].shape[1] if nulls else 8, context_width=contexts[0].shape[0] if contexts else None,
        legacy_noise=bool(c["legacy"]) or any(k.endswith(".noise_const") for k in state),
    )


def _tokenizer(c: dict[str, Any], state: dict[str, Tensor]) -> VFMVAE:
    """The tokenizer that the arguments describe; what they leave open is read off the weights' shapes."""
    size, factor, channels = c["img_resolution"], c["resolution_compression_factor"], c["z_dimension"]
    how = chosen(c, "how_to_compress", PROJECTIONS, NAME)
    layers_in_a_row = c["attnproj_quant_layers"]
    discrete = chosen(c, "compression_mode", {"continuous": False, "discrete": True}, NAME)
    final, aligned = "ldm_adapter.final_quant", "ldm_adapter.linear_proj.weight"
    if how == "attention":
        gathered = _rows(state, f"{final}.blocks.0.norm1.weight")
        outputs = _rows(state, f"{final}.blocks.{layers_in_a_row - 1}.proj.weight")
    else:
        gathered, outputs = _rows(state, f"{final}.weight", 1), _rows(state, f"{final}.weight")
    layers, inputs, widths = (tuple(c[f"patch_{name}"])
                              for name in ("from_layers", "in_dimensions", "out_dimensions"))
    # The grid of the VFM is not among the arguments: the unshuffled width tells how much finer than the
    # latent it is.
    ratio = math.isqrt(gathered // sum(widths))
    if ratio < 1 or ratio * ratio * sum(widths) != gathered or not len(layers) == len(inputs) == len(widths):
        raise CheckpointError(f"{NAME}: '{final}' takes {gathered} channels, which patch_out_dimensions "
                              f"{list(widths)} for the layers {list(layers)} do not give at any grid; check "
                              "the config against the weights")
    config = VFMVAE.Config(channels=channels, factor=factor, widths=widths, projection=how,
                           projection_layers=layers_in_a_row, kl=discrete or outputs == 2 * channels,
                           discrete=discrete,
                           alignment_width=_rows(state, aligned) if aligned in state else 0,
                           decoder=_decoder(c, state), **_codebooks(state) if discrete else {})
    side = size // factor * ratio
    shapes = {layer: LayerShape(width, side) for layer, width in zip(layers, inputs, strict=True)}
    return VFMVAE(config, size, shapes=shapes)


def _codebooks(state: dict[str, Tensor]) -> dict[str, Any]:
    head = "ldm_adapter.quantizer.codebooks"
    number = _count(state, rf"{re.escape(head)}\.(\d+)\.codebook\.weight")
    entries = _rows(state, f"{head}.0.codebook.weight")
    return {"codebooks": number, "vocabulary": number * entries}


def arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """The generator's arguments, wherever they stand; the resolution may stand with the data."""
    values = dict(section(NAME, "z_dimension", "patch_from_layers")(tree))
    if "synthesis_kwargs" not in values and (inner := find(tree, "channel_base", "channel_max")) is not None:
        values["synthesis_kwargs"] = inner
    if "img_resolution" not in values:
        size = scalar(tree, "img_resolution", "resolution", "image_size", "img_size")
        if size is None:
            raise ConfigError("vfm-vae config: no 'img_resolution'; add it to the YAML, for example "
                              "img_resolution: 256")
        values["img_resolution"] = int(size)
    return values


def sections(module: Tokenizer, config: dict[str, Any]) -> dict[str, Any]:
    given = config.get("G_kwargs", config)
    model = str(given.get("vfm_name", "")).rstrip("/").rpartition("/")[2]
    name = VFMS.get(model, model)
    if name not in TABLE and not name.startswith("timm:"):
        raise ConfigError(f"vfm-vae config: vfm_name '{model}' is not a known vision "
                          f"model{nearest(model, [*VFMS, *TABLE])}; write a name of vfmlab's table, or "
                          "timm:NAME, into the config")
    vfm = {"name": name, "layers": list(module.layers), "upscale": given.get("scale_factor", 1.0)}
    return {**plain_sections(module, config), "vfm": vfm}


@family(NAME, arguments=arguments, sections=sections, put=layers_put)
def import_vfm_vae(state_dict: dict[str, Tensor], config: dict[str, Any]) -> VFMVAE:
    """A tokenizer with the weights of a released VFM-VAE generator.

    Args:
        state_dict: the generator's, in the release's key names. config: its arguments (or a dict with them as
            `G_kwargs`).

    Returns:
        VFMVAE in eval mode, in fp32 on the CPU, without a VFM: give features to `encode_features`, or
        `attach` the VFM named in the config (`vfm_name`, up-scaled by `scale_factor`), built for the same
        layers.

    Raises:
        CheckpointError: a key that is missing, unknown or of another shape, a blur kernel that is not the
            binomial one.
        ConfigError: an argument that is missing or cannot be imported, or contradicts another.
    """
    state = {key: value for key, value in state_dict.items() if not IGNORED.fullmatch(key)}
    tokenizer = _tokenizer(_settings(config), state)
    decoder = tokenizer.decoder
    _check_blurs(state_dict, decoder.config)
    fusion = _fusion_places(state, decoder)
    own = tokenizer.state_dict()
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if _unused_rgb(key, decoder.config):
            continue
        ours = _renamed(key, fusion)
        # The release keeps biases and scales as 1 C 1 1; only axes of one may differ.
        if ours in own and [n for n in value.shape if n != 1] == [n for n in own[ours].shape if n != 1]:
            value = value.reshape(own[ours].shape)
        renamed[ours if ours in own else key] = value  # an unknown one is reported by the release's name
    fresh = (*STATISTICS, *(key for key in own if key.endswith(".batches")))
    io.load(tokenizer, renamed, f"{NAME} checkpoint", keep=fresh)
    if tokenizer.quantizer is not None:
        for book in tokenizer.quantizer.codebooks:  # a usage that is not all zeros has been averaged for long
            book.batches.fill_(100 if book.usage.any() else 0)
    return tokenizer.eval()


def _unused_rgb(key: str, config: ProgressiveConfig) -> bool:
    """ToRGB of a lower block where the config asks for the final image only: nothing depends on it."""
    match = re.match(r"synthesis\.blocks\.(\d+)\.torgb\.", key)
    return match is not None and not config.multiscale and int(match[1]) < config.blocks - 1


def _fusion_places(state: dict[str, Tensor], decoder: Any) -> dict[int, tuple[int, bool]]:
    """`z_convs` may be numbered by block or in order; the keys tell which."""
    blocks = sorted(int(block) for block in decoder.fusion)
    places = sorted({int(m[1]) for key in state if (m := re.match(r"synthesis\.z_convs\.(\d+)\.", key))})
    indices = blocks if places == blocks else list(range(len(blocks)))
    return {i: (block, decoder.fusion[str(block)].down > 1) for i, block in zip(indices, blocks, strict=True)}


def _check_blurs(state: dict[str, Tensor], config: ProgressiveConfig) -> None:
    """The release stores its fixed kernels; ours are computed, so they must be the same."""
    for key, value in state.items():
        match = re.fullmatch(r"synthesis\.blocks\.(\d+)\..*\.blur_weight", key)
        if match is None or value.is_meta:
            continue
        taps = config.taps[min(int(match[1]), len(config.taps) - 1)] if config.blur else 0
        row = (torch.tensor([math.comb(taps - 1, k) for k in range(taps)]) / 2 ** (taps - 1) if taps
               else torch.zeros(0))
        kernel = torch.outer(row, row)
        same = value.shape[-2:] == kernel.shape
        if not same or not torch.allclose(value.float().cpu(), kernel.expand_as(value), atol=1e-6):
            raise CheckpointError(f"{NAME}: '{key}' is not the binomial blur of {taps} taps that the config "
                                  "asks for")
