"""RAE and its multi-layer form: what the latent is, statistics, noise, linear start, refusals, and whole tiny runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vfmlab import api, config, presets, vfm
from vfmlab.config import override
from vfmlab.data import open_source, to_float
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.layer_fusion import BoundedFusion, FusionConfig
from vfmlab.nn.standardise import Standardise
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, measure
from vfmlab.tokenizers.linear_start import LinearWrite

VIT = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "hidden": 16}


@pytest.fixture(scope="module")
def model():
    return vfm.build(config.VFM(name="pocket"), 16)


def make(model, method="rae", **fields):
    torch.manual_seed(0)
    part = TOKENIZERS.get(method)
    return part(part.Config.model_validate({"channels": 128, "factor": 4, "decoder": VIT, **fields}), 16, model)


def images(n=8, side=16):
    small = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, (side, side), mode="bicubic").clamp(-1, 1)


# -- the latent --------------------------------------------------------------------------------------------------------


def test_latent_is_the_last_block_under_a_plain_layer_norm(model):
    tokenizer, x = make(model), images()
    expected = F.layer_norm(model.features(x, (-2,)).maps[-2].movedim(1, -1), (128,), eps=1e-6).movedim(-1, 1)
    q = tokenizer.posterior(x)
    torch.testing.assert_close(q.mean, expected)
    assert q.logvar is None
    assert tokenizer.latent_shape == (128, 4, 4)
    assert tokenizer.posterior(x[..., :8, :8]).mean.shape == (8, 128, 2, 2)
    # The model's own final norm differs by weights only, and those go with the standardisation.
    final = model.features(x, (-1,)).maps[-1]
    weights = model.net.norm
    torch.testing.assert_close(final, expected * weights.weight.view(-1, 1, 1) + weights.bias.view(-1, 1, 1), atol=1e-3, rtol=1e-3)


def test_multi_layer_is_the_mean_of_the_last_blocks(model):
    x = images()
    single, one = make(model), make(model, "multi_layer_rae", last=1)
    torch.testing.assert_close(one.posterior(x).mean, single.posterior(x).mean)
    every, second = make(model, "multi_layer_rae", last=3), make(model, "multi_layer_rae", last=2, stride=3)
    assert every.layers == (2, 3, -2)
    assert second.layers == (1, -2)
    maps = model.features(x, (1, 2, 3, 4)).maps
    plain = {k: F.layer_norm(m.movedim(1, -1), (128,), eps=1e-6).movedim(-1, 1) for k, m in maps.items()}
    torch.testing.assert_close(every.posterior(x).mean, (plain[2] + plain[3] + plain[4]) / 3)
    torch.testing.assert_close(second.posterior(x).mean, (plain[1] + plain[4]) / 2)
    pooled = make(model, "multi_layer_rae", last=2, stride=3, pooled=True).posterior(x).mean
    torch.testing.assert_close(pooled, (plain[1] + plain[4]) / 2 + plain[4].mean((2, 3), keepdim=True))
    given = model.features(x, (1, -2)).maps
    torch.testing.assert_close(second.posterior(torch.zeros_like(x), given).mean, second.posterior(x).mean)


@pytest.mark.parametrize("method", ["rae", "multi_layer_rae"])
def test_statistics_are_fixed_before_training(model, method):
    tokenizer = make(model, method, **({"last": 2} if method == "multi_layer_rae" else {}))
    batches = list(images(40).split(16))
    tokenizer.begin(batches)
    found = measure(tokenizer, batches, "x")
    torch.testing.assert_close(found.mean, torch.zeros(128), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std, torch.ones(128), atol=1e-5, rtol=0)
    assert {"standardise.mean", "standardise.std"} <= set(tokenizer.state_dict())
    assert not [name for name, _ in tokenizer.named_parameters() if not name.startswith("decoder.")]


def test_standardise():
    x = torch.randn(30, 3, 2, 2) * torch.tensor([0.0, 2.0, 1e3]).view(3, 1, 1) + 7
    layer = Standardise(3)
    layer.fit(x.split(7))
    torch.testing.assert_close(layer.mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.std[1:], x.transpose(0, 1).flatten(1).std(1, correction=0)[1:])
    assert torch.equal(layer(x)[:, 0], torch.zeros(30, 2, 2))  # a constant channel stays finite
    torch.testing.assert_close(layer.inverse(layer(x)), x, atol=1e-3, rtol=1e-5)


def test_statistics_of_every_place(model):
    x, table = torch.randn(30, 3, 2, 2), torch.arange(12.0).view(3, 2, 2)
    layer = Standardise(3, (2, 2))
    layer.fit((x * (1 + table) + table).split(7))
    torch.testing.assert_close(layer.mean, (x * (1 + table) + table).mean(0))
    torch.testing.assert_close(layer.std, x.std(0, correction=0) * (1 + table))
    tokenizer = make(model, places=True, noise=0.5, noise_on="raw")
    batches = list(images(40).split(16))
    tokenizer.begin(batches)
    with torch.no_grad():
        z = torch.cat([tokenizer.posterior(part).mean for part in batches])
    torch.testing.assert_close(z.mean(0), torch.zeros(128, 4, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(128, 4, 4), atol=1e-3, rtol=0)
    scaled = 2 * z + torch.arange(16.0).view(4, 4)
    tokenizer.posterior = lambda part: Posterior(scaled[:len(part)])
    found = measure(tokenizer, [torch.zeros(40, 3, 16, 16)], "x")
    torch.testing.assert_close(found.mean, scaled.mean(0), atol=1e-4, rtol=0)
    tokenizer.set_statistics(found)
    assert tokenizer.normalisation == "places"
    torch.testing.assert_close(tokenizer.denormalise(tokenizer.normalise(scaled[:2])), scaled[:2], atol=1e-4, rtol=1e-5)
    z, plain = torch.zeros(6, 128, 4, 4), make(model, noise=0.5)
    noise = tokenizer.perturb(z, StepRandom(0, 0, 6)) * tokenizer.standardise.std
    torch.testing.assert_close(noise, plain.perturb(z, StepRandom(0, 0, 6)), atol=1e-5, rtol=1e-4)  # equal before standardising
    found.std[3, 0, 2] = 0  # one place of one channel: the message does not list all of them
    with pytest.raises(CheckpointError, match=r"not usable: 1 of 2048 are constant .* the first at \[3, 0, 2\]$"):
        tokenizer.set_statistics(found)
    with pytest.raises(ValueError, match="linear_start is fitted for noise on the standardised latent; set noise_on=null"):
        TOKENIZERS.get("rae").Config(linear_start=True, noise_on="raw")
    with pytest.raises(ValueError, match="places: latents on a sphere have no statistics of places"):
        make(model, places=True, radius=8.0)


# -- fusion ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_statistics_of_every_place_are_interpolated_on_another_grid(model):
    """Of smaller images, as equivariance's prior path makes them, and of wide ones."""
    tokenizer = make(model, places=True, noise_on="raw")
    tokenizer.begin([images()])
    tokenizer.set_statistics(measure(tokenizer, [images()], "f"))
    for height, width in ((2, 2), (4, 8)):
        wide = images(2, 32)[..., : 4 * height, : 4 * width]
        z = tokenizer.encode(wide).mode()
        torch.testing.assert_close(tokenizer.perturb(z, StepRandom(0, 0, 2)).shape, torch.Size([2, 128, height, width]))
        assert tokenizer.decode(z).shape == wide.shape
        torch.testing.assert_close(tokenizer.normalise(tokenizer.denormalise(z)), z, atol=1e-5, rtol=1e-4)
    plain = Standardise(2, (4, 4))
    plain.mean.copy_(torch.arange(4.0).view(1, 4, 1).expand(2, 4, 4))
    assert plain(torch.zeros(1, 2, 2, 2))[0, 0].tolist() == [[-0.5, -0.5], [-2.5, -2.5]]


