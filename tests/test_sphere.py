"""The spherical path: reference values, exact landing, geometry, refusals, and a whole tiny run on a sphere."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from golden_values import close
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab import api, presets
from vfmlab.config import Guidance, Sampler, TokenizerConfig, override
from vfmlab.data import examples
from vfmlab.diffusion import path, sampling
from vfmlab.diffusion.sphere import LARGEST
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation.roundtrip import as_saved, through
from vfmlab.nn.sphere import lengths, mean_length, onto
from vfmlab.registry import PATHS
from vfmlab.runs import RunDir
from vfmlab.seeding import SampleRandom, StepRandom, generator
from vfmlab.tokenizers.base import Posterior, Tokenizer, measure


@pytest.fixture(scope="module")
def stored(golden):
    folder = golden / "continuous"
    return load_file(folder / "spherical_flow.safetensors"), json.loads((folder / "spherical_flow.json").read_text())


def field(tensors, x, t):
    """The linear field of the stored trajectories."""
    moved = torch.einsum("bchw,dc->bdhw", x, tensors["field.A"].to(x)) * (0.5 + t)
    return moved + tensors["field.b"].to(x).view(1, -1, 1, 1) * t


# -- reference values --------------------------------------------------------------------------------------------------


def test_paths_of_hae(stored):
    g, c = stored[0], stored[1]["hae"]
    along = path.make("sphere", radius=c["R"], radial=c["lambda_rad"])
    tolerance = 1e-9 * c["R"]
    point = along.interpolate(g["hae.z0"], g["hae.z1"], g["t"].double())
    assert point.x.dtype == torch.float64
    for got, name in ((point.x, "zt"), (point.v, "ut"), (point.angle, "omega")):
        close(got, g[f"hae.{name}"], tolerance)
    tangent = along.tangent(point.x, g["hae.v"])
    close(tangent, g["hae.v_tan"], tolerance)
    close(g["hae.v"] - tangent, g["hae.v_rad"], tolerance)
    loss = along.loss(g["hae.v"], point)
    assert loss.mean().item() == pytest.approx(g["hae.loss"].item(), rel=1e-9)
    plain = path.make("sphere", radius=c["R"], radial=0).loss(g["hae.v"], point)
    assert plain.mean().item() == pytest.approx(g["hae.loss_tan"].item(), rel=1e-9)
    assert (loss - plain).mean().item() == pytest.approx(c["lambda_rad"] * g["hae.loss_rad"].item(), rel=1e-9)
    close(path.shift_time(g["hae.tb"], c["alpha"]), g["hae.tb_shifted"], 1e-12)
    close(torch.tensor(path.time_grid(c["steps"], c["alpha"])).double(), g["hae.sampler_grid"], 1e-6)
    close(onto(g["hae.decode_scale_in"], c["decode_scale"]), g["hae.decode_scale_out"], 1e-9)
    for width, radius in c["expected_radius"].items():
        assert mean_length(int(width)) == pytest.approx(radius, rel=1e-12)


def test_trajectory_of_hae(stored):
    g, c = stored[0], stored[1]["hae"]
    along, x = path.make("sphere", radius=c["R"]), g["hae.z1"]
    for k, (t, s) in enumerate(pairwise(g["hae.sampler_grid"].tolist())):
        close(x.float(), g["hae.sampler_traj"][k], 1e-5 * c["R"])
        x = along.step(x, field(g, x, t), s - t)
    close(x.float(), g["hae.sampler_traj"][-1], 1e-5 * c["R"])


def test_paths_of_rjf(stored):
    g = stored[0]
    along = path.make("sphere", radius=1.0, radial=0, weighting="jacobi")
    point = along.interpolate(g["data"], g["noise"], g["t"])
    clamped = torch.zeros(point.angle.shape, dtype=torch.bool)
    clamped[0, 0, 0, :2] = True
    for got, name in ((point.x, "xt"), (point.v, "ut")):
        far = (got - g[f"rjf.{name}"]).abs().amax(1, keepdim=True)
        assert far[~clamped].max() < 1e-5
        assert far[clamped].max() < 1e-3
    close(point.angle[~clamped], g["rjf.omega"][~clamped], 1e-5)
    weight = along.weight(point)
    close(weight[~clamped], g["rjf.weight"][~clamped], 1e-5)
    close(weight[clamped], g["rjf.weight"][clamped], 2e-3)
    assert point.angle[0, 0, 0, 1].item() == pytest.approx(LARGEST)
    close(along.prior(g["noise"]), g["rjf.x0"], 1e-6)  # that release calls noise x0
    tangent = along.tangent(g["rjf.xt"], field(g, 24**0.5 * g["rjf.xt"], g["t"].view(-1, 1, 1, 1)))
    close(tangent, g["rjf.pred_tangent"], 1e-5)
    losses = along.loss(tangent, point)
    torch.testing.assert_close(losses[1:], g["rjf.loss_per_sample"][1:], atol=1e-5, rtol=1e-4)


def test_trajectory_of_rjf(stored):
    g = stored[0]
    along, x = path.make("sphere", radius=1.0), g["rjf.x0"]
    for k, (t, s) in enumerate(pairwise(g["rjf.sampler_t"].tolist())):
        x = along.step(x, field(g, 24**0.5 * x, t), s - t)
        close(x, g["rjf.sampler_traj"][k], 1e-5)


# -- geometry ----------------------------------------------------------------------------------------------------------


def tokens(seed, channels=24, n=3):
    return torch.randn(n, channels, 3, 2, generator=generator("tokens", seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_exact_field_lands_on_the_data(solver, steps):
    along = path.make("sphere", radius=5.0)
    z, start = onto(tokens(0), 5.0), onto(tokens(1), 5.0)
    grid = path.time_grid(steps, 2.0)

    def exact(x, t):
        return along.velocity_from_clean(x, z, t) if t > 0 else torch.zeros_like(x)

    if solver == "heun":  # the field is not defined at the data, where the last step's second slope is taken
        grid = [*grid[:-1], 1e-3]
    *_, (t, x, estimate) = sampling.SOLVERS[solver](exact, start, grid, None, along)
    close(estimate, z, 1e-12)
    if t == 0:
        close(x, z, 1e-13 * 5)
    close(x, along.interpolate(z, start, t).x, 1e-12)


def test_the_velocity_is_the_derivative_and_leads_to_both_ends():
    along, z, noise = path.make("sphere", radius=4.9), tokens(0), tokens(1)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    before, after, point = (along.interpolate(z, noise, t + d) for d in (-1e-4, 1e-4, 0))
    close((after.x - before.x) / 2e-4, point.v, 1e-6)
    close(lengths(point.x), torch.full_like(lengths(point.x), 4.9), 1e-12)
    close(lengths(point.v), point.angle * 4.9, 1e-9)
    close((point.x * point.v).sum(1), torch.zeros(3, 3, 2, dtype=torch.float64), 1e-9)
    close(along.clean(point.x, point.v, t), onto(z, 4.9), 1e-10)
    close(along.noise(point.x, point.v, t), onto(noise, 4.9), 1e-10)
    close(along.velocity_from_clean(point.x, z, t), point.v, 1e-9)
    moved = along.transport(point.v, point.x, after.x)
    close(moved, after.v, 1e-9)  # a geodesic transports its own velocity


def test_equal_and_opposite_tokens_stay_finite():
    along, z = path.make("sphere", radius=3.0), tokens(0).float()
    same, opposite = along.interpolate(z, 2 * z, 0.4), along.interpolate(z, -z, 0.4)
    close(same.x, onto(z, 3.0), 1e-5)
    close(same.v, torch.zeros_like(z), 1e-5)
    assert torch.isfinite(opposite.v).all()
    assert torch.isfinite(along.loss(torch.zeros_like(z), opposite)).all()


def test_half_precision_is_computed_in_fp32():
    along = path.make("sphere", radius=4.0)
    point = along.interpolate(tokens(0).bfloat16(), tokens(1).bfloat16(), torch.rand(3))
    assert point.x.dtype == torch.float32
    assert along.loss(tokens(2).bfloat16(), point).dtype == torch.float32


# -- every path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATHS.names())
def test_every_path_keeps_the_convention(kind):
    along = path.make(kind, radius=None if kind == "linear" else 24**0.5)
    z, noise = along.prior(tokens(0)), along.prior(tokens(1))
    close(along.interpolate(z, noise, 0.0).x, z, 1e-9)
    close(along.interpolate(z, noise, 1.0).x, noise, 1e-9)
    start = along.interpolate(z, noise, 0.3)
    close(along.step(start.x, start.v, 0.2), along.interpolate(z, noise, 0.5).x, 1e-9)
    assert along.loss(start.v, start).abs().max() < 1e-18
    assert along.loss(start.v + 1, start).shape == (3,)
    assert set(along.solvers) <= {*sampling.SOLVERS, "dopri5"}


def test_guidance_is_mixed_in_the_ambient_space_and_then_made_tangent():
    along = path.make("sphere", radius=4.0)
    x = along.prior(tokens(0, 6))
    a, b = tokens(1, 6), tokens(2, 6)
    mixed = along.step(x, b + 3 * (a - b), -0.2)
    projected = along.tangent(x, b) + 3 * (along.tangent(x, a) - along.tangent(x, b))
    close(mixed, along.step(x, projected, -0.2), 1e-12)


@pytest.mark.parametrize("batch", [1, 4])
def test_samples_lie_on_the_sphere_whatever_the_batch(batch):
    class Net:
        num_classes, latent_shape, path = 2, (6, 2, 2), path.make("sphere", radius=6**0.5)

        def __call__(self, x, t, y):
            return x.roll(1, 1) * (1 + y.view(-1, 1, 1, 1))

    parts = [sampling.sample(Net(), torch.tensor([0, 1] * 2)[ids], SampleRandom(0, ids), Sampler(steps=5, solver="heun"),
                             Guidance(scale=2.0), null=2) for ids in torch.arange(4).split(batch)]
    found = torch.cat(parts)
    close(lengths(found), torch.full((4, 1, 2, 2), 6**0.5), 1e-5)
    whole = sampling.sample(Net(), torch.tensor([0, 1] * 2), SampleRandom(0, range(4)), Sampler(steps=5, solver="heun"),
                            Guidance(scale=2.0), null=2)
    close(found, whole, 1e-6)
    with pytest.raises(ConfigError, match="'sde' has no form on the path 'sphere'; choose from: euler, heun"):
        sampling.sample(Net(), torch.tensor([0]), SampleRandom(0, [0]), Sampler(solver="sde"), null=2)


# -- tokenizers --------------------------------------------------------------------------------------------------------


class Pixels(Tokenizer):
    """Pixels of 2 x 2 as channels."""

    def __init__(self, **fields):
        super().__init__(TokenizerConfig(method="pixels", channels=12, factor=2, **fields), 16)

    def posterior(self, images, features=None):
        return Posterior(F.pixel_unshuffle(images, 2))


def test_normalisation_of_a_tokenizer():
    tokenizer = Pixels(radius=3.0)
    images = torch.rand(8, 3, 16, 16, generator=generator("images")) * 2 - 1
    tokenizer.set_statistics(measure(tokenizer, images.split(3), "toy"))
    raw = tokenizer.posterior(images).mean
    z = tokenizer.encode(images).mode()
    assert tokenizer.normalisation == "sphere(3)"
    close(lengths(z), torch.full_like(lengths(z), 3.0), 1e-5)
    close(z, raw * 3.0 / lengths(raw), 1e-5)
    close(lengths(tokenizer.denormalise(z)), torch.full_like(lengths(z), lengths(raw).mean().item()), 1e-4)
    longer = Pixels(radius=3.0, decode_length=14.0)
    longer.load_state_dict(tokenizer.state_dict())
    close(lengths(longer.denormalise(z)), torch.full_like(lengths(z), 14.0), 1e-4)
    assert Pixels().normalisation == "channels"
    for off in (0.5 * z, z + 0.3 * torch.randn(z.shape, generator=generator("off"))):  # midpoints, noise
        mean = torch.full_like(lengths(z), lengths(raw).mean().item())
        close(lengths(tokenizer.denormalise(off)), mean, 1e-4)
    close(tokenizer.denormalise(0.5 * z), tokenizer.denormalise(z), 1e-5)


def test_reconstructions_go_over_the_sphere():
    """Metrics see what decode(encode(x)) gives; without a radius, what the raw latent gives, with or without statistics."""
    images = torch.rand(8, 3, 16, 16, generator=generator("images")) * 2 - 1
    for tokenizer in (Pixels(radius=3.0), Pixels(radius=3.0, decode_length=2.0), Pixels()):
        tokenizer.decoder = lambda z: [F.pixel_shuffle(z, 2)]
        bare = None if tokenizer.config.radius else through(tokenizer, images).restored
        tokenizer.set_statistics(measure(tokenizer, images.split(3), "toy"))
        trip = through(tokenizer, images)
        assert torch.equal(trip.raw, tokenizer.posterior(images).mode())
        close(trip.restored, as_saved(tokenizer.decode(tokenizer.encode(images).mode())), 2 / 255 + 1e-6)
        if bare is None:
            assert (trip.restored - images).square().mean() > 1e-3, "lengths are lost"
        else:
            assert torch.equal(trip.restored, bare)
            assert torch.equal(bare, as_saved(images))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [None, 0.0, -1.0, 1e-20, 1e20, math.inf, math.nan])
def test_a_radius_is_needed(radius):
    with pytest.raises(ConfigError, match=r"path 'sphere': radius .* is no length from 1e-9 to 1e9; give radius=R, for example 27\.70"):
        path.make("sphere", radius=radius)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"tokenizer.radius": 2.0}, "tokenizer.radius 2 puts latents on a sphere, which the linear path leaves; set diffusion.path=sphere"),
        ({"diffusion.path": "sphere"}, "needs latents on a sphere, but tokenizer.radius is null; set tokenizer.radius, for example to 2 ="),
        ({"tokenizer.decode_length": 2.0}, "decode_length 2: only latents on a sphere have one; set radius too"),
        ({"tokenizer.radius": 2.0, "diffusion.path": {"kind": "sphere", "radail": 1}}, "unknown field 'diffusion.path.radail'"),
        ({"tokenizer.radius": 2.0, "diffusion.path": "shpere"}, "unknown path 'shpere'.*did you mean 'sphere'"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(change, line):
    with pytest.raises(ConfigError, match=line) as caught:
        override(presets.get("tiny_plain_vae"), change)
    assert "\n" not in str(caught.value)


def test_other_refusals():
    with pytest.raises(ConfigError, match="path 'linear' has no radius"):
        path.make("linear", radius=2.0)
    for given in ("long", [3.0]):
        with pytest.raises(ConfigError, match="a radius is a number"):
            path.make("sphere", radius=given)
    with pytest.raises(ConfigError, match="path 'sphere' has no option 'radail'.*did you mean 'radial'"):
        path.make("sphere", radius=2.0, radail=1)
    along, z = path.make("sphere", radius=2.0), tokens(0)
    z[1, :, 2, 1] = 0
    with pytest.raises(DataError, match="1 tokens have length zero, the first in row 1 at place 5"):
        along.interpolate(z, tokens(1), 0.5)
    with pytest.raises(ConfigError, match="class_token: works on the straight path only"):
        override(presets.get("tiny_vfm_vae_reg"), {"tokenizer.radius": 2.0, "diffusion.path": "sphere"})


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_a_run_on_a_sphere(tmp_path):
    run = override(presets.get("tiny_rae+sphere"), {"data.train": 48, "data.val": 16, "protocol.n": 16, "diffusion.train.samples": 32,
                                                     "train.samples": 16, "train.evaluate_at": [8, 16], "diffusion.train.evaluate_at": []})
    assert run.tokenizer.radius == pytest.approx(mean_length(128))
    list(api.train(run, tmp_path))
    loaded = api.load_diffusion(run.id, tmp_path)
    logged = [record["psnr"]["value"] for record in RunDir(tmp_path / run.tokenizer_phase.id).metrics("evaluation")]
    report = api.evaluate(run.tokenizer_phase.id, tmp_path)
    assert logged[-1] == pytest.approx(report["psnr"].value, abs=1e-4), "during training as at its end"
    images, _, _ = examples(run.data, 16)
    assert float(api.reconstruct(loaded.tokenizer, images)[2].mean()) == pytest.approx(report["psnr"].value, abs=0.02)
    assert loaded.network.path.radius == pytest.approx(mean_length(128))
    *_, last = api.sample(loaded, [0, 1], previews=0)
    assert last.images.shape == (2, 3, 16, 16)
    rng = StepRandom(0, 0, 4)
    z = onto(torch.randn(4, 128, 4, 4, generator=generator("z")), loaded.network.path.radius)
    from vfmlab.diffusion.objective import Flow

    terms = Flow(loaded.run.diffusion).terms(loaded.network, z, torch.zeros(4, dtype=torch.long), rng)
    assert torch.isfinite(terms.velocity).all()
