"""Precision and recall of samples (arXiv 1904.06991) by torch-fidelity's function, with three neighbours as
ADM's evaluator has them (2105.05233).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import SAMPLES, Metric, Part, Pass
from vfmlab.evaluation.number import HIGHER, Draft, Quantity
from vfmlab.registry import INSTRUMENTS

NEAREST, ROWS = 3, 10_000  # neighbour whose distance is the radius; rows compared at a time


@INSTRUMENTS.register("coverage")
class Coverage(Metric):
    """Over all samples and the images that they are compared with, in the protocol's feature space: each
    image's neighbourhood reaches to its third nearest neighbour."""

    order, over = 43, SAMPLES
    quantities = (
        Quantity("precision", "precision", HIGHER,
                 definition="share of samples within the neighbourhoods of real images"),
        Quantity("recall", "recall", HIGHER,
                 definition="share of real images within the neighbourhoods of samples"),
    )

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.features: list[Tensor] = []

    def update(self, part: Part) -> None:
        self.features.append(part.seen.features.float().cpu())

    def write(self, draft: Draft) -> None:
        try:
            from torch_fidelity.metric_prc import prc_features_to_metric
        except ImportError:
            raise DataError("precision needs torch-fidelity: pip install 'vfmlab[metrics]'") from None
        samples, real = torch.cat(self.features), self.gathered.compared.features()
        if min(len(samples), len(real)) <= NEAREST:
            raise DataError(f"precision needs more than {NEAREST} samples and real images, got "
                            f"{len(samples)} and {len(real)} (a reference without images has none)")
        shares = prc_features_to_metric(samples, real, prc_neighborhood=NEAREST, prc_batch_size=ROWS,
                                        save_cpu_ram=True, verbose=False)
        for name in ("precision", "recall"):
            draft.add(name, float(shares[name]), self.gathered.resolved, len(samples))
