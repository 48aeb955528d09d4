"""Tensors of a whole data set on disk, in shards that are written once, memory-mapped and read at random.

    <directory>/meta.json                meta data, with "format", "fingerprint", "count", "shard" (images a
    shard)
                <name>-00000.safetensors tensors with one row per image; -00001 ...

Files are written beside and renamed, one shard at a time, so an interrupted pass goes on with the missing
shards. Each carries a digest of its tensors, so that a damaged one is refused. A key with the suffix `_flip`
holds the same of the mirrored images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import torch
from torch import Tensor

from vfmlab.data.stream import from_thread
from vfmlab.errors import CheckpointError
from vfmlab.runs import write_json
from vfmlab.weights import io

PATIENCE = 1800.0  # seconds without a batch of theirs after which other processes count as dead
Read = Callable[[Tensor], Any]
Encode = Callable[[Tensor, Any], dict[str, Tensor]]


def files(directory: Path, name: str, meta: dict[str, Any]) -> list[Path]:
    return [directory / f"{name}-{k:05d}.safetensors" for k in range(-(-meta["count"] // meta["shard"]))]


def read_meta(directory: Path, form: str, what: str) -> dict[str, Any] | None:
    """The folder's meta data, None where there is none; :class:`CheckpointError` for another format."""
    file = directory / "meta.json"
    if not file.exists():
        return None
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        assert meta["format"] == form
        return meta
    except (ValueError, KeyError, TypeError, AssertionError):
        raise CheckpointError(
            f"'{file}' does not describe a {what}; delete the folder to encode again") from None


class What(NamedTuple):
    """A kind of folder. name: of its files and what they hold; of: whose that is. cache, form: of the
    whole."""

    name: str
    of: str
    cache: str
    form: str


def begun(directory: Path, what: What, wanted: str, **facts: Any) -> dict[str, Any]:
    """The meta data of a folder, `facts` where it has none yet; :class:`CheckpointError` for another one."""
    new = {"format": what.form, "fingerprint": wanted, **facts}
    meta = read_meta(directory, what.form, what.cache) or new
    _check(meta, wanted, directory, what)
    return meta


def finished(directory: str | Path, what: What, build: str, wanted: str | None = None, rank: int = 0,
             world: int = 1) -> Shards:
    """The content of a finished folder, which has the fingerprint `wanted`. build: what makes one, for the
    message where there is none."""
    meta = read_meta(Path(directory), what.form, what.cache)
    if meta is None:
        raise CheckpointError(f"no {what.cache} in '{directory}'; encode one with {build}")
    _check(meta, wanted, directory, what)
    return Shards(Path(directory), what.name, meta, rank, world)


def _check(meta: dict[str, Any], wanted: str | None, directory: str | Path, what: What) -> None:
    if wanted not in (None, meta["fingerprint"]):
        raise CheckpointError(f"{what.name} in '{directory}' are of another {what.of}, data set or options "
                              f"({meta['fingerprint']}, wanted {wanted}); delete the folder to encode again, "
                              "or name another")


