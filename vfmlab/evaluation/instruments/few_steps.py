"""Few-step robustness (the steps are ours): what becomes of gFD when samples are drawn in a few steps."""

from __future__ import annotations

from dataclasses import replace

from vfmlab.errors import DataError
from vfmlab.evaluation.generation import evaluate_generation
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import LOWER, Draft, Quantity
from vfmlab.evaluation.protocol import Resolved, exact, open_setup
from vfmlab.evaluation.reconstruction import measure
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

STEPS, FEW = (2, 4, 8), 4


@INSTRUMENTS.register("few_steps")
class FewSteps(Instrument):
    """gFD over the sampler's steps, of the same noise and labels; `gfd_few`: that of 4 less that of the
    protocol's own."""

    kinds = ("diffusion",)
    quantities = (Quantity("gfd_few", "gFD that four steps cost", LOWER,
                           definition="gFD of samples drawn in four steps less that in the protocol's steps"),
                  Quantity("gfd_over_steps", "gFD over steps", LOWER, many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        protocol, sampler = exact(subject.protocol), subject.protocol.sampler
        if sampler.solver == "dopri5" or sampler.steps <= FEW:
            raise DataError(f"the protocol has {sampler.solver} in {sampler.steps} steps; it takes a solver "
                            f"of fixed steps, more than {FEW}")
        if sampler.reuse is not None or protocol.guidance.kind == "auto" or protocol.decoder is not None:
            raise DataError("steps are not varied where they reuse an encoding, where a weaker model guides, "
                            "or where another decoder shows the samples")
        root = "runs" if subject.folder is None else subject.folder.path.parent
        seed = 0 if subject.folder is None else subject.folder.config().seed
        setup = open_setup(subject.cfg, protocol, root, subject.device)
        baseline = measure(subject.tokenizer, subject.cfg, protocol, setup)
        steps, values = [*(n for n in STEPS if n < sampler.steps), sampler.steps], []
        for n in steps:
            own = protocol.model_copy(update={"sampler": sampler.model_copy(update={"steps": n})})
            drawn = evaluate_generation(subject.network, subject.tokenizer, subject.cfg, own,
                                        subject.num_classes, setup=replace(setup, protocol=own),
                                        baseline=baseline, seed=seed)
            values.append(drawn["gfd"].value)
        section = Resolved({**setup.resolved(sampling=True).sections,
                            "instrument": {"measure": "gFD over steps", "few": FEW}})
        report.add("gfd_over_steps", values, section, protocol.n, steps=steps)
        report.add("gfd_few", values[steps.index(FEW)] - values[-1], section, protocol.n)
