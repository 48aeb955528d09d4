"""Inside a diffusion model: agreement with a reference block by block and over t, loss over t, convergence as single numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.diffusion import path as flow
from vfmlab.errors import DataError, RunError
from vfmlab.evaluation.instruments.base import Instrument, Scalars
from vfmlab.evaluation.instruments.sensitivity import PREPARED, K
from vfmlab.evaluation.instruments.structure import far_bound, lds
from vfmlab.evaluation.protocol import Report, Resolved
from vfmlab.evaluation.reconstruction import evaluating
from vfmlab.evaluation.representation import cknna, pool, prepare
from vfmlab.evaluation.subject import Subject, noise_of, tokens_at
from vfmlab.registry import INSTRUMENTS
from vfmlab.runs import RunDir

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
BINS = 10
IMAGES = 1000
PART = 64
BLOCK_KEY = "cknna_block_"  # of the evaluations that are logged during training
CONVERGING = ("gfd", "gfd_own")


# -- blocks and times -------------------------------------------------------------------------------------------------


@torch.no_grad()
def block_features(network: nn.Module, z: Tensor, ids: Sequence[int], t: float, seed: int = 0, maps: bool = False) -> dict[int, Tensor]:
    """Features after every block, 1 to `network.depth`, at time t under the null label.

    Args:
        z: N C h w clean normalised latents. ids: one per row, which decide its noise. maps: N D h w in place of token
        means N D.

    Returns:
        {block: features on the CPU}.
    """
    blocks, found = tuple(range(1, network.depth + 1)), {}
    device = next(network.parameters()).device
    with evaluating(network):
        for k, part in enumerate(z.split(PART)):
            part = part.to(device)
            noise = noise_of(part, ids[k * PART : k * PART + len(part)], seed)
            for block, value in tokens_at(network, part, t, noise, blocks).items():
                found.setdefault(block, []).append((value if maps else pool(value)).float().cpu())
    return {block: torch.cat(parts) for block, parts in found.items()}


def block_alignment(network: nn.Module, z: Tensor, ids: Sequence[int], theirs: Tensor, t: float = 0.5, seed: int = 0) -> dict[str, float]:
    """CKNNA of every block with a reference's features (N D) of the same images: {"cknna_block_1": ..., ...}.

    For the evaluations during training: what is logged under these names is what :func:`over_training` reads.
    """
    b = prepare(theirs)
    return {f"{BLOCK_KEY}{k}": cknna(prepare(x), b, K) for k, x in block_features(network, z, ids, t, seed).items()}


def over_training(folder: RunDir, key: str = BLOCK_KEY) -> dict[str, list]:
    """Agreement of blocks over training, from the evaluations that a run logged: {"samples", "block", "value": [[...]]}.

    value: one row per block. key: with which reference; what stands before the block's number in the log.

    Raises:
        RunError: the run has logged none.
    """
    rows = [r for r in folder.metrics("evaluation") if any(name.startswith(key) for name in r)]
    if not rows:
        raise RunError(f"run '{folder.id}' has logged no agreement of its blocks ('{key}1', ...); train it with diffusion.train.evaluate_at")
    blocks = sorted({int(name.removeprefix(key)) for r in rows for name in r if name.startswith(key)})
    return {"samples": [r["samples"] for r in rows], "block": blocks, "value": [[_value(r.get(f"{key}{k}")) for r in rows] for k in blocks]}


def latents(subject: Subject) -> tuple[Tensor, list[int]]:
    """The first held-out images' normalised latents (posterior mode) of a diffusion subject, and the images' ids."""
    found = subject.held_out
    n = min(IMAGES, len(found))
    z = []
    with torch.no_grad(), evaluating(subject.tokenizer):
        for part in found.images(n).split(PART):
            z.append(subject.tokenizer.encode(part.to(subject.device)).mode().cpu())
    return torch.cat(z), found.indices[:n].tolist()


@INSTRUMENTS.register("blocks")
class Blocks(Instrument):
    """CKNNA with the reference, and LDS, of every block at several t. `block_cknna`: the best block at t = 0.5."""

    kinds = ("diffusion",)
    scalars = Scalars(higher=("block_cknna", "block_lds"))
    curves = ("block_cknna_over_t", "block_lds_over_t")

    def measure(self, subject: Subject, report: Report) -> None:
        z, ids = latents(subject)
        theirs = prepare(subject.theirs()[: len(z)])
        blocks, alike, local = range(1, subject.network.depth + 1), [], []
        for t in TIMES:
            found = block_features(subject.network, z, ids, t, subject.protocol.seed, maps=True)
            alike.append([cknna(prepare(found[k]), theirs, K) for k in blocks])
            local.append([float(lds(found[k]).mean()) for k in blocks])
        facts = {"measure": "blocks", **PREPARED, "t": list(TIMES), "label": "null", "images": len(z), "far": far_bound(*subject.network.grid)}
        section, at = subject.section(facts, reference=True), TIMES.index(0.5)
        for name, table in (("cknna", alike), ("lds", local)):
            best = max(range(len(table[at])), key=table[at].__getitem__)
            report.add(f"block_{name}", table[at][best], section, len(z), block=best + 1)
            # rows are blocks, columns times
            report.add(f"block_{name}_over_t", [list(row) for row in zip(*table, strict=True)], section, len(z), block=list(blocks), t=list(TIMES))


@torch.no_grad()
def time_losses(network: nn.Module, z: Tensor, labels: Tensor, ids: Sequence[int], seed: int = 0, bins: int = BINS) -> tuple[list[float], list[float]]:
    """Middle of each of `bins` equal parts of [0, 1], and there the velocity's squared error over the target's power."""
    times, losses = [(i + 0.5) / bins for i in range(bins)], []
    device = next(network.parameters()).device
    with evaluating(network):
        for t in times:
            wrong = power = 0.0
            for k, part in enumerate(z.split(PART)):
                part, rows = part.to(device), slice(k * PART, k * PART + len(part))
                point = flow.interpolate(part, noise_of(part, ids[rows], seed), torch.full((len(part),), t, device=device))
                v = network(point.x, point.t, labels[rows].to(device))
                wrong += float((v - point.v).double().square().sum())
                power += float(point.v.double().square().sum())
            losses.append(wrong / power)
    return times, losses


@INSTRUMENTS.register("time_loss")
class TimeLoss(Instrument):
    """Error of the predicted velocity over t, in units of the target's power; `velocity_error` is the mean over t."""

    kinds = ("diffusion",)
    scalars = Scalars(lower=("velocity_error",))
    curves = ("velocity_error_over_t",)

    def measure(self, subject: Subject, report: Report) -> None:
        z, ids = latents(subject)
        times, losses = time_losses(subject.network, z, subject.held_out.labels[: len(z)], ids, subject.protocol.seed)
        section = subject.section({"measure": "velocity error", "bins": BINS, "images": len(z)})
        report.add("velocity_error", sum(losses) / len(losses), section, len(z))
        report.add("velocity_error_over_t", losses, section, len(z), t=times)


