"""The spherical path: every token moves on a great circle from data (t = 0) to noise (t = 1).

Riemannian flow matching on spheres, as in HAE (arXiv 2601.22904v2; DINO-SAE) and RJF (2602.10099). With d
data and n noise, both of length R, and the angle W between them:

    x_t = [sin((1 - t) W) d + sin(t W) n] / sin W,   v = W / sin W [cos(t W) n - cos((1 - t) W) d]

v is tangent at x_t and has the length W R at every t. A step follows the exponential map. Ratios of sines are
taken as ratios of sin(a)/a, so that equal tokens need no special case. Many great circles join opposite
tokens: their angle is taken 1.4e-3 short of pi, as RJF does, so that all stays finite; points between them
are shorter than R. All in fp32 at least: bf16 is unstable here.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vfmlab import config
from vfmlab.diffusion.path import PathSample, over, times
from vfmlab.errors import ConfigError
from vfmlab.nn.sphere import lengths, mean_length, onto
from vfmlab.registry import PATHS

LARGEST = math.pi - math.acos(1 - 1e-6)  # the angle of RJF's clamp


def sinc(angle: Tensor) -> Tensor:
    """sin(a) / a, 1 at 0."""
    return torch.sinc(angle / math.pi)


@PATHS.register("sphere")
class Sphere:
    """Geodesics between tokens of length `radius`: data and noise are scaled to it.

    Args:
        config: see `Config`. radius: R, the length of the tokenizer's normalised tokens.

    Raises:
        ConfigError: no radius, or none from 1e-9 to 1e9. Its methods: :class:`DataError` for tokens of no
        length.
    """

    class Config(config.PathConfig):
        kind: Literal["sphere"] = "sphere"
        radial: float = Field(0.1, ge=0, description="weight of the radial part of the raw prediction (HAE: "
                                                     "0.1, RJF: 0)")
        weighting: Literal["none", "jacobi"] = Field("none", description="jacobi (RJF): (sin a / a)^2 with a "
            "= (1 - t) angle, largest near noise")

    solvers = ("euler", "heun")

    def __init__(self, config: Sphere.Config, radius: float | None = None):
        if radius is None or not 1e-9 <= radius <= 1e9:  # its square, and a token's, must fit fp32
            raise ConfigError(f"path 'sphere': radius {radius} is no length from 1e-9 to 1e9; give radius=R, "
                              f"for example {mean_length(768):.2f}, the mean length of a normal vector of "
                              "768 channels (of a run: tokenizer.radius)")
        self.config, self.radius = config, float(radius)

    # -- training ---------------------------------------------------------------------------------------

    def angle(self, a: Tensor, b: Tensor) -> Tensor:
        """Angle between tokens of a and b (B C h w, both of length R): B 1 h w in [0, pi - 1.4e-3]."""
        return (2 * torch.atan2(lengths(a - b), lengths(a + b))).clamp(max=LARGEST)

    def interpolate(self, z: Tensor, noise: Tensor, t: Tensor | float) -> PathSample:
        """The point at time t between clean latents z and noise (B C h w), its velocity and the angles."""
        z, noise = onto(z, self.radius), onto(noise.to(z.device), self.radius)
        t = times(z, noise, t, z.dtype)
        s, angle = over(t, z), self.angle(z, noise)
        whole = sinc(angle)
        x = ((1 - s) * sinc((1 - s) * angle) * z + s * sinc(s * angle) * noise) / whole
        v = (torch.cos(s * angle) * noise - torch.cos((1 - s) * angle) * z) / whole
        return PathSample(x, v, t, angle)

    def loss(self, prediction: Tensor, point: PathSample, cosine: float = 0.0) -> Tensor:
        """Per sample [B]: mean of w (tangent part of the prediction - v)^2, plus `radial` times the mean of
        its radial part squared.

        cosine: weight of 1 - cos over channels of tangent part and v, as on the line.
        """
        v, dtype = prediction.to(point.v.dtype), point.v.dtype
        tangent = self.tangent(point.x, v)
        wrong = (tangent - point.v).square()
        if self.config.weighting == "jacobi":
            wrong = wrong * self.weight(point)
        loss = wrong.flatten(1).mean(1)
        if self.config.radial:
            loss = loss + self.config.radial * (v - tangent).square().flatten(1).mean(1)
        if cosine:
            loss = loss + cosine * (1 - F.cosine_similarity(tangent, point.v, dim=1)).flatten(1).mean(1)
        return loss.to(torch.promote_types(dtype, torch.float32))

    @staticmethod
    def weight(point: PathSample) -> Tensor:
        """RJF's weight of each token's error (weighting "jacobi"): sinc((1 - t) angle)^2, B 1 h w."""
        return sinc((1 - over(point.t, point.x)) * point.angle).square()

    # -- geometry ---------------------------------------------------------------------------------------

    def tangent(self, x: Tensor, v: Tensor) -> Tensor:
        """The part of v that is tangent at x: v - <v, x> x / R^2, token by token."""
        return v - (v * x).sum(1, keepdim=True) * x / self.radius**2

    def step(self, x: Tensor, v: Tensor, dt: Tensor | float) -> Tensor:
        """Exponential map at x along dt times the tangent part of v; dt < 0 towards data. Length R again."""
        x = onto(x, self.radius)
        v = self.tangent(x, v.to(x)) * over(dt, x)
        turn = lengths(v) / self.radius
        return onto(x * torch.cos(turn) + v * sinc(turn), self.radius)

    def transport(self, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Tangent v at `start` moved to `end` along the great circle between them (Heun's second slope)."""
        v = self.tangent(start, v)
        share = (end * v).sum(1, keepdim=True) / (self.radius**2 + (start * end).sum(1, keepdim=True))
        return v - share * (start + end)

    def prior(self, noise: Tensor) -> Tensor:
        """Where sampling starts: normal noise (B C h w) brought to length R: uniform on the sphere."""
        return onto(noise, self.radius)

    # -- what a velocity says about the two ends --------------------------------------------------------

    def clean(self, x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
        """Estimate of the clean latent: the end of the great circle, -t along v."""
        return self.step(x, v, -t)

    def noise(self, x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
        """Estimate of the noise: 1 - t along v."""
        return self.step(x, v, 1 - t)

    def velocity_from_clean(self, x: Tensor, z: Tensor, t: Tensor | float) -> Tensor:
        """The field that leads to z: -Log_x(z) / t. Not defined at t = 0."""
        x, z = onto(x, self.radius), onto(z, self.radius)
        return -self.tangent(x, z) / sinc(self.angle(x, z)) / over(t, x)
