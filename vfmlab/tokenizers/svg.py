"""SVG (arXiv 2510.15301): a frozen VFM's tokens with a few channels of a residual branch beside them.

    images -> frozen VFM -> D channels;  images -> small ViT -> C' channels, brought to the tokens' mean and
    std z: both, D + C' channels -> any decoder -> images

Only branch and decoder train. In training whole images lose their branch to a token, with chance `mask`. The
release takes mean and std over the *current batch*, in evaluation too, so that an image decodes differently
in another batch. Here evaluation takes running means of those of the training batches (`match` "fixed",
ours, as batch normalisation does); "batch" is the release's way, for parity: there a masked branch is matched
by its own mean and std, token included.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.quantizers.base import over_ranks
from vfmlab.nn.residual_branch import ResidualBranch, Spread, matched, spread
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.shapes import width_on_grid

MOMENTUM = 0.1  # share of the newest batch in the running means, batch normalisation's


@TOKENIZERS.register("svg")
class SVG(Tokenizer):
    """Deterministic latent of the VFM's width and `extra` channels, on the VFM's grid; any decoder.

    Raises:
        ConfigError: no VFM; channels that are not the VFM's width and `extra`; a grid that is not the VFM's.
    """

    last = "branch.head.2.weight"

    class Config(config.TokenizerConfig):
        whole_batch: ClassVar = True  # its statistics are those of all images of a batch
        method: Literal["svg"] = "svg"
        channels: int = Field(392, ge=2, description="must be the VFM's width + extra")
        factor: int = Field(16, ge=1, description="spatial down-sampling; must give the VFM's grid")
        layer: int = Field(-1, description="VFM layer whose tokens are taken")
        extra: int = Field(8, ge=1, description="channels of the residual branch")
        width: int = Field(384, ge=4, description="of the branch's tokens")
        depth: int = Field(6, ge=1)
        heads: int = Field(8, ge=1)
        hidden: int = Field(1536, ge=1, description="of its feed-forward layers")
        mask: float = Field(0.1, ge=0, le=1, description="chance that an image loses its branch in training")
        match: Literal["fixed", "batch"] = Field("fixed", description="where evaluation takes mean and "
                                                                      "std from: training, or its own batch")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("conv").Config())

    def __init__(self, config: SVG.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        width = width_on_grid(vfm, config, size, "adds to a vision foundation model's tokens")
        self.layers = (config.layer,)
        channels, side, _ = self.map_shape
        if channels != width + config.extra:
            raise ConfigError(f"tokenizer.channels {channels}: 'svg' keeps the VFM's {width} channels and "
                              f"adds tokenizer.extra {config.extra}; set "
                              f"tokenizer.channels={width + config.extra}")
        if config.width % config.heads:
            raise ConfigError(f"tokenizer.heads {config.heads}: width {config.width} is no multiple of it")
        self.branch = ResidualBranch(size, config.factor, config.width, config.depth, config.heads,
                                     config.hidden, config.extra)
        self._matched_from: Spread | None = None  # of this batch, until `perturb`
        self.mask_token = nn.Parameter(torch.zeros(1, config.extra, 1, 1))
        for name in ("own", "target"):
            self.register_buffer(f"{name}_spread", torch.tensor([0.0, 1.0]))  # mean, std
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)

    def begin(self, batches: list[Tensor]) -> str:
        """Measures mean and std of the VFM's tokens and of the branch as it starts."""
        images = torch.cat([batch.to(self.stat_mean.device) for batch in batches])
        with torch.no_grad():
            own = torch.cat([self.branch(part) for part in images.split(128)])
            target = torch.cat([self.read_features(part, None, self.layers)[self.config.layer]
                                for part in images.split(128)])
        self.own_spread.copy_(torch.stack(spread(own)))
        self.target_spread.copy_(torch.stack(spread(target)))
        return ""

    def match(self, branch: Tensor, maps: Tensor) -> Tensor:
        """The branch B C' h w at the tokens' mean and std."""
        if self.config.match == "fixed" and not self.training:
            return matched(branch, Spread(*self.own_spread), Spread(*self.target_spread))
        own, target = spread(branch), spread(maps)
        if self.training:
            self._follow(own, target)
        self._matched_from = own if self.config.match == "batch" else None
        return matched(branch, own, target)

    @torch.no_grad()
    def _follow(self, own: Spread, target: Spread) -> None:
        total = over_ranks(torch.stack([*own, *target, torch.ones_like(own.std)]))
        now = (total[:4] / total[4]).view(2, 2)
        self.own_spread.lerp_(now[0], MOMENTUM)
        self.target_spread.lerp_(now[1], MOMENTUM)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        maps = self.read_features(images, features, self.layers)[self.config.layer].float()
        return Posterior(torch.cat([maps, self.match(self.branch(images).float(), maps)], dim=1))

    def perturb(self, z: Tensor, rng: StepRandom) -> Tensor:
        """Masks the branch of some images; the token is matched as the branch is.

        z: of the last posterior.
        """
        maps, branch = z.split((z.shape[1] - self.config.extra, self.config.extra), dim=1)
        token, gone = self.mask_token.float(), rng.rand(1, 1, 1) < self.config.mask
        if self.config.match == "batch":
            target, own = spread(maps), self._matched_from
            self._matched_from = None  # it belongs to this step's graph
            masked = torch.where(gone, token, matched(branch, target, own))  # B C' h w, before it was matched
            return torch.cat([maps, matched(masked, spread(masked), target)], dim=1)
        token = matched(token, Spread(*self.own_spread), Spread(*self.target_spread))
        return torch.cat([maps, torch.where(gone, token, branch)], dim=1)
