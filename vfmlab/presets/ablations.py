"""Named changes to a VFM-VAE run: the rows of the paper's decoder table, finer switches of the decoder, sizes of the latent.

`apply(run, "plain_decoder")` works on any run with a progressive decoder, and rows of `vfmlab compare` name variants after
a plus: `pocket_vfm_vae+plain_decoder`. Variants are changes of fields, nothing is copied; the same config has the same id
whichever way it was written.

The paper (arXiv 2510.18457) names the four rows of its decoder table and not the fields behind them; the grouping is ours:
the plain decoder is 3x3 residual blocks with nearest-neighbour up-sampling that read z' once, without attention, style,
blur, running sum and lower-resolution images; "+ fusion" lets z' enter every block; "+ modern blocks" is the whole decoder on
the VFM's last layer alone; "+ multi-layer features" is the run as it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vfmlab.config import Recipe, override
from vfmlab.errors import ConfigError, nearest

TABLE = ("plain_decoder", "fusion", "modern_blocks", "multi_layer")
PAPER_RFID = {"plain_decoder": 19.69, "fusion": 14.35, "modern_blocks": 1.08, "multi_layer": 0.71}  # 5 M images, ImageNet 256

_LAST = {"vfm.layers": [-1]}
_PLAIN = {
    **{f"tokenizer.decoder.{part}": False for part in ("style", "attention", "running_sum", "multiscale", "blur")},
    "tokenizer.decoder.layer": "conv", "tokenizer.decoder.upsample": "nearest", "losses.multiscale": 0, **_LAST,
}  # fmt: skip
_OFF, _ON = {"tokenizer.decoder.fusion": False}, {"tokenizer.decoder.fusion": True}
STEPS = 16  # widths of a matched decoder are multiples of channel_max / STEPS


@dataclass(frozen=True)
class Variant:
    """about: one line. changes: dotted fields, or how they follow from the run."""

    about: str
    changes: dict[str, Any] | Callable[[Recipe], dict[str, Any]]

    def of(self, run: Recipe) -> dict[str, Any]:
        return self.changes(run) if callable(self.changes) else self.changes


def decoder_size(run: Recipe) -> int:
    """Parameters of the run's decoder."""
    import torch

    from vfmlab.registry import DECODERS

    c = run.tokenizer
    with torch.device("meta"):
        decoder = DECODERS.get(c.decoder.kind)(c.decoder, c.channels, run.data.size // c.factor, run.data.size)
    return sum(p.numel() for p in decoder.parameters())


def _matched(changes: dict[str, Any]) -> Callable[[Recipe], dict[str, Any]]:
    """`changes`, and channels scaled so that the decoder has as many parameters as the run's own, as nearly as widths allow."""

    def of(run: Recipe) -> dict[str, Any]:
        whole, decoder = decoder_size(run), run.tokenizer.decoder
        found = []
        step = max(1, decoder.channel_max // STEPS)
        for width in range(step, 2 * decoder.channel_max + 1, step):
            base = round(decoder.channel_base * width / decoder.channel_max)
            widths = {"tokenizer.decoder.channel_max": width, "tokenizer.decoder.channel_base": base}
            found.append((abs(decoder_size(override(run, changes | widths)) - whole), width, widths))
        return changes | min(found, key=lambda item: item[:2])[2]

    return of


def _width(channels: int) -> Callable[[Recipe], dict[str, Any]]:
    """d channels; z' keeps its width as far as whole factors allow, so that the decoder behind it is the same."""

    def of(run: Recipe) -> dict[str, Any]:
        inner = run.tokenizer.channels * run.tokenizer.decoder.decompress_factor
        return {"tokenizer.channels": channels, "tokenizer.decoder.decompress_factor": max(1, round(inner / channels))}

    return of


def _switch(*parts: str) -> dict[str, Any]:
    return {f"tokenizer.decoder.{part}": False for part in parts}


WIDTHS = (4, 8, 16, 32, 48, 64)  # with a linear start at most 3 f^2: 48 at f4
VARIANTS: dict[str, Variant] = {
    "plain_decoder": Variant("3x3 residual blocks, nearest up-sampling, z' read once, last VFM layer only", _PLAIN | _OFF),
    "fusion": Variant("the plain decoder with z' fused into every block", _PLAIN | _ON),
    "modern_blocks": Variant("the whole decoder, last VFM layer only", _LAST),
    "multi_layer": Variant("the whole decoder, all VFM layers of the run: the run as it is", {}),
    "plain_matched": Variant("plain_decoder with about the whole decoder's parameters", _matched(_PLAIN | _OFF)),
    "fusion_matched": Variant("fusion with about the whole decoder's parameters", _matched(_PLAIN | _ON)),
    "no_fusion": Variant("z' enters block 0 only", _OFF),
    "no_attention": Variant("no self-attention in the decoder", _switch("attention")),
    "no_style": Variant("no mapping network, no modulation", _switch("style")),
    "no_blur": Variant("no blur after up-sampling", _switch("blur")),
    "no_sum": Variant("images are read from each block's features, not from their running sum", _switch("running_sum")),
    "no_multiscale": Variant("an image from the last block only, and no loss on lower ones", _switch("multiscale") | {"losses.multiscale": 0}),
    "conv_blocks": Variant("3x3 residual blocks in place of ConvNeXt layers", {"tokenizer.decoder.layer": "conv"}),
    "nearest": Variant("nearest-neighbour up-sampling in place of pixel-shuffle", {"tokenizer.decoder.upsample": "nearest"}),
    "last_layer": Variant("the VFM's last layer only", _LAST),
    "no_kl": Variant("a deterministic latent: no log-variance, no KL term", {"tokenizer.kl": False, "losses.kl": 0}),
    **{f"d{d}": Variant(f"{d} latent channels, the same decoder behind z'", _width(d)) for d in WIDTHS},
    "f8": Variant("down-sampling by 8", {"tokenizer.factor": 8}),
    "f16": Variant("down-sampling by 16", {"tokenizer.factor": 16}),
}


def apply(run: Recipe, name: str) -> Recipe:
    """`run` changed as variant `name` says.

    Raises:
        ConfigError: no such variant, or the run has not the parts that it changes (a progressive decoder, a VFM).
    """
    if name not in VARIANTS:
        raise ConfigError(f"unknown variant '{name}'{nearest(name, VARIANTS)}")
    tokenizer = run.tokenizer
    if tokenizer is None or getattr(getattr(tokenizer, "decoder", None), "kind", None) != "progressive":
        raise ConfigError(f"variant '{name}' of '{run.name}': it changes a progressive decoder, which this run does not have; use for example pocket_vfm_vae")
    changes = VARIANTS[name].of(run)
    if run.vfm is None and "vfm.layers" in changes:
        raise ConfigError(f"variant '{name}' of '{run.name}': it chooses VFM layers, but the run has no 'vfm' section")
    return override(run, changes)
