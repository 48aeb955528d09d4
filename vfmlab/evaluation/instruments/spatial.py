"""sFID: the Frechet distance over Inception's spatial features, which sees where things are."""

from __future__ import annotations

from vfmlab.errors import DataError
from vfmlab.evaluation.frechet import Moments, frechet_distance
from vfmlab.evaluation.instruments.base import SAMPLES, Metric, Part, Pass
from vfmlab.evaluation.number import LOWER, Draft, Quantity
from vfmlab.evaluation.protocol import compared_features
from vfmlab.registry import INSTRUMENTS


@INSTRUMENTS.register("spatial_distance")
class SpatialDistance(Metric):
    """As ADM's evaluator counts it (arXiv 2105.05233): 7 channels at 17 x 17 places."""

    order, over = 43, SAMPLES
    quantities = (
        Quantity("sfd", "sFD", LOWER,
                 definition="Frechet distance between spatial features (Inception's) of samples and of real images"),
    )  # fmt: skip

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.moments: Moments | None = None

    @classmethod
    def fits(cls, gathered: Pass) -> bool:
        return gathered.setup.space.name == "inception"

    def update(self, part: Part) -> None:
        rows = part.seen.spatial
        if rows is not None:
            self.moments = (self.moments or Moments(rows.shape[1])).update(rows)

    def write(self, draft: Draft) -> None:
        if self.moments is None:
            raise DataError("the feature space gives no spatial features")
        real = compared_features(self.gathered.setup, of="spatial")
        value = frechet_distance(self.moments, real.moments)
        draft.add("sfd", value, self.gathered.resolved, min(self.moments.count, real.count))
