"""Every loss: closed forms, reference values, what it needs, gradients, and batches split over processes."""

from __future__ import annotations

import json
import math
from urllib.error import URLError

import processes
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from vfmlab.errors import ConfigError, TrainingError
from vfmlab.losses.adaptive import adaptive_weight
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.losses.coding_rate import rate, reduction
from vfmlab.losses.vf import alignment, on_grid
from vfmlab.nn import transforms
from vfmlab.registry import LOSSES
from vfmlab.tokenizers.base import Posterior


class FakeVFM(nn.Module):
    """Two maps: the image pooled to 8 x 8, and that squared."""

    layers = (0, -1)

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 5, 1)

    def width(self, layer):
        return 5

    def check_layers(self, layers):
        return tuple(layers)

    def features(self, x, layers=None):
        maps = F.adaptive_avg_pool2d(self.mix(x), (8, 8))
        return type("Features", (), {"maps": {0: maps, -1: maps.square()}, "pooled": None})


def make(name, size=32, channels=4, side=8, vfm=None, **fields):
    part = LOSSES.get(name)
    torch.manual_seed(0)
    return part(part.Config.model_validate(fields), LossContext(size, channels, side, vfm))


def record(batch=4, size=32, channels=4, side=8, lower=(), seed=0, features=None):
    g = torch.Generator().manual_seed(seed)
    target = torch.rand(batch, 3, size, size, generator=g) * 2 - 1
    images = [target + 0.1 * torch.randn(batch, 3, s, s, generator=g) for s in (size,)]
    images += [torch.randn(batch, 3, s, s, generator=g) for s in lower]
    mean, logvar = torch.randn(2, batch, channels, side, side, generator=g)
    posterior = Posterior(mean, logvar)
    if features is None:
        features = {-1: torch.randn(batch, 5, side, side, generator=g)}
    z = posterior.sample(g)
    rebuilt = {layer: maps + 0.1 * torch.randn(maps.shape, generator=g) for layer, maps in features.items()}
    return Reconstruction(target, images, posterior, z, features, rebuilt=rebuilt)


def rows(r, part):
    return Reconstruction(
        r.target[part], [x[part] for x in r.images], Posterior(r.posterior.mean[part], r.posterior.logvar[part]),
        r.z[part], {k: v[part] for k, v in r.features.items()}, rebuilt={k: v[part] for k, v in r.rebuilt.items()},
    )  # fmt: skip


# What needs nothing but a record. A new loss is tested for free; one that needs more is named here and has a test.
NEED_MORE = {"lpips": "download", "codebook": "codes", "adversarial": "discriminator", "feature_matching": "discriminator"}
NEED_MORE |= {"preservation": "an earlier stage", "teacher": "a teacher", "semantic": "a teacher", "token_cosine": "a wide latent"}
NEED_MORE |= {"cascade": "perturbed latents", "denoising": "a decoder that denoises", "coding_rate": "labels, and a whole batch"}
OFFLINE = [name for name in LOSSES.names() if name not in NEED_MORE]


@pytest.mark.parametrize("name", OFFLINE)
def test_mean_over_the_batch(name):
    """A loss of the whole batch is the mean of the losses of its halves, and so are the gradients."""
    loss = make(name, vfm=FakeVFM())
    whole = record(lower=(16, 8))
    leaf = [*whole.images, whole.posterior.mean, whole.posterior.logvar, whole.z, *whole.rebuilt.values()]
    for x in leaf:
        x.requires_grad_()
    value = loss(whole)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert value > 0
    halves = (loss(rows(whole, slice(0, 2))) + loss(rows(whole, slice(2, 4)))) / 2
    torch.testing.assert_close(value, halves, rtol=1e-5, atol=1e-6)
    a, b = torch.autograd.grad(value, leaf, allow_unused=True), torch.autograd.grad(halves, leaf, allow_unused=True)
    assert any(g.abs().sum() > 0 for g in a if g is not None)
    for ours, theirs in zip(a, b, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OFFLINE)
def test_fp32_under_autocast(name):
    loss, r = make(name, vfm=FakeVFM()), record(lower=(16,))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(r)
    assert value.dtype == torch.float32
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if name == "perceptual" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(value, loss(r), **tolerance)


@pytest.mark.parametrize("name", ["l1", "l2", "ssim", "perceptual"])
def test_zero_for_a_perfect_reconstruction(name):
    r = record()
    perfect = Reconstruction(r.target, [r.target], r.posterior, r.z, r.features)
    assert abs(make(name, vfm=FakeVFM())(perfect).item()) < 1e-6


