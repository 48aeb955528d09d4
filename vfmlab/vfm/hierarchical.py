"""Hierarchical models of timm as frozen VFMs: EfficientNet, ConvNeXt, MobileNet, ResNet, Swin, RegNet and
others whose maps grow coarser and wider stage by stage.

| layer    | map                                                                                       |
|----------|-------------------------------------------------------------------------------------------|
| 0        | of the first convolution, before norm and activation: linear in the pixels                |
| 1..depth | those that timm lists in `feature_info`, finest first; EfficientNet has five              |
| -1       | the last as the head sees it: behind the head's convolution or the final norm, if any     |
| -2       | the map `depth`, before that                                                              |

The global token is what timm's head makes of -1 in front of the classifier. What reads several layers brings
them to one grid: `vfmlab/nn/grids.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vfmlab.errors import ConfigError
from vfmlab.nn.norms import settle, smooth_noise
from vfmlab.seeding import derive
from vfmlab.vfm.base import VisionModel
from vfmlab.vfm.describe import stages
from vfmlab.vfm.source import load_into, locate
from vfmlab.vfm.table import Facts
from vfmlab.vfm.vit import create, intermediates
from vfmlab.weights import io


class HierarchicalModel(VisionModel):
    """A timm model with feature maps of several widths and grids.

    Args:
        facts: a row of the table, or :func:`~vfmlab.vfm.describe.describe` of any timm name.
        size: side of the run's images. layers, upscale, seed: as in `config.VFM`.
        weights: "pretrained" (a package's file, the hub or its cache), "random" (batch norms hold the
            statistics of smooth noise), or a safetensors file under timm's or the publisher's keys.
        stride: of the last map, where the model's convolutions can be dilated (timm's `output_stride`): 8,
            16, 32.
        options: further arguments of `timm.create_model`, for example fewer channels for tests.
    """

    naming: ClassVar = ("stages", "first convolution", "the last as the head sees it", "the last stage")

    def __init__(
        self, facts: Facts, size: int, layers: tuple[int, ...] | None = None, weights: str = "pretrained",
        upscale: float = 1.0, seed: int = 0, stride: int | None = None, **options: Any,
    ):  # fmt: skip
        path = None if weights == "random" else locate(facts, weights)
        side = max(1, round(size * upscale / facts.patch)) * facts.patch
        with torch.random.fork_rng(devices=[]):
            net = create(facts, side, derive("vfm", facts.name, seed), stride, options)
            super().__init__(facts, size, layers, upscale, len(stages(net, facts.name)))
            if path is None:
                with only_errors_of_size(facts, side):
                    settle(net, smooth_noise(16, side))
        self.net, self.options = net.eval(), {"stride": stride, **options}
        first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None:
            raise ConfigError(f"vfm.name '{facts.name}': {type(net).__name__} has no convolution, so no "
                              "layer 0; choose another model")
        self._first = [first]  # not a submodule of its own
        fingerprint = io.digest(net) if path is None else load_into(net, path, facts)
        if stride is not None:
            fingerprint = hashlib.sha256(f"{fingerprint} stride {stride}".encode()).hexdigest()
        import timm

        data = timm.data.resolve_model_data_config(net)
        self.freeze(data["mean"], data["std"], fingerprint[:16])
        self._shapes = self._trace(side)

    @torch.no_grad()
    def _trace(self, side: int) -> dict[int, tuple[int, int, int]]:
        """(C, h, w) of every layer at the run's size."""
        layers = (*range(self.depth + 1), -1)
        with only_errors_of_size(self.facts, side):
            maps, _ = self._read(torch.zeros(1, 3, side, side, device=self.mean.device), layers)
        if odd := [layer for layer, m in maps.items() if m.ndim != 4]:
            raise ConfigError(f"vfm.name '{self.facts.name}': layer {odd[0]} of {type(self.net).__name__} is "
                              "no map of channels and places; choose another model, for example "
                              "timm:convnext_tiny")
        return {layer: tuple(m.shape[1:]) for layer, m in maps.items()}

    def width(self, layer: int) -> int:
        return self._shape(layer)[0]

    def grid(self, layer: int) -> tuple[int, int]:
        return self._shape(layer)[1:]

    def _shape(self, layer: int) -> tuple[int, int, int]:
        self.check_layers((layer,))
        return self._shapes[self.depth if layer == -2 else layer]

    def _read(self, x: Tensor, layers: tuple[int, ...]) -> tuple[dict[int, Tensor], Tensor | None]:
        x = x.contiguous(memory_format=torch.channels_last)  # on the CPU half as fast again
        first, hooks = [], []
        if 0 in layers:  # a copy, because activations may work in place
            hooks.append(self._first[0].register_forward_hook(lambda _, args, out: first.append(out.clone())))
        try:
            maps, final = intermediates(self.net, x, layers, self.depth)
        finally:
            for hook in hooks:
                hook.remove()
        maps, pooled = maps | dict(enumerate(first)), None
        if final is not None:
            maps[-1] = self._channels_first(final)
            pooled = self.net.forward_head(final, pre_logits=True)
        maps[-2] = maps.get(self.depth)
        return {layer: maps[layer] for layer in layers}, pooled

    def _channels_first(self, final: Tensor) -> Tensor:
        """The last map as B C h w; some models work on B h w C, some on tokens."""
        width = self.net.num_features
        if final.ndim == 4 and final.shape[1] != width and final.shape[-1] == width:
            return final.permute(0, 3, 1, 2)
        if final.ndim == 3 and (side := round(final.shape[1] ** 0.5)) ** 2 == final.shape[1]:
            return final.transpose(1, 2).unflatten(2, (side, side))
        return final


@contextmanager
def only_errors_of_size(facts: Facts, side: int) -> Iterator[None]:
    """Whatever a model of timm raises as it reads its first images is one :class:`ConfigError`."""
    try:
        yield
    except (RuntimeError, AttributeError, AssertionError, IndexError, ValueError) as error:
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"vfm.name '{facts.name}': timm gives no feature maps at {side} px ({line}); "
                          "choose another model, for example timm:convnext_tiny, or set vfm.upscale for its "
                          f"native {facts.size} px") from None
