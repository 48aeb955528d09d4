"""Released SiT weights with REG (Martinser/REG, on REPA and SiT, all MIT) -> our RegSiT. Their time is
ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.diffusion.sit import RegSiT
from vfmlab.errors import ConfigError
from vfmlab.weights import io
from vfmlab.weights.families.lightningdit import rename, settings, with_null
from vfmlab.weights.family import family

DEFAULTS = {  # of the release's constructor
    "path_type": "linear", "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152,
    "decoder_hidden_size": None, "encoder_depth": 8, "depth": 28, "num_heads": 16, "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1, "num_classes": 1000, "use_cfg": False, "z_dims": [768], "projector_dim": 2048,
    "fused_attn": True, "qk_norm": False,
}  # fmt: skip

PARTS = {
    "cls_projectors2.": "class_embed.",
    "wg_norm.": "class_norm.",
    "final_layer.linear_cls.": "class_final.",
}


@family("sit-reg")
def import_sit_reg(state_dict: dict[str, Tensor], config: dict[str, Any]) -> RegSiT:
    """A RegSiT called `(x, t, y, cls_token) -> (v, v_class, aligned)`.

    Args:
        state_dict: keys as released. config: arguments of the release's constructor; its defaults hold. The
            width of the class token is the first of `z_dims`, as in the release's models.
    """
    c = settings(config, DEFAULTS, "sit-reg")
    if c["path_type"] != "linear":
        raise ConfigError(
            f"sit-reg: path_type '{c['path_type']}' is not supported; released weights are of the linear path"
        )
    if c["decoder_hidden_size"] not in (
        None,
        c["hidden_size"],
    ):  # the release's own model does not run either
        raise ConfigError(
            f"sit-reg: decoder_hidden_size {c['decoder_hidden_size']} must be hidden_size {c['hidden_size']}"
        )
    ours = RegSiT.Config(
        width=c["hidden_size"],
        depth=c["depth"],
        heads=c["num_heads"],
        patch=c["patch_size"],
        mlp_ratio=c["mlp_ratio"],
        qk_norm=c["qk_norm"],
        aligned=tuple(c["z_dims"]),
        projector=c["projector_dim"],
        align_after=c["encoder_depth"],
    )
    network = RegSiT(ours, (c["in_channels"], c["input_size"], c["input_size"]), c["num_classes"])
    state = {}
    for key, value in state_dict.items():
        key = key.removeprefix("module.")
        for theirs, mine in PARTS.items():
            if key.startswith(theirs):
                key = mine + key.removeprefix(theirs)
                break
        else:
            key = rename(key)
        state[key] = value
    if "label_embed.weight" in state:
        state["label_embed.weight"] = with_null(state["label_embed.weight"], network.num_classes)
    return io.load(network, state, "sit-reg checkpoint")
