"""What notebooks measure on the spot: records and curves of features, errors and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab import api, config, data, runs
from vfmlab.evaluation import probes
from vfmlab.evaluation.instruments.geometry import frequencies
from vfmlab.evaluation.instruments.time_loss import time_losses
from vfmlab.evaluation.linear import Ridge
from vfmlab.evaluation.number import TARGET, quantities
from vfmlab.evaluation.pixels import decibels
from vfmlab.nn.grids import fold
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.vfm.base import VisionModel

Curves = dict[str, tuple[list[float], list[float]]]  # name -> (x, y), as `primitives.curves` draws them


@torch.no_grad()
def _features(vfm: VisionModel, cfg: config.Data, n: int) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """Maps N C h w of each layer, images N 3 S S and labels N of the first `n` held-out images."""
    source = data.open_source(cfg, "val")
    batch = source.batch(torch.arange(min(n, len(source))))
    images = data.to_float(batch.images)
    parts = [vfm.features(part, vfm.layers).maps for part in images.split(100)]
    return {k: torch.cat([maps[k].float() for maps in parts]) for k in vfm.layers}, images, batch.labels


def probe_layers(vfms: Mapping[str, VisionModel], cfg: config.Data, n: int = 1000,
                 seed: int = 0) -> list[dict[str, Any]]:
    """Linear-probe and kNN accuracy of each layer (mean over positions) of each VFM, on held-out images."""
    records = []
    for name, vfm in vfms.items():
        maps, _, labels = _features(vfm, cfg, n)
        for layer, value in maps.items():
            accuracy = probes.probe(value.mean((2, 3)), labels, seed=seed)
            records.append({"VFM": name, "layer": layer, "linear probe": accuracy["linear"],
                            "kNN": accuracy["knn"], "images": len(labels)})
    return records


def linear_decodability(vfm: VisionModel, cfg: config.Data, n: int = 1000) -> list[dict[str, Any]]:
    """PSNR of pixels read linearly (ridge) from the features of one position, by layer and from all layers.

    Each position of a feature map predicts its own patch of the image; fitted on the first half of `n`
    held-out images. PSNR is that of the mean squared error over the second half.
    """
    maps, images, _ = _features(vfm, cfg, n)
    size = images.shape[-1]
    # Maps finer than the image, of a VFM that sees it enlarged, are folded to its pixels.
    maps = {layer: fold(m, max(1, m.shape[-1] / size)) for layer, m in maps.items()}
    half, smallest = len(images) // 2, min(m.shape[-1] for m in maps.values())
    named = {f"layer {layer}": value for layer, value in maps.items()}
    named["all layers"] = torch.cat([fold(m, m.shape[-1] / smallest) for m in maps.values()], 1)
    records = []
    for name, value in named.items():
        patches = F.pixel_unshuffle(images, size // value.shape[-1])
        x, y = (m.permute(0, 2, 3, 1).flatten(1, 2).double() for m in (value, patches))
        read = Ridge(x[:half].flatten(0, 1)).fit(y[:half].flatten(0, 1))
        error = (read(x[half:].flatten(0, 1)) - y[half:].flatten(0, 1)).square().mean() / 4
        records.append({"features": name, "channels": value.shape[1],
                        "grid": "{}x{}".format(*value.shape[-2:]), "PSNR (dB)": float(decibels(error))})
    return records


def error_spectrum(tokenizers: Mapping[str, Tokenizer], cfg: config.Data, n: int = 256,
                   seed: int = 0) -> Curves:
    """Power of the reconstruction error by spatial frequency, as a share of the image's own power."""
    images, _, _ = data.examples(cfg, n, seed)
    size = images.shape[-1]
    radius = frequencies(size, size).mul(size).round().long().clamp_max(size // 2)

    def power(x: Tensor) -> Tensor:
        p = torch.fft.fft2(x.mean(1)).abs().square().mean(0)
        return torch.zeros(size // 2 + 1).scatter_add_(0, radius.flatten(), p.flatten())

    base, lines = power(images), {}
    for name, tokenizer in tokenizers.items():
        _, restored, _ = api.reconstruct(tokenizer, images)
        lines[name] = (list(range(1, size // 2 + 1)), (power(restored - images) / base)[1:].tolist())
    return lines


@torch.no_grad()
def loss_by_time(ref: str | Path, root: str | Path = "runs", n: int = 256, bins: int = 10,
                 seed: int = 0) -> Curves:
    """Velocity error of the EMA network on held-out images by t, in units of the target's mean square."""
    loaded = api.load_diffusion(ref, root)
    source = data.open_source(loaded.run.data, "val")
    batch = source.batch(torch.arange(min(n, len(source))))
    z = loaded.tokenizer.encode(data.to_float(batch.images).to(loaded.device)).mode()
    return {loaded.folder.id: time_losses(loaded.network, z, batch.labels, range(len(z)), seed, bins)}


def guidance_records(ref: str | Path, root: str | Path, settings: Mapping[str, Mapping[str, Any]],
                     n: int = 500) -> list[dict[str, Any]]:
    """Class accuracy and Frechet distances of at most n samples, one record and protocol per setting."""
    n, records = min(n, runs.open_run(ref, root).config().protocol.n), []
    for name, fields in settings.items():
        report = api.evaluate(ref, root, protocol={"n": n, **{f"guidance.{k}": v for k, v in fields.items()}})
        metrics = {k: report.value(k) for k in quantities(TARGET) if k in report}
        records.append({"guidance": name, **metrics, "N": report.protocol["n"], "protocol": report.hash})
    return records
