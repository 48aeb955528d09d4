"""Two small trained tokenizers for a folder without runs, and a diffusion run on one of them.

They are the pocket VFM-VAE and the pocket plain VAE, stored in half precision, and measured as stored.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from vfmlab import api, config, presets, runs
from vfmlab.errors import RunError, nearest
from vfmlab.evaluation.evaluate import request
from vfmlab.training.progress import clock
from vfmlab.weights import io

NAMES = {"bundled_vfm_vae": "pocket_vfm_vae", "bundled_plain_vae": "pocket_plain_vae"}  # name here -> preset
SMALL = 1000  # tensors of fewer values (biases, norms, statistics) have full precision
LIVE = {
    "diffusion.train.samples": 12_800, "diffusion.train.preview_every": 3200, "diffusion.train.checkpoint_every": 6400,
    "diffusion.train.log_every": 640, "diffusion.train.evaluate_at": [], "diffusion.train.warmup": 1280,
}  # fmt: skip


def pipeline(name: str = "bundled_vfm_vae") -> config.Recipe:
    """The whole recipe of a bundled run: its tokenizer's training as it was, then a short diffusion training.

    Raises:
        RunError: no such bundled run.
    """
    if name not in NAMES:
        raise RunError(f"there is no bundled run '{name}'{nearest(name, NAMES)}")
    return config.override(presets.get(NAMES[name]), {"name": name, **LIVE})


def put(root: str | Path, names: Iterable[str] = NAMES) -> list[str]:
    """Write the bundled tokenizers into `root` as finished runs where they are missing; their ids."""
    ids = []
    for name in names:
        run = pipeline(name).tokenizer_phase
        folder = runs.create(run, root)
        if folder.status().state != "finished":
            tensors, metadata = io.read(io.ASSETS / f"{name}.safetensors")
            record = json.loads((io.ASSETS / f"{name}.json").read_text())
            whole = {key: value.float() if value.is_floating_point() else value
                     for key, value in tensors.items()}
            io.write(folder.ema, whole, {**metadata, "run_id": run.id})
            folder.save_report({**record["report"], "run": run.id, "request": request(run, folder)})
            lines = "".join(json.dumps(point) + "\n" for point in record["metrics"])
            runs.write_atomic(folder.path / "metrics.jsonl", lines)  # whole: a call before may be cut short
            samples, message = record["samples"], "bundled with vfmlab"
            folder.set_status(state="finished", samples=samples, total=samples, seconds=record["seconds"],
                              message=message)
        ids.append(folder.id)
    return ids


def make(root: str | Path, name: str = "bundled_vfm_vae") -> Iterator[tuple[str, str, Tensor | None]]:
    """Train the short diffusion run on a bundled tokenizer.

    Yields (kind of event, one line, images N 3 H W of a preview or None). Closing the generator saves what is
    trained; calling again goes on.
    """
    put(root)
    run, phase = pipeline(name), "starting"
    for event in api.train(run, root):
        phase = event.phase if event.kind in ("start", "step") else phase
        if event.kind == "finish" and event.phase == run.last.kind:  # the latents that come first finish too
            yield "finish", f"{event.run_id} is finished", None
        elif event.kind in ("step", "preview"):
            left = "" if event.seconds_left is None else f", {clock(event.seconds_left)} left"
            images = event.data.get("images") if event.kind == "preview" else None
            yield event.kind, f"{phase}: {event.samples:,} of {event.total:,} images{left}", images


def build(root: str | Path) -> None:
    """Make the assets from finished pocket runs in `root`: half precision, measured as stored."""
    for name, preset in NAMES.items():
        trained = runs.open_run(presets.get(preset).tokenizer_phase.id, root)
        tensors, metadata = io.read(trained.ema)
        large = {key for key, value in tensors.items() if value.is_floating_point()
                 and value.numel() >= SMALL}
        stored = {key: value.half() if key in large else value for key, value in tensors.items()}
        io.write(io.ASSETS / f"{name}.safetensors", stored,
                 {**metadata, "run_id": pipeline(name).tokenizer_phase.id})
        status, asset = trained.status(), io.ASSETS / f"{name}.json"
        record = {"report": {}, "metrics": trained.metrics(), "samples": status.samples,
                  "seconds": status.seconds}
        with tempfile.TemporaryDirectory() as folder:
            runs.write_json(asset, record)
            (run_id,) = put(folder, [name])
            (Path(folder) / run_id / "report.json").unlink()
            record["report"] = api.evaluate(run_id, folder).as_json()
        for entry in record["report"]["metrics"].values():
            if entry.get("value") is None:  # the reason speaks of the machine that this ran on
                entry["reason"] = "not measured when these weights were bundled"
        runs.write_json(asset, record)
