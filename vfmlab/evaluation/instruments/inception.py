"""Inception score, precision and recall by torch-fidelity's functions, as ADM's evaluator counts them (arXiv
2105.05233).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import SAMPLES, Metric, Part, Pass
from vfmlab.evaluation.number import HIGHER, Draft, Quantity
from vfmlab.registry import INSTRUMENTS

SPLIT = 5000  # samples of one part of the Inception score
NEAREST, ROWS = 3, 10_000  # neighbour whose distance is the radius; rows compared at a time


@INSTRUMENTS.register("inception")
class Inception(Metric):
    """Only in the feature space "inception". The score is the mean over parts of 5,000 samples in order;
    precision and recall are over all samples and the images of the reference."""

    order, over = 42, SAMPLES
    quantities = (
        Quantity("inception_score", "Inception score", HIGHER,
                 definition="exp of the mean divergence of Inception's class predictions from their mean"),
        Quantity("precision", "precision", HIGHER,
                 definition="share of samples within the neighbourhoods of real images"),
        Quantity("recall", "recall", HIGHER,
                 definition="share of real images within the neighbourhoods of samples"),
    )

    @classmethod
    def fits(cls, gathered: Pass) -> bool:
        return gathered.setup.space.name == "inception"

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.logits: list[Tensor] = []
        self.features: list[Tensor] = []

    def update(self, part: Part) -> None:
        self.logits.append(part.seen.logits.cpu())
        self.features.append(part.seen.features.float().cpu())

    def write(self, draft: Draft) -> None:
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric

        logits, resolved = torch.cat(self.logits), self.gathered.resolved
        parts = [isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"]
                 for part in logits.split(SPLIT)]
        scores = torch.tensor(parts, dtype=torch.float64)
        draft.add("inception_score", float(scores.mean()), resolved, len(logits),
                  float(scores.std(correction=0)))
        samples, real = torch.cat(self.features), self.gathered.compared.features()
        if min(len(samples), len(real)) <= NEAREST:
            raise DataError(f"precision needs more than {NEAREST} samples and real images, got "
                            f"{len(samples)} and {len(real)} (a reference without images has none)")
        shares = prc_features_to_metric(samples, real, prc_neighborhood=NEAREST, prc_batch_size=ROWS,
                                        save_cpu_ram=True, verbose=False)
        for name in ("precision", "recall"):
            draft.add(name, float(shares[name]), resolved, len(samples))
