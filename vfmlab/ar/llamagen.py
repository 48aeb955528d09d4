"""LlamaGen's transformer (arXiv 2406.06525): the next code of an image, from its class and the codes before.

    [class | code 0 .. code T-2]  ->  logits of [code 0 .. code T-1]

Codes are learned anew (no vectors of the codebook), the embedding is not tied to the output. Rotary positions
turn queries and keys with the row and the column of a code, or with its number where codes lie in no grid.
The release multiplies the class token's query and key by zeros, cosine too: every code gives it the score 0,
and it attends to itself. `class_rope` = "identity" leaves them as they are.

Codes in any order (RAR, arXiv 2411.00776) need `target_places`: to the input of each step the place is added
that is to be predicted, as a learned vector. RAR's own network is `vfmlab.ar.rar`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.config import SizedConfig
from vfmlab.errors import ConfigError
from vfmlab.nn.attention import attend
from vfmlab.nn.rope import rotary_line, rotary_table, rotate
from vfmlab.registry import TOKEN_NETWORKS

SIZES = {  # name: (width, depth, heads); 2B: VFMTok's
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "2B": (1920, 48, 32),
    "3B": (3200, 24, 32),
}
INIT = 0.02  # std of linear layers and embeddings


class CodeShape(NamedTuple):
    """Codes of a tokenizer. entries: of the codebook, K. tokens: T an image. grid: (rows, columns) or None.
    parts: codebooks of K / parts entries each, one after the other; code k is of codebook k mod parts."""

    entries: int
    tokens: int
    grid: tuple[int, int] | None
    parts: int = 1

    @classmethod
    def of(cls, tokenizer: nn.Module) -> CodeShape:
        """Those of a quantised tokenizer; :class:`ConfigError` for a continuous one."""
        if not tokenizer.quantised:
            raise ConfigError(f"tokenizer '{tokenizer.config.method}' has continuous latents, and the ar "
                              "generator draws codes; use a quantised tokenizer, or a 'diffusion' section")
        return cls(tokenizer.codebook_size, tokenizer.latent_shape[0], tokenizer.code_grid,
                   tokenizer.quantizer.parts)

    def of_place(self, k: int) -> slice:
        """The entries that code k can be: those of its codebook."""
        each = self.entries // self.parts
        first = k % self.parts * each
        return slice(first, first + each)

    def check(self) -> None:
        """:class:`ConfigError` for a grid that does not hold the tokens, and codebooks that do not divide
        entries and tokens."""
        if self.entries % self.parts or self.tokens % self.parts:
            raise ConfigError(f"codes: {self.parts} codebooks do not divide {self.entries} entries and "
                              f"{self.tokens} tokens; give a common divisor")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.tokens:
            raise ConfigError(f"codes: a grid of {self.grid[0]} x {self.grid[1]} does not hold {self.tokens} "
                              "tokens; give rows x columns = tokens, or no grid")


class Shape(SizedConfig):
    """Options of :class:`LlamaGen`."""

    SIZES = SIZES
    kind: str = "llamagen"
    size: Literal["B", "L", "XL", "XXL", "2B", "3B"] | None = Field(
        None, description="LlamaGen's width, depth and heads")
    multiple: int = Field(256, ge=1, description="the feed-forward's hidden width, 8/3 of the width, is "
                                                 "rounded up to a multiple of this")
    dropout: float = Field(0.1, ge=0, lt=1, description="of embeddings and of what each block adds")
    class_rope: Literal["zeros", "identity"] = Field(
        "zeros", description="what turns the class token's query and key: zeros, as released, or nothing")
    target_places: bool = Field(False, description="add the place that is predicted (RAR); needed for "
                                                   "training in other orders")

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward."""
        return -(-int(8 * self.sizes[0] / 3) // self.multiple) * self.multiple


class Block(nn.Module):
    """x + attention(norm(x)), then x + down(silu(gate) * up); tokens B N D, no biases, causal."""

    def __init__(self, config: Shape):
        super().__init__()
        width, _, self.heads = config.sizes
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, config.hidden, bias=False)
        self.up = nn.Linear(width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Tensor, past: Past | None = None, at: int = 0) -> Tensor:
        """rope: table of these tokens. past: keys and values of this block, where x is token number `at`."""
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (rotate(part.float(), rope).to(v.dtype) for part in (q, k))
        if past is not None:
            k, v = past.append(k, v, at)
        out = attend(q, k, v, causal=past is None).transpose(1, 2).reshape(b, n, c)
        x = x + self.dropout(self.proj(out))
        h = self.norm2(x)
        return x + self.dropout(self.down(F.silu(self.gate(h)) * self.up(h)))


