"""Drawing the codes of images, one token after the other.

An image is a function of (network, label, settings, seed, id): every token is drawn with one uniform number
from the sample's own stream, as the code at which the sum of the probabilities reaches it, so the batch
changes nothing beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vfmlab.ar.llamagen import CodeShape, inside
from vfmlab.config import Guidance, TokenSampler
from vfmlab.errors import ConfigError
from vfmlab.seeding import SampleRandom

COLDEST = 1e-5  # temperatures below count as this one: the most probable code


@dataclass(frozen=True)
class Step:
    """One drawn token of every image: number (from 1) of `total`. codes: drawn so far, long B number."""

    number: int
    total: int
    codes: Tensor

    @property
    def t(self) -> float:
        """The share of tokens that is still to be drawn."""
        return 1 - self.number / self.total

    x = estimate = property(lambda self: self.codes)  # as a step of diffusion names them


def guidance_at(step: int, total: int, scale: float, sampler: TokenSampler) -> float:
    """Scale of guidance for token `step` (from 0) of `total`; 1 where it is off.

    With `guidance_power` a it grows over the sequence as RAR's (arXiv 2411.00776, released code):
    1 + (scale - 1) (1 - cos(pi (step / total)^a)) / 2. From token `guided` on it is off.
    """
    if scale <= 1 or (sampler.guided is not None and step >= sampler.guided):
        return 1.0
    if sampler.guidance_power is None:
        return scale
    return 1 + (scale - 1) * (1 - math.cos(math.pi * (step / total) ** sampler.guidance_power)) / 2


def probabilities(logits: Tensor, null: Tensor | None, scale: float, sampler: TokenSampler) -> Tensor:
    """Probabilities B K of the next code, fp32.

    In this order: guidance null + scale (logits - null) where scale > 1; temperature; top-k, which leaves
    ties with the k-th in; top-p on what top-k left, up to and with the first code that passes p; softmax.

    Args:
        logits, null: B K under the condition and without one; null may be None where scale is at most 1.
    """
    z = logits.float()
    if scale > 1:
        z = null.float() + scale * (z - null.float())
    z = z / max(sampler.temperature, COLDEST)
    if 0 < sampler.top_k < z.shape[1]:
        least = z.topk(sampler.top_k).values[:, -1:]
        z = z.masked_fill(z < least, -torch.inf)
    if sampler.top_p < 1:
        ranked, which = z.sort(descending=True)
        p = ranked.softmax(1)
        beyond = p.cumsum(1) - p > sampler.top_p  # what comes before has passed p already
        z = z.masked_fill(torch.zeros_like(beyond).scatter(1, which, beyond), -torch.inf)
    return z.softmax(1)


def choose(p: Tensor, u: Tensor) -> Tensor:
    """Long B: the code at which the sum of p (B K) passes u (B, uniform in [0, 1)) times its total."""
    total = p.to(torch.float32 if p.device.type == "mps" else torch.float64).cumsum(1)
    codes = torch.searchsorted(total, (u.to(total) * total[:, -1])[:, None], right=True)[:, 0]
    return codes.clamp(max=p.shape[1] - 1)


@torch.no_grad()
def trajectory(network: torch.nn.Module, labels: Tensor, random: SampleRandom,
               sampler: TokenSampler | None = None, guidance: Guidance | None = None) -> Iterator[Step]:
    """Draw the codes of `labels`, token by token; where there are several codebooks, code k among the entries
    of its own (`CodeShape.of_place`), to which top-k and top-p then refer.

    Args:
        network: a token network (`vfmlab.ar.llamagen`), in eval mode, on the device of `labels`.
        labels: long B; the null label draws without condition.
        random: streams, one a label; the same (seed, id) always gives the same image.
        sampler: temperature, top-k, top-p, course of the guidance. guidance: its `scale`; 1 or less: none,
            and then the network runs on one sequence an image in place of two.

    Yields:
        one :class:`Step` a token.

    Raises:
        ConfigError: no labels, labels outside 0 to the null label, another number of streams.
    """
    sampler, guidance = sampler or TokenSampler(), guidance or Guidance()
    total, null, scale = network.codes.tokens, network.num_classes, guidance.scale
    if not len(labels):
        raise ConfigError("no labels to sample for; give at least one")
    inside("labels", labels, null + 1, f"{null}: no class")
    if len(random) != len(labels):
        raise ConfigError(f"{len(random)} random streams for {len(labels)} labels; give SampleRandom one id "
                          "per label")
    u = random.rand(total).to(labels.device)
    scales = [guidance_at(k, total, scale, sampler) for k in range(total)]
    doubled = max((k + 1 for k in range(total) if scales[k] > 1), default=0)  # tokens that need both
    n, drawn = len(labels), labels.new_empty(len(labels), 0)
    rows = 2 * n if doubled else n
    cache = network.cache(rows)
    both = torch.cat([labels, torch.full_like(labels, null)])[:rows]
    for k, now in enumerate(scales):
        if k == 0:
            logits = network.first(both, cache)
        else:
            last = drawn[:, -1]
            logits = network._next(torch.cat([last, last]) if k < doubled else last, cache)
        book = network.codes.of_place(k)  # of other codebooks no code can stand here
        own = logits[:, book]
        p = probabilities(own[:n], own[n:] if k < doubled else None, now, sampler)
        drawn = torch.cat([drawn, book.start + choose(p, u[:, k])[:, None]], dim=1)
        yield Step(k + 1, total, drawn)


def sample(network: torch.nn.Module, labels: Tensor, random: SampleRandom,
           sampler: TokenSampler | None = None, guidance: Guidance | None = None) -> Tensor:
    """Codes of `labels`, long B T; arguments as in :func:`trajectory`."""
    *_, last = trajectory(network, labels, random, sampler, guidance)
    return last.codes


@torch.no_grad()
def partial_images(tokenizer: torch.nn.Module, codes: Tensor) -> Tensor:
    """Images B 3 H W of the first codes (B n, n <= T) of a quantised tokenizer.

    The others are the entry nearest to their codebook's mean; where codes lie in a grid, their places are
    grey.
    """
    shape, n = CodeShape.of(tokenizer), codes.shape[1]
    total, parts = shape.tokens, shape.parts
    if n == total:
        return tokenizer.decode_codes(codes)
    books = tokenizer.codebook().unflatten(0, (parts, -1))  # parts K / parts d
    middle = (books - books.mean(1, keepdim=True)).square().sum(2).argmin(1)
    middle = (middle + torch.arange(parts, device=middle.device) * books.shape[1]).repeat(total // parts)
    images = tokenizer.decode_codes(torch.cat([codes, middle[n:].expand(len(codes), -1)], dim=1))
    if tokenizer.code_grid is None:
        return images
    drawn = (torch.arange(total, device=images.device) < n).view(1, 1, *tokenizer.code_grid)
    shown = torch.nn.functional.interpolate(drawn.float(), images.shape[-2:], mode="nearest")
    return images * shown
