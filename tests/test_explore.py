"""What the app and the widgets compute: closed forms, agreement with the reports and with plain sampling, refusals."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from vfmlab import api, runs
from vfmlab.data import examples
from vfmlab.errors import ConfigError, DataError, RunError
from vfmlab.evaluation.roundtrip import as_saved
from vfmlab.studies import explore, interpolate, leaderboard, results
from vfmlab.training.events import Event
from vfmlab.weights import bundled


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The bundled tokenizers, and one tiny pipeline."""
    root = tmp_path_factory.mktemp("explore_runs")
    bundled.put(root)
    for _ in api.train("tiny_plain_vae", root, {"diffusion.train.evaluate_at": [64]}):
        pass
    return root


@pytest.fixture(scope="module")
def tokenizer(root):
    return api.load_tokenizer("bundled_vfm_vae_tokenizer", root)


@pytest.fixture(scope="module")
def model(root):
    return api.load_diffusion("tiny_plain_vae", root)


@pytest.fixture(scope="module")
def data():
    return bundled.pipeline().data.model_copy(update={"val": 32})


@pytest.fixture(scope="module")
def images(data):
    return examples(data, 4)[0]


@pytest.fixture(scope="module")
def bank(tokenizer, data):
    return explore.bank(tokenizer, data, 24)


def test_bundled_tokenizers_are_what_their_reports_say(root, tokenizer, images):
    ids = bundled.put(root)  # a second time changes nothing
    assert [i.rpartition("-")[0] for i in ids] == ["bundled_vfm_vae_tokenizer", "bundled_plain_vae_tokenizer"]
    report = runs.open_run(ids[0], root).report()
    told, spread = report["metrics"]["psnr"]["value"], report["metrics"]["psnr"]["spread"]
    psnr = api.reconstruct(tokenizer, images)[2].mean()
    assert abs(float(psnr) - told) < 2 * spread
    assert "bundled" in bundled.pipeline("bundled_plain_vae").name
    with pytest.raises(RunError, match="choose from"):
        bundled.pipeline("nothing")


def test_bundled_runs_that_were_cut_short_are_put_whole(root, tmp_path, monkeypatch):
    real = runs.RunDir.set_status

    def killed(folder, **changes):
        if changes.get("state") == "finished":
            raise KeyboardInterrupt
        return real(folder, **changes)

    monkeypatch.setattr(runs.RunDir, "set_status", killed)
    with pytest.raises(KeyboardInterrupt):
        bundled.put(tmp_path, ["bundled_plain_vae"])
    monkeypatch.setattr(runs.RunDir, "set_status", real)
    (name,) = bundled.put(tmp_path, ["bundled_plain_vae"])
    assert runs.open_run(name, tmp_path).metrics() == runs.open_run(name, root).metrics(), "no point of its curves twice"


def test_runs_under_their_earlier_name_open(root, tmp_path):
    """The bundled tokenizers were called starter_* once; what was put into a folder then stays what it was."""
    old = tmp_path / "starter_plain_vae_tokenizer-8b21d204"
    shutil.copytree(runs.open_run("bundled_plain_vae_tokenizer", root).path, old)
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "name": "starter_plain_vae_tokenizer"}))
    assert api.load_tokenizer("starter_plain_vae_tokenizer", tmp_path).latent_shape
    assert len(bundled.put(tmp_path)) == len(runs.scan(tmp_path)) - 1


def test_numbers_of_an_image_are_those_of_the_report_s_definition(tokenizer, images):
    made = explore.reconstruct(tokenizer, images)
    restored = as_saved(api.reconstruct(tokenizer, images)[1])
    torch.testing.assert_close(made.images, restored)
    mse = ((images - restored) / 2).double().square().mean((1, 2, 3))
    assert made.metrics["psnr"] == pytest.approx((-10 * mse.log10()).tolist(), abs=1e-4)
    assert {*made.metrics, *made.missing} == {"psnr", "ssim", "lpips", "feature_distance"}
    assert made.metrics.keys().isdisjoint(made.missing)
    unknown = explore.reconstruct(tokenizer, images[:1], space="no_such_space")
    assert "no_such_space" in unknown.missing["feature_distance"]
    assert made.error().shape == images.shape == made.latent_map().shape


def test_disturbing_the_latent_costs_detail_step_by_step(tokenizer, images, bank):
    z = explore.encode(tokenizer, images)
    fine, coarse = (explore.Disturbance(bits=b)(z, bank) - z for b in (8, 1))
    assert fine.square().mean() < 1e-3 < coarse.square().mean()
    torch.testing.assert_close(explore.Disturbance()(z), z)
    noise = explore.Disturbance(sigma=0.5, seed=3)(z) - z
    torch.testing.assert_close(noise, explore.Disturbance(sigma=0.5, seed=3)(z) - z)
    assert noise.std() == pytest.approx(0.5, abs=0.05)
    fewer = [float((explore.Disturbance(channels=k)(z, bank) - z).square().mean()) for k in (1, 4, 8)]
    assert fewer[0] > fewer[1] > fewer[2]


