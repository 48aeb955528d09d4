"""Run directories: what a run is, how far it got, and what it measured, as plain files that no reader sees half of.

    <root>/<id>/  config.json env.json status.json metrics.jsonl bad_steps.jsonl
                  checkpoints/{model,ema}.safetensors, state.pt   latent_stats.safetensors   images/   report.json

Files are written beside and renamed; the two .jsonl files are only appended to. This module does not import torch, so
listing runs is quick.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import filelock
import psutil

from vfmlab.config import Run, parse
from vfmlab.errors import RunBusy, RunError, TrainingError, nearest

State = Literal["created", "running", "interrupted", "failed", "finished"]
TIMING = ("seconds", "samples_per_second")  # the only fields of a metrics record that differ between equal runs
HEARTBEAT = 300.0  # seconds without a sign of life after which a run on another machine counts as dead
LIBRARIES = ("vfmlab", "torch", "torchvision", "timm", "accelerate", "numpy", "safetensors", "torchmetrics")


@dataclass(frozen=True)
class Status:
    """How far a run is. samples, total: images seen and the budget; seconds: spent training, over all starts."""

    state: State = "created"
    samples: int = 0
    total: int = 0
    message: str = ""
    seconds: float = 0.0
    created: float = 0.0
    heartbeat: float = 0.0
    pid: int = 0
    born: float = 0.0  # start time of process `pid`: process numbers are reused
    host: str = ""

    @property
    def alive(self) -> bool:
        """Whether the process that last wrote this still runs."""
        if self.host != socket.gethostname():
            return time.time() - self.heartbeat < HEARTBEAT
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.born) < 1.0
        except psutil.Error:
            return False


@dataclass(frozen=True)
class RunDir:
    """One run on disk. Reading never fails on a file that is not there yet."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def ema(self) -> Path:
        """Averaged weights: what everything but training uses."""
        return self.checkpoints / "ema.safetensors"

    @property
    def model(self) -> Path:
        """Weights as trained, not averaged."""
        return self.checkpoints / "model.safetensors"

    @property
    def images(self) -> Path:
        return self.path / "images"

    @property
    def latent_stats(self) -> Path:
        return self.path / "latent_stats.safetensors"

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """config.json as a dict, not validated (quick: no parts are imported)."""
        config = _read_json(self.path / "config.json")
        if not isinstance(config, dict):
            raise RunError(f"'{self.path}' is not a run: it has no readable config.json")
        return config

    def config(self) -> Run:
        return parse(self.raw_config, f"{self.id}/config.json")

    @property
    def kind(self) -> str:
        """'pretrain', 'tokenizer' or 'diffusion', as `Run.kind`."""
        if self.raw_config.get("pretrain") is not None:
            return "pretrain"
        return "diffusion" if self.raw_config.get("diffusion") is not None else "tokenizer"

    # -- status -----------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """What status.json says; a run whose process is gone shows as interrupted."""
        written = _read_json(self.path / "status.json")
        known = {field.name for field in fields(Status)}
        status = Status(**{k: v for k, v in written.items() if k in known}) if isinstance(written, dict) else Status()
        if status.state == "running" and not status.alive:
            message = "the process ended without saying so; start the run again to go on"
            status = replace(status, state="interrupted", message=message)
        return status

    def set_status(self, **changes: Any) -> Status:
        """Write status.json with `changes`, this process as its author and a fresh heartbeat."""
        process = psutil.Process()
        author = {"pid": process.pid, "born": process.create_time(), "host": socket.gethostname()}
        status = replace(self.status(), heartbeat=time.time(), **author, **changes)
        write_json(self.path / "status.json", asdict(status))
        return status

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for training. The lock of a dead process is free at once (the system drops it).

        An old stop request is dropped: it was for the process before.

        Raises:
            RunBusy: another process holds it.
        """
        held = filelock.FileLock(self.path / ".lock", thread_local=False)
        try:
            held.acquire(timeout=0)
        except filelock.Timeout:
            pid = self.status().pid
            raise RunBusy(
                f"run '{self.id}' is being trained by process {pid}; wait for it, stop it, or change the name or seed"
            ) from None
        try:
            for leftover in [*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")]:
                leftover.unlink(missing_ok=True)  # of a killed process; nobody else writes now
            self._stop.unlink(missing_ok=True)
            yield
        finally:
            held.release()

    @property
    def _stop(self) -> Path:
        return self.path / "stop"

    def request_stop(self) -> None:
        """Ask the process that trains this run, wherever it is, to save and end: it looks for this file at every step."""
        self._stop.touch()

    @property
    def stop_requested(self) -> bool:
        return self._stop.exists()

    # -- metrics ----------------------------------------------------------------------------------------------------

    def log(self, record: dict[str, Any], file: str = "metrics.jsonl") -> None:
        """Append one record. Non-finite numbers become null (JSON has none)."""
        line = json.dumps(_finite(record), separators=(",", ":")) + "\n"
        with _full_disk(self.path / file), open(self.path / file, "ab+") as handle:
            if handle.tell() and not _ends_with_newline(handle):
                line = "\n" + line  # the last writer was killed in the middle of a line
            handle.write(line.encode())

    def metrics(self, kind: str | None = None, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """Records in order, of one `kind` ("step", "evaluation") or all; a torn line is left out."""
        records = _read_jsonl(self.path / file)
        return [r for r in records if kind is None or r.get("kind") == kind]

    def truncate(self, step: int, done: Collection[str] | None = None) -> None:
        """Drop torn lines and the records after `step`: those a killed run had logged past its last checkpoint.

        done: of the records of `step` itself, keep these kinds only ("step", "evaluation", "bad"); None: all.
        """
        def keep(kind: str) -> bool:
            return done is None or kind in done

        for file in ("metrics.jsonl", "bad_steps.jsonl"):
            path = self.path / file
            if path.exists():
                kept = [r for r in _read_jsonl(path) if r["step"] < step or (r["step"] == step and keep(r["kind"]))]
                write_atomic(path, "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in kept))

    def report(self) -> dict[str, Any] | None:
        """report.json, or None before the first evaluation."""
        return _read_json(self.path / "report.json")

    def save_report(self, report: dict[str, Any]) -> None:
        write_json(self.path / "report.json", report)

    def env(self) -> dict[str, Any]:
        return _read_json(self.path / "env.json") or {}

    def save_env(self, **facts: Any) -> None:
        """Write env.json: versions, platform, commit and `facts` (device, threads, ...); earlier ones are kept."""
        old, new = self.env(), {**environment(), **facts}
        history = old.pop("earlier", [])
        if old and old != new:
            history = [*history, old]
        write_json(self.path / "env.json", {**new, "earlier": history})


def create(run: Run, root: str | Path = "runs") -> RunDir:
    """The directory of `run` under `root`, made if it is not there. The same config always gives the same directory.

    The protocol may differ from the stored one (it decides numbers, not weights); the newest is stored. Anything else
    that differs raises :class:`RunError`.
    """
    run_dir = RunDir(Path(root) / run.id)
    new = run.model_dump(mode="json")
    if (run_dir.path / "config.json").exists():
        old = run_dir.raw_config
        field = _difference({**old, "protocol": None}, {**new, "protocol": None})
        if field:
            raise RunError(
                f"run directory '{run_dir.path}' holds another config (it differs in '{field}'); "
                "rename the run or move the directory away"
            )
        if old == new:
            return run_dir
    try:
        run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
        run_dir.images.mkdir(exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise RunError(f"cannot make run directory '{run_dir.path}': {error.strerror}; choose another root") from None
    if not (run_dir.path / "status.json").exists():
        run_dir.set_status(total=0 if run.budget is None else run.budget.samples, created=time.time())
    write_json(run_dir.path / "config.json", new)  # last: a directory with a config is a run
    return RunDir(run_dir.path)


@contextmanager
def starting(run: Run, root: str | Path = "runs") -> Iterator[RunDir]:
    """The directory of `run`, as :func:`create`; made now and left with an error before the run began, it goes again."""
    there = (Path(root) / run.id).exists()
    folder = create(run, root)
    try:
        yield folder
    except BaseException:
        if not there and folder.status().state == "created":
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def open_run(ref: str | Path, root: str | Path = "runs", kind: str | None = None) -> RunDir:
    """The run that `ref` names: an id, a unique prefix of one, or a directory.

    Where a prefix matches several, runs of the asked `kind` win, then the run whose whole name is `ref`.
    """
    ref = str(ref)
    if not ref:
        raise RunError("the run's name is empty; give an id, a unique prefix or a directory")
    runs = scan(root)
    for run in runs:
        if run.id == ref:
            return run
    matches = [run for run in runs if run.id.startswith(ref)]
    if not matches and Path(ref).is_dir():
        run = RunDir(Path(ref).resolve())
        _ = run.raw_config
        return run
    for narrower in (lambda r: kind is None or r.kind == kind, lambda r: r.id.rpartition("-")[0] == ref):
        narrowed = [run for run in matches if narrower(run)]
        matches = narrowed or matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(run.id for run in matches[:8])
        raise RunError(f"'{ref}' fits {len(matches)} runs: {names}; give more letters")
    hint = nearest(ref, [run.id for run in runs]) or f" ('{root}' holds no runs)"
    raise RunError(f"unknown run '{ref}'{hint}")


def scan(root: str | Path = "runs") -> list[RunDir]:
    """All runs under `root`, oldest first. Foreign, empty and half-written folders are left out."""
    root = Path(root)
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        config = _read_json(path / "config.json") if path.is_dir() else None
        if isinstance(config, dict) and "name" in config and "data" in config:
            run = RunDir(path)
            found.append((run.status().created or (path / "config.json").stat().st_mtime, run.id, run))
    return [run for *_, run in sorted(found, key=lambda item: item[:2])]


# -- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; left without an error, it is flushed to disk and renamed over `path`.

    Raises :class:`TrainingError` when the disk is full; `path` is then as it was and the temporary file is gone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _full_disk(path):
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Make renames inside `folder` durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    with beside(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """JSON with two spaces of indentation; non-finite numbers become null."""
    write_atomic(path, json.dumps(_finite(value), indent=2) + "\n")


@contextmanager
def _full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        # safetensors and torch.save report the system's error as text only
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "os error 28" in str(error):
            free = shutil.disk_usage(path.parent).free / 2**20
            raise TrainingError(
                f"disk full while writing '{path}' ({free:.0f} MiB free); earlier files are intact: "
                "free space and start the run again, it goes on"
            ) from None
        raise


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    records = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return records
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _ends_with_newline(handle: Any) -> bool:
    handle.seek(-1, os.SEEK_END)
    return handle.read(1) == b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _difference(old: Any, new: Any, at: str = "") -> str:
    """Dotted name of the first field in which two JSON trees differ; "" if they are equal.

    A field that is null is as good as none, as in run ids: a run goes on under a version that knows more fields.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            here = f"{at}.{key}".lstrip(".")
            found = _difference(old.get(key), new.get(key), here)
            if found:
                return found
        return ""
    return "" if old == new else at


def environment() -> dict[str, Any]:
    """Versions, platform and the commit of the working tree (None outside one)."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, "versions": versions, "commit": _commit()}


def _commit() -> str | None:
    tree = Path(__file__).resolve().parents[1]
    if not (tree / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tree), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
