"""Released SiT weights with REG (Martinser/REG, on REPA and SiT, all MIT) -> our RegSiT, in our time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.diffusion.sit import RegSiT
from vfmlab.weights import io
from vfmlab.weights.families.lightningdit import built, translated
from vfmlab.weights.families.sit import DEFAULTS, REPA_ONLY, check_linear
from vfmlab.weights.family import family, settings

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
    c = settings(config, DEFAULTS | REPA_ONLY, "sit-reg")
    check_linear(c, "sit-reg")
    network = built(RegSiT, c, aligned=tuple(c["z_dims"]), projector=c["projector_dim"],
                    align_after=c["encoder_depth"])
    return io.load(network, translated(state_dict, network.num_classes, PARTS), "sit-reg checkpoint")
