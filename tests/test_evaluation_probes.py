"""Probes on features whose content is known."""

from __future__ import annotations

import pytest
import torch
from evaluation_toys import CFG, Lossless

from vfmlab.errors import DataError
from vfmlab.evaluation.probes import knn, probe, probe_split, training_latents


def clusters(n: int = 300, d: int = 8, classes: int = 3, spread: float = 0.3, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.eye(classes, d) * 3
    return centres[labels] + spread * torch.randn(n, d, generator=draw), labels


def test_separated_clusters_are_read_and_noise_is_not():
    x, y = clusters()
    found = probe(x, y)
    assert found["linear"] == found["knn"] == 1.0
    assert found["chance"] == pytest.approx(1 / 3, abs=0.06)
    noise = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    assert probe(noise, y)["linear"] < 0.5
    assert probe(noise, y)["knn"] < 0.5


def test_xor_is_found_by_neighbours_only():
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(600, 2, generator=draw) * 2 - 1
    x = x + 0.3 * x.sign()
    y = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    found = probe(x, y)
    assert found["linear"] < 0.65
    assert found["knn"] > 0.95


def test_invariant_to_scale_shift_and_order_of_dimensions():
    x, y = clusters(spread=1.2)
    value = probe(x, y)
    moved = probe((x * torch.linspace(0.1, 50, 8) + 7)[:, torch.randperm(8)], y)
    assert moved["linear"] == pytest.approx(value["linear"], abs=0.01)
    assert moved["knn"] == pytest.approx(value["knn"], abs=0.01)


def test_seed_decides_the_split_and_nothing_else():
    x, y = clusters(spread=1.5)
    assert probe(x, y, seed=1) == probe(x, y, seed=1)
    assert probe(x, y, seed=1) != probe(x, y, seed=2)


def test_linear_probe_is_the_minimum_of_its_loss():
    """At the returned weights the gradient of cross-entropy + decay vanishes."""
    from vfmlab.evaluation.probes import DECAY, _logistic

    x, y = clusters(spread=1.0)
    weight, bias = (w.double().requires_grad_() for w in _logistic(x.double(), y, 3))
    loss = torch.nn.functional.cross_entropy(x.double() @ weight + bias, y) + DECAY / 2 * weight.square().sum()
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-3
    assert float(bias.grad.abs().max()) < 1e-3


def test_nearest_neighbour_by_hand():
    train = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0]])
    assert knn(train, torch.tensor([0, 0, 1]), torch.tensor([[2.0, 0.1], [0.1, 3.0]]), 2, k=1).tolist() == [0, 1]


def test_maps_are_flattened_and_dead_dimensions_left_out():
    x, y = clusters()
    maps = torch.cat([x, torch.ones(300, 8)], 1).view(300, 4, 2, 2)
    assert probe(maps, y)["linear"] == 1.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: probe(torch.zeros(5, 2), torch.zeros(4, dtype=torch.long)), "5 features and 4 labels"),
        (lambda: probe(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)), "at least 4 samples"),
        (lambda: probe(torch.randn(8, 2), torch.zeros(8, dtype=torch.long)), "at least two classes"),
        (lambda: probe(torch.ones(8, 2), torch.arange(8) % 2), "constant"),
        (lambda: probe(torch.full((8, 2), torch.nan), torch.arange(8) % 2), "not finite"),
    ],
)
def test_errors_are_one_clear_line(call, said):
    with pytest.raises(DataError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


def test_training_latents_are_seeded_and_normalised():
    tokenizer = Lossless()
    z, labels = training_latents(tokenizer, CFG, seed=0, batch_size=32, n=50)
    again, _ = training_latents(tokenizer, CFG, seed=0, batch_size=50, n=50)
    torch.testing.assert_close(z, again)
    assert z.shape == (50, 12, 8, 8)
    assert labels.shape == (50,)
    assert not torch.equal(z, training_latents(tokenizer, CFG, seed=1, batch_size=32, n=50)[0])
    few, _ = training_latents(tokenizer, CFG, seed=0, batch_size=64, n=10_000)
    assert len(few) == 200


def test_probe_split_keeps_the_given_split():
    x, y = clusters()
    swapped = (y + 1) % 3  # the test part is labelled differently: a probe fitted on the training part must fail
    assert probe_split(x[:200], y[:200], x[200:], swapped[200:])["linear"] == 0.0
