"""Text to image on drawn scenes: captions of groups of things as condition, on two tokenizers."""

from __future__ import annotations

from vfmlab.presets.table import Preset

TEXT = {
    "data.source": "scenes:groups", "diffusion.text": {"encoder": "words"}, "diffusion.network.text": [12, 64],
    "protocol.features": "groups", "protocol.guidance.scale": 2.0,
}  # fmt: skip
OURS = "all of it: scenes, captions, budgets and the guidance scale"

ROWS = tuple(
    Preset(f"{tier}_t2i_{method}", f"{tier}_{method} on scenes of groups, its generator conditioned on their captions{end}", TEXT,
           of=f"{tier}_{method}", ours=OURS, **more)
    for tier, method, end, more in (
        ("tiny", "vfm_vae", ": does it all run?", {}), ("tiny", "plain_vae", ": does it all run?", {}),
        ("pocket", "vfm_vae", ".", {"cost": "not timed alone; more than pocket_t2i_plain_vae", "result": "docs/text_to_image.md"}),
        ("pocket", "plain_vae", ".", {"cost": "about six minutes on one core", "result": "docs/text_to_image.md"}))
)  # fmt: skip
