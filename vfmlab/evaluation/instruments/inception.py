"""Inception score by torch-fidelity's function, as ADM's evaluator counts it (arXiv 2105.05233)."""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.evaluation.instruments.base import SAMPLES, Metric, Part, Pass
from vfmlab.evaluation.number import HIGHER, Draft, Quantity
from vfmlab.registry import INSTRUMENTS

SPLIT = 5000  # samples of one part of the Inception score


@INSTRUMENTS.register("inception")
class Inception(Metric):
    """Only in the feature space "inception": the mean over parts of 5,000 samples in order."""

    order, over = 42, SAMPLES
    quantities = (
        Quantity("inception_score", "Inception score", HIGHER,
                 definition="exp of the mean divergence of Inception's class predictions from their mean"),
    )

    @classmethod
    def fits(cls, gathered: Pass) -> bool:
        return gathered.setup.space.name == "inception"

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.logits: list[Tensor] = []

    def update(self, part: Part) -> None:
        self.logits.append(part.seen.logits.cpu())

    def write(self, draft: Draft) -> None:
        from torch_fidelity.metric_isc import isc_features_to_metric

        logits, resolved = torch.cat(self.logits), self.gathered.resolved
        parts = [isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"]
                 for part in logits.split(SPLIT)]
        scores = torch.tensor(parts, dtype=torch.float64)
        draft.add("inception_score", float(scores.mean()), resolved, len(logits),
                  float(scores.std(correction=0)))