def test_pixel_losses_are_means():
    target = torch.zeros(2, 3, 4, 4)
    r = Reconstruction(target, [target + 0.5], Posterior(target), target)
    assert make("l1")(r).item() == pytest.approx(0.5)
    assert make("l2")(r).item() == pytest.approx(0.25)


def test_kl_matches_the_release(golden):
    io = load_file(golden / "vfmvae_small_io.safetensors")
    r = Reconstruction(torch.zeros(2, 3, 64, 64), [], Posterior(io["out.mean"], io["out.logvar"]), io["out.z_sample"])
    torch.testing.assert_close(make("kl")(r), io["out.kl_loss"], rtol=1e-5, atol=0)


@given(st.floats(-5, 5), st.floats(-8, 5))
def test_kl_is_never_negative_and_zero_at_the_prior(mean, logvar):
    shape = (1, 2, 2, 2)
    r = Reconstruction(torch.zeros(1, 3, 4, 4), [], Posterior(torch.full(shape, mean), torch.full(shape, logvar)), None)
    assert make("kl")(r).item() >= -1e-5
    prior = Reconstruction(r.target, [], Posterior(torch.zeros(shape), torch.zeros(shape)), None)
    assert make("kl")(prior).item() == 0


def test_multiscale_is_zero_for_the_target_at_each_size(golden):
    io = load_file(golden / "discriminators.safetensors")
    x = io["imgtf.in"]
    images = [x, *(io[f"imgtf.multiscale.{k}"] for k in range(4))]
    assert make("multiscale")(Reconstruction(x, images, Posterior(x), x)).item() < 1e-6
    shifted = [x, *(image + 0.25 for image in images[1:])]
    assert make("multiscale")(Reconstruction(x, shifted, Posterior(x), x)).item() == pytest.approx(4 * 0.25, rel=1e-5)
    with pytest.raises(ConfigError, match="lower-resolution outputs"):
        make("multiscale")(Reconstruction(x, [x], Posterior(x), x))


@pytest.mark.parametrize("side", [2, 3, 4, 8, 11, 12, 32])
def test_ssim_at_any_size(side):
    g = torch.Generator().manual_seed(side)
    x = torch.rand(2, 3, side, side, generator=g) * 2 - 1
    other = (x + torch.randn(x.shape, generator=g)).requires_grad_()
    value = make("ssim")(Reconstruction(x, [other], Posterior(x), x))
    value.backward()
    assert 0 < value.item() <= 2
    assert torch.isfinite(other.grad).all()
    assert make("ssim")(Reconstruction(x, [x], Posterior(x), x)).item() == pytest.approx(0, abs=1e-6)


# -- VFM alignment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["mean", "sample"])
@pytest.mark.parametrize(("margins", "distance", "cos"), [("m0", 0.0, 0.0), ("m25_50", 0.25, 0.5)])
def test_vf_matches_the_release(golden, which, margins, distance, cos):
    io = load_file(golden / "vfmvae_small_io.safetensors")
    weight = load_file(golden / "vfmvae_small_weights.safetensors")["ldm_adapter.linear_proj.weight"]
    vfm = type("Wide", (), {"width": lambda self, layer: 192})()
    loss = make("vf", 64, 16, 4, vfm, distance_margin=distance, cos_margin=cos)
    with torch.no_grad():
        loss.project.weight.copy_(weight[:, :, 0, 0])
    maps = io["in.features.2"].transpose(1, 2).unflatten(2, (8, 8))
    torch.testing.assert_close(on_grid(maps, (4, 4)), io["out.vf.aux_pooled"], rtol=0, atol=1e-6)
    z = io["out.mean"] if which == "mean" else io["out.z_sample"]
    value = loss(Reconstruction(torch.zeros(2, 3, 64, 64), [], Posterior(z), z, {-1: maps}))
    torch.testing.assert_close(value, io[f"out.vf_loss.{which}.{margins}"], rtol=1e-5, atol=0)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_vf_is_zero_for_the_same_geometry_at_any_scale(seed, scale):
    maps = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(seed))
    cosine, distance = alignment(maps * scale, maps, 0.0, 0.0)
    assert cosine.item() == pytest.approx(0, abs=1e-5)
    assert distance.item() == pytest.approx(0, abs=1e-5)


def test_vf_distance_ignores_rotations_and_cosine_does_not():
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 6, 3, 3, generator=g)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q
    cosine, distance = alignment(torch.einsum("bchw,dc->bdhw", maps, rotation), maps, 0.0, 0.0)
    assert distance.item() < 1e-5
    assert cosine.item() > 0.1


