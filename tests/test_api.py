"""The doors: what they load is whole, and what they draw is finite and does not depend on how it is cut into parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.utils import save_image

from vfmlab import api, runs
from vfmlab.errors import CheckpointError, ConfigError, DataError, RunError
from vfmlab.weights import io

SMALL = {"data.train": 32, "train.samples": 16, "diffusion.train.samples": 16, "diffusion.train.evaluate_at": []}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Root of a tokenizer and a diffusion run, two steps each."""
    root = tmp_path_factory.mktemp("api") / "runs"
    list(api.train("tiny_plain_vae", root, SMALL))
    return root


@pytest.fixture
def root(trained, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def pair(root) -> tuple[runs.RunDir, runs.RunDir]:
    tokenizer, diffusion = runs.scan(root)
    return tokenizer, diffusion


def images(stream):
    return list(stream)[-1].images


def test_parts_of_a_large_call_are_the_same_images(trained, monkeypatch):
    model = api.load_diffusion(pair(trained)[1].id, str(trained))
    labels = [i % model.num_classes for i in range(7)]
    whole = images(api.sample(model, labels, seed=3, steps=2))
    monkeypatch.setattr(api, "CHUNK", 3)
    cut = list(api.sample(model, labels, seed=3, steps=2))
    assert [preview.final for preview in cut] == [True]
    torch.testing.assert_close(cut[-1].images, whole)
    torch.testing.assert_close(images(api.sample(model, labels[4:], seed=3, steps=2, first=4)), whole[4:])
    noise = torch.randn(7, *model.tokenizer.latent_shape, generator=torch.Generator().manual_seed(0))
    assert images(api.sample(model, labels, steps=2, noise=noise)).shape == whole.shape
    for wrong in (noise[:-1], torch.cat([noise, noise]), noise[:, :1]):  # too few, too many, too narrow
        with pytest.raises(ConfigError, match="noise of shape .*7 labels need"):
            images(api.sample(model, labels, steps=2, noise=wrong))


@pytest.mark.parametrize(
    "how",
    [{"steps": 0}, {"guidance": 1e30}, {"guidance": float("nan")}, {"seed": -1}, {"labels": []}, {"labels": [99]}, {"labels": [0.5]},
     {"labels": ["disc"]}, {"seed": 1.5}, {"sampler": "heun"}, {"steps": 2, "sampler": {"steps": 3}}],
    ids=str,
)
def test_values_that_no_sample_can_have(trained, how):
    model = api.load_diffusion(pair(trained)[1].id, trained)
    with pytest.raises(ConfigError):
        next(iter(api.sample(model, **{"labels": [0], **how})))


def test_a_protocol_that_is_no_mapping_is_one_line(trained):
    with pytest.raises(ConfigError, match="not JSON"):
        api.evaluate(pair(trained)[1].id, trained, protocol="n=3")


def test_raw_weights_do_not_stand_in_for_averages(root):
    tokenizer, diffusion = pair(root)
    for run, load in ((diffusion, api.load_diffusion), (tokenizer, api.load_tokenizer)):
        run.ema.unlink()
        with pytest.raises(CheckpointError, match=r"lacks checkpoints/ema\.safetensors"):
            load(run.id, root)
    assert api.load_tokenizer(tokenizer.id, root, ema=False)
    tokenizer.model.unlink()
    for call in (lambda: api.load_tokenizer(tokenizer.id, root), lambda: list(api.train("tiny_plain_vae", root, SMALL))):
        with pytest.raises(CheckpointError, match="is finished, but '.*checkpoints' holds no weights; put them back"):
            call()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "std 0", "std negative"])
@pytest.mark.parametrize("broken", ["tokenizer", "diffusion"])
def test_broken_weights_are_an_error_and_no_picture(root, broken, value):
    tokenizer, diffusion = pair(root)
    run = tokenizer if broken == "tokenizer" else diffusion
    if isinstance(value, str) and broken == "diffusion":
        pytest.skip("statistics belong to the tokenizer")
    facts, tensors = io.metadata(run.ema), load_file(run.ema)
    key = "stat_std" if isinstance(value, str) else next(key for key, t in tensors.items() if t.is_floating_point())
    tensors[key].view(-1)[0] = {"std 0": 0.0, "std negative": -1.0}.get(value, value)
    save_file(tensors, run.ema, facts)
    with pytest.raises(CheckpointError, match=rf"{run.id}.*not (finite|positive): {key}"):
        images(api.sample(diffusion.id, [0], steps=1, root=root))
    if broken == "tokenizer":
        with pytest.raises(CheckpointError, match=key):
            api.reconstruct(tokenizer.id, torch.zeros(1, 3, 16, 16), root)


