"""The text tower in miniature that is bundled: what the pocket VFM is among vision models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.data.captions import WORDS
from vfmlab.weights import io


class TextNet(nn.Module):
    """A text tower, and beside it a linear reading of a VFM's map: the two sides of a contrast, as in CLIP
    (arXiv 2103.00020) with the image side frozen, as in LiT (2111.07991).

    Args:
        width, depth, heads: of the transformer. length: the most words. seen: channels of the VFM's map, read
            on GRID x GRID places. words: known ones, in the order of their vectors.
    """

    GRID = 4

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, length: int = 16, seen: int = 128,
                 words: Sequence[str] = WORDS):
        super().__init__()
        self.spec = {"width": width, "depth": depth, "heads": heads, "length": length, "seen": seen,
                     "words": list(words)}
        self.numbers = {word: i for i, word in enumerate(("", *words))}
        self.words = nn.Embedding(len(self.numbers), width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.image = nn.Linear(seen * self.GRID**2, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, rows: Tensor) -> Tensor:
        """Numbers of words (long B L) -> tokens B L D."""
        return self.blocks(self.words(rows) + self.places[: rows.shape[1]])

    def likeness(self, rows: Tensor, maps: Tensor) -> Tensor:
        """Logits B N of B texts and the VFM's maps of N images (N D h w): cosines of the texts' mean tokens
        and the images' readings, over a trained temperature."""
        text = F.normalize(self(rows).mean(1), dim=-1)
        images = F.normalize(self.image(F.adaptive_avg_pool2d(maps, self.GRID).flatten(1)), dim=-1)
        return self.scale.exp() * text @ images.T


def read(weights: str | Path) -> tuple[TextNet, str]:
    """A trained tower and its fingerprint, from a safetensors file or the run that trained it."""
    return io.network(weights, "text", TextNet, "diffusion.text.encoder")
