"""Files: paths as people type them, JSON from anywhere, and writing of which no reader sees half."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psutil
import yaml

from vfmlab.errors import ConfigError, TrainingError, VfmlabError

LARGEST = 2**26  # bytes of a JSON file
LONGEST = 2**30  # bytes of a .jsonl file
STALE = 3600.0  # seconds after which the temporary file of a process that is gone is removed
DEEPEST = 64  # lists and objects inside each other


def expand(path: str | Path) -> Path:
    """`path` with a leading `~` or `~NAME` replaced by that home folder.

    Raises:
        ConfigError: no such user, or a character that no path can hold.
    """
    if "\0" in str(path):
        raise ConfigError(f"path {str(path)!r} holds a null character; give another one")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"path '{path}': no such home folder; a file of this name is './{path}'") from None


def absolute_source(source: Any) -> Any:
    """A data source or text encoder with an absolute path: the same words in two folders are two runs."""
    kind, colon, path = str(source).partition(":")
    local = kind in ("folder", "parquet", "wds", "pocket") or (
        kind in ("hf", "transformers") and (path[:1] in (".", "~") or os.path.exists(path)))
    if not local or not path or "://" in path or path.startswith(("{", "pipe:")):
        return source
    return f"{kind}{colon}{os.path.abspath(os.path.expanduser(path))}"


def root_folder(root: str | Path = "runs") -> Path:
    """The folder that `root` names.

    The default, "runs", is $VFMLAB_ROOT if that is set; else `runs` of the checkout where the working
    directory lies inside it (so that notebooks and the command line share their runs); else `./runs`.
    """
    if Path(root) != Path("runs"):
        return expand(root)
    if os.environ.get("VFMLAB_ROOT"):
        return expand(os.environ["VFMLAB_ROOT"])
    checkout = Path(__file__).resolve().parents[2]
    here = Path.cwd().resolve()
    if checkout in here.parents and (checkout / "notebooks").is_dir():
        return checkout / "runs"
    return Path("runs")


def read_bytes(path: str | Path, most: int = LARGEST) -> bytes:
    """The content of a regular file of at most `most` bytes; pipes and devices are not opened.

    Raises:
        OSError: not there, not readable, not a regular file, or larger.
    """
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most / 2**20:.0f} MiB", str(path))
    return content


def parse_json(content: bytes | str, kind: type = dict, pairs: Callable[[list], Any] | None = None) -> Any:
    """A value of type `kind` from JSON in UTF-8 (a byte order mark is allowed), UTF-16 or UTF-32.

    Raises:
        ValueError: not JSON, another type, NaN or Infinity, or more than `DEEPEST` levels; with the reason.
    """
    try:
        value = json.loads(content, parse_constant=_no_constant, object_pairs_hook=pairs)
    except UnicodeDecodeError:
        raise ValueError("not JSON: it is not text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} levels deep") from None
    if not isinstance(value, kind):
        raise ValueError(f"holds a {type(value).__name__} in place of a {kind.__name__}")
    if nesting(value) > DEEPEST:
        raise ValueError(f"more than {DEEPEST} levels deep")
    return value


def nesting(value: Any) -> int:
    """How deep lists and objects of parsed JSON lie in each other, a plain value counted as 1."""
    level, depth = [value], 0
    while level:  # without recursion, which what comes from outside could exhaust
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level, depth = [value for values in inner for value in values], depth + 1
    return depth


def read_json(path: str | Path, error: type[VfmlabError] = ConfigError, what: str = "file",
              kind: type = dict) -> Any:
    """The JSON value, of type `kind`, in a regular file.

    Raises:
        error: one line with `what`, the path and the reason.
    """
    try:
        return parse_json(read_bytes(path), kind)
    except OSError as problem:
        raise error(f"{what} '{path}' cannot be read: {problem.strerror}; give another file") from None
    except ValueError as problem:
        raise error(f"{what} '{path}' is damaged: {problem}; put a copy back, or give another file") from None


def read_mapping(path: str | Path, what: str, loader: type = yaml.SafeLoader,
                 pairs: Callable[[list], Any] | None = None) -> dict[str, Any]:
    """The fields in a YAML file, or a JSON file (.json), as plain data; nothing in it is run.

    Args:
        loader: of YAML. pairs: makes a mapping of JSON from its (key, value) pairs.

    Raises:
        ConfigError: one line with `what`, the path and the reason.
    """
    path, kind = expand(path), "JSON" if str(path).endswith(".json") else "YAML"
    try:
        text = read_bytes(path).decode("utf-8-sig")
        tree = parse_json(text, dict, pairs) if kind == "JSON" else yaml.load(text, loader)
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
    except RecursionError:
        reason = "is nested too deeply"
    except (ValueError, yaml.YAMLError) as error:
        reason = f"cannot be used as {kind}: {' '.join(str(error).split())[:200]}"
    else:
        if isinstance(tree, dict):
            return tree
        reason = f"holds a {type(tree).__name__} in place of fields"
    raise ConfigError(f"{what} '{path}' {reason}; give a YAML or JSON file with fields")


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def holds_run(path: Path) -> bool:
    """Whether `path` is the directory of a run, even of a damaged one."""
    others = (path / "status.json", path / "checkpoints")
    return os.path.lexists(path / "config.json") and any(map(os.path.lexists, others))


def output_folder(path: str | Path, made: Callable[[Path], Any], overwrite: bool = False,
                  within: Path | None = None) -> Path:
    """`path` as a folder that a command may fill: new, empty, or filled by that command before.

    It is there and can be written when this returns, so that a mistake costs no work.

    Args:
        made: whether a folder with files in it is one that the command has filled. overwrite: take any
            folder. within: the one run in whose directory it may lie.

    Raises:
        ConfigError: a file, a folder inside a run or not writable, or other files in it.
    """
    folder, own = expand(path), None if within is None else expand(within).resolve()
    for place in (folder.absolute(), *folder.resolve().parents, folder.resolve()):
        if holds_run(place) and place.resolve() != own:
            raise ConfigError(f"'{path}' is inside run '{place.name}', which it would damage; choose another "
                              "folder")
    try:
        if folder.is_dir() and not overwrite and any(folder.iterdir()) and not made(folder):
            raise ConfigError(f"folder '{path}' holds other files; choose an empty or a new one")
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to folder '{path}': {error.strerror}; choose another one") from None
    return folder


def lines(path: Path) -> list[bytes]:
    """The lines of a .jsonl file, [] where there is none."""
    return read_bytes(path, LONGEST).splitlines() if os.path.lexists(path) else []


def records(path: Path) -> list[dict[str, Any]]:
    """Objects of a .jsonl file with a step (an int) and a kind (a str); torn and other lines are left out."""
    whole: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in lines(path):
            with contextlib.suppress(ValueError):
                record = parse_json(line)
                if type(record.get("step")) is int and isinstance(record.get("kind"), str):
                    whole.append(record)
    return whole


def differences(trees: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted name -> the value in each of `trees`, for the fields in which they are not all equal.

    A null is as good as none, as in run ids: a run goes on under a version that knows more fields.
    """

    def flat(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield from flat(value, f"{at}.{key}".lstrip("."))
        elif tree is not None:
            yield at, tree

    tables = [dict(flat(tree)) for tree in trees]
    names = sorted({name for table in tables for name in table})
    rows = {name: [table.get(name) for table in tables] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


# -- writing -----------------------------------------------------------------------------------------------


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; left without an error, it is flushed to disk and renamed over `path`.

    Raises:
        TrainingError: the disk is full; `path` is then as it was and the temporary file is gone.
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
        # safetensors reports the system's error as text only, torch.save puts one of its own over it
        full = (errno.ENOSPC, errno.EDQUOT), ("No space left", "os error 28")
        errors = [e for e in (error, error.__cause__, error.__context__) if e is not None]
        if any(getattr(e, "errno", None) in full[0] or any(text in str(e) for text in full[1])
               for e in errors):
            free = shutil.disk_usage(path.parent).free / 2**20
            raise TrainingError(f"disk full while writing '{path}' ({free:.0f} MiB free); earlier files are "
                                "intact: free space and start the run again, it goes on") from None
        raise


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one record to a .jsonl file. Non-finite numbers become null (JSON has none)."""
    line = json.dumps(_finite(record), separators=(",", ":")) + "\n"
    with _full_disk(path), open(path, "ab+") as handle:
        if handle.tell():
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":
                line = "\n" + line  # the last writer was killed in the middle of a line
        handle.write(line.encode())


def sweep(folder: Path) -> None:
    """Remove what killed processes left below `folder`.

    That is temporary files of :func:`beside` whose process is gone and that are older than `STALE`: another
    machine may be writing the younger ones.
    """
    for path in folder.rglob(".*.tmp"):
        pid = path.name.rsplit(".", 2)[-2]
        with contextlib.suppress(OSError, OverflowError):
            gone = pid.isdecimal() and not psutil.pid_exists(int(pid))
            if gone and time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
