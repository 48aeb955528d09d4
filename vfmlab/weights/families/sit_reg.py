"""Released SiT weights with REG (Martinser/REG, on REPA and SiT, all MIT) -> our RegSiT, in our time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.diffusion.sit import RegSiT
from vfmlab.weights import io
from vfmlab.weights.families.lightningdit import built, translated
from vfmlab.weights.families.sit import check_linear
from vfmlab.weights.family import family, settings

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
    check_linear(c, "sit-reg")
    network = built(RegSiT, c, aligned=tuple(c["z_dims"]), projector=c["projector_dim"],
                    align_after=c["encoder_depth"])
    return io.load(network, translated(state_dict, network.num_classes, PARTS), "sit-reg checkpoint")
