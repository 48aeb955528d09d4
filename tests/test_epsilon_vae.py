"""Epsilon-VAE: reference values of grids and estimates; images that depend on latent and seed alone; training; refusals; a tiny run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from vfmlab import api, presets
from vfmlab.config import override
from vfmlab.decoders.diffusion import DiffusionDecoder, log_grid
from vfmlab.diffusion import path
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation import generation
from vfmlab.evaluation.reconstruction import evaluate_reconstruction
from vfmlab.evaluation.roundtrip import as_saved, seeds, through
from vfmlab.registry import TOKENIZERS
from vfmlab.seeding import StepRandom, generator
from vfmlab.studies import explore, interpolate
from vfmlab.tokenizers.base import Statistics
from vfmlab.weights.load import build_network

DECODER = {"kind": "diffusion", "base": 8, "multipliers": [1, 2], "blocks": 1}


def make(**fields):
    torch.manual_seed(0)
    kind = TOKENIZERS.get("epsilon_vae")
    small = {"channels": 4, "factor": 4, "width": 8, "multipliers": [1, 1, 1], "blocks": 1, "attention": [], "decoder": DECODER}
    tokenizer = kind(kind.Config.model_validate({**small, **fields}), 16)
    for parameter in tokenizer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    tokenizer.set_statistics(Statistics(torch.zeros(4), torch.ones(4), 1, "toy"))
    return tokenizer.eval()


def latents(n=4):
    return torch.randn(n, 4, 4, 4, generator=generator("epsilon latents"))


def test_reference_values(golden):
    g = load_file(golden / "continuous" / "formulas.safetensors")
    c = json.loads((golden / "continuous" / "formulas.json").read_text())["epsilon_vae"]
    for steps in (1, 2, 3, 5, 10):
        assert log_grid(steps) == pytest.approx(c[f"log_grid_N{steps}"], rel=1e-6, abs=1e-9)
    point = path.interpolate(g["epsilon.x0"], g["epsilon.eps"], g["epsilon.t"])
    torch.testing.assert_close(point.x, g["epsilon.x_t"], rtol=1e-6, atol=1e-6)
    estimate = path.clean(point.x, g["epsilon.pred"], point.t)
    torch.testing.assert_close(estimate, g["epsilon.x0_hat"], rtol=1e-6, atol=1e-6)
    error = (g["epsilon.pred"] - point.v).square().mean()
    torch.testing.assert_close(error, g["epsilon.velocity_mse"], rtol=1e-6, atol=0)
    torch.testing.assert_close((estimate - g["epsilon.x0"]).square().mean(), g["epsilon.x0_mse"], rtol=1e-6, atol=0)


@torch.no_grad()
def test_an_image_follows_from_its_latent_and_seed():
    tokenizer, z = make(), latents()
    whole = tokenizer.decode(z)
    torch.testing.assert_close(torch.cat([tokenizer.decode(part) for part in z.split(1)]), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.decode(z.flip(0)).flip(0), whole, atol=1e-5, rtol=0)
    seeded = tokenizer.decode(z, seeds=[5, 6, 7, 8])
    assert not torch.allclose(seeded, whole)
    torch.testing.assert_close(tokenizer.decode(z[2:], seeds=[7, 8]), seeded[2:], atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="1 seeds for 4 latents"):
        tokenizer.decode(z, seeds=[1])


@torch.no_grad()
def test_evaluations_decode_each_image_with_its_own_noise():
    tokenizer, image = make(), torch.rand(1, 3, 16, 16, generator=generator("image")) * 2 - 1
    same = image.expand(40, -1, -1, -1)
    restored = through(tokenizer, same, ids=torch.arange(40)).restored
    assert len(restored.unique(dim=0)) == 40
    assert torch.equal(through(tokenizer, same[:3], ids=torch.arange(36, 39)).restored, restored[36:39])
    assert not torch.equal(through(tokenizer, image, seed=1).restored, restored[:1])
    assert seeds(SimpleNamespace(config=presets.get("tiny_plain_vae").tokenizer), 0, torch.arange(2)) == {}

    zeros = SimpleNamespace(config=tokenizer.config, decode=tokenizer.decode)
    protocol = presets.get("tiny_epsilon_vae").protocol
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "latents", lambda *args: torch.zeros(len(args[3]), 4, 4, 4))
        network = torch.nn.Linear(1, 1)
        whole = torch.cat(list(generation.drawn(network, zeros, protocol, torch.arange(6).split(6), 10)))
        parts = torch.cat(list(generation.drawn(network, zeros, protocol, torch.arange(6).split(2), 10)))
    assert len(whole.unique(dim=0)) == 6
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_samples_are_those_that_evaluations_measure(monkeypatch):
    run = override(presets.get("tiny_epsilon_vae"), {"protocol.sampler.steps": 2}).phases()[-1]
    network, tokenizer, names = build_network(run, (4, 4, 4), ["a", "b", "c"]).eval(), make(), ["a", "b", "c"]
    loaded, seed, ids = api.LoadedDiffusion(network, tokenizer, run, 3, names), generation.noise_of(run.protocol, 0), torch.arange(5)
    labels = generation.labels_of(ids, 3, run.protocol).tolist()
    measured = next(generation.drawn(network, tokenizer, run.protocol, [ids], 3))

    def shown(labels, **how):
        return list(api.sample(loaded, labels, seed=seed, **how))[-1].images

    torch.testing.assert_close(shown(labels), measured, atol=1e-5, rtol=0)
    torch.testing.assert_close(shown(labels[2:], first=2), measured[2:], atol=1e-5, rtol=0)
    monkeypatch.setattr(api, "CHUNK", 2)
    torch.testing.assert_close(shown(labels), measured, atol=1e-5, rtol=0)
    same = shown([0, 0], noise=torch.zeros(2, 4, 4, 4))
    torch.testing.assert_close(same[0], same[1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_reconstructions_are_those_that_evaluations_measure():
    tokenizer, image = make(), torch.rand(1, 3, 16, 16, generator=generator("image")) * 2 - 1
    same = image.expand(70, -1, -1, -1)
    restored = api.reconstruct(tokenizer, same)[1]
    assert len(restored.unique(dim=0)) == 70
    torch.testing.assert_close(as_saved(restored), through(tokenizer, same).restored, atol=0.01, rtol=0)
    torch.testing.assert_close(explore.reconstruct(tokenizer, same[:40], space=None).images, as_saved(restored[:40]), atol=0.01, rtol=0)


@torch.no_grad()
def test_frames_between_two_images_share_one_noise():
    image = torch.rand(1, 3, 16, 16, generator=generator("image")) * 2 - 1
    frames = interpolate.images(make(), image, image, frames=3).frames
    torch.testing.assert_close(frames, frames[:1].expand(3, -1, -1, -1), atol=1e-5, rtol=0)


def test_latents_of_another_shape_are_one_line():
    with pytest.raises(DataError, match=r"decode: latents \(2, 3, 4, 4\); it takes B x 4 x h x w"):
        make().decode(torch.zeros(2, 3, 4, 4), seeds=[1, 2])


@torch.no_grad()
def test_a_perfect_velocity_gives_the_image_in_any_number_of_steps():
    image = torch.rand(2, 3, 16, 16, generator=generator("image")) * 2 - 1
    for steps in (1, 3):
        decoder = DiffusionDecoder(DiffusionDecoder.Config(base=8, multipliers=(1,), blocks=1, steps=steps), 4, 4, 16)
        decoder.velocity = lambda x, t, z: path.velocity_from_clean(x, 0.6 * image, t)
        torch.testing.assert_close(decoder(latents(2))[0], image, atol=1e-5, rtol=0)


def test_training_forward():
    tokenizer, images = make(), torch.rand(6, 3, 16, 16) * 2 - 1
    z = tokenizer.posterior(images).mean
    (image,), whole = tokenizer.decode_in_training(z, images, StepRandom(0, 0, 6))
    assert (image.shape, whole.error.shape, whole.state.t.shape) == (images.shape, (6,), (6,))
    assert not whole.state.x.requires_grad, "the estimate alone is the decoder's"
    (whole.error.mean() + image.abs().mean()).backward()
    assert not [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        (part,), rest = tokenizer.decode_in_training(z[2:4], images[2:4], StepRandom(0, 0, 6, slice(2, 4)))
        torch.testing.assert_close(part, image[2:4], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rest.error, whole.error[2:4], atol=1e-5, rtol=1e-4)
        assert torch.equal(rest.state.x, whole.state.x[2:4])


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="decoder.kind conv: 'epsilon_vae' decodes by denoising"):
        make(decoder={"kind": "conv", "width": 8, "multipliers": [1, 1, 1], "blocks": 1, "attention": []})
    with pytest.raises(ConfigError, match="must divide by 32"):
        make(decoder={**DECODER, "multipliers": [1] * 6})
    plain = override(presets.get("tiny_plain_vae"), {"losses.adversarial": {"discriminator": "trajectory"}})
    with pytest.raises(ConfigError, match="'trajectory' judges an image beside the noisy state"):
        list(api.train(plain.phases()[0], tmp_path))
    with pytest.raises(ConfigError, match="losses.denoising: this tokenizer's decoder does not denoise"):
        list(api.train(override(presets.get("tiny_plain_vae"), {"losses.denoising": 1.0}).phases()[0], tmp_path))


def test_a_tiny_run(tmp_path):
    run = override(presets.get("tiny_epsilon_vae_gan"), {"data.train": 48, "data.val": 16, "train.samples": 16})
    phase = run.phases()[0]
    steps = [event.data for event in api.train(phase, tmp_path) if event.kind == "step"]
    assert {"denoising", "adversarial", "adversarial_r1", "adversarial_accuracy"} <= steps[-1].keys()
    tokenizer = api.load_tokenizer(phase.id, tmp_path)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z = tokenizer.encode(x).mode()
    assert torch.equal(tokenizer.decode(z), tokenizer.decode(z))
    protocols = [run.protocol.model_copy(update={"batch": batch}) for batch in (16, 5)]
    reports = [evaluate_reconstruction(tokenizer, run.data, protocol) for protocol in protocols]
    for name in ("psnr", "rfd"):
        assert reports[0][name].value == pytest.approx(reports[1][name].value, rel=1e-4), name
