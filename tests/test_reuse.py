"""Reuse of an encoder: the published lists, what runs at them, steps in parallel, training with shared encodings, the study."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from vfmlab import api, presets
from vfmlab.cli.main import main
from vfmlab.config import Guidance, Protocol, Sampler, override
from vfmlab.config.stale import Stale
from vfmlab.diffusion import path
from vfmlab.diffusion.ddt import DDT
from vfmlab.diffusion.objective import Flow
from vfmlab.diffusion.reuse import KEYS_50, Reused, groups, scaled_keys
from vfmlab.diffusion.sampling import sample
from vfmlab.errors import ConfigError
from vfmlab.evaluation.protocol import dump
from vfmlab.seeding import SampleRandom, StepRandom
from vfmlab.studies import reuse
from vfmlab.training.check import check


def ddt():
    torch.manual_seed(0)
    network = DDT(DDT.Config(width=16, depth=1, heads=2, head_width=16, head_depth=1, head_heads=2), (4, 4, 4), 3)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network


def test_groups_as_published(golden):
    c = json.loads((golden / "continuous" / "formulas.json").read_text())["faster_diffusion"]
    assert list(KEYS_50) == c["keys_50"]
    assert groups(KEYS_50, 50) == c["groups_50"]
    assert groups(range(0, 50, 4), 50) == c["mod4_groups"]
    assert (scaled_keys(50), scaled_keys(20), scaled_keys(3)) == (KEYS_50, (0, 1, 2, 4, 6, 10, 14), (0, 1, 2))


@torch.no_grad()
def test_the_encoder_runs_at_key_steps():
    reused, x = Reused(ddt(), KEYS_50), torch.randn(2, 4, 4, 4)
    for k in range(50):
        reused(x, torch.full((2,), 1 - k / 50), torch.tensor([0, 1]))
    assert (reused.encodings, reused.evaluations) == (9, 50)


def test_lists_and_strides_agree():
    network, labels = ddt(), torch.tensor([0, 1])

    def draw(reuse):
        return sample(network, labels, SampleRandom(0, range(2)), Sampler(steps=6, reuse=reuse), Guidance())

    assert torch.equal(draw((0, 2, 4)), draw(2))
    assert torch.equal(draw(tuple(range(6))), draw(None))
    assert not torch.allclose(draw((0, 1, 2)), draw((0, 3, 4)))
    for keys in ((), (1, 2), (0, 2, 2), (0, 3, 1)):
        with pytest.raises(ValidationError, match="key steps rise from 0"):
            Sampler(reuse=keys)


@torch.no_grad()
def test_steps_in_parallel_look_at_the_state_of_their_encoding():
    network, labels = ddt(), torch.tensor([0, 1])

    def draw(reuse, on=network, guidance=None, **more):
        return sample(on, labels, SampleRandom(0, range(2)), Sampler(steps=6, reuse=reuse, **more), guidance or Guidance())

    torch.testing.assert_close(draw(1, parallel=True), draw(1), atol=1e-5, rtol=0)
    assert not torch.allclose(draw((0, 3), parallel=True), draw((0, 3)), atol=1e-3)
    torch.testing.assert_close(draw((0, 3), parallel=True), draw(3, parallel=True), atol=1e-5, rtol=0)
    seen = []

    class Blind(DDT):  # its head looks at time and tokens only: then both ways are one
        def head(self, x, t, tokens):
            seen.append(len(x))
            return super().head(torch.zeros_like(x), t, tokens)

    blind = Blind(network.config, (4, 4, 4), 3)
    blind.load_state_dict(network.state_dict())
    torch.testing.assert_close(draw((0, 2), blind, parallel=True), draw((0, 2), blind), atol=1e-5, rtol=0)
    assert seen == [4, 8, *[2] * 6], "two batches of 2 and 4 steps, then one a step"
    some = Guidance(scale=2.0, interval=(0.4, 1.0))
    torch.testing.assert_close(draw((0, 2), blind, some, parallel=True), draw((0, 2), blind, some), atol=1e-5, rtol=0)
    assert Sampler(parallel=False) == Sampler()
    for fields in ({}, {"reuse": 2, "solver": "heun"}):
        with pytest.raises(ValidationError, match="parallel: runs the steps that share an encoding"):
            Sampler(parallel=True, **fields)


@pytest.mark.parametrize("way", [{"reuse": 3}, {"reuse": (0, 1, 4)}, {"reuse": 3, "parallel": True}])
def test_a_null_label_is_drawn_the_same_beside_classes(way):
    """Encodings are made anew where guidance ends; whether it acts at all must not depend on the other rows."""
    network, labels, guidance = ddt(), torch.tensor([0, 3, 1]), Guidance(scale=2.0, interval=(0.0, 0.7))
    sampler = Sampler(steps=6, **way)
    whole = sample(network, labels, SampleRandom(0, range(3)), sampler, guidance)
    for k in range(3):
        alone = sample(network, labels[k : k + 1], SampleRandom(0, [k]), sampler, guidance)
        torch.testing.assert_close(alone, whole[k : k + 1], atol=1e-5, rtol=0)


REFUSED = {
    "sampler.reuse 2: network 'lightningdit' is not split": ("tiny_plain_vae", {"protocol.sampler.reuse": 2}),
    "sampler.solver 'sde' has no form on the path 'sphere'": ("tiny_dino_sae", {"protocol.sampler.solver": "sde"}),
    "sampler.parallel on the path 'sphere'": ("tiny_dino_sae", {"protocol.sampler": {"reuse": 2, "parallel": True}}),
    "sampler.prior_noise 0.1 on the path 'sphere'": ("tiny_dino_sae", {"protocol.sampler": {"reuse": 2, "prior_noise": 0.1}}),
    "solver 'dopri5' chooses its own steps": ("tiny_vfm_vae_ddt", {"protocol.sampler": {"reuse": 2, "solver": "dopri5"}}),
    "sampler.reuse 2 with guidance.kind 'internal'": ("tiny_multi_layer_rae_raev2", {"protocol.sampler.reuse": 2, "protocol.guidance.kind": "internal"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_samplers_that_a_network_has_no_form_of_are_refused_before_anything_is_trained(message, tmp_path):
    preset, changes = REFUSED[message]
    with pytest.raises(ConfigError, match=message):
        check(override(presets.get(preset), changes).phases(), tmp_path)


def test_prior_noise_as_published(golden):
    """A field of zeros: the state moves only where some of the first noise is added."""
    c = json.loads((golden / "continuous" / "formulas.json").read_text())["faster_diffusion"]
    still = SimpleNamespace(encode=lambda x, t, y: [x], head=lambda x, t, tokens: (torch.zeros_like(x), []), latent_shape=(4, 4, 4), num_classes=3)
    noise, states = torch.randn(2, 4, 4, 4), []
    sampler = Sampler(steps=50, reuse=KEYS_50, prior_noise=c["prior_noise_weight"])
    sample(still, torch.tensor([0, 1]), None, sampler, noise=noise, callback=lambda n, total, t, x, estimate: states.append(x))
    moved = [x - before for before, x in pairwise([noise, *states])]
    assert [k for k, step in enumerate(moved) if step.any()] == c["prior_noise_steps"]
    for k in c["prior_noise_steps"]:
        torch.testing.assert_close(moved[k], c["prior_noise_weight"] * noise, atol=1e-6, rtol=0)


def test_prior_noise_belongs_to_reuse_on_the_straight_path():
    assert dump(Protocol())["sampler"].keys() == {"solver", "steps", "shift"}, "earlier hashes stay"
    for fields in ({}, {"reuse": 2, "solver": "heun"}):
        with pytest.raises(ValidationError, match="prior_noise 0.003: makes up for detail that reuse loses"):
            Sampler(prior_noise=0.003, **fields)
    network = ddt()
    network.path = path.make("sphere", radius=2.0)
    with pytest.raises(ConfigError, match="prior_noise 0.003 on the path 'sphere': added noise leaves the sphere; set prior_noise=null"):
        sample(network, torch.tensor([0]), SampleRandom(0, [0]), Sampler(reuse=2, prior_noise=0.003))


def test_training_shares_encodings():
    """The encoder sees t; the head sees its tokens at times in ((1 - span) t, t) of the same way."""
    seen = {}

    class Split:
        num_classes = 3

        def encode(self, x, t, y):
            seen["encoder"] = (x, t)
            return [t[:, None, None].expand(-1, 2, 4)]

        def head(self, x, t, tokens):
            seen["head"] = (x, t, tokens)
            return torch.zeros_like(x), []

    plan = override(presets.get("tiny_vfm_vae_ddt"), {"diffusion.stale": {"heads": 3, "span": 0.5}}).diffusion
    z, labels = torch.randn(5, 4, 4, 4), torch.zeros(5, dtype=torch.long)
    terms = Flow(plan).terms(Split(), z, labels, StepRandom(0, 0, 5))
    (x, t), (later_x, later, tokens) = seen["encoder"], seen["head"]
    assert later.shape == (15,)
    assert torch.equal(tokens[:, 0, 0], t.repeat(3))
    share = later / t.repeat(3)
    assert (share > 0.5).all()
    assert (share <= 1).all()
    assert share.std() > 0.05
    v = ((x - z) / t.view(-1, 1, 1, 1)).repeat(3, 1, 1, 1)  # of the line from z through x
    torch.testing.assert_close(later_x, z.repeat(3, 1, 1, 1) + later.view(-1, 1, 1, 1) * v, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms.velocity, path.velocity_loss(torch.zeros_like(v), v), atol=1e-3, rtol=1e-3)
    half = Flow(plan).terms(Split(), z[2:], labels[2:], StepRandom(0, 0, 5, slice(2, 5)))
    torch.testing.assert_close(half.velocity.view(3, 3), terms.velocity.view(3, 5)[:, 2:])
    with pytest.raises(ConfigError, match="stale: network 'lightningdit' does not predict velocities by an encoder"):
        override(presets.get("tiny_vfm_vae"), {"diffusion.stale": {}})
    with pytest.raises(ConfigError, match="stale: alignment reads the whole network"):
        override(presets.get("tiny_vfm_vae+ddt"), {"diffusion.stale": {}, "diffusion.alignment": {"block": 1}})
    assert Stale() == Stale(heads=4, span=1.0)


def test_equal_quality_is_read_off_between_neighbours():
    rows = [{"encoder": f"{n}", "steps": n, "encodings": n, "head": n, "seconds an image": n / 10, "gFD": gfd} for n, gfd in ((4, 9.0), (8, 5.0))]
    ways = [{"encoder": name, "steps": 8, "encodings": 4, "head": 8, "seconds an image": 0.25, "gFD": gfd} for name, gfd in (("a", 7.0), ("b", 4.0))]
    a, b = reuse.equal_quality(rows + ways)
    assert a["seconds without reuse"] == pytest.approx(0.6)
    assert a["speed-up"] == pytest.approx(2.4)
    assert (b["seconds without reuse"], b["speed-up"]) == (None, None)


@pytest.mark.parametrize("given", [{"every": ()}, {"every": (2, 0)}, {"every": (1,)}, {"n": 0}, {"batch": 0}])
def test_numbers_that_no_study_can_have_are_one_line(given, tmp_path):
    with pytest.raises(ConfigError, match="every = .*, n = .*, batch = .*: give"):
        reuse.records("any", tmp_path, **given)


def test_the_study_at_tiny(tmp_path, capsys):
    changes = {"data.train": 48, "data.val": 16, "vfm.weights": "random", "protocol.n": 8, "protocol.sampler.steps": 6, "train.samples": 8,
               "diffusion.train.samples": 16, "diffusion.train.evaluate_at": [], "diffusion.stale": {"heads": 2}}
    run = override(presets.get("tiny_vfm_vae_ddt"), changes)
    list(api.train(run, tmp_path))
    command = ["reuse", run.id, "--root", str(tmp_path), "--out", str(tmp_path / "new" / "page.md"), "--n", "8", "--every", "2", "--batch", "4"]
    assert main(command) == 0
    record = json.loads((tmp_path / "new" / "page.json").read_text())
    counts = {r["encoder"]: (r["encodings"], r["head"]) for r in record["records"]}
    assert counts == {"every step": (6, 6), "every 2 steps": (3, 6), "key steps": (5, 6), "key steps, parallel": (5, 6), "4 steps": (4, 4), "3 steps": (3, 3)}
    assert len({r["protocol"] for r in record["records"]}) == 6
    assert "At equal quality" in (tmp_path / "new" / "page.html").read_text()
    sphere = override(presets.get("tiny_dino_sae"), {k: v for k, v in changes.items() if k != "diffusion.stale"})
    list(api.train(sphere, tmp_path))
    rows = reuse.records(sphere.id, tmp_path, (2,), 8, 4, 1)
    assert [r["encoder"] for r in rows] == ["every step", "every 2 steps", "key steps", "4 steps", "3 steps"], "none in parallel on a sphere"
    whole = SimpleNamespace(**vars(api.load_diffusion(run.id, tmp_path)))
    whole.network.encode = None
    with pytest.raises(ConfigError, match="is not split into encoder and head"):
        Reused(whole.network, 2)
