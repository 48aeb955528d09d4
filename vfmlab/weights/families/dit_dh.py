"""Released DiT-DH weights of RAE (bytetriper/RAE, MIT; arXiv 2510.11690) -> our DDT. Its time is ours: t =
1 is noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.config import Guidance
from vfmlab.diffusion.ddt import DDT
from vfmlab.errors import ConfigError
from vfmlab.weights import io
from vfmlab.weights.families.lightningdit import built, check_rope, settings, translated
from vfmlab.weights.family import family

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


def arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """RAE's YAML: `stage_2.params`."""
    section = tree.get("stage_2", tree)
    return section.get("params", section)


@family("dit-dh", arguments=arguments)
def import_dit_dh(state_dict: dict[str, Tensor], config: dict[str, Any]) -> DDT:
    """A DDT called `(x, t, y)`.

    Args:
        state_dict: keys as released. config: arguments of the release's constructor; its defaults hold.
    """
    c = settings(config, DEFAULTS, "dit-dh")
    (width, wide), (depth, shallow) = pair(c["hidden_size"], "hidden_size"), pair(c["depth"], "depth")
    heads, head_heads = pair(c["num_heads"], "num_heads")
    patch, head_patch = pair(c["patch_size"], "patch_size")
    if patch != head_patch:
        raise ConfigError(f"dit-dh: patch_size {c['patch_size']} must be the same for encoder and head")
    sizes = {"width": width, "depth": depth, "heads": heads, "patch": patch}
    sizes |= {"head_width": wide, "head_depth": shallow, "head_heads": head_heads}
    network, state = built(DDT, c, **sizes), {}
    for key, value in translated(state_dict, c["num_classes"], PARTS).items():
        if key.startswith("blocks."):
            number, rest = key.removeprefix("blocks.").split(".", 1)
            key = key if int(number) < depth else f"head_blocks.{int(number) - depth}.{rest}"
        state[key] = value
    check_rope(state, "enc_feat_rope.", network.rope, "dit-dh")
    check_rope(state, "dec_feat_rope.", network.head_rope, "dit-dh")
    if not c["use_pos_embed"]:
        state.pop("pos_embed", None)
    return io.load(network, state, "dit-dh checkpoint")


def released_guidance(scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> Guidance:
    """Guidance as the release applies it: on all channels, for times inside `interval`, both ends
    included."""
    return Guidance(scale=scale, interval=interval)
