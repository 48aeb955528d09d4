"""The one convention of time and velocity: t = 0 is data, t = 1 is noise, v = dx/dt = noise - data.

This is the only file that knows it. A path leads from one to the other: :func:`make` gives the one of a name.
Every path has `interpolate`, `loss`, `step`, `prior`, `clean`, `noise`, `velocity_from_clean`, `tangent` and
`transport`, and names its `solvers`. Here stands the straight one, "linear" (rectified flow, arXiv
2209.03003; SiT, arXiv 2401.08740), whose formulas are functions too; `vfmlab.diffusion.sphere` is the other:

    x_t = (1 - t) z + t n,   z: clean normalised latents, n: standard normal noise,   v = n - z.

LightningDiT's releases run time the other way (t = 1 data, v = data - noise); `reverse` converts a time, and
a velocity changes its sign. SiT, REPA, REG and RAE use this file's convention. Shapes: latents B C h w, times
B or a number.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.config import TimeSampling
from vfmlab.errors import ConfigError, nearest
from vfmlab.registry import PATHS
from vfmlab.seeding import StepRandom

DATA, NOISE = 0.0, 1.0


@dataclass(frozen=True)
class PathSample:
    """A point of the path: x at time t (B C h w, B) and the velocity v (B C h w) a network should predict
    there. angle: between data and noise, B 1 h w, on a sphere."""

    x: Tensor
    v: Tensor
    t: Tensor
    angle: Tensor | None = None


def over(t: Tensor | float, x: Tensor) -> Tensor | float:
    """Times shaped so that they multiply latents; numbers pass."""
    return t.to(x).view(-1, *[1] * (x.ndim - 1)) if isinstance(t, Tensor) and t.ndim else t


def times(z: Tensor, noise: Tensor, t: Tensor | float, dtype: torch.dtype) -> Tensor:
    """`t` for every latent, B. ConfigError where z, noise and t are not of one batch."""
    if z.shape != noise.shape or (isinstance(t, Tensor) and t.numel() not in (1, len(z))):
        raise ConfigError(f"path: z {tuple(z.shape)}, noise {tuple(noise.shape)} and t "
                          f"{tuple(t.shape) if isinstance(t, Tensor) else t}; z and noise must be of one "
                          "shape, t a number or one time for each latent")
    return t if isinstance(t, Tensor) else torch.full(z.shape[:1], t, device=z.device, dtype=dtype)


def interpolate(z: Tensor, noise: Tensor, t: Tensor | float) -> PathSample:
    """The point at time t between clean latents z and noise, with its velocity."""
    t = times(z, noise, t, torch.promote_types(z.dtype, torch.float32))
    return PathSample(torch.lerp(z, noise, over(t, z)), noise - z, t)


def as_seen(point: PathSample, least: float) -> PathSample:
    """`point` with the velocity of networks that predict the clean latent z: (x - z) / max(t, least)."""
    share = over((point.t / least).clamp(max=1.0), point.v)
    return dataclasses.replace(point, v=point.v * share)


def reverse(t: Tensor | float) -> Tensor | float:
    """Time of the convention with t = 1 at the data <-> time of this one."""
    return 1 - t


# -- what a velocity says about the two ends ---------------------------------------------------------------


def clean(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Estimate of the clean latent: x - t v."""
    return x - over(t, x) * v


