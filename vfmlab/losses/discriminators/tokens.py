"""Reading a frozen vision model for a discriminator: images -> token sequences at chosen depths."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from vfmlab.vfm.base import VisionModel


def read_tokens(model: VisionModel, images: Tensor, layers: tuple[int, ...], add_class: bool) -> list[Tensor]:
    """Tokens B C N of each of `layers` (numbered as in :class:`VisionModel`; one may be named twice).

    Gradients flow to the images. Layers of one model may differ in C and N. Class and register tokens are
    dropped; with `add_class` the class token, where the model has one, is first added to every patch token.

    Args:
        images: B 3 H W in [-1, 1], of the size that `model.prepare` takes.
    """
    net = getattr(model, "net", None)
    if add_class and getattr(net, "cls_token", None) is not None and hasattr(model, "prefix_tokens"):
        tokens = hooked(net, model.prepare(images), {model.depth if k == -2 else k for k in layers})
        prefix = model.prefix_tokens
        tokens = {k: x[:, prefix:] + x[:, :1] for k, x in tokens.items()}
        return [tokens[model.depth if k == -2 else k].transpose(1, 2).float() for k in layers]
    maps = model.features(images, dict.fromkeys(layers)).maps
    return [maps[k].flatten(2) for k in layers]


def hooked(net: nn.Module, x: Tensor, layers: set[int]) -> dict[int, Tensor]:
    """Whole sequences (class and register tokens first) of a timm ViT by layer, by hooks. x: normalised."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, args: tuple, output: Any = None) -> None:
        seen[layer] = args[0] if output is None else output

    hooks = [net.blocks[0].register_forward_pre_hook(partial(keep, 0))] if 0 in layers else []
    hooks += [net.blocks[k - 1].register_forward_hook(partial(keep, k)) for k in layers if k > 0]
    try:
        final = net.forward_features(x)
    finally:
        for hook in hooks:
            hook.remove()
    if -1 in layers:
        seen[-1] = net.fc_norm(final) if isinstance(net.norm, nn.Identity) else final
    return seen
