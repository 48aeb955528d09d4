"""From noise to latents: solvers of the probability-flow ODE and of the SDE, each step told to one callback.

A sample is a function of (network, label, sampler, guidance, seed, id): noise comes from a stream per sample,
and no solver lets samples of one batch influence each other, so the batch size changes nothing beyond
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from vfmlab.config import Guidance, Sampler
from vfmlab.diffusion import path
from vfmlab.diffusion.guidance import Guided, Steered, auto, internal
from vfmlab.diffusion.joint import State, token_width
from vfmlab.diffusion.reuse import Reused
from vfmlab.errors import ConfigError
from vfmlab.seeding import SampleRandom

Field = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, int, float, Tensor, Tensor], object]
Reached = tuple[float, Tensor, Tensor]  # time, state, estimate of the clean latent

HALF = 0.5 + 1e-6  # in spite of rounding
RTOL, ATOL = 1e-5, 1e-5  # of dopri5; the releases' rtol of 1e-3 leaves errors of several 1e-3


@dataclass(frozen=True)
class Step:
    """One finished step: number (from 1) of `total`, the time reached, the latents x there, the estimated z.

    token: the class token there (B K), for networks that denoise one; in the units it was trained in.
    """

    number: int
    total: int
    t: float
    x: Tensor
    estimate: Tensor
    token: Tensor | None = None


def euler(field: Field, x: Tensor, grid: list[float], random: SampleRandom | None,
          along: path.Path = path.LINE) -> Iterator[Reached]:
    """First order, one evaluation per step."""
    for t, s in pairwise(grid):
        v = field(x, t)
        estimate = along.clean(x, v, t)
        x = along.step(x, v, s - t)
        yield s, x, estimate


def injected(noise: Tensor, weight: float) -> Callable[..., Iterator[Reached]]:
    """Euler's steps, with `weight` of the first noise added at each that begins at t = 1/2 or later (Faster
    Diffusion, arXiv 2312.09608)."""

    def steps(field: Field, x: Tensor, grid: list[float], random: SampleRandom | None,
              along: path.Path = path.LINE) -> Iterator[Reached]:
        for t, s in pairwise(grid):
            ((_, x, estimate),) = euler(field, x, [t, s], random, along)
            x = x + weight * noise if t <= HALF else x
            yield s, x, estimate

    return steps


def heun(field: Field, x: Tensor, grid: list[float], random: SampleRandom | None,
         along: path.Path = path.LINE) -> Iterator[Reached]:
    """Second order: mean of the slopes at both ends of the step, two evaluations."""
    for t, s in pairwise(grid):
        first = field(x, t)
        there = along.step(x, first, s - t)
        v = (first + along.transport(field(there, s), there, x)) / 2
        estimate = along.clean(x, v, t)
        x = along.step(x, v, s - t)
        yield s, x, estimate


def sde(field: Field, x: Tensor, grid: list[float], random: SampleRandom | None,
        along: path.Path = path.LINE) -> Iterator[Reached]:
    """Euler-Maruyama on SiT's SDE with g^2 = 2 t (see `path.diffusion`); the last step is taken without
    noise."""
    if random is None:
        raise ConfigError("sampler.solver 'sde' draws noise at every step; give a SampleRandom, not only "
                          "noise")
    for t, s in pairwise(grid):
        v = field(x, t)
        estimate = path.clean(x, v, t)
        x = x + (s - t) * path.sde_drift(x, v, t)
        if s != grid[-1]:
            x = x + path.diffusion(t) * abs(s - t) ** 0.5 * random.randn(*x.shape[1:]).to(x)
        yield s, x, estimate


SOLVERS = {"euler": euler, "heun": heun, "sde": sde}


def adaptive(field: Field, x: Tensor, rtol: float = RTOL, atol: float = ATOL, land: bool = True) -> Tensor:
    """torchdiffeq's Dormand-Prince 4(5) from noise to data with x (B C h w) as one system under one error
    norm.

    land: end exactly at the data; otherwise, as the releases do, step beyond it and interpolate back, which
    calls the network at times it was never trained on.
    """
    from torchdiffeq import odeint  # imports scipy

    ends = torch.tensor([path.NOISE, path.DATA], device=x.device)
    options = {"dtype": torch.float32, **({"step_t": ends[1:]} if land else {})}

    def slope(t: Tensor, state: Tensor) -> Tensor:
        return field(state, float(t))

    return odeint(slope, x, ends, rtol=rtol, atol=atol, method="dopri5", options=options)[-1]


def dopri5(field: Guided, x: Tensor) -> Iterator[Reached]:
    """Each sample solved adaptively on its own; yields once per sample; rows not reached yet still hold their
    noise.

    Solved at once, a batch would tie its samples together through the error norm that sets the step. The
    price is a network batch of one: a reference solver, not a fast one. `steps` and `shift` have no effect.
    """
    x = x.clone()
    for i in range(x.shape[0]):
        x[i : i + 1] = adaptive(field.rows(slice(i, i + 1)), x[i : i + 1])
        yield path.DATA, x, x


def suits(network: nn.Module | Callable[..., Tensor], sampler: Sampler, guidance: Guidance) -> None:
    """:class:`ConfigError` for a solver, a reuse of encodings or a second read-out that the network or its
    path does not have; arguments as in :func:`trajectory`. It computes nothing."""
    along = path.of(network)
    if sampler.solver not in along.solvers:
        raise ConfigError(f"sampler.solver '{sampler.solver}' has no form on the path '{along.config.kind}'; "
                          f"choose from: {', '.join(along.solvers)}")
    if guidance.kind == "internal":
        internal(network)
    if sampler.reuse is None:
        return
    Reused(network, sampler.reuse)
    if sampler.solver == "dopri5":
        raise ConfigError(f"sampler.reuse {sampler.reuse}: solver 'dopri5' chooses its own steps; use "
                          "euler, heun or sde, or reuse=null")
    if sampler.parallel and along.config.kind != "linear":
        raise ConfigError(f"sampler.parallel on the path '{along.config.kind}': velocities of one state "
                          "are steps of the straight path only; set parallel=null")
    if sampler.prior_noise is not None and along.config.kind != "linear":
        raise ConfigError(f"sampler.prior_noise {sampler.prior_noise:g} on the path "
                          f"'{along.config.kind}': added noise leaves the sphere; set prior_noise=null")
    if guidance.kind is not None:
        raise ConfigError(f"sampler.reuse {sampler.reuse} with guidance.kind '{guidance.kind}': both "
                          "read-outs need the whole network; set one of them to null")


@torch.no_grad()
def trajectory(network: nn.Module | Callable[..., Tensor], labels: Tensor, random: SampleRandom | None,
               sampler: Sampler | None = None, guidance: Guidance | None = None,
               latent_shape: tuple[int, int, int] | None = None, null: int | None = None,
               noise: Tensor | None = None) -> Iterator[Step]:
    """Integrate from noise to data, step by step.

    Args:
        network: `(x B C h w, t B, y B) -> v B C h w`, in eval mode, on the device of `labels`; its attribute
            `path` says how steps are taken (none: straight). Networks with a class token
            (`network.config.token`) are called with `token=` too, and the token is integrated beside the
            latents.
        labels: B class labels; the null label samples without condition.
        random: noise streams, one per label; the same (seed, id) always gives the same sample.
        sampler: solver, steps (intervals), time shift, reuse of the encoder. guidance: see
            :class:`~vfmlab.diffusion.guidance.Guided`.
        latent_shape, null: (C, h, w) and the null label; by default the network's own.
        noise: B C h w to start from instead of the streams' first numbers.

    Yields:
        one :class:`Step` per interval (dopri5: per sample); states are fp32.
    """
    sampler, guidance = sampler or Sampler(), guidance or Guidance()
    latent_shape = latent_shape or network.latent_shape
    null = network.num_classes if null is None else null
    if not len(labels):
        raise ConfigError("no labels to sample for; give at least one")
    if labels.min() < 0 or labels.max() > null:
        given = f"{labels.min().item()} to {labels.max().item()}"
        raise ConfigError(f"labels {given} are outside 0 to {null} ({null}: the null label)")
    if noise is None and (random is None or len(random) != len(labels)):
        streams = 0 if random is None else len(random)
        raise ConfigError(f"{streams} noise streams for {len(labels)} labels; give SampleRandom one id per "
                          "label")
    state, along = State(latent_shape, token_width(network)), path.of(network)
    suits(network, sampler, guidance)
    grid = (path.sde_grid if sampler.solver == "sde" else path.time_grid)(sampler.steps, sampler.shift)
    if sampler.reuse is not None:
        network = Reused(network, sampler.reuse, grid if sampler.parallel else None)
    x = along.prior(state.noise(random, noise).to(labels.device, torch.float32))
    scales, velocity = state.scales(guidance), state.velocity(network)
    if guidance.kind is not None:
        pair = internal(network) if guidance.kind == "internal" else auto(network, velocity, state.velocity)
        velocity, scales = Steered(pair, guidance.scale, guidance.interval), None
        guidance = Guidance()
    field = Guided(velocity, labels, guidance, null, scales, always=sampler.reuse is not None)
    if sampler.solver == "dopri5":
        total, steps = len(labels), dopri5(field, x)
    else:
        solver = SOLVERS[sampler.solver] if sampler.prior_noise is None else injected(x, sampler.prior_noise)
        total, steps = sampler.steps, solver(field, x, grid, random, along)
    for number, (t, x, estimate) in enumerate(steps, 1):
        yield Step(number, total, t, state.latents(x), state.latents(estimate), state.token(x))


def sample(network: nn.Module | Callable[..., Tensor], labels: Tensor, random: SampleRandom | None,
           sampler: Sampler | None = None, guidance: Guidance | None = None,
           latent_shape: tuple[int, int, int] | None = None, null: int | None = None,
           noise: Tensor | None = None, callback: Callback | None = None) -> Tensor:
    """Clean normalised latents B C h w (fp32) for `labels`; arguments as in :func:`trajectory`.

    callback(step, total, t, x, estimate): called after every step, 1 to total, with the time reached, the
    state and the
        estimate of the clean latent made on the way. An exception raised in it ends the sampling: so it
        cancels.
    """
    step = None
    for step in trajectory(network, labels, random, sampler, guidance, latent_shape, null, noise):
        if callback is not None:
            callback(step.number, step.total, step.t, step.x, step.estimate)
    return step.x
