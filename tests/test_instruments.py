"""Instruments on cases that can be worked out by hand, and what must not change their numbers."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmlab import data
from vfmlab.config import Data
from vfmlab.errors import DataError
from vfmlab.evaluation import linear, lines, reference
from vfmlab.evaluation.coder import Coder
from vfmlab.evaluation.instruments import bands, convergence, decoding, geometry, recovery, structure
from vfmlab.evaluation.perturbations import CLEAN, MOVED, NOISY, RELEASE, SCALES
from vfmlab.nn.transforms import resize, turn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- ridge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(60, 5), (30, 80)])
def test_ridge_is_the_explicit_solution_at_the_strength_that_cross_validates_best(n, d):
    """Leave-out by its definition: the hat matrix of every strength, from the normal equations."""
    x, y = normal(n, d) * torch.linspace(0.1, 9, d) + 3, normal(n, 2, seed=1)
    y = y + x[:, :2] @ normal(2, 2, seed=2)
    test = normal(7, d, seed=3)
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    a, b = (x.double() - mean) / std, y.double() - y.double().mean(0)
    gram = a.T @ a / n
    eigen = torch.linalg.eigvalsh(a @ a.T / n if d > n else gram)
    best = None
    for decay in linear.DECAYS:
        s = decay * float(eigen.clamp_min(0).mean())
        weight = torch.linalg.solve(gram + s * torch.eye(d), a.T @ b / n)
        hat = a @ torch.linalg.solve(gram + s * torch.eye(d), a.T / n)
        free = 1 - (float(hat.trace()) + 1) / n
        if free > 1e-3:
            score = float((b - a @ weight).square().sum()) / free**2
            best = min(best or (math.inf, None), (score, weight), key=lambda pair: pair[0])
    expected = (test.double() - mean) / std @ best[1] + y.double().mean(0)
    torch.testing.assert_close(linear.Ridge(x).fit(y)(test), expected, atol=1e-5, rtol=1e-4)


def test_a_linear_map_is_recovered_and_noise_is_not():
    x, map_ = normal(200, 12), normal(12, 3, seed=1)
    fit = linear.Ridge(x[:100])
    assert linear.r2(fit.fit(x[:100] @ map_)(x[100:]), x[100:] @ map_, (x[:100] @ map_).mean(0)) > 0.9999
    noise = normal(200, 3, seed=5)
    assert abs(linear.r2(fit.fit(noise[:100])(x[100:]), noise[100:], noise[:100].mean(0))) < 0.15
    wide = linear.Ridge(normal(100, 400, seed=2))  # more columns than samples: noise is still not explained
    assert linear.r2(wide.fit(noise[:100])(normal(100, 400, seed=3)), noise[100:], noise[:100].mean(0)) < 0.1


def test_scale_and_rotation_of_features_do_not_matter_to_what_is_recovered():
    x = normal(120, 8)
    y = (x @ normal(8, 1, seed=1)).tanh()
    q = torch.linalg.qr(normal(8, 8, seed=2))[0]

    def value(z: torch.Tensor) -> float:
        return linear.r2(linear.Ridge(z[:80]).fit(y[:80])(z[80:]), y[80:], y[:80].mean(0))

    assert value(1000 * x + 5) == pytest.approx(value(x), abs=1e-6)
    assert value(x @ q) == pytest.approx(value(x), abs=0.01)  # up to the columns' standardisation


def test_least_squares_classifier():
    labels = torch.arange(80) % 4
    x = torch.eye(4)[labels] + 0.05 * normal(80, 4)
    assert linear.classify(x[:40], labels[:40], x[40:], labels[40:]) == 1.0
    assert linear.classify(normal(40, 4), labels[:40], x[40:], labels[40:]) < 0.7


# -- views ------------------------------------------------------------------------------------------------------------


def test_noise_belongs_to_the_image_not_to_the_batch():
    images, ids = normal(6, 3, 8, 8).clamp(-1, 1), [3, 1, 4, 15, 9, 2]
    for view in (CLEAN, *NOISY):
        ((_, whole),) = view(images, ids, 0)
        ((_, part),) = view(images[3:5], ids[3:5], 0)
        torch.testing.assert_close(part, whole[3:5], atol=0, rtol=0)
    noise = [NOISY[k](torch.zeros(400, 3, 8, 8), range(400), 0)[0][1] for k in range(4)]
    assert [round(float(x.std()), 2) for x in noise] == [0.05, 0.1, 0.15, 0.2]
    assert abs(float((noise[0] / 0.05 * noise[1] / 0.1).mean())) < 0.02  # sets are independent
    ((_, other),) = NOISY[0](torch.zeros(400, 3, 8, 8), range(400), 1)
    assert abs(float((noise[0] * other).mean())) < 1e-4


def test_noise_of_the_release_is_drawn_on_8_bits():
    """sigma x 255 on 0..255, clipped and rounded: 2 sigma on [-1, 1]."""
    for view, sigma in zip(RELEASE, (0.05, 0.1, 0.15, 0.2), strict=False):
        ((_, grey),) = view(torch.zeros(400, 3, 8, 8), range(400), 0)
        assert float(grey.std()) == pytest.approx(2 * sigma, rel=0.02)
        torch.testing.assert_close(data.to_float(data.to_uint8(grey)), grey, atol=0, rtol=0)
        ((_, white),) = view(torch.ones(4, 3, 8, 8), range(4), 0)
        assert white.max() == 1
        assert white.min() < 1


def test_turns_and_scales_are_those_of_the_image():
    images = normal(160, 3, 32, 32)
    groups = MOVED(images, range(160), seed=0, cell=4)
    assert sorted(seen.shape[-1] for _, seen in groups) == [8, 16, 24, 32]
    assert torch.cat([rows for rows, _ in groups]).sort().values.tolist() == list(range(160))
    turns = set()
    for rows, seen in groups:
        for i, x in zip(rows.tolist(), seen, strict=True):
            fits = [q for q in range(4) if torch.allclose(resize(turn(images[i], q)[None], x.shape[-1])[0], x, atol=1e-6)]
            assert len(fits) == 1
            turns.add((fits[0], x.shape[-1]))
    assert len(turns) == 4 * len(SCALES)
    (rows, alone), *_ = MOVED(images[5:6], [5], seed=0, cell=4)
    mine = next((seen[(where == 5).nonzero()[0, 0]] for where, seen in groups if (where == 5).any()))
    torch.testing.assert_close(alone[0], mine, atol=0, rtol=0)
    assert {seen.shape[-1] for _, seen in MOVED(images, range(160), 0, cell=16)} == {16, 32}  # whole cells, halves up


def test_reference_is_of_another_family():
    assert reference.default("pocket", "judge") == "judge"
    assert reference.default(None, "judge:own") == "judge:own"
    assert reference.default("dinov2_l14_reg", "inception") == "siglip2_b16_256"
    assert reference.default("timm:vit_base_patch16_dinov3", "inception") == "siglip2_b16_256"
    assert reference.default("siglip2_l16_512", "inception") == "dinov2_b14"
    assert reference.default(None, "inception") == "dinov2_b14"
    assert reference.family("eva_clip_l14") == "eva"
    assert reference.family("mobilenetv2@128") == "mobilenet"


# -- structure --------------------------------------------------------------------------------------------------------


def slow_lds(maps: torch.Tensor, far: int) -> list[float]:
    found = []
    for x in maps:
        h, w = x.shape[-2:]
        near, distant = [], []
        for a, b in itertools.permutations(itertools.product(range(h), range(w)), 2):
            d = abs(a[0] - b[0]) + abs(a[1] - b[1])
            cosine = float(torch.nn.functional.cosine_similarity(x[:, a[0], a[1]], x[:, b[0], b[1]], dim=0))
            if d == 1:
                near.append(cosine)
            if d >= far:
                distant.append(cosine)
        found.append(sum(near) / len(near) - sum(distant) / len(distant))
    return found


def test_lds_by_hand():
    same = torch.ones(1, 3, 8, 8)
    assert structure.lds(same).item() == pytest.approx(0, abs=1e-6)
    halves = torch.zeros(1, 2, 4, 4)
    halves[:, 0, :, :2], halves[:, 1, :, 2:] = 1, 1
    # 24 neighbours, 4 of them across the border; all pairs 5 or more apart lie across it
    assert structure.lds(halves, far=5).item() == pytest.approx(20 / 24)
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1
    assert structure.lds(board[None, None], far=6).item() == pytest.approx(-2)  # neighbours differ, corners 6 apart agree
    assert structure.far_bound(16, 16) == 6
    assert [structure.far_bound(s, s) for s in (2, 4, 8, 32)] == [2, 2, 3, 12]


def test_lds_equals_its_definition_and_keeps_what_it_should():
    maps = normal(3, 5, 5, 4)
    values = structure.lds(maps, far=4)
    assert values.tolist() == pytest.approx(slow_lds(maps, 4), abs=1e-5)
    q = torch.linalg.qr(normal(5, 5, seed=1))[0]
    torch.testing.assert_close(structure.lds(torch.einsum("dc,nchw->ndhw", q, 7 * maps), far=4), values, atol=1e-5, rtol=0)
    torch.testing.assert_close(structure.lds(maps.flip(0), far=4), values.flip(0))
    torch.testing.assert_close(structure.lds(turn(maps, 1), far=4), values, atol=1e-5, rtol=0)
    with pytest.raises(DataError, match="grid of 1 x 1 has no pairs"):
        structure.lds(torch.ones(2, 3, 1, 1))


def test_srss_by_hand_and_by_its_definition():
    halves, mask = torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    halves[:, 0, :, :2], halves[:, 1, :, 2:], mask[..., :4] = 1, 1, True
    assert structure.srss(halves, mask).item() == pytest.approx(1)
    assert structure.srss(halves, mask.transpose(2, 3)).item() == pytest.approx(24 / 56 - 0.5)  # of 7 others 3 are alike, across half
    assert structure.srss(torch.ones(1, 2, 4, 4), mask).item() == pytest.approx(0, abs=1e-6)
    maps, masks = normal(3, 5, 4, 4), (normal(3, 1, 4, 4, seed=2) > 0).repeat_interleave(2, 2).repeat_interleave(2, 3)
    masks[2] = False
    values = structure.srss(maps, masks)
    assert len(values) == 2, "an image without an object has no regions"
    for value, image, own in zip(values, maps, masks, strict=False):
        inside = own.float().view(4, 2, 4, 2).mean((1, 3)).flatten() >= 0.5
        tokens = image.flatten(1).T
        same, across = [], []
        for i, j in itertools.permutations(range(16), 2):
            (same if inside[i] == inside[j] else across).append(torch.cosine_similarity(tokens[i], tokens[j], dim=0).item())
        assert value.item() == pytest.approx(statistics.fmean(same) - statistics.fmean(across), abs=1e-5)
    assert len(structure.srss(maps, torch.zeros_like(masks))) == 0


# -- geometry ---------------------------------------------------------------------------------------------------------


def test_known_spectra_and_ranks():
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3))) * torch.tensor([3.0, 2.0, 1.0]) + 5
    assert geometry.spectrum(corners).tolist() == pytest.approx([9, 4, 1])
    q = torch.linalg.qr(normal(3, 3))[0]
    assert geometry.spectrum(corners @ q).tolist() == pytest.approx([9, 4, 1], abs=1e-4)
    assert geometry.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert geometry.effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    assert geometry.effective_rank(torch.tensor([1.0, 1, 0, 0])) == pytest.approx(2)
    half = geometry.effective_rank(torch.tensor([0.5, 0.25, 0.25]))
    assert half == pytest.approx(2**1.5)  # entropy 1.5 bits
    with pytest.raises(DataError, match="constant over all 4 samples"):
        geometry.spectrum(torch.ones(4, 2))


def test_uniformity_by_hand():
    assert geometry.uniformity(torch.ones(5, 3)) == pytest.approx(0)
    assert geometry.uniformity(torch.tensor([[1.0, 0], [-3, 0]])) == pytest.approx(-8)  # distance 2, squared 4, times 2
    x = normal(50, 6)
    assert geometry.uniformity(x) == pytest.approx(geometry.uniformity(x, block=7), abs=1e-12)
    u = torch.nn.functional.normalize(x.double(), dim=1)
    expected = torch.pdist(u).square().mul(-2).exp().mean().log()
    assert geometry.uniformity(4 * x) == pytest.approx(float(expected))


def test_density_by_hand():
    line = torch.tensor([[0.0], [1], [3], [7]])
    assert geometry.neighbour_distances(line, 1).tolist() == [1, 1, 2, 4]
    assert geometry.neighbour_distances(line, 2, block=3).tolist() == [3, 2, 3, 6]
    assert geometry.gini(torch.ones(9)) == pytest.approx(0)
    assert geometry.gini(torch.tensor([0.0, 0, 0, 8])) == pytest.approx(0.75)
    assert geometry.gini(torch.tensor([1.0, 3])) == pytest.approx(0.25)
    with pytest.raises(DataError, match="lower k or use more samples"):
        geometry.neighbour_distances(line, 4)
    with pytest.raises(DataError, match="coincide"):
        geometry.gini(torch.zeros(3))


def wave(cycles: float, side: int = 16) -> torch.Tensor:
    return (2 * math.pi * cycles * torch.arange(side) / side).cos().expand(1, 1, side, side)


def test_spatial_frequencies():
    assert geometry.low_share(wave(2) + 9) == pytest.approx(1)
    assert geometry.low_share(wave(4)) == pytest.approx(1)  # just at a quarter cycle a cell
    assert geometry.low_share(wave(6)) == pytest.approx(0, abs=1e-9)
    assert geometry.low_share(torch.cat([wave(2), wave(7)], 1)) == pytest.approx(0.5)
    with pytest.raises(DataError, match="do not vary within an image"):
        geometry.low_share(torch.ones(2, 3, 4, 4))


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([(8, 8), (9, 6)]))
def test_bands_add_up_to_the_mean_square(seed, shape):
    x = normal(2, 3, *shape, seed=seed)
    low, high = decoding.bands(x)
    torch.testing.assert_close(low + high, x.double().square().mean((1, 2, 3)))
    low, high = decoding.bands(wave(1).expand(1, 3, 16, 16) + 1)
    assert (low.item(), high.item()) == pytest.approx((1.5, 0), abs=1e-6)
    assert decoding.bands(wave(3))[1].item() == pytest.approx(0.5)


def test_paths_by_hand():
    def path(*points: tuple[float, float]) -> torch.Tensor:
        return torch.tensor(points).view(1, len(points), 1, 1, 2)

    def shape(*points: tuple[float, float]) -> tuple[float, ...]:
        return tuple(x.item() for x in lines.path_shape(path(*points)))

    assert shape((0, 0), (1, 1), (2, 2), (3, 3)) == pytest.approx((1, 0))
    assert shape((0, 0), (1, 0), (1, 1)) == pytest.approx((2**0.5, 2**0.5 / 2))
    assert shape((0, 0), (0, 0), (0, 2)) == pytest.approx((1, 1))  # straight but in one jump
    with pytest.raises(DataError, match="same image"):
        shape((0, 0), (1, 0), (0, 0))
    with pytest.raises(DataError, match="at least 3"):
        shape((0, 0), (1, 0))
    a, b = decoding.pairs(50, 200, seed=0)
    assert (a != b).all()
    torch.testing.assert_close(lines.between(torch.zeros(1, 2), torch.ones(1, 2), 4)[0, :, 0], torch.linspace(0, 1, 5))


# -- recovery ---------------------------------------------------------------------------------------------------------


def test_planted_factors_are_found_and_absent_ones_are_not():
    source = data.open_source(Data(source="scenes:hard", size=16, train=300, val=300), "val")
    targets = recovery.factor_targets(source, torch.arange(300))
    assert targets["rotation"].shape == (300, 2)
    assert targets["shape"].shape == (300, 8)
    planted = torch.cat([targets[k] for k in ("x", "y", "foreground", "rotation")], 1)
    features = (planted @ normal(planted.shape[1], 20).double()).float()
    fit, test = ({k: v[rows] for k, v in targets.items()} for rows in (slice(0, 200), slice(200, 300)))
    found = recovery.recover(features[:200], features[200:], fit, test)
    assert all(found[k] > 0.999 for k in ("x", "y", "foreground", "rotation"))
    assert all(found[k] < 0.3 for k in ("scale", "texture", "background_angle"))
    fit["x"] = torch.zeros_like(fit["x"])  # a factor that does not vary says nothing
    assert "x" not in recovery.recover(features[:200], features[200:], fit, test)


def test_data_without_factors_says_so():
    class Plain:
        def factors(self, indices):
            return None

    with pytest.raises(DataError, match="no known factors; scenes have them"):
        recovery.factor_targets(Plain(), torch.arange(3))


def test_segmentation_from_one_image_where_a_channel_holds_the_mask():
    cover = (normal(12, 1, 4, 4) > 0).float()
    masks = torch.nn.functional.interpolate(cover, scale_factor=2, mode="nearest") > 0
    maps = torch.cat([3 * cover - 1, 0.01 * normal(12, 2, 4, 4, seed=1)], 1)
    told = recovery.segment(maps[:1], masks[:1], maps[1:], 4)
    assert recovery.iou(told, masks[1:, :, ::2, ::2]).tolist() == pytest.approx([1.0] * 11)
    noise = recovery.segment(normal(1, 3, 4, 4, seed=2), masks[:1], normal(11, 3, 4, 4, seed=3), 4)
    assert recovery.iou(noise, masks[1:, :, ::2, ::2]).mean() < 0.6


@pytest.mark.parametrize("band", bands.BANDS)
def test_bands_read_a_mask_that_a_channel_holds(band):
    """By each read-out alike, from 3 images; the global random numbers stay as they are."""
    cover = (normal(12, 1, 4, 4) > 0).float()
    masks = torch.nn.functional.interpolate(cover, scale_factor=2, mode="nearest") > 0
    maps, before = torch.cat([3 * cover - 1, 0.1 * normal(12, 2, 4, 4, seed=1)], 1), torch.get_rng_state()
    with torch.no_grad():
        found = bands.segment(maps[:3], masks[:3], maps[3:], 4, band, seed=0)
        again = bands.segment(maps[:3], masks[:3], maps[3:], 4, band, seed=0)
    assert recovery.iou(found, masks[3:, :, ::2, ::2]).mean() > 0.95
    assert torch.equal(found, again)
    assert torch.equal(before, torch.get_rng_state())
    noise = bands.segment(normal(3, 3, 4, 4, seed=2), masks[:3], normal(9, 3, 4, 4, seed=3), 4, band, seed=0)
    assert recovery.iou(noise, masks[3:, :, ::2, ::2]).mean() < 0.6


def test_iou_by_hand():
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool().view(3, 1, 2, 2)
    b = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool().view(3, 1, 2, 2)
    assert recovery.iou(a, b).tolist() == pytest.approx([1 / 3, 1, 0])


def test_coder_by_hand():
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)))  # four tokens: two channels of +-1
    maps = (signs * torch.tensor([2.0, 1.0])).view(4, 2, 1, 1)
    coder = Coder(maps)
    assert coder.std.tolist() == pytest.approx([2, 1])
    back, entropy = coder(maps, 2, 1)
    assert entropy == pytest.approx(2)  # one bit for each channel's sign
    torch.testing.assert_close(back, maps)  # the interval of least error is +-2 deviations, whose halves have their middles at +-1
    back, entropy = coder(maps, 1, 8)
    assert entropy == pytest.approx(1)
    torch.testing.assert_close(back[:, 1], torch.zeros(4, 1, 1))
    torch.testing.assert_close(back[:, 0], maps[:, 0], atol=2 * 2 * 8 / 256, rtol=0)
    x = normal(50, 6, 4, 4)
    fine, entropy = Coder(x)(x, 6, 12)
    assert (fine - x).abs().max() < 0.01
    one = Coder(x)
    assert set(one.interval(1).tolist()) <= {1.2, 1.6, 2.0}  # the best one-bit levels of a normal value are at +-0.8
    assert entropy <= 6 * 12


def test_settings_of_the_rate_curve():
    assert recovery.settings(8) == [(8, b) for b in recovery.BITS] + [(4, 8), (2, 8), (1, 8)]
    assert recovery.settings(1) == [(1, b) for b in recovery.BITS]


# -- convergence ------------------------------------------------------------------------------------------------------


def test_area_and_reach_by_hand():
    assert convergence.area([0, 10, 30], [4, 2, 2]) == pytest.approx((30 + 40) / 30)
    assert convergence.reach([10, 20, 40], [9, 5, 1], 7) == pytest.approx(15)
    assert convergence.reach([10, 20, 40], [9, 5, 1], 1) == pytest.approx(40)
    assert convergence.reach([10, 20], [9, 5], 9) == 10
    assert convergence.reach([10, 20], [9, 5], 4) is None
    assert convergence.reach([10, 20], [0.2, 0.4], 0.3, lower=False) == pytest.approx(15)
    with pytest.raises(DataError, match="at least 2 evaluations"):
        convergence.area([1], [2])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: linear.Ridge(torch.ones(5, 2)), "constant over all 5"),
        (lambda: linear.Ridge(torch.full((5, 2), math.nan)), "not finite"),
        (lambda: linear.Ridge(torch.ones(1, 2)), "at least 2 samples"),
        (lambda: linear.Ridge(normal(5, 2)).fit(torch.ones(4, 1)), "5 samples and 4 targets"),
        (lambda: linear.r2(torch.ones(3, 1), torch.ones(3, 1), torch.ones(1)), "target is constant"),
        (lambda: linear.classify(normal(4, 2), torch.zeros(4).long(), normal(4, 2), torch.zeros(4).long()), "at least two classes"),
        (lambda: geometry.uniformity(torch.ones(1, 2)), "at least 2 samples"),
        (lambda: decoding.pairs(1, 3, 0), "needs 2 images"),
    ],
)
def test_errors_are_one_clear_line(call, said):
    with pytest.raises(DataError, match=said) as error:
        call()
    assert "\n" not in str(error.value)
