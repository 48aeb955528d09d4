"""The pocket VFM: bundled weights, layers and sizes, what it may know, and how it is trained."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from vfmlab import config, presets, runs, vfm
from vfmlab.data import open_source, to_float
from vfmlab.data.scenes import STYLES
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.seeding import StepRandom
from vfmlab.training import pretrain
from vfmlab.training.pretrain import Mixed, PretrainTask, ridge_accuracy
from vfmlab.weights import io

NAMES = ("pocket", "pocket_leaky", "pocket_random")
names = pytest.mark.parametrize("name", NAMES)


def scenes(style: str, n: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    source = open_source(config.Data(source=f"scenes:{style}", size=size, val=n, seed=77), "val")
    batch = source.batch(torch.arange(n))
    return to_float(batch.images), batch.labels


def run(objective: str = "factors+mae", source: str = "scenes:other", **data) -> config.Phase:
    return config.Recipe(
        name="p", tier="tiny", data=config.Data(source=source, **{"train": 96, "val": 48, **data}),
        train=config.Train(samples=64, batch=16, precision="fp32"), pretrain=config.Pretrain(objective=objective),
    ).last  # fmt: skip


@names
@pytest.mark.parametrize("size", [32, 64, 20])
def test_layers_and_sizes(name, size):
    model = vfm.build(config.VFM(name=name, layers=(0, 1, 2, -2, -1)), size)
    maps, pooled = model.features(scenes("medium", 2, size)[0])
    early, deep = (32, size // 2, size // 2), (128, size // 4, size // 4)
    assert {k: tuple(m.shape[1:]) for k, m in maps.items()} == {0: early, 1: deep, 2: deep, -2: deep, -1: deep}
    assert all((model.width(k), *model.grid(k)) == tuple(m.shape[1:]) for k, m in maps.items())
    torch.testing.assert_close(pooled, maps[-1].mean(dim=(2, 3)))
    torch.testing.assert_close(maps[-2], model.features(scenes("medium", 2, size)[0], (model.depth,)).maps[model.depth])


@names
def test_frozen_and_independent_of_the_batch(name):
    model = vfm.build(config.VFM(name=name), 32)
    assert model.layers == (0, 2, -1)
    images, _ = scenes("medium", 6)
    torch.nn.Sequential(model).train()
    few, many = (model.features(x).maps[-1] for x in (images[:2], images))
    torch.testing.assert_close(few, many[:2], rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) <= 3e6


def test_random_control_is_seeded():
    a, b, c = (vfm.build(config.VFM(name="pocket_random", seed=seed), 32) for seed in (0, 0, 1))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    same = vfm.build(config.VFM(name="pocket", weights="random"), 32)
    assert same.fingerprint == a.fingerprint
    images, _ = scenes("medium", 32)
    for layer, m in a.features(images, (0, 1, -1)).maps.items():
        assert 0.2 < m.std() < 5, f"layer {layer} of the random control has degenerate scale"


@pytest.mark.parametrize("name", ["pocket", "pocket_leaky"])
def test_bundled_files_are_small_and_say_how_they_were_made(name):
    path = io.ASSETS / f"{name}.safetensors"
    assert path.stat().st_size <= 6e6
    _, metadata = io.read(path, "weights")
    facts = json.loads(metadata[io.METADATA])
    assert {"samples", "seed", "data_fingerprint"} <= set(facts)
    assert facts["recipe"]["pretrain"]["objective"] == {"pocket": "factors+mae", "pocket_leaky": "leaky"}[name]
    assert facts["recipe"]["data"]["source"] == {"pocket": "scenes:other", "pocket_leaky": "scenes:hard"}[name]
    assert vfm.build(config.VFM(name=name), 32).fingerprint == io.sha256(path)[:16]


def test_what_it_learnt_from_shows_no_shape_and_no_texture_of_the_generator():
    other = STYLES["other"]
    for style in ("easy", "medium", "hard"):
        assert not set(other.shapes) & set(STYLES[style].shapes)
        assert not set(other.textures) & set(STYLES[style].textures)


def test_features_know_the_classes_far_better_than_random_ones():
    accuracy = {}
    for style, n, models in (("medium", 500, NAMES), ("hard", 800, ("pocket", "pocket_random"))):
        images, labels = scenes(style, n)
        for name in models:
            model = vfm.build(config.VFM(name=name), 32)
            pooled = torch.cat([model.features(x).pooled for x in images.split(200)])
            accuracy[style, name] = ridge_accuracy(pooled, labels)
    for style in ("medium", "hard"):
        trained, random = accuracy[style, "pocket"], accuracy[style, "pocket_random"]
        assert 1 - trained < 0.5 * (1 - random), accuracy
    assert accuracy["medium", "pocket_leaky"] > accuracy["medium", "pocket"], "the leaky control knows the classes"


@names
def test_layer_0_keeps_the_pixels(name):
    """Ridge regression from the early layer to pixels: what a tokenizer reads must hold what it is to reconstruct."""
    model = vfm.build(config.VFM(name=name), 32)
    fitted, tried = scenes("medium", 200)[0].split((150, 50))

    def table(images):
        early = F.pixel_unshuffle(model.features(images, (0,)).maps[0], 2)
        patches = F.pixel_unshuffle(images, 4)
        return (m.permute(0, 2, 3, 1).flatten(0, 2).double() for m in (early, patches))

    (x, y), (x_, y_) = table(fitted), table(tried)
    x, x_ = (torch.cat([m, torch.ones(len(m), 1, dtype=m.dtype)], 1) for m in (x, x_))
    weight = torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    assert 10 * torch.log10(4 / (x_ @ weight - y_).square().mean()) > 40


def test_wrong_sizes_and_layers():
    with pytest.raises(ConfigError, match=r"multiple of its patch of 4; use vfm.upscale=.* \(32 px\)"):
        vfm.build(config.VFM(name="pocket"), 30)
    with pytest.raises(ConfigError, match="has 4 blocks"):
        vfm.build(config.VFM(name="pocket", layers=(0, 12, -1)), 32)


def test_wrong_files(tmp_path):
    with pytest.raises(CheckpointError, match="not a pocket"):
        vfm.build(config.VFM(name="pocket", weights=str(io.ASSETS / "judge.safetensors")), 32)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((io.ASSETS / "pocket.safetensors").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        vfm.build(config.VFM(name="pocket", weights=str(cut)), 32)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["factors+mae", "leaky", "mae"])
def test_objectives_learn_and_finish(objective, tmp_path):
    task = PretrainTask(run(objective))
    batch = next(iter(task.stream(0, slice(0, 16))))
    optimizer = torch.optim.AdamW(task.objective.parameters(), 2e-3)
    losses = []
    for _ in range(8):
        loss, report = task.objective(batch, StepRandom(0, 0, 16), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert ("class" in report) == (objective != "mae")
    assert all(not value.requires_grad for value in report.values())
    task.finish(task.weights.eval(), runs.RunDir(tmp_path))
    model = vfm.build(config.VFM(name="pocket", weights=str(tmp_path)), 32)
    images = to_float(batch.images)
    saved, trained = model.features(images).maps[-1], task.weights(images)[-1]
    assert (saved - trained).norm() < 0.01 * trained.norm(), "more than the rounding of fp16 weights"
    assert 0 <= task.evaluate(task.weights, 0)["ridge_accuracy"] <= 1


def test_shipped_recipe_takes_no_label_from_the_generators_classes():
    """On the generator's own scenes the objective of the shipped model has no class head, whatever their labels are."""
    assert PretrainTask(run("factors+mae", "scenes:medium")).objective.classes is None
    assert PretrainTask(run("factors+mae", "scenes:other")).objective.classes is not None
    assert PretrainTask(run("leaky", "scenes:medium")).objective.classes is not None


