"""What every quantiser is: tokens -> codes and a latent -> the same latent from the codes.

One file per quantiser, registered by name, with its options as a nested `Config`. All look-ups are fp32 with
autocast off: in 16 bits distances of near entries are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.config import QuantizerConfig
from vfmlab.errors import DataError

CHUNK = 4096  # tokens whose distances to all entries are in memory at a time


def exact(where: Tensor) -> torch.autocast:
    """Autocast off, on the device of `where`."""
    return torch.autocast(where.device.type, enabled=False)


class EntriesConfig(QuantizerConfig):
    """Options of quantisers that take the nearest of so many entries."""

    size: int = Field(16_384, ge=2, description="entries")
    beta: float = Field(0.25, ge=0, description="weight of the commitment term")
    temperature: float = Field(0.01, gt=0, description="squared distances are divided by it in the entropy")
    floor: float = Field(1e-5, gt=0, description="added inside the logarithm of the mean assignment")


@dataclass(frozen=True)
class Quantised:
    """Result of one call.

    Args:
        latent: B N C, values exactly those of :meth:`Quantizer.look_up`, with the gradient of the input.
        indices: B T long, T = N times the codes of a token; token by token. loss: the quantiser's own terms,
        weighted as its options say, a scalar. usage: percentage of entries in use in the last batches (in
        eval mode: in this one).
        assignment: gives `entropy`, when it is asked for: it is a softmax over all entries.
    """

    latent: Tensor
    indices: Tensor
    loss: Tensor
    usage: Tensor
    assignment: Callable[[], Tensor] | None = None

    @cached_property
    def entropy(self) -> Tensor:
        """Mean entropy of a token's soft assignment minus (a multiple of) the entropy of their mean, in nats:
        lower means decided tokens and even use. Zero where the quantiser has no such term.

        Their mean is over the tokens of this call: of a batch that is cut into processes or accumulation
        steps each part has its own."""
        if self.assignment is None:
            return torch.zeros_like(self.loss)
        with exact(self.latent):
            return self.assignment()


class Quantizer(nn.Module):
    """Base of all quantisers: `forward(tokens B N C) -> Quantised`, `look_up(indices B T) -> B N C`.

    A quantiser subclasses this in one file, registers itself, and implements `quantise`, `table` and, where
    a token is not one row of it, `rows` and `near`: the rules, which run with autocast off. Its constructor
    takes `(config, channels)`.

    Attributes:
        channels: C. size: number of entries, over all codebooks. parts: codes of one token.
    """

    Config: type[QuantizerConfig] = QuantizerConfig
    registered_name: ClassVar[str] = "quantiser"

    def __init__(self, config: QuantizerConfig, channels: int, size: int):
        super().__init__()
        self.config, self.channels, self.size, self.parts = config, channels, size, config.parts

    def track(self) -> None:
        """Have the buffers of the running use. Called in constructors of quantisers that count."""
        # Moving average of how often each entry is chosen; zero until the first training batch.
        self.register_buffer("usage", torch.zeros(self.size))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: Tensor) -> Quantised:  # B N C
        with exact(tokens):
            return self.quantise(tokens.float())

    def entries(self) -> Tensor:
        """All entries as decoding uses them, size x width, fp32, with gradients."""
        with exact(next(chain(self.parameters(), self.buffers()))):
            return self.table()

    @torch.no_grad()
    def look_up(self, indices: Tensor) -> Tensor:
        """Indices B T -> latent tokens B N C, fp32, the very values that `forward` gave with them."""
        with exact(indices):
            return self.rows(indices)

    @torch.no_grad()
    def snap(self, tokens: Tensor) -> Tensor:
        """The nearest entry of each latent token: B N C -> B N C. For latents, not for what is quantised."""
        with exact(tokens):
            return self.near(tokens.float())

    # -- what a quantiser implements, in fp32 and outside of autocast ---------------------------------------

    def quantise(self, x: Tensor) -> Quantised:
        """Tokens (B N C) -> the result of :meth:`forward`."""
        raise NotImplementedError

    def table(self) -> Tensor:
        """The result of :meth:`entries`."""
        raise NotImplementedError

    def rows(self, indices: Tensor) -> Tensor:
        """The result of :meth:`look_up`. Here: codes are rows of the table."""
        return self.table()[indices]

    def near(self, tokens: Tensor) -> Tensor:
        """The result of :meth:`snap`. Here: by Euclidean distance."""
        return self.rows(nearest(tokens, self.table()))

    # -- what they share ------------------------------------------------------------------------------------

    def assign(self, x: Tensor, codebook: float, commitment: float, unit: bool = False,
               turn: Callable[[Tensor, Tensor], Tensor] | None = None) -> Quantised:
        """The nearest entries e to tokens x (B N C), and codebook |sg(x) - e|^2 + commitment |x - sg(e)|^2,
        means over all elements.

        unit: tokens and entries have length 1. turn: what is handed the gradient, of tokens and entries.
        """
        entries = self.table()
        indices = nearest(x, entries)
        chosen = entries[indices]

        def entropy() -> Tensor:
            # -|x - e|^2 but for |x|^2, which the softmax drops; of unit vectors it drops |e|^2 too
            near = 2 * (x @ entries.t())
            near = near if unit else near - entries.square().sum(-1)
            return soft_entropy(near / self.config.temperature, self.config.floor)

        loss = codebook * F.mse_loss(chosen, x.detach()) + commitment * F.mse_loss(x, chosen.detach())
        latent = straight_through(x if turn is None else turn(x, chosen), chosen)
        return Quantised(latent, indices, loss, self.count(indices), entropy)

    def check(self, indices: Tensor) -> Tensor:
        """Indices, long; :class:`DataError` for what are no codes of this quantiser."""
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise DataError(f"codes are integers, these are {indices.dtype}; give what tokenizer.codes() "
                            "returns")
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.size:
            raise DataError(f"codes from {int(indices.min())} to {int(indices.max())}: the codebook has "
                            f"entries 0 to {self.size - 1}; these belong to another tokenizer")
        return indices.long()  # as 8 bits without a sign they would be a mask

    def effective(self) -> float:
        """Entries in use over all of them, 0 to 1: the exponential of the entropy of how often each is
        chosen, in training."""
        share = self.usage[self.usage > 0].double()
        return float((-(share * share.log()).sum()).exp()) / len(self.usage) if len(share) else 0.0

    @torch.no_grad()
    def count(self, indices: Tensor) -> Tensor:
        """Add a batch to the usage in training; returns the percentage of entries used (eval: by it)."""
        chosen = indices.flatten()
        # not bincount, whose shape depends on values: a plan has none
        ones = torch.ones_like(chosen, dtype=torch.float32)
        share = torch.zeros(self.size, device=chosen.device).index_add_(0, chosen, ones)
        if self.training:
            share = over_ranks(share)  # in eval a rank may be alone
        share = share / share.sum()
        if self.training:
            # Quick at first, slow later: 0 keeps nothing of the zeros it began with. In tensors, because a
            # compiled step that reads a count is compiled anew for every count.
            keep = torch.where(self.batches < 100, 0.9, 0.99) * (self.batches > 0)
            self.usage.mul_(keep).add_(share * (1 - keep))
            self.batches.add_(1)
            share = self.usage
        return (share > 0.01 / len(share)).float().mean() * 100


def counting(module: nn.Module) -> list[Quantizer]:
    """The quantisers inside `module` that count their use: one for each codebook."""
    return [part for part in module.modules() if isinstance(part, Quantizer) and hasattr(part, "usage")]


def over_ranks(total: Tensor) -> Tensor:
    """Sum over all processes, where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


def nearest(x: Tensor, entries: Tensor) -> Tensor:
    """Index of the entry (K d) at the least Euclidean distance from each token (B N d) -> B N long."""
    with torch.no_grad():
        # |x|^2 is the same for all entries: left out, it takes no digits from the difference.
        half = 0.5 * entries.square().sum(-1)
        chunks = [(part @ entries.t() - half).argmax(-1) for part in x.flatten(0, -2).split(CHUNK)]
        return torch.cat(chunks).view(x.shape[:-1])


def straight_through(x: Tensor, chosen: Tensor) -> Tensor:
    """Values of `chosen`, to the last bit; the gradient is handed to `x`."""
    return chosen.detach() + (x - x.detach())


def soft_entropy(logits: Tensor, floor: float) -> Tensor:
    """E_token H(p) - H(E p) in nats, p = softmax over entries; logits: B N K. floor: in the mean's log."""
    logits = logits.flatten(0, -2)
    # not share.log(), which is inf; nor log_share.exp(), on a CPU five times slower where shares are tiny
    log_share, share = logits.log_softmax(dim=-1), logits.softmax(dim=-1)
    mean = share.mean(dim=0)
    return -(share * log_share).sum(dim=-1).mean() + (mean * (mean + floor).log()).sum()
