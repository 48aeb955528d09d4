"""The path: one convention of time, conversions that undo each other, losses and times against closed forms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmlab.config import TimeSampling
from vfmlab.diffusion import path
from vfmlab.errors import ConfigError
from vfmlab.seeding import StepRandom, generator

TIME = st.floats(0.02, 0.98)
SHIFT = st.floats(0.1, 10)


def pair(seed=0, batch=5):
    g = generator("path", seed)
    return torch.randn(batch, 3, 4, 2, generator=g), torch.randn(batch, 3, 4, 2, generator=g)


def test_ends_are_data_and_noise():
    z, noise = pair()
    assert torch.equal(path.interpolate(z, noise, path.DATA).x, z)
    assert torch.equal(path.interpolate(z, noise, path.NOISE).x, noise)
    assert (path.DATA, path.NOISE) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["linear", "sphere"])
def test_parts_of_different_batches_are_refused(name):
    along, (z, noise) = path.make(name, **({"radius": 2.0} if name == "sphere" else {})), pair()
    for other, t in ((noise[:4], 0.5), (noise[..., :1], 0.5), (noise, torch.rand(4))):
        with pytest.raises(ConfigError, match=r"path: z \(5, 3, 4, 2\), noise .* one time for each latent"):
            along.interpolate(z, other, t)
    assert along.interpolate(z, noise, torch.tensor(0.5)).x.shape == z.shape


def test_velocity_is_the_derivative_of_the_point():
    z, noise = (part.double() for part in pair())
    t = torch.rand(5, generator=generator("t")).double()
    a, b = path.interpolate(z, noise, t - 1e-4), path.interpolate(z, noise, t + 1e-4)
    torch.testing.assert_close((b.x - a.x) / 2e-4, path.interpolate(z, noise, t).v)


@settings(max_examples=40)
@given(t=TIME, seed=st.integers(0, 10**6))
def test_a_velocity_gives_both_ends_and_the_drift(t, seed):
    z, noise = (part.double() for part in pair(seed))
    for time in (t, torch.full((5,), t, dtype=torch.double)):
        point = path.interpolate(z, noise, time)
        torch.testing.assert_close(path.clean(point.x, point.v, time), z)
        torch.testing.assert_close(path.noise(point.x, point.v, time), noise)
        torch.testing.assert_close(path.velocity_from_clean(point.x, z, time), point.v)
        drift = point.v - path.diffusion(t) ** 2 / 2 * (-noise / t)
        torch.testing.assert_close(path.sde_drift(point.x, point.v, time), drift)


@given(t=st.floats(0, 1), shift=SHIFT)
def test_shift_is_monotone_undone_by_its_inverse_and_mirrored_by_reversal(t, shift):
    shifted = path.shift_time(t, shift)
    assert -1e-12 <= shifted <= 1 + 1e-12
    assert (shifted >= t - 1e-12) == (shift >= 1) or t in (0, 1) or abs(shifted - t) < 1e-9
    assert path.shift_time(shifted, 1 / shift) == pytest.approx(t, abs=1e-9)
    assert path.reverse(path.shift_time(path.reverse(t), 1 / shift)) == pytest.approx(shifted, abs=1e-9)


@given(steps=st.integers(1, 300), shift=SHIFT)
def test_grids_run_from_noise_to_data(steps, shift):
    for grid in (path.time_grid(steps, shift), path.sde_grid(steps, shift)):
        assert len(grid) == steps + 1
        assert grid[0] == pytest.approx(path.NOISE)
        assert grid[-1] == path.DATA
        assert all(a > b for a, b in pairwise(grid))


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.5, 6.0])
def test_the_sdes_last_step_is_small_whatever_the_shift(shift):
    """Data of standard deviation .1 under the exact velocity: what comes out is neither a point nor wider."""
    times, x, rng = path.sde_grid(100, shift), torch.randn(4000, generator=generator("sde")).double(), generator("noise")
    for k, (t, after) in enumerate(pairwise(times)):
        v = x * (t - (1 - t) * 0.01) / ((1 - t) ** 2 * 0.01 + t * t)
        x = x + path.sde_drift(x, v, t) * (after - t)
        if k < 99:
            x = x + path.diffusion(t) * (t - after) ** 0.5 * torch.randn(4000, generator=rng)
    assert times[-2] == pytest.approx(0.04)
    assert 0.07 < x.std().item() < 0.105


def test_grids_of_known_values():
    assert path.time_grid(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert path.sde_grid(250)[-2] == pytest.approx(0.04)
    assert path.sde_grid(1) == [1.0, 0.0]


def test_loss_in_closed_form():
    target = torch.zeros(2, 2, 1, 1)
    target[:, 0] = 1.0
    prediction = torch.tensor([[1.0, 0.0], [0.0, 2.0]])[:, :, None, None]
    mse = path.velocity_loss(prediction, target)
    torch.testing.assert_close(mse, torch.tensor([0.0, (1 + 4) / 2]))
    torch.testing.assert_close(path.velocity_loss(prediction, target, cosine=0.5) - mse, torch.tensor([0.0, 0.5]))
    assert path.velocity_loss(prediction.bfloat16(), target).dtype == torch.float32


TIMES = [
    TimeSampling(kind="uniform"),
    TimeSampling(),
    TimeSampling(mean=-0.8, std=0.6),
    TimeSampling(kind="uniform", shift=3.0),
    TimeSampling(shift=0.3),
]


@pytest.mark.parametrize("config", TIMES, ids=str)
def test_drawn_times_follow_their_quantiles(config):
    t = path.draw_times(config, StepRandom(0, 0, 20_000)).sort().values
    assert t[0] >= 0
    assert t[-1] <= 1
    # Kolmogorov-Smirnov distance of 20 000 draws: 0.0136 is exceeded by chance once in a thousand
    order = torch.searchsorted(path.time_quantiles(config, 20_000), t) / 20_000
    assert (order - torch.arange(20_000) / 20_000).abs().max() < 0.0136


def test_positive_mean_and_large_shift_spend_more_time_near_noise():
    middle = path.time_quantiles(TimeSampling()).mean()
    assert path.time_quantiles(TimeSampling(mean=1.0)).mean() > middle + 0.1
    assert path.time_quantiles(TimeSampling(shift=3.0)).mean() > middle + 0.1


def test_every_rank_sees_its_rows_of_the_same_times():
    whole = path.draw_times(TimeSampling(), StepRandom(3, 7, 8))
    parts = [path.draw_times(TimeSampling(), StepRandom(3, 7, 8, rows)) for rows in (slice(0, 3), slice(3, 8))]
    assert torch.equal(torch.cat(parts), whole)
