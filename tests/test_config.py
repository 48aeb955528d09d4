"""Config: ids, phases, overrides, and one clear line for every mistake."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfmlab import api, config, presets
from vfmlab.errors import ConfigError, VfmlabError

PLAIN = presets.get("tiny_plain_vae")


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
    assert config.override(PLAIN, {"losses.vf.weight": 0}).id == PLAIN.id
    assert config.override(PLAIN, {"losses.l2": 0.5}).losses["l2"].weight == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.sampels": 5}, ["train.sampels", "5", "did you mean 'train.samples'"]),
        ({"trian.samples": 5}, ["trian", "did you mean 'train.samples' or 'diffusion.train.samples'"]),
        ({"samples": 5}, ["did you mean 'train.samples' or 'diffusion.train.samples'"]),
        ({"decoder.kind": "vit"}, ["did you mean 'tokenizer.decoder.kind'"]),
        ({"losses.percpetual.weight": 1}, ["did you mean 'losses.perceptual'"]),
        ({"protocol.guidance": 2}, ["protocol.guidance' = 2: it is a section; name its fields: protocol.guidance.scale, "]),
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
    items = [f"train.samples={samples}", f"train.lr={lr!r}", f"data.flip={json.dumps(flip)}"]
    changed = config.override(PLAIN, config.parse_assignments(items))
    assert (changed.train.samples, changed.train.lr, changed.data.flip) == (samples, lr, flip)


NAMES = st.text("abcdefghijklmnopqrstuvwxyz_.:/0123456789\u00e9\u4e2d \n'\"{}[]", max_size=24)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2), max_leaves=4,
)  # fmt: skip


def test_a_misspelt_field_of_a_file_is_named_before_the_one_that_lacks():
    tree = PLAIN.model_dump(mode="json")
    tree["train"]["sampels"] = tree["train"].pop("samples")
    with pytest.raises(ConfigError, match=r"unknown field 'train\.sampels' = 64 \(did you mean 'train\.samples'\?\)"):
        config.parse(tree)


@settings(max_examples=60)
@given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=2))
def test_whatever_is_overridden_the_answer_is_a_recipe_or_one_line(values):
    for changes in (values, {f"{section}.{name}": value for name, value in values.items() for section in ("train", "losses")}):
        message = ""
        try:
            changed = config.override(PLAIN, changes)
        except VfmlabError as error:
            message = str(error)
        else:
            assert config.parse(json.loads(changed.model_dump_json())).id == changed.id
        assert "\n" not in message
        assert len(message) < 1500


LEAVES = {"train.lr": st.floats(1e-8, 1), "seed": st.integers(0, 2**40), "trains": st.lists(st.sampled_from(["decoder.*", "*"]), min_size=1),
          "losses.l2": st.floats(0.1, 5), "diffusion.class_dropout": st.floats(0, 1), "data.flip": st.booleans(),
          "train.evaluate_at": st.lists(st.integers(1, 64), max_size=3), "vfm": st.none()}  # fmt: skip


@settings(max_examples=60)
@given(st.fixed_dictionaries({}, optional=LEAVES))
def test_overrides_round_trip(values):
    """As a dict, as its JSON, one by one, and read again from the JSON of the result: always the same recipe."""
    changed = config.override(PLAIN, values)
    assert changed == config.override(PLAIN, json.dumps(values)) == config.override(changed, values)
    assert config.parse(json.loads(changed.model_dump_json())) == changed
    one_by_one = PLAIN
    for name, value in values.items():
        one_by_one = config.override(one_by_one, config.parse_assignments([f"{name}={json.dumps(value)}"]))
    assert one_by_one.id == changed.id


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.batch": 10**9}, ["train.batch", "65536"]),
        ({"data.size": 10**6}, ["data.size", "8192"]),
        ({"data.train": 10**18}, ["data.train"]),
        ({"data.val": 10**18}, ["data.val"]),
        ({"tokenizer.channels": 10**7}, ["tokenizer.channels", "16384"]),
        ({"train.samples": 10**5000}, ["train.samples", "too large"]),
        ({"train.samples": int("9" * 25)}, ["train.samples", "too large"]),
        ({"train.betas": [0.9, 1.0]}, ["train.betas", "less than 1"]),
        ({"train.betas": [-0.1, 0.9]}, ["train.betas", "greater than or equal to 0"]),
        ({"losses.adversarial": {"weight": 1, "betas": [0, 2]}}, ["losses.adversarial.betas", "less than 1"]),
        ({"name": "n" * 300}, ["name", "at most 160"]),
        ({"losses": {"l1:a/b": 1.0}}, ["l1:a/b", "TERM:LABEL"]),
        ({"losses": {"l1:a.b": 1.0}}, ["l1:a.b", "TERM:LABEL"]),
        ({"losses": {"l1:" + "a" * 300: 1.0}}, ["TERM:LABEL"]),
        ({"stages": [{"name": "one", "losses": {"l1:../x": 1.0}}]}, ["l1:../x", "TERM:LABEL"]),
        ({"stages": [{"name": "s" * 99}]}, ["stages.0.name", "at most 40"]),
        ({"protocol.guidance.interval": [0.9, 0.1]}, ["interval", "low <= high"]),
        ({"diffusion.alignment": {"block": 99}}, ["alignment.block 99", "blocks 1 to 2"]),
        ({"train.guard_explode": 5.0}, ["train.guard_explode", "no longer there", "1000.0"]),
        ({"train.lr": math.nan}, ["train.lr"]),
        ({"train.evaluate_at": [0, 64]}, ["train.evaluate_at.0", "greater than or equal to 1"]),
        ({"equivariance.scales": []}, ["equivariance.scales", "at least 1 item"]),
        ({"equivariance.scales": [0.5, 0]}, ["equivariance.scales.1", "greater than 0"]),
        ({"tokenizer.radius": 1e-20, "diffusion.path": "sphere"}, ["tokenizer.radius", "greater than or equal to"]),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_before_anything_is_built(run, changes, words):
    with pytest.raises(VfmlabError) as caught:
        config.override(run, changes)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message


def test_dropped_fields_stay_in_the_json_and_in_the_id(run):
    """What an earlier version wrote opens, and has the id that it had then."""
    tree = json.loads(run.model_dump_json())
    assert tree["train"]["guard_explode"] == 1e3
    assert "guard_explode" not in config.Train.model_fields
    assert config.parse(tree).id == run.id
    del tree["train"]["guard_explode"]
    assert config.parse(tree).id == run.id


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_config_files_in_every_encoding_of_unicode(run, tmp_path, encoding):
    (tmp_path / "run.json").write_bytes(run.model_dump_json().encode(encoding))
    assert api.resolve(str(tmp_path / "run.json")) == run


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bytes(range(256)), "not JSON"), (b"[" * 100_000 + b"]" * 100_000, "levels deep"), (b'{"a":' * 1000 + b"1" + b"}" * 1000, "levels deep"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"), (b"", "not JSON"), (b"[1]", "list"), (b'{"seed": NaN}', "NaN"),
    ],
)  # fmt: skip
def test_config_files_that_are_none_are_one_line(tmp_path, content, words):
    (tmp_path / "run.json").write_bytes(content)
    for read in (lambda: api.resolve(tmp_path / "run.json"), lambda: api.resolve("tiny_vfm_vae", content.decode("latin-1") or "[0]")):
        with pytest.raises(ConfigError) as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=words):
        api.resolve(tmp_path / "run.json")


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 5000, "NaN", "1e999", "{", '"'])
def test_assignments_of_anything_are_a_recipe_or_one_line(run, text):
    with pytest.raises(ConfigError) as caught:
        config.override(run, config.parse_assignments([f"train.samples={text}"]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_home_is_expanded_wherever_a_path_comes_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    changed = api.resolve("tiny_vfm_vae", {"data.source": "parquet:~/images", "vfm": {"weights": "~/w.safetensors"}})
    assert changed.data.source == f"parquet:{tmp_path}/images"
    assert changed.vfm.weights == f"{tmp_path}/w.safetensors"
    assert api.resolve("tiny_t2i_vfm_vae", {"diffusion.text.encoder": "pocket:~/tower"}).diffusion.text.encoder == f"pocket:{tmp_path}/tower"
    (tmp_path / "run.json").write_text(changed.model_dump_json())
    assert api.resolve("~/run.json") == api.resolve(changed.last) == changed


def test_assignments_need_a_sign():
    with pytest.raises(ConfigError, match="field=value"):
        config.parse_assignments(["train.samples"])


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'pocket_vfm_vae'"):
        presets.get("pocket_vfmvae")


def test_a_seed_given_twice_wins_or_is_refused():
    """A notebook's own `seed = 0` is no second source; two different ones are."""
    assert api.resolve("tiny_plain_vae", {"seed": 3}).seed == 3
    assert api.resolve("tiny_plain_vae", '{"seed": 1}', seed=0).seed == 1
    assert api.resolve("tiny_plain_vae", {"seed": 1}, seed=1).seed == 1
    assert api.resolve("tiny_plain_vae", None, seed=2).seed == 2
    for overrides in ({"seed": 1}, '{"seed": 0}'):
        with pytest.raises(ConfigError, match="seed = 2, and overrides say seed = "):
            api.resolve("tiny_plain_vae", overrides, seed=2)


