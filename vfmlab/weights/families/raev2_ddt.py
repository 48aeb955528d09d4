"""Released network of RAEv2 (nanovisionx/RAEv2, CC BY-NC 4.0; arXiv 2605.18324) -> our `raev2`. Its time is
ours: t = 1 is noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.diffusion.raev2 import RAEv2
from vfmlab.weights import io
from vfmlab.weights.families.dit_dh import arguments, both, of_head
from vfmlab.weights.families.lightningdit import built, check_rope
from vfmlab.weights.family import family, fused, headed, settings

DEFAULTS = {  # of the release's constructor, as its paper's largest network sets them
    "input_size": 16, "patch_size": 1, "in_channels": 1024, "hidden_size": [1440, 2048], "depth": [28, 2],
    "num_heads": [20, 16], "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000,
    "cond_arch": {"num_t_tokens": 4, "num_c_tokens": 8}, "base_model_depth": 8,
}  # fmt: skip
PARTS = {
    "s_embedder.proj.": "patch_embed.", "x_embedder.proj.": "head_patch_embed.", "s_projector.": "to_head.",
    "t_embedder.W": "time_embed.frequencies", "t_embedder.mlp.": "time_embed.mlp.",
    "t_embedder.learnable_tokens": "time_tokens", "ctx_embedder.learnable_tokens": "class_tokens",
    "ctx_embedder.embedding_table.": "label_embed.", "base_final_layer.": "base.", "final_layer.": "final.",
}  # fmt: skip
INSIDE = {"adaln_modulation.1.": "modulation.", "mlp.w3.": "mlp.fc2."}


@family("raev2-ddt", arguments=arguments)
def import_raev2(state_dict: dict[str, Tensor], config: dict[str, Any]) -> RAEv2:
    """A :class:`vfmlab.diffusion.raev2.RAEv2` called `(x, t, y)`; its `predict` gives the release's outputs.

    Args:
        state_dict: keys as released. config: arguments of the release's constructor, or a mapping that holds
        them as "config".
    """
    c = settings(config.get("config", config), DEFAULTS, "raev2-ddt")
    network = built(RAEv2, c, **both(c, "raev2-ddt", "stack"), base_depth=c["base_model_depth"],
                    time_tokens=c["cond_arch"]["num_t_tokens"], class_tokens=c["cond_arch"]["num_c_tokens"])
    state = {rename(key, len(network.blocks)): value for key, value in state_dict.items()}
    state = fused(state, r"(.*\.attn\.)(?P<part>[qkv])(\..+)", r"\1qkv\3")
    state = fused(state, r"(.*\.mlp\.)(?P<part>w1|w2)(\..+)", r"\1fc1\3", ("w1", "w2"))  # gate and value
    check_rope(state, "enc_rope.", network.rope, "raev2-ddt")
    check_rope(state, "dec_rope.", network.head_rope, "raev2-ddt")
    return io.load(network, state, "raev2-ddt checkpoint")


def rename(key: str, depth: int) -> str:
    """A key of the release under our name; blocks behind the first `depth` are the head's."""
    key = headed(key, PARTS)
    for theirs, ours in INSIDE.items():
        key = key.replace(theirs, ours)
    return of_head(key, depth)
