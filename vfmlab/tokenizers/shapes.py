"""Shapes of a VFM's maps, and features that come as tokens: for tokenizers built without their VFM."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vfmlab.errors import ConfigError


@dataclass(frozen=True)
class LayerShape:
    """The map of one VFM layer at the run's image size: channels, and side of its square grid."""

    width: int
    side: int


def shapes_of(vfm: nn.Module, layers: Iterable[int]) -> dict[int, LayerShape]:
    return {layer: LayerShape(vfm.width(layer), vfm.grid(layer)[0]) for layer in layers}


def check_shapes(shapes: dict[int, LayerShape], vfm: nn.Module) -> None:
    """:class:`ConfigError` for a VFM that is not the one which imported weights were made for."""
    for layer, found in shapes_of(vfm, shapes).items():
        shape = shapes[layer]
        if found != shape:
            raise ConfigError(f"vfm: layer {layer} has width {found.width} and grid {found.side}, the "
                              f"tokenizer was made for width {shape.width} and grid {shape.side}; choose the "
                              "VFM, size and vfm.upscale of its training")


def as_maps(features: Sequence[Tensor], layers: Sequence[int]) -> dict[int, Tensor]:
    """Tokens (B N D) of each layer -> its map (B D h w), N a square; :class:`ConfigError` otherwise."""
    if len(features) != len(layers):
        raise ConfigError(f"encode_features: {len(features)} tensors for the layers {list(layers)}; give one "
                          "for each")
    maps = {}
    for layer, tokens in zip(layers, features, strict=True):
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ConfigError(f"encode_features: layer {layer} has {tokens.shape[1]} tokens, no square grid; "
                              "leave out class and register tokens")
        maps[layer] = tokens.transpose(1, 2).unflatten(2, (side, side))
    return maps
