"""Region tokens of VFMTok (arXiv 2507.08441): queries gather a frozen VFM's maps of several depths, a causal
transformer makes grids of pixels and of features from them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.deformable_attention import DeformableAttention
from vfmlab.nn.vit_block import ViTBlock

Attends = Literal["deformable", "cross"]
Branch = Literal["pixels", "features"]


def causal(length: int, device: torch.device) -> Tensor:
    """N N, True where a token (row) sees another one: itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


class Projector(nn.Module):
    """Two-layer perceptron with layer norms, and one more layer norm: B D h w -> B C h w."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(inputs, width, bias=False), nn.LayerNorm(width), nn.ReLU(),
            nn.Linear(width, width, bias=False), nn.LayerNorm(width),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mlp(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class RegionLayer(nn.Module):
    """Post-norm: attention on the maps, causal self-attention, feed-forward with ReLU. B T C -> B T C.

    attends: "deformable", or "cross": plain attention on all places of all maps, an ablation.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, hidden: int, attends: Attends):
        super().__init__()
        if attends == "deformable":
            self.look = DeformableAttention(width, heads, levels, points)
        else:
            self.look = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm_look, self.norm_tokens, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.tokens = nn.MultiheadAttention(width, heads, batch_first=True)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def attention(self, x: Tensor, position: Tensor, reference: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """What the tokens (B T C) gather from the maps (B C h w each)."""
        if isinstance(self.look, DeformableAttention):
            return self.look(x + position, reference, maps)
        values = torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)
        return self.look(x + position, values, values, need_weights=False)[0]

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, maps: Sequence[Tensor]) -> Tensor:
        x = self.norm_look(x + self.attention(x, position, reference, maps))
        q = x + position  # also of the values
        hidden = ~causal(q.shape[1], q.device)
        x = self.norm_tokens(x + self.tokens(q, q, q, attn_mask=hidden, need_weights=False)[0])
        return self.norm_out(x + self.contract(F.relu(self.expand(x))))


class RegionEncoder(nn.Module):
    """Maps of the VFM's layers (B D h w each) -> region tokens B T C, in raster order of a square grid.

    All in fp32, whatever the caller's autocast.

    Args:
        widths: D of each layer. tokens: T, a square. Layers begin as copies of one layer, and projectors of
        one projector where widths allow it.
    """

    def __init__(self, widths: Sequence[int], tokens: int, width: int = 512, depth: int = 6, heads: int = 8,
                 points: int = 4, hidden: int = 1024, attends: Attends = "deformable"):
        super().__init__()
        one = {inputs: Projector(inputs, width) for inputs in dict.fromkeys(widths)}
        self.projectors = nn.ModuleList(copy.deepcopy(one[inputs]) for inputs in widths)
        self.queries = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.position = nn.Parameter(torch.randn(1, tokens, width) * width**-0.5)
        self.norm = nn.LayerNorm(width)
        layer = RegionLayer(width, heads, len(widths), points, hidden, attends)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(depth))
        side = math.isqrt(tokens)
        middle = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(middle, middle, indexing="ij")
        reference = torch.stack([x, y], dim=-1).flatten(0, 1)[:, None].expand(-1, len(widths), -1)
        self.register_buffer("reference", reference.contiguous(), persistent=False)  # T levels 2

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        with torch.autocast(maps[0].device.type, enabled=False):
            maps = [project(m.float()) for project, m in zip(self.projectors, maps, strict=True)]
            x = self.norm(self.queries).expand(len(maps[0]), -1, -1)
            for layer in self.layers:
                x = layer(x, self.position, self.reference, maps)
        return x


class RegionDecoder(nn.Module):
    """Region tokens, as a memory in front of mask tokens -> what the masks become, a causal transformer.

        memory B T C | class token, grid of masks | registers       (registers_first: before the class token)

    Two branches: `pixels` on a grid of `pixel_side`, `features` on the VFM's, with one transformer for both.
    Positions are one table, class token first, on the features' grid, interpolated for pixels. Memory and the
    pixels' masks pass one layer norm, the features' masks another, registers that of their branch.

    Args:
        registers_first: in a causal sequence registers that come last, as released, change nothing.
        shared: one transformer for both branches; masks: one mask token for both (the paper's ablations).
    """

    def __init__(self, tokens: int, width: int, depth: int, heads: int, hidden: int, pixel_side: int,
                 feature_side: int, features: int, registers: int = 4, registers_first: bool = True,
                 shared: bool = True, masks: bool = False):
        super().__init__()
        self.pixel_side, self.feature_side, self.registers_first = pixel_side, feature_side, registers_first

        def learned(count: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(1, count, width) * width**-0.5)

        def transformer() -> nn.ModuleList:
            return nn.ModuleList(ViTBlock(width, heads, hidden, eps=1e-5, gated=True) for _ in range(depth))

        self.memory_position, self.position = learned(tokens), learned(1 + feature_side**2)
        self.pixel_mask, self.class_token = learned(1), learned(1)
        self.feature_mask = None if masks else learned(1)
        self.registers = learned(registers) if registers else None
        self.norm_pixels, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks, self.feature_blocks = transformer(), None if shared else transformer()
        self.head = nn.Linear(width, features)

    def positions(self, side: int) -> Tensor:
        """Class token first, then a grid of `side`, row by row: 1 1+N C."""
        own = self.feature_side
        if side == own:
            return self.position
        grid = self.position[:, 1:].transpose(1, 2).unflatten(2, (own, own))
        # DINOv2's way: the sampling step is own / (side + 0.1), not own / side
        scale = (side + 0.1) / own
        grid = F.interpolate(grid.float(), scale_factor=(scale, scale), mode="bicubic", align_corners=False)
        return torch.cat([self.position[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def sequence(self, memory: Tensor, branch: Branch) -> Tensor:
        """The whole sequence after the transformer: memory, class token, grid, registers where they stand."""
        pixels = branch == "pixels"
        mask = self.pixel_mask if pixels or self.feature_mask is None else self.feature_mask
        side = self.pixel_side if pixels else self.feature_side
        masked = torch.cat([self.class_token, mask.expand(-1, side**2, -1)], dim=1) + self.positions(side)
        if self.registers is not None:  # they have no position
            parts = (self.registers, masked) if self.registers_first else (masked, self.registers)
            masked = torch.cat(parts, dim=1)
        masked = (self.norm_pixels if pixels else self.norm_features)(masked)
        memory = self.norm_pixels(memory + self.memory_position)
        x = torch.cat([memory, masked.expand(len(memory), -1, -1)], dim=1)
        seen = causal(x.shape[1], x.device)
        for block in self.blocks if pixels or self.feature_blocks is None else self.feature_blocks:
            x = block(x, mask=seen)
        return x

    def grid(self, sequence: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Of a sequence: the class token B C, and the grid B C side side."""
        last = 0 if self.registers is None or self.registers_first else self.registers.shape[1]
        end = sequence.shape[1] - last
        grid = sequence[:, end - side**2 : end].transpose(1, 2).unflatten(2, (side, side))
        return sequence[:, end - side**2 - 1], grid

    def pixels(self, memory: Tensor) -> Tensor:
        """Memory B T C -> B C h w on the grid that the convolutions begin with."""
        return self.grid(self.sequence(memory, "pixels"), self.pixel_side)[1]

    def features(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Memory B T C -> the class token B C (the paper's linear probe), and the VFM's maps B D h w."""
        token, grid = self.grid(self.sequence(memory, "features"), self.feature_side)
        return token, self.head(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
