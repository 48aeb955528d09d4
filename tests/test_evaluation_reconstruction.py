"""Reconstruction numbers against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from evaluation_toys import CFG, SIZE, Lossless, Toy, one_per_class, setup

import vfmlab
from vfmlab import config, data
from vfmlab.errors import DataError
from vfmlab.evaluation import reconstruction
from vfmlab.evaluation.instruments import pixels
from vfmlab.evaluation.instruments.base import Part, Pass
from vfmlab.evaluation.instruments.pixels import Pixels
from vfmlab.evaluation.number import Draft, quantities
from vfmlab.evaluation.pixels import compare, decibels
from vfmlab.evaluation.protocol import real_features
from vfmlab.evaluation.reconstruction import evaluate_reconstruction, measure
from vfmlab.evaluation.roundtrip import as_saved, through

BASE = config.Protocol(n=60, batch=25)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "perceptual", lambda device: "no weights in this test")


def evaluate(tokenizer, protocol=BASE, **how):
    return evaluate_reconstruction(tokenizer, how.pop("cfg", CFG), protocol, setup(protocol, **how))


def measured(images, restored, masks):
    """What the pixel metrics write of one batch."""
    s, tokenizer = setup(BASE), Lossless()
    s.source.masks = masks
    metric = Pixels(Pass(s, s.resolved(), tokenizer, None, None))
    metric.update(Part(images, restored, None, None, torch.arange(len(images))))
    draft = Draft()
    metric.write(draft)
    return draft


def test_lossless_tokenizer():
    numbers = evaluate(Lossless())
    assert numbers["psnr"].value == 100.0
    assert numbers["psnr_mask"].value == 100.0
    assert numbers["ssim"].value == pytest.approx(1.0, abs=1e-5)
    assert numbers["rfd"].value == pytest.approx(0.0, abs=1e-9)
    assert numbers["feature_distance"].value == pytest.approx(0.0, abs=1e-6)
    assert numbers["rkd"].value < numbers["rkd"].spread
    assert numbers["psnr"].n == 60
    json.dumps(numbers.as_json(), allow_nan=False)
    assert set(numbers) | set(numbers.curves) <= set(quantities())


def test_known_error():
    """A shift by 8 grey levels where nothing clips: PSNR is 20 log10(255 / 8), the covariance of features stays."""
    step = 8 / 127.5
    toy, source = Toy(), data.open_source(CFG, "val")
    batch = source.batch(torch.arange(20))
    x = as_saved(data.to_float(batch.images) * 0.5)
    report = measured(x, x + step, source.masks)
    for name in ("psnr", "psnr_mask"):
        assert report.numbers[name].value == pytest.approx(20 * math.log10(255 / 8), abs=1e-3)
        assert report.numbers[name].spread == pytest.approx(0, abs=1e-3)
    a, b = toy(x).features, toy(x + step).features
    torch.testing.assert_close(torch.cov(a.T), torch.cov(b.T), atol=1e-5, rtol=1e-4)


def test_mask_psnr_sees_only_the_object():
    x = torch.zeros(2, 3, 8, 8)
    y = x.clone()
    y[:, :, :4] = 0.2  # error in the upper half only: mean squared error .01 on [0, 1]
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    masks[0, :, :4] = True
    x, y, masks = (torch.nn.functional.interpolate(image.float(), 16) for image in (x, y, masks))
    report = measured(x, y, lambda ids: masks.bool())
    assert report.numbers["psnr_mask"].value == pytest.approx(20.0, abs=1e-4)
    assert report.numbers["psnr_mask"].n == 1  # the other image has no object
    assert report.numbers["psnr"].value == pytest.approx(-10 * math.log10(0.005), abs=1e-4)


def test_ssim_of_unrelated_images_is_low():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(4, 3, 32, 32, generator=draw) * 2 - 1 for _ in range(2))
    values = compare(x, y, None, "none")
    assert float(values["ssim"].mean()) < 0.1
    assert values["psnr_mask"] == "this data has no masks"


def test_feature_distance_is_one_minus_cosine_image_by_image(monkeypatch):
    """Also beyond the rows of real features that are kept: those are then computed anew."""
    space, tokenizer = Toy(), Lossless(0.2)
    images = data.to_float(data.open_source(CFG, "val").batch(torch.arange(60)).images)
    restored = through(tokenizer, images).restored
    a, b = space(images).features.double(), space(restored).features.double()
    apart = 1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    assert float(apart.mean()) > 1e-3
    for kept in (10_000, 30):
        monkeypatch.setattr("vfmlab.evaluation.frechet.ROWS", kept)
        monkeypatch.setattr(reconstruction, "real_features", lambda setup: real_features(setup, cached=False))
        value = evaluate(tokenizer, space=space)["feature_distance"]
        assert value.value == pytest.approx(float(apart.mean()), abs=1e-6)
        assert value.spread == pytest.approx(float(apart.std(correction=0)), abs=1e-6)
        assert value.n == 60


def test_batch_size_does_not_matter():
    results = [evaluate(Lossless(0.05), BASE.model_copy(update={"batch": b})) for b in (7, 60)]
    for name, entry in results[0].items():
        other = results[1][name]
        assert entry.protocol == other.protocol
        if entry.value is not None:
            assert entry.value == pytest.approx(other.value, rel=1e-5, abs=1e-7), name


def test_noise_curve_falls_and_begins_at_the_psnr():
    numbers = evaluate(Lossless())
    curve = numbers.curves["noise_psnr"]
    assert curve.facts["sigma"][0] == 0
    assert curve.value[0] == pytest.approx(100.0, abs=50)  # normalising and back rounds a few pixels differently
    assert all(a > b for a, b in zip(curve.value, curve.value[1:], strict=False))
    # Noise of sigma standard deviations (.4 to .6 by channel) on [-1, 1], little clipping at sigma .1:
    expected = -10 * math.log10(float((0.1 * torch.linspace(0.4, 0.6, 12) / 2).square().mean()))
    assert curve.value[1] == pytest.approx(expected, abs=1.0)


def test_what_cannot_be_had_has_a_reason_and_no_value():
    numbers = evaluate(Lossless(statistics=False))
    assert (numbers["lpips"].value, numbers["lpips"].reason) == (None, "no weights in this test")
    assert "no latent statistics" in numbers.curves["noise_psnr"].reason
    assert numbers["class_accuracy_own"].value is None
    assert "knows no classes" in numbers["class_accuracy_own"].reason
    assert numbers["psnr"].value == 100.0


def test_class_accuracy_of_reconstructions():
    """The space calls every image by its nearest prototype; the labels it should find are those of the data."""
    source = data.open_source(CFG, "val")
    space = Toy(source.class_names, one_per_class(source))
    value = evaluate(Lossless(), space=space)["class_accuracy_own"]
    images = data.to_float(source.batch(torch.arange(60)).images)
    expected = (space(images).logits.argmax(1) == source.labels).float().mean()
    assert value.value == pytest.approx(float(expected), abs=1e-6)


def test_broken_decoder_is_an_error_not_a_black_image():
    with pytest.raises(DataError, match="not finite"):
        evaluate(Lossless(float("nan")))


def test_modules_come_back_in_their_mode_and_progress_is_told():
    tokenizer, told = Lossless().train(), []
    measure(tokenizer, CFG, BASE, setup(BASE), lambda done, total: told.append((done, total)))
    assert tokenizer.training
    assert told == [(25, 60), (50, 60), (60, 60)]


def test_perfect_image_is_finite():
    assert float(decibels(torch.tensor(0.0))) == pytest.approx(100)
    assert float(decibels(torch.tensor(0.01))) == pytest.approx(20)


def test_lpips_with_an_untrained_backbone(monkeypatch):
    """With a network at hand LPIPS is measured: 0 for equal images, more for a larger error."""
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    torch.manual_seed(0)
    net = lpips._LPIPS(pretrained=False, net="alex", pnet_rand=True, eval_mode=True)
    for layer in net.lins:
        layer.model[-1].weight.data.abs_()
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 32, 32, generator=draw) * 2 - 1
    values = []
    for error in (0.0, 0.1, 0.4):
        values.append(float(compare(x, (x + error).clamp(-1, 1), None, net)["lpips"].mean()))
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert 0 < values[1] < values[2]
    assert SIZE < 32
    assert "too small" in compare(x[..., :SIZE, :SIZE], x[..., :SIZE, :SIZE], None, net)["lpips"]


def test_lpips_without_weights_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    pixels.perceptual.cache_clear()
    reason = pixels.perceptual("cpu")
    pixels.perceptual.cache_clear()
    assert "put https://" in reason
    assert "\n" not in reason


def test_psnr_is_computed_in_one_place():
    root = Path(vfmlab.__file__).parent
    places = [path.relative_to(root).as_posix() for path in root.rglob("*.py") if ".log10()" in path.read_text()]
    assert places == ["evaluation/pixels.py"]
