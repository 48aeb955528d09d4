"""What the class token of a tokenizer's feature decoder says of the class: the linear probe of VFMTok's paper
(arXiv 2507.08441; which token it is, an author says in an issue of the release).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.errors import DataError
from vfmlab.evaluation import probes
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import HIGHER, Draft, Quantity
from vfmlab.evaluation.roundtrip import evaluating
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

BATCH = 128


def class_tokens(subject: Subject, z: Tensor) -> Tensor:
    """Normalised latents N C h w -> class tokens N D, fp32 on the CPU.

    A tokenizer that has them offers `class_token(raw latents B C h w) -> B D`.

    Raises:
        DataError: a tokenizer that has none.
    """
    tokenizer, rows = subject.tokenizer, []
    read = getattr(tokenizer, "class_token", None)
    if read is None:
        raise DataError(f"tokenizer '{tokenizer.config.method}' has no feature decoder with a class token; "
                        "vfmtok has one, and the probe_linear of a report reads any latent")
    with torch.no_grad(), evaluating(tokenizer):
        for part in z.split(BATCH):
            rows.append(read(tokenizer.denormalise(part.to(subject.device))).float().cpu())
    return torch.cat(rows)


@INSTRUMENTS.register("class_token")
class ClassToken(Instrument):
    """`probe_class_token`: accuracy of the reports' logistic regression on the class token, with held-out
    images of the protocol; the paper's optimiser and its images are others.

    The token stands before the mask tokens of a causal transformer: it sees all region tokens and no place.
    """

    kinds = ("tokenizer",)
    quantities = (Quantity("probe_class_token", "linear probe of class token", HIGHER,
                           definition="accuracy of a logistic regression on the class token of the feature decoder, VFMTok's own probe"),)  # fmt: skip

    def measure(self, subject: Subject, report: Draft) -> None:
        train, test = subject.training, subject.held_out
        tokens = [class_tokens(subject, one.maps) for one in (train, test)]
        scores = probes.probe_split(tokens[0], train.labels, tokens[1], test.labels)
        section = subject.section({"measure": "probe of the class token", **probes.FACTS,
                                   "fitted_on": len(train)})
        report.add("probe_class_token", scores["linear"], section, len(test), chance=scores["chance"])