def test_vf_terms_are_weighted():
    r = record()
    parts = [make("vf", vfm=FakeVFM(), cos_weight=c, distance_weight=d)(r).item() for c, d in ((1, 0), (0, 1), (2, 3))]
    assert parts[2] == pytest.approx(2 * parts[0] + 3 * parts[1], rel=1e-5)


@pytest.mark.parametrize("grid", [(8, 8), (16, 16), (10, 10), (4, 4), (37, 37)])
def test_vf_brings_any_grid_to_the_latent(grid):
    maps = torch.full((1, 5, *grid), 3.0)
    assert torch.allclose(on_grid(maps, (8, 8)), torch.full((1, 5, 8, 8), 3.0))
    loss = make("vf", vfm=FakeVFM())
    assert torch.isfinite(loss(record(features={-1: torch.randn(4, 5, *grid)})))


def test_vf_names_what_it_needs():
    loss = make("vf", vfm=FakeVFM())
    assert loss.layers == (-1,)
    assert loss.adaptive is True
    assert [name for name, _ in loss.named_parameters()] == ["project.weight"]
    with pytest.raises(ConfigError, match=r"loss 'vf' .* no 'vfm' section"):
        make("vf")


# -- adaptive weight --------------------------------------------------------------------------------------------------


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    weight = adaptive_weight((p * torch.tensor([3.0, 4.0])).sum(), (p * torch.tensor([0.0, 2.0])).sum(), p)
    assert weight.item() == pytest.approx(5 / 2.0001)
    assert not weight.requires_grad
    assert p.grad is None
    assert adaptive_weight(p.sum(), (p * 0).sum(), p).item() == 1e4
    with pytest.raises(TrainingError, match="adaptive=false"):
        adaptive_weight(p.sum(), torch.ones(1, requires_grad=True).sum(), p)
    with pytest.raises(TrainingError, match="adaptive=false"):
        adaptive_weight(p.sum(), p.sum(), p.requires_grad_(False))


def test_adaptive_weight_matches_the_release(golden):
    """Reference: L1 of the image against zero as the reconstruction, VF loss on the sample, margins 0."""
    from vfmlab.weights import import_state_dict

    io = load_file(golden / "vfmvae_small_io.safetensors")
    weights = load_file(golden / "vfmvae_small_weights.safetensors")
    config = json.loads((golden / "vfmvae_small_config.json").read_text())["config"]
    tokenizer = import_state_dict("vfm-vae", weights, config)
    posterior = tokenizer.encode_features([io[f"in.features.{k}"] for k in range(3)])
    z = posterior.sample(noise=io["out.eps"])
    maps = io["in.features.2"].transpose(1, 2).unflatten(2, (8, 8))
    vfm = type("Wide", (), {"width": lambda self, layer: 192})()
    loss = make("vf", 64, 16, 4, vfm)
    with torch.no_grad():
        loss.project.weight.copy_(weights["ldm_adapter.linear_proj.weight"][:, :, 0, 0])
    r = Reconstruction(torch.zeros(2, 3, 64, 64), tokenizer.decode_raw(z), posterior, z, {-1: maps})
    weight = adaptive_weight(make("l1")(r), loss(r), tokenizer.last_encoder_layer())
    torch.testing.assert_close(weight, io["out.train.adaptive_vf_weight_unscaled"], rtol=1e-3, atol=0)


def _worker(rank, port, out):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    out[rank] = _weight(slice(2 * rank, 2 * rank + 2)).item()
    torch.distributed.destroy_process_group()


def _weight(part):
    g = torch.Generator().manual_seed(0)
    layer = nn.Parameter(torch.randn(3, 4, generator=g))
    x = torch.randn(4, 4, generator=g)[part]
    y = x @ layer.T
    return adaptive_weight(y.square().mean(), (y - 1).abs().mean(), layer)


def test_adaptive_weight_over_two_processes_is_that_of_the_whole_batch():
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(_worker, (processes.free_port(), out), nprocs=2)
        both = dict(out)
    assert both[0] == both[1] == pytest.approx(_weight(slice(0, 4)).item(), rel=1e-5)


# -- perceptual distances ---------------------------------------------------------------------------------------------


def test_perceptual_keeps_its_network_frozen_and_out_of_the_way():
    vfm = FakeVFM()
    loss = make("perceptual", vfm=vfm)
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    assert not any(p.requires_grad for p in vfm.parameters())
    loss.train().double()
    assert vfm.mix.weight.dtype == torch.float64
    with pytest.raises(ConfigError, match=r"loss 'perceptual' .* no 'vfm' section"):
        make("perceptual")


