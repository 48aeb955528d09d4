"""Runs of the ar generator: the code cache, training through the one loop, samples, numbers, plan; what does not fit is one line."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import COMMON, awake, untrained

from vfmlab import api, presets, runs
from vfmlab.ar import codes as cache
from vfmlab.ar.llamagen import CodeShape, LlamaGen
from vfmlab.cli import main
from vfmlab.config import override
from vfmlab.errors import CheckpointError, ConfigError, RunError
from vfmlab.evaluation.number import groups, rank
from vfmlab.studies import compare_page, interpolate, measure
from vfmlab.studies.results import scan
from vfmlab.training.ar import ARTask
from vfmlab.training.plan import plan, table
from vfmlab.weights import import_release, io

SHORT = COMMON | {"train.samples": 32, "ar.train.samples": 32, "ar.train.evaluate_at": [16, 32]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(root, recipe, events) of a tiny run from images to samples."""
    root, recipe = tmp_path_factory.mktemp("ar"), override(presets.get("tiny_ar_orders"), SHORT)
    return root, recipe, list(api.train(recipe, root))


def test_the_tokenizer_is_that_of_its_own_preset_and_pairs_share_it():
    own, alone = presets.get("tiny_ar"), presets.get("tiny_vqgan")
    assert own.last.parent == alone.last.id
    pair = presets.get("tiny_vqgan@tiny_ar_orders")
    assert (pair.last.parent, pair.last.kind, pair.diffusion) == (alone.last.id, "ar", None)
    assert pair.protocol == presets.get("tiny_ar_orders").protocol
    assert presets.get("tiny_ar@tiny_ar_orders").last.parent == alone.last.id
    assert alone.generator is None
    assert alone.protocol.token_sampler is None


def test_what_training_tells(trained):
    root, recipe, events = trained
    assert {"codes"} <= {event.phase for event in events if event.kind == "step"}
    folder = runs.open_run(recipe.id, root)
    assert (folder.kind, folder.status().state) == ("ar", "finished")
    first = folder.metrics("step")[0]
    tokens, entries = 16, recipe.tokenizer.quantizer.size
    assert first["loss"] == pytest.approx(math.log(entries), rel=0.02)
    assert first["bits_per_image"] == pytest.approx(tokens * first["loss"] / math.log(2), rel=1e-5)
    found = folder.metrics("evaluation")
    assert [record["samples"] for record in found] == [16, 32]
    assert {"gfd", "bits_per_image", "rfd"} <= found[-1].keys()
    assert found[-1]["bits_per_image"]["protocol"] != found[-1]["gfd"]["protocol"]
    assert (folder.images / "0000000032_ema.png").exists()


def test_samples_come_token_by_token(trained):
    root, recipe, _ = trained
    model = api.load_generator(recipe.id, root)
    steps = list(api.sample(model, [0, 1, 2], seed=3, previews=4))
    assert [(s.step, s.total, s.final) for s in steps] == [(4, 16, False), (8, 16, False), (12, 16, False), (16, 16, True)]
    half = steps[1].images
    assert half.shape == (3, 3, 16, 16)
    assert not half[:, :, 8:].any(), "the lower half is still to be drawn"
    assert half[:, :, :8].any()
    assert [s.t for s in steps] == [0.75, 0.5, 0.25, 0.0]
    *_, alone = api.sample(recipe.id, [2], seed=3, root=root, previews=0, first=2)
    torch.testing.assert_close(alone.images[0], steps[-1].images[2])
    *_, cold = api.sample(model, [0], guidance=0.5, sampler={"temperature": 0}, previews=0)
    assert "1 or less means no guidance" in cold.note
    assert not steps[-1].note


@pytest.mark.parametrize(
    ("scale", "power", "note"),
    [(0.5, None, "guidance.scale 0.5: 1 or less means no guidance here"), (1, None, ""), (2, 3.0, ""),
     (1, 3.0, "guidance.scale 1: 1 or less means no guidance here, and token_sampler.guidance_power has nothing to raise")],
)  # fmt: skip
def test_settings_that_guide_nothing_are_named(trained, scale, power, note):
    root, recipe, _ = trained
    *_, last = api.sample(recipe.id, [0], guidance=scale, sampler={"guidance_power": power}, root=root, previews=0)
    assert last.note == note


