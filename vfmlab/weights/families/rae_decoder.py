"""The released decoder of RAE (arXiv 2510.11690; `GeneralDecoder`, MIT) -> our ViT decoder.

It takes tokens as the frozen encoder gives them (patch tokens behind its last norm, that norm without its
weights), and gives images before the encoder's mean and std are put back. :func:`adopt` puts it into a
tokenizer `rae`, images in [-1, 1].
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.decoders.vit import ViTDecoder
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.vit_block import Activation
from vfmlab.tokenizers.rae import RAE
from vfmlab.weights import io
from vfmlab.weights.family import Batches, Moments, agree, chosen, family, fused, headed, settings
from vfmlab.weights.statistics import per_channel

DEFAULTS = {  # of the release's configuration, the one of a ViT-MAE
    "hidden_size": 768, "decoder_hidden_size": 512, "decoder_intermediate_size": 2048, "decoder_num_attention_heads": 16,
    "decoder_num_hidden_layers": 8, "num_channels": 3, "patch_size": 16, "image_size": None, "layer_norm_eps": 1e-12,
    "hidden_act": "gelu", "qkv_bias": True,
}  # fmt: skip
WITHOUT_EFFECT = {  # on the decoder in use: the masked autoencoder's own encoder, training, bookkeeping
    "num_hidden_layers", "num_attention_heads", "intermediate_size", "attention_probs_dropout_prob", "hidden_dropout_prob",
    "initializer_range", "mask_ratio", "norm_pix_loss", "model_type", "architectures", "transformers_version", "torch_dtype",
    "num_patches",
}  # fmt: skip
HIDDEN_ACT = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
HIDDEN_ACT |= {name: name for name in get_args(Activation)}

NAMES = {
    "decoder_embed.": "embed.",
    "decoder_pos_embed": "position",
    "decoder_norm.": "norm.",
    "decoder_pred.": "pred.",
    "trainable_cls_token": "class_token",
}
INSIDE = {  # of a block; the second form of each is that of the port in diffusers
    r"attention\.(?:attention\.query|to_q)\.": "q.",
    r"attention\.(?:attention\.key|to_k)\.": "k.",
    r"attention\.(?:attention\.value|to_v)\.": "v.",
    r"attention\.(?:output\.dense|to_out\.0)\.": "proj.",
    r"intermediate\.dense\.": "expand.",
    r"output\.dense\.": "contract.",
    r"layernorm_before\.": "norm1.",
    r"layernorm_after\.": "norm2.",
}


class TokenDecoder(nn.Module):
    """The decoder as released: tokens of the encoder -> image before the encoder's mean and std are put
    back."""

    def __init__(self, decoder: ViTDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """B N C -> B 3 H W, always at the trained size: other token grids are resized (bilinear) first, as
        in the release."""
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ConfigError(f"rae-decoder: {tokens.shape[1]} tokens are no square grid; leave out class "
                              "and register tokens")
        z = tokens.transpose(1, 2).unflatten(2, (side, side))
        if side != self.decoder.side:
            z = F.interpolate(z, (self.decoder.side,) * 2, mode="bilinear", align_corners=False)
        return self.decoder(z)[0]


@torch.no_grad()
def adopt(tokenizer: RAE, released: TokenDecoder, pixel_mean: tuple[float, ...],
          pixel_std: tuple[float, ...]) -> RAE:
    """Put a released decoder into a tokenizer `rae` of the same sizes. Returns the tokenizer.

    The tokenizer's latent is standardised; the decoder wants plain tokens. Its first layer takes the
    difference, so the tokenizer's statistics must be there (:meth:`RAE.begin`, or the released ones set). Its
    last layer takes the encoder's `pixel_mean` and `pixel_std` (of images in [0, 1]) and the change to [-1,
    1].
    """
    mine, theirs = tokenizer.decoder, released.decoder
    if not isinstance(mine, ViTDecoder) or tokenizer.write is not None:
        raise ConfigError("rae-decoder: released weights need tokenizer.decoder.kind vit and linear_start "
                          "off")
    io.load(mine, theirs.state_dict(), "rae-decoder")
    mean, std = tokenizer.standardise.mean, tokenizer.standardise.std
    mine.embed.bias.add_(mine.embed.weight @ mean)
    mine.embed.weight.mul_(std)
    onto_pixels(mine, pixel_mean, pixel_std)
    return tokenizer


@torch.no_grad()
def onto_pixels(decoder: ViTDecoder, mean: Sequence[float], std: Sequence[float]) -> None:
    """Fold an encoder's mean and std of images in [0, 1], and the change to [-1, 1], into the last layer."""
    scale, shift = (torch.tensor(x, dtype=torch.float32).repeat(decoder.patch**2).to(decoder.pred.bias)
                    for x in (std, mean))
    decoder.pred.bias.mul_(scale).add_(shift).mul_(2).sub_(1)
    decoder.pred.weight.mul_(2 * scale[:, None])


