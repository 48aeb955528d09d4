"""A diffusion network together with the tokenizer that was tuned with it (REPA-E): one module, so one checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vfmlab.tokenizers.base import Tokenizer


class Tuned(nn.Module):
    """network, tokenizer: saved as `network.*` and `tokenizer.*`; the tokenizer's statistics among them."""

    def __init__(self, network: nn.Module, tokenizer: Tokenizer):
        super().__init__()
        self.network, self.tokenizer = network, tokenizer


@torch.no_grad()
def follow(tokenizer: Tokenizer, mean: Tensor, variance: Tensor, momentum: float) -> None:
    """Move the tokenizer's latent statistics towards those of a batch, in place: running averages as in batch norm.

    mean, variance: [C] of raw latents over the global batch.
    """
    tokenizer.stat_mean.lerp_(mean.to(tokenizer.stat_mean), momentum)
    spread = torch.lerp(tokenizer.stat_std.square(), variance.to(tokenizer.stat_std), momentum)
    tokenizer.stat_std.copy_(spread.sqrt())
