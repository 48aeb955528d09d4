"""Released networks of PAE (arXiv 2605.07915; the authors' inference code as ported to diffusers, MIT) ->
tokenizer `pae`, without its VFM.

The decoder is RAE's, whose images come before the VFM's mean and std; a run's tokenizer has them folded into
its last layer. No list of a whole checkpoint's names was to be had: the parts' own names are the release's,
their prefixes are `delta.` (or `delta_encoder.`), `compressor.`, `decompressor.` and `decoder.`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.decoders.vit import ViTDecoder
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.delta import Compressor, Decompressor, DeltaEncoder
from vfmlab.nn.sphere import rms_over_channels
from vfmlab.tokenizers.pae import PAE
from vfmlab.weights import io
from vfmlab.weights.families.rae_decoder import import_rae_decoder, onto_pixels
from vfmlab.weights.family import Batches, Moments, family, headed, needed, section

PARTS = {
    "delta_encoder.": "encoder.", "delta.": "encoder.", "compressor.0.": "compressor.attn.",
    "compressor.1.": "compressor.conv.", "decompressor.0.": "decompressor.conv.",
    "decompressor.1.": "decompressor.attn.",
}  # fmt: skip
VFM = {"name": "dinov2_l14", "upscale": 0.875}
SIZES = ("img", "patch", "dim", "depth", "heads", "latent")  # of the release's config


class PAEParts(nn.Module):
    """A release's networks on given pixels (B 3 H W as the VFM sees them) and VFM tokens u (B N D)."""

    def __init__(self, side: int, patch: int, width: int, depth: int, heads: int, channels: int, fusion: str):
        super().__init__()
        self.side, self.patch, self.depth, self.heads, self.fusion = side, patch, depth, heads, fusion
        self.encoder = DeltaEncoder(side, patch, width, depth, heads, fusion)
        self.compressor = Compressor(width, channels, heads)
        self.decompressor = Decompressor(channels, width, heads)
        self.decoder: ViTDecoder | None = None

    def encode(self, pixels: Tensor, u: Tensor) -> Tensor:
        """-> latents B C h w, tokens of length sqrt(C)."""
        return rms_over_channels(self.compressor(self.encoder(pixels, u), (self.side, self.side)))

    def decode(self, z: Tensor) -> Tensor:
        """-> images B 3 H W before the VFM's mean and std."""
        return self.decoder(self.decompressor(z))[0]


def sections(module: PAEParts, config: dict[str, Any]) -> dict[str, Any]:
    decoder = module.decoder
    if decoder.side != module.side:
        raise ConfigError(f"pae: the decoder has a {decoder.side} x {decoder.side} grid, the delta encoder "
                          f"{module.side} x {module.side}; check img and patch of both")
    method = {
        "method": "pae", "channels": module.compressor.conv.out_channels, "factor": decoder.patch,
        "depth": module.depth, "heads": module.heads, "fusion": module.fusion,
        "decoder": decoder.config.model_dump(mode="json"),
    }  # fmt: skip
    return {"tokenizer": method, "vfm": config.get("vfm", VFM), "size": decoder.side * decoder.patch}


def put(tokenizer: PAE, module: PAEParts, known: Moments | None, batches: Batches) -> Moments | None:
    if tokenizer.encoder.patch_embed.kernel_size[0] != module.patch:
        raise CheckpointError(f"pae: the weights read patches of {module.patch} px, the run's VFM sees "
                              f"{tokenizer.encoder.patch_embed.kernel_size[0]}; set vfm.name and vfm.upscale "
                              "as the release had them")
    for name in ("encoder", "compressor", "decompressor", "decoder"):
        io.load(getattr(tokenizer, name), getattr(module, name).state_dict(), f"imported 'pae' {name}")
    vfm = tokenizer.vfm
    onto_pixels(tokenizer.decoder, vfm.mean.flatten().tolist(), vfm.std.flatten().tolist())
    return known


@torch.no_grad()
@family("pae", arguments=section("pae", "dim", "latent", "decoder"), sections=sections, put=put)
def import_pae(state_dict: dict[str, Tensor], config: dict[str, Any]) -> PAEParts:
    """Release names and values -> :class:`PAEParts`: `encode(pixels, u)`, `decode(z)`.

    Args:
        config: `img` (what the VFM sees), `patch`, `dim`, `depth`, `heads`, `latent`; `decoder`, as of the
            family rae-decoder; `fusion` (default sft) and `vfm`, a run's section, ours.
    """
    needed(config, (*SIZES, "decoder"), "pae")
    size, patch, width, depth, heads, channels = (int(config[name]) for name in SIZES)
    if size % patch:
        raise ConfigError(f"pae config: img {size} is no multiple of patch {patch}")
    module = PAEParts(size // patch, patch, width, depth, heads, channels, config.get("fusion", "sft"))
    own = {key.removeprefix("decoder."): value for key, value in state_dict.items()
           if key.startswith("decoder.")}
    rest = {rename(key): value for key, value in state_dict.items() if not key.startswith("decoder.")}
    io.load(module, rest, "pae checkpoint")
    module.decoder = import_rae_decoder(own, dict(config["decoder"])).decoder
    if module.decoder.embed.in_features != width:
        raise ConfigError(f"pae config: decoder.hidden_size {module.decoder.embed.in_features} is not dim "
                          f"{width}")
    return module


def rename(key: str) -> str:
    """A key of the release under our name; parts may be kept as "delta.sd."."""
    key = headed(key.replace(".sd.", ".", 1), PARTS)
    return key.replace("patch_embed.proj.", "patch_embed.").replace(".mlp.", ".")
