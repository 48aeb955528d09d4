"""Inside a diffusion model: agreement with a reference block by block, over t and over training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vfmlab.errors import RunError
from vfmlab.evaluation.course import logged, newest
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.instruments.sensitivity import PREPARED
from vfmlab.evaluation.instruments.structure import far_bound, lds
from vfmlab.evaluation.number import HIGHER, Draft, Number, Quantity
from vfmlab.evaluation.representation import K, beyond_chance, cknna, pool, prepare
from vfmlab.evaluation.roundtrip import evaluating
from vfmlab.evaluation.subject import Subject, noise_of, tokens_at
from vfmlab.registry import INSTRUMENTS
from vfmlab.runs import RunDir

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
IMAGES = 1000
PART = 64
BLOCK_KEY = "cknna_block_"  # of the evaluations that are logged during training


@torch.no_grad()
def block_features(network: nn.Module, z: Tensor, ids: Sequence[int], t: float, seed: int = 0,
                   maps: bool = False) -> dict[int, Tensor]:
    """Block (1 to `network.depth`) -> its features on the CPU, at time t under the null label.

    Args:
        z: N C h w clean normalised latents. ids: one per row, of its noise. maps: N D h w, not means N D.
    """
    blocks, features = tuple(range(1, network.depth + 1)), {}
    device = next(network.parameters()).device
    with evaluating(network):
        for k, part in enumerate(z.split(PART)):
            part = part.to(device)
            noise = noise_of(part, ids[k * PART : k * PART + len(part)], seed)
            for block, value in tokens_at(network, part, t, noise, blocks).items():
                features.setdefault(block, []).append((value if maps else pool(value)).float().cpu())
    return {block: torch.cat(parts) for block, parts in features.items()}


def block_alignment(network: nn.Module, z: Tensor, ids: Sequence[int], theirs: Tensor, protocol: str,
                    key: str = BLOCK_KEY) -> dict[str, Number]:
    """CKNNA of every block at t = 1/2 with a reference's features (N D) of the same images:
    {"cknna_block_1": ..., ...}.

    For the evaluations during training: what is logged under these names is what :func:`over_training` reads.
    protocol: hash of what the numbers depend on.
    """
    b = prepare(theirs)
    features = block_features(network, z, ids, t=0.5)
    values = {k: cknna(prepare(x), b, K) for k, x in features.items()}
    return {f"{key}{k}": Number(v, protocol, len(z), better=HIGHER, label=f"CKNNA of block {k}")
            for k, v in values.items()}


def over_training(folder: RunDir, key: str = BLOCK_KEY) -> dict[str, list]:
    """Agreement of blocks over training, as a run logged it: {"samples", "block", "value": [[...]]}.

    value: one row per block, of the points under the protocol of the last evaluation. key: with which
    reference; what stands before the block's number in the log.

    Raises:
        RunError: the run has logged none.
    """
    points = {int(name.removeprefix(key)): p for name, p in logged(folder).items() if name.startswith(key)}
    mark = next((newest(points[k]) for k in sorted(points)), None)
    by_block = {k: {s: v.value for s, v in p if mark and v.protocol == mark}
                for k, p in sorted(points.items())}
    samples = sorted({s for values in by_block.values() for s in values})
    if not samples:
        how = "train it with diffusion.train.evaluate_at"
        raise RunError(f"run '{folder.id}' has logged no agreement of its blocks ('{key}1', ...) with a "
                       f"protocol; {how}")
    return {"samples": samples, "block": list(by_block),
            "value": [[v.get(s) for s in samples] for v in by_block.values()]}


def latents(subject: Subject) -> tuple[Tensor, list[int]]:
    """Normalised latents (posterior mode) of the first held-out images, and the images' ids."""
    maps = subject.held_out
    n = min(IMAGES, len(maps))
    z = []
    with torch.no_grad(), evaluating(subject.tokenizer):
        for part in maps.images(n).split(PART):
            z.append(subject.tokenizer.encode(part.to(subject.device)).mode().cpu())
    return torch.cat(z), maps.indices[:n].tolist()


@INSTRUMENTS.register("blocks")
class Blocks(Instrument):
    """CKNNA with the reference, and LDS, of every block at several t; the best block at t = 0.5."""

    kinds = ("diffusion",)
    quantities = (Quantity("block_cknna", "CKNNA of the best block", HIGHER),
                  Quantity("block_cknna_corrected", "CKNNA of the best block beyond chance", HIGHER),
                  Quantity("block_lds", "LDS of the best block", HIGHER),
                  Quantity("block_cknna_over_t", "CKNNA by block and t", HIGHER, many=True),
                  Quantity("block_lds_over_t", "LDS by block and t", HIGHER, many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        z, ids = latents(subject)
        theirs = prepare(subject.theirs()[: len(z)])
        blocks, alike, local = range(1, subject.network.depth + 1), [], []
        for t in TIMES:
            maps = block_features(subject.network, z, ids, t, subject.protocol.seed, maps=True)
            alike.append([cknna(prepare(maps[k]), theirs, K) for k in blocks])
            local.append([float(lds(maps[k]).mean()) for k in blocks])
        facts = {"measure": "blocks", **PREPARED, "t": list(TIMES), "label": "null", "images": len(z)}
        facts["far"] = far_bound(*subject.network.grid)
        section, at, n = subject.section(facts, reference=True), TIMES.index(0.5), len(z)
        for name, table in (("cknna", alike), ("lds", local)):
            best = max(range(len(table[at])), key=table[at].__getitem__)
            report.add(f"block_{name}", table[at][best], section, n, block=best + 1)
            if name == "cknna":
                report.add("block_cknna_corrected", beyond_chance(table[at][best], K, n), section, n,
                           block=best + 1)
            rows = [list(row) for row in zip(*table, strict=True)]  # blocks; columns are times
            report.add(f"block_{name}_over_t", rows, section, n, block=list(blocks), t=list(TIMES))
