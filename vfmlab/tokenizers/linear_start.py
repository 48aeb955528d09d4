"""A linear start for any tokenizer: patch paths beside encoder and decoder, solved in closed form before
training.

A tokenizer's network begins as noise and spends most of a short training on what a linear map knows. With
this option

    raw mean = gain_e * network(x) + A source        decoded image = gain_d * network(z) + B z

where `source` is what the encoder looks at (the image's own patches, or VFM maps on the latent grid), A and B
are ordinary trainable parameters, and the gains (per channel, trainable) begin small. A is the reduced-rank
ridge regression of the image patches on the source (Izenman 1975): with patches as source that is patch PCA,
with features it is the best code of that many channels a linear map can read off them. Codes are whitened to
unit variance, which suits the KL prior. B is the ridge regression of the patches on 3x3 neighbourhoods of
codes: it smooths over borders.

It changes the comparison of tokenizers unless all of them use it: set it for every one or for none. The
curves begin high for the same reason (VFM-VAE at the pocket tier: at 26.9 dB): the linear map is the best of
its kind, and the first steps, in which the network beside it is still noise, lower PSNR before the network
takes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.errors import ConfigError
from vfmlab.nn.grids import fold, steps

# of the mean variance of the regressors: enough for rank-deficient features, invisible otherwise
RIDGE = 1e-4
START_GAIN = 0.03
# std 0.05 beside codes of unit variance: 26 dB, above what a linear code of a few channels reaches
START_LOGVAR = -6.0
MAP_BYTES = 2**29  # bytes of a VFM's maps that the second pass need not ask for again


class LinearStart(nn.Module):
    """The linear paths of one tokenizer. Built with it (so that checkpoints fit), fitted once by :func:`fit`.

    Args:
        channels: of the latent. factor: side of a patch in pixels (the tokenizer's down-sampling factor).
        widths: VFM layer -> (channels of its map, grid side over latent side, at the run's size) for
            tokenizers that read features; None for those that read pixels. Maps finer than the latent by a
            whole number are pixel-unshuffled, others resized.
    """

    def __init__(self, channels: int, factor: int, widths: dict[int, tuple[int, float]] | None = None):
        super().__init__()
        self.factor, self.widths = factor, widths
        pixels = 3 * factor**2
        if channels > pixels:
            raise ConfigError(f"tokenizer.linear_start: {channels} channels are more than the {pixels} "
                              f"values of a {factor} x {factor} patch; use fewer channels or switch it off")
        known = (
            pixels if widths is None
            else sum(width * steps(ratio) ** 2 for width, ratio in widths.values())
        )
        self.read, self.write = silent(known, channels, 1), silent(channels, pixels, 3)
        self.gain_encode = nn.Parameter(torch.full((channels, 1, 1), START_GAIN))
        self.gain_decode = nn.Parameter(torch.full((3, 1, 1), START_GAIN))
        self.logvar = nn.Parameter(torch.full((channels, 1, 1), START_LOGVAR))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @classmethod
    def for_features(cls, channels: int, factor: int, size: int, vfm: nn.Module,
                     layers: Iterable[int]) -> LinearStart:
        """For an encoder that looks at a VFM's maps; `source` is then the maps, layer -> B D h' w'."""
        side = size // factor
        return cls(channels, factor,
                   {layer: (vfm.width(layer), vfm.grid(layer)[0] / side) for layer in layers})

    def encode(self, mean: Tensor, logvar: Tensor | None,
               source: Tensor | dict[int, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The network's raw mean and log-variance (B C h w) -> those with the linear path added.

        logvar None (a deterministic code) stays None.
        """
        mean = self.gain_encode * mean + self.read(self.arrange(source, mean.shape[-2:]))
        return mean, None if logvar is None else logvar + self.logvar

    def decode(self, images: list[Tensor], z: Tensor) -> list[Tensor]:
        """The network's images, largest first -> those with the linear path added (averaged down for smaller
        ones)."""
        return added(images, self.gain_decode, F.pixel_shuffle(self.write(z), self.factor))

    def arrange(self, source: Tensor | dict[int, Tensor], grid: tuple[int, int]) -> Tensor:
        """What the linear encoder reads, on the latent's grid: B D h w."""
        if self.widths is None:
            return F.pixel_unshuffle(source, self.factor)
        maps = [fold(source[layer], ratio, grid) for layer, (_, ratio) in self.widths.items()]
        return torch.cat(maps, dim=1)

    @torch.no_grad()
    def solve(self, batches: Callable[[], Iterable[tuple[Tensor, Tensor | dict[int, Tensor]]]]) -> float:
        """Set A and B from pairs (images B 3 H W, source). `batches()` is called twice and must give the same
        pairs.

        Returns the mean squared error per pixel value of the linear paths alone on these images.
        """
        device = self.read.weight.device
        moments = Moments()
        for images, source in batches():
            patches = F.pixel_unshuffle(images.float(), self.factor)
            moments.add(rows(self.arrange(source, patches.shape[-2:]).float()), rows(patches))
        coefficients = moments.ridge()  # D x P
        covariance = coefficients.T @ moments.xx @ coefficients  # of the fitted patches
        directions = torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, : self.read.out_channels]
        # An eigenvector's sign is arbitrary; fixed, so that the fit is the same on every machine.
        directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        code = coefficients @ directions  # D x C
        variance = (code.T @ moments.xx @ code).diagonal()
        # Directions that the source does not know have no variance: they stay small instead of becoming pure
        # noise.
        code = code / variance.clamp_min(1e-6 * max(float(variance.max()), 1e-12)).sqrt()
        self.read.weight.copy_(code.T[:, :, None, None].to(device))
        self.read.bias.copy_(-(moments.mean_x @ code).to(device))

        def codes() -> Iterator[tuple[Tensor, Tensor]]:
            for images, source in batches():
                grid = (images.shape[-2] // self.factor, images.shape[-1] // self.factor)
                yield images, self.read(self.arrange(source, grid).float())

        error = solve_write(self.write, self.factor, codes())
        self.fitted.fill_(True)
        return error


class LinearWrite(nn.Module):
    """The decoder's half alone, for tokenizers whose latent is fixed before training: gain * network(z) + B
    z.

    Where training adds noise to the latent, the ridge is the noise's variance: that is the best linear
    decoder of noisy latents. Zero until :meth:`solve`.

    Args:
        channels: of the latent. factor: side of a patch in pixels.
    """

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.factor = factor
        self.write = silent(channels, 3 * factor**2, 3)
        self.gain = nn.Parameter(torch.full((3, 1, 1), START_GAIN))

    def forward(self, images: list[Tensor], z: Tensor) -> list[Tensor]:
        """The network's images, largest first -> those with the linear path added (averaged down for smaller
        ones)."""
        return added(images, self.gain, F.pixel_shuffle(self.write(z), self.factor))

    @torch.no_grad()
    def solve(self, pairs: Iterable[tuple[Tensor, Tensor]], noise: float = 0.0) -> None:
        """Set B from pairs of images B 3 H W and raw latents B C h w. noise: variance that training adds."""
        solve_write(self.write, self.factor, pairs, noise or None)


def silent(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """A convolution that gives zeros until it is fitted."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def added(images: list[Tensor], gain: Tensor, own: Tensor) -> list[Tensor]:
    """gain * image + own (B 3 H W), averaged down for smaller images."""
    return [gain * image + (own if image.shape == own.shape else F.adaptive_avg_pool2d(own, image.shape[-2:]))
            for image in images]


def solve_write(write: nn.Conv2d, factor: int, pairs: Iterable[tuple[Tensor, Tensor]],
                ridge: float | None = None) -> float:
    """Fit `write` to pairs of images B 3 H W and codes B C h w; returns the mean squared error it leaves."""
    moments = Moments()
    for images, codes in pairs:
        around = F.unfold(codes.float(), 3, padding=1).transpose(1, 2).flatten(0, 1)  # (B h w) (C 3 3)
        moments.add(around, rows(F.pixel_unshuffle(images.float(), factor)))
    back = moments.ridge(ridge)
    write.weight.copy_(back.T.reshape(write.weight.shape))
    write.bias.copy_(moments.mean_y - moments.mean_x @ back)
    return float(moments.residual(back).mean())


def rows(x: Tensor) -> Tensor:
    """B D h w -> (B h w) D."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


class Moments:
    """Means and central second moments of (x, y), accumulated in float64 by batches."""

    def __init__(self):
        self.count = 0
        self.mean = self.product = None

    def add(self, x: Tensor, y: Tensor) -> None:
        both = torch.cat([x, y], dim=1).double().cpu()
        n, mean = both.shape[0], both.mean(0)
        centred = both - mean
        product = centred.T @ centred
        if self.mean is None:
            self.count, self.mean, self.product, self.width = n, mean, product, x.shape[1]
            return
        delta = mean - self.mean  # Chan's update
        self.product += product + torch.outer(delta, delta) * (self.count * n / (self.count + n))
        self.mean = self.mean + delta * (n / (self.count + n))
        self.count += n

    @property
    def xx(self) -> Tensor:
        return self.product[: self.width, : self.width] / self.count

    @property
    def mean_x(self) -> Tensor:
        return self.mean[: self.width]

    @property
    def mean_y(self) -> Tensor:
        return self.mean[self.width :]

    @property
    def scale(self) -> float:
        """Mean variance of x."""
        return max(float(self.xx.diagonal().mean()), 1e-12)

    def ridge(self, ridge: float | None = None) -> Tensor:
        """argmin |y - x W|^2 + ridge |W|^2 on centred data, x by y wide. None: RIDGE of the mean variance."""
        xx, xy = self.xx, self.product[: self.width, self.width :] / self.count
        ridge = RIDGE * self.scale if ridge is None else ridge
        return torch.linalg.solve(xx + ridge * torch.eye(self.width, dtype=xx.dtype), xy)

    def residual(self, weight: Tensor) -> Tensor:
        """Mean squared error of y - mean_y - (x - mean_x) W, for each of y's columns."""
        both = torch.cat([weight, -torch.eye(weight.shape[1], dtype=weight.dtype)])  # (x, y) -> x W - y
        return (self.product / self.count @ both * both).sum(0)


@torch.no_grad()
def fit(tokenizer: nn.Module, batches: Iterable[Tensor]) -> float:
    """Fit the linear start of `tokenizer`, once, before its training.

    Deterministic: the same batches give the same weights, so every rank may call it with the same batches.

    Args:
        batches: images B 3 H W in [-1, 1]; some hundred to a few thousand images in all. Time and memory grow
            with the square of what the encoder reads per latent cell: at the pocket tier a second, for three
            maps of a ViT-L unshuffled to f16 (12 k values) minutes and 2 GB.

    Returns:
        PSNR in dB (range 2) of the linear paths alone on `batches`, before any training.
    """
    start, batches = tokenizer.start, list(batches)  # of which two passes are made
    if not batches:
        raise ConfigError("tokenizer.linear_start: no images to fit it on; check data.source and data.train")
    device = start.read.weight.device
    firsts: list[dict[int, Tensor]] = []  # maps of the first batches, for the second pass
    room = MAP_BYTES

    def pairs():
        nonlocal room
        for number, images in enumerate(batches):
            images = images.to(device)
            if start.widths is None:
                source = images
            elif number < len(firsts):
                source = firsts[number]
            else:
                source = tokenizer.read_features(images, None, tuple(start.widths))
                room -= sum(maps.nbytes for maps in source.values())
                if room >= 0:
                    firsts.append(source)
            yield images, source

    return 10 * math.log10(4 / max(start.solve(pairs), 1e-12))
