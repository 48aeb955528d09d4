"""Aligned training from end to end: targets beside latents, resumed runs, what is saved, REPA-E's gradients and statistics."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import COMMON, make_task
from toy import outcome

from vfmlab import api, presets, runs
from vfmlab.config import VFM, Data, override
from vfmlab.data import BatchStream, open_source, to_float
from vfmlab.diffusion import latents, targets
from vfmlab.errors import ConfigError
from vfmlab.evaluation.instruments.blocks import over_training
from vfmlab.evaluation.protocol import dump
from vfmlab.seeding import StepRandom
from vfmlab.training.check import check, undivided
from vfmlab.training.loop import fit
from vfmlab.weights import export, io

SHORT = {**COMMON, "vfm.weights": "random", "diffusion.train.evaluate_at": [], "protocol.sampler.steps": 2}


@pytest.fixture(scope="module")
def source():
    return open_source(Data(source="scenes:easy", size=16, train=20), "train")


@pytest.fixture(scope="module")
def teacher():
    return targets.Teacher(VFM(weights="random"), 16, -1, (2, 2), pooled=True)


def test_cached_targets_are_the_vfms(tmp_path, source, teacher, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 8)
    folder = tmp_path / "targets"
    assert list(targets.build(folder, teacher, source, flip=True, batch=3))[-1] == (20, 20)
    assert len(list(folder.glob("targets-*.safetensors"))) == 3
    cache = targets.Targets(folder)
    indices, turned = torch.tensor([19, 0, 7]), torch.tensor([False, True, True])
    images = to_float(source.batch(indices).images)
    images = torch.where(turned[:, None, None, None], images.flip(-1), images)
    found, said = cache[indices, turned], teacher.read(images)
    assert found["target"].shape == (3, 128, 2, 2)
    for key in ("target", "token"):
        torch.testing.assert_close(found[key], said[key], atol=4e-3, rtol=2e-3)
    map_of = teacher.model.features(images, (-1,))
    torch.testing.assert_close(said["token"], map_of.pooled)
    mean, std = cache.statistics()
    direct = targets.token_statistics(teacher, source, seed=0)
    torch.testing.assert_close(mean, direct[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(std, direct[1], atol=2e-3, rtol=0)
    prints = {t.fingerprint(source, flip) for t, flip in (
        (teacher, True), (teacher, False), (targets.Teacher(VFM(weights="random"), 16, 2, (2, 2), True), True),
        (targets.Teacher(VFM(weights="random", seed=1), 16, -1, (2, 2), True), True), (targets.Teacher(VFM(weights="random"), 16, -1, (2, 2)), True),
    )}  # fmt: skip
    assert len(prints) == 5


@pytest.mark.parametrize("start", [0, 3])
def test_cached_and_fresh_targets_agree(tmp_path, source, teacher, start):
    list(targets.build(tmp_path, teacher, source, flip=True))
    taken = []
    for sources in ([targets.Targets(tmp_path)], [teacher]):
        first = targets.Tap(BatchStream(source, 8, 4, start, None, True))  # the caller's own reading of the same images
        images = targets.Tap(BatchStream(source, 8, 4, start, None, True))
        for drawn in (first, images):  # from images of its own, and from those that the batches were read from
            stream = targets.beside(first if drawn is first else iter(first), sources, drawn, 8, 4, start, slice(0, 8))
            taken.append(list(itertools.islice(stream, 2)))
            stream.close()
            first = targets.Tap(BatchStream(source, 8, 4, start, None, True))
    for other in taken[1:]:
        for (batch, extra), (same, more) in zip(taken[0], other, strict=True):
            assert torch.equal(batch.indices, same.indices)
            for key in ("target", "token"):
                torch.testing.assert_close(extra[key], more[key], atol=4e-3, rtol=2e-3)


def test_a_data_set_of_one_image_is_read_at_every_step(tmp_path, teacher):
    """All batches have the same indices, and are mirrored or not."""
    one = open_source(Data(source="scenes:easy", size=16, train=1), "train")
    list(targets.build(tmp_path, teacher, one, flip=True))
    taken = []
    for sources in ([targets.Targets(tmp_path)], [teacher]):
        batches, images = (targets.Tap(BatchStream(one, 1, 4, 0, None, True)) for _ in range(2))
        stream = targets.beside(batches, sources, images, 1, 4, 0, slice(0, 1))
        taken.append([extra["target"] for _, extra in itertools.islice(stream, 8)])
        stream.close()
    torch.testing.assert_close(*taken, atol=4e-3, rtol=2e-3)


def trained(name, root, stops=(None,), **changes):
    run = override(presets.get(name), SHORT | changes).last
    run_dir = runs.create(run, root)
    for until in stops:
        task = make_task(run, root)
        events = list(fit(task, run_dir, until=until, device="cpu"))
    return run_dir, events, task


JOINT = {"diffusion.alignment.vfm.weights": "random", "diffusion.class_token.vfm.weights": "random"}
REPA_E = {"vfm.weights": "pretrained", "diffusion.alignment.vfm.weights": "random"}


@pytest.mark.parametrize(("name", "changes"), [
    ("tiny_vfm_vae_joint", JOINT),
    ("tiny_vfm_vae_joint", JOINT | {"diffusion.alignment.cache": False, "diffusion.cache": False}),
    ("tiny_plain_vae_repa_e", REPA_E),
], ids=["cached", "fresh", "tuned"])  # fmt: skip
def test_resumed_equals_uninterrupted(tmp_path, name, changes):
    if name.startswith("tiny_plain"):
        changes = {k: v for k, v in changes.items() if k != "vfm.weights"}
        whole, events, _ = _plain(tmp_path / "a", (None,), changes)
        parts, _, _ = _plain(tmp_path / "b", (24, None), changes)
    else:
        whole, events, _ = trained(name, tmp_path / "a", **changes)
        parts, _, _ = trained(name, tmp_path / "b", (24, None), **changes)
    assert events[-1].kind == "finish"
    assert outcome(whole) == outcome(parts)
    state = torch.load(whole.checkpoints / "state.pt", weights_only=True)
    assert any(key.startswith("projection.read.") for key in state["others"])
    assert not any("projection" in key for key in io.read(whole.ema)[0])


def _plain(root, stops, changes):
    run = override(presets.get("tiny_plain_vae_repa_e"), {k: v for k, v in (SHORT | changes).items() if k != "vfm.weights"}).last
    run_dir = runs.create(run, root)
    for until in stops:
        task = make_task(run, root)
        events = list(fit(task, run_dir, until=until, device="cpu"))
    return run_dir, events, task


def test_alignment_changes_neither_the_start_nor_the_draws(tmp_path):
    tasks = {name: make_task(override(presets.get(name), SHORT).last, tmp_path) for name in ("tiny_vfm_vae", "tiny_vfm_vae_repa", "tiny_vfm_vae_irepa")}
    states = [task.weights.state_dict() for task in tasks.values()]
    assert all(torch.equal(states[0][key], state[key]) for state in states[1:] for key in states[0])
    losses = [task.objective(task.example(slice(0, 8))._replace(z=torch.ones(8, 4, 4, 4)), StepRandom(0, 0, 8), 0) for task in tasks.values()]
    assert losses[0][0] == losses[1][1]["velocity"] == losses[2][1]["velocity"]
    phases = {name: [p.id for p in presets.get(name).phases()] for name in tasks}
    assert len({ids[0] for ids in phases.values()}) == 1  # one tokenizer
    assert len({ids[1] for ids in phases.values()}) == 3


def test_a_joint_run_is_sampled_evaluated_and_watched(tmp_path):
    run = override(presets.get("tiny_vfm_vae_joint"), {**COMMON, "protocol.sampler.steps": 2, "diffusion.train.samples": 16, "diffusion.train.evaluate_at": [16]})
    list(api.train(run, root=tmp_path))
    folder = runs.open_run(run.id, tmp_path)
    logged = folder.metrics("evaluation")[-1]
    assert logged["gfd"]["value"] > 0
    assert {"cknna_block_1", "cknna_block_2", "cknna_target_block_1"} <= set(logged)
    assert over_training(folder)["block"] == [1, 2]
    assert {"alignment", "token_velocity", "velocity"} <= set(folder.metrics("step")[-1])
    loaded = api.load_diffusion(run.id, tmp_path)
    *_, both = api.sample(loaded, [0, 1], guidance={"scale": 2.0, "token": 1.0})
    *_, one = api.sample(loaded, [0], guidance={"scale": 2.0, "token": 1.0})
    torch.testing.assert_close(both.images[:1], one.images, atol=1e-4, rtol=1e-4)
    report = api.evaluate(run.id, tmp_path)
    other = api.evaluate(run.id, tmp_path, {"guidance.token": 3.0})
    assert report.hash != other.hash


def test_protocols_without_the_new_fields_keep_their_hash():
    protocol = presets.get("pocket_vfm_vae").protocol
    told = dump(protocol)
    assert "reuse" not in told["sampler"]
    assert "token" not in told["guidance"]
    assert told["guidance"]["channels"] is None
    assert dump(override(presets.get("pocket_vfm_vae"), {"protocol.sampler.reuse": 2}).protocol)["sampler"]["reuse"] == 2


# -- REPA-E ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    run = override(presets.get("tiny_plain_vae_repa_e"), {k: v for k, v in SHORT.items() if k != "vfm.weights"} | {"diffusion.tune.weight": 2.0}).last
    task = make_task(run, tmp_path_factory.mktemp("tuned"))
    list(task.prepare(runs.create(run, tmp_path_factory.mktemp("runs")), True))
    with torch.no_grad():
        for parameter in task.weights.network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return task


def test_running_statistics_are_per_channel():
    with pytest.raises(ConfigError, match=r"tokenizer\.places: a tuned tokenizer's running statistics are per channel"):
        override(presets.get("tiny_plain_vae_repa_e"), {"tokenizer.places": True})


@pytest.mark.parametrize("preset", ["tiny_plain_vae_repa_e", "tiny_aligntok+repa_e"])
def test_running_statistics_see_a_batch_undivided(preset):
    """In parts they would move once a part, and `accumulation`, which is about memory, would change the result."""
    divided = override(presets.get(preset), {"diffusion.train.accumulation": 2, "diffusion.train.evaluate_at": []})
    with pytest.raises(ConfigError, match=r"diffusion\.train\.accumulation = 2: with diffusion\.tune .*once a batch") as caught:
        check(divided.phases()[-1:])
    assert "\n" not in str(caught.value)
    undivided(override(divided, {"diffusion.tune": None}).last)  # latents that nobody moves may come in parts


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_repa_e_stops_the_diffusion_loss_at_the_latents(tuned):
    objective, weights = tuned.objective, tuned.weights
    batch = next(iter(tuned.stream(0, slice(0, 8))))
    before = {k: v.clone() for k, v in weights.tokenizer.state_dict().items()}

    def fresh():
        weights.tokenizer.load_state_dict(before)
        weights.zero_grad()
        return StepRandom(0, 0, 8)

    loss, parts, _ = objective(batch, fresh(), 0)
    loss.backward()
    all_of_it, network = gradients(weights.tokenizer), gradients(weights.network)
    assert {"tokenizer_l1", "tokenizer_psnr", "alignment", "velocity"} <= set(parts)

    rng = fresh()
    r = objective.own.reconstruct(batch, rng, 0)
    own, _ = objective.own.score(r, objective.own.terms(r, 0))
    own.backward(retain_graph=True)
    of_own = gradients(weights.tokenizer)
    objective._follow(r.z.detach())
    z = weights.tokenizer.normalise(r.z)
    found = objective.flow.terms(weights.network, z, batch.labels, rng, objective.projection, batch.target, batch.token)
    weights.zero_grad()
    (2.0 * found.alignment.mean()).backward(retain_graph=True)
    of_alignment = gradients(weights.tokenizer)
    assert max(value.abs().max() for value in of_alignment.values()) > 1e-4
    for name, value in all_of_it.items():
        expected = of_own.get(name, 0) + of_alignment.get(name, torch.zeros_like(value))
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-3)
    weights.zero_grad()
    (found.velocity.mean() + 0.5 * found.alignment.mean()).backward()
    for name, value in network.items():
        torch.testing.assert_close(value, weights.network.get_parameter(name).grad, atol=1e-6, rtol=1e-3)
    fresh()


def test_batch_statistics_are_for_diffusion_alone(tuned):
    """The network's gradient is that at latents normalised by their own batch, the tokenizer's that at running ones."""
    objective, weights = tuned.objective, tuned.weights
    batch = next(iter(tuned.stream(0, slice(0, 8))))
    before, config = {k: v.clone() for k, v in weights.tokenizer.state_dict().items()}, objective.config
    objective.config = config.model_copy(update={"tune": config.tune.model_copy(update={"statistics": "batch"})})
    weights.zero_grad()
    loss, _, _ = objective(batch, StepRandom(0, 0, 8), 0)
    loss.backward()
    tokenizer, network = gradients(weights.tokenizer), gradients(weights.network)
    objective.config = config

    weights.tokenizer.load_state_dict(before)
    weights.zero_grad()
    rng = StepRandom(0, 0, 8)
    r = objective.own.reconstruct(batch, rng, 0)
    own, _ = objective.own.score(r, objective.own.terms(r, 0))
    own.backward(retain_graph=True)
    of_own = gradients(weights.tokenizer)
    objective._follow(r.z.detach())
    z, raw = weights.tokenizer.normalise(r.z), r.z.detach()
    whole = (raw - raw.mean((0, 2, 3), keepdim=True)) / raw.std((0, 2, 3), correction=0, keepdim=True)
    assert (whole - z).abs().max() > 0.05, "running statistics have not arrived yet"

    def terms(latents):
        return objective.flow.terms(weights.network, latents, batch.labels, rng, objective.projection, batch.target, batch.token)

    first, second = terms(whole), terms(z)
    weights.zero_grad()
    (first.velocity.mean() + 0.5 * first.alignment.mean()).backward()
    for name, value in network.items():
        torch.testing.assert_close(value, weights.network.get_parameter(name).grad, atol=1e-6, rtol=1e-3)
    weights.zero_grad()
    (2.0 * second.alignment.mean()).backward()
    of_alignment = gradients(weights.tokenizer)
    for name, value in tokenizer.items():
        expected = of_own.get(name, 0) + of_alignment.get(name, torch.zeros_like(value))
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-3)
    weights.tokenizer.load_state_dict(before)
    weights.zero_grad()


def test_running_statistics_follow_the_latents(tuned):
    tokenizer = tuned.weights.tokenizer
    kept = {k: v.clone() for k, v in tokenizer.state_dict().items()}
    mean, std = tokenizer.stat_mean.clone(), tokenizer.stat_std.clone()
    tokenizer.move_statistics(mean + 1, 4 * std.square(), 0.1)
    torch.testing.assert_close(tokenizer.stat_mean, mean + 0.1)
    torch.testing.assert_close(tokenizer.stat_std, (1.3 * std.square()).sqrt())
    for _ in range(200):
        tokenizer.move_statistics(torch.full_like(mean, 3.0), torch.full_like(std, 0.25), 0.1)
    torch.testing.assert_close(tokenizer.stat_mean, torch.full_like(mean, 3.0))
    torch.testing.assert_close(tokenizer.stat_std, torch.full_like(std, 0.5))
    tokenizer.load_state_dict(kept)


def test_the_tuned_tokenizer_is_saved_and_used(tmp_path):
    short = {"diffusion.train.samples": 16, "diffusion.train.evaluate_at": [], "protocol.sampler.steps": 2, "data.train": 32, "data.val": 16, "protocol.n": 16}
    run = override(presets.get("tiny_plain_vae_repa_e"), {**short, "train.samples": 16, "train.evaluate_at": []})
    list(api.train(run, root=tmp_path))
    loaded, before = api.load_diffusion(run.id, tmp_path), api.load_tokenizer(run.last.parent, tmp_path)
    images = to_float(open_source(run.data, "val").batch(torch.arange(8)).images)
    assert not torch.allclose(loaded.tokenizer.encode(images).mode(), before.encode(images).mode(), atol=1e-3)
    again = api.load_tokenizer(run.id, tmp_path)
    assert torch.equal(again.encode(images).mode(), loaded.tokenizer.encode(images).mode())
    assert api.tokenizer_run(run.id, tmp_path).id == run.id, "reconstructions lie, and count, as this run's"
    out = export.save_pretrained(run.id, tmp_path / "out", tmp_path)
    assert torch.equal(export.from_pretrained(out).encode(images).mode(), again.encode(images).mode()), "what is passed on is what was tuned"
    assert f"| tuned | together with a generator (REPA-E), from {run.last.parent} |" in (out / "README.md").read_text()
    statistics, _ = io.read(runs.open_run(run.id, tmp_path).latent_stats)
    assert torch.equal(statistics["mean"], again.statistics.mean)
    train = to_float(open_source(run.data, "train").batch(torch.arange(32)).images)
    z = again.encode(train).mode()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)
    *_, last = api.sample(loaded, [0])
    assert last.images.shape == (1, 3, 16, 16)
