"""The space of true factors: what is read, which changes of the images it sees and the judge does not, how it is trained."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from vfmlab import config, runs
from vfmlab.data import open_source, to_float
from vfmlab.data import shapes as draw
from vfmlab.data.scenes import STYLES, SceneSource
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.evaluation import factors, protocol
from vfmlab.evaluation.features import open_space
from vfmlab.evaluation.frechet import FeatureSet, frechet_distance
from vfmlab.seeding import StepRandom
from vfmlab.training.pretrain import PretrainTask
from vfmlab.weights import io

N = 1000


@pytest.fixture(scope="module")
def bundled() -> factors.FactorNet:
    return factors.load()


def scenes(style: str, n: int = N) -> SceneSource:
    return open_source(config.Data(source=f"scenes:{style}", size=32, val=n, seed=123), "val")


def images_of(source, indices) -> torch.Tensor:
    return to_float(source.batch(indices).images)


# -- targets -----------------------------------------------------------------------------------------------------------


def drawn(shape: str, texture: str, angle: float) -> torch.Tensor:
    """An object at an angle: coverage and texture on a grid of points, with soft edges, 2 S S."""
    axis = torch.linspace(-1.3, 1.3, 81)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = ((cos * u + sin * v).numpy(), (cos * v - sin * u).numpy())

    def edge(distance):
        return (0.5 - 15 * distance).clip(0, 1)

    inside = edge(getattr(draw, shape)(u, v))
    return torch.from_numpy(np.stack([inside, inside * getattr(draw, texture)(u, v, edge)]))


@pytest.mark.parametrize("shape", sorted({shape for style in STYLES.values() for shape in style.shapes}))
def test_how_often_an_object_repeats_in_a_turn(shape):
    """It looks the same after a turn by 1/k, and by no smaller part of a turn."""
    for texture in ("plain", "striped", "shaded", "dotted", "checked"):
        k = math.gcd(factors.REPEATS[shape], factors.REPEATS[texture])
        upright = drawn(shape, texture, 0.3)

        def change(turn, upright=upright, texture=texture):
            return float((drawn(shape, texture, 0.3 + 2 * math.pi * turn) - upright).abs().mean())

        smaller = [change(1 / m) for m in range(2, 13) if k == 0 or k % m]
        if k == 0:
            assert max(smaller) < 0.006, texture
        else:
            assert change(1 / k) < 0.006, texture  # lobes of the trefoil stand a little off
            assert min(smaller) > 0.008, texture


def test_targets_are_the_factors_of_the_scene():
    source = scenes("hard", 200)
    at = torch.tensor([3, 50, 117])
    truth, found = factors.targets(source, at), source.factors(at)
    names = [source.class_names[label] for label in source.labels[at]]
    parts = dict(zip(factors.columns(source.class_names),
                     truth.split(list(factors.columns(source.class_names).values()), 1), strict=True))
    assert [f"{source.style.textures[t]} {source.style.shapes[s]}"
            for s, t in zip(parts["shape"].argmax(1), parts["texture"].argmax(1), strict=True)] == names
    torch.testing.assert_close(parts["x"][:, 0], found["x"])
    torch.testing.assert_close(parts["foreground"], found["foreground"])
    length = parts["direction"].norm(dim=1)
    expected = torch.tensor([float(name not in ("plain disc", "plain ring")) for name in names])
    torch.testing.assert_close(length, expected)


def test_a_turn_that_cannot_be_seen_is_in_no_target():
    source = scenes("medium", 200)
    discs = torch.nonzero(source.labels == source.class_names.index("plain disc")).squeeze(1)
    n = factors.columns(source.class_names)
    start = sum(n[name] for name in ("shape", "texture", "x", "y", "scale"))
    assert not factors.targets(source, discs)[:, start : start + 2].any()


# -- the bundled network -----------------------------------------------------------------------------------------------


def test_reads_the_factors_of_held_out_scenes(bundled):
    source = scenes("hard")
    found, _ = bundled(images_of(source, torch.arange(N)))
    scores = factors.r2(bundled, found, bundled.standardise(factors.targets(source, torch.arange(N))))
    assert all(score > 0.6 for score in scores.values()), scores
    assert all(scores[name] > 0.95 for name in ("x", "y", "texture")), scores
    assert found.shape == (N, bundled.dim)


def test_bundled_file_is_small_and_says_how_it_was_made(bundled):
    path = io.ASSETS / "factors.safetensors"
    assert path.stat().st_size < 1e6
    facts = json.loads(io.read(path, "factors")[1][io.METADATA])
    judge = json.loads(io.read(io.ASSETS / "judge.safetensors", "judge")[1][io.METADATA])
    assert facts["recipe"]["pretrain"]["objective"] == "regress"
    assert facts["recipe"]["seed"] != judge["recipe"]["seed"]
    assert bundled.fingerprint == io.sha256(path)[:16]


# -- the space ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen():
    """Features of 2,000 scenes in both spaces, and where their objects stand."""
    source, spaces = scenes("medium", 2 * N), {name: open_space(name, 32) for name in ("judge", "factors")}
    parts = torch.arange(2 * N).split(250)
    features = {name: torch.cat([space(images_of(source, part)).features for part in parts])
                for name, space in spaces.items()}
    return source, features


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    sets = [FeatureSet.empty(a.shape[1]).update(rows) for rows in (a, b)]
    return frechet_distance(*(s.moments for s in sets))


def test_a_change_of_position_is_seen_and_the_judge_hardly_sees_it(seen):
    """Objects that all stand on the right, beside as many of everywhere; a missing class is the measure of both."""
    source, features = seen
    x = source.factors(torch.arange(len(source)))["x"]
    half = torch.arange(len(source)) % (2 * source.num_classes) < source.num_classes  # every class equally often
    right, others, four = x > 0, (x <= 0) | half, source.labels != 0
    moved = {name: distance(f[right], f[others]) for name, f in features.items()}
    fewer = {name: distance(f[half & four], f[~half]) for name, f in features.items()}
    same = {name: distance(f[half], f[~half]) for name, f in features.items()}
    share = {name: (moved[name] - same[name]) / (fewer[name] - same[name]) for name in features}
    assert share["factors"] > 5, share
    assert share["judge"] < 0.5, share


def test_variance_lies_within_classes(seen):
    source, features = seen
    between = {}
    for name, f in features.items():
        means = torch.stack([f[source.labels == k].mean(0) for k in range(source.num_classes)])
        between[name] = float(means.var(0, correction=0).sum() / f.var(0, correction=0).sum())
    assert between["judge"] > 0.85
    assert between["factors"] < 0.6


def test_its_numbers_have_a_protocol_of_their_own():
    cfg = config.Data(source="scenes:medium", size=32, train=20, val=40)
    setups = {name: protocol.open_setup(cfg, config.Protocol(features=name, n=40)) for name in ("judge", "factors")}
    marks = {setup.resolved().of("images", "features").hash for setup in setups.values()}
    assert len(marks) == 2
    facts = setups["factors"].resolved().sections["features"]
    assert facts["name"] == "factors"
    assert facts["version"] == factors.load().fingerprint
    assert setups["factors"].unknown_classes is None
    source = setups["factors"].source
    logits = setups["factors"].space(images_of(source, torch.arange(40))).logits
    assert (setups["factors"].classify(logits) == source.labels).float().mean() > 0.95


# -- training one ------------------------------------------------------------------------------------------------------


def recipe(source: str = "scenes:medium", **data) -> config.Phase:
    return config.Recipe(
        name="mine", tier="tiny", data=config.Data(source=source, train=256, val=64, **data),
        train=config.Train(samples=256, batch=32), pretrain=config.Pretrain(objective="regress"),
    ).last  # fmt: skip


def test_trainable_on_other_scenes_and_read_from_the_run(tmp_path):
    task = PretrainTask(recipe("scenes:other"))
    optimizer = torch.optim.Adam(task.objective.parameters(), 3e-3)
    losses = []
    for step in range(12):
        batch = task.source.batch(torch.arange(32))
        loss, found = task.objective(batch, StepRandom(0, step, 32), 0)
        assert set(found) == set(task.weights.columns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 0.5 < losses[0] < 2.5, "in units of the variance"
    assert losses[-1] < 0.8 * losses[0]
    scores = task.evaluate(task.weights, 0)
    assert set(scores) == {f"r2_{name}" for name in task.weights.columns}
    task.finish(task.weights.eval(), runs.RunDir(tmp_path))
    space = open_space(f"factors:{tmp_path}", 32)
    images = images_of(task.source, torch.arange(4))
    torch.testing.assert_close(space(images).features, task.weights(images)[0], rtol=0, atol=5e-2)
    assert space.facts()["name"] == "factors"
    assert str(tmp_path) not in json.dumps(space.facts())


def test_what_cannot_be_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="flip"):
        PretrainTask(recipe(flip=True))
    with pytest.raises(CheckpointError, match="no file"):
        open_space(f"factors:{tmp_path}", 32)
    with pytest.raises(CheckpointError, match="not a factors"):
        factors.load(io.ASSETS / "judge.safetensors")
    source = scenes("medium", 20)
    monkeypatch.setattr(source, "factors", lambda indices: None)
    with pytest.raises(ConfigError, match="needs the true factors"):
        factors.targets(source, torch.arange(4))
