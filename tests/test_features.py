"""The frozen VFM's features of the training images, computed once: the same training within fp16 rounding."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import COMMON, tiny_run, train_tiny
from toy import outcome

from vfmlab import presets, vfm
from vfmlab.api import load_tokenizer
from vfmlab.config import override
from vfmlab.data import open_source
from vfmlab.diffusion import latents, targets
from vfmlab.errors import CheckpointError, ConfigError, TrainingError
from vfmlab.training.features import Reader, stored
from vfmlab.weights import io

CACHED = {"train.vfm_cache": 1.0, "train.precision": "fp32"}


def asked(monkeypatch):
    """The images that the VFM is asked about, from here on."""
    calls = []
    features = vfm.VisionModel.features
    monkeypatch.setattr(vfm.VisionModel, "features", lambda self, images, *a: calls.append(len(images)) or features(self, images, *a))
    return calls


def test_cached_and_uncached_training_agree(tmp_path):
    """Flips included. Smaller inputs of equivariance's prior path are not cached, and are asked about."""
    slow = {"train.precision": "fp32", "train.lr": 1e-4}  # Adam enlarges what fp16 rounds
    found, _ = train_tiny("vfm_vae", tmp_path / "cached", **slow, **{"train.vfm_cache": 1.0})
    plain, _ = train_tiny("vfm_vae", tmp_path / "plain", **slow)
    assert (tmp_path / "cached/.latents").is_dir()
    assert not (tmp_path / "plain/.latents").exists()
    ours, theirs = found.metrics("step"), plain.metrics("step")
    for one, other in zip(ours, theirs, strict=True):
        for key in ("loss", "l1", "vf", "psnr"):
            assert one[key] == pytest.approx(other[key], rel=2e-3), (key, one["step"])
    assert ours[-1]["loss"] != theirs[-1]["loss"], "it does read what fp16 has rounded"


def test_a_frozen_vfm_costs_once(tmp_path, monkeypatch):
    more = {**CACHED, "equivariance": {"p_latent": 0.0, "p_prior": 0.0}, "train.preview_every": 10**6}
    train_tiny("vfm_vae", tmp_path, until=32, **more)
    calls = asked(monkeypatch)
    again, _ = train_tiny("vfm_vae", tmp_path, **more)
    assert calls.count(8) < 4, "no batch of the four steps asks it, previews do"
    monkeypatch.undo()
    whole, _ = train_tiny("vfm_vae", tmp_path / "whole", **more)
    assert outcome(again) == outcome(whole)


def test_the_latent_cache_reads_what_is_stored(tmp_path, monkeypatch):
    """Mirrored images too: the generator's latents are those of the VFM asked anew, within fp16 rounding."""
    run, _ = train_tiny("vfm_vae", tmp_path, **CACHED)
    tokenizer = load_tokenizer(run.path)
    images = open_source(tiny_run("vfm_vae").data, "train")
    maps = stored(tmp_path / ".latents", tokenizer, images, flip=True)
    calls = asked(monkeypatch)
    *_, done = latents.build(tmp_path / "read", tokenizer, images, flip=True, maps=maps)
    assert done == (len(images), len(images))
    assert not calls
    monkeypatch.undo()
    list(latents.build(tmp_path / "asked", tokenizer, images, flip=True))
    one, other = latents.LatentSource(tmp_path / "read"), latents.LatentSource(tmp_path / "asked")
    every, flip = torch.arange(len(images)), torch.arange(len(images)) % 2 == 0
    torch.testing.assert_close(one.latents(every, flip), other.latents(every, flip), rtol=0.02, atol=0.02)
    assert not torch.equal(one.latents(every, flip), other.latents(every, flip)), "it does read what fp16 has rounded"


