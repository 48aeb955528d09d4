"""Where a latent's energy lies over the spatial frequencies of a discrete cosine transform."""

from __future__ import annotations

import torch
from torch import Tensor

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.number import LATENT, TOKENIZERS, Draft, Published, Quantity
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS


def high_share(maps: Tensor) -> float:
    """Share of the energy of maps N C h w, without their means, in coefficients whose frequencies, as shares
    of the highest, add up to 1 or more.

    Raises:
        DataError: maps that do not vary within an image.
    """
    from scipy.fft import dctn

    h, w = maps.shape[-2:]
    power = torch.as_tensor(dctn(maps.double().numpy(), axes=(2, 3), norm="ortho")).square().sum((0, 1))
    power[0, 0] = 0
    if not power.sum() > 1e-12 * maps.double().square().sum():
        raise DataError(f"features on a {h} x {w} grid do not vary within an image; they have no frequencies")
    shares = torch.arange(h)[:, None] / max(h - 1, 1) + torch.arange(w) / max(w - 1, 1)
    return float(power[shares >= 1].sum() / power.sum())


@INSTRUMENTS.register("dct_energy")
class DctEnergy(Instrument):
    """Share of high-frequency energy of the maps' discrete cosine transform (after SEC, arXiv 2606.03578).

    Where high begins is not published: beyond the diagonal of the coefficients, ours. Which end serves
    diffusion is the question, so it has no good end.
    """

    quantities = (Quantity("dct_high", "high-frequency energy", shown=(LATENT,),
                           definition="share of a latent's energy beyond the diagonal of its cosine coefficients",
                           published=Published(0.80, TOKENIZERS)),)  # fmt: skip

    def measure(self, subject: Subject, report: Draft) -> None:
        maps = subject.held_out.maps
        section = subject.section({"measure": "dct energy", "high": "beyond the diagonal"})
        report.add("dct_high", high_share(maps), section, len(maps))
