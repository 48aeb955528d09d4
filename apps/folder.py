"""The server's own temporary folder: closed to others, removed with it, swept after a server that died."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

PREFIX = "vfmlab_app_"
HOUR = 3600.0  # seconds that results and uploads are held
EXAMPLES = "examples"  # a folder inside that lives as long as the server


_open: list[tuple[Path, filelock.BaseFileLock, str | None]] = []  # this process's folder, once a server


@contextlib.contextmanager
def private() -> Iterator[Path]:
    """A folder for gradio's files, of mode 0700, locked and there as long as a server of this process."""
    if not _open:
        sweep_dead()
        folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))  # no sweep takes this name; first the lock
        lock = filelock.FileLock(folder / ".lock", thread_local=False)
        lock.acquire(timeout=0)
        folder = folder.rename(folder.with_name(folder.name[1:])).resolve()
        (folder / EXAMPLES).mkdir()
        _open.append((folder, lock, os.environ.get("GRADIO_TEMP_DIR")))
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
    else:
        _open.append(_open[0])
    try:
        yield _open[0][0]
    finally:
        folder, lock, before = _open.pop()
        if not _open:
            os.environ.pop("GRADIO_TEMP_DIR", None)
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()


def sweep_dead() -> list[str]:
    """Remove folders of this user's servers that were killed; a locked one belongs to a live server."""
    removed = []
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            with filelock.FileLock(folder / ".lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder.name)
        except (OSError, filelock.Timeout):
            continue
    return removed


def sweep(folder: Path, older: float = HOUR) -> int:
    """Delete results, uploads and parts of uploads that are `older` (seconds); how many."""
    since, count = time.time() - older, 0
    for path in sorted(folder.rglob("*"), reverse=True):  # files before the folders that hold them
        if path.name == ".lock" or path.is_relative_to(folder / EXAMPLES):
            continue
        with contextlib.suppress(OSError):  # a folder that is not empty, a file that is gone
            if path.lstat().st_mtime < since:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
                count += 1
    if count:
        logging.getLogger("vfmlab.app").info("%d old files deleted", count)
    return count
