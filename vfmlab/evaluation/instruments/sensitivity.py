"""Agreement with a reference model, and whether it survives noise, rotation and scale: CKNNA and SE-CKNNA.

SE-CKNNA (VFM-VAE, arXiv 2510.18457): images are disturbed, both networks see the disturbed image, and CKNNA is taken
between what they make of it. Five sets: Gaussian noise of sigma .05, .10, .15, .20, and one random quarter turn with a
random scale (1, .75, .5, .25) per image. Token-mean features of the posterior's mode, clamped at the .95 quantile of |f|,
unit length, k = 10, unbiased HSIC.

How the sets are combined is not published. `se_cknna` is our reading: the mean over the four noise sets and the one set of
turns and scales. The undisturbed value stands apart, every set is reported, and so is the mean with a reference that sees
the undisturbed image instead. Noise is added to images in [-1, 1] (ours); scaled images are read at their smaller size
where the network takes it, else brought back to full size (the protocol says which).
"""

from __future__ import annotations

from statistics import fmean

from vfmlab.evaluation.instruments.base import Instrument, Scalars
from vfmlab.evaluation.perturbations import CLEAN, MOVED, NOISY, sides_of
from vfmlab.evaluation.protocol import Report
from vfmlab.evaluation.representation import QUANTILE, cknna, linear_cka, mutual_knn, prepare
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

K = 10
PREPARED = {"k": K, "quantile": QUANTILE, "pool": "token mean", "hsic": "unbiased"}


@INSTRUMENTS.register("alignment")
class Alignment(Instrument):
    """Agreement with the reference on undisturbed images: CKNNA, shared neighbours, linear CKA."""

    scalars = Scalars(higher=("alignment_cknna", "alignment_mutual_knn", "alignment_cka"))

    def measure(self, subject: Subject, report: Report) -> None:
        a, b = prepare(subject.pooled()), prepare(subject.theirs())
        section = subject.section({"measure": "agreement", **PREPARED}, reference=True)
        report.add("alignment_cknna", cknna(a, b, K), section, len(a))
        report.add("alignment_mutual_knn", mutual_knn(a, b, K), section, len(a))
        report.add("alignment_cka", linear_cka(a, b), section, len(a))


@INSTRUMENTS.register("se_cknna")
class SeCknna(Instrument):
    """CKNNA of disturbed images; see the module."""

    scalars = Scalars(higher=("se_cknna", "se_cknna_clean", "se_cknna_change", "se_cknna_noise", "se_cknna_moved", "se_cknna_reference_clean"))
    curves = ("se_cknna_sets",)

    def measure(self, subject: Subject, report: Report) -> None:
        still = prepare(subject.theirs(CLEAN))
        clean = cknna(prepare(subject.pooled(CLEAN)), still, K)
        both, one = {}, {}
        for view in (*NOISY, MOVED):
            mine = prepare(subject.pooled(view))
            both[view.name] = cknna(mine, prepare(subject.theirs(view)), K)
            one[view.name] = cknna(mine, still, K)
        facts = {
            "measure": "SE-CKNNA", **PREPARED, "noise": "on [-1, 1], not clipped", "combined": "mean of 4 noise sets and 1 of turns and scales (ours)",
            "sets": {view.name: view.facts for view in (*NOISY, MOVED)}, "sides": sides_of(subject.cfg.size, subject.cell),
            "scaled images": "smaller" if subject.scales else "brought back to full size",
        }  # fmt: skip
        section, n = subject.section(facts, reference=True), len(still)
        mean = fmean(both.values())
        report.add("se_cknna", mean, section, n)
        report.add("se_cknna_clean", clean, section, n)
        if clean > 0:
            report.add("se_cknna_change", mean / clean - 1, section, n)
        else:
            report.absent("se_cknna_change", f"the undisturbed value is {clean:.3g}; a relative change needs a positive one")
        report.add("se_cknna_noise", fmean(both[view.name] for view in NOISY), section, n)
        report.add("se_cknna_moved", both[MOVED.name], section, n)
        report.add("se_cknna_reference_clean", fmean(one.values()), section, n)
        values, alone = [clean, *both.values()], [clean, *one.values()]
        report.add("se_cknna_sets", values, section, n, sets=["clean", *both], reference_clean=alone)
