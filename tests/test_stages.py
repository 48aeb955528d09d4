"""Recipes in stages: what a stage changes, what it starts from, what two recipes share; and the step against discriminators."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import COMMON, outcome_of

from vfmlab import api, presets, runs
from vfmlab.config import Recipe, override, parse
from vfmlab.errors import ConfigError, VfmlabError
from vfmlab.training import dryrun
from vfmlab.training.checkpoint import load_state
from vfmlab.training.tokenizer import TokenizerTask
from vfmlab.weights import io

PATCH = {"kind": "patchgan", "width": 4, "layers": 1, "scales": 1}
STAGES = [
    {"name": "game", "losses": {"adversarial": {"weight": 0.5, "adaptive": True, "discriminator": PATCH}, "feature_matching": 1.0}},
    {
        "name": "keep",
        "trains": ["encoder.*", "quant.*"],
        "losses": {"kl": 0, "preservation": {"weight": 2.0}, "multiscale": {"until": 16}, "adversarial": {"adaptive": False}},
        "train": {"lr": 1e-4, "lr_for": {"quant.*": 0.5}},
    },
    {"name": "refine", "trains": ["decoder.*"], "losses": {"preservation": 0}, "train": {"samples": 16}},
]


def staged(*stages, name="tiny_plain_vae", **changes) -> Recipe:
    run = override(presets.get(name), COMMON | changes)
    return parse({**run.model_dump(mode="json"), "stages": list(stages or STAGES)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole recipe, trained: the root and its run."""
    root, run = tmp_path_factory.mktemp("stages"), staged()
    for _ in api.train(run, root, until="tokenizer"):
        pass
    return root, run


def test_phases_names_and_parents():
    run = staged()
    *stages, diffusion = run.phases()
    assert [phase.stage for phase in stages] == ["game", "keep", "refine"]
    assert [phase.id.split("-")[0] for phase in stages] == ["tiny_plain_vae_game", "tiny_plain_vae_keep", "tiny_plain_vae_refine"]
    assert diffusion.recipe is run
    assert diffusion == run.last
    for before, after in itertools.pairwise([*stages, diffusion]):
        assert after.parent == before.id
    for phase in stages:  # what stands in config.json says the same
        again = parse(phase.recipe.model_dump(mode="json")).last
        assert again == phase
        assert (again.id, again.parent, again.stage) == (phase.id, phase.parent, phase.stage)


def test_a_stage_changes_only_what_it_says():
    game, keep, refine = staged().phases()[:3]
    assert game.losses.keys() == {"l1", "kl", "multiscale", "adversarial", "feature_matching"}
    assert keep.losses.keys() == {"l1", "multiscale", "adversarial", "feature_matching", "preservation"}
    assert (keep.losses["multiscale"].weight, keep.losses["multiscale"].until) == (0.1, 16)
    assert refine.losses.keys() == {"l1", "multiscale", "adversarial", "feature_matching"}
    assert (game.train.lr, keep.train.lr, refine.train.lr) == (2e-3, 1e-4, 1e-4)
    assert (game.train.samples, refine.train.samples) == (64, 16)
    assert (game.trains, keep.trains, refine.trains) == (("*",), ("encoder.*", "quant.*"), ("decoder.*",))
    assert refine.train.lr_for == {"quant.*": 0.5}


