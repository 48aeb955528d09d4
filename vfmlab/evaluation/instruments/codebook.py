"""How a quantised tokenizer uses its codebook, over all held-out images: exact counts of every entry."""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.evaluation.instruments.base import Metric, Part, Pass
from vfmlab.evaluation.instruments.geometry import effective_rank
from vfmlab.evaluation.number import HIGHER, LOWER, TABLE, Draft, Quantity
from vfmlab.registry import INSTRUMENTS

NAMED = 32  # dead entries that are listed


@INSTRUMENTS.register("codebook_use")
class CodebookUse(Metric):
    """Integer counts; an entry is used when at least one place of one image has it."""

    order = 15
    quantities = (
        Quantity("codebook_used", "codes used", HIGHER, "", (TABLE,),
                 definition="share of the codebook's entries that held-out images use at least once"),
        Quantity("codebook_perplexity", "code perplexity", HIGHER, "", (TABLE,),
                 definition="exp of the entropy of how often each entry is used: as many entries, evenly used, would say as much"),
        Quantity("codebook_dead", "dead codes", LOWER,
                 definition="entries that no held-out image uses; `dead` names the first of them"),
    )  # fmt: skip

    @classmethod
    def fits(cls, gathered: Pass) -> bool:
        return gathered.tokenizer.quantised

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.counts = torch.zeros(gathered.tokenizer.codebook_size, dtype=torch.long)
        self.n = 0

    def update(self, part: Part) -> None:
        self.counts += part.codes.flatten().bincount(minlength=len(self.counts))
        self.n += len(part.codes)

    def write(self, draft: Draft) -> None:
        resolved, size = self.gathered.resolved.of("images"), len(self.counts)
        dead = (self.counts == 0).nonzero().flatten().tolist()
        draft.add("codebook_used", 1 - len(dead) / size, resolved, self.n, entries=size)
        draft.add("codebook_perplexity", perplexity(self.counts), resolved, self.n, entries=size)
        draft.add("codebook_dead", len(dead), resolved, self.n, entries=size, dead=dead[:NAMED])


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of counts [K]: 1 when one entry is all there is, K when all are alike."""
    return effective_rank(counts.double())
