"""Class accuracy: how often the judge sees the right class in a reconstruction or a sample."""

from __future__ import annotations

from vfmlab.evaluation.instruments.base import SAMPLES, Metric, Part, Pass
from vfmlab.evaluation.number import CURVE, HEADLINE, HIGHER, TABLE, TARGET, Draft, Quantity
from vfmlab.registry import INSTRUMENTS


class ClassAccuracy(Metric):
    """Share of images to which the judge gives the right label; absent where it lacks the classes."""

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.unknown, self.hits, self.n = gathered.setup.unknown_classes, 0, 0
        own, there = getattr(gathered.network, "num_classes", None), gathered.setup.source.num_classes
        if gathered.setup.protocol.prompts is None and own not in (None, there):
            self.unknown = f"the generator draws {own} classes, '{gathered.setup.cfg.source}' has {there}"

    def update(self, part: Part) -> None:
        if part.labels is None:
            self.unknown = "prompts of a file have no classes"
        if self.unknown is None:
            self.hits += int((self.gathered.setup.classify(part.seen.logits) == part.labels).sum())
            self.n += len(part.labels)

    def write(self, draft: Draft) -> None:
        (name,) = (q.name for q in self.quantities)
        if self.unknown is None:
            draft.add(name, self.hits / self.n, self.gathered.resolved, self.n)
        else:
            draft.absent(name, self.unknown)


@INSTRUMENTS.register("reconstruction_classes")
class OfReconstructions(ClassAccuracy):
    order = 22
    quantities = (Quantity("class_accuracy_own", "class accuracy of rec.", HIGHER,
                           definition="share of reconstructions whose class the judge still sees"),)


@INSTRUMENTS.register("sample_classes")
class OfSamples(ClassAccuracy):
    order, over = 41, SAMPLES
    quantities = (
        Quantity("class_accuracy", "class accuracy", HIGHER, "", (TABLE, CURVE, TARGET, HEADLINE),
                 definition="share of samples in which the judge sees the class they were drawn for"),
    )
