"""What a tokenizer takes: shapes of a VFM's maps, features that come as tokens, images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vfmlab.config import TokenizerConfig
from vfmlab.errors import ConfigError, DataError

WIDEST = 4.0  # images are in [-1, 1], with room for noise; 0..255 is not


@dataclass(frozen=True)
class LayerShape:
    """The map of one VFM layer at the run's image size: channels, and side of its square grid."""

    width: int
    side: int


class EncoderMaps(dict[int, Tensor]):
    """Maps of a tokenizer's own encoder by layer, not to be mistaken for those of the frozen VFM."""


def shapes_of(vfm: nn.Module, layers: Iterable[int]) -> dict[int, LayerShape]:
    return {layer: LayerShape(vfm.width(layer), vfm.grid(layer)[0]) for layer in layers}


def check_shapes(shapes: dict[int, LayerShape], vfm: nn.Module) -> None:
    """:class:`ConfigError` for a VFM that is not the one which imported weights were made for."""
    for layer, actual in shapes_of(vfm, shapes).items():
        shape = shapes[layer]
        if actual != shape:
            raise ConfigError(f"vfm: layer {layer} has width {actual.width} and grid {actual.side}, the "
                              f"tokenizer was made for width {shape.width} and grid {shape.side}; choose the "
                              "VFM, size and vfm.upscale of its training")


def need_vfm(vfm: nn.Module | None, method: str, does: str) -> None:
    """:class:`ConfigError` where a method that `does` something with a VFM has none."""
    if vfm is None:
        raise ConfigError(f"tokenizer '{method}' {does}, but the run has no 'vfm' section; add "
                          "vfm.name=pocket")


def check_grid(vfm: nn.Module, layer: int, side: int, factor: int) -> None:
    """:class:`ConfigError` unless the map of `layer` is `side` x `side`."""
    grid = vfm.grid(layer)[0]
    if grid != side:
        raise ConfigError(f"vfm: layer {layer} has a {grid} x {grid} grid, but tokenizer.factor {factor} "
                          f"asks for {side} x {side}; set vfm.upscale={vfm.upscale * side / grid:g} or a "
                          "tokenizer.factor that fits")


def width_on_grid(vfm: nn.Module | None, config: TokenizerConfig, size: int, does: str) -> int:
    """Width of the VFM's map of `config.layer`, which is on the latent's grid at images of side `size`.

    Raises:
        ConfigError: no VFM for a method that `does` something with one; a map on another grid.
    """
    need_vfm(vfm, config.method, does)
    check_grid(vfm, config.layer, size // config.factor, config.factor)
    return vfm.width(config.layer)


def check_whole(width: int, config: TokenizerConfig, layer: int) -> None:
    """:class:`ConfigError` unless the latent is as wide as the VFM's `layer`: `width` channels."""
    if width != config.channels:
        raise ConfigError(f"tokenizer.channels {config.channels}: '{config.method}' does not compress, its "
                          f"latent is as wide as the VFM's layer {layer}; set tokenizer.channels={width}")


def check_images(images: Tensor, what: str, size: int | None = None) -> None:
    """:class:`DataError` for what is no B 3 H W in [-1, 1] (B 3 `size` `size`, where that is given): 8 bits,
    NaN and values far outside too."""
    shape = tuple(getattr(images, "shape", ()))
    sides = "H x W" if size is None else f"{size} x {size}"
    if (not isinstance(images, Tensor) or len(shape) != 4 or shape[1] != 3
            or (size is not None and shape[2:] != (size, size))):
        raise DataError(f"{what}: {type(images).__name__} {shape}; it takes images B x 3 x {sides}, a "
                        "Tensor as vfmlab.api.read_images(paths, size) makes it of files")
    if not images.is_floating_point():
        raise DataError(f"{what}: images of {images.dtype}; give floating point in [-1, 1], as "
                        "vfmlab.data.to_float makes it of 8 bits")
    if not bool((images.abs() <= WIDEST).all()):
        raise DataError(f"{what}: images of {images.dtype} from {images.min():g} to {images.max():g}; give "
                        "them in [-1, 1], as vfmlab.data.to_float makes it of 8 bits")


def as_maps(features: Sequence[Tensor], layers: Sequence[int],
            shapes: Mapping[int, LayerShape]) -> dict[int, Tensor]:
    """Tokens (B N D) of each layer -> its map (B D h w), N a square.

    Raises:
        ConfigError: another number of tensors, of images, of tokens or of channels than `shapes` say.
    """
    if isinstance(features, Mapping | Tensor):
        raise ConfigError(f"encode_features: give a list of tensors B N D, one for each of the layers "
                          f"{list(layers)}, not a {type(features).__name__}")
    if len(features) != len(layers):
        raise ConfigError(f"encode_features: {len(features)} tensors for the layers {list(layers)}; give one "
                          "for each")
    maps = {}
    for layer, tokens in zip(layers, features, strict=True):
        if tokens.ndim != 3 or len(tokens) != len(features[0]):
            raise ConfigError(f"encode_features: layer {layer} has the shape {tuple(tokens.shape)}; give B N "
                              f"D, as many images as the first, {len(features[0])}")
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ConfigError(f"encode_features: layer {layer} has {tokens.shape[1]} tokens, no square grid; "
                              "leave out class and register tokens")
        if (shape := shapes.get(layer)) and shape != (actual := LayerShape(tokens.shape[2], side)):
            raise ConfigError(f"encode_features: layer {layer} has width {actual.width} and grid {side}, the "
                              f"tokenizer was made for width {shape.width} and grid {shape.side}")
        maps[layer] = tokens.transpose(1, 2).unflatten(2, (side, side))
    return maps
