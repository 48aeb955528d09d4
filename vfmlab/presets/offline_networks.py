"""Pretraining of the small networks that the offline tiers stand on: pocket VFM, its leaky control, judge."""

from __future__ import annotations

from vfmlab.config import Recipe, parse
from vfmlab.presets.table import preset


def _pretrain(name: str, objective: str, source: str, seed: int, lr: float, samples: int = 51_200, val: int = 2000) -> Recipe:
    return parse({
        "name": name, "tier": "pocket", "seed": seed, "data": {"source": source, "size": 32, "train": samples, "val": val},
        "train": {
            "samples": samples, "batch": 64, "lr": lr, "betas": [0.9, 0.99], "weight_decay": 0.05, "schedule": "cosine", "warmup": samples // 20,
            "ema_halflife": samples * 10 // 256, "precision": "fp32", "log_every": samples // 16, "checkpoint_every": samples // 4,
            "evaluate_at": [samples],
        },
        "pretrain": {"objective": objective, "mask": 0.5},
    }, f"preset {name}")  # fmt: skip


@preset
def pocket_vfm() -> Recipe:
    """Pretraining of the bundled pocket VFM: other shapes' labels and masked reconstruction, never the generator's classes.

    `vfmlab train pocket_vfm`: about six minutes on one core; accuracies in docs/results/pocket_vfm.md. The weights are shipped: there is no need to run it.
    """
    return _pretrain("pocket_vfm", "factors+mae", "scenes:other", 0, 2e-3)


@preset
def pocket_vfm_leaky() -> Recipe:
    """Pretraining of the leaky control (VFM `pocket_leaky`): the same, with the generator's own classes as labels.

    `vfmlab train pocket_vfm_leaky`: about six minutes on one core; accuracies in docs/results/pocket_vfm.md.
    """
    return _pretrain("pocket_vfm_leaky", "leaky", "scenes:hard", 0, 2e-3)


@preset
def pocket_judge() -> Recipe:
    """Training of the judge whose features the pocket Frechet distances use; with blur, noise and colour changes.

    `vfmlab train pocket_judge`: a few minutes on one core; `--set data.source=folder:PATH` makes one for other images, to be named
    as protocol.features=judge:RUN_DIRECTORY. Accuracies in docs/results/pocket_vfm.md.
    """
    return _pretrain("pocket_judge", "classify", "scenes:hard", 1, 3e-3, 102_400, 3000)
