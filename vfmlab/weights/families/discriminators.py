"""Discriminators as VFM-VAE and the code it builds on (StyleGAN-T, pix2pixHD) save them -> ours."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor

from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.losses.discriminators.base import Discriminator
from vfmlab.registry import DISCRIMINATORS
from vfmlab.vfm.base import VisionModel
from vfmlab.vfm.table import Facts
from vfmlab.vfm.vit import TimmModel
from vfmlab.weights import io
from vfmlab.weights.family import family, headed, rewritten, settings

HEAD = {
    "main.0.0.": "first.conv.",
    "main.0.1.": "first.norm.",
    "main.1.fn.0.": "second.conv.",
    "main.1.fn.1.": "second.norm.",
    "cls.": "out.",
    "cmapper.": "condition.",
}
SPECTRAL = [("weight_orig$", "weight"), ("weight_([uv])$", r"\1")]
DEFAULTS = {"img_size": 224, "num_heads": 6, "hooks": (2, 5, 8, 11), "virtual_bs": 8}
BACKBONE = "dino.model.model."
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def rename_head(key: str) -> str:
    """A key of one head of StyleGAN-T -> :class:`vfmlab.losses.discriminators.heads.Head`'s."""
    return rewritten(headed(key, HEAD), SPECTRAL)


@family("projected-discriminator")
def projected(state_dict: dict[str, Tensor], config: dict[str, Any]) -> Discriminator:
    """Heads and backbone of a projected discriminator -> kind `projected`, at the backbone's resolution.

    Args:
        config: `img_size` of the backbone, `num_heads`, `hooks` (0-based blocks; the patch embedding comes
            after them), `virtual_bs`; see `DEFAULTS`. All other shapes are read off the tensors.
    """
    c = settings(config, DEFAULTS, "projected-discriminator config")
    net = {key.removeprefix(BACKBONE): value for key, value in state_dict.items() if key.startswith(BACKBONE)}
    heads = {key: value for key, value in state_dict.items() if key.startswith("heads.")}
    if not net or not heads:
        raise CheckpointError(f"projected-discriminator: no tensors '{BACKBONE}*' or 'heads.*'; give its "
                              "state dict")
    if other := [key for key in state_dict if not key.startswith((BACKBONE, "heads."))]:
        raise CheckpointError(f"projected-discriminator: {len(other)} unexpected: {', '.join(other[:4])}")
    backbone = vision_model(net, int(c["img_size"]), int(c["num_heads"]))
    kind = DISCRIMINATORS.get("projected")
    mapper = heads.get("heads.0.cmapper.weight")
    options = kind.Config(kind="projected", backbone=None,
                          layers=(*(block + 1 for block in c["hooks"]), 0),
                          virtual_batch=int(c["virtual_bs"]),
                          classes=0 if mapper is None else mapper.shape[1],
                          mapped=64 if mapper is None else mapper.shape[0],
                          kernel=heads["heads.0.main.1.fn.0.weight_orig"].shape[2])
    discriminator = kind(options, backbone.size, backbone)
    renamed = {}
    for key, value in heads.items():
        _, number, rest = key.split(".", 2)
        renamed[f"heads.{number}.{rename_head(rest)}"] = value
    return io.load(discriminator, renamed, "projected-discriminator checkpoint")


def vision_model(net: dict[str, Tensor], size: int, heads: int) -> VisionModel:
    """A frozen plain timm ViT of the shape that the tensors tell, with these weights."""
    patch = net["patch_embed.proj.weight"]
    depth = 1 + max(int(match[1]) for key in net if (match := re.match(r"blocks\.(\d+)\.", key)))
    facts = Facts("vit", "vit_small_patch16_224.dino", (0, -1), size, patch.shape[-1], "bilinear",
                  "see model card")
    # The row only lends the architecture; every shape comes from the tensors.
    shape = {"patch_size": patch.shape[-1], "embed_dim": patch.shape[0], "depth": depth, "num_heads": heads}
    model = TimmModel(facts, size, weights="random", **shape)
    io.load(model.net, net, "projected-discriminator backbone")
    model.fingerprint = io.digest(model.net)[:16]
    return model


@family("patchgan")
def patchgan(state_dict: dict[str, Tensor], config: dict[str, Any]) -> Discriminator:
    """pix2pixHD's NLayerDiscriminator (`model.N.`) or MultiscaleDiscriminator (`scaleI_layerJ.`, scale 0 the
    coarsest).

    Shapes are read off the tensors; config may repeat them as `ndf`, `n_layers`, `num_D`, and must then
    agree. Running statistics of batch norms are not kept: here, as in training, a batch is normalised by
    itself.
    """
    state_dict = {key: value for key, value in state_dict.items() if not key.endswith(STATISTICS)}
    convolutions = [key for key, value in state_dict.items() if key.endswith(".weight") and value.ndim == 4]
    single = any(key.startswith("model.") for key in state_dict)
    scales = 1 if single else len({key.split("_")[0] for key in convolutions})
    if not convolutions or len(convolutions) % scales:
        raise CheckpointError("patchgan checkpoint has no tensors 'model.N.' or 'scaleI_layerJ.'; give its "
                              "state dict")
    layers = len(convolutions) // scales - 2
    first = state_dict.get("model.0.weight" if single else "scale0_layer0.0.weight")
    if first is None or layers < 1:
        raise CheckpointError("patchgan checkpoint has no first layer; give the whole state dict")
    own = {"ndf": first.shape[0], "n_layers": layers, "num_D": scales, "input_nc": first.shape[1]}
    for field, value in settings(config, own, "patchgan config").items():
        if value != own[field]:
            raise ConfigError(f"patchgan config: {field} = {value}, but the checkpoint has {own[field]}")
    affine = any(key.endswith(".weight") and value.ndim == 1 for key, value in state_dict.items())
    norm = "batch" if affine else "instance"
    kind = DISCRIMINATORS.get("patchgan")
    options = kind.Config(kind="patchgan", width=first.shape[0], layers=layers, scales=scales, norm=norm)
    renamed = {rename_patch(key, layers, scales): value for key, value in state_dict.items()}
    size = 2 ** math.ceil(math.log2(8 * 2**layers))
    return io.load(kind(options, size), renamed, "patchgan checkpoint")


def rename_patch(key: str, layers: int, scales: int) -> str:
    """A key of pix2pixHD -> :class:`vfmlab.losses.discriminators.patchgan.PatchGAN`'s."""
    if match := re.fullmatch(r"model\.(\d+)\.(weight|bias)", key):
        # A flat list: convolution, activation, then convolution, norm, activation for each layer, then the
        # last one.
        number, leaf, scale = int(match[1]), match[2], 0
        layer, part = divmod(number + 1, 3) if number else (0, 0)
    elif match := re.fullmatch(r"scale(\d+)_layer(\d+)\.([01])\.(weight|bias)", key):
        layer, part, leaf, scale = int(match[2]), int(match[3]), match[4], scales - 1 - int(match[1])
    else:
        return key
    if part == 2:  # an activation has no tensors
        return key
    if (layer, part) == (layers + 1, 0):
        return f"scales.{scale}.out.{leaf}"
    return f"scales.{scale}.layers.{layer}.{('conv', 'norm')[part]}.{leaf}"
