"""Latents and, for networks that have one, a class token beside them, as the one state that solvers
integrate.

Without a token the state is the latents themselves, B C h w. With one it is flat, B (C h w + K): the latents'
values, then the token's. Solvers work element by element and need not know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vfmlab.config import Guidance
from vfmlab.errors import ConfigError
from vfmlab.seeding import SampleRandom


def token_width(network: object) -> int | None:
    """Width of the class token that `network` denoises beside the latents; None for networks without one."""
    return getattr(getattr(network, "config", None), "token", None)


class State:
    """How the state of one network lies in memory.

    Args:
        latent_shape: (C, h, w). token: width K of the class token, or None.
    """

    def __init__(self, latent_shape: tuple[int, int, int], token: int | None = None):
        self.shape, self.token_width = tuple(latent_shape), token
        self.values = self.shape[0] * self.shape[1] * self.shape[2]

    def pack(self, z: Tensor, token: Tensor | None) -> Tensor:
        """z: B C h w, token: B K -> state."""
        return z if self.token_width is None else torch.cat([z.flatten(1), token], dim=1)

    def latents(self, x: Tensor) -> Tensor:
        """B C h w of a state."""
        return x if self.token_width is None else x[:, : self.values].unflatten(1, self.shape)

    def token(self, x: Tensor) -> Tensor | None:
        """B K of a state, or None."""
        return None if self.token_width is None else x[:, self.values :]

    def noise(self, random: SampleRandom | None, latents: Tensor | None = None) -> Tensor:
        """A state of noise: each sample's stream gives the latents, in whose place others may be given, then
        the token.

        Raises:
            ConfigError: a token has to be drawn and there is no stream.
        """
        if self.token_width is None:
            return random.randn(*self.shape) if latents is None else latents
        if random is None:
            raise ConfigError("this network denoises a class token too, whose noise is drawn; give a "
                              "SampleRandom, not only the latents' noise")
        z = random.randn(*self.shape)  # drawn in any case, so that the token is the sample's
        z = z if latents is None else latents
        return self.pack(z, random.randn(self.token_width).to(z))

    def velocity(self, network: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """`network` as a function of states: (x, t B, y B) -> dx/dt."""
        if self.token_width is None:
            return network

        def joint(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            out = network(self.latents(x), t, y, token=self.token(x))
            return self.pack(out.v, out.v_class)

        return joint

    def scales(self, guidance: Guidance) -> Tensor | None:
        """The guidance scale of each value of a flat state; None where one scale holds for all of the
        latents.

        Raises:
            ConfigError: a scale for the token of a network that has none.
        """
        if self.token_width is None:
            if guidance.token is not None:
                raise ConfigError(f"guidance.token {guidance.token:g}: this network has no class token to "
                                  "guide; leave it null")
            return None
        channel = torch.arange(self.shape[0]).repeat_interleave(self.shape[1] * self.shape[2])
        guided = channel < (self.shape[0] if guidance.channels is None else guidance.channels)
        latents = torch.where(guided, guidance.scale, 1.0)
        token = guidance.scale if guidance.token is None else guidance.token
        return torch.cat([latents, torch.full((self.token_width,), float(token))])
