"""Released LightningDiT: the importer gives the stored outputs, losses, gradients, guidance and trajectories."""

from __future__ import annotations

import json

import pytest
import torch
from golden_values import close
from safetensors.torch import load_file
from torchdiffeq import odeint

from vfmlab.config import Guidance, Sampler
from vfmlab.diffusion import path
from vfmlab.diffusion.guidance import Guided
from vfmlab.diffusion.sampling import adaptive, sample, trajectory
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.weights import import_state_dict
from vfmlab.weights.families.lightningdit import rename, reversed_time


@pytest.fixture(scope="module")
def config(golden):
    return json.loads((golden / "lightningdit_small_config.json").read_text())


@pytest.fixture(scope="module")
def io(golden):
    return load_file(golden / "lightningdit_small_io.safetensors")


@pytest.fixture(scope="module")
def state(golden):
    return load_file(golden / "lightningdit_small_weights.safetensors")


@pytest.fixture
def network(state, config):
    return import_state_dict("lightningdit", state, config["config"])


@torch.no_grad()
def test_forward(network, io):
    close(-network(io["in.x"], 1 - io["in.t"], io["in.y"]), io["out.forward"])


@torch.no_grad()
@pytest.mark.parametrize("variant", ["wo_shift_layernorm_gelu_norope", "patch2"])
def test_variants(variant, io, config):
    prefix = f"variant.{variant}."
    state = {k.removeprefix(f"{prefix}sd."): v for k, v in io.items() if k.startswith(f"{prefix}sd.")}
    network = import_state_dict("lightningdit", state, config[prefix.rstrip(".")])
    close(-network(io["in.x"], 1 - io["in.t"], io["in.y"]), io[f"{prefix}out"])


def test_losses_and_gradients(network, io, config):
    point = path.interpolate(io["loss.x1"], io["loss.x0"], 1 - io["loss.t"])
    close(point.x, io["loss.xt"], 1e-6)
    close(-point.v, io["loss.ut"], 1e-6)
    prediction = network(point.x, point.t, io["loss.y"])
    close(-prediction, io["loss.pred"])
    mse = path.velocity_loss(prediction, point.v)
    torch.testing.assert_close(mse, io["loss.per_sample_velocity"], rtol=1e-5, atol=0)
    both = path.velocity_loss(prediction, point.v, cosine=1.0)
    torch.testing.assert_close(both - mse, io["loss.per_sample_cos"], rtol=1e-5, atol=1e-6)
    assert both.mean().item() == pytest.approx(config["loss_mean_velocity"] + config["loss_mean_cos"], rel=1e-5)
    both.mean().backward()
    names = [k for k in io if k.startswith("loss.grad.")]
    assert len(names) == 8
    for name in names:
        got = network.get_parameter(rename(name.removeprefix("loss.grad."))).grad
        torch.testing.assert_close(got, io[name], atol=1e-3 * io[name].abs().max().item(), rtol=0)


@pytest.mark.parametrize("case", ["t_below", "t_at", "t_above", "noninterval_t05"])
@torch.no_grad()
def test_guidance_of_the_release(case, network, io):
    # Made with scale 4, interval from 0.125 of the release's time on; its y holds the labels, then null labels.
    t = {"t_below": 0.05, "t_at": 0.125, "t_above": 0.5, "noninterval_t05": 0.05}[case]
    end = 1.0 if case == "noninterval_t05" else 1 - 0.125
    guidance = Guidance(scale=4.0, interval=(0.0, end), channels=3)  # the release guides the first three only
    half = len(io["cfg.in.y"]) // 2
    field = Guided(network, io["cfg.in.y"][:half], guidance, null=network.num_classes)
    close(-field(io["cfg.in.x"][:half], 1 - t), io[f"cfg.out.{case}"][:half])


def analytic(x, t, y):
    """The stored trajectories' field, (0.7 - x)(0.5 + s) + 0.3 sin(3 x), at s = 1 - t and with the sign turned."""
    s = (1 - t).view(-1, 1, 1, 1)
    return -((0.7 - x) * (0.5 + s) + 0.3 * torch.sin(3 * x))


@pytest.mark.parametrize(
    ("name", "shift", "method", "points"),
    [
        ("ode.euler_shift0", 0.0, "euler", 10),
        ("ode.euler_shift0.3", 0.3, "euler", 10),
        ("ode.euler_shift0.3_n250", 0.3, "euler", 250),
        ("ode.heun2_shift0.3", 0.3, "heun", 10),
    ],
)
def test_trajectories(name, shift, method, points, io):
    # The release counts points of time, one more than steps; its shift is the inverse of ours, and 0 means none.
    sampler = Sampler(solver=method, steps=points - 1, shift=1 / shift if shift else 1.0)
    called = []

    def field(x, t, y):
        called.append(1 - t[0].item())
        return analytic(x, t, y)

    start = io["ode.x_init"]
    labels = torch.zeros(len(start), dtype=torch.long)
    states = [start] + [
        step.x
        for step in trajectory(
            field,
            labels,
            None,
            sampler,
            latent_shape=start.shape[1:],
            null=1,
            noise=start,
        )
    ]
    assert len(states) == points
    torch.testing.assert_close(torch.tensor(called), io[f"{name}.t_calls"], atol=1e-6, rtol=0)
    close(states[-1], io[f"{name}.final"], 1e-5)
    if f"{name}.trajectory" in io:
        close(torch.stack(states), io[f"{name}.trajectory"], 1e-5)


def test_dopri5_as_in_the_release(io):
    # The release solves the batch as one system with rtol 1e-3, steps beyond the data and interpolates back.
    called = []

    def field(x, t):
        called.append(1 - t)
        return analytic(x, torch.tensor([t]), None)

    got = adaptive(field, io["ode.x_init"], rtol=1e-3, atol=1e-6, land=False)
    torch.testing.assert_close(torch.tensor(called), io["ode.dopri5.t_calls"], atol=1e-5, rtol=0)
    close(got, io["ode.dopri5.final"], 1e-5)


def test_dopri5_of_ours_is_closer_to_the_solution(io):
    start = io["ode.x_init"]
    labels = torch.zeros(len(start), dtype=torch.long)
    got = sample(analytic, labels, None, Sampler(solver="dopri5"), latent_shape=start.shape[1:], null=1, noise=start)
    exact = odeint(
        lambda t, x: analytic(x, t[None], None), start.double(), torch.tensor([1.0, 0.0]).double(), rtol=1e-9, atol=1e-9
    )[-1].float()
    assert (io["ode.dopri5.final"] - exact).abs().max() > 1e-3
    close(got, exact, 1e-4)


def test_reversed_time_is_its_own_inverse():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reversed_time(reversed_time(weight)), weight, atol=1e-6, rtol=0)


def test_refusals(state, config):
    with pytest.raises(ConfigError, match="did you mean 'use_rope'"):
        import_state_dict("lightningdit", state, {**config["config"], "use_ropes": True})
    with pytest.raises(CheckpointError, match="missing"):
        import_state_dict("lightningdit", {k: v for k, v in state.items() if "blocks.2" not in k}, config["config"])
    with pytest.raises(CheckpointError, match="rotary table"):
        import_state_dict("lightningdit", state, {**config["config"], "use_rope": False})


def test_weights_without_a_null_label(state, config):
    table = "y_embedder.embedding_table.weight"
    short = {**state, table: state[table][:-1]}
    network = import_state_dict("lightningdit", short, {**config["config"], "class_dropout_prob": 0.0})
    assert torch.equal(network.label_embed.weight[-1], torch.zeros(128))
