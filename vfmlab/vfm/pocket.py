"""The pocket VFM: a foundation model in miniature, trained in minutes on two cores and bundled with the
package.

Convolutions with batch norm turn pixels into tokens (a pure ViT stays near chance for minutes at this scale),
transformer blocks turn tokens into features. Layer 0 is early and of high resolution: a linear embedding of
overlapping 4x4 patches at half the image's resolution, before any non-linearity. Like the patch embedding of
a large ViT it keeps nearly all of the pixels, so a tokenizer that reads it can reconstruct; the deep layers
carry what was learnt.

    image 3 S S -> layer 0: early S/2 S/2 -> stem -> layers 1..depth: width S/4 S/4 -> norm -> layer -1
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.nn.attention import attend
from vfmlab.nn.norms import settle, smooth_noise
from vfmlab.seeding import derive
from vfmlab.vfm.base import VisionModel
from vfmlab.vfm.table import Facts
from vfmlab.weights import io

PATCH = 4  # pixels per token of the deep layers; images must be a multiple of it


class Block(nn.Module):
    """Pre-norm transformer block. The GELU is the exact one: torch's tanh form is several times slower on
    CPUs."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def silence(self) -> None:
        """Make the block the identity, the start of training: convolutions, which learn fast, come first."""
        for out in (self.proj, self.mlp[2]):
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)

    def forward(self, x: Tensor) -> Tensor:  # B N C
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(attend(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


class PocketNet(nn.Module):
    """The trainable network.

    Args:
        width, depth, heads: of the transformer. early: channels of layer 0. grid: side of the position
            embedding.
    """

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, early: int = 32, grid: int = 8):
        super().__init__()
        self.width, self.depth, self.early_width = width, depth, early
        mid = width // 2
        self.early = nn.Sequential(nn.Conv2d(3, early, 4, 2, 1, bias=False), nn.BatchNorm2d(early))
        self.stem = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(early, mid, 3, 1, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU(),
            nn.Conv2d(mid, mid, 3, 1, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU(),
            nn.Conv2d(mid, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip
        self.position = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, width, 1, 1))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    @property
    def spec(self) -> dict[str, int]:
        """Arguments that build this network again."""
        return {
            "width": self.width, "depth": self.depth, "heads": self.blocks[0].heads,
            "early": self.early_width, "grid": self.position.shape[-1],
        }  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[int, Tensor]:
        """Images in [-1, 1] (B 3 H W) -> maps by layer (B C h w): 0, 1..depth, and -1 after the final norm.

        mask: bool, B 1 H/4 W/4; True patches are hidden (grey pixels and a mask token), for masked
        reconstruction.
        """
        if mask is not None:
            x = x.masked_fill(F.interpolate(mask.float(), x.shape[-2:], mode="nearest") > 0.5, 0.0)
        maps = {0: self.early(x)}
        x = self.stem(maps[0])
        if mask is not None:
            x = torch.where(mask, self.mask_token.to(x.dtype), x)
        position = self.position
        if position.shape[-2:] != x.shape[-2:]:
            position = F.interpolate(position, x.shape[-2:], mode="bicubic", align_corners=False)
        x = x + position
        h, w = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # B N C
        for k, block in enumerate(self.blocks, 1):
            x = block(x)
            maps[k] = x.transpose(1, 2).unflatten(2, (h, w))
        maps[-1] = self.norm(x).transpose(1, 2).unflatten(2, (h, w))
        return maps


class PocketModel(VisionModel):
    """The pocket VFM as a frozen model. Its global token is the mean of the last layer, as it was in
    training.

    Args:
        facts: the row `pocket`, `pocket_leaky` or `pocket_random`. size, layers, upscale, seed: as in
            `config.VFM`.
        weights: "pretrained" (the bundled file of that name), "random", a safetensors file, or the directory
            of a pretraining run. `pocket_random` is random whatever is asked for.
        spec: arguments of a random :class:`PocketNet`, another one's `spec`.
    """

    def __init__(
        self, facts: Facts, size: int, layers: Iterable[int] | None = None, weights: str = "pretrained",
        upscale: float = 1.0, seed: int = 0, **spec: int,
    ):  # fmt: skip
        if weights == "random" or (weights == "pretrained" and facts.name == "pocket_random"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive("vfm", "pocket", seed))
                net, fingerprint = untrained(**spec), ""
        else:
            net, fingerprint = read(
                io.ASSETS / f"{facts.name}.safetensors" if weights == "pretrained" else weights
            )
        super().__init__(facts, size, layers, upscale, net.depth)
        self.net, self.options = net, net.spec
        self.freeze((0.5,) * 3, (0.5,) * 3, fingerprint or io.digest(net)[:16])

    @property
    def embedding(self) -> nn.Module:
        return self.net.stem

    def width(self, layer: int) -> int:
        self.check_layers((layer,))
        return self.net.early_width if layer == 0 else self.net.width

    def grid(self, layer: int) -> tuple[int, int]:
        h, w = super().grid(layer)
        return (2 * h, 2 * w) if layer == 0 else (h, w)

    def _read(self, x: Tensor, layers: tuple[int, ...]) -> tuple[dict[int, Tensor], Tensor]:
        maps = self.net(x)
        maps[-2] = maps[self.depth]
        return {layer: maps[layer] for layer in layers}, maps[-1].mean(dim=(2, 3))


def untrained(**spec: int) -> PocketNet:
    """A random network of that `spec` whose batch norms hold the statistics of smooth noise images; otherwise
    the position embedding would drown the signal. Draws from torch's global generator."""
    net = PocketNet(**spec)
    settle(net, smooth_noise(64, 32))
    return net


def read(weights: str | Path) -> tuple[PocketNet, str]:
    """A trained network and its fingerprint, from a safetensors file or a pretraining run's directory."""
    return io.network(weights, "pocket", PocketNet, "vfm.weights")
