"""Many samples of a run in one npz file, as ADM's evaluator reads it.

They are those that an evaluation under the same protocol draws. They are drawn in parts that stay beside the
file until it is whole, so that a call that was broken off goes on; several processes take parts in turn.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import nn

from vfmlab import config, data
from vfmlab.config.files import beside, read_json
from vfmlab.errors import DataError, VfmlabError
from vfmlab.evaluation import npz, prompts
from vfmlab.evaluation.generation import drawn
from vfmlab.evaluation.precision import tf32
from vfmlab.evaluation.protocol import dump
from vfmlab.evaluation.ranks import ALONE, Ranks
from vfmlab.evaluation.reconstruction import Progress
from vfmlab.evaluation.roundtrip import as_saved, evaluating
from vfmlab.runs import write_json
from vfmlab.tokenizers.base import Tokenizer

PART, FORMAT = 512, "vfmlab/npz-1"
NOT_DRAWN = ("batch", "features", "reference")  # fields of a protocol that change no sample


def facts(protocol: config.Protocol, source: data.ImageSource | None = None, **more: Any) -> dict[str, Any]:
    """What decides the samples, and so whether parts that lie there are theirs. source: of held-out images,
    which prompts may come from. more: run, weights."""
    if protocol.prompts is not None:
        more["prompts"] = prompts.mark(protocol, source)
    return more | {"protocol": {k: v for k, v in dump(protocol).items() if k not in NOT_DRAWN}}


def place(run: Path, n: int, about: dict[str, Any]) -> Path:
    """The file of n such samples in the directory of their run."""
    return run / "npz" / f"{n}-{config.digest(about)}.npz"


def earlier(run: Path, protocol: config.Protocol, size: int, about: dict[str, Any]) -> npz.Reference | None:
    """The samples of a protocol in the directory of their run, where they have been drawn."""
    path = place(run, protocol.n, about)
    return npz.open_reference(path, size) if path.exists() else None


def write(network: nn.Module, tokenizer: Tokenizer, protocol: config.Protocol, num_classes: int,
          path: Path, about: dict[str, Any], seed: int = 0, ranks: Ranks = ALONE,
          progress: Progress | None = None) -> Path:
    """Draw protocol.n samples into `path`; beside it, `NAME.json` says what they are.

    Args:
        network, tokenizer, num_classes, seed: as in
            :func:`~vfmlab.evaluation.generation.evaluate_generation`. about: what :func:`facts` gave.
        progress: called with (samples that are there, samples in all), of all processes together.

    Raises:
        DataError: a file or parts of other samples lie there already, or another call draws them; samples
            that are not finite.
    """
    with _alone(path, ranks):
        return _write(network, tokenizer, protocol, num_classes, path, about, seed, ranks, progress)


@contextmanager
def _alone(path: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the place for one call, whose parts no other writes; the system drops it with the process."""
    lock = filelock.FileLock(path.parent / f".{path.name}.lock", thread_local=False)
    try:
        if ranks.main:
            lock.acquire(timeout=0)
    except filelock.Timeout:
        way = "wait for it, or give another --out"
        raise DataError(f"'{path}' is being drawn by another call; {way}") from None
    try:
        yield
    finally:
        lock.release()


def _write(network: nn.Module, tokenizer: Tokenizer, protocol: config.Protocol, num_classes: int,
           path: Path, about: dict[str, Any], seed: int, ranks: Ranks, progress: Progress | None) -> Path:
    manifest, folder = path.with_suffix(".json"), path.with_suffix(".parts")
    stamp = config.digest(about)
    ranks.agree("samples", stamp)
    _refuse_others(path, manifest, stamp)
    ranks.wait()  # until every process has looked
    if path.exists():
        return path
    if ranks.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(manifest, {"format": FORMAT, "stamp": stamp, **about})
    ranks.wait()
    starts = range(0, protocol.n, PART)
    parts = {start: folder / f"{start:08d}.npy" for start in starts}
    mine = [start for k, start in enumerate(starts) if k % ranks.count == ranks.index]
    with evaluating(network, tokenizer), tf32(False):
        for start in mine:
            stop = min(start + PART, protocol.n)
            if not (parts[start].exists() and npz.rows(parts[start], tokenizer.size) == stop - start):
                batches = torch.arange(start, stop).split(protocol.batch)
                images = [data.to_uint8(as_saved(batch)).permute(0, 2, 3, 1).cpu().numpy()
                          for batch in drawn(network, tokenizer, protocol, batches, num_classes, seed)]
                with beside(parts[start]) as temporary, open(temporary, "wb") as file:
                    np.save(file, np.concatenate(images))
            if progress is not None and ranks.main:
                progress(min(PART * sum(part.exists() for part in parts.values()), protocol.n), protocol.n)
    ranks.wait()
    if ranks.main:
        npz.write(path, list(parts.values()), tokenizer.size)
        shutil.rmtree(folder)
    ranks.wait()
    return path


def _refuse_others(path: Path, manifest: Path, stamp: str) -> None:
    """A :class:`DataError` where the place is taken by anything but these samples."""
    try:
        known = read_json(manifest).get("stamp")
    except VfmlabError:
        known = None
    taken = path.exists() or path.with_suffix(".parts").exists() or manifest.exists()
    if taken and known != stamp:
        raise DataError(f"'{path}' or what lies beside it belongs to other samples; give another --out, or "
                        "move it away")