def noise(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Estimate of the noise: x + (1 - t) v."""
    return x + (1 - over(t, x)) * v


def velocity_from_clean(x: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
    """(x - z) / t. Not defined at t = 0."""
    return (x - z) / over(t, x)


# -- training ----------------------------------------------------------------------------------------------


def shift_time(t: Tensor | float, shift: float) -> Tensor | float:
    """t -> s t / (1 + (s - 1) t): s > 1 moves times towards noise, as large latents need (arXiv 2403.03206).

    A shift s' of the convention with t = 1 at the data is s = 1 / s' here.
    """
    return shift * t / (1 + (shift - 1) * t)


def draw_times(config: TimeSampling, random: StepRandom) -> Tensor:
    """Training times [rows] in (0, 1): uniform, or logit-normal = sigmoid of a normal (SD3), then shifted."""
    if config.kind == "uniform":
        t = random.rand()
    else:
        t = torch.sigmoid(config.mean + config.std * random.randn())
    return shift_time(t, config.shift)


def time_quantiles(config: TimeSampling, count: int = 4096) -> Tensor:
    """`count` times [count] at equal probability: means over them are expectations over
    :func:`draw_times`."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = u if config.kind == "uniform" else torch.sigmoid(config.mean + config.std * torch.special.ndtri(u))
    return shift_time(t, config.shift).float()


def velocity_loss(prediction: Tensor, target: Tensor, cosine: float = 0.0) -> Tensor:
    """Loss per sample [B], fp32: mean squared error plus `cosine` times the mean over places of 1 - cos over
    channels.

    The cosine term is LightningDiT's option (arXiv 2501.01423, section 3), used there with weight 1.
    """
    prediction, target = prediction.float(), target.float()
    loss = (prediction - target).square().flatten(1).mean(1)
    if cosine:
        loss = loss + cosine * (1 - F.cosine_similarity(prediction, target, dim=1)).flatten(1).mean(1)
    return loss


# -- paths -------------------------------------------------------------------------------------------------


@PATHS.register("linear")
class Linear:
    """The straight path on normalised latents; its formulas are the functions of this file."""

    class Config(config.PathConfig):
        kind: Literal["linear"] = "linear"

    solvers = ("euler", "heun", "sde", "dopri5")
    interpolate, clean, noise = staticmethod(interpolate), staticmethod(clean), staticmethod(noise)
    velocity_from_clean = staticmethod(velocity_from_clean)

    def __init__(self, config: Linear.Config, radius: float | None = None):
        if radius is not None:
            raise ConfigError(f"path 'linear' has no radius (given: {radius:g}); latents on a sphere need "
                              "the path 'sphere': diffusion.path=sphere")
        self.config, self.radius = config, None

    def loss(self, prediction: Tensor, point: PathSample, cosine: float = 0.0) -> Tensor:
        """Per sample [B]; see :func:`velocity_loss`."""
        return velocity_loss(prediction, point.v, cosine)

    def step(self, x: Tensor, v: Tensor, dt: Tensor | float) -> Tensor:
        """x + dt v; dt < 0 towards data."""
        return x + over(dt, x) * v

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """v itself: every direction lies in the space."""
        return v

    def transport(self, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """v itself."""
        return v

    def prior(self, noise: Tensor) -> Tensor:
        """Where sampling starts: the noise."""
        return noise


Path = Any  # Linear, Sphere, or another entry of PATHS
LINE = Linear(Linear.Config())


def make(kind: str | config.PathConfig = "linear", radius: float | None = None, **options: Any) -> Path:
    """The path called `kind` ("linear", "sphere"), or the one of a config section.

    radius: length of the tokens, for paths on a sphere. options: fields of the path's `Config`.

    Raises:
        ConfigError: an unknown path or option, a radius that is missing, no number, or that the path does
        not have.
    """
    try:
        radius = None if radius is None else float(radius)
    except (TypeError, ValueError):
        raise ConfigError(f"radius = {radius!r}: a radius is a number") from None
    if isinstance(kind, str):
        section = PATHS.get(kind).Config
        unknown = next((name for name in options if name not in section.model_fields), None)
        if unknown is not None:
            hint = nearest(unknown, section.model_fields)
            raise ConfigError(f"path '{kind}' has no option '{unknown}'{hint}")
        try:
            kind = section(kind=kind, **options)
        except ValidationError as error:
            raise ConfigError(f"path '{kind}': {config.explain(error, options)}") from None
    return PATHS.get(kind.kind)(kind, radius)


def of_run(diffusion: config.Diffusion, tokenizer: config.TokenizerConfig) -> Path:
    """The path of a run: its diffusion section's kind on the radius of its tokenizer's latents."""
    return make(diffusion.path or "linear", tokenizer.radius)


def of(network: Any) -> Path:
    """The path that a network was made for: its attribute `path`; the straight one where it has none."""
    own = getattr(network, "path", None)
    return LINE if own is None else own


# -- sampling ----------------------------------------------------------------------------------------------

LAST_SDE_TIME = 0.04  # SiT and REPA: below this one step without noise


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from noise to data, evenly spaced before the shift."""
    return [shift_time(NOISE + (DATA - NOISE) * k / steps, shift) for k in range(steps)] + [DATA]


def sde_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times for the SDE: evenly (before the shift) from 1 to 0.04, then one step to 0 without noise
    (SiT, REPA). A shift leaves 0.04 where it is: a last step from later overshoots the data."""
    last = shift_time(LAST_SDE_TIME, 1 / shift)
    inner = [NOISE + (last - NOISE) * k / max(steps - 1, 1) for k in range(steps)]
    return [shift_time(t, shift) for t in inner] + [DATA]


def diffusion(t: float) -> float:
    """g(t) of the sampling SDE: g^2 = 2 t, SiT's `sigma` form (w_t = sigma_t = t; 2401.08740, table 2)."""
    return (2 * t) ** 0.5


def sde_drift(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Drift of dx = (v - g^2 / 2 * score) dt + g dW, run from noise to data, which keeps the path's
    marginals.

    With g^2 = 2 t the second term is the estimated noise itself, so nothing is divided by t.
    """
    return v + noise(x, v, t)
