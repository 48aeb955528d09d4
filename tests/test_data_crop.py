"""Random squares of training images, and images that are left out because they are small."""

from __future__ import annotations

import io
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_task, untrained

from vfmlab import presets, runs
from vfmlab.config import Data
from vfmlab.data import BatchStream, open_source, to_float
from vfmlab.data.base import ImageSource
from vfmlab.data.decode import Cut, decode
from vfmlab.errors import ConfigError, DataError
from vfmlab.training import open_step
from vfmlab.training.ar import ARTask
from vfmlab.training.tokenizer import TokenizerTask


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of ten images of 40 x 30 pixels; every third has a side of 20."""
    root = tmp_path_factory.mktemp("photos")
    for k in ("a", "b"):
        (root / k).mkdir()
        for i in range(10):
            picture(40, 20 if i % 3 == 0 else 30, i).save(root / k / f"{i}.png")
    return root


def test_a_cut_is_a_square_of_the_short_side_resized_by_lanczos():
    image = picture(40, 30)
    for share, left, top, box in ((0.5, 0.0, 0.0, (0, 0, 15, 15)), (1.0, 0.999, 0.5, (10, 0, 40, 30)), (0.5, 0.999, 0.999, (25, 15, 40, 30))):
        expected = np.asarray(image.crop(box).resize((16, 16), Image.Resampling.LANCZOS))
        assert np.abs(decode(encoded(image), 16, Cut(share, left, top)).astype(int) - expected).max() <= 1


class Noting(ImageSource):
    """Notes the draws that it is given."""

    def __init__(self, count):
        super().__init__(4, torch.zeros(count, dtype=torch.long), ["all"], "noting")
        self.what, self.seen = "noting", []

    def cropped(self, indices, draws):
        self.seen.append(draws)
        return super().batch(indices)

    def read(self, indices):
        return torch.zeros(len(indices), 3, 4, 4, dtype=torch.uint8), indices


def draws(rows=None, start=0, seed=3):
    source = Noting(50)
    stream = BatchStream(source, 64, seed, start, rows, crop=(0.5, 0.75))
    next(stream)
    stream.close()
    return source.seen[0]


def test_draws_are_a_function_of_seed_and_step_whatever_the_process():
    whole = draws()
    assert whole.shape == (64, 3)
    assert 0.5 <= whole[:, 0].min() < 0.53
    assert 0.72 < whole[:, 0].max() <= 0.75
    assert 0 <= whole[:, 1:].min() < 0.1 < 0.9 < whole[:, 1:].max() < 1
    assert torch.equal(torch.cat([draws(slice(0, 32)), draws(slice(32, 64))]), whole)
    assert not torch.equal(draws(start=1), whole)
    assert not torch.equal(draws(seed=4), whole)


def test_a_tokenizer_trains_on_cuts_and_is_measured_on_centre_crops(folder):
    change = {"data.source": f"folder:{folder}", "data.size": 16, "data.crop": [0.5, 1.0], "data.train": None, "data.val": 4}
    phase = presets.get("tiny_plain_vae", change).phases()[0]
    task = TokenizerTask(phase)
    stream = task.stream(0, slice(0, 8))
    batch = next(iter(stream))
    stream.close()
    centre, phase_ = task.source.batch(batch.indices), presets.get("tiny_plain_vae", change | {"data.least_side": 30}).phases()[0]
    assert (task.source.least, TokenizerTask(phase_).source.least) == (None, 30)
    assert torch.equal(centre.labels, batch.labels)
    assert all(not torch.equal(a, b) for a, b in zip(centre.images, batch.images, strict=True))
    assert torch.equal(task.held_out.batch(torch.arange(4)).images, open_source(Data(source=f"folder:{folder}", size=16, val=4), "val").batch(torch.arange(4)).images)


def test_codes_are_of_cuts_where_they_are_encoded_anew_and_of_centre_crops_where_they_are_stored(folder, tmp_path):
    change = {"data.source": f"folder:{folder}", "data.size": 16, "data.crop": [0.5, 1.0], "data.train": None, "data.val": 4,
              "data.flip": False, "ar.ten_crops": None}
    for cached in (False, True):
        run = presets.get("tiny_ar", change | {"ar.cache": cached}).last
        task = ARTask(run, untrained(run), tmp_path / "latents")
        list(task.prepare(runs.create(run, tmp_path / str(cached)), True))
        stream, images = task.stream(3, slice(0, 8)), BatchStream(task.source, 8, run.seed, 3, crop=run.data.crop)
        batch, cut = next(stream), next(images)
        stream.close(), images.close()
        centre = task.source.batch(batch.indices)
        assert torch.equal(batch.labels.cpu(), centre.labels)
        of_cut, of_centre = (task.tokenizer.codes(to_float(one.images).to(task.device)).cpu() for one in (cut, centre))
        assert torch.equal(batch.codes.cpu(), of_centre if cached else of_cut)
        assert not torch.equal(of_cut, of_centre)


@pytest.mark.parametrize("how", ["stored", "fresh", "tuned"])
def test_diffusion_and_its_targets_see_cuts_where_images_are_encoded_anew_and_centre_crops_where_latents_are_stored(folder, tmp_path, how):
    change = {"data.source": f"folder:{folder}", "data.size": 16, "data.crop": [0.5, 1.0], "data.train": None, "data.val": 4, "data.flip": False,
              "diffusion.alignment.vfm.weights": "random"}
    change |= {} if how == "tuned" else {"diffusion.tune": None, "diffusion.cache": how == "stored", "diffusion.sample_posterior": False}
    run = presets.get("tiny_plain_vae_repa_e", change).last
    task = make_task(run, tmp_path)
    task.started = {"note": "said before"}
    said = list(task.prepare(runs.create(run, tmp_path / "run"), True))
    stream, images = task.stream(3, slice(0, 8)), BatchStream(task.source, 8, run.seed, 3, crop=run.data.crop)
    batch, cut = next(stream), next(images)
    stream.close(), images.close()
    seen, other = (cut, task.source.batch(batch.indices))[:: -1 if how == "stored" else 1]
    assert torch.equal(batch.labels.cpu(), seen.labels)
    latent = (lambda one: one) if how == "tuned" else lambda one: task.tokenizer.encode(to_float(one)).mode()
    for value, of in ((batch[0], latent), (batch.target, lambda one: task.targets.of("target").read(to_float(one))["target"])):
        right, wrong = (of(one.images).float() for one in (seen, other))
        assert (value.float() - right).abs().max() < 0.01 * (value.float() - wrong).abs().max()
    assert ("targets" in {what for what, *_ in said}) == (how == "stored")
    assert task.started["note"].startswith("said before")
    assert ("targets of random crops" in task.started["note"]) == (how != "stored")


def test_an_opened_step_on_an_untrained_tokenizer_sees_cuts_where_training_does(folder, tmp_path):
    change = {"data.source": f"folder:{folder}", "data.size": 16, "data.crop": [0.5, 1.0], "data.train": None, "data.val": 4}
    for name, of in (("tiny_plain_vae", "diffusion"), ("tiny_ar", "ar")):
        for cached in (False, True):
            more = {"ar.ten_crops": None} if of == "ar" else {}
            phase = presets.get(name, change | more | {f"{of}.cache": cached}).last
            task, _ = open_step._task(phase, tmp_path)
            assert (task.run.data.crop is None) == cached
            assert not getattr(task.run, of).cache


@pytest.mark.parametrize("workers", [0, 2])
def test_small_training_images_are_left_out(folder, workers):
    cfg = Data(source=f"folder:{folder}", size=16, val=4, least_side=30)
    source, val = open_source(cfg, "train").at_least(cfg.least_side), open_source(cfg, "val")
    stream = BatchStream(source, len(source), 0, workers=workers)
    (batch,) = islice(stream, 1)
    stream.close()
    names = {source.records.name(int(source.picked[i])) for i in batch.indices.tolist()}
    assert all(Image.open(name).height == 30 for name in names)
    everything = [source.records.name(int(i)) for i in source.picked]
    assert len(names) == sum(Image.open(name).height == 30 for name in everything) < len(everything)
    assert not source.bad, "to be small is no fault"
    assert any("below 30 px are left out" in note for note in source.notes)
    plain = Data(source=f"folder:{folder}", size=16, val=4)
    assert source.fingerprint == open_source(plain, "train").fingerprint, "the same images, of which some are not used"
    assert len(val.batch(torch.arange(4)).indices.unique()) == 4


def test_what_cannot_be_is_one_line(folder):
    with pytest.raises(DataError, match=r"all have a side below 31 px \(data.least_side\)"):
        open_source(Data(source=f"folder:{folder}", size=16), "train").at_least(31)
    for change, line in (
        ({"data.crop": [0.8, 0.5]}, "share of the short side"),
        ({"data.crop": [0.0, 0.5]}, "share of the short side"),
        ({"data.crop": [0.5, 1.0]}, "scenes are drawn at data.size"),
        ({"data.least_side": 256}, "scenes are drawn at data.size"),
    ):
        with pytest.raises(ConfigError, match=line) as error:
            presets.get("tiny_plain_vae", change)
        assert "\n" not in str(error.value)
