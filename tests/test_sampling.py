"""Solvers against closed forms: Gaussian data, whose probability flow is linear and known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from vfmlab.config import Guidance, Sampler
from vfmlab.diffusion import path
from vfmlab.diffusion.dit import LightningDiT
from vfmlab.diffusion.joint import State
from vfmlab.diffusion.sampling import SOLVERS, sample, trajectory
from vfmlab.errors import ConfigError
from vfmlab.seeding import SampleRandom, generator

MEAN, STD = 0.8, 0.5
SHAPE = (2, 16, 16)
ALL = ("euler", "heun", "dopri5", "sde")


def gaussian(x, t, y):
    """The exact velocity for data N(MEAN, STD^2): E[noise - z | x]. x is N((1-t) MEAN, (1-t)^2 STD^2 + t^2)."""
    t = t.to(x).view(-1, 1, 1, 1)
    centred = x - (1 - t) * MEAN
    variance = (1 - t) ** 2 * STD**2 + t**2
    return t / variance * centred - (MEAN + (1 - t) * STD**2 / variance * centred)


def run(solver, steps, ids=range(4), shift=1.0, **more):
    labels = torch.zeros(len(ids), dtype=torch.long)
    return sample(
        gaussian, labels, SampleRandom(0, ids), Sampler(solver=solver, steps=steps, shift=shift),
        latent_shape=SHAPE, null=1, **more,
    )  # fmt: skip


def noise(ids=range(4)):
    return SampleRandom(0, ids).randn(*SHAPE)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 0.5])
def test_order_of_convergence(solver, order, shift):
    # The flow of a Gaussian keeps each value's quantile: noise n ends at MEAN + STD n.
    exact = MEAN + STD * noise().double()
    errors = []
    for steps in (16, 32, 64):
        got = sample_double(solver, steps, shift)
        errors.append((got - exact).square().mean().sqrt().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def sample_double(solver, steps, shift):
    """The solver in fp64, so that rounding does not hide the order."""
    def field(x, t):
        return gaussian(x, torch.full((len(x),), t, dtype=torch.double), None)

    return list(SOLVERS[solver](field, noise().double(), path.time_grid(steps, shift), None))[-1][1]


@pytest.mark.parametrize("solver", ALL)
def test_gaussian_noise_becomes_gaussian_data(solver):
    z = run(solver, 200, ids=range(16))
    n = z.numel()
    assert z.mean().item() == pytest.approx(MEAN, abs=4 * STD / n**0.5 + 0.01)
    assert z.std().item() == pytest.approx(STD, abs=4 * STD / (2 * n) ** 0.5 + 0.01)


def test_dopri5_finds_the_flow():
    torch.testing.assert_close(run("dopri5", 1), MEAN + STD * noise(), atol=1e-4, rtol=0)


def test_sde_forgets_its_noise_and_the_ode_does_not():
    def correlation(solver):
        z = run(solver, 100)
        return torch.corrcoef(torch.stack([z.flatten(), noise().flatten()]))[0, 1].item()

    assert correlation("euler") == pytest.approx(1, abs=1e-5)
    assert abs(correlation("sde")) < 0.5


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = LightningDiT(LightningDiT.Config(width=32, depth=2, heads=2, patch=2), (4, 4, 4), 3).eval()
    g = generator("weights")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    return net


@pytest.mark.parametrize("solver", ALL)
def test_batch_size_changes_nothing(solver, network):
    labels, ids = torch.tensor([0, 1, 2, 3, 0]), [7, 3, 11, 0, 5]
    guidance = Guidance(scale=2.0, interval=(0.1, 0.9))
    sampler = Sampler(solver=solver, steps=6, shift=1.5)
    together = sample(network, labels, SampleRandom(1, ids), sampler, guidance)
    for i, (label, number) in enumerate(zip(labels, ids, strict=True)):
        alone = sample(network, label[None], SampleRandom(1, [number]), sampler, guidance)
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(together[0], together[4])  # same label, another id


@pytest.mark.parametrize(
    ("solver", "steps", "evaluations"), [("euler", 5, 5), ("heun", 5, 10), ("sde", 5, 5), ("euler", 250, 250), ("sde", 250, 250)]
)
def test_steps_count_intervals(solver, steps, evaluations):
    """The papers' 250 evaluations are 250 intervals."""
    calls = []

    def counting(x, t, y):
        calls.append(t[0].item())
        return gaussian(x, t, y)

    sample(counting, torch.zeros(1, dtype=torch.long), SampleRandom(0, [0]), Sampler(solver=solver, steps=steps),
           latent_shape=SHAPE, null=1)  # fmt: skip
    assert len(calls) == evaluations
    assert calls[0] == path.NOISE
    assert min(calls) >= path.DATA


@pytest.mark.parametrize("solver", ALL)
def test_one_callback_per_step(solver):
    seen = []
    z = run(solver, 8, callback=lambda *step: seen.append(step))
    total = 4 if solver == "dopri5" else 8
    assert [step[:2] for step in seen] == [(k + 1, total) for k in range(total)]
    number, _, t, x, _estimate = seen[-1]
    assert (number, t) == (total, path.DATA)
    assert torch.equal(x, z)
    if solver != "dopri5":
        assert all(a[2] > b[2] for a, b in pairwise(seen))
        # far from the end the estimate already has the data's mean; the state has not
        assert seen[0][4].mean().item() == pytest.approx(MEAN, abs=0.1)
        assert seen[0][3].mean().item() < MEAN / 2


def test_an_exception_in_the_callback_cancels():
    class Cancelled(Exception):
        pass

    steps = []

    def stop(step, *_):
        steps.append(step)
        if step == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        run("euler", 10, callback=stop)
    assert steps == [1, 2, 3]


def test_steps_can_be_drawn_one_by_one_without_gradients(network):
    steps = trajectory(network, torch.tensor([1]), SampleRandom(0, [0]), Sampler(steps=3))
    first = next(steps)
    assert torch.is_grad_enabled()
    assert (first.number, first.total, first.x.requires_grad) == (1, 3, False)
    assert len(list(steps)) == 2


def test_refusals(network):
    labels = torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="outside 0 to 3"):
        sample(network, torch.tensor([4]), SampleRandom(0, [0]))
    with pytest.raises(ConfigError, match="1 noise streams for 2 labels"):
        sample(network, labels, SampleRandom(0, [0]))
    with pytest.raises(ConfigError, match="draws noise at every step"):
        sample(network, labels, None, Sampler(solver="sde"), noise=torch.zeros(2, 4, 4, 4))
    with pytest.raises(ConfigError, match="no labels"):
        sample(network, labels[:0], SampleRandom(0, []), noise=torch.zeros(0, 4, 4, 4))


def test_a_class_tokens_noise_is_the_samples_whatever_the_latents_are():
    """So the frames of a walk between two noises differ in their latents alone."""
    state = State(SHAPE, 5)
    usual, given = (state.noise(SampleRandom(0, [3]), latents) for latents in (None, torch.zeros(1, *SHAPE)))
    torch.testing.assert_close(state.token(given), state.token(usual), rtol=0, atol=0)
    assert not state.latents(given).any()
