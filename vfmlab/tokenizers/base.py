"""What every visual tokenizer is: images -> Posterior -> normalised latent z -> images.

There are two latents and only this file knows both. *Raw* latents are what the networks make and take
(`posterior`, `decode_raw`). *Normalised* latents have zero mean and unit variance per channel (or per channel
and place) over the training images, or, where `tokenizer.radius` is set, lie on a sphere: every token has
that length. `encode` and `decode` give and take those; everything outside tokenizers and their training sees
only them, and calls them z. A *quantised* tokenizer has codes beside them (`codes`, `decode_codes`): raw
latents are then rows of its codebook.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from vfmlab.config import TokenizerConfig
from vfmlab.decoders.diffusion import Denoised
from vfmlab.errors import CheckpointError, ConfigError, DataError
from vfmlab.nn.frozen import Frozen
from vfmlab.nn.quantizers.base import Quantised, Quantizer
from vfmlab.nn.sphere import lengths, onto
from vfmlab.nn.standardise import channel_moments, over
from vfmlab.nn.teacher import Taught
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.shapes import EncoderMaps, LayerShape, check_images, check_shapes

LOGVAR_RANGE = (-30.0, 20.0)  # the published clamp; keeps exp() finite in fp32 and bf16


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over latents. mean, logvar: B C h w; logvar None: a deterministic code."""

    mean: Tensor
    logvar: Tensor | None = None

    def mode(self) -> Tensor:
        return self.mean

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.mean) if self.logvar is None else torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Mean + std * noise; noise (B C h w, standard normal) may be given, so that the caller can seed it
        per sample."""
        if self.logvar is None:
            return self.mean
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean)

    def kl(self) -> Tensor:
        """KL divergence to N(0, 1), summed over C h w: one value per image [B] (nats). Zero for a
        deterministic code."""
        if self.logvar is None:
            return self.mean.new_zeros(self.mean.shape[0])
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)

    def normalised(self, mean: Tensor, std: Tensor) -> Posterior:
        """The posterior of (z - mean) / std; mean, std: [C] or [C h w]."""
        mean, std = over(mean, self.mean), over(std, self.mean)
        logvar = None if self.logvar is None else self.logvar - 2 * std.log()
        return Posterior((self.mean - mean) / std, logvar)


@dataclass(frozen=True)
class CodePosterior(Posterior):
    """A quantised latent (`mean`, with the gradient of what was quantised; no variance) and its codes."""

    codes: Quantised | None = None

    @property
    def indices(self) -> Tensor:
        """B T, long."""
        return self.codes.indices

    @property
    def latents(self) -> Tensor:
        """The entries chosen, in the order of the tokens: B N C."""
        return self.codes.latent

    @classmethod
    def of(cls, quantizer: Quantizer, latent: Tensor) -> CodePosterior:
        """The posterior of a map (B C h w), quantised place by place in raster order."""
        codes = quantizer(latent.flatten(2).transpose(1, 2))
        return cls(codes.latent.transpose(1, 2).unflatten(2, latent.shape[-2:]), None, codes)


@dataclass(frozen=True)
class Statistics:
    """Mean and std of raw latents (posterior mode), over `count` images with `fingerprint`.

    On a sphere of radius R: mean 0, and std the mean length of a token over R, the same for every channel.
    Per channel [C], as measured here; releases such as RAE's have one for every place, [C h w].
    """

    mean: Tensor
    std: Tensor
    count: int
    fingerprint: str


class Tokenizer(nn.Module):
    """Base of all tokenizers.

    A method subclasses this in one file, registers itself, declares its options as a nested `Config`, and
    implements `posterior` and `decode_raw`. Its constructor takes `(config, size, vfm)`: size is the image's
    side in pixels, vfm the frozen :class:`vfmlab.vfm.VisionModel` of the run, or None.

    A quantised tokenizer says so in its `Config`, holds a `quantizer` and gives a :class:`CodePosterior`.

    Attributes:
        layers: VFM layers the encoder reads; () for tokenizers that look at pixels only.
        shapes: of those layers' maps, for tokenizers that can be built without a VFM.
        teacher_layers: those that `teach` reads, in training only.
        last: path of the encoder's last weight, such as "quant.weight".
        copied: name of the encoder, where it is a trainable copy of the VFM; the VFM's own maps, right only
            as long as the copy is untouched, are then not taken when somebody passes them.
        size: side of the images in pixels.
    """

    Config: type[TokenizerConfig] = TokenizerConfig
    layers: tuple[int, ...] = ()
    shapes: Mapping[int, LayerShape] = MappingProxyType({})
    teacher_layers: tuple[int, ...] = ()
    copied: str = ""
    last: str

    def __init__(self, config: TokenizerConfig, size: int, vfm: nn.Module | None = None):
        super().__init__()
        if size % config.factor:
            raise ConfigError(f"data.size {size} is not divisible by tokenizer.factor {config.factor}; "
                              f"choose a multiple of {config.factor}")
        self.config, self.size = config, size
        self.frozen = Frozen(vfm=vfm)
        self.start: nn.Module | None = None  # a linear start, see linear_start.py
        self.register_buffer("stat_mean", torch.zeros(config.channels))
        self.register_buffer("stat_std", torch.ones(config.channels))
        self.register_buffer("stat_count", torch.zeros((), dtype=torch.long))
        self.fingerprint = ""

    @property
    def vfm(self) -> nn.Module | None:
        """The run's frozen VFM: shared, so no part of parameters(), state_dict() and train()."""
        return self.frozen.get("vfm")

    def attach(self, vfm: nn.Module) -> Self:
        """Give weights that were imported for `shapes` their VFM, so that :meth:`posterior` takes images.

        Raises:
            ConfigError: a layer's width or grid is not the one the weights were made for.
        """
        check_shapes(self.shapes, vfm)
        self.frozen["vfm"] = vfm
        return self

    # -- what a method implements, on raw latents -----------------------------------------------------------

    def posterior(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        """Images in [-1, 1] (B 3 H W) -> raw posterior (B C h w).

        features: maps of the VFM for these images by layer (`vfm.features(images, layers).maps`), when the
        caller has them.
        """
        raise NotImplementedError

    def decode_raw(self, z: Tensor) -> list[Tensor]:
        """Raw latents (B C h w) -> [images B 3 H W, then lower-resolution outputs, largest first].

        Here: what `decoder` gives, with the linear start where there is one.
        """
        return self.with_start(self.decoder(z), z)

    def gaussian(self, mean: Tensor, logvar: Tensor | None, source: Any = None) -> Posterior:
        """The posterior of the network's moments (B C h w), with the linear start's reading of `source`."""
        if self.start is not None:
            mean, logvar = self.start.encode(mean, logvar, source)
        return Posterior(mean, None if logvar is None else logvar.clamp(*LOGVAR_RANGE))

    def with_start(self, images: list[Tensor], z: Tensor) -> list[Tensor]:
        """The decoder's images of raw latents z, with the linear path added where the tokenizer has one."""
        return images if self.start is None else self.start.decode(images, z)

    def last_encoder_layer(self) -> nn.Parameter:
        """The parameter at which adaptive loss weights compare gradient norms: `last`.

        With a linear start its `read`: behind the start's small gain the network's own gradients would be of
        the size of the ratio's epsilon.
        """
        return self.get_parameter(self.last) if self.start is None else self.start.read.weight

    def last_decoder_layer(self) -> nn.Parameter:
        """The parameter before the image, where an adversarial term's adaptive weight compares gradients."""
        return self.decoder.get_parameter(self.decoder.last)

    # -- what a method may add for its training -------------------------------------------------------------

    def begin(self, batches: list[Tensor]) -> str:
        """Before the first step of the first stage: what is solved or measured on training images (B 3 H W in
        [-1, 1] each). Here: the closed-form linear start. Returns a line about it, or "".
        """
        if self.start is None:
            return ""
        from vfmlab.tokenizers import linear_start

        psnr = linear_start.fit(self, batches)
        return (f"starts from a linear map solved in closed form: {psnr:.1f} dB before the first step; "
                "PSNR falls at first, while the network beside it is still noise")

    def own_features(self, images: Tensor) -> EncoderMaps | None:
        """Maps (B D h w) of an encoder that belongs to the tokenizer, with gradients where it trains; None
        where the frozen VFM is all there is.

        They are handed to `posterior` as `features`; the last of them is what enters the adapter.
        """
        return EncoderMaps(getattr(self, self.copied).features(images).maps) if self.copied else None

    def perturb(self, z: Tensor, rng: StepRandom) -> Tensor:
        """Training noise on the raw sampled latent (B C h w) before it is decoded."""
        return z

    def decode_in_training(self, z: Tensor, target: Tensor,
                           rng: StepRandom) -> tuple[list[Tensor], Denoised | None]:
        """What training decodes from raw latents z: images as `decode_raw` gives them, and, for decoders that
        denoise, the velocity's error and the noisy state.

        target: B 3 H W in [-1, 1], what the first image should be.
        """
        return self.decode_raw(z), None

    def rebuild(self, z: Tensor) -> dict[int, Tensor] | None:
        """VFM maps by layer (B D h' w') that a feature decoder rebuilds from raw latents (B C h w)."""
        return None

    def teach(self, features: dict[int, Tensor]) -> Taught | None:
        """What the tokenizer's `teacher` says of the VFM's maps; None for tokenizers without one."""
        teacher = getattr(self, "teacher", None)
        return None if teacher is None else teacher(features[self.teacher_layers[0]].float())

    # -- what the rest of the project uses ------------------------------------------------------------------

    @property
    def map_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of raw latents: of the vectors that decoding starts from, quantised or not."""
        return self.config.map_shape(self.size)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """What a generator makes: (C, h, w), or (T,) codes."""
        return self.config.latent_shape(self.size)

    @property
    def statistics(self) -> Statistics:
        if int(self.stat_count) == 0:
            raise CheckpointError(f"tokenizer '{self.config.method}' has no latent statistics, so it cannot "
                                  "encode for diffusion; finish its training, or call "
                                  "vfmlab.tokenizers.base.measure(tokenizer, batches); before that, look at "
                                  "raw latents: tokenizer.posterior(images), tokenizer.decode_raw(z)")
        return Statistics(self.stat_mean, self.stat_std, int(self.stat_count), self.fingerprint)

    @property
    def normalisation(self) -> str:
        """How raw latents become normalised ones: "channels", "places", or "sphere(R)"."""
        if self.config.radius is not None:
            return f"sphere({self.config.radius:g})"
        return "channels" if self.stat_mean.ndim == 1 else "places"

    def set_statistics(self, statistics: Statistics) -> None:
        mean, std = statistics.mean.float(), statistics.std.float()
        if mean.shape not in ((self.config.channels,), self.map_shape) or std.shape != mean.shape:
            raise CheckpointError(f"latent statistics have {tuple(mean.shape)} channels, the tokenizer "
                                  f"{self.config.channels}; measure them again")
        if (bad := ~(mean.isfinite() & std.isfinite() & (std > 0))).any():
            raise CheckpointError(f"latent statistics are not usable: {int(bad.sum())} of {bad.numel()} are "
                                  f"constant or not finite, the first at {bad.nonzero()[0].tolist()}")
        self.adapt({"stat_mean": mean})
        self.stat_mean.copy_(mean)
        self.stat_std.copy_(std)
        self.stat_count.fill_(statistics.count)
        self.fingerprint = statistics.fingerprint

    def adapt(self, tensors: Mapping[str, Tensor]) -> None:
        """Before `tensors` are loaded: statistics per channel or per place, as they are there."""
        shape = tensors.get("stat_mean", self.stat_mean).shape
        if shape != self.stat_mean.shape and shape in ((self.config.channels,), self.map_shape):
            self.stat_mean, self.stat_std = self.stat_mean.new_zeros(shape), self.stat_std.new_ones(shape)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        self.adapt(state_dict)
        return super().load_state_dict(state_dict, *args, **options)

    def encode(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Posterior:
        """Images in [-1, 1] (B 3 H W) -> posterior of normalised latents (B C h w); on a sphere the mode."""
        statistics = self.statistics
        check_images(images, "encode")
        raw = self.posterior(images, features)
        if self.config.radius is not None:
            return Posterior(self.normalise(raw.mean.float()))
        raw = Posterior(raw.mean.float(), None if raw.logvar is None else raw.logvar.float())
        return raw.normalised(statistics.mean, statistics.std)

    def decode(self, z: Tensor, **noise: Sequence[int] | None) -> Tensor:
        """Normalised latents (B C h w), or codes (B T, long), -> images clamped to [-1, 1] (B 3 H W).
        noise: `seeds`, one for each image (default: all 0), where decoding draws noise (`config.seeded`)."""
        if not z.is_floating_point():
            return self.decode_codes(z)
        if z.ndim != 4 or z.shape[1] != self.config.channels:
            raise DataError(f"decode: latents {tuple(z.shape)}; it takes B x {self.config.channels} x h x w")
        return self.decode_raw(self.denormalise(z), **noise)[0].float().clamp(-1, 1)

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents (B C h w) -> normalised ones, with gradients."""
        if self.config.radius is not None:
            return onto(raw, self.config.radius)
        # copies: running statistics move before backward
        mean, std = self.stat_mean.clone(), self.stat_std.clone()
        return (raw - over(mean, raw)) / over(std, raw)

    def denormalise(self, z: Tensor) -> Tensor:
        """Normalised latents (B C h w) -> raw ones; :class:`CheckpointError` without statistics. On a sphere
        every token gets the length of decoding, whatever its own."""
        statistics, radius = self.statistics, self.config.radius
        if radius is not None:
            return onto(z.float(), self.config.decode_length or radius * statistics.std[0])
        return z.float() * over(statistics.std, z) + over(statistics.mean, z)

    # -- codes, of quantised tokenizers: those with a `quantizer` -------------------------------------------

    @property
    def quantised(self) -> bool:
        """Whether the latent is codes, for a generator of tokens in order; see :meth:`codes`."""
        return self.config.quantised

    @property
    def codebook_size(self) -> int:
        """How many codes there are: they are 0 to codebook_size - 1."""
        return self._need_codes().size

    @property
    def code_grid(self) -> tuple[int, int] | None:
        """(h, w) with h w = T, codes in raster order; None where a place has several codes."""
        return self.map_shape[1:] if self._need_codes().parts == 1 else None

    def codebook(self) -> Tensor:
        """All entries as decoding uses them, codebook_size x d, fp32."""
        return self._need_codes().entries().detach()

    @torch.no_grad()
    def codes(self, images: Tensor, features: dict[int, Tensor] | None = None) -> Tensor:
        """Images in [-1, 1] (B 3 H W) -> codes B T, long. They need no latent statistics.

        Raises DataError for other shapes, 8-bit images, NaN and values far out of the range.
        """
        self._need_codes()
        check_images(images, f"codes of tokenizer '{self.config.method}'", self.size)
        return self.posterior(images, features).codes.indices

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes B T (long) -> images clamped to [-1, 1] (B 3 H W).

        Raises DataError for another number of codes than T and for codes outside of the codebook.
        """
        quantizer = self._need_codes()
        if not isinstance(codes, Tensor) or codes.ndim != 2 or codes.shape[1:] != self.latent_shape:
            raise DataError(f"codes of shape {tuple(getattr(codes, 'shape', ()))}: tokenizer "
                            f"'{self.config.method}' at {self.size} px has a long tensor B x "
                            f"{self.latent_shape[0]}, not this {type(codes).__name__}")
        tokens = quantizer.look_up(quantizer.check(codes))
        raw = tokens.transpose(1, 2).unflatten(2, self.map_shape[1:])
        return self.decode_raw(raw)[0].float().clamp(-1, 1)

    @torch.no_grad()
    def on_codebook(self, z: Tensor) -> Tensor:
        """Normalised latents (B C h w) -> those of the nearest entries, place by place."""
        raw = self.denormalise(z)
        tokens = self._need_codes().snap(raw.flatten(2).transpose(1, 2))
        return self.normalise(tokens.transpose(1, 2).unflatten(2, raw.shape[-2:]))

    def _need_codes(self) -> Quantizer:
        if not self.quantised:
            raise ConfigError(f"tokenizer '{self.config.method}' has a continuous latent and no codes; use "
                              "encode() and decode(), and a diffusion section")
        return self.quantizer

    @torch.no_grad()
    def move_statistics(self, mean: Tensor, variance: Tensor, momentum: float) -> None:
        """Move the statistics towards those of a batch, in place: running averages as in batch norm.

        mean, variance: [C] of raw latents over the global batch.
        """
        self.stat_mean.lerp_(mean.to(self.stat_mean), momentum)
        self.stat_std.copy_(torch.lerp(self.stat_std.square(), variance.to(self.stat_std), momentum).sqrt())

    def read_features(self, images: Tensor, features: dict[int, Tensor] | None,
                      layers: tuple[int, ...]) -> dict[int, Tensor]:
        """The maps of `layers` that the encoder reads: those given, or computed now."""
        if self.copied:
            return features if isinstance(features, EncoderMaps) else self.own_features(images)
        if features is not None and all(layer in features for layer in layers):
            return features
        if self.vfm is None:
            raise ConfigError(f"tokenizer '{self.config.method}' reads VFM layers {list(layers)} but the run "
                              "has no 'vfm' section; add vfm.name=...")
        return self.vfm.features(images, layers).maps


@torch.no_grad()
def measure(tokenizer: Tokenizer, batches, fingerprint: str) -> Statistics:
    """Mean and std of the posterior mode per channel, with `tokenizer.places` per channel and place, over
    `batches` of images in [-1, 1], in float64, one pass. On a sphere: the mean length of their tokens.

    Several processes: call it on the main one with all images; the pass is cheap beside training.
    """
    images, radius = 0, tokenizer.config.radius

    def latents() -> Iterator[Tensor]:
        nonlocal images
        for batch in batches:
            images += len(batch)
            yield tokenizer.posterior(batch).mode().cpu()

    if radius is None:
        mean, variance = channel_moments(latents(), tokenizer.config.places is True)
        mean, std = mean.float(), variance.sqrt().float()
    else:
        mean = torch.zeros(tokenizer.config.channels)
        std = torch.full_like(mean, _mean_length(latents(), radius) / radius)
    if images == 0:
        raise CheckpointError("no images to measure latent statistics on; check data.source and data.train")
    if tokenizer.quantised:  # a codebook of which one entry is used decodes still
        std[std == 0] = 1.0
    return Statistics(mean, std, images, fingerprint)


def _mean_length(latents: Iterable[Tensor], radius: float) -> float:
    total, count = 0.0, 0
    for z in latents:
        z = z.double()
        onto(z, radius)  # refuses tokens without a direction
        total, count = total + float(lengths(z).sum()), count + z[:, 0].numel()
    return total / max(count, 1)