def test_another_kind_leaves_the_former_ones_fields():
    """What both have stays; a field that is named stays too, and is refused where the new kind lacks it."""
    run = api.resolve("tiny_vfm_vae", {"tokenizer.decoder.kind": "vit", "losses.multiscale": 0})
    assert run.tokenizer.decoder.kind == "vit"
    assert not hasattr(run.tokenizer.decoder, "blocks")
    wide = api.resolve("tiny_vfm_vae", {"diffusion.network": {"kind": "sit"}}).diffusion.network
    assert (wide.kind, wide.width, wide.depth) == ("sit", 32, 2)
    flat = api.resolve("tiny_rae+sphere", {"diffusion.path.kind": "linear", "tokenizer.radius": None})
    assert flat.diffusion.path is None or flat.diffusion.path.kind == "linear"
    with pytest.raises(ConfigError, match="set diffusion.path=sphere, or tokenizer.radius=null"):
        api.resolve("tiny_rae+sphere", {"diffusion.path.kind": "linear"})
    with pytest.raises(ConfigError, match=r"unknown field 'tokenizer.decoder.gelu' = 'erf'"):
        api.resolve("tiny_vfm_vae", {"tokenizer.decoder.kind": "vit", "losses.multiscale": 0, "tokenizer.decoder.gelu": "erf"})


