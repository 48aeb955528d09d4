"""Which details survive: factors of the scene, an object's mask, classes, all at fewer bits."""

from __future__ import annotations

from statistics import fmean, pstdev

import torch
from torch import Tensor
from torch.nn import functional as F

from vfmlab.errors import DataError
from vfmlab.evaluation import linear, probes
from vfmlab.evaluation.coder import Coder
from vfmlab.evaluation.instruments.base import Instrument
from vfmlab.evaluation.instruments.decoding import CURVE_IMAGES
from vfmlab.evaluation.number import HIGHER, LATENT, LOWER, Draft, Quantity
from vfmlab.evaluation.pixels import psnr
from vfmlab.evaluation.representation import pool
from vfmlab.evaluation.roundtrip import as_saved
from vfmlab.evaluation.subject import Subject
from vfmlab.registry import INSTRUMENTS
from vfmlab.seeding import generator

ANGLES = ("rotation", "background_angle")
SHOTS, DRAWS, SEGMENTED = (1, 5, 20), 5, 200
BITS, FINE = (1, 2, 3, 4, 6, 8), 8


@INSTRUMENTS.register("probes")
class Probes(Instrument):
    """Linear and kNN classification of token-mean features; the report's own probes read all tokens."""

    quantities = (Quantity("probe_mean_linear", "linear probe (token mean)", HIGHER, shown=(LATENT,)),
                  Quantity("probe_mean_knn", "kNN (token mean)", HIGHER))

    def measure(self, subject: Subject, report: Draft) -> None:
        if subject.source.num_classes < 2:
            raise DataError("the data has no classes")
        train, test = subject.training, subject.held_out
        scores = probes.probe_split(pool(train.maps), train.labels, pool(test.maps), test.labels)
        section = subject.section(probes.FACTS | {"pool": "token mean", "fitted_on": len(train)})
        for name in ("linear", "knn"):
            report.add(f"probe_mean_{name}", scores[name], section, len(test), chance=scores["chance"])


# -- factors -----------------------------------------------------------------------------------------------


def factor_targets(source, indices: Tensor) -> dict[str, Tensor]:
    """True factors as regression targets, N K each: angles as cosine and sine, categories as one-hot rows.

    Raises:
        DataError: a source that knows no factors.
    """
    factors = source.factors(indices)
    if factors is None:
        raise DataError("this data has no known factors; scenes have them (data.source=scenes:medium)")
    classes, targets = getattr(source, "factor_classes", {}), {}
    for name, value in factors.items():
        if name in classes:
            targets[name] = F.one_hot(value, classes[name]).double()
        elif name in ANGLES:
            targets[name] = torch.stack([value.cos(), value.sin()], 1).double()
        else:
            targets[name] = value.double().view(len(value), -1)
    return targets


def recover(train: Tensor, test: Tensor, train_targets: dict[str, Tensor],
            test_targets: dict[str, Tensor]) -> dict[str, float]:
    """R^2 of a ridge regression from features (N x ...) to each target; constant targets are left out."""
    fit, scores = linear.Ridge(train), {}
    for name, y in train_targets.items():
        centre, truth = y.mean(0), test_targets[name]
        if float((truth - truth.mean(0)).abs().max()) > 1e-9 and float((y - centre).abs().max()) > 1e-9:
            scores[name] = linear.r2(fit.fit(y)(test), truth, centre)
    return scores


