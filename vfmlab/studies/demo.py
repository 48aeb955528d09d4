"""`make demo`: the whole pipeline, a VFM tokenizer beside a plain VAE, through the notebooks, into one HTML report.

Two lanes (one per tokenizer) train side by side with one thread each, because on two cores two one-thread processes are
faster than one with two threads. Every notebook is executed by papermill; what a notebook finds finished it does not
train again, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vfmlab import config, runs
from vfmlab.errors import ConfigError, TrainingError, VfmlabError
from vfmlab.training.progress import clock, watch

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


@dataclass
class Step:
    """One notebook with its parameters. output: name of the executed copy."""

    notebook: str
    parameters: dict[str, Any]
    suffix: str = ""

    @property
    def output(self) -> str:
        return self.notebook + self.suffix


@dataclass
class Lane:
    """Steps that run one after the other, in a process of their own."""

    name: str
    steps: list[Step]
    process: subprocess.Popen | None = None
    done: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vfmlab demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="pocket_vfm_vae", help="the pipeline on a VFM")
    parser.add_argument("--baseline", default="pocket_plain_vae", help="the pipeline it is compared with")
    parser.add_argument("--data", default="", help="folder:PATH, parquet:PATH, hf:NAME, wds:PATTERN; default: the preset's")
    parser.add_argument("--overrides", default="{}", help="JSON with dotted names, applied to both")
    parser.add_argument("--root", default="demo", help="folder for runs, executed notebooks and the report")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except VfmlabError as error:
        print(f"vfmlab demo: error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was trained is kept: the same command goes on from there", file=sys.stderr)  # noqa: T201
        return 130


def run(args: argparse.Namespace) -> int:
    say = print
    began = time.monotonic()
    say(f"vfmlab demo: {args.preset} beside {args.baseline}", flush=True)
    from vfmlab import api  # after the first line: it takes torch with it

    root = Path(args.root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    try:
        overrides = json.loads(args.overrides)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--overrides: not JSON ({error}): {args.overrides!r}") from None
    if args.data:
        overrides = real_data(args.data, root, overrides, say) | overrides
    text = json.dumps(overrides)
    chosen = {name: api.resolve(name, text, seed=args.seed) for name in (args.preset, args.baseline)}
    common = {"overrides": text, "root": str(root / "runs"), "seed": args.seed, "headless": True}
    lanes = [
        Lane(name, [Step(n, {**common, "preset": name}, f".{name}") for n in ("02_train_a_tokenizer", "07_train_diffusion")])
        for name in chosen
    ]
    pair = {"preset": args.preset, "baseline": args.baseline}
    looking = [Step(n, {**common, "preset": args.preset}) for n in ("00_start_here", "01_foundation_features")]
    lanes[1].steps = [*looking, *lanes[1].steps]  # the baseline is trained sooner
    after = [
        Lane("report", [
            Step("03_reconstruction_report", {**common, **pair}),
            Step("10_compare_and_report", {**common, **pair, "report": str(root / "report.html")}),
        ]),
        Lane("sampling", [Step("09_sampling_and_guidance", {**common, "preset": args.preset})]),
    ]
    say(f"images: {chosen[args.preset].data.source}, {chosen[args.preset].data.size} px; results go to {root}")
    together(lanes, root, list(chosen.values()))
    together(after, root, [])
    _summary(chosen, root, time.monotonic() - began, say)
    return 0


def real_data(source: str, root: Path, given: dict[str, Any], say: Any) -> dict[str, Any]:
    """Overrides that put both pipelines onto the user's images, with a judge of its own unless `given` names features."""
    from vfmlab import api, data
    from vfmlab.data.records import RecordSource

    opened = data.open_source(config.Data(source=source, size=32, train=1000, val=64), "val")
    if not isinstance(opened, RecordSource):
        raise ConfigError(f"--data '{source}': drawn scenes are what the presets use already; use --overrides '{{\"data.source\": \"{source}\"}}'")
    size = 32 if max(opened.native_size()) <= 48 else 64
    factor = size // 8
    overrides: dict[str, Any] = {"data.source": source, "data.size": size, "tokenizer.factor": factor, "data.flip": True}
    if "protocol.features" in given:
        return overrides
    half = 51_200  # images; enough for a judge of ten classes, and half the time
    judge = api.resolve("pocket_judge", {"data.source": source, "data.size": size, "data.flip": True, "train.samples": half, "train.evaluate_at": [half]})
    say(f"a judge is trained on these images first ({judge.train.samples:,} images): the bundled one knows only the drawn scenes")
    for _ in watch(api.train(judge, root / "runs")):
        pass
    return overrides | {"protocol.features": f"judge:{root / 'runs' / judge.id}"}