def test_hidden_patches_cannot_be_seen():
    task = PretrainTask(run())
    net = task.weights.eval()
    images, _ = scenes("other", 2)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 2:5, 3:6] = True
    scribbled = images.clone()
    scribbled[:, :, 8:20, 12:24] = 1.0
    torch.testing.assert_close(net(images, mask)[-1], net(scribbled, mask)[-1])
    assert not torch.allclose(net(images)[-1], net(scribbled)[-1])


def test_same_step_same_loss_and_halves_make_the_whole():
    """Random numbers come from (seed, step) and belong to rows: two processes see what one sees."""
    task = PretrainTask(run())
    task.objective.eval()  # batch statistics are the one thing that depends on who shares the batch
    batch = next(iter(task.stream(3, slice(0, 16))))
    hidden = task.objective._hidden(to_float(batch.images), StepRandom(0, 3, 16))
    again = task.objective._hidden(to_float(batch.images), StepRandom(0, 3, 16))
    half = task.objective._hidden(to_float(batch.images[8:]), StepRandom(0, 3, 16, slice(8, 16)))
    assert torch.equal(hidden, again)
    assert torch.equal(hidden[8:], half)
    assert 0.1 < hidden.float().mean() < 0.4
    rows = next(iter(task.stream(3, slice(8, 16))))
    assert torch.equal(rows.images, batch.images[8:])


