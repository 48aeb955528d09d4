"""Released SiT (willisma/SiT, MIT; arXiv 2401.08740) and REPA (sihyun-yu/REPA, MIT; arXiv 2410.06940) ->
LightningDiT.

Both are DiT's network: layer norm without weights, tanh-GELU, no rotary positions; ours with those switches.
They differ in time: SiT has t = 1 at the data and v = data - noise, as LightningDiT, and is converted in the
weights; REPA's time is ours. REPA's projectors serve its alignment loss only and are left out; so is the
second half of SiT's output (`learn_sigma`) when it samples, but not from the weights.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from vfmlab.diffusion.dit import LightningDiT
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.weights import io
from vfmlab.weights.families.lightningdit import built, reverse_time, sizes, translated
from vfmlab.weights.family import family, settings

DEFAULTS = {  # of the releases' constructors
    "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000,
}  # fmt: skip
REPA_ONLY = {
    "path_type": "linear", "decoder_hidden_size": None, "encoder_depth": 8, "use_cfg": False, "z_dims": [768],
    "projector_dim": 2048, "fused_attn": True, "qk_norm": False,
}  # fmt: skip


def arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """Flat arguments; `model` may name a size, as on the releases' command line."""
    ours = {key: value for key, value in tree.items() if key != "model"}
    return {**sizes(tree["model"]), **ours} if isinstance(tree.get("model"), str) else ours


@family("sit", arguments=arguments)
def import_sit(state_dict: dict[str, Tensor], config: dict[str, Any]) -> LightningDiT:
    """A network called `(x, t, y)` in our time.

    Args:
        state_dict: keys as released. config: arguments of the release's constructor; its defaults hold.
            `learn_sigma` may be left out: the output layer tells it.
    """
    c = settings(config, {**DEFAULTS, "learn_sigma": None}, "sit")
    network, state = _network(state_dict, c, "sit", c["learn_sigma"])
    return io.load(network, reverse_time(state), "sit checkpoint")


def check_linear(c: dict[str, Any], what: str) -> None:
    """:class:`ConfigError` for what released weights of REPA and REG do not have."""
    if c["path_type"] != "linear":
        raise ConfigError(f"{what}: path_type '{c['path_type']}' is not supported, only linear")
    wide, width = c["decoder_hidden_size"], c["hidden_size"]
    if wide not in (None, width):  # the releases' own models do not run either
        raise ConfigError(f"{what}: decoder_hidden_size {wide} must be hidden_size {width}")


@family("repa", arguments=arguments)
def import_repa(state_dict: dict[str, Tensor], config: dict[str, Any]) -> LightningDiT:
    """A network called `(x, t, y)`; REPA's projectors are not part of it.

    Args:
        state_dict: keys as released, or as in its first release, where the blocks after `encoder_depth` are
            called `decoder_blocks`. config: arguments of the release's constructor; its defaults hold.
    """
    c = settings(config, {**DEFAULTS, **REPA_ONLY}, "repa")
    check_linear(c, "repa")
    tensors = {}
    for key, value in state_dict.items():
        if match := re.match(r"decoder_blocks\.(\d+)\.(.+)", key):
            key = f"blocks.{int(match[1]) + c['encoder_depth']}.{match[2]}"
        if not key.startswith("projectors."):
            tensors[key] = value
    network, state = _network(tensors, c, "repa", False)
    return io.load(network, state, "repa checkpoint")


def _network(state_dict: dict[str, Tensor], c: dict[str, Any], what: str,
             sigma: bool | None) -> tuple[LightningDiT, dict[str, Tensor]]:
    """The network of these settings, and the state dict under its names."""
    outputs = c["in_channels"] * c["patch_size"] ** 2
    if sigma is None:
        last = state_dict.get("final_layer.linear.weight")
        if last is None:
            raise CheckpointError(f"{what} checkpoint has no 'final_layer.linear.weight'; give the network's "
                                  "state dict")
        sigma = last.shape[0] == 2 * outputs
    switches = dict.fromkeys(("swiglu", "rope", "rmsnorm"), False)
    network = built(LightningDiT, c, qk_norm=c.get("qk_norm", False), learn_sigma=sigma, **switches)
    return network, translated(state_dict, network.num_classes)
