"""Projected discriminators: small trained heads on the tokens of a frozen vision model.

- `projected`: StyleGAN-T's (Sauer et al. 2023, arXiv 2301.09515), as VFM-VAE trains against it (2510.18457,
released
  config): DINO ViT-S/16, blocks 3, 6, 9, 12 and the patch embedding, all of DiffAugment, crops half of the
  time.
- `rae_dino`: RAE's (2510.11690): no crops, colour and translation only.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab import config as configs
from vfmlab import vfm as models
from vfmlab.decoders.diffusion import State
from vfmlab.errors import ConfigError, VfmlabError
from vfmlab.losses.discriminators.augment import Policy
from vfmlab.losses.discriminators.base import Discriminator, DiscriminatorConfig, Features
from vfmlab.losses.discriminators.heads import Head
from vfmlab.losses.discriminators.tokens import read_tokens
from vfmlab.registry import DISCRIMINATORS
from vfmlab.seeding import StepRandom
from vfmlab.vfm.base import VisionModel


class ProjectedConfig(DiscriminatorConfig):
    """Options of the discriminators on a frozen backbone; the defaults are those of VFM-VAE's."""

    backbone: configs.VFM | None = Field(configs.VFM(name="dino_s16"),
                                         description="the frozen model; null: the tokenizer's own VFM")
    layers: tuple[int, ...] | None = Field(None, description="a head on each; null: each quarter of the "
                                                             "depth, and 0")
    resolution: int | None = Field(None, ge=8,
                                   description="side at which the backbone looks; null: its native one")
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    add_class: bool = Field(True, description="add the class token, where there is one, to every patch token")
    crop: float = Field(0.5, ge=0, le=1,
                        description="chance of a window of `resolution` px instead of scaling down")
    kernel: int = Field(9, ge=1, description="of the heads' second convolution; odd")
    virtual_batch: int = Field(8, ge=1, description="images that share the statistics of the heads' norms")
    eps: float = Field(1e-5, gt=0, description="of the heads' norms")
    classes: int = Field(0, ge=0, description="condition on so many class labels; 0: unconditional")
    mapped: int = Field(64, ge=1, description="width in which labels and tokens are compared")
    augment: tuple[Policy, ...] = ("colour", "translation", "cutout")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"must be odd; use {kernel - 1} or {kernel + 1}")
        return kernel


@DISCRIMINATORS.register("projected")
class Projected(Discriminator):
    """StyleGAN-T's discriminator on any frozen ViT; logits: one B N tensor for each layer.

    Raises:
        ConfigError: no backbone, one that is the tokenizer's own VFM without saying so, or fewer tokens than
            the kernel reaches. CheckpointError: the backbone's weights cannot be had.
    """

    Config = ProjectedConfig

    def __init__(self, config: ProjectedConfig, size: int, vfm: VisionModel | None = None):
        super().__init__(config, size, vfm)
        backbone = find_backbone(config, vfm)
        self.layers = chosen_layers(config, backbone)
        self.heads = make_heads(config, backbone, self.layers)
        # side of the images that are handed to the backbone, before its own up-scaling
        self.pixels = round((config.resolution or backbone.input_size) / backbone.upscale)
        self.hidden.freeze("backbone", backbone)

    def crop(self, images: Tensor, rng: StepRandom) -> Tensor:
        return random_window(images, rng, self.pixels, self.config.crop)

    def score(self, images: Tensor, labels: Tensor | None,
              state: State | None = None) -> tuple[list[Tensor], Features]:
        """Logits B N of every head, and the heads' hidden maps B C N."""
        if images.shape[-2:] != (self.pixels, self.pixels):
            size, mode = (self.pixels, self.pixels), self.config.interpolation
            images = F.interpolate(images.float(), size, mode=mode, antialias=True, align_corners=False)
        tokens = read_tokens(self.hidden["backbone"], images, self.layers, self.config.add_class)
        given = condition(labels, self.config.classes)
        logits, maps = zip(*(head(x, given) for head, x in zip(self.heads, tokens, strict=True)), strict=True)
        return list(logits), list(maps)


@DISCRIMINATORS.register("rae_dino")
class RAEDino(Projected):
    """RAE's variant. From its released code: ViT-S/8 at 224 px by bicubic scaling, no crops, no cutout, patch
    tokens without the class token, heads with statistics per image, and the last block read twice (first and
    last head).

    RAE trains it with the hinge loss and gives its term weight 0.75 (adaptive).
    """

    class Config(ProjectedConfig):
        backbone: configs.VFM | None = Field(configs.VFM(name="timm:vit_small_patch8_224.dino"),
                                             description="the frozen model; null: the tokenizer's own VFM")
        layers: tuple[int, ...] | None = Field((-2, 3, 6, 9, 12), description="a head on each")
        interpolation: Literal["bilinear", "bicubic"] = "bicubic"
        add_class: bool = False
        crop: float = Field(0.0, ge=0, le=1)
        virtual_batch: int = Field(1, ge=1)
        eps: float = Field(1e-6, gt=0)
        augment: tuple[Policy, ...] = ("colour", "translation")


def find_backbone(config: ProjectedConfig, vfm: VisionModel | None) -> VisionModel:
    """The backbone of the config, or the run's VFM where the config leaves it open.

    A discriminator that looks through the tokenizer's own VFM is blind to what that VFM is blind to, and
    pulls the decoder towards it: that must be asked for with `backbone=null`.
    """
    if config.backbone is None:
        if vfm is None:
            raise ConfigError("discriminator.backbone null means the run's own VFM, but the run has no 'vfm' "
                              "section; set discriminator.backbone.name=dino_s16, or "
                              "discriminator.kind=patchgan, which needs no backbone")
        return vfm
    try:
        native = config.resolution or models.facts(config.backbone.name).side
        backbone = models.build(config.backbone, round(native / config.backbone.upscale))
    except VfmlabError as error:  # the line speaks of the run's VFM
        line = str(error).replace("vfm.", "discriminator.backbone.")
        raise type(error)(f"{line}; discriminator.kind=patchgan needs no backbone") from None
    if vfm is not None and backbone.fingerprint == vfm.fingerprint:
        raise ConfigError(f"discriminator.backbone.name '{config.backbone.name}' is the tokenizer's own VFM; "
                          "choose another one or discriminator.kind=patchgan, or say that you mean it with "
                          "discriminator.backbone=null")
    return backbone


def chosen_layers(config: ProjectedConfig, backbone: VisionModel) -> tuple[int, ...]:
    """The layers to read; :class:`ConfigError` names one that the backbone does not have."""
    layers = config.layers
    if layers is None:
        layers = (*dict.fromkeys(math.ceil(backbone.depth * k / 4) for k in (1, 2, 3, 4)), 0)
    if not layers or any(not -2 <= k <= backbone.depth for k in layers):
        raise ConfigError(f"discriminator.layers {list(layers)}: '{backbone.facts.name}' has "
                          f"{backbone.depth} {backbone.naming[0]}; name layers among 0 (patch embedding), "
                          f"1..{backbone.depth}, -1 (after the final norm), -2 (before that norm)")
    return layers


def make_heads(config: ProjectedConfig, backbone: VisionModel, layers: tuple[int, ...]) -> nn.ModuleList:
    """One head for each layer, as wide as its tokens."""
    scale = (config.resolution or backbone.input_size) / backbone.input_size
    few = min(round(h * scale) * round(w * scale) for h, w in map(backbone.grid, layers))
    if few < config.kernel // 2:
        raise ConfigError(f"discriminator.kernel {config.kernel} is too wide for the {few} tokens that "
                          f"'{backbone.facts.name}' gives; use a kernel of at most {2 * few + 1} or a larger "
                          "discriminator.resolution")
    options = (config.kernel, config.virtual_batch, config.eps, config.classes, config.mapped)
    return nn.ModuleList(Head(backbone.width(k), *options) for k in layers)


def condition(labels: Tensor | None, classes: int) -> Tensor | None:
    """Labels (long B) -> B classes: one-hot of unit mean square (ours; published heads: dense vectors)."""
    if not classes:
        return None
    if labels is None:
        raise ConfigError(f"discriminator.classes {classes}: it needs labels; without labels set it to 0")
    if int(labels.max()) >= classes or int(labels.min()) < 0:
        raise ConfigError(f"discriminator.classes {classes}: labels run from {int(labels.min())} to "
                          f"{int(labels.max())}; set it to the number of classes of the data")
    return F.one_hot(labels, classes) * math.sqrt(classes)


def random_window(images: Tensor, rng: StepRandom, pixels: int, chance: float) -> Tensor:
    """With `chance`, one window of `pixels` for the whole batch of larger images. Always three draws."""
    hit, top, left = rng.number(), rng.number(), rng.number()
    h, w = images.shape[-2:]
    if hit >= chance or min(h, w) <= pixels:
        return images
    top, left = int(top * (h - pixels + 1)), int(left * (w - pixels + 1))
    return images[..., top : top + pixels, left : left + pixels]