def test_recipes_share_the_stages_they_have_in_common():
    one, other = staged(), override(staged(), {"stages.keep.losses.preservation.weight": 5})
    assert one.phases()[0].id == other.phases()[0].id
    assert one.phases()[1].id != other.phases()[1].id
    assert one.phases()[0].id == staged(**{"diffusion.train.lr": 1e-4}).phases()[0].id


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stages.kepe.train.lr": 1}, r"unknown field 'stages\.kepe\.train\.lr'.*did you mean 'stages\.keep'"),
        ({"stages.keep.train.sampels": 1}, r"unknown field 'stages\.1\.train\.sampels' = 1 \(did you mean 'stages\.1\.train\.samples'"),
        ({"stages.keep.trian": 1}, r"unknown field 'stages\.1\.trian' = 1 \(did you mean 'stages\.1\.train"),
        ({"stages.keep.losses.preservation.wieght": 1}, r"'stages\.1\.losses\.preservation\.wieght'.*did you mean 'stages\.1\.losses\.preservation\.weight'"),
        ({"stages.keep.losses.l3": 1}, "unknown loss 'l3'"),
        ({"stages.keep.train.lr": -1}, r"'stages\.1\.train\.lr' = -1"),
        ({"stages.keep.name": "game"}, "'game' is taken"),
        ({"stages.keep.name": "diffusion"}, "'diffusion' is taken"),
    ],
)
def test_bad_stages_are_refused_before_anything_is_trained(change, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        override(staged(), change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"stages.game.trains": ["nothing.*"]}, r"trains: 'nothing\.\*' matches no parameter"),
        ({"stages.game.train.lr_for": {"adapter.*": 0.1}}, r"train\.lr_for: 'adapter\.\*' matches no parameter"),
        ({"stages.game.losses.preservation": 1}, r"losses\.preservation keeps the latent where the stage before"),
        ({"stages.game.losses.feature_matching": {"of": "adversarial:other"}}, r"reads the discriminator of losses\.adversarial:other, which is off"),
        ({"stages.game.losses": {"adversarial": {"discriminator": {"kind": "projected", "backbone": "vit_nonsense"}}, "feature_matching": 0}}, "vit_nonsense"),
        ({"stages.game.losses": {"l1": 0, "kl": 0, "multiscale": 0, "adversarial": 0, "feature_matching": 0}}, "losses is empty"),
        ({"stages.game.train.precision": "fp16"}, "fp16"),
    ],
)  # fmt: skip
def test_stages_that_cannot_train_say_so_in_one_line(tmp_path, change, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        list(api.train(override(staged(), change), tmp_path))
    assert "\n" not in str(caught.value)


def test_until_takes_the_names_of_stages(tmp_path):
    with pytest.raises(ConfigError, match="this run's phases are game, keep, refine, diffusion, tokenizer"):
        list(api.train(staged(), tmp_path, until="gam"))
    events = list(api.train(staged(), tmp_path, until="game"))
    assert {event.run_id for event in events} == {staged().phases()[0].id}
    assert any(event.kind == "skip" for event in api.train(staged(), tmp_path, until="game"))


def test_a_stage_starts_from_its_parents_average_and_trains_only_its_part(trained):
    root, run = trained
    game, keep, refine = (runs.open_run(phase.id, root) for phase in run.phases()[:3])
    states = {name: io.read(folder.ema)[0] for name, folder in (("game", game), ("keep", keep), ("refine", refine))}
    frozen = [key for key in states["game"] if not key.startswith("stat_")]
    for before, after, trains in (("game", "keep", ("encoder.", "quant.")), ("keep", "refine", ("decoder.",))):
        for key in frozen:
            assert torch.equal(states[before][key], states[after][key]) != key.startswith(trains), (after, key)
    assert torch.equal(states["keep"]["stat_mean"], states["refine"]["stat_mean"])  # the encoder is the same


def test_discriminators_go_on_in_the_next_stage(trained):
    root, run = trained
    first, second = (runs.open_run(phase.id, root) for phase in run.phases()[:2])
    before = load_state(first)["discriminators"]
    parent = api.load_tokenizer(first.id, root)
    task = TokenizerTask(run.phases()[1], parent, first)
    assert all(torch.equal(value, before[key]) for key, value in task.discriminators.state_dict().items())
    after = load_state(second)["discriminators"]
    assert any(not torch.equal(after[key], before[key]) for key in before)
    assert not task.started
    state = (first.checkpoints / "state.pt").rename(first.path / "aside")  # the largest file of a run: somebody needed the room
    assert f"begin anew: '{first.id}' has no checkpoints/state.pt" in TokenizerTask(run.phases()[1], parent, first).started["note"]
    state.rename(first.checkpoints / "state.pt")


def test_the_preservation_loss_reads_the_frozen_parent(trained):
    root, run = trained
    first, second = (runs.open_run(phase.id, root) for phase in run.phases()[:2])
    records = second.metrics("step")
    assert records[0]["preservation"] == pytest.approx(0, abs=1e-9)  # nothing has moved yet
    assert records[-1]["preservation"] > 0
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    old, new = (api.load_tokenizer(folder.id, root).posterior(images).mode() for folder in (first, second))
    assert (old - new).square().mean() > 0


def test_both_sides_of_the_game_are_logged(trained):
    root, run = trained
    record = runs.open_run(run.phases()[0].id, root).metrics("step")[-1]
    named = {"adversarial", "feature_matching", "weight_adversarial", "adversarial_loss", "adversarial_accuracy", "discriminator_grad_norm"}
    assert named <= record.keys()


def test_a_game_resumes_bit_for_bit(tmp_path):
    run = staged(STAGES[0], {"name": "two", "losses": {"adversarial:late": {"weight": 0.1, "start": 24, "warmup": 16, "discriminator": PATCH}}})
    phase, last = run.phases()[:2]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    list(api.train(run, whole, until="tokenizer"))
    for _ in range(2):
        for part in (phase, last):
            if part is last and runs.create(phase, cut).status().state != "finished":
                continue
            events = api.train(part, cut)
            for event in events:
                if event.kind == "step" and event.run_id == part.id and event.samples >= 40 and not event.data.get("resumed"):
                    break
            events.close()
    list(api.train(run, cut, until="tokenizer"))
    for part in (phase, last):
        assert outcome_of(whole, part) == outcome_of(cut, part)
    late = [record.get("adversarial:late") for record in runs.open_run(last.id, whole).metrics("step")]
    assert late[:3] == [None] * 3
    assert all(value is not None for value in late[4:])


def test_the_discriminator_costs_memory_in_the_dry_run_too():
    task = TokenizerTask(override(staged().phases()[0], {"stages.game.losses.adversarial.start": 1000}))
    before = {key: value.clone() for key, value in task.discriminators.state_dict().items()}
    steps = []
    task.discriminators.register_forward_hook(lambda *_: steps.append(1))
    dryrun.measure(task, device="cpu")
    assert steps
    assert all(torch.equal(value, before[key]) for key, value in task.discriminators.state_dict().items())


def test_learning_rates_of_parts():
    from vfmlab.training.step import lr_factors, make_optimizers
    from vfmlab.training.task import select

    task = TokenizerTask(override(presets.get("tiny_plain_vae").phases()[0], {"train.lr_for": {"encoder.*": 0.1}, "train.weight_decay": 0.01}))
    (optimizer,) = make_optimizers(task, select(task), torch.device("cpu"))
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in task.weights.named_parameters():
        lr, decay = rates[id(parameter)]
        assert lr == pytest.approx(2e-4 if name.startswith("encoder.") else 2e-3)
        assert decay == (0.01 if parameter.ndim > 1 else 0.0)
    assert lr_factors({"*": 0.5, "a.*": 0.1}, ["a.x", "b"]) == {"a.x": 0.1, "b": 0.5}


def test_a_decoder_refined_after_the_diffusion_model(tmp_path):
    """The model trained on stage two's latents draws through stage three's decoder, and through no decoder of other latents."""
    first, second, third = staged().stages
    model = staged(first, second, **{"diffusion.train.samples": 16, "diffusion.train.evaluate_at": []})
    for run, until in ((model, None), (staged(first, second, third), "tokenizer")):
        for _ in api.train(run, tmp_path, until=until):
            pass
    refined = staged().phases()[2].id
    own, other = ([*api.sample(model.id, [0, 1], root=tmp_path, decoder=which)][-1].images for which in (None, refined))
    assert not torch.equal(own, other)
    reports = [api.evaluate(model.id, tmp_path, which) for which in (None, {"decoder": refined})]
    assert reports[0].hash != reports[1].hash
    assert reports[0]["gfd"].value != reports[1]["gfd"].value
    with pytest.raises(ConfigError, match="belongs to other latents.*a stage that trained nothing but the decoder"):
        api.load_diffusion(model.id, tmp_path, decoder=staged().phases()[0].id)


def test_a_collapsed_quantiser_is_told(tmp_path):
    run = override(presets.get("tiny_vfm_vae_discrete"), COMMON | {"train.samples": 16, "losses.codebook.entropy": 0})
    *_, end = api.train(run, tmp_path, until="tokenizer")
    folder = runs.open_run(run.tokenizer_phase.id, tmp_path)
    assert "remark" not in end.data
    assert folder.status().message == ""
    assert folder.metrics("step")[-1]["codebook_usage"] > 0
    few = override(run, {"tokenizer.vocabulary": 65_536})  # 256 tokens seen cannot use a fiftieth of 32 768 entries
    *_, end = api.train(few, tmp_path, until="tokenizer")
    told = runs.open_run(few.tokenizer_phase.id, tmp_path).status()
    assert (told.state, told.message) == ("finished", end.data["remark"])
    assert "the quantiser collapsed" in told.message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"losses.vf.layer": 9}, r"losses\.vf\.layer 9: 'pocket' has 4 blocks; name different layers among"),
        ({"losses.gram.layer": 9}, r"losses\.gram\.layer 9: 'pocket' has 4 blocks; name different layers among"),
        ({"losses.token_cosine.layer": 9}, r"losses\.token_cosine\.layer 9: 'pocket' has 4 blocks; name different layers among"),
        ({"losses.adversarial.discriminator": {"kind": "projected"}}, r"discriminator\.backbone\.weights.*discriminator\.kind=patchgan needs no backbone"),
        ({"losses.adversarial.discriminator": {"kind": "projected", "backbone": {"name": "pocket"}, "kernel": 3}}, "is the tokenizer's own VFM"),
    ],
)
def test_losses_that_lack_something_say_what(change, complaint):
    with pytest.raises(VfmlabError, match=complaint) as caught:
        TokenizerTask(override(presets.get("tiny_vfm_vae").phases()[0], change))
    assert "\n" not in str(caught.value)
