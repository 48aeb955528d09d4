"""Distances of sets of images in the protocol's feature space: rFD, gFD, gFD to own reconstructions, KID.

Distance of samples to real images (gFD) is bounded from below by what the tokenizer loses (rFD), so the two
are always reported together; distance to the tokenizer's reconstructions of real images (`gfd_own`) says how
well the diffusion model has learnt the latents, apart from the decoder's floor.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from vfmlab.errors import DataError
from vfmlab.evaluation.frechet import FeatureSet, class_offset, frechet_distance, kernel_distance
from vfmlab.evaluation.instruments.base import SAMPLES, Metric, Part, Pass
from vfmlab.evaluation.number import CURVE, HEADLINE, LOWER, TABLE, TARGET, Draft, Quantity
from vfmlab.evaluation.protocol import TrainingImages, selection
from vfmlab.registry import INSTRUMENTS

BALANCED = "kernel distance (KID) of the same sets; slightly below 0 for equal sets that are class-balanced"
SHOWN = (TABLE, CURVE, TARGET)


@INSTRUMENTS.register("feature_distance")
class FeatureDistance(Metric):
    """1 - cosine between the features of an image and of its reconstruction, mean and spread over images."""

    order = 20
    quantities = (
        Quantity("feature_distance", "feature distance", LOWER, "", (TABLE, HEADLINE),
                 definition="1 - cosine between the features of an image and of its reconstruction"),
    )

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.values: list[torch.Tensor] = []

    def update(self, part: Part) -> None:
        cosine = functional.cosine_similarity(part.seen.features.float(),
                                              part.real.to(part.seen.features).float())
        self.values.append(1 - cosine.double().cpu())

    def write(self, draft: Draft) -> None:
        draft.mean("feature_distance", torch.cat(self.values), self.gathered.resolved)


def write(draft: Draft, prefix: str, suffix: str, a: FeatureSet, b: FeatureSet, gathered: Pass) -> None:
    """Frechet and kernel distance, `<prefix>fd<suffix>` and `<prefix>kd<suffix>` (spread over subsets)."""
    n, resolved = min(a.count, b.count), gathered.resolved
    draft.add(f"{prefix}fd{suffix}", frechet_distance(a, b), resolved, n)
    if n < 4:
        raise DataError(f"needs at least 4 images, got {n}")
    value, spread = kernel_distance(a, b, seed=gathered.setup.protocol.seed)
    draft.add(f"{prefix}kd{suffix}", value, resolved, n, spread)


@INSTRUMENTS.register("reconstruction_distances")
class OfReconstructions(Metric):
    """Reconstructions against the images themselves."""

    order = 21
    quantities = (
        Quantity("rfd", "rFD", LOWER, "", (TABLE, HEADLINE),
                 definition="Frechet distance between features of held-out images and of their reconstructions"),
        Quantity("rkd", "rKD", LOWER, "", (), definition=BALANCED),
    )  # fmt: skip

    def write(self, draft: Draft) -> None:
        write(draft, "r", "", self.gathered.own, self.gathered.real, self.gathered)


@INSTRUMENTS.register("reference_distance")
class ToReference(Metric):
    """Reconstructions against the protocol's reference, where it names one: another rFID."""

    order = 21
    quantities = (
        Quantity("rfd_reference", "rFD to reference", LOWER,
                 definition="Frechet distance between features of reconstructions and of protocol.reference"),
    )  # fmt: skip

    @classmethod
    def fits(cls, gathered: Pass) -> bool:
        return gathered.setup.reference is not None

    def write(self, draft: Draft) -> None:
        real, own = self.gathered.compared, self.gathered.own
        draft.add("rfd_reference", frechet_distance(own, real), self.gathered.setup.resolved(compared=True),
                  min(own.count, real.count))


@INSTRUMENTS.register("sample_distances")
class OfSamples(Metric):
    """Samples against images, and against the tokenizer's own reconstructions of them."""

    order, over = 40, SAMPLES
    quantities = (
        Quantity("gfd", "gFD", LOWER, "", SHOWN,
                 definition="Frechet distance between features of held-out images and of samples"),
        Quantity("gkd", "gKD", LOWER, "", (), definition=BALANCED),
        Quantity("gkd_corrected", "gKD, numbers of classes corrected", LOWER, "", (),
                 definition="gKD without what fixed numbers of every class add to it: 0 on average for samples like the images"),
        Quantity("gfd_own", "gFD to own rec.", LOWER, "", SHOWN,
                 definition="gFD to the tokenizer's own reconstructions: how well its latents are modelled, whatever its decoder loses"),
        Quantity("gkd_own", "gKD to own rec.", LOWER, "", (), definition=BALANCED),
    )  # fmt: skip

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.labels: list[torch.Tensor] = []

    def update(self, part: Part) -> None:
        self.labels.append(part.drawn_for)

    def write(self, draft: Draft) -> None:
        try:
            write(draft, "g", "", self.gathered.samples, self.gathered.compared, self.gathered)
        finally:  # a reference without images has no kernel distance, the reconstructions have
            write(draft, "g", "_own", self.gathered.samples, self.gathered.own, self.gathered)
        self._correct(draft)

    def _correct(self, draft: Draft) -> None:
        """Without what fixed numbers of every class add; classes drawn at random add nothing."""
        one, protocol = self.gathered, self.gathered.setup.protocol
        if protocol.prompts is not None:
            raise DataError("samples of prompts have no fixed number of every class")
        offset = self._of_real()
        if protocol.labels == "balanced":
            rows = one.samples.features()
            offset += class_offset(rows, torch.cat(self.labels)[: len(rows)])
        value = draft.numbers["gkd"]
        draft.add("gkd_corrected", value.value - offset, one.resolved, value.n, value.spread, offset=offset)

    def _of_real(self) -> float:
        """The offset of what samples are compared with."""
        setup, rows = self.gathered.setup, self.gathered.compared.features()
        reference, source, chosen = setup.reference, setup.source, None
        if isinstance(reference, TrainingImages):
            labels = reference.source.labels
        elif reference is not None:
            raise DataError(f"the classes of the images of '{reference.path}' are not known")
        else:
            ids = selection(setup.resolved(), source)
            labels, chosen = source.labels[ids], source.labels if len(ids) < len(source) else None
        return class_offset(rows, labels[: len(rows)], chosen)
