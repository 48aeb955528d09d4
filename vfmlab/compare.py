"""Train several settings with several seeds under one protocol and write down what came out, whichever way it is.

A row is `[LABEL=]PRESET[:field=value,...]`, for example `"no VF=pocket_vfm_vae:losses.vf.weight=0"`. Rows are trained in
processes of their own; what is finished is not trained again. The result is a table (mean and every seed), the curves
over training, and the command, as Markdown, JSON and HTML.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vfmlab import api, config, runs
from vfmlab.errors import ConfigError, TrainingError

METRICS = {  # report metric -> column; reconstruction first, because it bounds what follows
    "psnr": "PSNR (dB)", "psnr_mask": "PSNR in mask", "ssim": "SSIM", "rfd": "rFD", "probe_linear": "linear probe", "probe_knn": "kNN",
    "gfd": "gFD", "gfd_own": "gFD to own rec.", "class_accuracy": "class accuracy",
}
CURVES = ("gfd", "gfd_own", "class_accuracy")


@dataclass(frozen=True)
class Row:
    """One setting with one seed."""

    label: str
    seed: int
    run: config.Run


def parse(specs: Sequence[str], seeds: Sequence[int], overrides: dict[str, Any] | None = None) -> list[Row]:
    """All rows, seeds outermost, so that the first seed is complete before the second begins."""
    rows = []
    for seed in seeds:
        for spec in specs:
            label, _, rest = spec.rpartition("=") if ":" not in spec else _split(spec)
            preset, _, fields = rest.partition(":")
            changes = config.parse_assignments([f for f in fields.split(",") if f])
            run = api.resolve(preset, {**(overrides or {}), **changes}, seed=seed)
            rows.append(Row(label or spec, seed, run))
    if len({row.run.id for row in rows}) < len(rows):
        raise ConfigError("two rows have the same config; each row must differ in its preset, fields or seed")
    return rows


def _split(spec: str) -> tuple[str, str, str]:
    """The label is what stands before a '=' that comes before the ':'."""
    head, colon, tail = spec.partition(":")
    label, _, preset = head.rpartition("=")
    return label, "=", preset + colon + tail


def train(rows: Sequence[Row], root: Path, jobs: int = 2) -> None:
    """Train all rows, `jobs` at a time with one thread each; tokenizers before the diffusion models that need them."""
    folder = root / ".configs"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers = {row.run.phases()[0].id: row.run.phases()[0] for row in rows}
    for queue in (list(tokenizers.values()), [row.run for row in rows if row.run.kind == "diffusion"]):
        waiting = [run for run in queue if not _finished(run, root)]
        running: dict[subprocess.Popen, config.Run] = {}
        with tqdm(total=len(queue), initial=len(queue) - len(waiting), desc="runs", unit="run") as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        run = waiting.pop(0)
                        path = folder / f"{run.id}.json"
                        runs.write_atomic(path, run.model_dump_json(indent=1))
                        log = open(folder / f"{run.id}.log", "ab")  # noqa: SIM115  (the child keeps it)
                        command = [sys.executable, "-m", "vfmlab", "train", str(path), "--root", str(root), "--progress", "plain"]
                        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
                        running[subprocess.Popen(command, stdout=log, stderr=log, env=environment)] = run
                    for process in [p for p in running if p.poll() is not None]:
                        run = running.pop(process)
                        if process.returncode:
                            log = folder / f"{run.id}.log"
                            last = log.read_text(errors="replace").strip().splitlines()[-1:]
                            raise TrainingError(f"run '{run.id}' failed: {' '.join(last)} (log: {log}); the others are kept, start again to go on")
                        bar.update()
                    states = [runs.RunDir(root / run.id).status() for run in running.values() if (root / run.id).exists()]
                    bar.set_postfix_str(", ".join(f"{100 * s.samples / max(s.total, 1):.0f}%" for s in states))
                    time.sleep(0.5)
            finally:
                for process in running:
                    process.terminate()
                for process in running:
                    process.wait()


def _finished(run: config.Run, root: Path) -> bool:
    return (root / run.id / "config.json").exists() and runs.RunDir(root / run.id).status().state == "finished"


def collect(rows: Sequence[Row], root: Path) -> list[dict[str, Any]]:
    """Per row: final metrics of both phases and the curves logged during training."""
    results = []
    for row in rows:
        merged: dict[str, Any] = {}
        reports = [api.evaluate(phase.id, root) for phase in row.run.phases()]
        for report in reports:
            merged |= {k: v for k, v in report["metrics"].items() if v.get("value") is not None}
        curve = [{k: v.get("value") if isinstance(v, dict) else v for k, v in r.items()} for r in runs.RunDir(root / row.run.id).metrics("evaluation")]
        status = [runs.RunDir(root / phase.id).status() for phase in row.run.phases()]
        results.append({
            "label": row.label, "seed": row.seed, "run": row.run.id, "hash": reports[-1]["hash"],
            "metrics": {k: {"value": v["value"], "protocol": v["protocol"], "n": v["n"]} for k, v in merged.items()},
            "curve": [{k: r.get(k) for k in ("samples", *CURVES)} for r in curve],
            "seconds": [round(s.seconds) for s in status],
        })
    hashes = {r["hash"] for r in results}
    if len(hashes) > 1:
        raise ConfigError(f"the rows were measured under {len(hashes)} protocols ({', '.join(sorted(hashes))}) and cannot be compared; give them one protocol")
    return results


def spread(values: Sequence[float]) -> str:
    """Mean, and in brackets every value, for a handful of seeds."""
    text = f"{statistics.fmean(values):.3g}"
    return text if len(values) == 1 else f"{text} ({', '.join(f'{v:.3g}' for v in values)})"


def markdown(results: Sequence[Mapping[str, Any]], command: str, rows: Sequence[Row], title: str) -> str:
    """Tables of final numbers and of quality over training; cells are the mean and, in brackets, each seed."""
    labels = list(dict.fromkeys(r["label"] for r in results))
    seeds = sorted({r["seed"] for r in results})
    used = [k for k in METRICS if any(k in r["metrics"] for r in results)]
    run = rows[0].run
    lines = [
        f"# {title}", "",
        f"Images: `{run.data.source}`, {run.data.size} px. Seeds: {', '.join(map(str, seeds))}. Protocol `{results[0]['hash']}`, "
        f"N = {run.protocol.n}, features `{run.protocol.features}`, {run.protocol.sampler.solver} {run.protocol.sampler.steps} steps, guidance "
        f"{run.protocol.guidance.scale:g}, EMA weights. Cells: mean (each seed).", "",
        "| row | " + " | ".join(METRICS[k] for k in used) + " |", "|---" * (len(used) + 1) + "|",
    ]
    for label in labels:
        mine = [r for r in results if r["label"] == label]
        cells = [spread([r["metrics"][k]["value"] for r in mine if k in r["metrics"]]) if any(k in r["metrics"] for r in mine) else "–" for k in used]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for key in CURVES:
        points = sorted({p["samples"] for r in results for p in r["curve"] if p.get(key) is not None})
        if not points:
            continue
        lines += ["", f"{METRICS[key]} over training (images seen by the diffusion model):", "", "| row | " + " | ".join(f"{p:,}" for p in points) + " |",
                  "|---" * (len(points) + 1) + "|"]  # fmt: skip
        for label in labels:
            mine = [r for r in results if r["label"] == label]
            at = [[p[key] for r in mine for p in r["curve"] if p["samples"] == point and p.get(key) is not None] for point in points]
            lines.append(f"| {label} | " + " | ".join(spread(v) if v else "–" for v in at) + " |")
    lines += ["", f"Made by `{command}`."]
    return "\n".join(lines) + "\n"


def page(results: Sequence[Mapping[str, Any]], title: str) -> str:
    """Curves over training as one HTML page; the same label has the same colour for every seed."""
    from vfmlab import viz

    colours: dict[str, str] = {}
    for r in results:  # a method's own colour for its first row, free ones for its variants
        if r["label"] not in colours:
            free = [c for c in reversed(viz.PALETTE) if c not in colours.values()] or list(viz.PALETTE)
            own = viz.colour(r["run"])
            colours[r["label"]] = own if own not in colours.values() else free[0]
    figures = []
    for key in CURVES:
        figure = viz.curves({}, y=METRICS[key], title=METRICS[key])
        for r in results:
            points = [(p["samples"], p[key]) for p in r["curve"] if p.get(key) is not None]
            if points:
                x, y = zip(*points, strict=True)
                style = {"color": colours[r["label"]]}
                figure.add_scatter(x=x, y=y, mode="lines+markers", name=r["label"], line=style)
        figures.append(figure)
    return f'<!doctype html><meta charset="utf-8"><title>{title}</title>{viz.fragment(viz.panels(figures, columns=3, title=title), first=True)}'


def run(
    specs: Sequence[str], seeds: Sequence[int], root: Path, out: Path, jobs: int = 2, overrides: dict[str, Any] | None = None, title: str = "Comparison"
) -> Path:
    """Train what is missing, evaluate, and write `out`.md, `out`.json and `out`.html. Returns the Markdown file."""
    rows = parse(specs, seeds, overrides)
    train(rows, root, jobs)
    results = collect(rows, root)
    sets = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in (overrides or {}).items()]
    parts = ["vfmlab", "compare", *specs, "--seeds", *map(str, seeds), *(["--set", *sets] if sets else [])]
    command = shlex.join(parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(out.with_suffix(".json"), {"title": title, "command": command, "results": results})
    runs.write_atomic(out.with_suffix(".html"), page(results, title))
    runs.write_atomic(out.with_suffix(".md"), markdown(results, command, rows, title))
    return out.with_suffix(".md")
