"""Released DiT-DH of RAE (bytetriper/RAE, MIT; 2510.11690) -> our DDT. Its time is ours: t = 1 is noise."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from vfmlab.diffusion.ddt import DDT
from vfmlab.errors import ConfigError
from vfmlab.weights import io
from vfmlab.weights.families.lightningdit import built, check_rope, translated
from vfmlab.weights.family import family, find, settings

DEFAULTS = {  # of the release's constructor
    "input_size": 1, "patch_size": 1, "in_channels": 768, "hidden_size": [1152, 2048], "depth": [28, 2],
    "num_heads": [16, 16], "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "use_qknorm": False,
    "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False, "use_pos_embed": True,
}  # fmt: skip

PARTS = {
    "s_embedder.proj.": "patch_embed.",
    "x_embedder.proj.": "head_patch_embed.",
    "s_projector.": "to_head.",
    "t_embedder.W": "time_embed.frequencies",
}


def pair(value: Any, name: str) -> tuple[Any, Any]:
    """(encoder's, head's) from one value for both or a list of two."""
    both = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(both) != 2:
        raise ConfigError(f"dit-dh: {name} = {value!r} must be one number or [encoder, head]")
    return both


def both(c: dict[str, Any], what: str, first: str) -> dict[str, Any]:
    """Sizes of `first` and of the head, as our config has them."""
    (width, wide), (depth, shallow), (heads, head_heads), (patch, head_patch) = (
        pair(c[name], name) for name in ("hidden_size", "depth", "num_heads", "patch_size"))
    if patch != head_patch:
        raise ConfigError(f"{what}: patch_size {c['patch_size']} must be the same for {first} and head")
    return {"width": width, "depth": depth, "heads": heads, "patch": patch, "head_width": wide,
            "head_depth": shallow, "head_heads": head_heads}


def of_head(key: str, depth: int) -> str:
    """`key`, where blocks behind the first `depth` are the head's."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if match is None or int(match[1]) < depth:
        return key
    return f"head_blocks.{int(match[1]) - depth}.{match[2]}"


def arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """RAE's and RAEv2's YAML: the first section with `hidden_size` and `depth`, or `stage_2.params`."""
    section = find(tree, "hidden_size", "depth") or tree.get("stage_2", tree)
    return section.get("params", section)


@family("dit-dh", arguments=arguments)
def import_dit_dh(state_dict: dict[str, Tensor], config: dict[str, Any]) -> DDT:
    """A DDT called `(x, t, y)`.

    Args:
        state_dict: keys as released. config: arguments of the release's constructor; its defaults hold.
    """
    c = settings(config, DEFAULTS, "dit-dh")
    network = built(DDT, c, **both(c, "dit-dh", "encoder"))
    state = {of_head(key, len(network.blocks)): value
             for key, value in translated(state_dict, c["num_classes"], PARTS).items()}
    check_rope(state, "enc_feat_rope.", network.rope, "dit-dh")
    check_rope(state, "dec_feat_rope.", network.head_rope, "dit-dh")
    if not c["use_pos_embed"]:
        state.pop("pos_embed", None)
    return io.load(network, state, "dit-dh checkpoint")