# -- convergence ------------------------------------------------------------------------------------------------------


def area(samples: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of a convergence curve between its first and last point (trapezoids over samples, in the values' unit).

    Raises:
        DataError: fewer than two points, or points out of order.
    """
    if len(samples) != len(values):
        raise DataError(f"a curve has {len(samples)} positions and {len(values)} values; give one value per position")
    if len(samples) < 2:
        raise DataError(f"a convergence curve needs at least 2 evaluations, got {len(samples)}; set train.evaluate_at")
    if any(a >= b for a, b in itertools.pairwise(samples)):
        raise DataError("the evaluations of a convergence curve must be in order of samples, each once")
    whole = sum((b - a) * (u + v) / 2 for (a, u), (b, v) in itertools.pairwise(zip(samples, values, strict=True)))
    return whole / (samples[-1] - samples[0])


def reach(samples: Sequence[float], values: Sequence[float], level: float, lower: bool = True) -> float | None:
    """Samples at which a curve first comes to `level` (linear between evaluations); None if it never does."""
    sign = 1 if lower else -1
    before = None
    for s, v in zip(samples, values, strict=True):
        if sign * v <= sign * level:
            if before is None or before[1] == v:
                return float(s)
            return before[0] + (s - before[0]) * (level - before[1]) / (v - before[1])
        before = (s, v)
    return None


def curve(folder: RunDir, metric: str) -> tuple[list[int], list[float], str | None]:
    """Samples, values and protocol hash of a metric in the evaluations that a run logged during training."""
    found = [(r["samples"], r[metric]) for r in folder.metrics("evaluation") if _value(r.get(metric)) is not None]
    mark = next((v.get("protocol") for _, v in reversed(found) if isinstance(v, Mapping)), None)
    return [s for s, _ in found], [_value(v) for _, v in found], mark


def _value(entry: Any) -> float | None:
    return entry.get("value") if isinstance(entry, Mapping) else entry


def steps_to_reach(folders: Sequence[RunDir], metric: str = "gfd", level: float | None = None) -> list[dict[str, Any]]:
    """Samples and steps that several runs need to come to one level of a metric; None where a run does not.

    level: None takes the worst last value among the runs, so that each reaches it.

    Raises:
        RunError: a run without evaluations during training. DataError: runs evaluated under different protocols.
    """
    curves = {folder.id: curve(folder, metric) for folder in folders}
    for run, (samples, _, _) in curves.items():
        if not samples:
            raise RunError(f"run '{run}' has no '{metric}' from evaluations during training; set diffusion.train.evaluate_at and train it")
    marks = {mark for *_, mark in curves.values()}
    if len(marks) > 1:
        raise DataError(f"'{metric}' of these runs was measured under different protocols ({', '.join(map(str, sorted(map(str, marks))))})")
    level = max(values[-1] for _, values, _ in curves.values()) if level is None else level
    found = []
    for folder in folders:
        samples, values, _ = curves[folder.id]
        at = reach(samples, values, level)
        steps = None if at is None else at / folder.config().train.batch
        whole = area(samples, values) if len(samples) > 1 else None
        found.append({"run": folder.id, "level": level, "samples": at, "steps": steps, "area": whole})
    return found


@INSTRUMENTS.register("convergence")
class Convergence(Instrument):
    """Area under the curves of gFD over samples seen, from the evaluations during training: one number for the whole course."""

    kinds = ("diffusion",)
    scalars = Scalars(lower=tuple(f"{name}_area" for name in CONVERGING))
    curves = tuple(f"{name}_over_samples" for name in CONVERGING)

    def measure(self, subject: Subject, report: Report) -> None:
        if subject.folder is None:
            raise DataError("a model that is not in a run directory has no course of training")
        for name in CONVERGING:
            samples, values, mark = curve(subject.folder, name)
            if not samples:
                for key in (f"{name}_area", f"{name}_over_samples"):
                    report.absent(key, f"the run has no '{name}' from evaluations during training; set diffusion.train.evaluate_at")
                continue
            facts = {"measure": f"area under {name}", "first": samples[0], "last": samples[-1], "evaluations": len(samples), "of": mark}
            section = Resolved({**subject.resolved.sections, "instrument": facts})
            report.add(f"{name}_over_samples", values, section, subject.n, samples=samples)
            try:
                report.add(f"{name}_area", area(samples, values), section, subject.n)
            except DataError as error:
                report.absent(f"{name}_area", str(error))