def arguments(tree: dict[str, Any]) -> dict[str, Any]:
    """The decoder's config.json; sizes that are filled in by code in the release ("SHOULD BE RELOADED")
    are left out."""
    return {key: value for key, value in tree.items() if value != "SHOULD BE RELOADED"}


def sections(module: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    decoder = module.decoder
    channels = decoder.embed.in_features
    method = {"method": "rae", "channels": channels, "factor": decoder.patch,
              "decoder": decoder.config.model_dump(mode="json")}
    return {"tokenizer": method, "vfm": None, "size": decoder.side * decoder.patch}


@torch.no_grad()
def put(tokenizer: RAE, module: TokenDecoder, known: Moments | None, batches: Batches) -> Moments | None:
    """RAE's latent is standardised per channel inside the tokenizer; the outer statistics do the rest."""
    agree(tokenizer.config.decoder, module.decoder.config, "tokenizer.decoder")
    if module.decoder.side != tokenizer.decoder.side or module.decoder.patch != tokenizer.decoder.patch:
        raise CheckpointError(f"rae-decoder is for a {module.decoder.side} x {module.decoder.side} grid of "
                              f"{module.decoder.patch} px patches, the run has {tokenizer.decoder.side} x "
                              f"{tokenizer.decoder.side} of {tokenizer.decoder.patch} px; set "
                              f"data.size={module.decoder.side * module.decoder.patch}")
    if known is None:
        tokenizer.begin(list(batches()))
    else:
        center, spread = per_channel(*known)
        tokenizer.standardise.mean.copy_(center)
        tokenizer.standardise.std.copy_(spread)
    encoder = tokenizer.vfm
    adopt(tokenizer, module, encoder.mean.flatten().tolist(), encoder.std.flatten().tolist())
    if known is None:
        return None
    mean, std = known  # per place, where the release has them so: what standardising by channel leaves to do
    center, spread = (value if mean.ndim == 1 else value.view(-1, 1, 1) for value in (center, spread))
    return (mean - center) / spread, std / spread


@family("rae-decoder", arguments=arguments, sections=sections, put=put)
def import_rae_decoder(state_dict: dict[str, Tensor], config: dict[str, Any]) -> TokenDecoder:
    """A decoder called on [B, tokens, width] -> image before the encoder's mean and std.

    Args:
        state_dict: keys as released, or as diffusers' `AutoencoderRAE` has them (its frozen encoder and
            statistics are not read). config: the release's configuration, names of a ViT-MAE; `image_size`
            may be left out.
    """
    c = settings(config, DEFAULTS, "rae-decoder", WITHOUT_EFFECT)
    state = fused({rename(key): value for key, value in state_dict.items() if not foreign(key)},
                  r"(blocks\.\d+\.)(?P<part>[qkv])\.(weight|bias)", r"\1qkv.\3")
    if "embed.weight" not in state:
        raise CheckpointError("rae-decoder checkpoint has no decoder_embed.weight; give the decoder's state "
                              "dict, not a wrapper")
    patches = state["position"].shape[1] - 1 if "position" in state else None
    size = c["image_size"] or (patches and c["patch_size"] * math.isqrt(patches))
    if size is None:
        raise ConfigError("rae-decoder: the weights hold no decoder_pos_embed, so image_size must be given")
    if size % c["patch_size"] or patches not in (None, (size // c["patch_size"]) ** 2):
        held = "" if patches is None else f" and the weights have {patches} patches"
        raise ConfigError(f"rae-decoder: image_size {size} with patch_size {c['patch_size']} is "
                          f"{size / c['patch_size']:g} patches a side{held}; RAE sets image_size to "
                          "patch_size times the encoder's grid")
    ours = ViTDecoder.Config(width=c["decoder_hidden_size"], depth=c["decoder_num_hidden_layers"],
                             heads=c["decoder_num_attention_heads"], hidden=c["decoder_intermediate_size"],
                             activation=chosen(c, "hidden_act", HIDDEN_ACT, "rae-decoder"),
                             eps=c["layer_norm_eps"], qkv_bias=c["qkv_bias"],
                             class_token="class_token" in state)
    decoder = ViTDecoder(ours, c["hidden_size"], size // c["patch_size"], size, c["num_channels"])
    return TokenDecoder(io.load(decoder, state, "rae-decoder checkpoint", keep=("position",)))


def foreign(key: str) -> bool:
    """Whether `key`, of a whole autoencoder's checkpoint, belongs to the frozen encoder or the latent
    statistics."""
    return key.startswith(("encoder.", "encoder_", "_latents_", "latent_"))


def rename(key: str) -> str:
    """A key of the release -> ours, with q, k and v still apart."""
    key = headed(key.removeprefix("decoder."), NAMES)
    if match := re.fullmatch(r"decoder_layers\.(\d+)\.(.*)", key):
        for theirs, ours in INSIDE.items():
            if re.match(theirs, match[2]):
                return f"blocks.{match[1]}.{re.sub(f'^{theirs}', ours, match[2])}"
    return key
