"""Inception score, precision and recall (in Inception's features) by torch-fidelity's own functions."""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.evaluation.instruments.base import SAMPLES, Metric, Part, Pass
from vfmlab.evaluation.number import HIGHER, Draft, Quantity
from vfmlab.registry import INSTRUMENTS


@INSTRUMENTS.register("inception")
class Inception(Metric):
    """Only in the feature space "inception"; elsewhere these numbers do not exist."""

    order, over = 42, SAMPLES
    quantities = (
        Quantity("inception_score", "Inception score", HIGHER,
                 definition="exp of the mean divergence of Inception's class predictions from their mean"),
        Quantity("precision", "precision", HIGHER,
                 definition="share of samples within the neighbourhoods of real images"),
        Quantity("recall", "recall", HIGHER,
                 definition="share of real images within the neighbourhoods of samples"),
    )

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.logits: list[Tensor] = []
        if gathered.setup.space.name != "inception":
            self.quantities = ()

    def update(self, part: Part) -> None:
        if self.quantities:
            self.logits.append(part.seen.logits.cpu())

    def write(self, draft: Draft) -> None:
        if not self.quantities:
            return
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric

        logits, resolved = torch.cat(self.logits), self.gathered.resolved
        score = isc_features_to_metric(logits, splits=10, shuffle=True,
                                       rng_seed=self.gathered.setup.protocol.seed)
        draft.add("inception_score", score["inception_score_mean"], resolved, len(logits),
                  score["inception_score_std"])
        rows = self.gathered.samples.features(), self.gathered.real.features()
        shares = prc_features_to_metric(*rows, prc_neighborhood=3, prc_batch_size=10_000, verbose=False)
        for name in ("precision", "recall"):
            draft.add(name, float(shares[name]), resolved, len(rows[0]))
