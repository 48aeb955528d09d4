"""What timm's own record says of any of its models: the row that `timm:NAME` does not need in the table."""

from __future__ import annotations

import torch
from torch import nn

from vfmlab.errors import ConfigError, nearest
from vfmlab.vfm.table import Facts

PLAIN = ("patch_embed", "blocks", "norm", "embed_dim", "num_prefix_tokens")


def describe(name: str) -> Facts:
    """Facts of any timm model that gives feature maps. name: without the "timm:" in front.

    Raises:
        ConfigError: not a timm model, or one without feature maps.
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
    size = record.input_size[-1] if record is not None else 224
    licence = (record.license if record is not None else None) or "see model card"
    known = record is not None and record.interpolation in ("bilinear", "bicubic")
    interpolation = record.interpolation if known else "bicubic"
    plain = is_plain(net)
    if plain:
        depth, patch = len(net.blocks), net.patch_embed.patch_size
        patch = patch[0] if isinstance(patch, tuple) else patch
    else:
        depth, patch = len(stages(net, f"timm:{name}")), stages(net, f"timm:{name}")[-1]
    layers = (0, depth // 2, -1) if plain else (0, (depth + 1) // 2, -1)
    return Facts(f"timm:{name}", name, layers, size, patch, interpolation, licence, not plain)


def is_plain(net: nn.Module) -> bool:
    """Whether `net` is a plain ViT: blocks of one width on one grid, with prefix tokens apart."""
    parts = hasattr(net, "forward_intermediates") and all(hasattr(net, part) for part in PLAIN)
    if not parts or not isinstance(net.blocks, nn.ModuleList | nn.Sequential):
        return False
    return len({(info["num_chs"], info.get("reduction")) for info in net.feature_info}) == 1


def stages(net: nn.Module, name: str) -> list[int]:
    """Stride of each map that timm gives for `net`; :class:`ConfigError` for one that gives none."""
    infos = list(getattr(net, "feature_info", None) or ())
    if not infos or not hasattr(net, "forward_intermediates") or any("reduction" not in f for f in infos):
        raise ConfigError(f"vfm.name '{name}': timm gives no feature maps of {type(net).__name__}; choose "
                          "another model, for example timm:convnext_tiny or dinov2_s14")
    return [info["reduction"] for info in infos]
