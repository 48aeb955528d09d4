"""Generators by diffusion: paths, networks, guidance, sampling, alignment, the cache of latents."""

from vfmlab.diffusion import path as path