def together(lanes: list[Lane], root: Path, chosen: list[config.Recipe]) -> None:
    """Run lanes side by side with one thread each, and show one bar per running phase until all have ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VFMLAB_LANES": str(len(lanes))}
    folder = root / "notebooks"
    folder.mkdir(exist_ok=True)
    for lane in lanes:
        jobs = json.dumps([{"source": str(FOLDER / f"{s.notebook}.ipynb"), "target": str(folder / f"{s.output}.ipynb"), "parameters": s.parameters} for s in lane.steps])
        log = open(folder / f"{lane.name}.log", "ab")  # noqa: SIM115  (the child keeps it)
        lane.process = subprocess.Popen([sys.executable, "-m", "vfmlab.studies.demo_lane", jobs], stdout=log, stderr=log, env=environment)
    bars: dict[str, tqdm] = {}
    phases = [phase for run in chosen for phase in run.phases()]
    try:
        steps = tqdm(total=sum(len(lane.steps) for lane in lanes), desc="notebooks", unit="nb", position=0)
        while any(lane.process.poll() is None for lane in lanes):
            _refresh(phases, root, bars)
            finished = sum((folder / f"{s.output}.html").exists() for lane in lanes for s in lane.steps)
            steps.update(finished - steps.n)
            if any(lane.process.poll() not in (None, 0) for lane in lanes):
                break
            time.sleep(0.5)
        steps.update(steps.total - steps.n if all(lane.process.poll() == 0 for lane in lanes) else 0)
    finally:
        for bar in [*bars.values(), steps]:
            bar.close()
        for lane in lanes:
            if lane.process.poll() is None:
                lane.process.terminate()
        for lane in lanes:
            lane.process.wait()
    for lane in lanes:
        if lane.process.returncode:
            lines = (folder / f"{lane.name}.log").read_text(errors="replace").strip().splitlines()
            reason = next((line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1] if lines else "no output")
            raise TrainingError(f"lane '{lane.name}' failed: {reason.strip()} (full log: {folder / f'{lane.name}.log'}); mend it and start again, it goes on")


def _refresh(phases: list[config.Recipe], root: Path, bars: dict[str, tqdm]) -> None:
    for phase in phases:
        path = root / "runs" / phase.id
        if not (path / "status.json").exists():
            continue
        status = runs.RunDir(path).status()
        if status.state == "running" and phase.id not in bars:
            bars[phase.id] = tqdm(total=status.total, initial=status.samples, desc=phase.name[:34], unit="img", unit_scale=True, position=len(bars) + 1)
        if phase.id in bars:
            bars[phase.id].update(status.samples - bars[phase.id].n)


def _summary(chosen: dict[str, config.Recipe], root: Path, seconds: float, say: Any) -> None:
    from vfmlab import api

    shown = ("psnr", "rfd", "gfd", "gfd_own", "class_accuracy")
    for name, run in chosen.items():
        metrics = api.evaluate(run.id, root / "runs")
        numbers = "  ".join(f"{k} {metrics['metrics'][k]['value']:.3g}" for k in shown if metrics["metrics"].get(k, {}).get("value") is not None)
        say(f"{name:24s} {numbers}  (protocol {metrics['hash']}, run {run.id})")
    say(f"time: {clock(seconds)}")
    say(f"report: {root / 'report.html'}   executed notebooks: {root / 'notebooks'}")
    say(f"look at the runs in the app: vfmlab app --runs {root / 'runs'}")


if __name__ == "__main__":
    sys.exit(main())
