"""Networks trained with RJF (arXiv 2602.10099; amandpkr/RJF, no licence) -> our LightningDiT on the spherical
path.

RJF's path runs on the unit sphere, and its network is fed sqrt(C) x. Here tokens have the length sqrt(C)
themselves, so the network is fed as before and its velocity is sqrt(C) times as long, which the last
layer takes. Its time is ours: t = 1 is noise. No list of RJF's tensor names was to be had: they are taken to
be those of LightningDiT, and strict loading refuses any other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vfmlab.diffusion.dit import LightningDiT
from vfmlab.weights import io
from vfmlab.weights.families.lightningdit import DEFAULTS, arguments, built, check_rope, translated
from vfmlab.weights.family import family, settings


@family("rjf", arguments=arguments, path="sphere")
def import_rjf(state_dict: dict[str, Tensor], config: dict[str, Any]) -> LightningDiT:
    """A LightningDiT called `(x, t, y)` on tokens of length sqrt(in_channels).

    Args:
        state_dict, config: as of the family lightningdit.
    """
    c = settings(config, DEFAULTS, "rjf")
    network = built(LightningDiT, c)
    state = translated(state_dict, network.num_classes)
    check_rope(state, "feat_rope.", network.rope, "rjf")
    for name in ("final.linear.weight", "final.linear.bias"):
        if name in state:
            state[name] = state[name] * c["in_channels"] ** 0.5
    return io.load(network, state, "rjf checkpoint")