@dataclass
class Past:
    """Keys (after their rotation) and values of one block: rows heads T D."""

    keys: Tensor
    values: Tensor

    def append(self, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Write those of token `at` and return all up to it."""
        rows = len(k)
        self.keys[:rows, :, at : at + 1], self.values[:rows, :, at : at + 1] = k, v
        return self.keys[:rows, :, : at + 1], self.values[:rows, :, : at + 1]


@dataclass
class Cache:
    """Keys and values of tokens drawn so far, block by block. length: inputs seen, the class included.
    live: sequences that have all of them. condition: their classes, for networks that look at them always."""

    blocks: list[Past]
    length: int = 0
    live: int = 0
    condition: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.blocks[0].keys)


@TOKEN_NETWORKS.register("llamagen")
class LlamaGen(nn.Module):
    """Logits of the codes of an image.

    Args:
        config: see :class:`Shape`. codes: entries, tokens and grid of the tokenizer. num_classes: also the
        null label ("no class").

    Raises:
        ConfigError: a grid that does not hold the tokens, codebooks that do not divide them.
    """

    Config = Shape

    def __init__(self, config: Shape, codes: CodeShape, num_classes: int):
        super().__init__()
        codes.check()
        entries, tokens, grid, _ = codes
        self.config, self.codes, self.num_classes = config, codes, num_classes
        width, depth, heads = config.sizes
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.token_embedding = nn.Embedding(entries, width)
        self.places = nn.Parameter(torch.zeros(tokens, width)) if config.target_places else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, entries, bias=False)
        head_dim = width // heads
        table = rotary_line(tokens, head_dim) if grid is None else rotary_table(grid, head_dim)
        first = torch.zeros(2, 1, head_dim)
        first[1] = float(config.class_rope == "identity")  # sine, cosine
        self.register_buffer("rope", torch.cat([first, table], dim=1), persistent=False)
        self.apply(self._initialise)
        nn.init.zeros_(self.head.weight)  # the first loss is ln K
        if self.places is not None:
            nn.init.normal_(self.places, std=INIT)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=INIT)

    def forward(self, labels: Tensor, codes: Tensor, order: Tensor | None = None) -> Tensor:
        """Logits of every code given those before it: B T K.

        Args:
            labels: long B, `num_classes` for no class. codes: long B T, in raster order. order: long B T, the
            places one after the other; the logits are then in this order. None: raster order.
        """
        places, rope = self.places, self.rope[:, : codes.shape[1]]
        if order is not None:
            codes = codes.gather(1, order)
            turned = torch.cat([torch.zeros_like(order[:, :1]), order[:, :-1] + 1], dim=1)
            rope = self.rope[:, turned][:, :, None]  # 2 B 1 T D
            places = None if places is None else places[order]
        x = torch.cat([self.class_embedding(labels)[:, None], self.token_embedding(codes[:, :-1])], dim=1)
        x = self.dropout(x if places is None else x + places)
        for block in self.blocks:
            x = block(x, rope)
        return self._out(x, rope)

    def logits(self, labels: Tensor, codes: Tensor) -> Tensor:
        """:meth:`forward` in raster order, for labels and codes from outside.

        Raises:
            ConfigError: another number of tokens, a label or a code outside its table.
        """
        tokens, entries = self.codes.tokens, self.codes.entries
        if labels.ndim != 1 or codes.shape != (len(labels), tokens):
            raise ConfigError(f"codes of shape {tuple(codes.shape)} for labels of shape "
                              f"{tuple(labels.shape)}: give one row of {tokens} codes a label")
        inside("labels", labels, self.num_classes + 1, f"{self.num_classes}: no class")
        inside("codes", codes, entries, "are they of another codebook?")
        return self(labels, codes)

    # -- one token at a time ------------------------------------------------------------------------------

    def cache(self, rows: int) -> Cache:
        """Room for the keys and values of `rows` sequences."""
        width, depth, heads = self.config.sizes
        shape = (rows, heads, self.codes.tokens, width // heads)
        device = self.head.weight.device
        half = torch.is_autocast_enabled(device.type)
        kind = torch.get_autocast_dtype(device.type) if half else self.head.weight.dtype
        room = {"device": device, "dtype": kind}
        return Cache([Past(torch.empty(shape, **room), torch.empty(shape, **room)) for _ in range(depth)])

    def first(self, labels: Tensor, cache: Cache) -> Tensor:
        """Logits of the first code (B K), for labels B, without gradients; the cache begins anew.

        Raises:
            ConfigError: labels outside the table, more than the cache has room for; it is then as it was.
        """
        inside("labels", labels, self.num_classes + 1, f"{self.num_classes}: no class")
        if len(labels) > cache.rows:
            raise ConfigError(f"{len(labels)} sequences, and the cache has room for {cache.rows}; make one "
                              f"with network.cache({len(labels)})")
        cache.length, cache.live, cache.condition = 0, len(labels), self.class_embedding(labels).detach()
        return self._step(cache.condition, cache)

    def next(self, codes: Tensor, cache: Cache) -> Tensor:
        """Logits of the code after `codes` (long B), which were drawn last: B K.

        Fewer rows than before go on with the first sequences.

        Raises:
            ConfigError: before :meth:`first`, more sequences than it began with, codes outside the codebook,
            all codes are drawn.
        """
        if not 0 < len(codes) <= cache.live:
            raise ConfigError(f"{len(codes)} codes for {cache.live} sequences that have begun; begin each "
                              "with network.first(labels, cache)")
        inside("codes", codes, self.codes.entries, "are they of another codebook?")
        return self._next(codes, cache)

    def _next(self, codes: Tensor, cache: Cache) -> Tensor:
        """:meth:`next` for codes that the network drew: to look at them waits for the device at every one."""
        return self._step(self.token_embedding(codes), cache)

    @torch.no_grad()
    def _step(self, x: Tensor, cache: Cache) -> Tensor:
        at = cache.length
        if at == self.codes.tokens:
            raise ConfigError(f"all {at} codes are drawn; begin anew with network.first")
        cache.live = len(x)
        x, beside = self._input(x, at, cache)
        for block, past in zip(self.blocks, cache.blocks, strict=True):
            x = block(x, beside, past, at)
        cache.length += 1
        return self._out(x, beside)[:, 0]

    def _input(self, x: Tensor, at: int, cache: Cache) -> tuple[Tensor, Tensor]:
        """Of input number `at` (rows D): what enters the blocks, rows 1 D, and what they see beside it."""
        return (x if self.places is None else x + self.places[at])[:, None], self.rope[:, at : at + 1]

    def _out(self, x: Tensor, beside: Tensor) -> Tensor:
        return self.head(self.norm(x))


def inside(what: str, values: Tensor, count: int, remark: str) -> None:
    """:class:`ConfigError` unless all `values` are whole numbers from 0 to count - 1, and there are some."""
    if not values.numel() or values.dtype.is_floating_point or values.dtype in (torch.bool, torch.uint8):
        raise ConfigError(f"{what} of shape {tuple(values.shape)} and type {values.dtype}: give at least "
                          "one, as long integers")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= count:
        raise ConfigError(f"{what} from {low} to {high} are outside 0 to {count - 1} ({remark})")