def test_perceptual_with_a_model_of_its_own():
    loss = make("perceptual", model={"name": "pocket_random"}, read=(0, -1))
    r = record()
    image = r.images[0].requires_grad_()
    loss(r).backward()
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("side", [8, 32])
def test_lpips(monkeypatch, side):
    """With random backbone weights in place of the download: symmetric, zero on itself, differentiable, frozen."""
    import torchvision

    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: state)
    loss = make("lpips", network="squeeze")
    assert list(loss.parameters()) == []
    assert loss.state_dict() == {}
    r = record(size=side)
    image = r.images[0].requires_grad_()
    value = loss(r)
    value.backward()
    assert value.item() > 0
    assert image.grad.abs().sum() > 0
    swapped = Reconstruction(r.images[0].detach(), [r.target], r.posterior, r.z)
    assert loss(swapped).item() == pytest.approx(value.item(), rel=1e-4)
    assert loss(Reconstruction(r.target, [r.target], r.posterior, r.z)).item() == pytest.approx(0, abs=1e-6)


def test_lpips_says_which_file_goes_where(monkeypatch, tmp_path):
    def refuse(*a, **k):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError) as error:
        make("lpips")
    message = str(error.value)
    assert "\n" not in message
    assert "vgg16-397923af.pth" in message
    assert str(tmp_path / "checkpoints") in message
    assert "losses.perceptual" in message


def test_equivariance_path_uses_the_latent_before_the_transform():
    """The record's z keeps the size of the features even when the decoded image is smaller."""
    r = record()
    choice = transforms.Choice("latent", 4, 16, 1)
    small = Reconstruction(
        transforms.target_images(r.target, choice), [transforms.target_images(r.images[0], choice)], r.posterior, r.z,
        r.features,
    )  # fmt: skip
    loss = make("vf", vfm=FakeVFM())
    assert loss(small).item() == loss(r).item()


def test_coding_rate_reduction_by_hand():
    """Two classes on two axes: log(1 + 1 / e^2) - log(1 + 2 / e^2) / 2. One direction for all: nothing."""
    axes, labels = torch.eye(2).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1])
    for eps in (0.5, 1.0):
        assert reduction(axes, labels, eps).item() == pytest.approx(math.log(1 + 1 / eps**2) - math.log(1 + 2 / eps**2) / 2, rel=1e-5)
        assert reduction(axes, labels * 0, eps).item() == pytest.approx(0, abs=1e-6)
        assert reduction(axes[:1].expand(4, 2), labels, eps).item() == pytest.approx(0, abs=1e-6)
    z = torch.randn(5, 7)
    assert rate(z, 0.5).item() == pytest.approx(rate(torch.cat([z, torch.zeros(5, 9)], 1) * (7 / 16) ** 0.5, 0.5).item(), rel=1e-5)


def test_coding_rate_needs_more_images_than_dimensions():
    """Ten classes: on one axis each, against every image at right angles to, or as far as can be from, all others."""
    for images, dimensions, tells in ((640, 16, True), (64, 16, True), (32, 512, False)):
        labels, axes = torch.arange(images) % 10, torch.eye(dimensions)
        spread = axes[:images] if dimensions >= images else F.normalize(torch.randn(images, dimensions, generator=torch.Generator().manual_seed(0)), dim=1)
        assert (reduction(axes[labels], labels, 0.5) > reduction(spread, labels, 0.5)).item() == tells


def test_coding_rate_moves_classes_apart():
    loss, z = make("coding_rate"), nn.Parameter(torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(0)))
    labels, image = torch.arange(8) % 2, torch.zeros(8, 3, 16, 16)
    optimizer = torch.optim.Adam([z], 0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss(Reconstruction(image, [image], Posterior(z), z, labels=labels)).backward()
        optimizer.step()
    unit = F.normalize(z.detach().mean(dim=(2, 3)), dim=1)
    cosines = (unit @ unit.T).abs()
    assert cosines[labels[:, None] != labels].max() < 0.1, "classes end on orthogonal subspaces"
    with pytest.raises(ConfigError, match="4 images in a latent of 4 channels.*use a larger train.batch"):
        loss(Reconstruction(image[:4], [image[:4]], Posterior(z[:4]), z[:4], labels=labels[:4]))
    with pytest.raises(ConfigError, match="losses.coding_rate tells classes apart, but this batch has no labels"):
        loss(Reconstruction(image, [image], Posterior(z), z))
