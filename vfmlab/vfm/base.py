"""What every frozen vision foundation model offers, whichever library it comes from."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.errors import ConfigError
from vfmlab.vfm.table import Facts


class Features(NamedTuple):
    """Feature maps by layer (B C h w, fp32), and the global token (B D, fp32) where the model has one."""

    maps: dict[int, Tensor]
    pooled: Tensor | None


class VisionModel(nn.Module):
    """A frozen VFM: images in [-1, 1] -> feature maps at chosen depths.

    Layers are numbered as in the papers: 0 is the sequence that enters block 1 (patch + position embedding),
    k what block k puts out, -1 the output after the final norm, -2 the last block before that norm. Class and
    register tokens are never part of a map. Of a hierarchical model k is stage k, each with a width and a
    grid of its own (`vfmlab/vfm/hierarchical.py`). The model is always in eval mode, and its parameters never
    take gradients; gradients with respect to the images flow if the images ask for them.

    Attributes:
        facts: the model's row of the table. layers: read when none are asked for. size: side of the images in
            pixels.
        fingerprint: first 16 hex digits of the SHA-256 of the weights. depth: number of blocks or stages.
        options: arguments of the class beside those that every model has.
    """

    depth: int
    # what messages call the layers k, 0 and -1
    naming: ClassVar = ("blocks", "patch embedding", "after the final norm", "last block before the norm")

    def __init__(self, facts: Facts, size: int, layers: Iterable[int] | None, upscale: float, depth: int):
        super().__init__()
        self.facts, self.size, self.upscale, self.depth = facts, size, upscale, depth
        self.fingerprint, self.options = "", {}
        self.layers = self.check_layers(facts.layers if layers is None else layers)
        self.input_size = round(size * upscale)
        self._check_size(self.input_size)

    def features(self, images: Tensor, layers: Iterable[int] | None = None) -> Features:
        """Images in [-1, 1] (B 3 H W) -> :class:`Features` at `layers` (default: `self.layers`).

        H and W are normally `self.size`; other sizes work if, after up-scaling, they are multiples of the
        patch.

        Raises:
            ConfigError: a layer that the model does not have, or a size that its patches do not divide.
        """
        layers = self.layers if layers is None else self.check_layers(layers)
        wanted = images.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            return self._features(images, layers)

    def _features(self, images: Tensor, layers: tuple[int, ...]) -> Features:
        maps, pooled = self._read(self.prepare(images), layers)
        return Features({k: m.float() for k, m in maps.items()}, None if pooled is None else pooled.float())

    @property
    def embedding(self) -> nn.Module:
        """The module whose output :meth:`features_from` replaces: what turns pixels into patch tokens."""
        raise ConfigError(f"vfm.name '{self.facts.name}' has no patch embedding that another stem can "
                          "stand in for; choose a plain ViT, for example dinov2_s14")

    def features_from(self, images: Tensor, tokens: Tensor, layers: Iterable[int] | None = None) -> Features:
        """:meth:`features` with `tokens` (B C h w) in the place of the patch embedding, with gradients.

        images: B 3 H W, of which only the size matters then. Positions are added, blocks run as they do.

        Raises:
            ConfigError: tokens of another width or grid than the patch embedding's.
        """
        layers = self.layers if layers is None else self.check_layers(layers)

        def instead(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            own = tokens if output.shape[1:] == tokens.shape[1:] else tokens.permute(0, 2, 3, 1)
            own = own.flatten(1, 2) if output.ndim == 3 else own
            if own.shape != output.shape:
                raise ConfigError(f"tokens B C h w of {list(tokens.shape[1:])} do not fit the patch "
                                  f"embedding of '{self.facts.name}', which gives {list(output.shape[1:])}; "
                                  "check tokenizer.factor and vfm.upscale")
            return own.to(output.dtype)

        hook = self.embedding.register_forward_hook(instead)
        try:
            return self._features(images, layers)
        finally:
            hook.remove()

    def forward(self, images: Tensor, layers: Iterable[int] | None = None) -> Features:
        return self.features(images, layers)

    def prepare(self, images: Tensor) -> Tensor:
        """Up-scale (as the model was trained, antialiased) and normalise with the model's mean and std."""
        h, w = (round(side * self.upscale) for side in images.shape[-2:])
        if (h, w) != (self.input_size, self.input_size):
            self._check_size(h), self._check_size(w)
        images = images.float()
        if (h, w) != tuple(images.shape[-2:]):
            images = F.interpolate(images, (h, w), mode=self.facts.interpolation, antialias=True,
                                   align_corners=False)
        return (images * 0.5 + 0.5 - self.mean) / self.std

    def width(self, layer: int) -> int:
        """Channels of a layer's map."""
        raise NotImplementedError

    def grid(self, layer: int) -> tuple[int, int]:
        """(h, w) of a layer's map at the run's image size."""
        self.check_layers((layer,))
        return (self.input_size // self.facts.patch,) * 2

    def _read(self, x: Tensor, layers: tuple[int, ...]) -> tuple[dict[int, Tensor], Tensor | None]:
        raise NotImplementedError

    def check_layers(self, layers: Iterable[int]) -> tuple[int, ...]:
        """`layers` as a tuple; :class:`ConfigError` if one of them does not exist or is named twice."""
        layers = tuple(layers)
        if not layers or len(set(layers)) < len(layers) or any(not -2 <= k <= self.depth for k in layers):
            parts, first, last, before = self.naming
            raise ConfigError(f"vfm.layers {list(layers)}: '{self.facts.name}' has {self.depth} {parts}; "
                              f"name different layers among 0 ({first}), 1..{self.depth}, -1 ({last}), -2 "
                              f"({before})")
        return layers

    def _check_size(self, side: int) -> None:
        patch = self.facts.patch
        if side % patch or side < patch:
            near = max(patch, round(side / patch) * patch)
            raise ConfigError(f"vfm.upscale {self.upscale:g}: images of {side} px enter '{self.facts.name}', "
                              f"which needs a multiple of its patch of {patch}; use "
                              f"vfm.upscale={near * (self.upscale / side if side else 1 / self.size):.6g} "
                              f"({near} px)")

    def trainable_copy(self, layers: Iterable[int] | None = None) -> Self:
        """A copy that can be trained, to be a submodule of what trains it: its own weights, in state_dict and
        averages.

        Still in eval mode: running statistics of batch norms stay, dropout is off. Parameters on which the
        maps of `layers` (default: `self.layers`) do not depend, such as a mask token or a pooling head, stay
        frozen. Where nothing of it is to be trained (`requires_grad_(False)`), its features cost no gradients
        either.
        """
        layers = self.layers if layers is None else self.check_layers(layers)
        twin = copy.deepcopy(self).requires_grad_(True)
        twin.layers, twin.fingerprint = layers, ""  # no longer a known file's weights
        parameters = list(twin.parameters())
        with torch.enable_grad():
            blank = torch.zeros(1, 3, self.size, self.size, device=parameters[0].device)
            maps = twin.features(blank, layers).maps
            reached = torch.autograd.grad(sum(m.sum() for m in maps.values()), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, reached, strict=True):
            parameter.requires_grad_(gradient is not None)
        return twin

    def random_copy(self, seed: int = 0) -> Self:
        """A frozen model of the same architecture, layers and size, with the weights that
        `vfm.weights=random` and `vfm.seed=SEED` give."""
        return type(self)(self.facts, self.size, self.layers, "random", self.upscale, seed, **self.options)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode whatever contains it, a trainable copy too."""
        return super().train(False)

    def freeze(self, mean: Iterable[float], std: Iterable[float], fingerprint: str) -> Any:
        """Last step of every constructor: normalisation, eval mode, no gradients."""
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, 3, 1, 1), persistent=False)
        self.fingerprint = fingerprint
        return self.eval().requires_grad_(False)
