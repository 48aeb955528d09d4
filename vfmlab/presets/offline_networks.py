"""Pretraining of the small networks of the offline tiers: pocket VFM, control, three judges, text tower."""

from __future__ import annotations

from vfmlab.presets.table import Preset
from vfmlab.presets.tiers import Tree


def _pretrain(objective: str, source: str, seed: int, lr: float, samples: int = 51_200,
              val: int = 2000) -> Tree:
    return {
        "tier": "pocket", "seed": seed, "data": {"source": source, "size": 32, "train": samples, "val": val},
        "train": {
            "samples": samples, "batch": 64, "lr": lr, "betas": [0.9, 0.99], "weight_decay": 0.05, "schedule": "cosine",
            "warmup": samples // 20, "ema_halflife": samples * 10 // 256, "precision": "fp32", "log_every": samples // 16,
            "checkpoint_every": samples // 4, "evaluate_at": [samples],
        },
        "pretrain": {"objective": objective, "mask": 0.5},
    }  # fmt: skip


ROWS = (
    Preset(
        "pocket_vfm", "Pretraining of the bundled pocket VFM: other shapes' labels and masked reconstruction, never the generator's classes.",
        _pretrain("factors+mae", "scenes:other", 0, 2e-3), result="accuracies in docs/results/pocket_vfm.md; the weights are bundled",
    ),
    Preset(
        "pocket_vfm_leaky", "Pretraining of the leaky control (VFM `pocket_leaky`): the same, with the generator's own classes as labels.",
        _pretrain("leaky", "scenes:hard", 0, 2e-3), result="accuracies in docs/results/pocket_vfm.md",
    ),
    Preset(
        "pocket_judge", "Training of the judge whose features the pocket Frechet distances use; with blur, noise and colour changes.",
        _pretrain("classify", "scenes:hard", 1, 3e-3, 102_400, 3000), cost="a few minutes on one core",
        result="accuracies in docs/results/pocket_vfm.md; data.source=folder:PATH makes one for other images, named as protocol.features=judge:RUN_DIRECTORY",
    ),
    Preset(
        "pocket_factors", "Training of the second space for drawn scenes, protocol.features=factors: position, size, angle, colours, shape; with blur and noise.",
        _pretrain("regress", "scenes:hard", 2, 3e-3, 102_400, 3000), cost="a few minutes on one core", result="R2 of every factor in docs/results/pocket_vfm.md",
    ),
    Preset(
        "pocket_groups", "Training of the judge of prompts, protocol.features=groups: what stands on each place of scenes:groups; with blur and noise.",
        _pretrain("groups", "scenes:groups", 3, 3e-3, 102_400, 3000), cost="a few minutes on one core", result="what it reads right: docs/text_to_image.md",
    ),
    Preset(
        "pocket_text", "Training of the bundled text tower, diffusion.text.encoder=pocket: captions of scenes:groups against the pocket VFM's maps.",
        _pretrain("contrast", "scenes:groups", 4, 2e-3, 102_400, 3000), cost="a few minutes on one core", result="what it finds: docs/text_to_image.md",
    ),
)  # fmt: skip
