"""Shared fixtures: reference data is looked for in VFMLAB_SHARED or ../shared; its absence is named in the skips."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background of a script: Ctrl-C is what some tests send
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault of an example
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """Every training looks for garbage once; what was imported before a module's tests is not looked through again."""
    gc.collect()
    gc.freeze()


LONG = ("notebooks", "executor", "sweep", "distributed", "widgets", "correlation", "app", "app_safety", "stages", "presets")


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that no process is left alone with one of them (`--no-loadscope-reorder`)."""
    order = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


def pytest_unconfigure():
    gc.unfreeze()


def _shared(part: str) -> Path:
    base = Path(os.environ.get("VFMLAB_SHARED", ROOT.parent / "shared"))
    path = base / part
    if not path.is_dir():
        pytest.skip(f"no reference folder '{part}': set VFMLAB_SHARED to the folder that holds it")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference inputs, weights and outputs (see its README)."""
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images: `cifar10` (parquet) and `clothing256` (ImageFolder)."""
    return _shared("data")
