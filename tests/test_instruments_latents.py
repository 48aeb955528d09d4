"""Instruments of latents that predict generation: closed forms and reference values."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vfmlab.errors import DataError
from vfmlab.evaluation.instruments import cosines, neighbours, velocity


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_integral_is_its_closed_form():
    eigenvalues = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    numeric = sum((value / ((1 - t) ** 2 * value + t**2)).mean() for value in eigenvalues)
    assert velocity.gaussian_variance(eigenvalues) == pytest.approx(float(numeric), rel=1e-6)


def test_golden_velocity_variance(golden: Path):
    formulas = golden / "continuous" / "formulas.json"
    if not formulas.exists():
        pytest.skip("reference values of the continuous wave are not here")
    values = json.loads(formulas.read_text())["viv"]
    tensors = load_file(formulas.with_suffix(".safetensors"))
    eigenvalues = next(value for name, value in tensors.items() if name.startswith("viv"))
    assert velocity.gaussian_variance(eigenvalues) == pytest.approx(values["closed_form"], rel=1e-9)


def test_a_kronecker_covariance_is_recovered():
    a, b = normal(3, 3).double(), normal(4, 4, seed=1).double()
    x = torch.einsum("cd,ndp,qp->ncq", a, normal(20_000, 3, 4, seed=2).double(), b)
    channels, places = velocity.kronecker(x.unflatten(2, (2, 2)))
    whole = torch.outer(channels, places).flatten().sort().values
    truth = torch.linalg.eigvalsh(torch.kron(a @ a.T, b @ b.T))
    torch.testing.assert_close(whole, truth, rtol=0.08, atol=0.03 * float(truth[-1]))


def test_neighbours_do_not_count_themselves():
    x = torch.tensor([[0.0], [1.0], [1.1], [5.0]])
    assert neighbours.nearest(x, 1)[:, 0].tolist() == [1, 2, 1, 2]
    twice = torch.zeros(3, 2)
    assert all(i not in row for i, row in enumerate(neighbours.nearest(twice, 2).tolist()))
    with pytest.raises(DataError, match="k = 4"):
        neighbours.nearest(x, 4)


def test_mutual_information():
    a = torch.tensor([0, 0, 1, 1, 2, 2])
    assert neighbours.mutual_information(a, (a + 1) % 3) == pytest.approx(1)
    assert neighbours.mutual_information(torch.arange(8) % 2, torch.arange(8) // 4) == pytest.approx(0, abs=1e-12)
    assert neighbours.mutual_information(a, torch.zeros(6, dtype=torch.long)) == 0


def test_separate_clouds_are_found():
    labels = torch.arange(90) % 3
    x = 8 * torch.eye(3, 5)[labels] + normal(90, 5)
    found = neighbours.spectral_clusters(x, 3, 0)
    assert neighbours.mutual_information(found, labels) == pytest.approx(1)


def test_share_of_high_energy():
    chequer = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    slope = torch.arange(8.0).expand(8, 8)
    assert cosines.high_share(chequer[None, None]) > 0.85
    assert cosines.high_share(slope[None, None]) < 0.02
    assert cosines.high_share(chequer[None, None] + 100) == pytest.approx(cosines.high_share(chequer[None, None]))
    with pytest.raises(DataError, match="do not vary"):
        cosines.high_share(torch.ones(2, 3, 4, 4))


def test_white_latents_have_a_known_variance():
    """Independent values of unit variance: the integral is pi / 2 a value."""
    channels, places = velocity.kronecker(normal(4000, 4, 3, 3))
    assert velocity.gaussian_variance(torch.outer(channels, places)) / 36 == pytest.approx(math.pi / 2, rel=0.02)
