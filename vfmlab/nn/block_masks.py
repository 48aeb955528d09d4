"""Attention masks of block-wise generation: E2D2's encoder and decoder (arXiv 2510.22852), and one stack.

Tokens stand in blocks of `block`, the last one shorter where they do not divide. Row: query, column: key,
True: may attend, as :func:`vfmlab.nn.attention.attend` takes them. *Clean* tokens are finished; *noisy* ones
are being made, block by block, each block under the clean blocks before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.errors import ConfigError


def blocks(length: int, block: int) -> Tensor:
    """Number of the block of each token: long [length]."""
    if length < 1 or block < 1:
        raise ConfigError(f"{length} tokens in blocks of {block}: both must be at least 1")
    return torch.arange(length) // block


def encoder_mask(length: int, block: int) -> Tensor:
    """Clean tokens on clean ones: their own block and those before it. L L."""
    of = blocks(length, block)
    return of[:, None] >= of


def decoder_mask(length: int, block: int) -> Tensor:
    """Noisy tokens on (clean | noisy): clean blocks before their own, and their own noisy block. L 2L."""
    of = blocks(length, block)
    return torch.cat([of[:, None] > of, of[:, None] == of], dim=1)


def joint_mask(length: int, block: int) -> Tensor:
    """(clean | noisy) in one stack, as block diffusion without a split has it: the encoder's mask, beside
    which clean tokens see no noisy one, above the decoder's. 2L 2L."""
    clean = encoder_mask(length, block)
    return torch.cat([torch.cat([clean, torch.zeros_like(clean)], dim=1), decoder_mask(length, block)])
