"""`make demo`: the whole pipeline, a VFM tokenizer beside a plain VAE, by notebooks, into one HTML report.

On drawn scenes two pipelines. On photographs three of the tier `photo`, where its weights are installed, with
a part of the tier's budget and fewer notebooks. All rows have one optimiser and one guidance. The trainings
are nodes of one graph, the notebooks are nodes that come after what they show; what is finished is not done
again, so an interrupted demo goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfmlab import api, config, data, runs
from vfmlab.config.files import absolute_source
from vfmlab.data.records import RecordSource
from vfmlab.errors import CheckpointError, ConfigError, TrainingError
from vfmlab.studies import executor
from vfmlab.studies import report as pages
from vfmlab.studies.executor import Node
from vfmlab.studies.sweep.notebook import executed
from vfmlab.training.progress import clock
from vfmlab.vfm import shipped
from vfmlab.vfm import source as weights

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
BEFORE = ("00_start_here", "01_foundation_features")
# own_steps: of 02's two trainings with an own term, which at its 200 are a fifth of the demo's time
OF_EACH = {"02_train_a_tokenizer": {"own_steps": 50}, "07_train_diffusion": {}}
SHOWN = ("psnr", "rfd", "gfd", "gfd_own", "class_accuracy")
# First the pipeline on a VFM, then the one that it is compared with, then others that stand beside them.
SCENES = ("pocket_vfm_vae+ddt", "pocket_plain_vae+ddt")
PHOTOGRAPHS = ("photo_vfm_vae", "photo_plain_vae", "photo_va_vae")
GUIDED = {"protocol.guidance.scale": 2.5}
PHOTO_WEIGHTS = ("efficientnet_lite0", "mobilenetv2")
PHOTO_BUDGET = {
    "data.train": 10_000, "train.samples": 15_360, "diffusion.train.samples": 102_400,
    "diffusion.train.evaluate_at": [51_200, 102_400],
}  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What a demo trains. names: presets. fields: changes to all. judge: trained before; None: not needed."""

    names: tuple[str, ...]
    fields: dict[str, Any]
    judge: config.Recipe | None = None


def run(preset: str, baseline: str, source: str, overrides: dict[str, Any], root: str | Path,
        seed: int | None = None, jobs: int | None = None, cluster: str | None = None,
        say: Callable[[str], object] = print) -> Path:
    """Train both pipelines, execute the notebooks into `root`/notebooks; `root`/report.html is returned.

    Args:
        preset: the pipeline on a VFM. baseline: the pipeline that it is compared with. "" for both: those of
        drawn scenes, or of photographs where `source` names some. source: images, "" for the preset's.
        overrides: dotted changes to all. jobs, cluster: see `executor.run`.

    Raises:
        ConfigError: a preset, field, source or seed that cannot be. TrainingError: a part failed.
    """
    root, began = Path(root).expanduser().resolve(), time.monotonic()
    own = overrides.get("seed", seed)
    if seed is not None and own != seed:
        raise ConfigError(f"--seed {seed}, and --overrides say seed = {own}; give one of them")
    overrides = {key: value for key, value in overrides.items() if key != "seed"}
    folder, nodes = root / "runs", []
    if source or "data.source" in overrides:  # notebooks run in a folder of their own
        source = source and absolute_source(source)
        overrides |= {key: absolute_source(value) for key, value in overrides.items() if key == "data.source"}
    rows = choose(preset, baseline, source, overrides, folder, say)
    overrides = rows.fields | overrides
    if rows.judge is not None:
        number = f"{rows.judge.train.samples:,} images"
        say(f"a judge is trained on these images first ({number}): the bundled one knows drawn scenes")
        nodes = executor.phase_nodes(rows.judge.phases(), folder, "judge")
    chosen = {name: api.resolve(name, overrides, seed=own or 0) for name in rows.names}
    _alike(chosen)
    preset, baseline, *others = chosen
    images = data.open_source(chosen[preset].data, "train")
    for line in (f"images: {images.describe()}, at {images.size} px; results go to {root}", *images.notes,
                 *(f"{name}: {pages.generator(whole)}" for name, whole in chosen.items())):
        say(line)
    first = tuple(node.key for node in nodes)
    common = {"overrides": json.dumps(overrides), "root": str(folder), "seed": own or 0, "headless": True}
    (root / "notebooks").mkdir(parents=True, exist_ok=True)
    trained: dict[str, tuple[str, str]] = {}  # reports of tokenizer and diffusion model
    for name, whole in chosen.items():
        nodes += executor.phase_nodes(whole.phases(), folder, name, evaluate=True, needs=first)
        trained[name] = (executor.report_key(str(folder / whole.tokenizer_phase.id)), nodes[-1].key)
        for (notebook, less), need in () if others else zip(OF_EACH.items(), trained[name], strict=True):
            nodes.append(_notebook(root, notebook, {**common, "preset": name} | less, (need,), f".{name}"))
    pair = {**common, "preset": preset, "baseline": baseline}
    tokenizers, models = zip(*trained.values(), strict=True)
    if not others:
        nodes += [_notebook(root, name, {**common, "preset": preset}, first) for name in BEFORE]
    nodes += [_notebook(root, "03_reconstruction_report", pair, tokenizers),
              _notebook(root, "09_sampling_and_guidance", {**common, "preset": preset},
                        (trained[preset][1],)),
              _notebook(root, "10_compare_and_report", {**pair, "report": str(root / "report.html")}, models)]
    outcomes = executor.run(nodes, jobs, cluster)
    if failed := [node for node in nodes if outcomes[node.key].error]:
        text = f"{failed[0].label} failed: {outcomes[failed[0].key].error}"
        raise TrainingError(f"{text}; mend it and start the demo again, it goes on ({len(failed)} of "
                            f"{len(nodes)} parts are missing)")
    if others:  # the notebook's page has two
        pages.write(chosen, folder, root / "report.html", seed=own or 0)
    for name, whole in chosen.items():
        say(f"{name:24s} {_numbers(whole, folder)}")
    say(f"time: {clock(time.monotonic() - began)}")
    return root / "report.html"


