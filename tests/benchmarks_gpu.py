"""`python tests/benchmarks_gpu.py`: training steps of whole phases on a GPU in fp32, bf16, and compiled; not a part of `make test`.

Every case is a process of its own that runs the phase's real step (forward, backward, clipping, optimizer) at its most expensive.
The cases of a group are built and compiled side by side, and timed one at a time. Networks have the published sizes and random
weights, images are drawn scenes: neither changes what a step costs. `--page FILE` writes the tables from the JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import tyro
from filelock import FileLock

from vfmlab import api, runs
from vfmlab.errors import VfmlabError
from vfmlab.plots.primitives import Table
from vfmlab.studies.page import Page
from vfmlab.training import dryrun, plan
from vfmlab.training.price import PEAK

STEPS = 12
FIRST = {"data.source": "scenes:easy", "data.train": 2048, "data.val": 64}


class Case(NamedTuple):
    preset: str
    phase: str
    batch: int
    precision: str
    compiled: bool = False
    more: tuple[tuple[str, Any], ...] = ()

    @property
    def recipe(self):
        """The preset at this batch and precision."""
        own = api.resolve(self.preset)
        train = "diffusion.train" if self.phase == "diffusion" else "train" if not own.stages else f"stages.{self.phase}.train"
        changes = {f"{train}.batch": self.batch, f"{train}.precision": self.precision, f"{train}.compile": self.compiled}
        return api.resolve(self.preset, FIRST | changes | dict(self.more))


def each(preset: str, phase: str, batch: int, ways: str, **more: Any) -> list[Case]:
    """ways: letters of fp32 (f), bf16 (b) and compiled bf16 (c)."""
    kinds = {"f": ("fp32", False), "b": ("bf16", False), "c": ("bf16", True)}
    return [Case(preset, phase, batch, *kinds[way], tuple(more.items())) for way in ways]


RANDOM = {"vfm.weights": "random", "losses.adversarial.discriminator.backbone.weights": "random", "data.crop": None,
          "data.least_side": None}
GROUPS = {
    "small": [
        *each("photo_plain_vae", "tokenizer", 32, "fbc"), *each("photo_plain_vae", "diffusion", 64, "fbc"),
        *each("small_plain_vae", "tokenizer", 256, "fbc"), *each("small_plain_vae", "diffusion", 256, "fbc"),
        *each("paper_plain_vae", "diffusion", 64, "bc"),
    ],
    "paper": [
        *each("paper_plain_vae", "tokenizer", 16, "bc", **{"losses.adversarial.start": 0}),
        *each("paper_vfm_vae", "patchgan", 16, "bc", **RANDOM),
    ],
    "tiny": [*each("tiny_plain_vae", "tokenizer", 8, "fb"), *each("tiny_plain_vae", "diffusion", 8, "f")],
}  # fmt: skip


def measure(case: Case, lock: FileLock) -> dict[str, Any]:
    """Seconds and peak memory of a step; the first one, which may compile, runs beside others, the rest alone."""
    (phase,) = [each for each in case.recipe.phases() if each.stage == case.phase]
    began, warm = time.perf_counter(), 0.0

    def gated(task: Any) -> dict[str, Any]:
        numbers = task.costly_steps(STEPS)

        def one_after_the_other(n: int) -> Iterator[int]:
            nonlocal warm
            yield from numbers[:2]
            warm = time.perf_counter() - began
            with lock:
                yield from numbers[2:]

        task.costly_steps = one_after_the_other
        return measured(task)

    measured = dryrun.measure
    with mock.patch.object(dryrun, "measure", gated):
        found = plan.measured(phase)
    return {**case._asdict(), "more": dict(case.more), "run": phase.id, "seconds_to_start": warm, **found}


def hub(folder: Path) -> None:
    """Random VGG-16 for LPIPS under the name of the released file."""
    from torchvision.models import VGG16_Weights, vgg16

    (folder / "checkpoints").mkdir(parents=True)
    torch.save(vgg16().state_dict(), folder / "checkpoints" / VGG16_Weights.DEFAULT.url.rpartition("/")[2])


def group(name: str, limit: float) -> Iterator[dict[str, Any]]:
    """The figures of a group's cases as they come; a case that failed has its last line of errors."""
    cases = GROUPS[name]
    with tempfile.TemporaryDirectory() as folder:
        hub(Path(folder) / "hub")
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "4", "TORCH_HOME": folder,
                            "BENCHMARK_LOCK": f"{folder}/lock"}
        started = [subprocess.Popen([sys.executable, __file__, "--case", name, str(i)], env=env, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(len(cases))]
        end = time.monotonic() + limit
        for case, process in zip(cases, started, strict=True):
            try:
                out, errors = process.communicate(timeout=max(1.0, end - time.monotonic()))
                reason = (errors.strip().splitlines() or [""])[-1]
            except subprocess.TimeoutExpired:
                process.kill()
                out, reason = "", f"not done after {limit:g} s"
            if process.returncode == 0:
                yield json.loads(out.splitlines()[-1])
            else:
                yield {**case._asdict(), "more": dict(case.more), "failed": reason}


def page(file: Path) -> str:
    """Tables of a JSON file of figures: steps, and what share of the GPU's peak they reach."""
    found = json.loads(file.read_text())
    gpu = next((name for name in PEAK if name in found["machine"]["gpu"]), None)
    rows = []
    for result in found["results"]:
        case = Case(**{key: result[key] for key in Case._fields} | {"more": tuple(result["more"].items())})
        row = {"preset": case.preset, "phase": case.phase, "batch": case.batch, "precision": case.precision,
               "compiled": "yes" if case.compiled else "no"}
        if "failed" in result:
            rows.append(row | {"ms a step": result["failed"]})
            continue
        seconds = result["seconds_per_step"]
        row |= {"ms a step": f"{1e3 * seconds:.3g}", "images/s": f"{case.batch / seconds:,.0f}",
                "peak memory, GB": f"{result['peak_bytes'] / 1e9:.1f}",
                "s until the second step": f"{result['seconds_to_start']:.0f}"}
        if gpu is not None and case.precision == "bf16":
            (costs,) = [each for each in plan.plan(case.recipe)["phases"] if each["phase"] == case.phase]
            share = costs["flops"]["step_per_image"] * case.batch / seconds / PEAK[gpu]
            row["% of the bf16 peak"] = f"{100 * share:.2g} %"
        rows.append(row)
    machine = found["machine"]
    lead = (f"Steps on one {machine['gpu']} (torch {machine['versions']['torch']}): forward, backward, clipping, optimizer, at their most "
            f"expensive; median of {STEPS - 1}. Networks of the published sizes, random weights, drawn images.")
    written = Page("Training steps on a GPU", lead=lead, command="python tests/benchmarks_gpu.py")
    written.add("Steps", "A multiply-add counts as two; the peak is of dense products in bf16. The cases of a group are built and "
                "compiled at the same time on the machine's cores, which also slows the steps of small networks.", Table(rows))
    return written.markdown()


def main(groups: tuple[str, ...] = ("small", "paper"), limit: float = 150.0, out: Path = Path("gpu.json"),
         case: tuple[str, int] | None = None, page_of: Path | None = None) -> None:
    """Time steps and write them as JSON.

    Args:
        groups: of GROUPS. limit: seconds that a group may take. page_of: a JSON file, whose tables are printed; nothing is timed.
        case: one case of a group, as JSON on the screen: what the command itself starts.
    """
    if page_of is not None:
        print(page(page_of))  # noqa: T201
        return
    if case is not None:
        found = measure(GROUPS[case[0]][case[1]], FileLock(os.environ["BENCHMARK_LOCK"]))
        print(json.dumps(found), flush=True)  # noqa: T201
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: list[dict[str, Any]] = []
    for name in groups:
        for result in group(name, limit):
            results.append(result)
            print(json.dumps(result), flush=True)  # noqa: T201
            runs.write_json(out, {"machine": {**runs.environment(), "gpu": gpu}, "results": results})


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except VfmlabError as error:
        sys.exit(f"benchmarks_gpu: error: {error}")
