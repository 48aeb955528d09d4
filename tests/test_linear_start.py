"""The linear start: closed forms of the fit, VFM features as source, and what it buys in a few steps of training."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vfmlab.errors import ConfigError
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers import linear_start
from vfmlab.tokenizers.linear_start import LinearStart, fit

NARROW = {"width": 16, "blocks": 1, "attention": (), "patch": 4, "middle": False}


def smooth(count=256, size=16, seed=0):
    """Random images with a falling spectrum, in [-1, 1]."""
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed + 1))
    return (0.5 * F.interpolate(coarse, size=(size, size), mode="bicubic") + 0.03 * fine).clamp(-1, 1)


def vae(size=16, **fields):
    torch.manual_seed(0)
    part = TOKENIZERS.get("plain_vae")
    fields = {"method": "plain_vae", "factor": 4, **NARROW, "decoder": {"kind": "conv", **NARROW}, **fields}
    return part(part.Config.model_validate(fields), size)


class Reader(nn.Module):
    """What :func:`fit` needs of a tokenizer that reads features: given functions of the images."""

    def __init__(self, start, maps):
        super().__init__()
        self.start, self.maps = start, maps

    def read_features(self, images, features, layers):
        return {layer: self.maps[layer](images) for layer in layers}


def psnr(image, target):
    return 10 * torch.log10(4 / (image - target).square().mean()).item()


def pca_psnr(images, channels, factor):
    """Patch PCA by SVD, decoded patch by patch."""
    patches = F.pixel_unshuffle(images, factor).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    u, s, v = torch.linalg.svd(patches - mean, full_matrices=False)
    rest = (u[:, channels:] * s[channels:]) @ v[channels:]
    return 10 * torch.log10(4 / rest.square().mean()).item()


def test_codes_span_the_principal_components():
    images = smooth()
    start = LinearStart(6, 4)
    fit(Reader(start, {}), [images])
    patches = F.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).flatten(0, 2).double()
    v = torch.linalg.svd(patches - patches.mean(0), full_matrices=False).Vh[:6]
    ours = torch.linalg.qr(start.read.weight[:, :, 0, 0].T.double()).Q.T
    cosines = torch.linalg.svd(ours @ v.T).S  # of the principal angles between both subspaces
    assert cosines.min() > 0.999


def test_codes_have_zero_mean_and_unit_variance_and_no_correlation():
    images = smooth()
    start = LinearStart(6, 4)
    fit(Reader(start, {}), [images])
    with torch.no_grad():
        codes = start.read(start.arrange(images, (4, 4))).transpose(0, 1).flatten(1)
    torch.testing.assert_close(codes.mean(1), torch.zeros(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(codes), torch.eye(6), rtol=0, atol=5e-3)


def test_at_least_as_good_as_patch_pca():
    images = smooth()
    reported = fit(Reader(LinearStart(6, 4), {}), [images])
    assert reported >= pca_psnr(images, 6, 4) - 0.01


def test_the_reported_figure_is_that_of_the_linear_paths():
    images = smooth()
    start = LinearStart(6, 4)
    reported = fit(Reader(start, {}), [images])
    with torch.no_grad():
        out = F.pixel_shuffle(start.write(start.read(start.arrange(images, (4, 4)))), 4)
    assert psnr(out, images) == pytest.approx(reported, abs=1e-3)


def test_all_channels_lose_nothing():
    assert fit(Reader(LinearStart(12, 2), {}), [smooth()]) > 60


def test_deterministic_and_independent_of_batching():
    images = smooth()
    states = []
    for batches in ([images], list(images.split(100)), iter(images.split(64))):
        start = LinearStart(6, 4)
        fit(Reader(start, {}), batches)
        states.append(start.state_dict())
    for other in states[1:]:
        for key, value in states[0].items():
            torch.testing.assert_close(value, other[key], rtol=1e-3, atol=1e-4)
    again = LinearStart(6, 4)
    fit(Reader(again, {}), [images])
    assert all(torch.equal(value, states[0][key]) for key, value in again.state_dict().items())


def test_features_that_keep_everything_give_the_pixels_code():
    """Maps that are an invertible linear function of the patches allow what the patches allow."""
    images = smooth()
    mix = torch.randn(48, 48, generator=torch.Generator().manual_seed(3))
    start = LinearStart(6, 4, {0: (48, 1.0)})
    maps = {0: lambda x: torch.einsum("bchw,dc->bdhw", F.pixel_unshuffle(x, 4), mix)}
    by_features = fit(Reader(start, maps), [images])
    by_pixels = fit(Reader(LinearStart(6, 4), {}), [images])
    assert by_features == pytest.approx(by_pixels, abs=0.3)


def test_a_vfm_is_asked_once_where_its_maps_fit(monkeypatch):
    images, asked = smooth().split(8), []
    maps = {0: lambda x: (asked.append(len(x)), F.avg_pool2d(x, 2))[1]}
    starts = []
    for room in (2**29, sum(batch.nbytes for batch in images[:2]) // 4, 0):
        monkeypatch.setattr(linear_start, "MAP_BYTES", room)
        starts.append(LinearStart(6, 4, {0: (3, 2.0)}))
        fit(Reader(starts[-1], maps), images)
    counts = len(images), 2 * len(images) - 2, 2 * len(images)
    assert len(asked) == sum(counts)
    for other in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0].parameters(), other.parameters(), strict=True))


def test_maps_of_any_grid():
    """Finer maps are unshuffled, others resized; more layers never hurt the fit."""
    images = smooth()
    maps = {
        0: lambda x: F.pixel_unshuffle(x, 2),  # 8 x 8
        1: lambda x: F.adaptive_avg_pool2d(x, (4, 4)),
        2: lambda x: F.adaptive_avg_pool2d(x, (2, 2)),
        -1: lambda x: F.adaptive_avg_pool2d(x, (6, 6)),
    }
    widths = {0: (12, 2.0), 1: (3, 1.0), 2: (3, 0.5), -1: (3, 1.5)}
    everything = fit(Reader(LinearStart(6, 4, widths), maps), [images])
    coarse = fit(Reader(LinearStart(3, 4, {1: widths[1]}), maps), [images])
    assert everything == pytest.approx(fit(Reader(LinearStart(6, 4), {}), [images]), abs=0.3)
    assert coarse < everything - 1


def test_constant_features_do_not_break_the_fit():
    start = LinearStart(4, 4, {0: (2, 1.0)})
    reported = fit(Reader(start, {0: lambda x: torch.ones(len(x), 2, 4, 4)}), [smooth()])
    assert all(torch.isfinite(value).all() for value in start.state_dict().values())
    assert 0 < reported < 20


def test_starts_near_the_linear_solution_and_learns_on():
    images = smooth()
    results = {}
    for switch in (False, True):
        tokenizer = vae(channels=6, linear_start=switch)
        reported = fit(tokenizer, [images]) if switch else None
        with torch.no_grad():
            first = psnr(tokenizer.decode_raw(tokenizer.posterior(images).mode())[0], images)
        if switch:
            assert first > reported - 1
            assert bool(tokenizer.start.fitted)
        optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
        for _ in range(30):
            out = tokenizer.decode_raw(tokenizer.posterior(images[:64]).mode())[0]
            loss = (out - images[:64]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            last = psnr(tokenizer.decode_raw(tokenizer.posterior(images).mode())[0], images)
        assert last > first
        results[switch] = last
    assert results[True] > results[False] + 3


def test_adaptive_weights_are_taken_where_gradients_have_full_size():
    tokenizer = vae(channels=6, linear_start=True)
    fit(tokenizer, [smooth()])
    layer = tokenizer.last_encoder_layer()
    images = smooth(32, seed=5)
    z = tokenizer.posterior(images).mode()
    reconstruction = (tokenizer.decode_raw(z)[0] - images).abs().mean()
    there, behind = torch.autograd.grad(reconstruction, [layer, tokenizer.quant.weight])
    assert there.norm() > 10 * behind.norm()


def test_lower_resolutions_get_the_averaged_path():
    start = LinearStart(6, 4)
    fit(Reader(start, {}), [smooth()])
    z = torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        full, half = start.decode([torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 8, 8)], z)
    torch.testing.assert_close(half, F.avg_pool2d(full, 2))


def test_a_checkpoint_carries_the_fit():
    tokenizer = vae(channels=6, linear_start=True)
    fit(tokenizer, [smooth()])
    other = vae(channels=6, linear_start=True)
    other.load_state_dict(tokenizer.state_dict())
    assert bool(other.start.fitted)
    x = smooth(4)
    with torch.no_grad():
        assert torch.equal(other.posterior(x).mode(), tokenizer.posterior(x).mode())


def test_clear_errors():
    with pytest.raises(ConfigError, match="13 channels are more than the 12 values"):
        LinearStart(13, 2)
    with pytest.raises(ConfigError, match=r"tokenizer.linear_start: no images"):
        fit(vae(channels=6, linear_start=True), [])
