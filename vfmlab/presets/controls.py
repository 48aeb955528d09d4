"""Controls: VFM-VAE and AlignTok with one ingredient taken away, everything else (decoder, budget, DiT) as it is.

If a control does as well as the method, the ingredient was not the reason.
"""

from __future__ import annotations

from typing import Any

from vfmlab.config import Recipe, override
from vfmlab.presets.aligntok import pocket_aligntok
from vfmlab.presets.table import preset
from vfmlab.presets.vfm_vae import pocket_vfm_vae, tiny_vfm_vae


def _changed(whole: Recipe, name: str, changes: dict[str, Any]) -> Recipe:
    return override(whole, {"name": name, **changes})


RANDOM = {"vfm.weights": "random"}
NO_VF = {"losses.vf.weight": 0.0}
LAST_LAYER = {"vfm.layers": [-1]}


@preset
def tiny_vfm_vae_random() -> Recipe:
    """Control at 16 px: VFM-VAE on a VFM of random weights. `vfmlab train tiny_vfm_vae_random`, seconds; the pictures are noise."""
    return _changed(tiny_vfm_vae(), "tiny_vfm_vae_random", RANDOM)


@preset
def tiny_vfm_vae_no_vf() -> Recipe:
    """Control at 16 px: VFM-VAE without the VF loss. `vfmlab train tiny_vfm_vae_no_vf`, seconds; the pictures are noise."""
    return _changed(tiny_vfm_vae(), "tiny_vfm_vae_no_vf", NO_VF)


@preset
def tiny_vfm_vae_last_layer() -> Recipe:
    """Control at 16 px: VFM-VAE on the last layer alone. `vfmlab train tiny_vfm_vae_last_layer`, seconds; the pictures are noise."""
    return _changed(tiny_vfm_vae(), "tiny_vfm_vae_last_layer", LAST_LAYER)


@preset
def pocket_vfm_vae_random() -> Recipe:
    """Control: VFM-VAE on a pocket VFM of random weights, as encoder and as target of the VF loss. What did pretraining bring?

    `vfmlab train pocket_vfm_vae_random`: takes as long as pocket_vfm_vae.
    """
    return _changed(pocket_vfm_vae(), "pocket_vfm_vae_random", RANDOM)


@preset
def pocket_vfm_vae_no_vf() -> Recipe:
    """Control: VFM-VAE with VF weight 0. Is it the alignment loss that helps, or the frozen encoder?

    `vfmlab train pocket_vfm_vae_no_vf`: takes as long as pocket_vfm_vae; see docs/results/comparison.md, where this was measured.
    """
    return _changed(pocket_vfm_vae(), "pocket_vfm_vae_no_vf", NO_VF)


@preset
def pocket_vfm_vae_last_layer() -> Recipe:
    """Control: VFM-VAE that reads the last layer alone. What do the early and middle layers bring?

    `vfmlab train pocket_vfm_vae_last_layer`: takes as long as pocket_vfm_vae. Expect blurred images: the pocket VFM's last
    layer predicts pixels linearly at 20 dB, its first at 38 dB.
    """
    return _changed(pocket_vfm_vae(), "pocket_vfm_vae_last_layer", LAST_LAYER)


@preset
def pocket_aligntok_random() -> Recipe:
    """Control: AlignTok from an encoder of random weights, with the same anchor. Is it the semantics or the recipe?

    `vfmlab train pocket_aligntok_random`: takes as long as pocket_aligntok.
    """
    return _changed(pocket_aligntok(), "pocket_aligntok_random", RANDOM)