def fingerprint(*what: Any) -> str:
    """16 hex digits of all that decides a folder."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def write(directory: Path, name: str, meta: dict[str, Any], read: Read, encode: Encode, batch: int, rank: int,
          world: int) -> Iterator[tuple[int, int]]:
    """Fill the shards that are missing; yields (images done, images in all) on the way.

    Two programs that need the same folder fill it one after the other, so that nothing is encoded twice.

    Args:
        meta: written first, if there is none yet. read: indices (long B) -> what is encoded, called in a
        thread ahead of the rest. encode: the indices and what was read -> rows of each tensor, on the CPU.
        rank, world: of several processes each fills every world-th shard, then waits for the others.
    """
    directory.mkdir(parents=True, exist_ok=True)
    total, every = meta["count"], files(directory, name, meta)
    lock = filelock.FileLock(directory / f".{name}-{rank}-of-{world}.lock", thread_local=False)
    while not _acquired(lock):
        yield min(sum(file.exists() for file in every) * meta["shard"], total), total
    try:
        if not (directory / "meta.json").exists():
            write_json(directory / "meta.json", meta)
        done = 0
        for number, file in list(enumerate(every))[rank::world]:
            for leftover in directory.glob(f".{file.name}.*.tmp"):
                leftover.unlink(missing_ok=True)  # of a killed process: nobody else writes this shard now
            first, last = number * meta["shard"], min((number + 1) * meta["shard"], total)
            if _whole(file):
                done += last - first
                continue
            parts: dict[str, list[Tensor]] = {}
            slices = torch.arange(first, last).split(batch)
            with contextlib.closing(from_thread(_Reads(slices, read), 0, len(slices))) as arrived:
                for indices, content in zip(slices, arrived, strict=True):
                    for key, value in encode(indices, content).items():
                        parts.setdefault(key, []).append(value)
                    Path(lock.lock_file).touch()  # a sign of life: a shard may take hours
                    done += len(indices)
                    yield min(done * world, total), total
            rows = {key: torch.cat(value) for key, value in parts.items()}
            io.write(file, rows, {"fingerprint": meta["fingerprint"], "digest": io.digest(rows)})
    finally:
        lock.release()
    _wait(every, directory, f".{name}-*-of-{world}.lock")
    yield total, total


class _Reads:
    """Number of a slice -> what is read of it."""

    def __init__(self, slices: Sequence[Tensor], read: Read):
        self.slices, self.read = slices, read

    def __getitem__(self, number: int) -> Any:
        return self.read(self.slices[number])


def _acquired(lock: filelock.FileLock) -> bool:
    with contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=0.2)
    return lock.is_locked


def _whole(file: Path) -> bool:
    """Whether `file` is there with a digest; those of earlier versions have none and are encoded anew."""
    if not file.exists():
        return False
    try:
        return "digest" in io.metadata(file)
    except CheckpointError:
        return True  # broken, which is not covered up: whoever opens it is told


def _wait(every: list[Path], directory: Path, locks: str) -> None:
    """Until the other processes have written theirs. locks: a glob of what each touches after a batch."""
    seen, since = None, time.monotonic()
    while left := sum(not file.exists() for file in every):
        signs = [left, *sorted(lock.stat().st_mtime_ns for lock in directory.glob(locks))]
        if signs != seen:
            seen, since = signs, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            raise CheckpointError(f"{left} shards of '{directory}' are not coming from other processes; "
                                  "start again")
        time.sleep(0.2)


class Shards:
    """Random access to a finished folder.

    Args:
        rank, world: of several processes each holds every world-th shard against its digest, which reads it
            whole.

    Raises:
        CheckpointError: an incomplete one, or one with a shard that is broken, of another folder, or not as
        it was written.
    """

    def __init__(self, directory: Path, name: str, meta: dict[str, Any], rank: int = 0, world: int = 1):
        self.meta, self.fingerprint, self.size = meta, meta["fingerprint"], meta["shard"]
        self.parts = [self._open(file, mine=number % world == rank)
                      for number, file in enumerate(files(directory, name, meta))]

    def _open(self, file: Path, mine: bool) -> dict[str, Tensor]:
        if (stored := io.cached(file)) is None:
            raise CheckpointError(f"'{file}' is missing or broken; delete it and build again")
        tensors, facts = stored
        if facts.get("fingerprint") != self.fingerprint:
            raise CheckpointError(f"'{file}' does not belong to the cache beside it; delete it and build "
                                  "again")
        if mine and facts.get("digest") != io.digest(tensors):
            raise CheckpointError(f"'{file}' is damaged: its content is not what was written; delete it and "
                                  "build again")
        return tensors

    def rows(self, key: str, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Rows `indices` (long B) of `key`, real numbers in fp32. flip: bool B, which of them of the mirrored
        images.
        """
        stored = self.parts[0][key]
        kind = torch.float32 if stored.is_floating_point() else stored.dtype
        out = torch.empty(len(indices), *stored.shape[1:], dtype=kind)
        shard = indices.div(self.size, rounding_mode="floor")
        turned = torch.zeros_like(indices, dtype=torch.bool) if flip is None else flip
        for number in shard.unique().tolist():
            for suffix, side in (("", ~turned), ("_flip", turned)):
                chosen = ((shard == number) & side).nonzero().squeeze(1)
                if len(chosen):
                    out[chosen] = self.parts[number][key + suffix][indices[chosen] % self.size].to(kind)
        return out


def mapped(function: Callable[[Any], Any], stream: Any) -> Iterator[Any]:
    """Each of a stream's batches through `function`; closed, it closes the stream."""
    with contextlib.closing(stream):
        yield from map(function, stream)