def test_disturbances_that_make_no_sense_are_refused(tokenizer, images, bank):
    for wrong in ({"sigma": float("nan")}, {"sigma": -1}, {"bits": 0}, {"bits": 40}, {"channels": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            explore.Disturbance(**wrong)
    z = explore.encode(tokenizer, images)
    with pytest.raises(ConfigError, match="bank"):
        explore.Disturbance(bits=2)(z)
    with pytest.raises(ConfigError, match="channels"):
        explore.Disturbance(channels=64)(z, bank)
    with pytest.raises(DataError, match="images B x 3 x 32 x 32"):
        explore.reconstruct(tokenizer, torch.zeros(1, 3, 8, 8))


def test_the_nearest_image_is_the_image_itself(tokenizer, bank):
    picture = bank.images()[5:6]
    found = explore.nearest(bank, explore.encode(tokenizer, picture), k=3)
    assert found.indices[0] == int(bank.indices[5])
    assert found.distances[0] < 1e-3 < found.distances[1] <= found.distances[2]
    torch.testing.assert_close(found.images[:1], picture)
    with pytest.raises(DataError, match="same tokenizer"):
        explore.nearest(bank, torch.zeros(1, 2, 4, 4))


def test_likeness_is_one_at_the_query_and_a_cosine_elsewhere():
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, :, 0, 0], maps[0, :, 0, 1], maps[0, :, 1, 0], maps[0, :, 1, 1] = (torch.tensor(v) for v in ([2.0, 0], [0.0, 3], [-1.0, 0], [1.0, 1]))
    expected = torch.tensor([[[1, 0], [-1, math.sqrt(0.5)]]])
    torch.testing.assert_close(explore.likeness(maps, (0.2, 0.3)), expected.float())
    with pytest.raises(ConfigError, match="0 to 1"):
        explore.likeness(maps, (0.5, float("nan")))


def test_a_marked_patch_is_where_it_was_asked_for():
    found = explore.marked(torch.zeros(1, 3, 32, 32), (0.5, 1.0))[0, 0]
    assert found.abs().nonzero()[:, 1].min() == 30
    assert found[16, 31] == 1
    assert found[15, 31] == found[16, 30] == -1


def test_maps_by_layer_end_with_the_latent(tokenizer, root, images):
    assert list(explore.layer_maps(tokenizer, images)) == ["layer 0", "layer 2", "layer -1", "latent"]
    assert list(explore.layer_maps(api.load_tokenizer("bundled_plain_vae_tokenizer", root), images)) == ["latent"]
    z = torch.linspace(-2.5, 2.5, 12).view(1, 3, 2, 2)
    shown = explore.channel_maps(z, 4, count=2)
    torch.testing.assert_close(shown[1, 0, ::2, ::2], z[0, 1] / 2.5)


def test_a_diffusion_run_on_a_bundled_tokenizer_tells_one_end(tmp_path, monkeypatch):
    asked, picture = [], torch.zeros(2, 3, 32, 32)

    def train(run, root):
        asked.append(run)
        for kind, phase, data in (("skip", "tokenizer", {}), ("start", "latents", {}), ("step", "latents", {}), ("finish", "latents", {}),
                                  ("step", "diffusion", {"loss": 1.0}), ("preview", "diffusion", {"images": picture}), ("finish", "diffusion", {})):  # fmt: skip
            yield Event(kind, "the_run", phase, 1, 2, 61.0, data)

    monkeypatch.setattr(api, "train", train)
    told = list(bundled.make(tmp_path))
    assert [kind for kind, _, _ in told] == ["step", "step", "preview", "finish"]
    assert told[1][1] == "diffusion: 1 of 2 images, 1:01 left"
    assert told[2][2] is picture
    assert asked[0].tokenizer_phase.id in {run.id for run in runs.scan(tmp_path)}  # it builds on what was put there


# -- between ----------------------------------------------------------------------------------------------------------


def test_walks_have_closed_forms():
    a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 2, 0])
    torch.testing.assert_close(interpolate.walk(a, b, 3), torch.stack([a, (a + b) / 2, b]))
    middle = interpolate.walk(a, b, 3, "spherical")[1]
    torch.testing.assert_close(middle, torch.tensor([1.0, 1, 0]) / math.sqrt(2) * 1.5)
    torch.testing.assert_close(interpolate.walk(a, 3 * a, 3, "spherical"), torch.stack([a, 2 * a, 3 * a]))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    lengths = [interpolate.walk(*noise, 9, kind).flatten(1).norm(dim=1) for kind in ("linear", "spherical")]
    assert lengths[0][4] < 0.8 * lengths[0][0]
    assert lengths[1].min() > 0.95 * lengths[1].max() * min(noise.flatten(1).norm(dim=1)) / max(noise.flatten(1).norm(dim=1))
    for wrong in ({"frames": 1}, {"frames": 1000}, {"kind": "cubic"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            interpolate.walk(a, b, **wrong)
    for end in (torch.zeros(3), -a):
        with pytest.raises(ConfigError, match="linear"):
            interpolate.walk(a, end, 3, "spherical")


def test_the_ends_between_two_images_are_their_reconstructions(tokenizer, images):
    walk = interpolate.images(tokenizer, images[:1], images[1:2], 5)
    assert len(walk.frames) == 5
    torch.testing.assert_close(walk.frames[[0, -1]], api.reconstruct(tokenizer, images[:2])[1])
    assert walk.length >= 1
    straight = interpolate.pixels(images[:1], images[1:2], 5)
    assert straight.length == pytest.approx(1, abs=1e-4)
    assert straight.roughness == pytest.approx(0, abs=1e-4)
    assert interpolate.pixels(images[:1], images[:1], 5).length is None


def test_the_ends_between_noises_and_classes_are_plain_samples(model):
    def plain(label, seed):
        *_, last = api.sample(model, [label], seed=seed, steps=4, guidance=2.0)
        return last.images[0]

    *_, last = interpolate.noises(model, 1, (3, 4), 3, steps=4, guidance=2.0)
    torch.testing.assert_close(last.images[0], plain(1, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(last.images[-1], plain(1, 4), atol=1e-4, rtol=0)
    before = model.network.label_embed.weight.clone()
    *_, last = interpolate.classes(model, (0, 2), 3, 3, steps=4, guidance=2.0)
    torch.testing.assert_close(last.images[0], plain(0, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(last.images[-1], plain(2, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.network.label_embed.weight, before)  # the model itself is as it was
    with pytest.raises(ConfigError, match="label 99"):
        next(interpolate.classes(model, (0, 99)))
    with pytest.raises(ConfigError, match="sde"):
        next(interpolate.noises(model, 0, (0, 1), sampler={"solver": "sde"}))


def test_two_samplings_go_step_by_step_and_are_closed_together(model):
    streams = {name: api.sample(model, [0], steps=steps, previews=4) for name, steps in (("short", 4), ("long", 8))}
    both = interpolate.together(streams)
    first = next(both)
    assert {name: p.step for name, p in first.items()} == {"short": 1, "long": 2}
    *_, last = both
    assert all(p.final for p in last.values())
    streams = {"one": api.sample(model, [0], steps=4, previews=4)}
    both = interpolate.together(streams)
    next(both)
    both.close()
    assert streams["one"].gi_frame is None


# -- numbers of many runs ---------------------------------------------------------------------------------------------


def test_tables_hold_what_was_measured_and_keep_protocols_apart(root):
    found = results.scan(root)
    (tiny,) = (r for r in found if r.kind == "diffusion")
    assert [at for at, _ in tiny.logged["gfd"]] == [64]
    assert len(leaderboard.convergence(found, "gfd").data) == 1
    ((heading, note, rows),) = leaderboard.tables(found)  # the tiny run has no report yet, and its tokenizer belongs to it
    assert [row["method"] for row in rows] == ["plain_vae", "vfm_vae"]  # the better rFD first
    assert "N = 1000" in heading
    assert "Protocol" in note
    report = api.evaluate(tiny.run, root)
    api.evaluate(runs.open_run(tiny.run, root).config().parent, root)
    found = results.scan(root)
    assert sorted(len(rows) for _, _, rows in leaderboard.tables(found)) == [1, 2]  # other images: another protocol
    mine = next(r for r in found if r.kind == "diffusion")
    assert mine.numbers["gfd"] == report["gfd"]
    assert not mine.numbers["ssim"].absent  # of its tokenizer
    (points,) = leaderboard.cloud(found, "rfd", "gfd")
    assert leaderboard.scatter(points, "rfd", "gfd").data[0].customdata[0] == mine.run
    assert [len(c) for c in leaderboard.cloud(found, "psnr", "rfd")] == [2, 1]
    assert len(results.scan(root, every_phase=True)) == len(found) + 1
    with pytest.raises(ConfigError, match="did you mean"):
        leaderboard.cloud(found, "rfd", "gfdd")
