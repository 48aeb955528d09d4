"""VFMTok's tokenizer (arXiv 2507.08441), as released without its frozen VFM -> tokenizer `vfmtok`."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from vfmlab.errors import ConfigError
from vfmlab.tokenizers.shapes import LayerShape
from vfmlab.tokenizers.vfmtok import VFMTok
from vfmlab.weights import io
from vfmlab.weights.families import llamagen
from vfmlab.weights.family import Config, family, fused, layers_put, plain_sections, rewritten, settings

NAME = "vfmtok"
RELEASED_LAYERS = (6, 12, 18, -1)  # of DINOv2-L; only the last passes the final norm
DEFAULTS: dict[str, Any] = {
    "vfm_width": 1024, "feature_grid": 24, "levels": 4, "region_tokens": 256, "dim": 512, "deformable": {},
    "decoder_transformer": {}, "pixel_grid": 21, "image_size_out": 336, "conv_decoder": {},
    "codebook_size": 16_384, "codebook_dim": 12, "commit_loss_beta": 0.25, "entropy_loss_ratio": 0.0,
    "layers": None, "vfm": "dinov2_l14_reg",
}  # fmt: skip
DEFORMABLE = {"layers": 6, "heads": 8, "points": 4, "ffn": 1024}
TRANSFORMER = {"layers": 6, "heads": 8, "mlp_dim": 2048, "swiglu_hidden": None, "registers": 4}
CONVOLUTIONS = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4), "res_blocks": 2}
RENAMES = [
    (r"^encode_transformer\.carrier_tokens$", "encoder.queries"),
    (r"^encode_transformer\.slots_pos$", "encoder.position"),
    (r"^encode_transformer\.norm_pre1\.", "encoder.norm."),
    (r"^encode_transformer\.norm_layers\.(\d+)\.", r"encoder.projectors.\1.norm."),
    (r"^encode_transformer\.(?:transformer\.)?", "encoder."),
    (r"\.cross_attn\.sampling_offsets\.", ".look.offsets."),
    (r"\.cross_attn\.attention_weights\.", ".look.weights."),
    (r"\.cross_attn\.value_proj\.", ".look.value."),
    (r"\.cross_attn\.output_proj\.", ".look.out."),
    (r"\.self_attn\.out_proj\.", ".tokens.out_proj."),
    (r"^decode_transformer\.position_embedding$", "decoder.position"),
    (r"^decode_transformer\.slot_position_embedding$", "decoder.memory_position"),
    (r"^decode_transformer\.mask_embedding$", "decoder.pixel_mask"),
    (r"^decode_transformer\.mask_dino$", "decoder.feature_mask"),
    (r"^decode_transformer\.cls_token$", "decoder.class_token"),
    (r"^decode_transformer\.register_tokens$", "decoder.registers"),
    (r"^decode_transformer\.norm_post1\.", "decoder.norm_pixels."),
    (r"^decode_transformer\.norm_post2\.", "decoder.norm_features."),
    (r"^decode_transformer\.proj\.", "decoder.head."),
    (r"^decode_transformer\.transformer\.layers\.", "decoder.blocks."),
    (r"\.attn1\.out_proj\.", ".proj."),
    (r"\.ffnet\.w12\.", ".expand."),
    (r"\.ffnet\.w3\.", ".contract."),
    (r"^pre_slots_quant\.", "quant."),
    (r"^post_slots_quant\.", "post_quant."),
    (r"^slot_quantize\.embedding\.", "quantizer."),
]
# Of an encoder layer: after the maps, after the feed-forward, after self-attention.
INSIDE = {"norm1": "norm_look", "norm2": "norm_out", "norm3": "norm_tokens", "linear1": "expand",
          "linear2": "contract"}


def rename(key: str) -> str:
    """A key of the release -> ours, with queries, keys and values still apart."""
    if key.startswith("decoder."):
        return rewritten(key.replace("decoder.", "pixels.", 1), llamagen.RENAMES)
    key = rewritten(key, RENAMES)
    if match := re.fullmatch(r"(encoder\.layers\.\d+\.)(norm\d|linear\d)(\..*)", key):
        return match[1] + INSIDE[match[2]] + match[3]
    return key


def sections(module: VFMTok, config: Config) -> Config:
    vfm = {"name": config.get("vfm", DEFAULTS["vfm"]), "layers": list(module.layers)}
    return {**plain_sections(module, config), "vfm": vfm}


@family(NAME, sections=sections, put=layers_put)
def import_vfmtok(state_dict: dict[str, Tensor], config: dict[str, Any]) -> VFMTok:
    """A tokenizer without its VFM: `encode_features(list of B N D)` gives `indices` and `latents`,
    `decode_codes(indices)` images; `attach(vfm)` makes it take images.

    Args:
        state_dict: keys as released; those with "backbone" are left out. config: `vfm_width`, `feature_grid`,
            `levels`, `region_tokens`, `dim`, `deformable` (`layers`, `heads`, `points`, `ffn`),
            `decoder_transformer` (`layers`, `heads`, `mlp_dim` or `swiglu_hidden`, `registers`),
            `pixel_grid`, `image_size_out`, `conv_decoder` (`ch`, `ch_mult`, `res_blocks`), `codebook_size`,
            `codebook_dim`, `commit_loss_beta`; `layers` of the VFM and its name `vfm` are ours. The defaults
            are the release's.
    """
    c = settings(config, DEFAULTS, NAME, llamagen.WITHOUT_EFFECT)
    d, t, v = (settings(c[part], defaults, f"{NAME}.{part}", llamagen.WITHOUT_EFFECT)
               for part, defaults in (("deformable", DEFORMABLE), ("decoder_transformer", TRANSFORMER),
                                      ("conv_decoder", CONVOLUTIONS)))
    layers = c["layers"] or (RELEASED_LAYERS if c["levels"] == 4 else (*range(1, c["levels"]), -1))
    size, blocks = int(c["image_size_out"]), v["res_blocks"]
    if size % c["pixel_grid"] or len(layers) != c["levels"]:
        raise ConfigError(f"{NAME}: image_size_out {size} and pixel_grid {c['pixel_grid']}, levels "
                          f"{c['levels']} and layers {list(layers)} must fit each other")
    if isinstance(blocks, str):  # "1 + 1 per level"
        blocks = sum(int(n) for n in re.findall(r"\d+", blocks))
    gated = t["swiglu_hidden"] or 8 * math.ceil(2 * t["mlp_dim"] / 3 / 8)
    options = VFMTok.Config.model_validate({
        "channels": c["codebook_dim"], "factor": size // c["pixel_grid"], "tokens": c["region_tokens"],
        "width": c["dim"], "depth": d["layers"], "heads": d["heads"], "points": d["points"],
        "hidden": d["ffn"], "decoder_depth": t["layers"], "decoder_heads": t["heads"],
        "decoder_hidden": gated, "registers": t["registers"], "registers_first": False,
        "pixel_width": v["ch"], "pixel_multipliers": tuple(v["ch_mult"]), "pixel_blocks": blocks,
        "quantizer": {"kind": "cosine", "size": c["codebook_size"], "beta": c["commit_loss_beta"]},
    })
    shape = LayerShape(int(c["vfm_width"]), int(c["feature_grid"]))
    tokenizer = VFMTok(options, size, shapes=dict.fromkeys(layers, shape))
    renamed = {rename(key): value for key, value in state_dict.items()
               if "backbone" not in key and not key.endswith("codebook_used")}
    for theirs, ours in (("self_attn", r"\1tokens.in_proj_\3"), ("attn1", r"\1qkv.\3")):
        renamed = fused(renamed, rf"(.*\.){theirs}\.(?P<part>[qkv])_proj\.(weight|bias)", ours)
    return io.load(tokenizer, renamed, f"{NAME} checkpoint", keep=llamagen.counters(tokenizer)).eval()
