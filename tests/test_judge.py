"""The judge: bundled weights that know the scenes, soft or sharp; loading; training one on other data."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from vfmlab import config, runs
from vfmlab.data import open_source, to_float
from vfmlab.data.scenes import STYLES
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.evaluation import judge
from vfmlab.training.pretrain import PretrainTask
from vfmlab.vfm import pocket
from vfmlab.weights import io


@pytest.fixture(scope="module")
def bundled() -> judge.Judge:
    return judge.load()


def scenes(style: str, n: int = 400) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    source = open_source(config.Data(source=f"scenes:{style}", size=32, val=n, seed=123), "val")
    batch = source.batch(torch.arange(n))
    return to_float(batch.images), batch.labels, source.class_names


def box_blur(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)


@pytest.mark.parametrize(("style", "least"), [("easy", 0.985), ("medium", 0.985), ("hard", 0.95)])
@pytest.mark.parametrize("change", ["sharp", "blurred", "noisy"])
def test_knows_the_scenes_soft_or_sharp(bundled, style, least, change):
    images, labels, names = scenes(style)
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    images = {"sharp": images, "blurred": box_blur(images), "noisy": images + noise}[change]
    features, logits = bundled(images)
    assert (features.shape, features.dtype) == ((400, bundled.dim), torch.float32)
    wanted = torch.tensor(bundled.columns(names))[labels]
    assert (logits.argmax(1) == wanted).float().mean() > least


def test_other_sizes_are_resized(bundled):
    images, labels, names = scenes("medium", 100)
    large = F.interpolate(images, (64, 64), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    wanted = torch.tensor(bundled.columns(names))[labels]
    assert (bundled(large)[1].argmax(1) == wanted).float().mean() > 0.98


def test_frozen_fp32_and_independent_of_the_batch(bundled):
    images, _, _ = scenes("medium", 8)
    assert not any(parameter.requires_grad for parameter in bundled.parameters())
    torch.testing.assert_close(bundled(images[:3])[0], bundled(images)[0][:3])
    with torch.autocast("cpu", torch.bfloat16):
        features, logits = bundled(images)
    assert features.dtype == logits.dtype == torch.float32
    images.requires_grad_(True)
    bundled(images)[1].sum().backward()
    assert images.grad is not None


def test_knows_all_classes_of_all_styles_but_not_those_of_other(bundled):
    for style in ("easy", "medium", "hard"):
        s = STYLES[style]
        assert len(bundled.columns([f"{t} {shape}" for shape in s.shapes for t in s.textures])) == len(s.shapes) * 2
    with pytest.raises(ConfigError, match="has not learnt class 'dotted star'"):
        bundled.columns(["dotted star"])


def test_bundled_file_is_small_and_says_how_it_was_made(bundled):
    path = io.ASSETS / "judge.safetensors"
    assert path.stat().st_size < 2e6
    _, metadata = io.read(path, "judge")
    facts = json.loads(metadata[io.METADATA])
    assert facts["recipe"]["pretrain"]["objective"] == "classify"
    assert {"samples", "seed", "data_fingerprint"} <= set(facts)
    assert bundled.fingerprint == io.sha256(path)[:16]


def test_differs_from_the_pocket_vfm(bundled):
    """Architecture, seed and recipe: a tokenizer must not be judged by the features it was built on."""
    assert not any(isinstance(m, pocket.Block | torch.nn.LayerNorm) for m in bundled.modules())
    recipes = []
    for path in (io.ASSETS / "judge.safetensors", io.ASSETS / "pocket.safetensors"):
        recipes.append(json.loads(io.read(path, "weights")[1][io.METADATA])["recipe"])
    assert recipes[0]["seed"] != recipes[1]["seed"]
    assert recipes[0]["data"]["source"] != recipes[1]["data"]["source"]


def test_files_that_are_no_judge(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="not a judge"):
        judge.load(other)
    with pytest.raises(CheckpointError, match="no file"):
        judge.load(tmp_path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((io.ASSETS / "judge.safetensors").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        judge.load(cut)


def test_trainable_on_other_data(tmp_path):
    """A run with objective "classify" learns its source's classes and is loaded from its directory."""
    run = config.Recipe(
        name="my_judge", tier="tiny", data=config.Data(source="scenes:other", train=256, val=64),
        train=config.Train(samples=256, batch=32), pretrain=config.Pretrain(objective="classify"),
    ).last  # fmt: skip
    task = PretrainTask(run)
    task.finish(task.weights.eval(), runs.RunDir(tmp_path))
    mine = judge.load(tmp_path)
    assert mine.class_names == task.source.class_names
    images = to_float(task.source.batch(torch.arange(4)).images)
    torch.testing.assert_close(mine(images)[1], task.weights(images)[1], rtol=0, atol=2e-2)
