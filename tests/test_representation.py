"""Alignment measures against golden values, the dense definition, and cases that can be worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from vfmlab.errors import DataError
from vfmlab.evaluation.representation import beyond_chance, cknna, linear_cka, mutual_knn, neighbours, pool, prepare


def normal(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def dense_hsic(k: torch.Tensor, l: torch.Tensor, unbiased: bool) -> torch.Tensor:  # noqa: E741
    """The definitions on full matrices (Song et al. 2012, eq. 5; Gretton et al. 2005, eq. 9)."""
    n = len(k)
    if not unbiased:
        h = torch.eye(n, dtype=k.dtype) - 1 / n
        return torch.trace(k @ h @ l @ h) / (n - 1) ** 2
    k, l = k.clone().fill_diagonal_(0), l.clone().fill_diagonal_(0)  # noqa: E741
    value = (k * l.T).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k @ l).sum() / (n - 2)
    return value / (n * (n - 3))


def dense_cknna(a: torch.Tensor, b: torch.Tensor, k: int, unbiased: bool = True, epsilon: float = 0.0) -> float:
    kernels = [x @ x.T for x in (a, b)]
    masks = []
    for kernel in kernels:
        best = kernel.clone().fill_diagonal_(-math.inf).topk(k, dim=1).indices
        masks.append(torch.zeros_like(kernel).scatter_(1, best, 1.0))

    def similarity(i: int, j: int) -> torch.Tensor:
        mask = masks[i] * masks[j]
        return dense_hsic(mask * kernels[i], mask * kernels[j], unbiased)

    return float(similarity(0, 1) / (torch.sqrt(similarity(0, 0) * similarity(1, 1)) + epsilon))


@pytest.fixture(scope="module")
def reference(golden):
    tensors = load_file(golden / "cknna.safetensors")
    return tensors, json.loads((golden / "cknna_values.json").read_text())


def test_preparation_equals_golden(reference):
    tensors, _ = reference
    torch.testing.assert_close(prepare(tensors["A"])[:64], tensors["A_processed_first64rows"], atol=1e-6, rtol=0)
    torch.testing.assert_close(prepare(tensors["B.0"])[:64], tensors["B_processed_first64rows.0"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_cknna_equals_golden(reference, level):
    tensors, values = reference
    a, b, expected = prepare(tensors["A"]), prepare(tensors[f"B.{level}"]), values[f"level_{level}"]
    assert cknna(a, b) == pytest.approx(expected["cknna_fp32"], abs=1e-4)
    assert cknna(a, b, epsilon=1e-6) == pytest.approx(expected["cknna_fp32"], abs=1e-6)
    # Larger neighbourhoods: the epsilon of the released code matters less and less.
    assert cknna(a, b, k=100, epsilon=1e-6) == pytest.approx(expected["cknna_topk_100"], abs=1e-5)
    assert cknna(a, b, k=511, epsilon=1e-6) == pytest.approx(expected["cknna_topk_511"], abs=1e-5)
    assert mutual_knn(a, b) == pytest.approx(expected["mutual_knn"], abs=1e-6)
    assert linear_cka(a, b) == pytest.approx(expected["unbiased_cka"], abs=1e-4)  # without the released epsilon
    assert linear_cka(a, b) == pytest.approx(cknna(a, b, k=511), abs=1e-6)  # all others are neighbours
    assert linear_cka(a, b, unbiased=False) == pytest.approx(expected["cka"], abs=1e-5)
    raw = [tensors["A"], tensors[f"B.{level}"]]
    no_clamp = [prepare(x, quantile=None) for x in raw]
    assert cknna(*no_clamp, epsilon=1e-6) == pytest.approx(expected["cknna_raw_no_clamp"], abs=1e-5)
    no_length = [prepare(x, normalise=False) for x in raw]
    assert cknna(*no_length) == pytest.approx(expected["cknna_no_normalise"], abs=1e-5)


def test_self_alignment(reference):
    tensors, values = reference
    a = prepare(tensors["A"])
    assert cknna(a, a) == pytest.approx(1.0, abs=1e-9)
    assert cknna(a, a, epsilon=1e-6) == pytest.approx(values["self"], abs=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(12, 60), st.integers(2, 11), st.booleans())
def test_cknna_equals_the_dense_definition(seed, n, k, unbiased):
    a = prepare(normal(n, 6, seed))
    b = prepare(a @ normal(6, 5, seed + 1) + 0.3 * normal(n, 5, seed + 2))
    a, b = a.double().float(), b
    expected = dense_cknna(a.double(), b.double(), k, unbiased)
    if math.isfinite(expected) and abs(expected) < 5:  # tiny N may have no structure at all: its own test below
        assert cknna(a, b, k, unbiased) == pytest.approx(expected, abs=1e-4)


def test_blocks_do_not_matter(monkeypatch):
    a, b = prepare(normal(150, 8)), prepare(normal(150, 8) + 0.5 * normal(150, 8, 1))
    whole = cknna(a, b)
    monkeypatch.setattr("vfmlab.evaluation.representation.BLOCK", 7)
    assert cknna(a, b) == pytest.approx(whole, abs=1e-6)


def test_invariances():
    a, b = prepare(normal(200, 16)), prepare(normal(200, 16) + normal(200, 16, 1))
    value, order = cknna(a, b), torch.randperm(200, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(normal(16, 16, 5))[0]
    for measure in (cknna, mutual_knn, linear_cka):
        value = measure(a, b)
        assert measure(b, a) == pytest.approx(value, abs=1e-3 if measure is cknna else 1e-6)  # see its docstring
        assert measure(a @ q, b) == pytest.approx(value, abs=1e-4)
        assert measure(a[order], b[order]) == pytest.approx(value, abs=1e-5)
        assert measure(a, 7 * b) == pytest.approx(value, abs=1e-5)
        assert abs(measure(a, b[order])) < 0.3 * value  # pairs broken


def test_unrelated_features_are_near_zero_and_cka_is_unbiased():
    a, b = prepare(normal(400, 64, 1)), prepare(normal(400, 64, 2))
    assert abs(cknna(a, b)) < 0.05
    assert mutual_knn(a, b) == pytest.approx(10 / 399, abs=0.02)
    assert abs(linear_cka(a, b)) < 0.02
    assert linear_cka(a, b, unbiased=False) > 0.1  # the bias that the other estimator removes


def test_neighbours_by_hand():
    a = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [0.0, 1.0]])
    found = neighbours(a, 2)
    assert found.index.tolist() == [[1, 2], [0, 2], [0, 1], [1, 2]]
    torch.testing.assert_close(found.similarity, torch.tensor([[0.9, 0.8], [0.9, 0.75], [0.8, 0.75], [0.1, 0.3]]))


def test_no_common_neighbours():
    """a groups samples {0 1 2} {3 4 5} {6 7 8}, b groups {0 3 6} {1 4 7} {2 5 8}: no shared neighbour."""
    grid = torch.arange(9)
    scale = 1 + 0.01 * grid[:, None]
    a, b = torch.eye(3)[grid // 3] * scale, torch.eye(3)[grid % 3] * scale
    assert mutual_knn(a, a, 2) == 1.0
    assert mutual_knn(a, b, 2) == 0.0
    assert cknna(a, b, 2) == 0.0
    assert cknna(a, a, 2) == pytest.approx(1.0)


def test_mutual_knn_by_hand():
    """Six points on a circle; b swaps two of them, so the shared neighbours can be counted."""
    angle = torch.arange(6) * 0.3
    a = torch.stack([angle.cos(), angle.sin()], 1)
    assert mutual_knn(a, a, 2) == 1.0
    b = a[[0, 1, 2, 3, 5, 4]]
    # 2 nearest in a: {1,2} {0,2} {1,3} {2,4} {3,5} {4,3}, in b: {1,2} {0,2} {1,3} {2,5} {3,5} {3,4}: 5.5 of 6 agree
    assert mutual_knn(a, b, 2) == pytest.approx(5.5 / 6)


def test_pool():
    x = normal(2 * 3, 4 * 5).view(2, 3, 4, 5)
    torch.testing.assert_close(pool(x), x.flatten(2).mean(2))
    torch.testing.assert_close(pool(x.flatten(2)), x.flatten(2).mean(1))
    with pytest.raises(DataError, match="neither"):
        pool(x[None])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: cknna(normal(20, 3), normal(21, 3)), "20 and 21 samples"),
        (lambda: cknna(normal(10, 3), normal(10, 3), k=10), "lower k or use more samples"),
        (lambda: cknna(normal(20, 3), torch.ones(20, 3)), "constant"),
        (lambda: cknna(normal(20, 3), torch.full((20, 3), math.nan)), "not finite"),
        (lambda: cknna(normal(20, 3).view(5, 4, 3), normal(5, 3)), "pool tokens first"),
        (lambda: mutual_knn(normal(20, 3), normal(3, 3)), "20 and 3 samples"),
        (lambda: linear_cka(torch.ones(9, 2), normal(9, 2)), "constant"),
        (lambda: linear_cka(normal(3, 2), normal(3, 2)), "too few"),
        (lambda: prepare(torch.ones(9, 4, 2, 2)), "constant"),
        (lambda: prepare(torch.full((4, 2), math.inf)), "not finite"),
    ],
)
def test_errors_are_one_clear_line(call, said):
    with pytest.raises(DataError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_memory_stays_far_below_a_dense_matrix():
    """4000 samples: one dense fp32 matrix is 64 MB; the largest tensor made must stay a block of rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    a = prepare(normal(4000, 8))
    b = prepare(a + 0.1 * normal(4000, 8, 1))
    with Watch():
        assert 0.1 < cknna(a, b) < 1
    assert largest <= 512 * 4000


def test_nothing_is_beyond_chance_where_all_others_are_neighbours():
    assert beyond_chance(0.5, 10, 12) < 0 < beyond_chance(0.5, 10, 100)
    with pytest.raises(DataError, match="N = 11: at k = 10 all others are neighbours"):
        beyond_chance(1.0, 10, 11)