@torch.no_grad()
def test_bounded_fusion():
    torch.manual_seed(0)
    maps = [torch.randn(3, 8, 2, 2) for _ in range(7)]
    last = maps[-1]
    fusion = BoundedFusion(8, 7, FusionConfig(dropout=(0.0, 0.0, 0.0), caps=(0.01, 0.02, 0.04)))
    assert fusion.groups == [[0, 1, 2], [3, 4], [5, 6]]
    moved = (fusion(maps) - last).flatten(1).norm(dim=1) / last.flatten(1).norm(dim=1)
    assert (moved <= 0.07 + 1e-5).all()
    assert (moved > 0.01).all()
    free = BoundedFusion(8, 7, FusionConfig(caps=None)).eval()
    tokens = [m.flatten(2).transpose(1, 2) for m in maps]
    share = free.router(tokens[-1])
    share = share / share.norm(dim=-1, keepdim=True)
    byhand = tokens[-1] + sum(share[..., k, None] * free.experts[k](tokens[k]) for k in range(7))
    torch.testing.assert_close(free(maps).flatten(2).transpose(1, 2), byhand, atol=1e-5, rtol=1e-5)
    often = BoundedFusion(8, 7, FusionConfig(dropout=(0.5, 0.0, 0.99))).train()
    residual = torch.ones(2000, 1, 1)
    for group, chance in enumerate((0.5, 0.0, 0.99)):
        assert often.drop(group, residual).mean().item() == pytest.approx(1 - chance, abs=0.04)
        assert torch.equal(often.eval().drop(group, residual), residual)
        often.train()
    for fields in ({"dropout": (1.0, 0.0, 0.0)}, {"caps": (0.0, 1.0, 1.0)}):
        with pytest.raises(ValueError, match="dropout|caps"):
            FusionConfig(**fields)


