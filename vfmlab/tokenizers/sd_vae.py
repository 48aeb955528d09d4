"""SD-VAE: diffusers' `AutoencoderKL`, with its released weights (f8d4) or trained here (arXiv 2112.10752).

The network is diffusers' own and keeps its parameter names (`encoder.*`, `quant_conv.*`, `post_quant_conv.*`,
`decoder.*`), so a state dict of it loads as it is. Raw latents are the network's; the release's scaling
factor is not used, because normalised latents come from our statistics, as with every tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor, nn

from vfmlab import config
from vfmlab.errors import ConfigError
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers.base import Posterior, Tokenizer
from vfmlab.tokenizers.linear_start import LinearStart
from vfmlab.weights import io

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FILE = "diffusion_pytorch_model.safetensors"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@TOKENIZERS.register("sd_vae")
class SDVAE(Tokenizer):
    """AutoencoderKL as a tokenizer: convolutional encoder -> diagonal Gaussian -> convolutional decoder.

    Options are named as in diffusers; the defaults are those of the released f8d4 weights. `pretrained` is
    read when a training begins, or by :meth:`load_pretrained`: a run that has been trained or imported needs
    only its own checkpoint.

    Raises:
        ConfigError: diffusers is not installed, or the options do not fit each other.
    """

    class Config(config.TokenizerConfig):
        method: Literal["sd_vae"] = "sd_vae"
        channels: int = Field(4, ge=1, description="latent channels")
        factor: int = Field(
            8, ge=1, description="spatial down-sampling: 2 for each of block_out_channels but the first"
        )
        block_out_channels: tuple[int, ...] = Field((128, 256, 512, 512), min_length=1,
                                                    description="finest first")
        layers_per_block: int = Field(2, ge=1,
                                      description="residual blocks per resolution (one more in the decoder)")
        norm_num_groups: int = Field(32, ge=1)
        mid_block_add_attention: bool = True
        quant_conv: bool | None = Field(
            None, description="1x1 convolutions around the latent; null: yes; false: none (SD3, FLUX)"
        )
        pretrained: str | None = Field(None,
                                       description="hub repository or folder with diffusers' safetensors")
        linear_start: bool = Field(False,
                                   description="linear patch paths, fitted before training (linear_start.py)")

    def __init__(self, config: SDVAE.Config, size: int, vfm: nn.Module | None = None):
        super().__init__(config, size, vfm)
        widths, groups = config.block_out_channels, config.norm_num_groups
        if config.factor != 2 ** (len(widths) - 1):
            raise ConfigError(f"tokenizer.factor {config.factor}: {len(widths)} block_out_channels make a "
                              f"factor of {2 ** (len(widths) - 1)}; change one of the two")
        if any(width % groups for width in widths):
            raise ConfigError(f"tokenizer.norm_num_groups {groups} does not divide all of block_out_channels "
                              f"{list(widths)}")
        if config.pretrained and config.linear_start:
            raise ConfigError("tokenizer.linear_start is for networks that begin as noise, not for "
                              "pretrained ones")
        net = _autoencoder()(
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            block_out_channels=widths,
            layers_per_block=config.layers_per_block,
            latent_channels=config.channels,
            norm_num_groups=groups,
            mid_block_add_attention=config.mid_block_add_attention,
            use_quant_conv=config.quant_conv is not False,
            use_post_quant_conv=config.quant_conv is not False,
        )
        self.encoder, self.quant_conv = net.encoder, net.quant_conv
        self.post_quant_conv, self.decoder = net.post_quant_conv, net.decoder
        self.last = f"{'encoder.conv_out' if self.quant_conv is None else 'quant_conv'}.weight"
        if config.linear_start:
            self.start = LinearStart(config.channels, config.factor)

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        moments = self.encoder(images)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return self.gaussian(mean, logvar, images)

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        inner = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.with_start([self.decoder(inner)], z)

    def last_decoder_layer(self) -> nn.Parameter:
        return self.decoder.conv_out.weight

    def begin(self, batches: list[Tensor]) -> str:
        """Before the first step of a training: the weights of `pretrained`, or the linear start."""
        if self.config.pretrained is None:
            return super().begin(batches)
        self.load_pretrained()
        return f"starts from the weights of {self.config.pretrained}"

    def load_pretrained(self, source: str | Path | None = None) -> SDVAE:
        """Load weights in diffusers' format, strictly. source: hub repository or folder; None:
        `config.pretrained`.

        Raises:
            CheckpointError: not to be had, damaged, or of another architecture; one line.
        """
        source = source or self.config.pretrained
        if source is None:
            raise ConfigError("tokenizer.pretrained is not set; give a repository, for example "
                              "stabilityai/sd-vae-ft-ema")
        if Path(source).expanduser().is_dir():
            path, _ = io.in_folder(source)
        else:
            path = io.fetch(str(source), FILE,
                            way="copy that file into a folder and set tokenizer.pretrained=FOLDER")
        tensors, _ = io.read(path, "tokenizer.pretrained")
        own = [key for key in self.state_dict() if key.startswith(("stat_", "start."))]
        io.load(self, renamed(tensors, self.state_dict()), f"tokenizer.pretrained: '{source}'", keep=own)
        return self


def renamed(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as diffusers, or LDM through diffusers, has saved them -> names and shapes of `own`.

    Files of 2022 have other names in the attention of the middle block, and 1x1 convolutions for its linear
    layers.
    """
    state = {}
    for key, value in tensors.items():
        if match := re.fullmatch(r"(.*\.attentions\.\d+\.)(\w+)(\.\w+)", key):
            key = f"{match[1]}{OLD_ATTENTION.get(match[2], match[2])}{match[3]}"
        if key in own and value.ndim == 4 and value.shape[2:] == (1, 1) and own[key].ndim == 2:
            value = value[:, :, 0, 0]
        state[key] = value
    return state


def _autoencoder() -> type[AutoencoderKL]:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ConfigError("tokenizer 'sd_vae' needs diffusers; pip install 'vfmlab[hub]'") from None
    return AutoencoderKL
