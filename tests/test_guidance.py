"""Guidance: the formula, where it acts, and how often the network runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vfmlab import api, config, presets, runs
from vfmlab.config import Guidance, override
from vfmlab.diffusion import path
from vfmlab.diffusion.guidance import Guided, Steered
from vfmlab.errors import CheckpointError, ConfigError, RunError
from vfmlab.training.check import check
from vfmlab.weights import load

NULL = 3


class Counting:
    """v = label + t everywhere; remembers the batch sizes it was called with."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, y):
        self.batches.append(len(x))
        return torch.ones_like(x) * (y.float() + t)[:, None, None, None]


def field(scale=2.0, labels=(0, 1), **more):
    network = Counting()
    return network, Guided(network, torch.tensor(labels), Guidance(scale=scale, **more), NULL)


X = torch.zeros(2, 4, 2, 2)


def test_formula_in_one_doubled_batch():
    network, guided = field(scale=2.5)
    v = guided(X, 0.5)
    expected = torch.tensor([NULL + 2.5 * (label - NULL) + 0.5 for label in (0, 1)])
    torch.testing.assert_close(v, expected[:, None, None, None].expand_as(X))
    assert network.batches == [4]


@pytest.mark.parametrize(("t", "acts"), [(0.19, False), (0.2, True), (0.7, True), (0.71, False), (1.0, False)])
def test_interval_includes_its_edges(t, acts):
    network, guided = field(interval=(0.2, 0.7))
    v = guided(X, float(torch.tensor(t)))  # with the rounding of a time in fp32
    assert network.batches == [4 if acts else 2]
    assert torch.allclose(v[0], torch.tensor(t + (NULL + 2.0 * (0 - NULL) if acts else 0.0)))


@pytest.mark.parametrize(("scale", "labels"), [(1.0, (0, 1)), (4.0, (NULL, NULL))])
def test_inactive_guidance_evaluates_once(scale, labels):
    network, guided = field(scale, labels)
    guided(X, 0.5)
    assert network.batches == [2]


def test_scale_zero_is_unconditional():
    _, guided = field(scale=0.0)
    assert torch.allclose(guided(X, 0.5), torch.tensor(NULL + 0.5))


def test_null_labels_among_others_stay_unconditional():
    _, guided = field(scale=3.0, labels=(1, NULL))
    assert torch.allclose(guided(X, 0.0)[1], torch.tensor(float(NULL)))


def test_channels_limit_what_is_guided():
    _, guided = field(channels=3)
    v = guided(X, 0.5)
    _, all_channels = field()
    _, none = field(scale=1.0)
    assert torch.equal(v[:, :3], all_channels(X, 0.5)[:, :3])
    assert torch.equal(v[:, 3:], none(X, 0.5)[:, 3:])


def test_an_empty_interval_is_refused():
    with pytest.raises(ValueError, match="low <= high"):
        field(interval=(0.8, 0.2))


# -- away from what was never trained ----------------------------------------------------------------------------------

NEVER = r"guidance\.scale = {scale}: .*null label, which {kind}\.class_dropout = 0 never trains; set the scale to 1, or train"


@pytest.mark.parametrize(("preset", "kind", "scale"), [("tiny_plain_vae", "diffusion", 3), ("tiny_plain_vae", "diffusion", 0.5), ("tiny_ar", "ar", 3)])
def test_a_null_label_that_was_never_trained_guides_nothing(preset, kind, scale, tmp_path):
    """Refused before training, where samples are drawn, and where a run is evaluated."""
    plain = override(presets.get(preset), {f"{kind}.class_dropout": 0.0, "protocol.guidance.scale": 1.0})
    guided = override(plain, {"protocol.guidance.scale": scale})
    run = runs.create(plain.last, tmp_path)
    model = SimpleNamespace(run=plain.last, num_classes=3, class_names=["a", "b", "c"])
    cases = [lambda: check(guided.phases()), lambda: api.sampling_protocol(model, [0], guidance=scale),
             lambda: api.evaluate(run.path, tmp_path, {"guidance.scale": scale}),
             lambda: api.sample_npz(run.path, 8, root=tmp_path, protocol={"guidance.scale": scale})]  # fmt: skip
    for call in cases:
        with pytest.raises(ConfigError, match=NEVER.format(scale=scale, kind=kind)) as caught:
            call()
        assert "\n" not in str(caught.value)
    check(plain.phases())
    assert api.sampling_protocol(model, [0], guidance=1).guidance.scale == 1