def choose(preset: str, baseline: str, source: str, overrides: dict[str, Any], folder: Path,
           say: Callable[[str], object]) -> Rows:
    """The rows that are asked for; errors as :func:`run`."""
    if preset or baseline:
        names, guided = (preset or SCENES[0], baseline or SCENES[1]), {}
        if len(set(names)) == 1:
            raise ConfigError(f"'{names[0]}' would stand beside itself; name another --preset or --baseline")
    else:
        names, guided = SCENES, GUIDED
    if not source:
        return Rows(names, guided)
    if guided:
        try:
            for name in PHOTO_WEIGHTS:
                weights.find(shipped.SHIPPED[name])
        except CheckpointError as error:
            say(f"not the tier photo: {error}")
        else:
            larger = "+64px" if _side(source) == 64 else ""
            return Rows(tuple(name + larger for name in PHOTOGRAPHS),
                        guided | PHOTO_BUDGET | {"data.source": source})
    fields, judge = real_data(source, overrides, folder)
    return Rows(names, guided | fields, judge)


def _alike(chosen: dict[str, config.Recipe]) -> None:
    """ConfigError where rows have other images or another judge, so that none of their numbers compare."""
    seen = {name: f"{run.data.source} at {run.data.size} px, judge {run.protocol.features}"
            for name, run in chosen.items()}
    if len(set(seen.values())) > 1:
        rows = "; ".join(f"'{name}': {what}" for name, what in seen.items())
        raise ConfigError(f"these do not stand beside each other: {rows}; name a --preset and a --baseline "
                          "of the same images, or --data for both")


def _side(source: str) -> int:
    """32, or 64 for images of more than 48 px; :class:`ConfigError` for drawn scenes."""
    opened = data.open_source(config.Data(source=source, size=32, val=64), "val")
    if not isinstance(opened, RecordSource):
        raise ConfigError(f"--data '{source}': drawn scenes are what the presets use already; use "
                          f"--overrides '{{\"data.source\": \"{source}\"}}'")
    return 32 if max(opened.native_size()) <= 48 else 64


def real_data(source: str, overrides: dict[str, Any],
              root: Path) -> tuple[dict[str, Any], config.Recipe | None]:
    """Overrides that put both pipelines onto the user's images, and the judge to train if none is named."""
    size = _side(source)
    images = {"data.source": source, "data.size": size, "data.flip": True}
    fields: dict[str, Any] = {**images, "tokenizer.factor": size // 8}
    if "protocol.features" in overrides:
        return fields, None
    half = 51_200  # images; enough for a judge of ten classes, and half the time
    judge = api.resolve("pocket_judge", {**images, "train.samples": half, "train.evaluate_at": [half]})
    return fields | {"protocol.features": f"judge:{root / judge.id}"}, judge


def _notebook(root: Path, name: str, parameters: dict[str, Any], needs: tuple[str, ...],
              suffix: str = "") -> Node:
    target = str(root / "notebooks" / f"{name}{suffix}.ipynb")
    given = {"source": str(FOLDER / f"{name}.ipynb"), "target": target, "parameters": parameters}
    return Node(target, "notebook", f"notebook {name}{suffix}", show_notebook, given, needs)


def show_notebook(source: str, target: str, parameters: dict[str, Any]) -> None:
    """Execute a notebook, unless it was, with these parameters, and export it as HTML beside `target`."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_notebook_node(executed(source, target, parameters))
    runs.write_atomic(Path(target).with_suffix(".html"), page)


def _numbers(whole: config.Recipe, root: Path) -> str:
    report = api.evaluate(whole.id, root)
    values = {key: report.value(key) for key in SHOWN}
    numbers = "  ".join(f"{key} {value:.3g}" for key, value in values.items() if value is not None)
    return f"{numbers}  (protocol {report.hash}, run {whole.id})"
