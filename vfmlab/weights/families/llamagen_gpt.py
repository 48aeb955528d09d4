"""Released class-conditional LlamaGen transformers (MIT; arXiv 2406.06525), VFMTok's too -> LlamaGen."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from vfmlab.ar.llamagen import SIZES, CodeShape, LlamaGen
from vfmlab.errors import ConfigError
from vfmlab.weights import io
from vfmlab.weights.family import check_fixed, family, headed, needed

NEEDED = ("dim", "n_layer", "n_head", "vocab_size", "block_size")
DEFAULTS = {"multiple_of": 256, "num_classes": 1000}  # of the release's constructor
FIXED = {  # the only values that released class-conditional models have
    "n_kv_head": None, "ffn_dim_multiplier": None, "norm_eps": 1e-5, "rope_base": 10000, "cls_token_num": 1,
    "model_type": "c2i",
}  # fmt: skip
NAMES = {
    "cls_embedding.embedding_table.": "class_embedding.", "tok_embeddings.": "token_embedding.", "output.": "head.",
}  # fmt: skip
LAYERS = {
    "attention.wqkv.": "qkv.", "attention.wo.": "proj.", "feed_forward.w1.": "gate.", "feed_forward.w3.": "up.",
    "feed_forward.w2.": "down.", "attention_norm.": "norm1.", "ffn_norm.": "norm2.",
}  # fmt: skip


def arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """Flat arguments; `gpt_model` ("GPT-B") may name a size, `image_size` / `downsample_size` the grid."""
    flat = dict(tree)
    name = str(flat.pop("gpt_model", "")).rpartition("-")[2]
    if name in SIZES:
        flat = dict(zip(("dim", "n_layer", "n_head"), SIZES[name], strict=True)) | flat
    side, by = flat.pop("image_size", None), flat.pop("downsample_size", 16)
    return flat if side is None else {"block_size": (side // by) ** 2} | flat


@family("llamagen-gpt", arguments=arguments)
def import_llamagen_gpt(state_dict: dict[str, Tensor], config: dict[str, Any]) -> LlamaGen:
    """A token network, with `logits(labels, codes)` and its incremental form.

    Args:
        state_dict: keys as released. config: arguments of the release's constructor, of which `NEEDED` must
            be there; those that are no part of the network (dropout, training, sampling) are not read.
    """
    needed(config, NEEDED, "llamagen-gpt")
    c = DEFAULTS | config
    if c.get("n_kv_head") == c["n_head"]:  # as good as none
        c["n_kv_head"] = None
    check_fixed(c, FIXED, "llamagen-gpt")
    side = round(c["block_size"] ** 0.5)
    if side < 1 or side * side != c["block_size"]:
        raise ConfigError(f"llamagen-gpt: block_size {c['block_size']} is no square of 1 or more, and the "
                          "release's positions are those of a square grid; give rows x columns, such as 256")
    shape = LlamaGen.Config(width=c["dim"], depth=c["n_layer"], heads=c["n_head"], multiple=c["multiple_of"])
    codes = CodeShape(c["vocab_size"], c["block_size"], (side, side))
    network = LlamaGen(shape, codes, c["num_classes"])
    state = {_renamed(key): value for key, value in state_dict.items()}
    return io.load(network, state, "llamagen-gpt checkpoint")


def _renamed(key: str) -> str:
    if match := re.match(r"layers\.(\d+)\.(.+)", key):
        return f"blocks.{match[1]}.{headed(match[2], LAYERS)}"
    return headed(key, NAMES)