def test_weights_that_overflow_are_an_error_and_no_picture(root):
    tokenizer, _ = pair(root)
    loaded = api.load_tokenizer(tokenizer.id, root)
    with torch.no_grad():
        for parameter in loaded.decoder.parameters():
            parameter.fill_(1e30)
    side = loaded.size
    with pytest.raises(CheckpointError, match="not finite"):
        api.reconstruct(loaded, torch.rand(2, 3, side, side))


def test_a_copied_run_says_which_tokenizer_it_needs(root):
    tokenizer, diffusion = pair(root)
    shutil.rmtree(tokenizer.path)
    for load in (api.load_diffusion, api.load_tokenizer, api.tokenizer_run):
        with pytest.raises(RunError, match=rf"'{diffusion.id}' needs its tokenizer's run '{tokenizer.id}'.*copy"):
            load(diffusion.id, root)


def test_classes_by_name_or_number_one_or_several(trained):
    model = api.load_diffusion(pair(trained)[1].id, trained)
    wanted = images(api.sample(model, [1], steps=2))
    for labels in ([model.class_names[1]], model.class_names[1], 1):
        torch.testing.assert_close(images(api.sample(model, labels, steps=2)), wanted)
    with pytest.raises(ConfigError, match=r"unknown class 'horse' \(choose from: "):
        next(api.sample(model, ["horse"]))


def test_images_that_are_none_are_refused(trained, tmp_path):
    tokenizer = api.load_tokenizer(pair(trained)[0].id, trained)
    image = torch.zeros(1, 3, 16, 16)
    for wrong, said in ((image[:, :1], r"\(1, 1, 16, 16\)"), (image[0], r"\(3, 16, 16\)"), (image.numpy(), "ndarray"),
                        (image + 255, "from 255 to 255"), (image.byte(), "torch.uint8"), (image / 0, "from nan")):
        with pytest.raises(DataError, match=f"encode: .*{said}"):
            tokenizer.encode(wrong)
        with pytest.raises(DataError, match="images: "):
            api.reconstruct(tokenizer, wrong)
    with pytest.raises(DataError, match=r"decode: latents \(1, 3, 4, 4\); it takes B x \d+ x h x w"):
        tokenizer.decode(torch.zeros(1, 3, 4, 4))
    save_image(image, tmp_path / "one.png")
    assert api.reconstruct(tokenizer, str(tmp_path / "one.png"))[0].shape == image.shape
    with pytest.raises(DataError, match="not a regular file"):
        api.reconstruct(tokenizer, str(tmp_path))
    with pytest.raises(DataError, match="images: object; give paths"):
        api.reconstruct(tokenizer, object())
    for none in ([], image[:0]):
        with pytest.raises(DataError, match="images: (an empty list|none)"):
            api.reconstruct(tokenizer, none)


def test_an_untrained_tokenizer_can_be_looked_at():
    """Raw latents are there at once; those that a generator is trained on need statistics, and the message says both."""
    tokenizer = api.build_tokenizer(api.resolve("tiny_plain_vae")).eval()
    x = torch.zeros(2, 3, tokenizer.size, tokenizer.size)
    with torch.no_grad():
        raw = tokenizer.posterior(x).mode()
        assert raw.shape[1:] == tokenizer.latent_shape
        assert tokenizer.decode_raw(raw)[0].shape == x.shape
        with pytest.raises(CheckpointError, match=r"no latent statistics.*tokenizer\.posterior"):
            tokenizer.encode(x)


def test_leftovers_of_the_latent_cache_are_swept_at_the_start(root):
    folder = root / ".latents" / "some"
    folder.mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = folder / f".shard.safetensors.{gone.pid}.tmp"
    left.write_text("")
    os.utime(left, (1, 1))
    assert [event.kind for event in api.train("tiny_plain_vae", root, SMALL)] == ["skip", "skip"]
    assert not left.exists()


def test_reading_a_config_imports_no_models():
    """Seconds of every start: timm, torchvision, torch's compiler and scipy are for building networks."""
    heavy = ("timm", "torchvision", "torch._dynamo", "scipy", "accelerate", "torchdiffeq")
    code = f"import sys, vfmlab; vfmlab.resolve('tiny_vfm_vae'); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "[]", done.stderr
