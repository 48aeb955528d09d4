"""Released LightningDiT weights (hustvl/LightningDiT, MIT; arXiv 2501.01423) -> our LightningDiT.

The release has t = 1 at the data and v = data - noise. Both differences are folded into the weights, so that
the result is an ordinary network of this project, trainable and storable like any other:

* its time embedding takes 1 - t: cos(f - f t) and sin(f - f t) are rotations of cos(f t) and sin(f t) by the
  angle f, so the first linear layer of the embedding takes the rotation;
* its output changes sign: so does the last linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.diffusion.blocks import frequencies
from vfmlab.diffusion.dit import SIZES, LightningDiT
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.weights import io
from vfmlab.weights.family import State, family, headed, settings

DEFAULTS = {  # of the release's constructor
    "input_size": 32, "patch_size": 2, "in_channels": 32, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": False, "use_qknorm": False,
    "use_swiglu": False, "use_rope": False, "use_rmsnorm": False, "wo_shift": False, "use_checkpoint": False,
}  # fmt: skip

PARTS = {  # release -> here, by prefix
    "x_embedder.proj.": "patch_embed.",
    "t_embedder.": "time_embed.",
    "y_embedder.embedding_table.": "label_embed.",
    "final_layer.adaLN_modulation.1.": "final.modulation.",
    "final_layer.norm_final.": "final.norm.",
    "final_layer.linear.": "final.linear.",
}
NONE: dict[str, str] = {}
FIELDS = {  # of the releases' constructors -> of our configs
    "hidden_size": "width", "depth": "depth", "num_heads": "heads", "patch_size": "patch", "mlp_ratio": "mlp_ratio",
    "use_qknorm": "qk_norm", "qk_norm": "qk_norm", "use_swiglu": "swiglu", "use_rope": "rope",
    "use_rmsnorm": "rmsnorm", "wo_shift": "shift_free", "learn_sigma": "learn_sigma", "use_pos_embed": "pos_embed",
}  # fmt: skip
INSIDE = {".adaLN_modulation.1.": ".modulation.", ".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}


def rename(key: str) -> str:
    """A key of the release under our name."""
    key = headed(key, PARTS)
    if key.startswith("blocks."):
        for theirs, ours in INSIDE.items():
            key = key.replace(theirs, ours)
    return key


def translated(state_dict: State, classes: int, parts: dict[str, str] = NONE) -> State:
    """`state_dict` under our names, its label table with a null row. parts: further prefixes."""
    state = {}
    for key, value in state_dict.items():
        key = headed(key, parts) if key.startswith(tuple(parts)) else rename(key)
        state[key] = with_null(value, classes) if key == "label_embed.weight" else value
    return state


def built(kind: type[nn.Module], c: dict[str, Any], **fields: Any) -> nn.Module:
    """A network of the constructor's arguments `c`. fields: of ours, in place of what `c` says."""
    config = {ours: c[theirs] for theirs, ours in FIELDS.items() if theirs in c} | fields
    return kind(kind.Config(**config), (c["in_channels"], c["input_size"], c["input_size"]), c["num_classes"])


def reverse_time(state: State) -> State:
    """Weights of a network with t = 1 at the data and v = data - noise -> of the same in our convention."""
    changes = {"time_embed.mlp.0.weight": reversed_time}
    changes |= {f"final.linear.{part}": torch.neg for part in ("weight", "bias")}
    return {key: changes[key](value) if key in changes else value for key, value in state.items()}


def check_rope(state: dict[str, Tensor], prefix: str, table: Tensor | None, what: str) -> None:
    """Take the rotary tables out of `state`; they are computed here, and must be those of the release."""
    for part, name in enumerate(("freqs_sin", "freqs_cos")):
        stored = state.pop(f"{prefix}{name}", None)
        if stored is None:
            continue
        fits = table is not None and stored.shape == table[part].shape
        least = max(1e-4, torch.finfo(stored.dtype).eps)  # of weights in 16 bits the tables are too
        if not fits or not torch.allclose(stored.float(), table[part], atol=least):
            raise CheckpointError(f"{what}: {prefix}{name} {list(stored.shape)} is not the rotary table of "
                                  "this config; check use_rope and input_size")


def with_null(table: Tensor, num_classes: int) -> Tensor:
    """A label table with the null row; networks released without class dropout have none and get zeros."""
    return torch.cat([table, table.new_zeros(1, table.shape[1])]) if table.shape[0] == num_classes else table


def reversed_time(weight: Tensor) -> Tensor:
    """First linear layer of a sinusoidal time embedding [D, 256], f(t) -> f(1 - t). Its own inverse."""
    angle = frequencies(weight.shape[1] // 2).double()
    cos, sin = weight.double().chunk(2, dim=1)
    turned = [cos * angle.cos() + sin * angle.sin(), cos * angle.sin() - sin * angle.cos()]
    return torch.cat(turned, dim=1).to(weight.dtype)


def sizes(name: str) -> dict[str, Any]:
    """"LightningDiT-XL/1", "SiT-B/2" -> sizes and patch."""
    size, _, patch = name.rpartition("-")[2].partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ConfigError(f"config: model '{name}' has no known size; sizes are {', '.join(SIZES)}, for "
                          "example SiT-XL/2")
    width, depth, heads = SIZES[size]
    return {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": int(patch)}


def arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """LightningDiT's YAML: `model.model_type` and switches, `data.image_size`, `vae.downsample_ratio`."""
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    ours = {"in_channels" if key == "in_chans" else key: value for key, value in model.items()
            if key != "model_type"}
    if "model_type" in model:
        ours = {**sizes(model["model_type"]), **ours}
    data, vae = tree.get("data", {}), tree.get("vae", {})
    if "num_classes" in data:
        ours.setdefault("num_classes", data["num_classes"])
    if "image_size" in data:
        ours.setdefault("input_size", data["image_size"] // vae.get("downsample_ratio", 16))
    return ours


@family("lightningdit", arguments=arguments)
def import_lightningdit(state_dict: dict[str, Tensor], config: dict[str, Any]) -> LightningDiT:
    """A LightningDiT called `(x, t, y)` in the convention of `vfmlab.diffusion.path`.

    Args:
        state_dict: keys as released (one set of weights: the EMA ones are under "ema" in the release's file).
        config: arguments of the release's constructor (`hidden_size`, `depth`, `use_qknorm`, ...); its
            defaults hold.
    """
    c = settings(config, DEFAULTS, "lightningdit")
    network = built(LightningDiT, c)
    state = reverse_time(translated(state_dict, network.num_classes))
    check_rope(state, "feat_rope.", network.rope, "lightningdit")
    return io.load(network, state, "lightningdit checkpoint")
