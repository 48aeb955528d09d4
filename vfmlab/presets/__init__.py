"""Presets: functions that return a whole :class:`~vfmlab.config.recipe.Recipe`. A docstring says the command, the cost and what to expect.

    vfmlab.presets.get("pocket_vfm_vae"), names(), summary(name)

One file per method; what the tiers share is in `tiers.py`.
"""

from __future__ import annotations

from vfmlab.presets.table import function, get, names, summary

__all__ = ["function", "get", "names", "summary"]