def test_maps_of_others_are_not_read(tmp_path):
    run, _ = train_tiny("vfm_vae", tmp_path, **CACHED)
    tokenizer, folder = load_tokenizer(run.path), tmp_path / ".latents"
    images = open_source(tiny_run("vfm_vae").data, "train")
    fewer = open_source(tiny_run("vfm_vae", **{"data.train": 24}).data, "train")
    assert stored(folder, tokenizer, images, flip=True) is not None
    assert stored(folder, tokenizer, fewer, flip=True) is None
    (folder / "features-0").mkdir()
    (folder / "features-0" / "meta.json").write_text('{"format": "of another version"}')
    assert stored(folder, tokenizer, images, flip=True) is not None, "a folder that nobody can read is no reason to stop"
    small, reader = open_source(tiny_run("vfm_vae").data, "train"), Reader(tokenizer.vfm, tuple(tokenizer.layers))
    small.least = 20  # data.least_side: others stand in for images that are smaller, so the maps are theirs
    list(targets.build(tmp_path / "small" / f"features-{reader.fingerprint(small, True)}", reader, small, True))
    assert stored(tmp_path / "small", tokenizer, small, flip=True) is not None
    assert stored(tmp_path / "small", tokenizer, images, flip=True) is None
    plain, _ = train_tiny("plain_vae", tmp_path)
    assert stored(folder, load_tokenizer(plain.path), images, flip=False) is None
    next(folder.glob("features-*/targets-00000.safetensors")).unlink()
    assert stored(folder, tokenizer, images, flip=True) is None


def test_more_than_allowed_is_said_and_asked_at_every_step(tmp_path):
    _, events = train_tiny("vfm_vae", tmp_path, until=8, **{"train.vfm_cache": 1e-6})
    notes = [event.data["note"] for event in events if event.data.get("note")]
    assert len(notes) == 1
    assert "the VFM is asked at every step: its features take" in notes[0]
    assert "train.vfm_cache allows 1e-06" in notes[0]
    assert not (tmp_path / ".latents").exists()


@pytest.fixture(scope="module")
def source():
    return open_source(tiny_run("vfm_vae").data, "train")


def reader(seed=0, layers=(0, -1)):
    cfg = override(presets.get("tiny_vfm_vae"), COMMON | {"vfm.weights": "random", "vfm.seed": seed}).vfm
    return Reader(vfm.build(cfg, 16), layers)


def test_what_decides_the_folder(source):
    own = reader()
    assert own.fingerprint(source, True) == reader().fingerprint(source, True)
    others = [reader(1).fingerprint(source, True), reader(layers=(0,)).fingerprint(source, True), own.fingerprint(source, False)]
    assert len({own.fingerprint(source, True), *others}) == 4
    assert own.size(10, True) == 2 * own.size(10, False) == pytest.approx(4e-8 * sum(own.model.width(k) * own.model.grid(k)[0] ** 2 for k in (0, -1)))


def test_what_is_read_is_what_the_vfm_says(source, tmp_path):
    own = reader()
    *_, (done, of) = targets.build(tmp_path, own, source, flip=True)
    assert done == of == len(source)
    found, images = targets.Targets(tmp_path), source.batch(torch.tensor([5, 2])).images / 127.5 - 1
    turned = found[torch.tensor([5, 2]), torch.tensor([False, True])]
    images[1] = images[1].flip(-1)
    for key, value in own.read(images).items():
        torch.testing.assert_close(turned[key], value, rtol=1e-3, atol=1e-3)


def test_features_of_another_vfm_are_one_line(source, tmp_path):
    [*targets.build(tmp_path / "one", reader(), source)]
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    with pytest.raises(CheckpointError, match="are of another VFM, data set or options"):
        [*targets.build(tmp_path / "other", reader(1), source)]


def test_a_full_disk_is_one_line(source, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(TrainingError, match="disk full while writing") as caught:
        [*targets.build(tmp_path, reader(), source)]
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    [*targets.build(tmp_path, reader(), source)]
    assert len(targets.Targets(tmp_path)) == len(source)


def test_a_limit_of_zero_is_refused():
    with pytest.raises(ConfigError, match="vfm_cache"):
        override(presets.get("tiny_vfm_vae"), {"train.vfm_cache": 0})
