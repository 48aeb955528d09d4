"""Vision transformers of timm as frozen VFMs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.errors import CheckpointError, ConfigError, nearest
from vfmlab.seeding import derive
from vfmlab.vfm.base import VisionModel
from vfmlab.vfm.table import Facts
from vfmlab.weights import io

FILE = "model.safetensors"


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

        path = (
            None if weights == "random" else locate(facts, weights)
        )  # before minutes go into building a large model
        side = max(1, round(size * upscale / facts.patch)) * facts.patch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("vfm", facts.name, seed))
            try:
                # Created at the run's size, so that stored position embeddings are interpolated once, here;
                # dynamic, so that other sizes (equivariance, crops) work too.
                net = timm.create_model(
                    facts.timm, num_classes=0, img_size=side, dynamic_img_size=True, **options
                )
            except TypeError as error:
                raise ConfigError(
                    f"vfm.name '{facts.name}': timm cannot build it at {side} px ({error}); choose a plain "
                    "ViT"
                ) from None
        check_plain(net, facts.name)
        super().__init__(facts, size, layers, upscale, len(net.blocks))
        self.net = net
        data = timm.data.resolve_model_data_config(net)
        fingerprint = io.digest(net)[:16] if path is None else load_into(net, path, facts)
        self.freeze(data["mean"], data["std"], fingerprint)

    @property
    def prefix_tokens(self) -> int:
        """Class and register tokens in front of the patch tokens."""
        return self.net.num_prefix_tokens

    def width(self, layer: int) -> int:
        self.check_layers((layer,))
        return self.net.embed_dim

    def _read(self, x: Tensor, layers: tuple[int, ...]) -> tuple[dict[int, Tensor], Tensor | None]:
        depth = self.depth
        blocks = sorted({depth if k == -2 else k for k in layers if k == -2 or k > 0})
        first: list[Tensor] = []
        hook = self.net.blocks[0].register_forward_pre_hook(lambda _, args: first.append(args[0]))
        last = -1 in layers
        try:
            found = self.net.forward_intermediates(
                x,
                [k - 1 for k in blocks] or [0],
                norm=False,
                output_fmt="NCHW",
                stop_early=not last,
                intermediates_only=not last,
            )
        finally:
            hook.remove()
        final, middle = found if last else (None, found)
        by_block = dict(zip(blocks, middle, strict=False)) if blocks else {}
        grid = middle[0].shape[-2:]
        maps, pooled = {}, None
        for layer in layers:
            if layer == 0:
                maps[0] = self._map(first[0], grid)
            elif layer > 0 or layer == -2:
                maps[layer] = by_block[depth if layer == -2 else layer]
        if last:
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


def describe(name: str) -> Facts:
    """Facts of any timm model, from timm's own record. name: without the "timm:" in front.

    Raises:
        ConfigError: not a timm model.
    """
    import timm

    architecture, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{architecture}*") if timm.is_model(architecture) else []
    if not timm.is_model(architecture) or (tag and name not in known):
        hint = nearest(name, known or timm.list_models())
        raise ConfigError(f"vfm.name 'timm:{name}': timm knows no such model{hint}")
    record = timm.get_pretrained_cfg(name)
    if not tag and record is not None and record.tag:
        name = f"{name}.{record.tag}"  # timm's default weights of this architecture
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    check_plain(net, f"timm:{name}")
    depth, patch = len(net.blocks), net.patch_embed.patch_size
    size = record.input_size[-1] if record is not None else 224
    licence = (record.license if record is not None else None) or "see model card"
    interpolation = (
        record.interpolation
        if record is not None and record.interpolation in ("bilinear", "bicubic")
        else "bicubic"
    )
    return Facts(
        f"timm:{name}",
        name,
        (0, depth // 2, -1),
        size,
        patch[0] if isinstance(patch, tuple) else patch,
        interpolation,
        licence,
    )


def check_plain(net: nn.Module, name: str) -> None:
    """:class:`ConfigError` unless `net` is a plain ViT: blocks of one width on one grid, with prefix
    tokens apart."""
    parts = ("patch_embed", "blocks", "norm", "embed_dim", "num_prefix_tokens", "forward_intermediates")
    plain = all(hasattr(net, part) for part in parts) and isinstance(
        net.blocks, nn.ModuleList | nn.Sequential
    )
    if plain:
        plain = len({(info["num_chs"], info.get("reduction")) for info in net.feature_info}) == 1
    if not plain:
        raise ConfigError(
            f"vfm.name '{name}': {type(net).__name__} is not a plain vision transformer; choose a ViT, "
            "for example dinov2_s14"
        )


def locate(facts: Facts, weights: str) -> Path:
    """The weights' file: `weights` itself, or from the hub's cache, or fetched from the hub."""
    if weights != "pretrained":
        return Path(weights).expanduser()
    return io.fetch(facts.hub, FILE, way=f"copy that file here, for '{facts.name}': vfm.weights=PATH/{FILE}")


def load_into(net: nn.Module, path: Path, facts: Facts) -> str:
    """Load a safetensors file into a timm model, strictly. Returns the fingerprint.

    timm's own checkpoint filter of the model's family renames publishers' keys and interpolates position
    embeddings; what it leaves must fit exactly, apart from a classifier that a feature extractor does not
    have.
    """
    what = f"vfm.weights of '{facts.name}'"
    tensors, _ = io.read(path, what)
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            tensors = convert(tensors, net)
        except (
            Exception
        ) as error:  # timm indexes keys and reshapes without checks: whatever fails, the file does not fit
            raise CheckpointError(
                f"{what}: '{path}' does not fit {type(net).__name__} ({type(error).__name__}: {error})"
            ) from None
    own = net.state_dict()
    heads = ("head.", "head_dist.", "fc_norm.", "mask_token", "lm_head.")
    tensors = {key: value for key, value in tensors.items() if key in own or not key.startswith(heads)}
    io.load(net, tensors, f"{what}: '{path}'")
    return io.sha256(path)[:16]