def test_a_weaker_model_that_is_not_there_is_told_before_the_first_step(tmp_path):
    """Previews are guided by it: the run would end at the first of them."""
    guided = override(presets.get("tiny_plain_vae"), {"protocol.guidance": {"kind": "auto", "weaker": "weak", "scale": 2.0}})
    with pytest.raises(RunError, match="unknown run 'weak'"):
        check(guided.phases(), tmp_path)
    runs.create(override(presets.get("tiny_plain_vae"), {"name": "weak"}).last, tmp_path)
    with pytest.raises(CheckpointError, match="has no weights yet"):
        check(guided.phases(), tmp_path)
    check(guided.phases()[:1], tmp_path)  # a tokenizer's previews are not guided


def test_other_guidance_and_other_runs_need_no_trained_null_label():
    plain = override(presets.get("tiny_plain_vae"), {"diffusion.class_dropout": 0.0})
    plain.last.check_guidance(Guidance(kind="auto", weaker="another", scale=3))
    plain.phases()[0].check_guidance(Guidance(scale=3))  # a tokenizer
    released = {"train": None, "imported": {"name": "made-up"}, "class_dropout": 0.0}
    section = {**plain.diffusion.model_dump(mode="json"), **released}
    imported = config.parse({**plain.model_dump(mode="json"), "diffusion": section})
    imported.last.check_guidance(Guidance(scale=3))
    unguided = override(presets.get("tiny_ar"), {"ar.class_dropout": 0.0})
    unguided.last.check_guidance(Guidance(scale=0.5))  # 1 or less is none there


def model(gain=1.0, classes=3, size=8, way=path.LINE):
    """A generator whose tokenizer's latents are `gain` times the pixels."""
    network = torch.nn.Linear(1, 1)
    network.latent_shape, network.num_classes, network.path = (3, 8, 8), classes, way
    tokenizer = SimpleNamespace(size=size, stat_mean=torch.zeros(3), encode=lambda x: SimpleNamespace(mode=lambda: gain * x))
    return SimpleNamespace(network=network, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"classes": 4}, "has latents, classes and pixels .*; name a run on the same tokenizer and data"),
        ({"size": 16}, "has latents, classes and pixels .*; name a run on the same tokenizer and data"),
        ({"gain": 1.1}, r"has other latents than the model itself \(they differ by up to 0\.1\); name a run on the same tokenizer and data"),
        ({"way": path.make("sphere", radius=2.0)}, r"goes the path \('sphere', 2\.0\), the model itself \('linear', None\)"),
    ],
)
def test_a_weaker_model_on_other_latents_or_another_path_is_one_line(other, line, monkeypatch, tmp_path):
    own, guidance = model(), Guidance(kind="auto", weaker="weak", scale=2.0)
    monkeypatch.setattr(load, "load_diffusion", lambda *args, **more: model(**other))
    with pytest.raises(ConfigError, match=f"guidance.weaker 'weak' {line}"):
        load.with_weaker(own.network, own.tokenizer, guidance, tmp_path)
    monkeypatch.setattr(load, "load_diffusion", lambda *args, **more: model())
    load.with_weaker(own.network, own.tokenizer, guidance, tmp_path)
    assert len(own.network.weaker) == 1


def test_a_weaker_model_is_sought_beside_the_run_that_it_guides(monkeypatch, tmp_path):
    """A loaded run is sampled without a root: that of the run counts, not the default folder."""
    run = presets.get("tiny_plain_vae").last
    folder = runs.create(run, tmp_path)
    sought = []

    def stop(network, tokenizer, guidance, root):
        sought.append(root)
        raise ConfigError("seen")

    monkeypatch.setattr(api, "with_weaker", stop)
    for where, root in ((folder, tmp_path), (None, "runs")):
        with pytest.raises(ConfigError, match="seen"):
            next(api.sample(api.LoadedDiffusion(torch.nn.Linear(1, 1), None, run, 2, ["a", "b"], where), [0]))
        assert sought[-1] == root


def test_steering_is_no_arithmetic_of_16_bits():
    """Networks under autocast give bf16; their difference is scaled in fp32, as against the null label."""
    v, w = (torch.randn(4, 3, 2, 2).bfloat16() for _ in range(2))
    steered = Steered(lambda x, t, y: (v, w), 3.0)(v, torch.ones(4), torch.zeros(4))
    assert torch.equal(steered, w.float() + 3.0 * (v.float() - w.float()))
