"""Installation: pinned versions, a stamp that saves the second call, a core that runs without the optional extras."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = [
    *("gradio", "plotly", "diffusers", "datasets", "webdataset", "torch_fidelity", "tensorboard"),
    *("jupyterlab", "IPython", "ipywidgets", "ipykernel", "papermill", "jupytext", "nbconvert", "nbformat", "optuna", "dask", "distributed", "dask_jobqueue"),
]
# These exist to draw and to drive notebooks, so they may import an extra at their head; nothing else may.
PRESENTATION = [
    *(f"vfmlab.{name}" for name in ("plots", "widgets", "studies")),
    "vfmlab.weights.pipeline",  # classes of diffusers
]

# What is hidden is not found, as if it were not installed: neither by `import` nor by `find_spec`.
HIDE = """
import sys
class Hide:
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in found if spec is not None), None)
    def find_distributions(self, *context):
        for finder in self.finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(*context)
sys.meta_path[:] = [Hide(sys.meta_path[:])]
"""


def run_python(code: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280, **more)


def test_constraints_are_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(lines) > 50
    for line in lines:
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[A-Za-z0-9.!+-]+( ; [^:@/]+)?", line), line


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {re.split(r"[\[<>=~! ;]", item)[0].lower().replace("_", "-") for item in wanted} - {"vfmlab"}
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names <= pinned, sorted(names - pinned)


def test_conda_environment_installs_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    assert "constraints.txt" in text
    assert "-e .[all,dev]" in text
    assert "://" not in text


def make(*args: str, **more) -> subprocess.CompletedProcess:
    """As from a shell of its own: a make around the tests would hand down its flags and its level."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *args], capture_output=True, text=True, timeout=60, env=env, **more)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what installation reads, with an environment that only claims to be installed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    return tmp_path


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_second_install_has_nothing_to_do(checkout: Path):
    assert make("-q", "install", cwd=checkout).returncode == 1, "an environment without the stamp is not installed"
    (checkout / ".venv" / ".installed").touch()
    assert make("-q", "install", cwd=checkout).returncode == 0
    done = make("install", cwd=checkout)
    assert done.returncode == 0
    assert "installing" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_changed_pins_are_installed(checkout: Path):
    import os

    stamp = checkout / ".venv" / ".installed"
    stamp.touch()
    later = stamp.stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert make("-q", "install", cwd=checkout).returncode == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_old_python_is_refused_in_one_line(checkout: Path):
    old = checkout / "oldpython"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo "Python 3.9.1";; *) exit 1;; esac\n')
    old.chmod(0o755)
    done = make("install", f"PYTHON={old}", cwd=checkout)
    assert done.returncode != 0
    first = done.stderr.splitlines()[0]
    assert "needs Python >= 3.11" in first
    assert "Python 3.9.1" in first
    assert not (checkout / ".venv" / ".installed").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("value", ["it's", 'say "x"', "a b", "$(x) `id`", '{"seed": 1}'])
def test_make_passes_values_as_they_are(checkout: Path, value: str):
    """Quotes, spaces and dollars of a path or of JSON are characters, not shell."""
    python = checkout / ".venv/bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\n" "$word"; done\n')
    python.chmod(0o755)
    (checkout / ".venv" / ".installed").touch()
    given = value.replace("$", "$$")  # make's own way to write a dollar
    done = make("demo", f"DATA={given}", f"OVERRIDES={given}", f"ROOT={given}", cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["-m", "vfmlab", "demo", "--data", value, "--overrides", value, "--root", value]
    assert make("app", f"ROOT={given}", cwd=checkout).stdout.splitlines()[-1] == f"{value}/runs"
    assert make("demo", cwd=checkout).stdout.splitlines() == ["-m", "vfmlab", "demo", "--root", "demo"]
    numbers = make("site", "NOTEBOOKS=02 07", f"OVERRIDES={given}", cwd=checkout).stdout.splitlines()
    assert numbers == ["-m", "vfmlab", "site", "--overrides", value, "--notebooks", "02", "07", "--root", "demo/runs"]


def test_import_is_light():
    heavy = ["torch", "timm", "numpy", "pydantic", "gradio"]
    done = run_python(f"import sys, vfmlab; print([m for m in {heavy} if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_core_needs_no_optional_extra():
    """Every core module imports with the extras' packages missing: they are imported where they are used."""
    code = HIDE.format(names=OPTIONAL) + (
        "import importlib, pkgutil, vfmlab\n"
        "names = [m.name for m in pkgutil.walk_packages(vfmlab.__path__, 'vfmlab.')]\n"
        f"names = [n for n in names if not n.endswith('__main__') and not n.startswith(tuple({PRESENTATION}))]\n"
        "for name in names: importlib.import_module(name)\n"
        f"assert not set({OPTIONAL}) & {{m.split('.')[0] for m in sys.modules}}\n"
        "print(len(names))\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 10


@pytest.mark.parametrize(("command", "missing"), [("compare tiny_plain_vae", "plotly"), ("app", "gradio"), ("sweep a.ipynb --grid b.yaml", "jupytext")])
def test_a_command_without_its_extra_is_told_in_one_line(command: str, missing: str):
    done = run_python(HIDE.format(names=OPTIONAL) + f"from vfmlab.cli import main; sys.exit(main.main({command.split()}))")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"needs {missing}" in done.stderr
    assert "uv pip install" in done.stderr


def test_links_of_the_manual_lead_somewhere():
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken
