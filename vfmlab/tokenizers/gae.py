"""GAE (arXiv 2603.10365): a ViT trained from scratch whose latent is normalised per token, near to the codes
of a teacher made from a VFM.

    images -> ViT -> linear adapter -> RMS norm over channels (tokens of length sqrt(C)) -> z (+ s n in
    training)
           -> ViT -> images

The VFM is read by the teacher only (:class:`vfmlab.nn.teacher.Teacher`), which is trained in a stage of its
own (trains "teacher.*", loss `teacher`); then encoder and decoder are, with the loss `semantic` on the
teacher's frozen codes. Training noise has one scale s ~ N(0, (noise / 0.8)^2) for each image. From the
released configuration: sizes, noise, norms without weights. The release standardises latents for its
diffusion model, on a straight path; with `radius` they stay on the sphere. With `latent` "gaussian", the
paper's control, it is a KL latent in place of norm and noise.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.plain_vit import PlainEncoder
from vfmlab.nn.sphere import rms_over_channels
from vfmlab.nn.teacher import Teacher
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.shapes import check_grid


class TeacherConfig(config.Section):
    """The teacher's sizes; its code has the latent's channels and grid."""

    layer: int = Field(-1, description="VFM layer that it learns")
    window: int = Field(1, ge=1, description="side of the windows of its linear map")
    depth: int = Field(1, ge=1, description="blocks of its way back (the paper's text says 4, its code 1)")
    heads: int = Field(16, ge=1)


@TOKENIZERS.register("gae")
class GAE(Tokenizer):
    """Deterministic latent of length sqrt(C) per token, or a KL latent; any decoder.

    Raises:
        ConfigError: a teacher without a VFM, or on another grid than the latent's; heads that do not divide.
    """

    last = "adapter.weight"

    class Config(config.TokenizerConfig):
        method: Literal["gae"] = "gae"
        channels: int = Field(32, ge=1, description="latent channels")
        factor: int = Field(16, ge=1, description="side of the encoder's patches")
        width: int = Field(1024, ge=4, description="of the encoder's tokens")
        depth: int = Field(24, ge=1, description="blocks of the encoder")
        heads: int = Field(16, ge=1)
        features: int = Field(1024, ge=1, description="what the encoder gives the adapter")
        latent: Literal["gaussian"] | None = Field(None, description="null: tokens of length sqrt(channels), "
            "with noise in training; gaussian: mean and variance, held by the loss kl")
        noise: float = Field(0.2, ge=0, description="sigma of the training noise; its scale is N(0, (sigma / "
                                                    "0.8)^2), one for each image")
        teacher: TeacherConfig | None = Field(None, description="null: none, and no loss `semantic`")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("plain_vit").Config())

    def __init__(self, config: GAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        if config.width % config.heads:
            raise ConfigError(f"tokenizer.heads {config.heads}: width {config.width} is no multiple of it")
        channels, side, _ = self.map_shape
        self.encoder = PlainEncoder(size, config.factor, config.width, config.depth, config.heads,
                                    config.features)
        self.adapter = nn.Linear(config.features, (2 if config.latent else 1) * channels, bias=False)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)
        self.teacher = teacher_of(config.teacher, vfm, channels, side, config.factor)
        self.teacher_layers = () if config.teacher is None else (config.teacher.layer,)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        z = self.adapter(self.encoder(images).movedim(1, -1)).movedim(-1, 1)
        if self.config.latent:
            return self.gaussian(*z.float().chunk(2, dim=1))
        return Posterior(rms_over_channels(z))

    def perturb(self, z: Tensor, rng: StepRandom) -> Tensor:
        if self.config.latent:
            return z
        scale = self.config.noise / 0.8 * rng.randn(1, 1, 1)
        return z + scale * rng.randn(*z.shape[1:])


def teacher_of(options: TeacherConfig | None, vfm: nn.Module | None, channels: int, side: int,
               factor: int) -> Teacher | None:
    """The teacher of a tokenizer, or None. Raises :class:`ConfigError` without a VFM on the latent's grid."""
    if options is None:
        return None
    if vfm is None:
        raise ConfigError("tokenizer.teacher learns from a vision foundation model, but the run has no 'vfm' "
                          "section; add vfm.name=pocket, or set tokenizer.teacher=null")
    check_grid(vfm, options.layer, side, factor)
    return Teacher(vfm.width(options.layer), channels, side, options.window, options.depth, options.heads)
