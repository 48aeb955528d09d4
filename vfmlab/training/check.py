"""Refused before the first step: parts of later phases, built as shapes without weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from vfmlab import data, runs, vfm
from vfmlab.ar.llamagen import CodeShape
from vfmlab.config import Phase
from vfmlab.diffusion import captions, path, sampling
from vfmlab.errors import ConfigError
from vfmlab.evaluation import features, prompts
from vfmlab.evaluation.protocol import open_compared
from vfmlab.evaluation.reference import bare, related
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.training import ar, diffusion, step
from vfmlab.training.meter import weightless
from vfmlab.training.task import section, trainable
from vfmlab.weights import load

LEAST = 4  # held-out images: there are no distances over fewer


def unbiased(phase: Phase) -> None:
    """ConfigError where a classifier on the VFM's own features is to judge what is built on them."""
    space, own = phase.protocol.features, None if phase.vfm is None else phase.vfm.name
    judges = phase.train is not None and phase.train.evaluate_at and space.startswith("classifier:")
    if judges and own is not None and bare(space) == bare(own):
        raise ConfigError(related(own, space).replace("look with another one too", "set another one"))


def undivided(phase: Phase) -> None:
    """ConfigError where what moves once a batch, by all of its images, would see it in parts."""
    quantizer, parts = getattr(phase.tokenizer, "quantizer", None), phase.train.accumulation
    if phase.diffusion is not None and phase.diffusion.tune is not None and parts > 1:
        raise ConfigError(f"diffusion.train.accumulation = {parts}: with diffusion.tune the latents' running "
                          "statistics move once a batch, by all of its images; set it to 1 (for less memory "
                          "with a smaller diffusion.train.batch)")
    if phase.generator is None and parts > 1 and getattr(phase.tokenizer, "whole_batch", False):
        raise ConfigError(f"train.accumulation = {parts}: '{phase.tokenizer.method}' takes mean and spread "
                          "of a batch from all of its images; set train.accumulation=1 (for less memory "
                          "with a smaller train.batch)")
    if phase.generator is None and parts > 1 and quantizer is not None and quantizer.whole_batch:
        raise ConfigError(f"train.accumulation = {parts}: the codebook of tokenizer.quantizer.kind="
                          f"{quantizer.kind} moves once a batch, by all that its images chose; set "
                          "train.accumulation=1 (for less memory with a smaller train.batch), or another "
                          "kind, such as cosine")


def learning(phase: Phase, tokenizer: Tokenizer) -> None:
    """ConfigError where a codebook trains and no loss reaches it: nothing comes through the straight-through
    gradient."""
    quantizer = getattr(tokenizer, "quantizer", None)
    if quantizer is None or any(name.partition(":")[0] == "codebook" for name in phase.losses):
        return
    if any(parameter.requires_grad for parameter in quantizer.parameters()):
        raise ConfigError(f"losses.codebook: it is off, and from it alone the entries of tokenizer '"
                          f"{phase.tokenizer.method}' learn (quantiser '{quantizer.registered_name}'); set "
                          "losses.codebook=1, or leave quantizer.* out of 'trains'")


def check(phases: Sequence[Phase], root: str | Path = "runs") -> None:
    """Build tokenizer, network, alignment and feature space of every phase that is trained, on the meta
    device.

    Raises:
        ConfigError: a part that does not fit the others, globs that match nothing, an unknown feature space,
        too few held-out images to measure on, batches that do not divide, accumulation where a tokenizer
        needs whole ones, a codebook that trains without its loss, guidance away from a null label that is not
        trained, a sampler that the network or its path has no form of. RunError, CheckpointError: no model
        that guidance leads away from, or one without weights. DataError: a reference that cannot serve,
        captions or a file of prompts that are missing.
    """
    spaces, protocols = set(), set()
    for phase in phases:
        if phase.tokenizer is None or phase.train is None or phase.imported is not None:
            continue
        step.share(phase.train, section(phase.kind), int(os.environ.get("WORLD_SIZE", 1)))
        undivided(phase)
        phase.check_guidance(phase.protocol.guidance)
        if phase.diffusion is not None and phase.protocol.guidance.kind == "auto":  # previews are guided
            load.weights_file(runs.open_run(phase.protocol.guidance.weaker, root, ("diffusion", "ar")), True)
        size = phase.data.size
        with torch.device("meta"):
            if phase.diffusion is None:
                model = None if phase.vfm is None else vfm.build(weightless(phase.vfm), size)
                tokenizer = TOKENIZERS.get(phase.tokenizer.method)(phase.tokenizer, size, model)
            if phase.ar is not None:
                ar.build(phase.ar, phase.seed, CodeShape.of(tokenizer), num_classes=1)
            elif phase.diffusion is None:
                trainable(tokenizer, tokenizer, phase.trains, phase.kind)
                learning(phase, tokenizer)
            else:
                side = size // phase.tokenizer.factor
                shape = (phase.tokenizer.channels, side, side)
                network = diffusion.build(weightless(phase.diffusion), size, phase.seed, shape, 1).network
                network.path = path.of_run(phase.diffusion, phase.tokenizer)
                if not phase.recipe.parts:  # a notebook's own network may have what the recipe's lacks
                    sampling.suits(network, phase.protocol.sampler, phase.protocol.guidance)
        if phase.diffusion is not None and phase.diffusion.text is not None:
            captions.Captioned(phase.diffusion, data.open_source(phase.data, "train"))
            prompts.texts(phase.protocol, data.open_source(phase.data, "val"))
        open_compared(phase.protocol, phase.data)
        unbiased(phase)
        if phase.train.evaluate_at:
            spaces.add((phase.protocol.features, size))
            protocols.add((phase.data, phase.protocol.n))
    for name, size in spaces:
        features.open_space(name, size, root)
    for images, wanted in protocols:
        there = len(data.open_source(images, "val"))
        if min(wanted, there) < LEAST:
            few = f"data.val: there are {there} held-out images"
            few = f"protocol.n = {wanted}" if wanted < LEAST else few
            raise ConfigError(f"{few}; a protocol needs at least {LEAST} to measure distances: raise it, or "
                              "leave evaluation out (train.evaluate_at=[])")
