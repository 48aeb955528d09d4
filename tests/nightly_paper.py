"""`make nightly`: the paper presets from images to the evaluator's number, with the networks as published, random weights and
a few images of 256 px, on the CPU. Not a part of `make test`: LightningDiT-XL takes 13.5 GB of memory with gradients, moments
and average; one preset leaves about 15 GB on the disk. Blocks are computed again in backward, which changes no value.

Reduced are images (2, and 4 held out), steps of training (one of two images a stage), samples (4) and solver steps (2); networks, losses,
stages, feature space and file formats are the preset's. Weights that are downloaded elsewhere (VFM, discriminator's backbone,
VGG-16, InceptionV3) are random, those of files in files of the released names. So nothing of its numbers means anything but that
they are there. With `NIGHTLY=FOLDER` runs and log (`log.json`) are written there, and what was broken off goes on.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmlab import api, config, runs
from vfmlab.evaluation import npz

RESET = Path("/proc/self/clear_refs")
CLASSES, IMAGES, HELD_OUT = 1000, 2, 4
COMMON = {
    "data.train": IMAGES, "data.val": HELD_OUT, "data.workers": 0, "train.batch": 2, "train.samples": 2, "train.log_every": 2,
    "train.recompute": True, "diffusion.train.recompute": True,
    "diffusion.train.batch": 2, "diffusion.train.samples": 2, "diffusion.train.log_every": 2,
    "protocol.n": HELD_OUT, "protocol.batch": 2, "protocol.sampler.steps": 2,
}  # fmt: skip
PAPER = {
    "paper_vfm_vae": {
        "vfm.weights": "random", "losses.adversarial.discriminator.backbone.weights": "random",
        **{f"stages.{stage}.train.samples": 2 for stage in ("weak", "ssim", "patchgan")},
    },
    "paper_plain_vae": {"losses.adversarial.start": 0},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = os.environ.get("NIGHTLY")
    return Path(folder) if folder else tmp_path_factory.mktemp("nightly")


@pytest.fixture(scope="module")
def pictures(place) -> Path:
    """A folder of 1000 classes with one smooth JPEG each, larger than the crop."""
    folder, draw = place / "images", np.random.default_rng(0)
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    for label in range(CLASSES):
        (folder / f"n{label:08d}").mkdir()
        small = Image.fromarray(draw.integers(0, 256, (9, 8, 3), dtype=np.uint8))
        small.resize((288, 324), Image.Resampling.BICUBIC).save(folder / f"n{label:08d}" / "0.jpg", quality=90)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Torch's hub folder with random VGG-16 and InceptionV3 under the names of the released files."""
    import torchvision
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    checkpoints = tmp_path_factory.mktemp("hub") / "checkpoints"
    checkpoints.mkdir()
    torch.manual_seed(0)
    vgg = torchvision.models.VGG16_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(torchvision.models.vgg16().state_dict(), checkpoints / vgg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **options: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **options: None)
        net = inception.FeatureExtractorInceptionV3("random", ["2048"])
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):  # so that features differ from image to image
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.save(net.state_dict(), checkpoints / inception.URL_INCEPTION_V3.rpartition("/")[2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(checkpoints.parent))
        patch.setenv("VFMLAB_CACHE", str(checkpoints.parent / "cache"))
        yield checkpoints


def peak_memory() -> float:
    """Bytes of this process, at most, since :func:`reset_peak`."""
    if RESET.exists():
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    if RESET.exists():
        RESET.write_text("5")


class Log:
    """Seconds, peak memory of the process and what was found, of each part; where the peak cannot be reset (not on Linux),
    it is that so far."""

    def __init__(self, preset: str, place: Path):
        self.preset, self.path, self.last = preset, place / "log.json", time.perf_counter()
        self.whole = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows = self.whole.setdefault(preset, [])

    def add(self, part: str, **facts: object) -> None:
        now, peak = time.perf_counter(), peak_memory() / 1e9
        self.rows.append({"part": part, "seconds": round(now - self.last, 1), "peak_gb": round(peak, 1), **facts})
        print(f"{self.preset}: {json.dumps(self.rows[-1])}", flush=True)  # noqa: T201
        self.last = time.perf_counter()
        reset_peak()
        self.path.write_text(json.dumps(self.whole, indent=1) + "\n")


def losses(folder: runs.RunDir) -> dict[str, float]:
    """The last logged values of a run's terms; a value that was not finite is logged as null."""
    rows = folder.metrics("step")
    assert rows, f"{folder.id} logs its terms"
    assert None not in rows[-1].values(), rows[-1]
    assert not rows[-1]["bad_steps"]
    return {key: value for key, value in rows[-1].items() if isinstance(value, float) and key != "seconds"}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("preset", PAPER)
def test_from_images_to_the_evaluators_number(preset, place, pictures, hub):
    log, root = Log(preset, place), place / "runs"
    recipe = api.resolve(preset, COMMON | PAPER[preset] | {"data.source": f"folder:{pictures}"})
    published = api.resolve(preset)
    assert recipe.tokenizer == published.tokenizer
    assert recipe.diffusion.network == published.diffusion.network
    assert [stage.name for stage in recipe.stages] == [stage.name for stage in published.stages]

    phases = recipe.phases()
    for event in api.train(recipe, root):
        if event.kind == "finish":  # of a phase, and of what is measured or cached before and after its steps
            log.add(f"training: {event.run_id.rpartition('-')[0]}, {event.phase}")
    for phase in phases:
        log.add(f"losses: {phase.stage}", **{k: round(v, 4) for k, v in losses(runs.open_run(phase.id, root)).items()})
    assert [runs.open_run(phase.id, root).status().state for phase in phases] == ["finished"] * len(phases)

    tokenizer, generator = phases[-2], phases[-1]
    shape = recipe.tokenizer.latent_shape(recipe.data.size)
    assert api.load_tokenizer(tokenizer.id, root, on="cpu").latent_shape == shape
    shards = list((root / ".latents").rglob("*"))
    assert sum(path.stat().st_size for path in shards if path.is_file()) > IMAGES * 2 * math.prod(shape), "the latents are cached"

    report = api.evaluate(tokenizer.id, root)
    log.add("evaluation: tokenizer", **{name: round(one.value, 4) for name, one in report.measured.items()})
    assert math.isfinite(report["rfd"].value)

    file = api.sample_npz(generator.id, HELD_OUT, root=root)
    samples = np.load(file)["arr_0"]
    assert (samples.shape, samples.dtype) == ((HELD_OUT, recipe.data.size, recipe.data.size, 3), np.uint8)
    log.add("samples: npz", megabytes=round(file.stat().st_size / 1e6, 2))

    report = api.evaluate(generator.id, root)
    log.add("evaluation: samples", **{name: round(one.value, 4) for name, one in report.measured.items()})
    own = api.evaluate(generator.id, root, {"reference": str(file)})
    assert report["gfd"].value > 1e-3
    assert abs(own["gfd"].value) < 1e-3 * report["gfd"].value, "samples against the file that holds them"
    assert own["gfd"].protocol != report["gfd"].protocol
    log.add("evaluation: samples against their own npz", gfd=round(own["gfd"].value, 6))
    assert config.digest(json.loads(file.with_suffix(".json").read_text()))
    assert npz.open_reference(file, recipe.data.size)
