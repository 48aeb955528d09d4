"""Presets: rows of tables, one file per method family; what the tiers share is in `tiers.py`, changes are in
`variants.py`.

    vfmlab.presets.get("pocket_vfm_vae+no_style"), row(name).facts, names(), summary(name)
"""

from __future__ import annotations

from vfmlab.presets.table import Preset, about, get, names, row, summary
from vfmlab.presets.tiers import TIERS
from vfmlab.presets.variants import VARIANTS

__all__ = ["TIERS", "VARIANTS", "Preset", "about", "get", "names", "row", "summary"]
