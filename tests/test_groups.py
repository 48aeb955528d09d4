"""The judge of prompts: what it reads off a scene of groups, and when a caption is followed."""

from __future__ import annotations

import json

import pytest
import torch

from vfmlab import config, runs
from vfmlab.data import captions, open_source, to_float
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.evaluation import groups
from vfmlab.evaluation.features import open_space
from vfmlab.evaluation.groups import Thing
from vfmlab.seeding import StepRandom
from vfmlab.training.pretrain import PretrainTask
from vfmlab.weights import io

N = 400


@pytest.fixture(scope="module")
def held_out():
    source = open_source(config.Data(source="scenes:groups", size=32, val=N, seed=123), "val")
    return source, to_float(source.batch(torch.arange(N)).images)


@pytest.fixture(scope="module")
def space():
    return open_space("groups", 32)


def test_it_reads_scenes_it_has_not_seen(held_out, space):
    source, images = held_out
    features = space(images).features
    assert features.shape == (N, space.dimension)
    found = groups.shares(source.captions(torch.arange(N)), features)
    assert found == dict.fromkeys(("count", "shape", "texture", "colour", "side", "all"), pytest.approx(1, abs=0.01))
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    assert groups.shares(source.captions(torch.arange(N)), space(blurred).features)["all"] > 0.9
    cells, where = source.cells(torch.arange(N)), [[thing.place for thing in row] for row in groups.things(features)]
    assert where == [row.nonzero()[:, 0].tolist() for row in cells["shape"] >= 0]


def test_it_is_not_satisfied_by_other_images(held_out, space):
    """Captions of other scenes, and noise."""
    source, images = held_out
    others = source.captions(torch.arange(N).roll(7))
    assert groups.shares(others, space(images).features)["all"] < 0.05
    noise = torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert groups.shares(others[:100], space(noise).features)["all"] < 0.02


RED, BLUE = Thing(0, "striped", "red", "disc"), Thing(1, "plain", "blue", "cross")
EVERYTHING = {"count": True, "shape": True, "texture": True, "colour": True}
SIDED = EVERYTHING | {"side": True, "all": True}


@pytest.mark.parametrize(
    ("caption", "found", "changes"),
    [
        ("a striped red disc left of a plain blue cross", [RED, BLUE], {}),
        ("two striped red discs left of a plain blue cross", [RED, RED._replace(place=2), BLUE], {}),
        ("two striped red discs above a plain blue cross", [RED, RED._replace(place=1), BLUE._replace(place=3)], {}),
        ("a striped red disc right of a plain blue cross", [RED, BLUE], {"side": False, "all": False}),
        ("a striped red disc below a plain blue cross", [RED, BLUE], {"side": False, "all": False}),
        ("two striped red discs left of a plain blue cross", [RED, BLUE], {"count": False, "all": False}),
        ("a striped red disc left of a plain blue cross", [RED, BLUE._replace(shape="ring")], {"shape": False, "side": False, "all": False}),
        ("a striped red disc left of a plain blue cross", [RED, BLUE._replace(texture="striped")], {"texture": False, "side": False, "all": False}),
        # the right words on the wrong things
        ("a striped blue disc left of a plain red cross", [RED, BLUE], {"side": False, "all": False}),
        ("a striped red disc left of a plain blue cross", [], dict.fromkeys(SIDED, False)),
    ],
)  # fmt: skip
def test_a_caption_is_followed_or_not(caption, found, changes):
    assert groups.verdict(captions.parse(caption), found) == SIDED | changes


def test_what_a_caption_does_not_say_is_not_judged():
    two = [RED, RED._replace(place=3, colour="green")]
    assert groups.verdict(captions.parse("two striped discs"), two) == {"count": True, "shape": True, "texture": True, "all": True}
    assert not groups.verdict(captions.parse("two red discs"), two)["all"]
    assert groups.shares(["a disc"], torch.zeros(1, 56)).keys() == {"count", "shape", "all"}
    with pytest.raises(ConfigError, match="no caption of drawn scenes"):
        groups.shares(["a photograph"], torch.zeros(1, 56))


def test_its_weights_are_small_and_say_how_they_were_made(space):
    path = io.ASSETS / "groups.safetensors"
    assert path.stat().st_size < 1e5
    facts = json.loads(io.read(path, "groups")[1][io.METADATA])
    assert facts["recipe"]["pretrain"]["objective"] == "groups"
    assert space.version == io.sha256(path)[:16]
    with pytest.raises(CheckpointError, match="not a groups"):
        groups.load(io.ASSETS / "judge.safetensors")


def recipe(source="scenes:groups"):
    return config.Recipe(name="mine", tier="tiny", data=config.Data(source=source, train=64, val=16), train=config.Train(samples=64, batch=32),
                         pretrain=config.Pretrain(objective="groups")).last  # fmt: skip


def test_another_one_is_trained_and_read_from_its_run(tmp_path):
    task = PretrainTask(recipe())
    optimizer, losses = torch.optim.Adam(task.objective.parameters(), 3e-3), []
    for step in range(12):
        loss, parts = task.objective(task.source.batch(torch.arange(32)), StepRandom(0, step, 32), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert parts.keys() == {"shape", "texture", "colour"}
    assert losses[-1] < 0.8 * losses[0]
    assert task.evaluate(task.weights, 0).keys() >= {"count", "all"}
    task.finish(task.weights.eval(), runs.RunDir(tmp_path))
    images = to_float(task.source.batch(torch.arange(4)).images)
    ours = groups.probabilities(task.weights(images))
    torch.testing.assert_close(open_space(f"groups:{tmp_path}", 32)(images).features, ours, rtol=0, atol=0.02)
    with pytest.raises(ConfigError, match=r"'scenes:easy' does not say; set data\.source=scenes:groups"):
        PretrainTask(recipe("scenes:easy"))