@INSTRUMENTS.register("factors")
class Factors(Instrument):
    """How much of each true factor of the scene can be read linearly from all tokens: R^2 on held-out images.

    `factor_class_r2` is the mean over shape and texture, which make the class, `factor_r2` over the others.
    """

    quantities = (Quantity("factor_r2", "factors R2", HIGHER, shown=(LATENT,)),
                  Quantity("factor_class_r2", "factors of the class R2", HIGHER),
                  Quantity("factors", "R2 of each factor", HIGHER, many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        train, test = subject.training, subject.held_out
        targets = factor_targets(train.source, train.indices), factor_targets(test.source, test.indices)
        r2 = recover(train.maps, test.maps, *targets)
        section = subject.section({"measure": "R^2 of factors", **linear.FACTS, "fitted_on": len(train),
                                   "angles": "cosine and sine"})
        classes = [v for k, v in r2.items() if k in ("shape", "texture")]
        nuisance = [v for k, v in r2.items() if k not in ("shape", "texture")]
        for name, values in (("factor_class_r2", classes), ("factor_r2", nuisance)):
            if values:
                report.add(name, fmean(values), section, len(test))
            else:
                report.absent(name, "no such factor varies in this data")
        report.add("factors", list(r2.values()), section, len(test), factor=list(r2))


# -- segmentation ------------------------------------------------------------------------------------------


def segment(maps: Tensor, masks: Tensor, test: Tensor, size: int) -> Tensor:
    """Masks of the object predicted from few labelled images by one linear map per token.

    maps: n C h w with masks bool n 1 S S. A token is fitted to the share of its cell that the object covers
    (ridge); predicted shares are brought to S x S bilinearly and cut at one half. Returns bool m 1 S S for
    test m C h w.
    """
    h, w = maps.shape[-2:]
    cover = F.interpolate(masks.float(), (h, w), mode="area").flatten()[:, None]
    read = linear.Ridge(maps.permute(0, 2, 3, 1).flatten(0, 2)).fit(cover)
    share = read(test.permute(0, 2, 3, 1).flatten(0, 2)).view(len(test), 1, h, w)
    return F.interpolate(share.float(), (size, size), mode="bilinear", align_corners=False) > 0.5


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks bool N 1 S S: N; 1 where both are empty."""
    both, either = (a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def object_masks(subject: Subject, count: int = SEGMENTED) -> Tensor:
    """Masks bool N 1 S S of the first `count` held-out images.

    Raises:
        DataError: a source that knows no masks.
    """
    test = subject.held_out
    masks = test.source.masks(test.indices[:count])
    if masks is None:
        raise DataError("this data has no masks; scenes have them (data.source=scenes:medium)")
    return masks


@INSTRUMENTS.register("segmentation")
class Segmentation(Instrument):
    """Mean IoU of the object from 1, 5 and 20 labelled training images; mean and spread over 5 draws."""

    quantities = tuple(Quantity(f"segmentation_{k}", f"IoU, {k} label{'s' * (k > 1)}", HIGHER,
                                shown=(LATENT,) * (k == 5))
                       for k in SHOTS)

    def measure(self, subject: Subject, report: Draft) -> None:
        train, wanted, maps = subject.training, object_masks(subject), subject.held_out.maps[:SEGMENTED]
        section = subject.section({"measure": "few-label segmentation", **linear.FACTS, "draws": DRAWS,
                                   "test_images": len(maps)})
        draw = generator("segmentation", subject.protocol.seed)
        for shots in SHOTS:
            if shots > len(train):
                report.absent(f"segmentation_{shots}",
                              f"needs {shots} training images, there are {len(train)}")
                continue
            scores = []
            for _ in range(DRAWS):
                chosen = torch.randperm(len(train), generator=draw)[:shots]
                masks = train.source.masks(train.indices[chosen])
                scores.append(float(iou(segment(train.maps[chosen], masks, maps, subject.cfg.size),
                                        wanted).mean()))
            report.add(f"segmentation_{shots}", fmean(scores), section, len(maps), pstdev(scores))


# -- rate and accuracy ---------------------------------------------------------------------------------------


def settings(channels: int) -> list[tuple[int, int]]:
    """(channels, bits): all channels at every number of bits, then ever fewer channels at 8 bits."""
    fewer = [k for k in (channels // 2, channels // 4, channels // 8, channels // 16) if k >= 1]
    return [(channels, bits) for bits in BITS] + [(k, FINE) for k in dict.fromkeys(fewer)]


@INSTRUMENTS.register("rate")
class Rate(Instrument):
    """Bits per pixel against probe accuracy and PSNR, as latents are rounded and principal channels dropped.

    After the idea of joint compression and classification (arXiv 2310.19675). `bpp` counts channels x bits x
    tokens over pixels; `bpp_entropy` what an ideal coder of each channel by itself would need. `bpp_probe`:
    fewest bits per pixel that keep 90 % of the unrounded probe's accuracy above chance; `bpp_psnr`: fewest
    that lose at most 1 dB; `probe_1bpp`: best accuracy at no more than one bit per pixel. The probe is a
    least-squares classifier on all tokens, fitted on rounded latents.
    """

    kinds = ("tokenizer",)
    quantities = (Quantity("bpp_probe", "bits a pixel for the probe", LOWER),
                  Quantity("bpp_psnr", "bits a pixel for PSNR", LOWER),
                  Quantity("probe_1bpp", "probe at one bit a pixel", HIGHER),
                  Quantity("rate", "quality over bits a pixel", many=True))

    def measure(self, subject: Subject, report: Draft) -> None:
        train, test = subject.training, subject.held_out
        n = min(len(test), CURVE_IMAGES)
        images, coder, classes = test.images(n), Coder(train.maps), subject.source.num_classes > 1
        tokens = test.maps.shape[-2] * test.maps.shape[-1] / subject.cfg.size**2
        section = subject.section({"measure": "rate", **linear.FACTS, "interval": "least squared error",
                                   "settings": [list(BITS), FINE], "images": n, "fitted_on": len(train)})

        def quality(fit: Tensor, z: Tensor) -> tuple[float | None, float]:
            accuracy = linear.classify(fit, train.labels, z, test.labels) if classes else None
            return accuracy, float(psnr(images, as_saved(subject.decode(z[:n]))).mean())

        accuracy, whole = quality(train.maps, test.maps)
        points = []
        for channels, bits in settings(train.maps.shape[1]):
            (fit, _), (z, entropy) = coder(train.maps, channels, bits), coder(test.maps, channels, bits)
            right, decoded = quality(fit, z)
            point = {"channels": channels, "bits": bits, "bpp": channels * bits * tokens,
                     "bpp_entropy": entropy * tokens}
            points.append(point | {"probe": right, "psnr": decoded})
        report.add("rate", points, section, len(test), unrounded={"probe": accuracy, "psnr": whole})
        self._fewest(report, section, "bpp_psnr", points, lambda p: p["psnr"] >= whole - 1, len(test))
        if classes:
            chance = float(test.labels.bincount().max() / len(test))
            floor = chance + 0.9 * max(accuracy - chance, 0)
            self._fewest(report, section, "bpp_probe", points, lambda p: p["probe"] >= floor, len(test))
            cheap = [p["probe"] for p in points if p["bpp"] <= 1]
            if cheap:
                report.add("probe_1bpp", max(cheap), section, len(test))
            else:
                report.absent("probe_1bpp", f"its least is {min(p['bpp'] for p in points):g} bits per pixel")
        else:
            report.absent("bpp_probe", "the data has no classes")
            report.absent("probe_1bpp", "the data has no classes")

    @staticmethod
    def _fewest(report: Draft, section, name: str, points: list[dict], good, n: int) -> None:
        enough = [p["bpp"] for p in points if good(p)]
        if enough:
            report.add(name, min(enough), section, n)
        else:
            report.absent(name, f"not reached at {max(p['bpp'] for p in points):g} bits per pixel")
