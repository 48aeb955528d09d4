"""Frechet distance in several feature spaces: does an order of tokenizers or generators hang on one judge?

The spaces are those whose weights are there without a network, whatever the protocol's own: the bundled
three for the drawn scenes that they have seen, the two that other packages ship for photographs. Each
distance has the protocol hash of its space, with the version of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vfmlab.errors import DataError, VfmlabError
from vfmlab.evaluation.features import OWN
from vfmlab.evaluation.frechet import FeatureSet, frechet_distance
from vfmlab.evaluation.generation import drawn
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import LOWER, Draft, Quantity
from vfmlab.evaluation.precision import tf32
from vfmlab.evaluation.protocol import Setup, compared_features, exact, open_setup, real_features
from vfmlab.evaluation.reference import SHIPPED, bare, family
from vfmlab.evaluation.roundtrip import as_saved, evaluating, through
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS

SPACES = {**{name: name for name in ("judge", "factors", "groups")}, **{bare(name): name for name in SHIPPED}}


def _foreign(space: str, source: str) -> str:
    """Why a space says nothing of the images of a source; "" where it does."""
    drawn = source.partition(":")[0] == "scenes"
    if family(space) not in OWN:
        return f"'{space}' has seen photographs, '{source}' is drawn" if drawn else ""
    if family(space) == "groups" and source != "scenes:groups":
        return f"'{space}' has seen scenes:groups only"
    return "" if drawn else f"'{space}' has seen drawn scenes only"


def _opened(subject: Subject, prefix: str, report: Draft, **changes: None) -> dict[str, Setup]:
    """Name of a number -> its space with the images; one that is not for them, or not here, is absent."""
    root = "runs" if subject.folder is None else subject.folder.path.parent
    setups = {}
    for key, space in SPACES.items():
        if reason := _foreign(space, subject.cfg.source):
            report.absent(f"{prefix}_{key}", reason)
            continue
        protocol = exact(subject.protocol).model_copy(update={"features": space, **changes})
        try:
            setups[f"{prefix}_{key}"] = open_setup(subject.cfg, protocol, root, subject.device)
        except VfmlabError as error:
            report.absent(f"{prefix}_{key}", str(error))
    if not setups:
        raise DataError("none of the feature spaces could be opened")
    return setups


def _seen(setups: dict[str, Setup], batches: Iterable[Tensor]) -> dict[str, FeatureSet]:
    """Features of images (batches B 3 H W, of 8 bits, in [-1, 1]) in every space; one pass."""
    sets = {name: FeatureSet.empty(setup.space.dimension) for name, setup in setups.items()}
    for images in batches:
        for name, setup in setups.items():
            sets[name].update(setup.space(images).features)
    return sets


@INSTRUMENTS.register("reconstruction_spaces")
class ReconstructionSpaces(Instrument):
    """rFD in every space of `SPACES`."""

    kinds = ("tokenizer",)
    quantities = tuple(Quantity(f"rfd_{key}", f"rFD ({key})", LOWER,
                                definition=f"rFD in the feature space {space}, whatever the protocol's own")
                       for key, space in SPACES.items())

    @torch.no_grad()
    def measure(self, subject: Subject, report: Draft) -> None:
        setups = _opened(subject, "rfd", report, reference=None)
        one, tokenizer = next(iter(setups.values())), subject.tokenizer
        with evaluating(tokenizer), tf32(False):
            own = _seen(setups, (through(tokenizer, images, one.protocol.seed, ids).restored
                                 for _, images, ids in one.shares(subject.device)))
        for name, setup in setups.items():
            report.add(name, frechet_distance(own[name], real_features(setup)), setup.resolved(),
                       int(own[name].count), space=setup.space.name)


@INSTRUMENTS.register("sample_spaces")
class SampleSpaces(Instrument):
    """gFD in every space of `SPACES`, of the same samples."""

    kinds = ("diffusion",)
    quantities = tuple(Quantity(f"gfd_{key}", f"gFD ({key})", LOWER,
                                definition=f"gFD in the feature space {space}, whatever the protocol's own")
                       for key, space in SPACES.items())

    @torch.no_grad()
    def measure(self, subject: Subject, report: Draft) -> None:
        protocol, network = exact(subject.protocol), subject.network
        if protocol.guidance.kind == "auto" or protocol.decoder is not None or protocol.prompts is not None:
            raise DataError("samples are not drawn anew where a weaker model guides, another decoder shows "
                            "them, or prompts are their condition")
        setups = _opened(subject, "gfd", report)
        seed = 0 if subject.folder is None else subject.folder.config().seed
        ids = torch.arange(protocol.n).split(protocol.batch)
        with evaluating(network, subject.tokenizer), tf32(False):
            images = drawn(network, subject.tokenizer, protocol, ids, subject.num_classes, seed)
            own = _seen(setups, map(as_saved, images))
        for name, setup in setups.items():
            report.add(name, frechet_distance(own[name], compared_features(setup)),
                       setup.resolved(sampling=True), protocol.n, space=setup.space.name)