def test_numbers(trained):
    root, recipe, _ = trained
    report = api.evaluate(recipe.id, root)
    assert report.kind == "ar"
    sampling = report.protocol["sampling"]
    assert (sampling["guidance_power"], sampling["top_k"], sampling["guidance"]) == (1.0, 8, {"scale": 2.0})
    assert not {"steps", "solver"} & sampling.keys()
    bits = report["bits_per_image"]
    assert 0 < bits.value < 2 * 16 * math.log2(recipe.tokenizer.quantizer.size)
    codes = report.protocols[bits.protocol]["codes"]
    assert (codes["entries"], codes["tokens"]) == (recipe.tokenizer.quantizer.size, 16)
    assert report["gfd"].value > 0
    other = api.evaluate(recipe.id, root, protocol={"token_sampler.top_k": 2})
    assert other["gfd"].protocol != report["gfd"].protocol
    assert compare_page.sampler(sampling) == "codes in order at temperature 1, top-k 8, guidance 2"
    assert other["psnr"] == report["psnr"]
    assert other["bits_per_image"] == bits
    (result,) = scan(root)
    assert (result.kind, result.numbers["gfd"].value) == ("ar", report["gfd"].value)


@pytest.mark.parametrize("preset", ["tiny_ar_orders", "tiny_rar"])
def test_codes_of_several_codebooks_are_trained_drawn_and_measured(tmp_path, preset):
    several = {"tokenizer.quantizer": {"kind": "multi", "size": 32, "codebooks": 2}, "protocol.guidance.scale": 2.0}
    short = {"train.samples": 16, "ar.train.samples": 16, "ar.train.evaluate_at": [], "ar.ten_crops": None}
    recipe = override(presets.get(preset), COMMON | several | short)
    list(api.train(recipe, tmp_path))
    assert (runs.open_run(recipe.id, tmp_path).images / "0000000016_ema.png").exists(), "previews are decoded"
    model = api.load_generator(recipe.id, tmp_path)
    assert model.network.codes == CodeShape(32, 32, None, 2)
    steps = list(api.sample(model, [0, 1], previews=32))
    assert [step.images.shape for step in steps] == [(2, 3, 16, 16)] * 32
    report = api.evaluate(recipe.id, tmp_path)
    assert report["gfd"].value > 0
    assert 0 < report["bits_per_image"].value < 2 * 32 * math.log2(32)


def test_bits_of_two_codebooks_are_never_ranked(trained):
    root, recipe, _ = trained
    numbers = dict(api.evaluate(recipe.id, root).measured)
    foreign = numbers | {"bits_per_image": type(numbers["gfd"])(1.0, "another", better="lower")}
    with pytest.raises(ConfigError, match="cannot be ranked"):
        rank({"a": numbers, "b": foreign}, "bits_per_image")
    (one,) = scan(root)
    assert len(groups([one.replace(numbers=numbers), one.replace(numbers=foreign)])) == 1, "their gFD stand in one table"