def test_mixed_source_matches_classes_by_name():
    data = [config.Data(source="scenes:hard", train=48), config.Data(source="scenes:medium", train=40)]
    parts = [open_source(part, "train") for part in data]
    mixed = Mixed(parts)
    assert len(mixed) == 80
    indices = torch.tensor([5, 0, 7, 78, 79])
    batch = mixed.batch(indices)
    for row, index in enumerate(indices.tolist()):
        source = parts[index % 2]
        own = source.batch(torch.tensor([index // 2]))
        assert torch.equal(batch.images[row], own.images[0])
        assert mixed.class_names[batch.labels[row]] == source.class_names[own.labels[0]]
        assert mixed.factors(indices)["x"][row] == source.factors(torch.tensor([index // 2]))["x"][0]
        assert torch.equal(mixed.masks(indices)[row], source.masks(torch.tensor([index // 2]))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "factor"}, "pretrain.objective 'factor': unknown .*factors"),
        ({"size": 30}, "data.size 30"),
        ({"flip": True}, "no flips"),
    ],
)
def test_wrong_recipes(changes, message):
    with pytest.raises(ConfigError, match=message):
        PretrainTask(run(**changes))


def test_factors_need_scenes(monkeypatch):
    class Plain(pretrain.ImageSource):
        def read(self, indices):
            return torch.zeros(len(indices), 3, 32, 32, dtype=torch.uint8), indices

    plain = Plain(32, torch.zeros(20, dtype=torch.long), ["a"], "f")
    monkeypatch.setattr(pretrain, "open_source", lambda data, split: plain)
    with pytest.raises(ConfigError, match=r"needs the true factors .* pretrain.objective=mae"):
        PretrainTask(run("factors+mae", "folder:photos"))
    assert PretrainTask(run("mae", "folder:photos")).objective.supervised is False


def test_export_refuses_what_does_not_load(tmp_path, monkeypatch):
    monkeypatch.setattr("vfmlab.weights.io.ASSETS", tmp_path / "assets")
    (tmp_path / "assets").mkdir()
    with pytest.raises(CheckpointError, match="no finished pretraining"):
        pretrain.export(tmp_path, "mine")
    (tmp_path / "pocket.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError):
        pretrain.export(tmp_path, "mine")
    task = PretrainTask(run())
    task.finish(task.weights, runs.RunDir(tmp_path))
    assert pretrain.export(tmp_path, "mine").read_bytes() == (tmp_path / "pocket.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("weights", "preset"),
    [("pocket", "pocket_vfm"), ("pocket_leaky", "pocket_vfm_leaky"), ("judge", "pocket_judge"), ("factors", "pocket_factors"),
     ("groups", "pocket_groups"), ("pocket_text", "pocket_text")],
)
def test_bundled_weights_are_what_their_preset_trains(weights, preset):
    _, metadata = io.read(io.ASSETS / f"{weights}.safetensors", "weights")
    recipe = json.loads(metadata[io.METADATA])["recipe"]
    assert part_of(recipe, presets.get(preset).model_dump(mode="json"))


def part_of(recipe, config) -> bool:
    """Whether `config` says all that `recipe` says; it may have fields that did not exist then, at their defaults."""
    if isinstance(recipe, dict) and isinstance(config, dict):
        return all(key in config and part_of(value, config[key]) for key, value in recipe.items())
    return recipe == config
