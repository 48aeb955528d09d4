"""Multi-codebook vector quantisation: each token is cut into chunks, each chunk has a codebook of its own.

UniTok (arXiv 2502.20321, section 3.2), used by VFM-VAE's discrete mode (arXiv 2510.18457). n codebooks of V /
n entries describe (V / n)^n tokens and keep each look-up small. Chunks and entries are L2-normalised, so the
nearest entry is the one of largest cosine.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.errors import ConfigError


class Quantised(NamedTuple):
    """Result of one call.

    latent: B N C, straight-through (values of the codebook, gradient of the normalised input).
    loss: codebook + beta * commitment. entropy: mean entropy of a token's soft assignment minus the entropy
    of their mean, in nats (lower: decided tokens, even use). Both scalars are averaged over the codebooks.
    indices: B n N. usage: percentage of entries used, averaged over codebooks and over the last batches.
    """

    latent: Tensor
    loss: Tensor
    entropy: Tensor
    indices: Tensor
    usage: Tensor


class Codebook(nn.Module):
    """One codebook. entries: how many. width: of an entry."""

    def __init__(self, entries: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(entries, width) / width**0.5)
        # Moving average of how often each entry is chosen; zero until the first training batch.
        self.register_buffer("usage", torch.zeros(entries))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def entries(self) -> Tensor:
        return F.normalize(self.weight.float(), dim=-1)

    def effective(self) -> float:
        """Entries in use over all of them, 0 to 1: the exponential of the entropy of how often each is
        chosen, in training."""
        share = self.usage[self.usage > 0].double()
        return float((-(share * share.log()).sum()).exp()) / len(self.usage) if len(share) else 0.0

    @torch.no_grad()
    def count(self, indices: Tensor) -> Tensor:
        """Add a batch to the usage in training; returns the percentage of entries in use (this batch's in
        eval)."""
        share = indices.flatten().bincount(minlength=len(self.weight)).float()
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(share)  # in eval a rank may be alone
        share = share / share.sum()
        if self.training:
            # Quick at first, slow later: 0 keeps nothing of the zeros it began with.
            seen = int(self.batches)
            keep = 0.0 if seen == 0 else 0.9 if seen < 100 else 0.99
            self.usage.mul_(keep).add_(share, alpha=1 - keep)
            self.batches.add_(1)
            share = self.usage
        return (share > 0.01 / len(share)).float().mean() * 100


class MultiCodebookQuantizer(nn.Module):
    """Tokens B N C -> :class:`Quantised`, in fp32.

    Args:
        channels: C, divisible by `codebooks`. entries: vocabulary of all codebooks together. codebooks: n.
        beta: weight of the commitment term. temperature: of the soft assignment in the entropy (squared
        distances are
            divided by it).

    Raises:
        ConfigError: channels or entries do not divide by the codebooks.
    """

    def __init__(self, channels: int, entries: int, codebooks: int, beta: float = 0.25,
                 temperature: float = 0.01):
        super().__init__()
        if channels % codebooks or entries % codebooks:
            raise ConfigError(
                f"tokenizer.codebooks {codebooks} must divide tokenizer.channels {channels} and "
                "tokenizer.vocabulary "
                f"{entries}; choose a common divisor"
            )
        self.beta, self.temperature = beta, temperature
        self.codebooks = nn.ModuleList(Codebook(entries // codebooks, channels // codebooks)
                                       for _ in range(codebooks))

    def forward(self, tokens: Tensor) -> Quantised:  # B N C
        with torch.autocast(tokens.device.type, enabled=False):
            parts = tokens.float().chunk(len(self.codebooks), dim=-1)
            results = [self._one(book, part) for book, part in zip(self.codebooks, parts, strict=True)]
        latent, loss, entropy, indices, usage = zip(*results, strict=True)
        mean = [torch.stack(values).mean() for values in (loss, entropy, usage)]
        return Quantised(torch.cat(latent, dim=-1), mean[0], mean[1], torch.stack(indices, dim=1), mean[2])

    def _one(self, book: Codebook, x: Tensor) -> Quantised:
        x, entries = F.normalize(x, dim=-1), book.entries()
        cosine = x @ entries.t()
        indices = cosine.argmax(dim=-1)
        chosen = entries[indices]
        loss = F.mse_loss(chosen, x.detach()) + self.beta * F.mse_loss(x, chosen.detach())
        # |x - e|^2 = 2 - 2 cos for unit vectors; the constant drops out of the softmax.
        log_share = (2 * cosine / self.temperature).flatten(0, 1).log_softmax(dim=-1)
        share = log_share.exp()
        mean = share.mean(dim=0)
        entropy = -(share * log_share).sum(dim=-1).mean() + (mean * (mean + 1e-7).log()).sum()
        return Quantised(x + (chosen - x).detach(), loss, entropy, indices, book.count(indices))

    @torch.no_grad()
    def look_up(self, indices: Tensor) -> Tensor:
        """Indices B n N -> latent tokens B N C."""
        parts = [book.entries()[index] for book, index in zip(self.codebooks, indices.unbind(1), strict=True)]
        return torch.cat(parts, dim=-1)