def test_the_cache(tmp_path):
    run = override(presets.get("tiny_ar"), COMMON).last
    tokenizer, versions = untrained(run).eval(), cache.Versions(run.data, run.ar.ten_crops)
    assert (versions.side, versions.count, len(versions.source)) == (20, 10, 48)
    list(cache.build(tmp_path / "a", tokenizer, versions, batch=20))
    source = cache.CodeSource(tmp_path / "a", cache.fingerprint(tokenizer, versions))
    indices, which = torch.tensor([5, 47, 5]), torch.tensor([0, 9, 1])
    images = api.data.to_float(versions.source.batch(indices).images)
    shown = torch.stack([images[0, :, :16, :16], images[1, :, 2:18, 2:18].flip(-1), images[2, :, :16, :16].flip(-1)])
    assert torch.equal(source.codes(indices, which), tokenizer.codes(shown))
    stream = cache.cached_stream(source, 8, seed=1, start_step=3)
    batch = next(stream)
    stream.close()
    halves = [next(cache.cached_stream(source, 8, 1, 3, rows)) for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(batch.codes, torch.cat([half.codes for half in halves]))
    assert torch.equal(batch.labels, versions.source.labels[batch.indices])
    other = cache.Versions(override(run, {"data.flip": False}).data)
    with pytest.raises(CheckpointError, match="another tokenizer, data set or options"):
        list(cache.build(tmp_path / "a", tokenizer, other))
    with pytest.raises(CheckpointError, match="no code cache"):
        cache.CodeSource(tmp_path / "none", "")


def test_cached_and_fresh_codes_are_the_same(tmp_path):
    run = override(presets.get("tiny_ar"), COMMON | {"ar.ten_crops": None, "data.flip": False}).last
    batches = []
    for cached in (True, False):
        task = ARTask(override(run, {"ar.cache": cached}), untrained(run), tmp_path)
        list(task.prepare(runs.create(task.run, tmp_path / str(cached)), True))
        stream = task.stream(2, slice(0, 8))
        batches.append(next(stream))
        stream.close()
    assert torch.equal(batches[0].codes, batches[1].codes)
    assert torch.equal(batches[0].indices, batches[1].indices)


def test_plan_counts_the_network():
    found = plan(presets.get("paper_ar_b"))
    tokenizer, generator = found["phases"]
    assert (tokenizer["kind"], generator["kind"]) == ("tokenizer", "ar")
    assert sum(generator["parameters"].values()) == generator["trained"] == 110_888_448
    assert generator["latent_shape"] == [256]
    assert generator["sampling_flops"] == 2 * generator["flops"]["network"] > 0
    assert "latent 256" in table(found)


def test_plan_counts_the_encoding_of_codes_that_are_not_stored():
    stored, anew = (plan(presets.get("tiny_ar", {"ar.ten_crops": None, "ar.cache": cached}))["phases"] for cached in (True, False))
    assert anew[1]["flops"] == stored[1]["flops"] | {"encode": anew[0]["flops"]["encode"], "step_per_image": anew[1]["flops"]["step_per_image"]}
    assert anew[1]["flops"]["step_per_image"] == stored[1]["flops"]["step_per_image"] + anew[0]["flops"]["encode"]
    assert anew[1]["memory"]["activations"] == stored[1]["memory"]["activations"]


def test_the_app_draws_tokens_as_they_come(trained):
    sample = pytest.importorskip("apps.sample")
    root, recipe, _ = trained
    call = dict.fromkeys(sample.FIELDS, None) | {
        "run": recipe.id, "count": 1, "seed": 4, "steps": 9, "solver": "heun", "scale": 3.0, "low": 0.1, "high": 0.9, "shift": 2.0, "ema": True,
    }  # fmt: skip
    shown, labels, how = sample._call(root, call)
    model = shown.model
    assert how == {"seed": 4, "guidance": {"scale": 3.0}}
    steps = list(api.sample(model, labels, previews=16, **how))
    assert len(steps) == 16
    assert sample._state(call)["shift"] == 2.0
    assert sample.models.class_names(root, recipe.id) == model.class_names
    assert recipe.id in {i for _, i in sample.models.choices(root, *sample.models.GENERATORS)}


def released(tmp_path, entries, tokens):
    """A network in the release's form: (file, config file, network)."""
    names = {"class_embedding": "cls_embedding.embedding_table", "token_embedding": "tok_embeddings", "head": "output",
             "qkv": "attention.wqkv", "proj": "attention.wo", "gate": "feed_forward.w1", "up": "feed_forward.w3",
             "down": "feed_forward.w2", "norm1": "attention_norm", "norm2": "ffn_norm", "blocks": "layers"}  # fmt: skip
    network = awake(LlamaGen(LlamaGen.Config(width=16, depth=1, heads=2, multiple=8), CodeShape(entries, tokens, (4, tokens // 4)), 3))
    state = {".".join(names.get(part, part) for part in key.split(".")): value for key, value in network.state_dict().items()}
    io.write(tmp_path / "gpt.safetensors", state)
    config = {"dim": 16, "n_layer": 1, "n_head": 2, "multiple_of": 8, "vocab_size": entries, "block_size": tokens, "num_classes": 3}
    (tmp_path / "gpt.json").write_text(json.dumps(config))
    return tmp_path / "gpt.safetensors", tmp_path / "gpt.json", network


def test_released_weights_become_a_run(trained, tmp_path):
    root, recipe, _ = trained
    file, config_file, network = released(tmp_path, recipe.tokenizer.quantizer.size, 16)
    release = import_release.open_release("llamagen-gpt", file, config_file)
    run = import_release.draft(release, root=root, tokenizer=recipe.last.parent)
    assert (run.kind, run.parent) == ("ar", recipe.last.parent)
    list(import_release.import_run(run, root, release=release))
    model = api.load_generator(run.id, root)
    assert all(torch.equal(a, b) for a, b in zip(model.network.parameters(), network.parameters(), strict=True))
    *_, last = api.sample(model, [0, 2], previews=0)
    assert last.images.shape == (2, 3, 16, 16)
    other = import_release.open_release("llamagen-gpt", *released(tmp_path, 7, 16)[:2])
    with pytest.raises(ConfigError, match="codes .entries, tokens, grid, codebooks. .7, 16"):
        import_release.draft(other, root=root, tokenizer=recipe.last.parent)
    with pytest.raises(ConfigError, match="no config of its own"):
        import_release.open_release("llamagen-gpt", file)


def test_the_command_takes_every_field_of_the_sampler(trained, tmp_path, capsys):
    root, recipe, _ = trained
    call = ["sample", recipe.id, "--labels", "0", "3", "--root", str(root), "--out", str(tmp_path)]
    assert main.main([*call, "--guidance", "3", "--set", "token_sampler.top_k=2", "protocol.token_sampler.temperature=0.5"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["sampler"]["top_k"], manifest["sampler"]["temperature"], manifest["guidance"]["scale"]) == (2, 0.5, 3)
    for wrong, words in ((["labels=random"], "only fields of guidance and token_sampler"), (["token_sampler.top_q=1"], "top_q"),
                         (["sampler.steps=3"], "token_sampler"), (["guidance.scale=2", "--guidance", "3"], "a flag of its own")):
        capsys.readouterr()
        assert main.main([*call, "--set", *wrong]) == 2
        assert words in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(trained):
    root, recipe, _ = trained
    model = api.load_generator(recipe.id, root)
    tiny, plain = presets.get("tiny_ar"), presets.get("tiny_plain_vae")
    section = tiny.ar.model_dump(mode="json")
    cases = [
        (lambda: presets.get("tiny_plain_vae@tiny_ar"), "'plain_vae' has a continuous latent"),
        (lambda: presets.get("tiny_vqgan@tiny_plain_vae"), "use the 'ar' section"),
        (lambda: override(plain, {"ar": section}), "one generator"),
        (lambda: override(plain, {"protocol.token_sampler.top_k": 3}), "protocol.sampler"),
        (lambda: override(tiny, {"protocol.sampler.steps": 3}), "one step a token"),
        (lambda: override(tiny, {"protocol.guidance.interval": [0, 0.5]}), "token_sampler.guided"),
        (lambda: override(tiny, {"ar.permuted": {"until": 1, "raster": 2}}), "target_places=true"),
        (lambda: override(tiny, {"ar.cache": False}), "ten_crops"),
        (lambda: override(tiny, {"ar.network.widht": 3}), "did you mean 'ar.network.width'"),
        (lambda: override(tiny, {"protocol.token_sampler.top_p": 0}), "top_p"),
        (lambda: list(api.sample(model, [99])), "label 99"),
        (lambda: list(api.sample(model, [0], steps=5)), "one step a code"),
        (lambda: list(api.sample(model, [0], noise=torch.zeros(1))), "noise"),
        (lambda: list(api.sample(model, [0], sampler={"solver": "heun"})), "token_sampler.solver"),
        (lambda: api.load_diffusion(recipe.id, root), "is an ar run"),
        (lambda: next(interpolate.noises(model, 0, (0, 1))), "nothing lies between two codes"),
        (lambda: next(interpolate.classes(model, (0, 1))), "nothing lies between two codes"),
        (lambda: measure.measure(recipe.id, root=root), "of='tokenizer'"),
    ]
    for call, words in cases:
        with pytest.raises((ConfigError, RunError)) as caught:
            call()
        assert words in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_config_says_how_tokens_are_drawn(trained):
    root, recipe, _ = trained
    stored = json.loads((runs.open_run(recipe.id, root).path / "config.json").read_text())
    assert stored["protocol"]["token_sampler"]["top_k"] == 8
    assert stored["ar"]["network"]["kind"] == "llamagen"
