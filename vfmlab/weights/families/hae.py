"""The released autoencoder of HAE, first called DINO-SAE (wkdgnsgo/HAE, MIT; arXiv 2601.22904) -> tokenizer
`dino_sae`, without its VFM: convolutional stem and DC-AE decoder.

No list of a whole checkpoint's names was to be had: the stem is found by its `cnn.0.conv.weight`, the decoder
by its `project_in.`, whatever stands before them. Tensors beside the stem, under the first part of its
prefix, are those of the frozen VFM, which a run has of its own, and are left out; any other is refused.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.decoders.dc_ae import DCDecoder
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.dc_blocks import ConvStem
from vfmlab.tokenizers.dino_sae import DinoSAE
from vfmlab.weights import io
from vfmlab.weights.families.dc_ae_decoder import import_dc_ae
from vfmlab.weights.family import Batches, Moments, family, needed, section

VFM = {"name": "dinov3_l16"}
STEM, DECODER = "cnn.0.conv.weight", r"project_in\.(main\.)?conv\.weight"


class HAEParts(nn.Module):
    """`stem(images)`: B 3 H W in [-1, 1] -> patch tokens B C h w, which enter the VFM in the place of its
    own; `decoder(z)` -> [images]."""

    def __init__(self, stem: ConvStem, decoder: DCDecoder):
        super().__init__()
        self.stem, self.decoder = stem, decoder


def sections(module: HAEParts, config: dict[str, Any]) -> dict[str, Any]:
    widths = [conv.out_channels for conv in module.stem.convs]
    factor, channels = 2 ** len(widths), int(config["decoder"]["latent_channels"])
    if widths[-1] != channels:
        raise ConfigError(f"hae config: embed_dim {widths[-1]} is not decoder.latent_channels {channels}; "
                          "the decoder takes the VFM's tokens as they are")
    method = {"method": "dino_sae", "channels": channels, "factor": factor, "stem": widths[:-1],
              "decoder": module.decoder.config.model_dump(mode="json")}
    return {"tokenizer": method, "vfm": config.get("vfm", VFM), "size": int(config["image"])}


def put(tokenizer: DinoSAE, module: HAEParts, known: Moments | None, batches: Batches) -> Moments | None:
    for name in ("stem", "decoder"):
        io.load(getattr(tokenizer, name), getattr(module, name).state_dict(), f"imported 'hae' {name}")
    return known


@torch.no_grad()
@family("hae", arguments=section("hae", "embed_dim", "decoder"), sections=sections, put=put)
def import_hae(state_dict: dict[str, Tensor], config: dict[str, Any]) -> HAEParts:
    """Release names and values -> :class:`HAEParts`.

    Args:
        config: `embed_dim`, of the VFM; `image`, its side in pixels (256); `decoder`, as of the family
            dc-ae-decoder; `vfm`, a run's section, ours.
    """
    needed(config, ("embed_dim", "image", "decoder"), "hae")
    width, size, decoder = int(config["embed_dim"]), int(config["image"]), dict(config["decoder"])
    stem_at = prefix_of(state_dict, re.escape(STEM), "stem")
    decoder_at = prefix_of(state_dict, DECODER, "decoder")
    vfm_at = stem_at.partition(".")[0] + "." if stem_at else None
    own: dict[str, dict[str, Tensor]] = {"stem": {}, "decoder": {}}
    for key, value in state_dict.items():
        if key.startswith(f"{stem_at}cnn."):
            own["stem"][rename(key.removeprefix(stem_at))] = value
        elif decoder_at and key.startswith(decoder_at):
            own["decoder"][key.removeprefix(decoder_at)] = value
        elif not decoder_at and not (vfm_at and key.startswith(vfm_at)):
            own["decoder"][key] = value
        elif vfm_at is None or not key.startswith(vfm_at):
            raise CheckpointError(f"hae checkpoint: unexpected '{key}': neither stem ('{stem_at}cnn.') nor "
                                  f"decoder ('{decoder_at}') nor the VFM beside the stem")
    numbers = sorted(int(key.split(".")[1]) for key in own["stem"] if key.startswith("convs."))
    widths = tuple(own["stem"][f"convs.{n}.weight"].shape[0] for n in numbers)
    if widths[-1] != width:
        raise ConfigError(f"hae config: embed_dim {width}, but the stem makes {widths[-1]} channels")
    stem = io.load(ConvStem(width, widths[:-1]), own["stem"], "hae checkpoint (stem)")
    side = size // 2 ** len(widths)
    return HAEParts(stem, import_dc_ae(own["decoder"], {**decoder, "latent_side": side}))


def prefix_of(state_dict: dict[str, Tensor], name: str, what: str) -> str:
    """What stands before the one tensor called `name`, a pattern."""
    prefixes = [match[1] for key in state_dict if (match := re.fullmatch(rf"(.*?){name}", key))]
    if len(prefixes) != 1:
        raise CheckpointError(f"hae checkpoint: {len(prefixes)} tensors look like the {what}'s first one "
                              f"('...{name}'); give the state dict of the whole autoencoder")
    return prefixes[0]


def rename(key: str) -> str:
    """cnn.0.conv.weight -> convs.0.weight, cnn.0.norm.weight -> norms.0.weight."""
    match = re.fullmatch(r"cnn\.(\d+)\.(conv|norm)\.(\w+)", key)
    return f"{match[2]}s.{match[1]}.{match[3]}" if match else key
