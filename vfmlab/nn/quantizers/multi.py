"""Multi-codebook vector quantisation: each token is cut into chunks, each chunk has a codebook of its own.

UniTok (arXiv 2502.20321, section 3.2), used by VFM-VAE's discrete mode (arXiv 2510.18457). n codebooks of V /
n entries describe (V / n)^n tokens and keep each look-up small. Chunks follow the cosine rule.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vfmlab.errors import ConfigError, DataError
from vfmlab.nn.quantizers.base import EntriesConfig, Quantised, Quantizer
from vfmlab.nn.quantizers.cosine import CosineQuantizer
from vfmlab.registry import QUANTIZERS


@QUANTIZERS.register("multi")
class MultiCodebookQuantizer(Quantizer):
    """Each token has n codes, one after the other; those of codebook k are k V / n ... (k + 1) V / n - 1.

    Losses, entropy and usage are averaged over the codebooks.

    Raises:
        ConfigError: channels or entries do not divide by the codebooks.
    """

    class Config(EntriesConfig):
        kind: Literal["multi"] = "multi"
        size: int = Field(32_768, ge=2, description="entries of all codebooks together")
        codebooks: int = Field(8, ge=1)
        floor: float = Field(1e-7, gt=0, description="added inside the logarithm of the mean assignment")

        @property
        def parts(self) -> int:
            return self.codebooks

    def __init__(self, config: MultiCodebookQuantizer.Config, channels: int):
        super().__init__(config, channels, config.size)
        if channels % self.parts or config.size % self.parts:
            raise ConfigError(f"codebooks {self.parts} must divide tokenizer.channels {channels} and the "
                              f"vocabulary of {config.size} entries; choose a common divisor")
        each = CosineQuantizer.Config(size=config.size // self.parts, beta=config.beta,
                                      temperature=config.temperature, floor=config.floor)
        self.codebooks = nn.ModuleList(CosineQuantizer(each, channels // self.parts)
                                       for _ in range(self.parts))
        first = torch.arange(self.parts) * each.size
        self.register_buffer("first", first, persistent=False)  # code of each codebook's entry 0

    def table(self) -> Tensor:
        """V x C / n: the entries of the codebooks, one after the other."""
        return torch.cat([book.table() for book in self.codebooks])

    def quantise(self, x: Tensor) -> Quantised:
        chunks = x.chunk(self.parts, dim=-1)
        results = [book.quantise(part) for book, part in zip(self.codebooks, chunks, strict=True)]
        indices = torch.stack([result.indices for result in results], dim=-1) + self.first  # B N n
        return Quantised(
            torch.cat([result.latent for result in results], dim=-1), indices.flatten(1),
            torch.stack([result.loss for result in results]).mean(),
            torch.stack([result.usage for result in results]).mean(),
            lambda: torch.stack([result.entropy for result in results]).mean(),
        )  # fmt: skip

    def rows(self, indices: Tensor) -> Tensor:
        return self.table()[indices.unflatten(1, (-1, self.parts))].flatten(2)

    def near(self, tokens: Tensor) -> Tensor:
        parts = zip(self.codebooks, tokens.chunk(self.parts, dim=-1), strict=True)
        return torch.cat([book.near(part) for book, part in parts], dim=-1)

    def check(self, indices: Tensor) -> Tensor:
        indices = super().check(indices)
        book = indices // (self.size // self.parts)
        if indices.shape[1] % self.parts or (book.unflatten(1, (-1, self.parts)) != torch.arange(
                self.parts, device=indices.device)).any():
            raise DataError(f"each token has {self.parts} codes, of codebooks 0 to {self.parts - 1} in this "
                            "order; these belong to another tokenizer")
        return indices
