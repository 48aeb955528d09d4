"""Config: ids, phases, overrides, and one clear line for every mistake."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfmlab import api, config, presets
from vfmlab.errors import ConfigError, VfmlabError


@pytest.fixture(scope="module")
def run():
    return presets.get("tiny_vfm_vae")


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_plain_json_and_comes_back_the_same(name):
    run = presets.get(name)
    again = config.parse(json.loads(run.model_dump_json()))
    assert again == run
    assert again.id == run.id
    assert run.id.startswith(f"{name}-")
    assert len(run.id.rpartition("-")[2]) == 8
    assert presets.summary(name)


def test_phases_share_the_tokenizer(run):
    other = config.override(run, {"diffusion.train.lr": 5e-4})
    first, last = run.phases()
    assert (first.kind, last.kind) == ("tokenizer", "diffusion")
    assert last.parent == first.id == other.last.parent
    assert run.id != other.id
    assert first.recipe.phases() == [first]
    assert first.parent is None


def test_protocol_decides_numbers_not_weights(run):
    assert config.override(run, {"protocol.n": 16}).id == run.id
    assert config.override(run, {"train.lr": 1e-4}).id != run.id
    assert config.override(run, {"seed": 7}).last.parent != run.last.parent


def test_a_loss_of_weight_zero_is_no_loss(run):
    without = config.override(run, {"losses.vf.weight": 0})
    assert "vf" not in without.losses
    plain = presets.get("tiny_plain_vae")
    assert config.override(plain, {"losses.vf.weight": 0}).id == plain.id
    assert config.override(plain, {"losses.l2": 0.5}).losses["l2"].weight == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.sampels": 5}, ["train.sampels", "5", "did you mean 'train.samples'"]),
        ({"trian.samples": 5}, ["trian", "did you mean 'train'"]),
        ({"train.samples": "many"}, ["train.samples", "many", "integer"]),
        ({"train.samples": -1}, ["train.samples", "-1", "greater than or equal to 1"]),
        ({"tokenizer.channel": 4}, ["tokenizer.channel", "did you mean 'tokenizer.channels'"]),
        ({"tokenizer.method": "vfmvae"}, ["unknown tokenizer 'vfmvae'", "did you mean 'vfm_vae'"]),
        ({"tokenizer.decoder.kind": "progresive"}, ["unknown decoder 'progresive'", "did you mean 'progressive'"]),
        ({"losses.vff.weight": 1}, ["losses.vff", "did you mean 'losses.vf'"]),
        ({"data.size": 18}, ["data.size 18 is not divisible by tokenizer.factor 4", "16 or 20"]),
        ({"protocol.sampler.solver": "eulr"}, ["protocol.sampler.solver", "eulr", "euler"]),
    ],
)
def test_mistakes_are_one_line_with_field_value_and_way_out(run, changes, words):
    with pytest.raises(VfmlabError) as caught:
        config.override(run, changes)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_overrides_from_papermill_are_json(run):
    assert config.override(run, '{"train.samples": 16}').train.samples == 16
    assert config.override(run, "{}") is run
    with pytest.raises(ConfigError, match="not JSON"):
        config.override(run, "train.samples=3")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        config.override(run, "[1]")


@given(st.integers(1, 10**9), st.floats(1e-8, 1.0), st.booleans())
def test_assignments_and_overrides_agree(samples, lr, flip):
    run = presets.get("tiny_plain_vae")
    items = [f"train.samples={samples}", f"train.lr={lr!r}", f"data.flip={json.dumps(flip)}"]
    changed = config.override(run, config.parse_assignments(items))
    assert (changed.train.samples, changed.train.lr, changed.data.flip) == (samples, lr, flip)


def test_assignments_need_a_sign():
    with pytest.raises(ConfigError, match="field=value"):
        config.parse_assignments(["train.samples"])


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'pocket_vfm_vae'"):
        presets.get("pocket_vfmvae")


def test_a_seed_given_twice_wins_or_is_refused():
    """A notebook's own `seed = 0` is no second source; two different ones are."""
    assert api.resolve("tiny_plain_vae", '{"seed": 1}', seed=0).seed == 1
    assert api.resolve("tiny_plain_vae", {"seed": 1}, seed=1).seed == 1
    assert api.resolve("tiny_plain_vae", None, seed=2).seed == 2
    for overrides in ({"seed": 1}, '{"seed": 0}'):
        with pytest.raises(ConfigError, match="seed = 2, and overrides say seed = "):
            api.resolve("tiny_plain_vae", overrides, seed=2)
