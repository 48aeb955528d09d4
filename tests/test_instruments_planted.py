"""Instruments of latents that are planted, so that every number is known before it is measured."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from evaluation_toys import CFG, SIZE, Lossless, Toy
from scipy.fft import idctn
from torch import nn

from vfmlab import config, data
from vfmlab.evaluation import subject
from vfmlab.evaluation.frechet import FeatureSet, frechet_distance
from vfmlab.evaluation.instruments import base as bench
from vfmlab.evaluation.instruments import continuity
from vfmlab.evaluation.number import Report
from vfmlab.evaluation.reference import Reference
from vfmlab.evaluation.roundtrip import as_saved


def planted(maps: torch.Tensor, labels: torch.Tensor | None = None, indices: torch.Tensor | None = None, tokenizer=None, cfg=CFG) -> subject.Subject:
    """A tokenizer whose latents of the held-out images are `maps`."""
    s = subject.of_tokenizer(tokenizer or Lossless(), cfg, config.Protocol(n=60), Reference(Toy()))
    labels = torch.zeros(len(maps), dtype=torch.long) if labels is None else labels
    s._maps["val"] = subject.Maps(maps, labels, torch.arange(len(maps)) if indices is None else indices, s.source)
    return s


def measured(instrument: str, *args, **more) -> Report:
    return bench.measure(planted(*args, **more), [instrument])


# -- classes among neighbours -----------------------------------------------------------------------------------------


def test_latents_neighbours_are_those_of_the_whole_map_and_nearest_means_those_of_its_tokens():
    """A pattern of mean 0 makes two clusters of 11 maps: the 10 nearest of each are the others of its cluster. Means
    lie in 11 pairs, 7 of them of one class."""
    labels = torch.tensor([0] * 11 + [1] * 8 + [2] * 3)
    pattern = torch.tensor([100.0, -100.0]).repeat(32).view(1, 1, 8, 8)
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 11), (9, 12), (10, 13), (14, 15), (16, 17), (18, 19), (20, 21)]
    means = torch.empty(22)
    for at, (one, other) in enumerate(pairs):
        means[one], means[other] = 10.0 * at, 10.0 * at + 1
    maps = torch.where(torch.arange(22).view(-1, 1, 1, 1) < 11, pattern, -pattern) + means.view(-1, 1, 1, 1)
    found = measured("neighbours", maps, labels)
    assert found["lnc"].value == pytest.approx((11 * 1 + 8 * 0.7 + 3 * 0.2) / 22)
    assert found["gsq"].value == pytest.approx(14 / 22)
    assert found["gsq"].facts["chance"] == pytest.approx((11**2 + 8**2 + 3**2) / 22**2)


def test_clusters_are_those_of_token_means_and_count_against_both_entropies():
    """Ten clusters of means, two for each of five classes; a pattern of mean 0 lies across."""
    group, across = torch.arange(120) // 12, torch.arange(120) % 10
    means = torch.zeros(120, 10, 8, 8)
    means[torch.arange(120), group] = 10
    patterns = 1000 * torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0][:10]
    patterns = (patterns - patterns.mean(1, keepdim=True)).view(10, 1, 8, 8)
    maps = means + patterns[across] + 0.01 * torch.randn(means.shape, generator=torch.Generator().manual_seed(1))
    found = measured("neighbours", maps, group // 2)
    assert found["ssc"].value == pytest.approx(2 * math.log(5) / (math.log(10) + math.log(5)))


# -- velocity ---------------------------------------------------------------------------------------------------------


def test_the_velocitys_variance_is_that_within_classes():
    """Corners of a box of half sides a_c b_p around the mean of each of two classes: a covariance that is a product."""
    channels, places = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1.0])
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).view(16, 2, 1, 2)
    box = corners * channels.view(1, 2, 1, 1) * places
    maps, labels = torch.cat([box, box]), torch.arange(32) // 16
    freedom = 32 / 30  # two means were fitted
    expected = math.pi / 2 * (2 + 1) * (3 + 1) * math.sqrt(freedom) / 4
    found = measured("velocity_variance", maps, labels)
    assert found["viv"].value == pytest.approx(expected)
    apart = maps + 50.0 * labels.view(-1, 1, 1, 1) - torch.tensor([7.0, 4.0]).view(1, 2, 1, 1)
    assert measured("velocity_variance", apart, labels)["viv"].value == pytest.approx(expected)
    assert measured("velocity_variance", 3 * maps, labels)["viv"].value == pytest.approx(3 * expected)
    assert measured("velocity_variance", apart, torch.zeros_like(labels))["viv"].value > 2 * expected


# -- frequencies ------------------------------------------------------------------------------------------------------


def test_high_frequencies_begin_at_the_diagonal_of_the_cosine_coefficients():
    coefficients = torch.zeros(1, 2, 8, 8)
    coefficients[0, 0, 0, 0] = 50.0  # the mean, which does not count
    coefficients[0, 0, 3, 3] = 3.0  # 6/7 of the highest: low
    coefficients[0, 0, 4, 3], coefficients[0, 1, 0, 7] = 2.0, 1.0  # just high
    maps = torch.from_numpy(idctn(coefficients.numpy(), axes=(2, 3), norm="ortho"))
    assert measured("dct_energy", maps)["dct_high"].value == pytest.approx((4 + 1) / (9 + 4 + 1))


# -- midpoints --------------------------------------------------------------------------------------------------------


def images_of(indices: torch.Tensor) -> torch.Tensor:
    return data.to_float(data.open_source(CFG, "val").batch(indices).images)


def apart(images: torch.Tensor, others: torch.Tensor) -> float:
    space = Toy()
    return frechet_distance(*(FeatureSet.empty(10).update(space(x).features) for x in (images, others)))


def test_half_way_to_a_twin_lies_the_latent_itself():
    """So nothing is added to what the decoder loses anyway."""
    twins = torch.arange(20).repeat(2)
    z = Lossless().normalise(Lossless().posterior(images_of(twins)).mode())
    found = measured("midpoints", z, indices=twins)
    assert found["midpoint_fd"].value == pytest.approx(0, abs=1e-8)
    found = measured("midpoints", z, indices=twins, tokenizer=Lossless(error=0.2))
    assert found["midpoint_fd"].value > 0.01
    assert found["midpoint_fd_excess"].value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("levels", [0.25, 25.25])
def test_midpoints_are_decoded_half_way_to_the_nearest_latent(levels: float):
    """Of a linear tokenizer: blends of two images each, which lie closer together than images do. With a quarter of
    one of 255 levels no blend lies between two of them."""
    images, off = images_of(torch.arange(40)), levels * 2 / 255
    z = Lossless().normalise(Lossless().posterior(images).mode())
    distance = torch.cdist(z.flatten(1), z.flatten(1)).fill_diagonal_(torch.inf)
    blends = (images + images[distance.argmin(1)]) / 2
    floor = apart(images, as_saved(images + off))
    expected = apart(images, as_saved(blends + off))
    assert expected - floor > 0.01
    found = measured("midpoints", z, tokenizer=Lossless(error=off))
    assert found["midpoint_fd"].value == pytest.approx(expected, rel=1e-5)
    assert found["midpoint_fd_excess"].value == pytest.approx(expected - floor, rel=1e-5)


def test_one_image_has_no_midpoint():
    z = torch.zeros(1, 12, SIZE // 2, SIZE // 2)
    assert measured("midpoints", z)["midpoint_fd"].reason == "one held-out image has no neighbour"


# -- continuity -------------------------------------------------------------------------------------------------------


def moved(side: int = 32) -> Report:
    """Grey images of a linear tokenizer: latents of standard deviation .5 on average."""
    cfg = CFG.model_copy(update={"size": side})
    return measured("continuity", torch.zeros(60, 12, side // 2, side // 2), tokenizer=Lossless(size=side), cfg=cfg)


def test_a_latent_is_moved_forth_and_back_by_a_tenth(monkeypatch):
    """By a distance that is the mean absolute difference: twice epsilon, the deviation, and the mean of |normal|."""
    seen = []
    network = nn.Module()
    network.forward = lambda a, b: seen.append((a, b)) or (a - b).abs().mean((1, 2, 3)).view(-1, 1, 1, 1)
    monkeypatch.setattr(continuity, "perceptual", lambda device: network)
    found = moved()
    assert found["lpc"].value == pytest.approx(2 * 0.1 * 0.5 * math.sqrt(2 / math.pi), rel=0.01)
    assert found["lpc"].n == 60
    one, other = seen[0]
    middle = (one + other) / 2
    torch.testing.assert_close(middle, middle[:1].expand_as(middle), atol=1e-6, rtol=0)  # the latent itself
    assert (one[0] - one[1]).abs().max() > 0.01, "every image has moves of its own"
    assert moved()["lpc"] == found["lpc"]
    assert "too small for its backbone" in moved(16)["lpc"].reason


def test_without_the_weights_of_lpips_there_is_no_continuity(monkeypatch):
    monkeypatch.setattr(continuity, "perceptual", lambda device: "LPIPS (alex): weights are not here")
    assert moved()["lpc"].reason == "LPIPS (alex): weights are not here"
