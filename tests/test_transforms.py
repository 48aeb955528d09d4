"""Equivariance transforms: reference values, inverses, sizes that do not divide, and the odds of each path."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vfmlab.config import Equivariance
from vfmlab.nn import transforms
from vfmlab.nn.transforms import Choice
from vfmlab.seeding import StepRandom


def test_images_match_the_release(golden):
    io = load_file(golden / "discriminators.safetensors")
    x = io["imgtf.in"]
    for name, side, turns in (("s05_r1", 32, 1), ("s075_r3", 48, 3), ("s1_r2", 64, 2)):
        out = transforms.target_images(x, Choice("latent", side // 16, side, turns))
        torch.testing.assert_close(out, io[f"imgtf.{name}"], rtol=0, atol=1e-6)
    for k in range(4):
        out = transforms.resize(x, 32 >> k)
        torch.testing.assert_close(out, io[f"imgtf.multiscale.{k}"], rtol=0, atol=1e-6)


def test_latents_match_the_release(golden):
    io = load_file(golden / "vfmvae_small_io.safetensors")
    z = io["out.mean"]
    turned = transforms.latent(z, Choice("latent", 4, 64, 1))
    torch.testing.assert_close(turned, io["out.eq.z_rot90"], rtol=0, atol=1e-6)
    half = transforms.latent(z, Choice("latent", 2, 32, 1))
    torch.testing.assert_close(half, io["out.eq.z_half_rot90"], rtol=0, atol=1e-6)


@given(st.integers(-8, 8), st.integers(-8, 8))
def test_turns_add_up_and_invert(a, b):
    x = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    assert torch.equal(transforms.turn(transforms.turn(x, a), b), transforms.turn(x, a + b))
    assert torch.equal(transforms.turn(transforms.turn(x, a), -a), x)


def test_turn_is_clockwise():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert transforms.turn(x, 1).tolist() == [[3.0, 1.0], [4.0, 2.0]]


@settings(max_examples=60)
@given(st.integers(1, 40), st.sampled_from([1, 3, 4, 14, 16]), st.integers(0, 10**6))
def test_latent_and_target_always_agree_in_size(side, factor, step):
    config = Equivariance(p_latent=0.5, p_prior=0.5)
    choice = transforms.plan(config, StepRandom(0, step, 4), side, factor)
    images, z = torch.zeros(1, 3, side * factor, side * factor), torch.zeros(1, 2, side, side)
    encoded = transforms.input_images(images, choice)
    assert encoded.shape[-1] % factor == 0
    if choice.path == "prior":
        z = torch.zeros(1, 2, encoded.shape[-1] // factor, encoded.shape[-1] // factor)
    decoded = transforms.latent(z, choice)
    assert decoded.shape[-1] >= 1
    assert transforms.target_images(images, choice).shape[-1] == decoded.shape[-1] * factor


def test_sizes_that_do_not_divide_round_to_the_nearest_cell():
    assert [transforms.scaled_side(7, s) for s in (0.25, 0.5, 0.75, 1.0)] == [2, 4, 5, 7]
    assert transforms.scaled_side(1, 0.25) == 1


def test_odds_of_the_paths():
    config = Equivariance(p_latent=0.5, p_prior=0.25)
    plans = [transforms.plan(config, StepRandom(1, step, 4), 8, 4) for step in range(2000)]
    count = Counter(choice.path for choice in plans)
    assert abs(count["latent"] / 2000 - 0.5) < 0.05
    assert abs(count["prior"] / 2000 - 0.125) < 0.03
    latent = [choice for choice in plans if choice.path == "latent"]
    assert {choice.latent_side for choice in latent} == {2, 4, 6, 8}
    assert {choice.turns for choice in latent} == {0, 1, 2, 3}
    prior = [choice for choice in plans if choice.path == "prior"]
    assert {choice.latent_side for choice in prior} == {2, 4, 6}
    assert {choice.turns for choice in prior} == {0}


def test_off_leaves_everything_as_it_is():
    choice = transforms.plan(Equivariance(), StepRandom(0, 0, 4), 8, 4)
    images, z = torch.randn(1, 3, 32, 32), torch.randn(1, 2, 8, 8)
    assert choice == Choice("none", 8, 32)
    assert transforms.input_images(images, choice) is images
    assert transforms.target_images(images, choice) is images
    assert transforms.latent(z, choice) is z


@pytest.mark.parametrize("config", [Equivariance(), Equivariance(p_latent=1.0), Equivariance(p_prior=1.0)])
def test_what_is_drawn_afterwards_does_not_depend_on_the_plan(config):
    rng, other = StepRandom(3, 7, 4), StepRandom(3, 7, 4)
    transforms.plan(config, rng, 8, 4)
    transforms.plan(Equivariance(p_latent=0.5), other, 8, 4)
    assert torch.equal(rng.randn(3), other.randn(3))


def test_gradients_reach_the_latent():
    z = torch.randn(1, 2, 7, 7, requires_grad=True)
    transforms.latent(z, Choice("latent", 5, 20, 3)).square().sum().backward()
    assert z.grad.abs().sum() > 0
