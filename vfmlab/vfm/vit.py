"""Vision transformers of timm as frozen VFMs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.errors import ConfigError
from vfmlab.seeding import derive
from vfmlab.vfm.base import VisionModel
from vfmlab.vfm.source import load_into, locate
from vfmlab.vfm.table import Facts
from vfmlab.weights import io


def intermediates(net: nn.Module, x: Tensor, layers: Iterable[int],
                  depth: int) -> tuple[dict[int, Tensor], Tensor | None]:
    """Maps B C h w of a timm model's stages or blocks: those of `layers`, or the first where these name none,
    by number from 1 (-2 counts as `depth`); and what comes out at the end, where -1 is asked for."""
    wanted, last = sorted({depth if k == -2 else k for k in layers if k not in (0, -1)}) or [1], -1 in layers
    maps = net.forward_intermediates(x, [k - 1 for k in wanted], norm=False, output_fmt="NCHW",
                                      stop_early=not last, intermediates_only=not last)
    final, middle = maps if last else (None, maps)
    return dict(zip(wanted, middle, strict=False)), final


def create(facts: Facts, side: int, seed: int, stride: int | None, options: dict[str, Any]) -> nn.Module:
    """timm's model for images of `side` px; one with windows or stored positions is made for the size, so
    that these are interpolated once, when weights are loaded.

    Raises:
        ConfigError: timm cannot build it so.
    """
    import timm

    dilated = {} if stride is None else {"output_stride": stride}
    error: Exception | None = None
    for sized in ({"img_size": side, "strict_img_size": False}, {"img_size": side}, {}):
        torch.manual_seed(seed)
        try:
            return timm.create_model(facts.timm, num_classes=0, **sized, **dilated, **options)
        except TypeError as refused:  # an argument that this family does not have
            error = refused
        except (AssertionError, NotImplementedError, ValueError, RuntimeError) as failed:
            error = failed
            break
    line = (str(error) or type(error).__name__).splitlines()[0]
    way = "choose another model or size" if stride is None else f"leave out vfm.stride {stride}, or set 32"
    raise ConfigError(f"vfm.name '{facts.name}': timm cannot build it for {side} px ({line}); {way}")


class TimmModel(VisionModel):
    """A ViT-like timm model (VisionTransformer, EVA, BEiT, DeiT ...): one width, one grid, prefix tokens in
    front.

    Args:
        facts: a row of the table, or :func:`describe` of any timm name.
        size: side of the run's images. layers, upscale, seed: as in `config.VFM`.
        weights: "pretrained" (hub or its cache), "random", or a safetensors file under timm's or the
            publisher's keys.
        options: further arguments of `timm.create_model`, for example a smaller depth for tests.
    """

    def __init__(
        self, facts: Facts, size: int, layers: tuple[int, ...] | None = None, weights: str = "pretrained",
        upscale: float = 1.0, seed: int = 0, **options: Any,
    ):  # fmt: skip
        import timm

        path = None if weights == "random" else locate(facts, weights)  # before a large model is built
        side = max(1, round(size * upscale / facts.patch)) * facts.patch
        with torch.random.fork_rng(devices=[]):
            # Dynamic, so that other sizes (equivariance, crops) work too.
            dynamic = {"dynamic_img_size": True, **options}
            net = create(facts, side, derive("vfm", facts.name, seed), None, dynamic)
        super().__init__(facts, size, layers, upscale, len(net.blocks))
        self.net, self.options = net, options
        data = timm.data.resolve_model_data_config(net)
        fingerprint = io.digest(net)[:16] if path is None else load_into(net, path, facts)
        self.freeze(data["mean"], data["std"], fingerprint)

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens in front of the patch tokens."""
        return self.net.num_prefix_tokens

    @property
    def embedding(self) -> nn.Module:
        return self.net.patch_embed

    def width(self, layer: int) -> int:
        self.check_layers((layer,))
        return self.net.embed_dim

    def _read(self, x: Tensor, layers: tuple[int, ...]) -> tuple[dict[int, Tensor], Tensor | None]:
        first: list[Tensor] = []
        hook = self.net.blocks[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))
        try:
            levels, final = intermediates(self.net, x, layers, self.depth)
        finally:
            hook.remove()
        grid, pooled = next(iter(levels.values())).shape[-2:], None
        levels[-2] = levels.get(self.depth)
        maps = {k: self._map(first[0], grid) if k == 0 else levels[k] for k in layers if k != -1}
        if final is not None:
            # Models that average their tokens keep the final norm behind the pooling, as fc_norm.
            if isinstance(self.net.norm, nn.Identity):
                final = self.net.fc_norm(final)
            maps[-1] = self._map(final, grid)
            pooled = self._pool(final)
        return maps, pooled

    def _map(self, tokens: Tensor, grid: torch.Size) -> Tensor:
        return tokens[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, grid)

    def _pool(self, final: Tensor) -> Tensor | None:
        """Attention pooling where the model was trained with it (SigLIP), else the class token, else None."""
        if getattr(self.net, "attn_pool", None) is not None:
            return self.net.attn_pool(final)
        return final[:, 0] if getattr(self.net, "cls_token", None) is not None else None
