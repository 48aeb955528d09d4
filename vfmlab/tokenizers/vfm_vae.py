"""VFM-VAE: a frozen vision foundation model as the encoder of a latent-diffusion tokenizer (arXiv
2510.18457).

    VFM maps of several depths -> projection each -> on the latent's grid (pixel-unshuffle) -> concatenate
        -> projection -> mean, log-variance (or codes) -> any registered decoder (default: `progressive`)

Only the small adapter and the decoder are trained. How the fields map to the release's argument names, in
brackets, and to the paper's values, which are the defaults: `channels` 32 [z_dimension], `factor` 16
[resolution_compression_factor], `widths` 64 for each layer [patch_out_dimensions], `projection` attention
[how_to_compress: attnproj | conv], `projection_layers` 1 [attnproj_quant_layers], `kl` [use_kl_loss],
`discrete` [compression_mode]. Which VFM, layers [patch_from_layers] and up-scaling [scale_factor] is the
run's `vfm` section; the decoder's names are in `vfmlab/decoders/progressive.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.nn.attention_projection import Gelu, Kind, projection
from vfmlab.nn.grids import gathered, ratios, steps
from vfmlab.nn.quantizers.multi import MultiCodebookQuantizer
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.tokenizers.base import CodePosterior, Posterior, Tokenizer
from vfmlab.tokenizers.linear_start import LinearStart
from vfmlab.tokenizers.shapes import LayerShape, as_maps, need_vfm, shapes_of


@TOKENIZERS.register("vfm_vae")
class VFMVAE(Tokenizer):
    """Adapter on frozen VFM features, KL (or deterministic, or discrete) latent, any decoder.

    Args:
        config: see `Config`. size: side of the images in pixels. vfm: the frozen VisionModel of the run.
        shapes: layer -> :class:`LayerShape`, in place of a VFM, for imported weights: features are then given
            to :meth:`encode_features`, or a VFM is attached later.

    Raises:
        ConfigError: neither `vfm` nor `shapes`; grids that do not fit the latent's (:func:`ratios`); a number
            of `widths` that is not the number of layers.
    """

    last = "final_projection.last_weight"

    class Config(config.TokenizerConfig):
        dropped: ClassVar = {"beta": 0.25, "entropy_temperature": 0.01}

        method: Literal["vfm_vae"] = "vfm_vae"
        channels: int = Field(32, ge=1, description="latent channels")
        factor: int = Field(16, ge=1, description="spatial down-sampling")
        widths: tuple[int, ...] = Field((64,), min_length=1,
                                        description="width of each projected layer; one for all, or one each")
        projection: Kind = Field("attention", description="attention projection (UniTok) or 1x1 convolution")
        projection_layers: int = Field(1, ge=1, description="attention projections in a row")
        gelu: Gelu = Field("tanh",
                           description="GELU of the attention projections; 'erf' is faster on the CPU")
        kl: bool = Field(True, description="off: no log-variance, the latent is deterministic")
        discrete: bool = Field(False, description="multi-codebook quantiser in place of the Gaussian; `kl` "
                                                  "is not used")
        codebooks: int = Field(8, ge=1)
        vocabulary: int = Field(32768, ge=2, description="entries of all codebooks together")
        alignment_width: int = Field(
            0, ge=0, description="of the frozen alignment map in released weights; the loss `vf` has its own"
        )
        linear_start: bool = Field(False,
                                   description="add linear paths fitted before training; see linear_start.py")
        decoder: config.AnyDecoder = Field(default_factory=lambda: DECODERS.get("progressive").Config())

    def __init__(self, config: VFMVAE.Config, size: int, vfm: nn.Module | None = None,
                 shapes: dict[int, LayerShape] | None = None):
        super().__init__(config, size, vfm)
        if shapes is None:
            need_vfm(vfm, config.method, "encodes with a vision foundation model")
            shapes = shapes_of(vfm, vfm.layers)
        self.layers, self.shapes = tuple(shapes), shapes
        channels, side, _ = self.latent_shape
        widths = config.widths * len(shapes) if len(config.widths) == 1 else config.widths
        if len(widths) != len(shapes):
            raise ConfigError(f"tokenizer.widths {list(config.widths)}: the VFM's layers are {list(shapes)}, "
                              f"give one width for all or {len(shapes)}")
        way = f"vfm.upscale, vfm.layers or tokenizer.factor {config.factor}"
        grids = {layer: shape.side for layer, shape in shapes.items()}
        self.ratios = ratios(grids, side, "vfm.layers", way)

        def project(inputs: int, outputs: int) -> nn.Module:
            return projection(config.projection, inputs, outputs, config.projection_layers, config.gelu)

        self.projections = nn.ModuleList(project(s.width, w)
                                         for s, w in zip(shapes.values(), widths, strict=True))
        inputs = sum(w * steps(r) ** 2 for w, r in zip(widths, self.ratios.values(), strict=True))
        gaussian = config.kl and not config.discrete
        self.final_projection = project(inputs, 2 * channels if gaussian else channels)
        self.quantizer = (
            MultiCodebookQuantizer(
                MultiCodebookQuantizer.Config(size=config.vocabulary, codebooks=config.codebooks), channels)
            if config.discrete
            else None
        )
        self.alignment = (
            nn.Conv2d(channels, config.alignment_width, 1, bias=False) if config.alignment_width else None
        )
        if self.alignment is not None:  # carried along, not trained: the loss owns the map that is
            self.alignment.requires_grad_(False)
        self.decoder = DECODERS.get(config.decoder.kind)(config.decoder, channels, side, size)
        if config.linear_start:
            self.start = LinearStart(channels, config.factor,
                                     {k: (s.width, s.side / side) for k, s in shapes.items()})

    # -- encoder --------------------------------------------------------------------------------------------

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        return self._encode(self.read_features(images, features, self.layers))

    def encode_features(self, features: Sequence[Tensor]) -> Posterior:
        """Tokens [B, tokens, width] of the VFM's layers, in the order of `layers` -> raw posterior."""
        return self._encode(as_maps(features, self.layers, self.shapes))

    def _encode(self, maps: dict[int, Tensor]) -> Posterior:
        projected = {layer: project(maps[layer])
                     for layer, project in zip(self.layers, self.projections, strict=True)}
        out = self.final_projection(gathered(projected, self.ratios, self.size)).float()
        mean, logvar = out.chunk(2, dim=1) if out.shape[1] == 2 * self.config.channels else (out, None)
        posterior = self.gaussian(mean, logvar, maps)
        return posterior if self.quantizer is None else CodePosterior.of(self.quantizer, posterior.mean)
