"""Low against high frequencies before the few-label segmentation read-out (channel attention of TriKD, arXiv
2309.12557)."""

from __future__ import annotations

from statistics import fmean, pstdev
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.instruments.recovery import SEGMENTED, iou, object_masks
from vfmlab.evaluation.number import HIGHER, Draft, Quantity
from vfmlab.evaluation.subject import Subject
from vfmlab.nn.frequency_attention import FrequencyAttention
from vfmlab.registry import INSTRUMENTS
from vfmlab.seeding import derive, generator

Band = Literal["none", "low", "high"]
BANDS: dict[Band, str] = {"none": "no attention", "low": "low frequencies", "high": "high frequencies"}
SHOTS, DRAWS, STEPS, LR, DECAY = 5, 3, 150, 0.02, 0.01
FACTS = {"fit": "AdamW on the labelled images", "steps": STEPS, "lr": LR, "weight_decay": DECAY,
         "draws": DRAWS, "labels": SHOTS}


class ReadOut(nn.Module):
    """Maps B C h w -> logits B 1 h w, a token being the object's: a 1x1 convolution, behind the attention of
    a band where there is one."""

    def __init__(self, channels: int, band: Band):
        super().__init__()
        self.read = (
            nn.Conv2d(channels, 1, 1, bias=False) if band == "none" else FrequencyAttention(channels, 1, band)
        )
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor) -> Tensor:
        return self.read(maps) + self.bias


def trained(maps: Tensor, cover: Tensor, band: Band, seed: int) -> ReadOut:
    """A read-out fitted to the share of each cell that the object covers. maps: n C h w, cover: n 1 h w."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = ReadOut(maps.shape[1], band)
        optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=DECAY)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(net(maps), cover).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def segment(maps: Tensor, masks: Tensor, test: Tensor, size: int, band: Band, seed: int) -> Tensor:
    """Masks of the object bool m 1 S S for test m C h w, read by :class:`ReadOut` from few labelled images:
    maps n C h w, masks bool n 1 S S. Channels are standardised by the labelled images."""
    std, mean = torch.std_mean(maps.float(), (0, 2, 3), keepdim=True, correction=0)
    maps, test = ((x.float() - mean) / std.clamp_min(1e-6) for x in (maps, test))
    net = trained(maps, F.interpolate(masks.float(), maps.shape[-2:], mode="area"), band, seed)
    share = torch.sigmoid(net(test))
    return F.interpolate(share, (size, size), mode="bilinear", align_corners=False) > 0.5


@INSTRUMENTS.register("segmentation_bands")
class SegmentationBands(Instrument):
    """Mean IoU of the object from 5 labelled images, with channel attention on low, on high frequencies, and
    with none; mean and spread over 3 draws. All three are trained alike, so they compare with each other, not
    with the closed form of `segmentation`."""

    quantities = tuple(Quantity(f"bands_{band}", f"IoU, {SHOTS} labels, {words}", HIGHER,
                                definition=f"IoU of the object's mask from {SHOTS} labelled images, trained "
                                           f"read-out, channel attention: {words}")
                       for band, words in BANDS.items())

    def measure(self, subject: Subject, report: Draft) -> None:
        train, wanted, maps = subject.training, object_masks(subject), subject.held_out.maps[:SEGMENTED]
        if len(train) < SHOTS:
            raise DataError(f"needs {SHOTS} training images, there are {len(train)}")
        section = subject.section({"measure": "few-label segmentation by bands", **FACTS,
                                   "test_images": len(maps)})
        draw, seed = generator("segmentation bands", subject.protocol.seed), subject.protocol.seed
        drawn = [torch.randperm(len(train), generator=draw)[:SHOTS] for _ in range(DRAWS)]
        for band in BANDS:
            scores = []
            for number, chosen in enumerate(drawn):
                masks = train.source.masks(train.indices[chosen])
                result = segment(train.maps[chosen], masks, maps, subject.cfg.size, band,
                                derive("bands", seed, number))
                scores.append(float(iou(result, wanted).mean()))
            report.add(f"bands_{band}", fmean(scores), section, len(maps), pstdev(scores))