def test_rae_with_fusion(model):
    tokenizer, x = make(model, "multi_layer_rae", last=3, fusion={}), images()
    tokenizer.eval().begin([x])
    maps = model.features(x, tokenizer.layers).maps
    z = tokenizer.posterior(x).mean
    expected = F.layer_norm(tokenizer.fusion([maps[k] for k in tokenizer.layers]).movedim(1, -1), (128,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(z, tokenizer.standardise(expected))
    tokenizer.decode_raw(z)[0].square().mean().backward()
    assert not [n for n, p in tokenizer.named_parameters() if p.grad is None]
    assert tokenizer.last_encoder_layer().shape == (128, 512)
    with pytest.raises(ConfigError, match="tokenizer.fusion joins three groups of layers.*tokenizer.last is 1"):
        make(model, fusion={})


# -- noise -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "mean", "most"), [("half_normal", 0.5 * (2 / torch.pi) ** 0.5, None), ("uniform", 0.25, 0.5)])
def test_noise_has_one_scale_an_image(model, law, mean, most):
    tokenizer = make(model, noise=0.5, noise_law=law)
    n = 4000
    noise = tokenizer.perturb(torch.zeros(n, 128, 2, 2), StepRandom(0, 0, n))
    scale = noise.flatten(1).std(1)
    assert scale.mean().item() == pytest.approx(mean, rel=0.03)
    assert scale.std() > 0.1
    if most:
        assert scale.max() < most * 1.2
    z = torch.randn(4, 128, 2, 2)
    part = tokenizer.perturb(z[2:], StepRandom(0, 0, 4, slice(2, 4)))
    torch.testing.assert_close(part, tokenizer.perturb(z, StepRandom(0, 0, 4))[2:])
    assert torch.equal(make(model, noise=0).perturb(z, StepRandom(0, 0, 4)), z)


# -- decoder -----------------------------------------------------------------------------------------------------------


def test_linear_write_is_the_best_linear_decoder_of_noisy_latents():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    x = torch.randn(64, 3, 8, 8, generator=generator)
    z = torch.einsum("bchw,dc->bdhw", F.pixel_unshuffle(x, 2), basis)
    exact = LinearWrite(12, 2)
    exact.solve(zip(x.split(32), z.split(32), strict=True))
    small = torch.ones(64, 3, 4, 4)
    out = exact([torch.zeros_like(x), torch.zeros_like(small)], z)
    torch.testing.assert_close(out[0], x, atol=1e-2, rtol=0)
    torch.testing.assert_close(out[1], F.avg_pool2d(x, 2), atol=1e-2, rtol=0)
    noisy = LinearWrite(12, 2)
    noisy.solve([(x, z)], noise=1.0)

    @torch.no_grad()
    def error(write):
        disturbed = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
        return float((write([torch.zeros_like(x)], disturbed)[0] - x).square().mean())

    assert error(noisy) == pytest.approx(0.5, abs=0.05)  # signal and noise of unit variance: the Wiener filter leaves half
    assert error(exact) > 0.9


def test_linear_start_and_any_decoder(model):
    conv = DECODERS.get("conv").Config(width=8, multipliers=(1, 1, 1), blocks=1, attention=())
    tokenizer = make(model, decoder=conv, linear_start=True, noise=0.1)
    batches = list(images(64).split(32))
    torch.nn.init.zeros_(tokenizer.write.gain)
    tokenizer.begin(batches)
    with torch.no_grad():
        decoded = tokenizer.decode_raw(tokenizer.posterior(batches[0]).mean)[0]
    assert (decoded - batches[0]).square().mean() < 0.4 * batches[0].var()
    loss = tokenizer.decode_raw(tokenizer.posterior(batches[0]).mean)[0].square().mean()
    assert torch.autograd.grad(loss, tokenizer.write.write.weight)[0].any()
    assert make(model).write is None


def test_clear_errors(model):
    with pytest.raises(ConfigError, match=r"tokenizer.channels 64: .*does not compress.*set tokenizer.channels=128"):
        make(model, channels=64)
    with pytest.raises(ConfigError, match=r"layer -2 has a 4 x 4 grid, but tokenizer.factor 8 asks for 2 x 2.*vfm.upscale=0.5"):
        make(model, factor=8)
    with pytest.raises(ConfigError, match=r"tokenizer.last 5: .*4 blocks give at most 4"):
        make(model, "multi_layer_rae", last=5)
    with pytest.raises(ConfigError, match="no 'vfm' section"):
        make(None)
    with pytest.raises(ConfigError, match="trains no encoder.*adaptive=false"):
        make(model).last_encoder_layer()


# -- runs --------------------------------------------------------------------------------------------------------------


def test_paper_preset_is_rae():
    run = presets.get("paper_rae")
    assert (run.tokenizer.channels, run.tokenizer.factor, run.tokenizer.noise) == (768, 16, 0.8)
    assert run.diffusion.time.shift == run.protocol.sampler.shift == pytest.approx((768 * 16 * 16 / 4096) ** 0.5)
    game = run.losses["adversarial"]
    assert (game.weight, game.adaptive, game.discriminator.kind) == (0.75, True, "rae_dino")
    small = presets.get("small_rae")
    assert small.diffusion.time.shift == pytest.approx((384 * 8 * 8 / 4096) ** 0.5)


@pytest.mark.parametrize("method", ["rae", "multi_layer_rae"])
def test_tiny_run(tmp_path, method):
    """From images to samples, the second method up to its tokenizer."""
    run = override(presets.get(f"tiny_{method}"), {"data.train": 48, "data.val": 16, "protocol.n": 16, "diffusion.train.evaluate_at": []})
    list(api.train(run if method == "rae" else run.phases()[0], root=tmp_path))
    tokenizer = api.load_tokenizer(run.last.parent, root=tmp_path)
    images = to_float(open_source(run.data, "train").batch(torch.arange(48)).images)
    found = Standardise(128)
    found.fit([tokenizer.tokens(images)])
    torch.testing.assert_close(tokenizer.standardise.mean, found.mean)  # measured before the first step and kept
    torch.testing.assert_close(tokenizer.statistics.mean, torch.zeros(128), atol=1e-4, rtol=0)
    assert tokenizer.decode(tokenizer.encode(images[:2]).mode()).shape == (2, 3, 16, 16)
