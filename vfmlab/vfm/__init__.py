"""Frozen vision foundation models: one call from a config to features at chosen depths.

vfm = vfmlab.vfm.build(config.VFM(name="siglip2_l16_512", upscale=2), size=256)
maps, pooled = vfm.features(images)            # images B 3 256 256 in [-1, 1] -> maps {-1: B 1024 32 32, ...}
"""

from __future__ import annotations

from vfmlab import config
from vfmlab.errors import ConfigError, nearest
from vfmlab.vfm.base import Features, VisionModel
from vfmlab.vfm.shipped import SHIPPED
from vfmlab.vfm.table import TABLE, Facts

__all__ = ["SHIPPED", "TABLE", "Facts", "Features", "VisionModel", "build", "facts", "names"]


def names() -> list[str]:
    """Names that `vfm.name` takes beside `timm:NAME`."""
    return sorted(TABLE)


def facts(name: str) -> Facts:
    """The row of `name`, or facts of `timm:NAME` from timm; :class:`ConfigError` with the nearest name."""
    if name.startswith("timm:"):
        from vfmlab.vfm.describe import describe

        return describe(name.removeprefix("timm:"))
    if name not in TABLE:
        raise ConfigError(f"unknown VFM '{name}'{nearest(name, TABLE)}; any other vision model of timm is "
                          "'timm:NAME'")
    return TABLE[name]


def build(cfg: config.VFM, size: int) -> VisionModel:
    """The frozen model of a run.

    Args:
        cfg: the run's `vfm` section. size: side of the images in pixels.

    Raises:
        ConfigError: unknown model, a layer it does not have, or a size that its patches do not divide.
        CheckpointError: weights are missing or do not fit; the message says which file to put where.
    """
    row = facts(cfg.name)
    if cfg.stride is not None and not row.hierarchical:
        raise ConfigError(f"vfm.stride {cfg.stride}: '{cfg.name}' has one grid for all layers; leave it out")
    if not row.timm:
        from vfmlab.vfm.pocket import PocketModel

        return PocketModel(row, size, cfg.layers, cfg.weights, cfg.upscale, cfg.seed)
    if row.hierarchical:
        from vfmlab.vfm.hierarchical import HierarchicalModel

        return HierarchicalModel(row, size, cfg.layers, cfg.weights, cfg.upscale, cfg.seed, cfg.stride)
    from vfmlab.vfm.vit import TimmModel

    return TimmModel(row, size, cfg.layers, cfg.weights, cfg.upscale, cfg.seed)