@pytest.mark.parametrize(("changes", "said"), [
    ({"train.samples": 10}, "train.samples = 10 reaches no stage of tiny_aligntok: 'latent' sets its own; set stages.latent.train.samples"),
    ({"train": {"samples": 10}}, "set stages.latent.train.samples"),
    ({"trains": ["decoder.*"]}, "set stages.latent.trains"),
])
def test_a_change_that_no_stage_reads_is_said(changes, said):
    with pytest.warns(UserWarning, match=re.escape(said)):
        config.override(presets.get("tiny_aligntok"), changes)


def test_an_empty_section_is_said_to_change_nothing(recwarn):
    """A variant's guidance is not taken away by it; a section that is off is opened by it."""
    with pytest.warns(UserWarning, match=re.escape("protocol.guidance = {} names no field, so that section stays as it is")):
        run = config.override(presets.get("tiny_multi_layer_rae_raev2"), {"protocol.guidance": {}})
    assert run.protocol.guidance.kind == "internal"
    recwarn.clear()
    assert config.override(presets.get("tiny_multi_layer_rae"), {"tokenizer.fusion": {}}).tokenizer.fusion is not None
    assert not recwarn


def test_a_change_that_some_stage_reads_is_taken(recwarn):
    run = config.override(presets.get("tiny_aligntok"), {"train.batch": 8, "stages.latent.train.samples": 8})
    assert [phase.train.batch for phase in run.phases()[:3]] == [8, 8, 8]
    assert run.phases()[0].budget == 8
    assert not recwarn
