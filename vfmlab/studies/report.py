"""The page of a few finished pipelines: pictures, numbers with their protocol, curves, configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vfmlab import api, config, data, runs, vfm
from vfmlab.evaluation.number import Report
from vfmlab.plots import figures, primitives
from vfmlab.studies import compare_page, grids, show
from vfmlab.studies.page import Folded, Page, Picture, definitions
from vfmlab.studies.results import collect, report_records, verdict
from vfmlab.studies.rows import Row

QUESTION = (
    "Tokenizers with the same budget, and the same diffusion model on the latents of each: on whose latents "
    "does it generate better, and is that the tokenizer with the better reconstructions?"
)
GUIDANCE = 2.5  # of the second picture of samples
CLASSES, SHOWN = 10, 8


def write(chosen: Mapping[str, config.Recipe], root: str | Path, target: str | Path, seed: int = 0,
          title: str = "vfmlab report") -> Path:
    """Write the page for `chosen` (name -> run whose phases are all trained) and return its path."""
    folders = {name: runs.open_run(run.id, root) for name, run in chosen.items()}
    tokenizers = {name: api.load_tokenizer(run.id, root) for name, run in chosen.items()}
    latents = {name: api.evaluate(run.tokenizer_phase.id, root) for name, run in chosen.items()}
    diffusion = {name: folder for name, folder in folders.items() if folder.config().generator is not None}
    reports = {name: api.evaluate(folder.id, root) for name, folder in diffusion.items()}
    first = next(iter(chosen.values()))
    results = collect([Row(name, run.seed, run) for name, run in chosen.items()], root)
    names = ", ".join(f"`{folder.id}`" for folder in folders.values())
    lead = f"Images: `{first.data.source}` at {first.data.size} px. Runs: {names}."
    if generators := dict.fromkeys(generator(run) for run in chosen.values() if run.generator is not None):
        lead += f" Generator: {'; '.join(generators)}."
    page = Page(title, QUESTION, verdict(results), lead, definitions())
    images, _, _ = data.examples(first.data, SHOWN, seed)

    if with_vfm := next((run for run in chosen.values() if run.vfm is not None), None):
        model = vfm.build(with_vfm.vfm, with_vfm.data.size)
        note = "Principal components of the features, early to late layers."
        page.add("What the frozen VFM sees", note, show.features(model, images))
    shown = {"original": images}
    for name, tokenizer in tokenizers.items():
        _, restored, psnr = api.reconstruct(tokenizer, images)
        shown[f"{name}\n{psnr.mean():.1f} dB, {tokenizer.size} px"] = restored
        shown[f"{name}, error x4"] = primitives.error_map(images, restored)
    page.add("Reconstructions", "The same held-out images through each tokenizer.",
             _picture(shown, "reconstructions"))
    page.add("Reconstruction in numbers", _protocols(latents), primitives.table(report_records(latents)))
    page.add("Decoding of disturbed latents", "PSNR when noise is added to the normalised latent.",
             figures.robustness(latents))
    if diffusion:
        page.add("Samples", "One image of each class from the same noise in every row, below real images of these classes.",
                 _samples(first, diffusion, root, seed))  # fmt: skip
        page.add("Quality over training",
                 "Measured on EMA weights during training, under the protocol of the numbers below.",
                 *compare_page.over_training(results))
        page.add("Generation in numbers", _protocols(reports), primitives.table(report_records(reports)))
        page.add("Reconstruction against generation", "Each point is a run.", figures.trade_off(reports))
    phases = [phase for run in chosen.values() for phase in run.phases() if phase.imported is None]
    for kind in ("tokenizer", "diffusion", "ar"):
        if part := [runs.open_run(phase.id, root) for phase in phases if phase.kind == kind]:
            note = "One panel per metric, one line per run (of a recipe in stages: per stage)."
            page.add(f"Training curves: {kind}", note, figures.training_curves(part))
    configs = [Folded(f"{name}: config of {run.id}", run.model_dump_json(indent=1))
               for name, run in chosen.items()]
    every = {**{f"{name} (tokenizer)": report for name, report in latents.items()}, **reports}
    protocols = [Folded(f"{name}: protocol {r.hash}", json.dumps(dict(r.protocol), indent=1))
                 for name, r in every.items()]
    page.add("Configs and protocols", "", *configs, *protocols)
    return page.write(target)


def generator(run: config.Recipe) -> str:
    """Network, optimiser and budget of a recipe's generator, and the guidance of its protocol."""
    train, network = run.generator.train, run.generator.network
    budget = "" if train is None else f", {train.optimizer}, {train.samples:,} images"
    return f"{network.kind}{budget}, guidance {run.protocol.guidance.scale:g}"


def _samples(first: config.Recipe, diffusion: Mapping[str, runs.RunDir], root: str | Path,
             seed: int) -> Picture:
    """Real images of the classes, then each run's samples at its own guidance and at `GUIDANCE`."""
    source = data.open_source(first.data, "val")
    classes = min(CLASSES, source.num_classes)
    batch = source.batch(torch.arange(min(len(source), 512)))
    images, firsts = data.to_float(batch.images), [(batch.labels == k).nonzero() for k in range(classes)]
    real = [images[rows[0, 0]] if len(rows) else torch.ones_like(images[0]) for rows in firsts]
    shown = {"real": torch.stack(real)}  # the first held-out image of each class, white where there is none
    for name, folder in diffusion.items():
        own = folder.config().protocol.guidance.scale
        for scale in dict.fromkeys((own, GUIDANCE)):
            how: dict[str, Any] = {} if scale == own else {"guidance": scale}
            shown[f"{name}\nguidance {scale:g}"] = show.class_samples(
                folder.path, root, seed=seed, limit=classes, **how)
    return _picture(shown, "samples", source.class_names)


def _picture(groups: Mapping[str, Tensor], caption: str, columns: list[str] | None = None) -> Picture:
    return Picture(primitives.png(grids.sheet(groups, columns=columns or ())), caption)


def _protocols(reports: Mapping[str, Report]) -> str:
    """Under what each row was measured, its guidance too."""
    parts = []
    for name, report in reports.items():
        sampling = report.protocol.get("sampling")
        how = f", {compare_page.sampler(sampling)}" if sampling else ""
        parts.append(f"{name}: protocol {report.hash}, N = {report.protocol.get('n')}{how}")
    return "Numbers are comparable within one protocol hash. " + "; ".join(parts) + "."
