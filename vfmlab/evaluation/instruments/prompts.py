"""Prompts: how much of a caption the judge of groups reads off an image, in the manner of GenEval."""

from __future__ import annotations

import torch

from vfmlab.errors import ConfigError
from vfmlab.evaluation import groups, prompts
from vfmlab.evaluation.instruments.base import SAMPLES, Metric, Part, Pass
from vfmlab.evaluation.number import CURVE, HEADLINE, HIGHER, TABLE, TARGET, Draft, Quantity
from vfmlab.registry import INSTRUMENTS

PARTS = {
    "count": "as many things as it says", "shape": "the shapes it names, and no other",
    "texture": "the textures it names, and no other", "colour": "the colours it names, and no other",
    "side": "of captions with a side: its things stand there", "all": "every thing as it says",
}  # fmt: skip


class PromptsFollowed(Metric):
    """Shares of images that are as their captions say, by the judge of groups; absent in other spaces."""

    def __init__(self, gathered: Pass):
        super().__init__(gathered)
        self.features, self.texts, self.reason, setup = [], [], None, gathered.setup
        if not isinstance(setup.space, groups.GroupSpace):
            self.reason = (f"feature space '{setup.space.name}' reads no things; set "
                           "protocol.features=groups")
        self.every = prompts.texts(setup.protocol, setup.source) if self.over == SAMPLES else []

    @classmethod
    def fits(cls, gathered: Pass) -> bool:
        if cls.over == SAMPLES:
            return gathered.setup.protocol.prompts is not None
        return isinstance(gathered.setup.space, groups.GroupSpace)

    def update(self, part: Part) -> None:
        if self.reason is not None:
            return
        if self.over == SAMPLES:
            said = [self.every[i] for i in part.drawn_for.tolist()]
        elif (said := self.gathered.setup.source.captions(part.ids)) is None:
            self.reason = "the images have no captions"
            return
        self.texts += said
        self.features.append(part.seen.features.cpu())

    def write(self, draft: Draft) -> None:
        shares: dict[str, float] = {}
        if self.reason is None:
            try:
                shares = groups.shares(self.texts, torch.cat(self.features))
            except ConfigError as error:
                self.reason = str(error)
        for quantity in self.quantities:
            part = quantity.name.split("_")[1]
            if part in shares:
                draft.add(quantity.name, shares[part], self.gathered.resolved, len(self.texts))
            else:
                draft.absent(quantity.name, self.reason or f"no prompt says a {part}")


@INSTRUMENTS.register("sample_prompts")
class FollowedInSamples(PromptsFollowed):
    """Of samples, by the prompts they were drawn for."""

    order, over = 42, SAMPLES
    quantities = tuple(
        Quantity(f"prompt_{part}", f"prompts: {part}", HIGHER, "",
                 (TABLE, CURVE, TARGET, HEADLINE) if part == "all" else (TABLE, TARGET),
                 definition="share of samples in which the judge of groups sees what the prompt says: "
                            f"{words}")
        for part, words in PARTS.items())


@INSTRUMENTS.register("reconstruction_prompts")
class FollowedInReconstructions(PromptsFollowed):
    """Of reconstructions, by the images' captions: what a generator on this tokenizer can reach."""

    order = 23
    quantities = (Quantity("prompt_all_own", "prompts: all, of rec.", HIGHER,
                           definition="share of reconstructions in which the judge of groups sees all that "
                                      "the image's caption says"),)
