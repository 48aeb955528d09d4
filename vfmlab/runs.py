"""Run directories: what a run is, how far it got, and what it measured, as plain files.

    <root>/<id>/  config.json env.json status.json metrics.jsonl bad_steps.jsonl  report.json  images/
                  checkpoints/{model,ema}.safetensors, state.pt   latent_stats.safetensors

Files are written beside and renamed, so that no reader sees half of one; the .jsonl files are only appended
to. New directories are closed to other users (mode 0700). Files may come from anywhere: a damaged one is
named and never stops the reading of other runs. This module does not import torch, so listing runs is quick.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import filelock
import psutil
from pydantic import TypeAdapter, ValidationError, create_model

from vfmlab.config import Kind, Phase, explain, files, kind_of, parse
from vfmlab.config.files import beside, differences, output_folder, root_folder, write_atomic, write_json
from vfmlab.errors import RunBusy, RunError, nearest
from vfmlab.registry import digests

__all__ = [
    "RunDir", "Status", "beside", "contrast", "create", "differences", "environment", "listing", "open_run",
    "output_folder", "root_folder", "scan", "starting", "write_atomic", "write_json",
]  # fmt: skip

Tree = dict[str, Any]
State = Literal["created", "running", "interrupted", "failed", "finished"]
HEARTBEAT = 300.0  # seconds without a sign of life after which a run on another machine counts as dead
SECTIONS = ("train", "vfm", "tokenizer", "imported", "diffusion", "ar", "pretrain", "protocol")  # or null
LIBRARIES = ("vfmlab", "torch", "torchvision", "timm", "accelerate", "numpy", "safetensors", "torchmetrics")


@dataclass(frozen=True)
class Status:
    """How far a run is.

    samples, total: images seen and the budget. seconds: spent training, over all starts. data: the training
    images, a line.
    """

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
    data: str = ""

    @property
    def alive(self) -> bool:
        """Whether the process that last wrote this still runs."""
        if self.host != socket.gethostname():
            return time.time() - self.heartbeat < HEARTBEAT
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.born) < 1.0
        except (psutil.Error, ValueError, OverflowError):  # the last two: numbers that no process has
            return False


_CONFIG = {"name": (str, ...), "data": (Tree, ...), **dict.fromkeys(SECTIONS, (Tree | None, None))}
SHAPES = {  # the types that readers of a run rely on; what else is in a file is left as it is
    "config.json": TypeAdapter(create_model("Config", **_CONFIG)),
    "status.json": TypeAdapter(Status),
    "report.json": TypeAdapter(create_model("Report", metrics=(Tree, {}))),
    "env.json": TypeAdapter(create_model("Env", earlier=(list[Tree], []))),
}


@dataclass(frozen=True)
class RunDir:
    """One run on disk. Reading never fails on a file that is not there yet.

    path: the directory, a str or a Path.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", files.expand(self.path))

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
    def raw_config(self) -> Tree:
        """config.json as a dict, of which only types of sections are checked (quick: no parts are imported).

        Raises:
            RunError: there is none, or it is damaged.
        """
        config = self._read("config.json")
        if not config:
            raise RunError(f"'{self.path}' is not a run: it has no config.json")
        return config

    def config(self) -> Phase:
        """What this run trains, or has trained."""
        return parse(self.raw_config, f"{self.id}/config.json").last

    @property
    def kind(self) -> Kind:
        return kind_of(self.raw_config)

    # -- status ---------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """What status.json says; "interrupted" where the process is gone or the file is damaged."""
        tree = self._sound("status.json")
        if tree is None:
            return Status("interrupted", message="status.json is damaged; start the run again to go on")
        status = SHAPES["status.json"].validate_python(tree)
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
        lock = filelock.FileLock(self.path / ".lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            pid = self.status().pid
            way = "wait for it, stop it, or change the name or seed"
            raise RunBusy(f"run '{self.id}' is being trained by process {pid}; {way}") from None
        try:
            for folder in (self.path, self.checkpoints, self.images):
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink(missing_ok=True)  # of a killed process; nobody else writes now
            self._stop.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    @property
    def _stop(self) -> Path:
        return self.path / "stop"

    def request_stop(self) -> None:
        """Ask the process that trains this run to save and end: it looks for this file at every step."""
        self._stop.touch()

    @property
    def stop_requested(self) -> bool:
        return self._stop.exists()

    # -- metrics --------------------------------------------------------------------------------------------

    def log(self, record: Tree, file: str = "metrics.jsonl") -> None:
        """Append one record. Non-finite numbers become null (JSON has none)."""
        files.append(self.path / file, record)

    def metrics(self, kind: str | None = None, file: str = "metrics.jsonl") -> list[Tree]:
        """Records in order, of one `kind` ("step", "evaluation") or all; a torn line is left out."""
        records = files.records(self.path / file)
        return [r for r in records if kind is None or r.get("kind") == kind]

    def truncate(self, step: int, done: Collection[str] | None = None) -> None:
        """Drop torn lines and records after `step`, logged past the last checkpoint by a killed run.

        done: of the records of `step` itself, keep these kinds only ("step", "evaluation", "bad"); None: all.
        """

        def stays(record: Tree) -> bool:
            same = record["step"] == step and (done is None or record["kind"] in done)
            return same or record["step"] < step

        for file in ("metrics.jsonl", "bad_steps.jsonl"):
            path = self.path / file
            if path.exists():
                records = filter(stays, files.records(path))
                write_atomic(path, "".join(json.dumps(r, separators=(",", ":")) + "\n" for r in records))

    def report(self) -> Tree | None:
        """report.json; None before the first evaluation, and where it is damaged."""
        return self._sound("report.json") or None

    def save_report(self, report: Tree) -> None:
        write_json(self.path / "report.json", report)

    def env(self) -> Tree:
        return self._sound("env.json") or {}

    def save_env(self, **facts: Any) -> None:
        """Write env.json: versions, platform, commit, `facts` (device, threads, ...), and the earlier
        ones."""
        old, new = self.env(), {**environment(), **facts}
        history = old.pop("earlier", [])
        if old and old != new:
            history = [*history, old]
        write_json(self.path / "env.json", {**new, "earlier": history})

    # -- any file -------------------------------------------------------------------------------------------

    def _read(self, name: str) -> Tree:
        """A JSON file of the run, {} where it is not there; :class:`RunError` where it is damaged."""
        path = self.path / name
        if not os.path.lexists(path):
            return {}
        tree = files.read_json(path, RunError, f"run '{self.id}':")
        try:
            SHAPES[name].validate_python(tree)
        except ValidationError as error:
            if {"library", "run"} <= tree.keys():
                way = "vfmlab.weights.export.from_pretrained reads it in Python"
                raise RunError(f"'{self.path}' is an export and no run; {way}") from None
            raise RunError(f"run '{self.id}': {name}: {explain(error, tree)}") from None
        return tree

    def _sound(self, name: str) -> Tree | None:
        """The same, but None where it is damaged: :meth:`faults` says so."""
        try:
            return self._read(name)
        except RunError:
            return None

    def faults(self) -> list[str]:
        """One line for each file of the run that is damaged, and therefore not used; [] for a whole run."""
        lines = []
        for name in SHAPES:
            try:
                self._read(name)
            except RunError as error:
                lines.append(str(error))
        try:
            bad = len(files.lines(self.path / "metrics.jsonl")) - len(self.metrics())
            if bad > 1:  # one: its writer was killed in the middle of a line
                lines.append(f"run '{self.id}': {bad} lines of metrics.jsonl are no records; they are left "
                             "out")
        except OSError as error:
            lines.append(f"run '{self.id}': metrics.jsonl cannot be read: {error.strerror}")
        return lines


def create(run: Phase, root: str | Path = "runs") -> RunDir:
    """The directory of `run` under `root`, new if it is not there; the same for the same config.

    The protocol may differ from the stored one (it decides numbers, not weights); the newest is stored.

    Raises:
        RunError: anything else differs, or the directory cannot be written.
    """
    root = root_folder(root)
    run_dir = RunDir(root / run.id)
    new = run.recipe.model_dump(mode="json")
    try:
        if os.path.lexists(run_dir.path / "config.json"):
            old = run_dir.raw_config
            for field in differences([{**old, "protocol": None}, {**new, "protocol": None}]):
                what = f"run directory '{run_dir.path}' holds another config (it differs in '{field}')"
                raise RunError(f"{what}; rename the run or move the directory away")
            if old == new:
                return run_dir
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        run_dir.path.mkdir(mode=0o700, exist_ok=True)
        run_dir.checkpoints.mkdir(exist_ok=True)
        run_dir.images.mkdir(exist_ok=True)
    except OSError as error:
        where = f"cannot make run directory '{run_dir.path}'"
        raise RunError(f"{where}: {error.strerror}; choose another root") from None
    if not (run_dir.path / "status.json").exists():
        run_dir.set_status(total=run.budget, created=time.time())
    write_json(run_dir.path / "config.json", new)  # last: a directory with a config is a run
    return RunDir(run_dir.path)


def finished(run: Phase, root: str | Path = "runs") -> bool:
    """Whether `run` is under `root` and trained to its end."""
    folder = RunDir(root_folder(root) / run.id)
    return (folder.path / "config.json").exists() and folder.status().state == "finished"


def settled(run: Phase, root: str | Path = "runs") -> bool:
    """Whether `run` is finished and its directory holds its protocol: :func:`create` changes nothing."""
    stored = finished(run, root) and RunDir(root_folder(root) / run.id).raw_config.get("protocol")
    return stored == run.recipe.model_dump(mode="json")["protocol"]


@contextmanager
def starting(run: Phase, root: str | Path = "runs") -> Iterator[RunDir]:
    """The directory of `run`, as :func:`create`; a new one goes again when an error comes before the run
    began."""
    there = os.path.lexists(root_folder(root) / run.id)
    folder = create(run, root)
    try:
        yield folder
    except BaseException:
        with suppress(RunBusy):  # another process has begun it
            if not there and folder.status().state == "created":
                with folder.lock():
                    shutil.rmtree(folder.path, ignore_errors=True)
        raise


def open_run(ref: str | Path, root: str | Path = "runs", kind: str | tuple[str, ...] | None = None) -> RunDir:
    """The run that `ref` names: an id, a unique prefix of one, or a directory.

    Where a prefix matches several, runs of this `kind` (or these) win, then one whose whole name is `ref`.

    Raises:
        RunError: none, several, or a damaged one.
    """
    ref, root = str(ref), root_folder(root)
    if not ref:
        raise RunError("the run's name is empty; give an id, a unique prefix or a directory")
    runs, broken = listing(root)
    for run in runs:
        if run.id == ref:
            return run
    if ref in broken:
        raise RunError(broken[ref])
    matches = [run for run in runs if run.id.startswith(ref)]
    if not matches and files.expand(ref).is_dir():
        run = RunDir(files.expand(ref).resolve())
        _ = run.raw_config
        return run
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for narrower in (lambda r: kind is None or r.kind in kinds, lambda r: r.id.rpartition("-")[0] == ref):
        narrowed = [run for run in matches if narrower(run)]
        matches = narrowed or matches
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(f"{id_} ({what})" if what else id_ for id_, what in contrast(matches[:8]).items())
        more = ", ..." if len(matches) > 8 else ""
        raise RunError(f"'{ref}' fits {len(matches)} runs: {names}{more}; give more letters")
    hint = nearest(ref, [run.id for run in runs]) or f" ('{root}' holds no runs)"
    raise RunError(f"unknown run '{ref}'{hint}")


def scan(root: str | Path = "runs") -> list[RunDir]:
    """All runs under `root`, oldest first. Foreign, empty and half-written folders are left out."""
    return listing(root)[0]


def listing(root: str | Path = "runs") -> tuple[list[RunDir], dict[str, str]]:
    """All runs under `root`, oldest first, and the folders whose config.json is damaged: name -> reason."""
    root = root_folder(root)
    rows, broken = [], {}
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        try:
            run = RunDir(path)
            _ = run.raw_config
            rows.append((run.status().created or (path / "config.json").stat().st_mtime, run.id, run))
        except RunError as error:
            if os.path.lexists(path / "config.json") and not _foreign(path / "config.json"):
                broken[path.name] = str(error)
        except OSError as error:
            broken[path.name] = f"'{path}' cannot be read: {error.strerror}"
    return [run for *_, run in sorted(rows, key=lambda row: row[:2])], broken


def _foreign(path: Path) -> bool:
    """Whether a config.json is whole, and somebody else's."""
    with suppress(RunError):
        config = files.read_json(path, RunError, kind=object)
        return not isinstance(config, dict) or "name" not in config or "data" not in config
    return False


def contrast(runs: Sequence[RunDir]) -> dict[str, str]:
    """Id -> the fields, as text, in which a run differs from others of its name; "" where there are none."""
    texts = {}
    for name in dict.fromkeys(run.raw_config["name"] for run in runs):
        same = [run for run in runs if run.raw_config["name"] == name]
        changed = differences([{**run.raw_config, "protocol": None} for run in same])
        for i, run in enumerate(same):
            own = []
            for name in run.raw_config.get("parts") or {}:
                which = (changed.get(f"parts.{name}.{fact}") for fact in ("source", "weight"))
                own.append(" ".join(["own", name, *(str(values[i]) for values in which if values)]))
            shown = own + [f"{field}={json.dumps(values[i])}" for field, values in changed.items()
                           if not field.startswith("parts")]
            texts[run.id] = " ".join(shown[:4]) + (" ..." if len(shown) > 4 else "")
    return texts


def environment() -> Tree:
    """Versions, platform, the commit of the working tree (None outside one), hashes of plug-ins."""
    versions, commit, own = dict.fromkeys(LIBRARIES), None, digests()
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    options = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True, "timeout": 10}
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    if (options["cwd"] / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(command, check=True, **options).stdout.strip()
    return {"python": platform.python_version(), "platform": platform.platform(), "versions": versions,
            "commit": commit, **({"plugins": own} if own else {})}
