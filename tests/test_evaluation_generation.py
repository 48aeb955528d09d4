"""Generation numbers of networks whose samples are known."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_toys import CFG, Knows, Lossless, Toy, one_per_class, setup

from vfmlab import config, data
from vfmlab.errors import DataError
from vfmlab.evaluation import generation, reconstruction
from vfmlab.evaluation.features import Seen
from vfmlab.evaluation.frechet import FeatureSet, class_offset, frechet_distance
from vfmlab.evaluation.generation import evaluate_generation, labels_of
from vfmlab.evaluation.instruments import pixels
from vfmlab.evaluation.number import quantities

BASE = config.Protocol(n=60, batch=25, sampler=config.Sampler(steps=4))


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "perceptual", lambda device: "no weights in this test")


def knowing(noise: float = 0.0):
    """Tokenizer, network whose samples are the first image of each class, those images, and their class names."""
    source, tokenizer = data.open_source(CFG, "val"), Lossless()
    images = one_per_class(source)
    return tokenizer, Knows(tokenizer.encode(images).mode(), noise), images, source.class_names


def evaluate(protocol=BASE, space=None, noise=0.0, **how):
    tokenizer, network, images, _ = knowing(noise)
    how.setdefault("setup", setup(protocol, space=space))
    return evaluate_generation(network, tokenizer, CFG, protocol, len(images), **how)


def test_samples_of_a_network_that_knows_its_targets():
    _, _, images, names = knowing()
    numbers = evaluate(space=Toy(names, images))
    assert numbers["class_accuracy"].value == 1.0
    assert numbers["class_accuracy"].n == 60
    # The same by hand: the features of 60 samples are those of the prototypes, over and over.
    space = Toy()
    labels = labels_of(torch.arange(60), len(images))
    samples = FeatureSet.empty(space.dimension).update(space(images[labels]).features)
    real = data.to_float(data.open_source(CFG, "val").batch(torch.arange(60)).images)
    expected = frechet_distance(samples, FeatureSet.empty(space.dimension).update(space(real).features))
    assert numbers["gfd"].value == pytest.approx(expected, rel=1e-3)
    assert numbers["gfd_own"].value == pytest.approx(expected, rel=1e-3)  # this tokenizer loses nothing
    assert numbers["rfd"].value == pytest.approx(0, abs=1e-9)
    assert {"rfd", "gkd", "gkd_own", "psnr", "class_accuracy_own"} <= set(numbers) <= set(quantities())
    assert numbers["gfd"].protocol != numbers["rfd"].protocol
    json.dumps(numbers.as_json(), allow_nan=False)


def test_what_fixed_numbers_of_classes_add_to_gkd_is_taken_away():
    """Of the images in any case, of samples where their labels are not drawn at random."""
    _, _, images, _ = knowing()
    space, source = Toy(), data.open_source(CFG, "val")
    of_real = class_offset(space(data.to_float(source.batch(torch.arange(60)).images)).features, source.labels)
    labels = labels_of(torch.arange(60), len(images))
    of_samples = class_offset(space(images[labels]).features, labels)
    for drawn, offset in (("balanced", of_real + of_samples), ("random", of_real)):
        numbers = evaluate(BASE.model_copy(update={"labels": drawn}))
        assert numbers["gkd_corrected"].value == pytest.approx(numbers["gkd"].value - offset, rel=1e-3)
        assert numbers["gkd_corrected"].facts["offset"] == pytest.approx(offset, rel=1e-3)
        assert offset < 0
    few = evaluate(BASE.model_copy(update={"n": 40, "labels": "random"}))["gkd_corrected"]
    assert of_real * 1.5 < few.facts["offset"] < of_real / 1.5, "40 of the 60 images, chosen at random"


def test_two_references_differ_when_the_tokenizer_loses():
    """A tokenizer that brightens brightens samples too: they are nearer to its reconstructions than to images."""
    tokenizer, network, images, _ = knowing()
    tokenizer.error = 0.3
    numbers = evaluate_generation(network, tokenizer, CFG, BASE, len(images), setup=setup(BASE))
    assert numbers["rfd"].value > 0.01
    assert numbers["gfd_own"].value < numbers["gfd"].value


def test_batch_size_does_not_matter_even_with_noise_left():
    """A network that leaves a tenth of the noise in: samples differ by id and seed, not by batch."""
    small, large = (evaluate(BASE.model_copy(update={"batch": b}), noise=0.1) for b in (7, 60))
    other_seed = evaluate(BASE.model_copy(update={"seed": 1}), noise=0.1)
    for name in ("gfd", "gkd", "gfd_own", "gkd_own"):
        assert small[name].value == pytest.approx(large[name].value, rel=1e-4, abs=1e-6)
        assert small[name].protocol == large[name].protocol != other_seed[name].protocol
    assert other_seed["gfd"].value != pytest.approx(large["gfd"].value, rel=1e-6)


def test_labels_are_balanced_and_fixed_by_id():
    assert labels_of(torch.arange(7), 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert labels_of(torch.tensor([5]), 3).tolist() == [2]
    assert labels_of(torch.arange(3), 1).tolist() == [0, 0, 0]


def test_class_accuracy_is_none_where_the_judge_does_not_know_the_classes():
    entry = evaluate()["class_accuracy"]
    assert entry.value is None
    assert "knows no classes" in entry.reason


def test_class_accuracy_is_none_where_the_generator_draws_other_classes():
    """As one imported for a thousand classes, measured on data of ten: its numbers of classes mean nothing there."""
    tokenizer, network, images, names = knowing()
    network.num_classes = 9
    numbers = evaluate_generation(network, tokenizer, CFG, BASE, 9, setup=setup(BASE, space=Toy(names, images)))
    assert f"the generator draws 9 classes, 'scenes:easy' has {len(images)}" in numbers["class_accuracy"].reason
    assert not numbers["class_accuracy_own"].absent


def test_baseline_is_reused_and_progress_told(monkeypatch):
    tokenizer, network, images, _ = knowing()
    s, told = setup(BASE), []
    baseline = reconstruction.measure(tokenizer, CFG, BASE, s)
    first = evaluate_generation(network, tokenizer, CFG, BASE, len(images), setup=s)
    monkeypatch.setattr(generation, "measure", None)  # must not be called
    again = evaluate_generation(
        network, tokenizer, CFG, BASE, len(images), lambda *x: told.append(x), setup=s, baseline=baseline
    )
    assert again["gfd"] == first["gfd"]
    assert told == [(25, 60), (50, 60), (60, 60)]


def test_diverged_network_is_an_error():
    tokenizer, network, images, _ = knowing()
    network.targets.data.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        evaluate_generation(network, tokenizer, CFG, BASE, len(images), setup=setup(BASE))


def test_inception_space_adds_scores_by_torch_fidelity():
    """A stand-in for Inception whose logits are one class per prototype: the score approaches the number of classes."""
    pytest.importorskip("torch_fidelity")
    _, _, images, names = knowing()

    class Sharp(Toy):
        def forward(self, x):
            seen = super().forward(x)
            return Seen(seen.features, seen.logits * 50)

    space = Sharp(names, images)
    space.name = "inception"
    numbers = evaluate(BASE.model_copy(update={"n": 1000}), space=space)
    assert numbers["inception_score"].value == pytest.approx(len(images), rel=0.08)  # ten parts of 100 samples


def test_precision_and_recall_in_any_space():
    pytest.importorskip("torch_fidelity")
    numbers = evaluate(BASE.model_copy(update={"n": 1000}))
    assert numbers["precision"].value == 1.0  # every sample is one of the real images
    assert 0 < numbers["recall"].value <= 1
    assert "inception_score" not in numbers
