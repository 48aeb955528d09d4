"""Every tokenizer has presets at every tier, and every `tiny` preset runs through all its phases to samples and numbers."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from pathlib import Path

import pytest
from tiny import common

from vfmlab import api, presets, runs
from vfmlab.config import override
from vfmlab.errors import ConfigError
from vfmlab.presets import variants
from vfmlab.presets.tiers import EPOCH
from vfmlab.registry import TOKENIZERS

TIERS = ("tiny", "pocket", "photo", "small", "paper")
TINY = [name for name in presets.names() if name.startswith("tiny_")]


def shorter(run):
    """Two steps of every phase, and no evaluation on the way."""
    kind = "ar" if run.ar else "diffusion"
    more = {f"{kind}.train.samples": 16, f"{kind}.train.evaluate_at": []} if run.generator else {}
    short = {f"stages.{stage.name}.train.samples": 16 for stage in run.stages} or {"train.samples": 16}
    return override(run, common(run) | short | more)


@pytest.mark.parametrize("method", TOKENIZERS.names())
def test_every_tokenizer_has_a_preset(method):
    """A tiny one; larger ones of its name are of the method, too."""
    tiers = [tier for tier in TIERS if f"{tier}_{method}" in presets.names()]
    assert tiers[0] == "tiny"
    for tier in tiers:
        run = presets.get(f"{tier}_{method}")
        assert (run.tokenizer.method, run.tier) == (method, tier)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_says_what_to_know_before_it_is_started(name):
    row = presets.row(name)
    assert f" train {name}" in row.command
    assert {"command", "takes", "expect"} <= row.facts.keys()
    assert row.about.endswith((".", "?", ")", "?"))
    recipe = presets.get(name)
    assert (recipe.name, recipe.tier) == (name, row.tier)


@pytest.mark.parametrize("name", [name for name in presets.names() if name.startswith("photo_")])
def test_rows_of_the_photo_tier_differ_in_the_tokenizer_alone(name):
    run, plain = presets.get(name), presets.get("photo_plain_vae")
    if run.tokenizer.quantised:  # its generator, if it has one, draws codes
        assert (run.data, run.protocol.features) == (plain.data, plain.protocol.features)
        assert run.ar is None or run.ar.train.samples == plain.diffusion.train.samples
    else:
        assert (run.data, run.diffusion, run.protocol) == (plain.data, plain.diffusion, plain.protocol)
        assert run.diffusion.train.optimizer == "muon"
    tokenizer = [phase for phase in run.phases() if phase.kind == "tokenizer"]
    assert sum(phase.train.samples for phase in tokenizer) == plain.train.samples
    if run.tokenizer.method in ("rae", "fae", "pae", "svg"):  # wide maps need no widening before the same decoder
        wide = {"decompress": "conv", "decompress_factor": 1}
        assert run.tokenizer.decoder == plain.tokenizer.decoder.model_copy(update=wide)
    elif run.tokenizer.method not in ("sd_vae", "vfmtok", "vqrae", "gae", "epsilon_vae"):  # these have decoders of their own
        assert run.tokenizer.decoder == plain.tokenizer.decoder
    assert run.vfm is None or run.vfm.name not in run.protocol.features, "the judge is of another family"


# Runs of earlier versions are found by these.
IDS = {
    "tiny_vfm_vae_stages": "880b4b0c 43384556 5c6d3003 4673707c 2a3afd0e",
    "tiny_va_vae": "e05ec853 ffb327c0",
    "tiny_vfm_vae_ddt": "3be50a49 43c5772f",
    "tiny_plain_vae_repa_e": "a7a3e4e0 aae3a85f",
    "pocket_vfm_vae": "1e929b51 8477f473",
    "pocket_vfm_vae_discrete": "cf4b3006 b31c31d3",
    "pocket_vfm_vae_last_layer": "520e21c3 1faf923b",
    "pocket_aligntok": "75da1b0a bf58cda0 f91a4749 12c0a5af",
    "pocket_rae": "ea0072ac 1af85cb1",
    "pocket_judge": "887d4852",
    "small_vfm_vae_joint": "202665d0 3e822bfa 384c45f1 0bdb55a4 b981daa9",
    "paper_vfm_vae_joint": "09b0850d c14de5dc 85328065 ad13c27b 9ca0ae6c",
    "paper_fae": "a6adb6dc 8f588414 1821e712",
    "paper_sd_vae": "d9af9d11 776a24f6",
}


@pytest.mark.parametrize("name", IDS)
def test_ids_of_presets_stay(name):
    assert [phase.id.rpartition("-")[2] for phase in presets.get(name).phases()] == IDS[name].split()


# When AdamW was the optimiser of pocket's generators.
BEFORE_MUON = {"pocket_vfm_vae": "82438ee8", "pocket_vfm_vae_discrete": "b8f8d7de", "pocket_vfm_vae_last_layer": "8cc9b638",
               "pocket_aligntok": "f4164e24", "pocket_rae": "7d68de3f"}


@pytest.mark.parametrize("name", BEFORE_MUON)
def test_runs_of_the_former_optimiser_are_found_by_naming_it(name):
    assert presets.get(name, {"diffusion.train.optimizer": "adamw"}).id == f"{name}-{BEFORE_MUON[name]}"


@pytest.mark.parametrize("name", [name for name in presets.names() if presets.row(name).of and not presets.row(name).config])
def test_a_preset_that_is_another_with_variants_is_the_same_run(name):
    assert presets.get(presets.row(name).of).id == presets.get(name).id


def test_names_are_read_from_left_to_right():
    plain, rae = presets.get("pocket_plain_vae"), presets.get("pocket_rae")
    both = presets.get("pocket_rae@pocket_plain_vae")
    assert (both.diffusion, both.protocol) == (plain.diffusion, plain.protocol)
    assert [phase.id for phase in both.phases()[:-1]] == [phase.id for phase in rae.phases()[:-1]]
    assert presets.get("pocket_rae@pocket_plain_vae+repa") == variants.apply(both, "repa")
    round_ = presets.get("pocket_dino_sae@pocket_plain_vae")  # latents on a sphere stay there
    assert (round_.tokenizer, round_.diffusion.path.kind) == (presets.get("pocket_dino_sae").tokenizer, "sphere")
    assert round_.diffusion == presets.get("pocket_rae@pocket_plain_vae+sphere").diffusion
    aligned = presets.get("pocket_rae@pocket_plain_vae_repa")
    assert aligned.diffusion.tokenizer_of is None
    assert aligned.last.parent == rae.last.parent, "the tokenizer is the first one's, by name too"
    twice = presets.get("pocket_vfm_vae+no_style+d16")
    assert (twice.tokenizer.channels, twice.tokenizer.decoder.style) == (16, False)
    assert presets.get("pocket_vfm_vae+repa+ddt").last.parent == presets.get("pocket_vfm_vae").last.parent


@pytest.mark.parametrize(("name", "term"), [("tiny_vfm_vae_stages+no_vf", "vf"), ("paper_vfm_vae+no_vf", "vf"),
                                            ("pocket_aligntok+no_multiscale", "multiscale"), ("pocket_aligntok+plain_decoder", "multiscale")])
def test_no_later_stage_brings_back_a_loss_that_a_variant_takes_out(name, term):
    with_it = presets.get(name.partition("+")[0])
    assert any(term in stage.losses for stage in with_it.stages)
    run = presets.get(name)
    assert [stage.name for stage in run.stages] == [stage.name for stage in with_it.stages]
    assert not any(term in phase.losses for phase in run.phases())


def test_a_sphere_is_as_large_beside_noise_whenever_the_width_is_named():
    one, other = presets.get("tiny_vfm_vae+sphere+d16"), presets.get("tiny_vfm_vae+d16+sphere")
    assert one.tokenizer.radius == pytest.approx(other.tokenizer.radius) != presets.get("tiny_vfm_vae+sphere").tokenizer.radius


def test_variants_after_each_other_fit_or_say_why():
    ours = [name for name, variant in variants.VARIANTS.items() if variant.needs == "diffusion"]
    for one, other in itertools.permutations(ours, 2):
        with contextlib.suppress(ConfigError):
            presets.get(f"tiny_vfm_vae+{one}+{other}")


def test_overrides_come_on_top_and_fitted_widths_after_them():
    wide = {"tokenizer.decoder.channel_max": 96}
    matched = presets.get("pocket_vfm_vae+plain_matched", wide)
    assert matched == variants.apply(presets.get("pocket_vfm_vae", wide), "plain_matched")
    assert presets.get("pocket_vfm_vae+repa", {"diffusion.alignment.weight": 0.25}).diffusion.alignment.weight == 0.25


def test_a_config_file_takes_the_place_of_a_preset(tmp_path):
    folder = tmp_path / "a+b@c"
    folder.mkdir()
    (folder / "mine.json").write_text(presets.get("tiny_vfm_vae").model_dump_json())
    assert presets.get(str(folder / "mine.json")) == presets.get("tiny_vfm_vae")
    assert presets.get(f"{folder / 'mine.json'}+no_kl").id == presets.get("tiny_vfm_vae+no_kl").id


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pocket_vfmvae", ["unknown preset 'pocket_vfmvae'", "did you mean 'pocket_vfm_vae'"]),
        ("", ["unknown preset ''"]),
        ("+no_kl", ["unknown preset ''"]),
        ("pocket_vfm_vae+no_lk", ["unknown variant 'no_lk'", "did you mean 'no_kl'"]),
        ("pocket_vfm_vae+", ["unknown variant ''"]),
        ("pocket_vfm_vae@", ["unknown preset ''"]),
        ("pocket_vfm_vae@pocket_vfm", ["'pocket_vfm' has no diffusion or ar section"]),
        ("pocket_vfm@pocket_vfm_vae", ["'pocket_vfm' has no tokenizer section"]),
        ("pocket_plain_vae+random", ["variant 'random' of 'pocket_plain_vae'", "it changes the 'vfm' section"]),
        ("pocket_vfm+repa", ["variant 'repa' of 'pocket_vfm'", "it changes a diffusion model, which this run does not have"]),
        ("pocket_vfm_vae+joint+ddt", ["network 'ddt' has no class token"]),
    ],
)
def test_a_name_that_is_none_is_one_line(name, words):
    with pytest.raises(ConfigError) as caught:
        presets.get(name)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", TINY)
def test_tiny_runs_to_samples_and_numbers(name, tmp_path):
    run = shorter(presets.get(name))
    for _ in api.train(run, tmp_path):
        pass
    for phase in run.phases():
        assert runs.open_run(phase.id, tmp_path).status().state == "finished"
    report = api.evaluate(run.last.id, tmp_path)
    assert all(math.isfinite(report[key].value) for key in ("rfd", "psnr"))
    if run.generator is not None:
        *_, last = api.sample(run.id, [0, 1], root=tmp_path, previews=0)
        assert last.images.shape == (2, 3, 16, 16)
        assert math.isfinite(report["gfd"].value)


def test_paper_recipes_as_released():
    """Facts of the released configurations that the published text does not have."""
    for name in ("paper_plain_vae", "paper_va_vae", "paper_plain_vae_repa_e"):  # reconstruction summed over pixels there
        assert presets.get(name).losses["kl"].weight == pytest.approx(5.1e-12, rel=0.01)
    last = presets.get("paper_vfm_vae").phases()[3]
    assert last.stage == "patchgan"
    losses = {name: loss.weight for name, loss in last.losses.items()}
    assert losses["adversarial"] == losses["adversarial:patch"] == 1
    assert {"l1", "lpips", "ssim"}.isdisjoint(losses)
    assert last.train.clip is None
    assert presets.get("paper_rae").diffusion.time.kind == "lognormal"
    game = presets.get("paper_dino_sae").phases()[1].losses["adversarial"]
    assert game.trains_discriminator(0), "alone for two epochs"
    assert game.factor(2 * EPOCH - 1) == 0 < game.factor(2 * EPOCH)
    pixels = presets.get("paper_ps_vae").phases()[1].losses  # the gradients that scale the game hold the weight of 0.1
    assert pixels["adversarial"].adaptive
    assert (pixels["adversarial"].weight, pixels["adversarial"].start) == (0.5, 0), "the game goes on"


def test_presets_named_beside_published_numbers_exist():
    text = (Path(__file__).parents[1] / "docs" / "published.md").read_text()
    named = re.findall(r"`((?:pocket|paper)_\w+)`(?: with `(\+\w+|[\w.]+=\w+)`)?", text)
    assert len(named) > 15
    for name, change in named:
        field, _, value = change.partition("=")
        recipe = presets.get(name + change) if change.startswith("+") else presets.get(name, {field: json.loads(value)} if value else {})
        assert recipe.tokenizer is not None, name
