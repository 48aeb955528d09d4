"""Agreement with a reference model, and whether it survives noise, rotation and scale: CKNNA and SE-CKNNA.

SE-CKNNA (VFM-VAE, arXiv 2510.18457): images are disturbed, both networks see the disturbed image, and CKNNA
is taken between what they make of it. Five sets: Gaussian noise of sigma .05, .10, .15, .20, and one random
quarter turn with a random scale (1, .75, .5, .25) per image. Token-mean features of the posterior's mode,
clamped at the .95 quantile of |f|, unit length, k = 10, unbiased HSIC.

How the sets are combined is not published. `se_cknna` is our reading: the mean over the four noise sets and
the one set of turns and scales. The undisturbed value stands apart, every set is reported, and so is the mean
with a reference that sees the undisturbed image instead. Noise is added to images in [-1, 1] (ours); scaled
images are read at their smaller size where the network takes it, else brought back to full size (the protocol
says which). `se_cknna_release` disturbs as the release does: noise of 255 sigma on images in 0..255, clipped
and rounded, twice as strong, and a reference that reads scaled images at their smaller size.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import HEADLINE, HIGHER, LATENT, Draft, Quantity
from vfmlab.evaluation.perturbations import CLEAN, MOVED, NOISY, RELEASE, Perturbation, sides_of
from vfmlab.evaluation.protocol import Resolved
from vfmlab.evaluation.representation import (
    QUANTILE,
    K,
    beyond_chance,
    cknna,
    linear_cka,
    mutual_knn,
    prepare,
)
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

PREPARED = {"k": K, "quantile": QUANTILE, "pool": "token mean", "hsic": "unbiased"}
UNCLIPPED = "on [-1, 1], not clipped"


@INSTRUMENTS.register("alignment")
class Alignment(Instrument):
    """Agreement with the reference on undisturbed images: CKNNA, shared neighbours, linear CKA."""

    quantities = (Quantity("alignment_cknna", "CKNNA (reference)", HIGHER, shown=(HEADLINE,)),
                  Quantity("alignment_cknna_corrected", "CKNNA (reference) beyond chance", HIGHER),
                  Quantity("alignment_mutual_knn", "shared neighbours", HIGHER),
                  Quantity("alignment_cka", "linear CKA", HIGHER))

    def measure(self, subject: Subject, report: Draft) -> None:
        a, b = prepare(subject.pooled()), prepare(subject.theirs())
        section = subject.section({"measure": "agreement", **PREPARED}, reference=True)
        value = cknna(a, b, K)
        report.add("alignment_cknna", value, section, len(a))
        report.add("alignment_cknna_corrected", beyond_chance(value, K, len(a)), section, len(a))
        report.add("alignment_mutual_knn", mutual_knn(a, b, K), section, len(a))
        report.add("alignment_cka", linear_cka(a, b), section, len(a))


@INSTRUMENTS.register("se_cknna")
class SeCknna(Instrument):
    """CKNNA of disturbed images; see the module."""

    quantities = (Quantity("se_cknna", "SE-CKNNA", HIGHER, shown=(LATENT, HEADLINE)),
                  Quantity("se_cknna_corrected", "SE-CKNNA beyond chance", HIGHER),
                  Quantity("se_cknna_clean", "CKNNA", HIGHER, shown=(LATENT,)),
                  Quantity("se_cknna_change", "SE-CKNNA against CKNNA", HIGHER, shown=(HEADLINE,)),
                  Quantity("se_cknna_noise", "CKNNA under noise", HIGHER),
                  Quantity("se_cknna_moved", "CKNNA, turned and scaled", HIGHER),
                  Quantity("se_cknna_reference_clean", "CKNNA, reference undisturbed", HIGHER),
                  Quantity("se_cknna_sets", "CKNNA of each set", HIGHER, many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        still = prepare(subject.theirs(CLEAN))
        clean = cknna(prepare(subject.pooled(CLEAN)), still, K)
        both, one = {}, {}
        for disturbed in (*NOISY, MOVED):
            mine = prepare(subject.pooled(disturbed))
            both[disturbed.name] = cknna(mine, prepare(subject.theirs(disturbed)), K)
            one[disturbed.name] = cknna(mine, still, K)
        facts = _facts(subject, (*NOISY, MOVED), UNCLIPPED)
        section, n = subject.section(facts, reference=True), len(still)
        mean = fmean(both.values())
        report.add("se_cknna", mean, section, n)
        report.add("se_cknna_corrected", beyond_chance(mean, K, n), section, n)
        report.add("se_cknna_clean", clean, section, n)
        _change("se_cknna_change", mean, clean, section, n, report)
        report.add("se_cknna_noise", fmean(both[p.name] for p in NOISY),
                   subject.section(_noise_facts(), reference=True), n)
        report.add("se_cknna_moved", both[MOVED.name], section, n)
        report.add("se_cknna_reference_clean", fmean(one.values()), section, n)
        values, alone = [clean, *both.values()], [clean, *one.values()]
        report.add("se_cknna_sets", values, section, n, sets=["clean", *both], reference_clean=alone)


@INSTRUMENTS.register("se_cknna_release")
class SeCknnaRelease(Instrument):
    """SE-CKNNA of images that are disturbed as in VFM-VAE's release; see the module."""

    quantities = (Quantity("se_cknna_release", "SE-CKNNA (release)", HIGHER),
                  Quantity("se_cknna_release_change", "SE-CKNNA (release) against CKNNA", HIGHER),
                  Quantity("se_cknna_release_change_corrected", "SE-CKNNA (release) against CKNNA, beyond chance",
                           HIGHER, definition="relative change under the release's disturbances of what CKNNA has beyond its chance value k / (N - 1)"))  # fmt: skip

    def measure(self, subject: Subject, report: Draft) -> None:
        clean = cknna(prepare(subject.pooled()), prepare(subject.theirs()), K)
        value = fmean(cknna(prepare(subject.pooled(p)), prepare(subject.theirs(p)), K) for p in RELEASE)
        facts = _facts(subject, RELEASE, "255 sigma on 0..255, clipped and rounded")
        section = subject.section(facts, reference=True)
        report.add("se_cknna_release", value, section, subject.n)
        _change("se_cknna_release_change", value, clean, section, subject.n, report)
        beyond = (beyond_chance(x, K, subject.n) for x in (value, clean))
        _change("se_cknna_release_change_corrected", *beyond, section, subject.n, report)


def _change(name: str, value: float, clean: float, section: Resolved, n: int, report: Draft) -> None:
    if clean > 0:
        report.add(name, value / clean - 1, section, n)
    else:
        report.absent(name, f"the undisturbed value is {clean:.3g}; a relative change needs a positive one")


def _noise_facts() -> dict[str, Any]:
    """What noise alone depends on: not on how a scaled image is read, which differs between tokenizers."""
    return {"measure": "CKNNA under noise", **PREPARED, "noise": UNCLIPPED,
            "combined": "mean of 4 noise sets", "sets": {p.name: p.facts for p in NOISY}}


def _facts(subject: Subject, sets: Sequence[Perturbation], noise: str) -> dict[str, Any]:
    return {
        "measure": "SE-CKNNA", **PREPARED, "noise": noise, "combined": "mean of 4 noise sets and 1 of turns and scales (ours)",
        "sets": {p.name: p.facts for p in sets}, "sides": sides_of(subject.cfg.size, subject.cell),
        "scaled images": "smaller" if subject.scales else "brought back to full size",
    }  # fmt: skip
