"""Frechet and kernel distances against closed forms, scipy's matrix square root and brute force."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmlab.errors import DataError
from vfmlab.evaluation.frechet import (
    FeatureSet,
    Moments,
    _range_factor,
    class_offset,
    few_samples_warning,
    frechet_distance,
    gaussian_distance,
    kernel_distance,
    trace_sqrt_product,
)


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: torch.Tensor) -> Moments:
    return Moments(x.shape[1]).update(x)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 6), st.floats(-1e4, 1e4))
def test_moments_do_not_depend_on_batches(sizes, d, offset):
    x = normal(sum(sizes) + 2, d) + offset
    streamed = Moments(d)
    for part in x.split([*sizes, 2]):
        streamed.update(part)
    scale = max(1.0, offset**2)
    assert streamed.count == len(x)
    torch.testing.assert_close(streamed.mean, x.mean(0), atol=1e-12 * scale, rtol=1e-12)
    torch.testing.assert_close(streamed.covariance, torch.cov(x.T).reshape(d, d), atol=1e-13 * scale, rtol=1e-9)


def test_closed_form_of_one_dimensional_gaussians():
    one = torch.ones(1)
    value = gaussian_distance(one * 1.0, torch.tensor([[4.0]]), one * 3.0, torch.tensor([[9.0]]))
    assert value == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_closed_form_of_commuting_gaussians():
    """Covariances with common eigenvectors: sum of (sqrt a_i - sqrt b_i)^2."""
    q = torch.linalg.qr(normal(6, 6))[0]
    a, b = torch.arange(1.0, 7.0, dtype=torch.float64), torch.linspace(0.5, 8, 6, dtype=torch.float64)
    value = gaussian_distance(torch.zeros(6), q * a @ q.T, torch.full((6,), 0.5), q * b @ q.T)
    assert value == pytest.approx(6 * 0.25 + float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(200, 32), (20, 64), (3, 64)])
def test_distance_to_itself_is_zero(n, d):
    x = moments(normal(n, d) * 10)
    assert abs(frechet_distance(x, x)) < 1e-9 * float(x.covariance.trace())


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 24), (15, 400, 24), (15, 12, 24), (2, 2, 24)])
def test_equals_the_matrix_square_root(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = moments(normal(n, d, 1) * torch.linspace(0.1, 3, d)), moments(normal(m, d, 2) + 0.3)
    jitter = 1e-13 * torch.eye(d)  # scipy's root of a singular product is inaccurate, ours needs no help
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = linalg.sqrtm(((a.covariance + jitter) @ (b.covariance + jitter)).numpy())
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root.trace().real
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-4 if min(n, m) < d else 1e-9)


def test_both_routes_agree():
    """The Cholesky route and the reduced route on the same full-rank matrices."""
    a, b = torch.cov(normal(80, 16, 1).T), torch.cov(normal(80, 16, 2).T)
    reduced = torch.linalg.svdvals(_range_factor(a).T @ _range_factor(b)).sum()
    torch.testing.assert_close(trace_sqrt_product(a, b), reduced, rtol=1e-11, atol=0)


def test_rank_deficient_closed_form():
    """Line segments along e1 and e2: the root of the product vanishes, the distance is the sum of traces."""
    a, b = torch.zeros(3, 3), torch.zeros(3, 3)
    a[0, 0], b[1, 1] = 4.0, 9.0
    assert gaussian_distance(torch.zeros(3), a, torch.zeros(3), b) == pytest.approx(13.0)
    assert gaussian_distance(torch.zeros(3), a, torch.zeros(3), a) == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(2, 40))
def test_symmetric_non_negative_and_rotation_invariant(seed, n, m):
    x, y = normal(n, 12, seed), 2 * normal(m, 12, seed + 1) + 1
    q = torch.linalg.qr(normal(12, 12, seed + 2))[0]
    value = frechet_distance(moments(x), moments(y))
    assert value > -1e-9
    assert frechet_distance(moments(y), moments(x)) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert frechet_distance(moments(x @ q), moments(y @ q)) == pytest.approx(value, rel=1e-8, abs=1e-8)
    assert frechet_distance(moments(3 * x + 1), moments(3 * y + 1)) == pytest.approx(9 * value, rel=1e-8, abs=1e-7)


def test_kernel_distance_is_the_unbiased_estimate():
    """Against the definition, written out with loops, on one subset that holds half of each set."""
    x, y = normal(8, 3, 1), normal(8, 3, 2) + 1

    def k(u, v):
        return float(u @ v / 3 + 1) ** 3

    value, _ = kernel_distance(x, y, subsets=4000, seed=1)
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    whole = (
        sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs if i != j) / (n * (n - 1))
        - 2 * sum(k(x[i], y[j]) for i, j in pairs) / n**2
    )
    assert value == pytest.approx(whole, rel=0.05)  # subsets of an unbiased estimate average to it


def test_kernel_distance_is_near_zero_for_one_distribution_and_not_for_two():
    x, y = normal(2000, 16, 1), normal(2000, 16, 2)
    same, spread = kernel_distance(x, y, subsets=20)
    other, _ = kernel_distance(x, y + 0.5, subsets=20)
    assert abs(same) < 3 * spread + 1e-3
    assert other > 20 * abs(same)


def test_kernel_distance_is_seeded_and_ordered_by_seed():
    x, y = normal(40, 4, 1), normal(40, 4, 2)
    assert kernel_distance(x, y, seed=3) == kernel_distance(x, y, seed=3)
    assert kernel_distance(x, y, seed=3, subsets=5) != kernel_distance(x, y, seed=4, subsets=5)


def test_the_offset_of_classes_is_that_of_two_different_rows_against_two_independent_ones():
    """Against the definition, written out with loops."""
    x, labels = normal(9, 3, 1), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])
    share = labels.bincount() / 9
    kernel = (x.double() @ x.double().T / 3 + 1) ** 3
    of_pairs = {(a, b): [float(kernel[i, j]) for i in range(9) for j in range(9) if i != j and (labels[i], labels[j]) == (a, b)]
                for a in range(3) for b in range(3)}
    different = sum(map(sum, of_pairs.values())) / (9 * 8)
    independent = sum(float(share[a] * share[b]) * sum(values) / len(values) for (a, b), values in of_pairs.items())
    assert class_offset(x, labels) == pytest.approx(different - independent, rel=1e-6)
    assert class_offset(x, torch.zeros(9, dtype=torch.long)) == pytest.approx(0, abs=1e-12)


def test_a_random_part_of_a_balanced_set_has_the_offset_of_the_whole():
    """Rows are the corners (3, 0) and (0, 3): kernels of 166.375 within a class, of 1 across."""
    x, labels = 3 * torch.eye(2)[torch.arange(4) % 2], torch.arange(4) % 2
    assert class_offset(x, labels) == pytest.approx((1 / 3 - 1 / 2) * 165.375)
    assert class_offset(x, labels, torch.arange(6) % 2) == pytest.approx((2 / 5 - 1 / 2) * 165.375)
    with pytest.raises(DataError, match="class 1 has 1 images of 3, its kernel needs 2"):
        class_offset(x[:3], labels[:3])


def test_without_the_offset_balanced_sets_of_one_distribution_are_0_apart():
    labels, values, corrected = torch.arange(30) % 3, [], []
    for seed in range(60):
        x, y = (3 * torch.eye(3)[labels] + 0.3 * normal(30, 3, 2 * seed + k) for k in (0, 1))
        values.append(kernel_distance(x, y, subsets=10, seed=seed)[0])
        corrected.append(values[-1] - class_offset(x, labels) - class_offset(y, labels))
    value, left = (float(torch.tensor(part).mean()) for part in (values, corrected))
    error = float(torch.tensor(corrected).std()) / 60**0.5
    assert value < -3 * error
    assert abs(left) < 2.5 * error
    assert abs(left) < 0.3 * abs(value)


def test_agrees_with_torch_fidelity():
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(60, 5, 1), normal(60, 5, 2) + 0.5
    theirs = kid.kid_features_to_metric(
        x, y, kid_subsets=300, kid_subset_size=30, kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1.0, verbose=False
    )
    value, spread = kernel_distance(x, y, subsets=300, subset_size=30)
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0.1)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=0.2)


def test_feature_set_keeps_rows_and_moments():
    x = normal(30, 4)
    kept = FeatureSet.empty(4).update(x[:11]).update(x[11:])
    assert kept.count == 30
    torch.testing.assert_close(kept.features(), x.float())
    assert frechet_distance(kept, moments(x)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Moments(3).update(torch.zeros(2, 4)), "dimension 3"),
        (lambda: Moments(2).update(torch.tensor([[0.0, math.nan]])), "not finite"),
        (lambda: moments(torch.zeros(1, 2)).covariance, "at least 2 samples"),
        (lambda: frechet_distance(moments(normal(5, 2)), moments(normal(5, 3))), "2 and 3 dimensions"),
        (lambda: kernel_distance(normal(3, 2), normal(9, 2)), "at least 4 samples"),
        (lambda: kernel_distance(normal(9, 2), normal(9, 3)), "2 and 3 dimensions"),
    ],
)
def test_errors_are_one_clear_line(call, said):
    with pytest.raises(DataError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_few_samples_warn():
    assert "kernel distance" in few_samples_warning(1000)
    assert few_samples_warning(10_000) is None
