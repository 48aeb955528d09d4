"""Text to image: captions as conditions, from the training images to samples of prompts and what a judge sees in them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from data_files import fill
from tiny import awake, make_task

from vfmlab import api, config, presets, runs
from vfmlab.cli import main
from vfmlab.config import override
from vfmlab.diffusion import prompts
from vfmlab.diffusion.dit import LightningDiT
from vfmlab.diffusion.objective import DiffusionObjective
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation import protocol as protocols
from vfmlab.seeding import StepRandom
from vfmlab.studies import interpolate
from vfmlab.training.check import check
from vfmlab.vfm.text import open_encoder

SHORT = {"data.train": 48, "data.val": 16, "protocol.n": 16, "train.samples": 16, "diffusion.train.samples": 16,
         "diffusion.train.evaluate_at": [16], "diffusion.train.preview_every": 16}  # fmt: skip
TWO = ["a striped red disc", "two plain blue rings above a plain white cross"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(root):
    """A generator of two steps."""
    recipe = override(presets.get("tiny_t2i_plain_vae"), SHORT)
    for event in api.train(recipe, root):
        assert event.kind != "warning", event.data
    return recipe.last


@pytest.fixture(scope="module")
def loaded(run, root):
    """With weights that see the condition: after two steps they hardly do."""
    model, g = api.load_diffusion(run.id, root), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            if "modulation" in name or "final" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=g))
    return model


def network(**options) -> LightningDiT:
    torch.manual_seed(0)
    return awake(LightningDiT(LightningDiT.Config(width=16, depth=2, heads=2, text=(12, 64), **options), (2, 2, 2), 0))


# -- the network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rope": False, "pos_embed": False}, {"rmsnorm": False, "patch": 2}])
def test_a_network_reads_its_text(options):
    net, x, t = network(**options), torch.randn(3, 2, 2, 2), torch.full((3,), 0.5)
    with pytest.raises(ConfigError, match="reads text and has none"):
        net(x, t, torch.zeros(3, dtype=torch.long))
    made = prompts.of([*TWO, "a plain blue ring above two plain white crosses"], open_encoder("words", 12))
    net = prompts.prompted(net, made)
    with torch.no_grad():
        out = torch.stack([net(x, t, torch.full((3,), i)) for i in range(4)])
        assert out.shape == (4, 3, 2, 2, 2)
        gaps = (out[:, None] - out[None]).abs().amax((2, 3, 4, 5))
        assert (gaps + torch.eye(4) > 1e-4).all(), "every text is seen, its order too, and so is the empty one"
        alone = prompts.prompted(net, prompts.of(TWO[1:], made.encoder))
        torch.testing.assert_close(alone(x, t, torch.zeros(3, dtype=torch.long)), out[1])
        torch.testing.assert_close(alone(x, t, torch.ones(3, dtype=torch.long)), out[3])
        _, kept = net(x, t, torch.tensor([0, 1, 3]), features_at=(0, 2))
        assert kept[2].shape == (3, net.grid[0] * net.grid[1], 16), "the text's tokens are none of the image's"
    assert net.num_classes == 3
    assert len(alone.prompts) == 1


def test_a_network_learns_what_the_words_mean():
    """Latents are +1 or -1 as the colour says: after a few steps the flow leads there, for words in an order that it never saw."""
    texts = [f"a {texture} {colour} {shape}" for texture in ("plain", "striped") for colour in ("red", "blue") for shape in ("disc", "ring", "cross")]
    seen = [text for text in texts if text not in ("a striped red cross", "a plain blue ring")]
    cfg = config.Diffusion(network={"kind": "lightningdit", "width": 32, "depth": 1, "heads": 2, "text": (12, 64)}, text={}, train={"samples": 1})
    torch.manual_seed(0)
    net = LightningDiT(cfg.network, (2, 2, 2), 0)
    prompts.set_prompts(net, prompts.of(seen, open_encoder("words", 12)))
    sign = torch.tensor([1.0 if "red" in text else -1.0 for text in seen])
    objective, optimizer = DiffusionObjective(net, cfg), torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(60):
        labels = torch.arange(40) % len(seen)
        batch = (sign[labels].view(-1, 1, 1, 1).expand(-1, 2, 2, 2), labels)
        loss, _ = objective(batch, StepRandom(0, step, 40), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    new = prompts.prompted(net, prompts.of(["a striped red cross", "a plain blue ring"], net.prompts.encoder))
    with torch.no_grad():
        noise = torch.randn(64, 2, 2, 2, generator=torch.Generator().manual_seed(1))
        v = new(noise, torch.ones(64), torch.arange(64) % 2)
    clean = (noise - v).mean((1, 2, 3))
    assert clean[::2].mean() > 0.5
    assert clean[1::2].mean() < -0.5


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"diffusion.network.text": None}, r"network\.text is null; set it to \[tokens, width\]"),
        ({"diffusion.text": None}, r"network\.text \[12, 64\]: there is no text to read; add 'text'"),
        ({"diffusion.class_token": {}, "diffusion.network.token": 128}, "reads text or denoises a class token"),
        ({"diffusion.text.encoder": "wrds"}, r"unknown text encoder 'wrds' \(did you mean 'words'\?\)"),
        ({"diffusion.network.text": [12, 32]}, r"\[12, 32\]: tokens of 'words' have width 64; set diffusion\.network\.text=\[12,64\]"),
        ({"diffusion.network.text": [4, 64]}, r"tokens, encoder 'words' takes 4; make it shorter"),
        ({"data.flip": True}, r"data\.flip True: captions of drawn scenes say left and right, .* set data\.flip=false"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_is_trained(changes, line, root):
    with pytest.raises(ConfigError, match=line) as caught:
        check(override(presets.get("tiny_t2i_plain_vae"), SHORT | changes).phases(), root)
    assert "\n" not in str(caught.value)


def test_a_file_of_prompts_that_is_not_there_is_refused_before_anything_is_trained(root):
    changed = override(presets.get("tiny_t2i_plain_vae"), SHORT | {"protocol.prompts": "/nowhere.txt"})
    with pytest.raises(DataError, match=r"protocol.prompts '/nowhere.txt': No such file"):
        check(changed.phases(), root)


def test_other_networks_and_guidance_read_no_text(root):
    ddt = {"kind": "ddt", "width": 32, "depth": 1, "heads": 2}
    with pytest.raises(ValueError, match="network 'ddt' reads no text; use lightningdit or sit"):
        config.Diffusion(network=ddt, text={}, train={"samples": 1})
    with pytest.raises(ConfigError, match="not of a network that reads text; set guidance.kind=null"):
        api.with_weaker(prompts.prompted(network(), prompts.blank((12, 64))), None, config.Guidance(kind="auto", weaker="x"), root)


def test_images_without_captions_are_one_line(tmp_path):
    recipe = override(presets.get("tiny_t2i_plain_vae"), {"data.source": f"folder:{fill(tmp_path / 'd')}", "data.train": None, "data.val": 8})
    with pytest.raises(DataError, match=r"have no captions; write each into a \.txt beside its image") as caught:
        next(iter(api.train(recipe, tmp_path / "runs", until=None)))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"protocol\.prompts 'captions': this generator reads no text"):
        override(presets.get("tiny_plain_vae"), {"protocol.prompts": "captions"})


def test_a_folder_of_an_encoder_is_named_in_full_and_does_not_travel(tmp_path, monkeypatch):
    from vfmlab.weights.export import public

    (tmp_path / "tower").mkdir()
    monkeypatch.chdir(tmp_path)
    named = api.resolve("tiny_t2i_plain_vae", {"diffusion.text.encoder": "transformers:tower"})
    assert named.diffusion.text.encoder == f"transformers:{tmp_path / 'tower'}"
    assert public(named.last).diffusion.text.encoder == "transformers:tower"
    hub = api.resolve("tiny_t2i_plain_vae", {"diffusion.text.encoder": "transformers:openai/clip"})
    assert public(hub.last).diffusion.text.encoder == hub.diffusion.text.encoder == "transformers:openai/clip"


# -- training ----------------------------------------------------------------------------------------------------------


def test_each_image_is_trained_with_its_caption(run, tmp_path):
    task = make_task(run, tmp_path)
    done = list(task.prepare(runs.create(run, tmp_path), True))
    assert {what for what, _, _ in done} == {"latents", "captions"}
    batch = task.batch_of(3, slice(0, 8))
    assert [task.captions.texts[i] for i in batch.labels] == task.source.captions(batch.indices)
    stored, fresh = task.captions.prompts, prompts.of(task.captions.texts, task.captions.encoder)
    every = torch.arange(len(stored) + 1)
    assert torch.equal(stored(every), fresh(every))
    assert task.weights.prompts is stored
    assert task.weights.num_classes == len(stored) == len(set(task.source.captions(torch.arange(48))))
    assert list(task.prepare(runs.create(run, tmp_path), False))[-1] == ("captions", len(every), len(every))


def test_a_run_logs_how_prompts_are_followed(run, root):
    folder = runs.open_run(run.id, root)
    (line,) = folder.metrics("evaluation")
    assert 0 <= line["prompt_all"]["value"] <= 1
    assert folder.status().state == "finished"


# -- samples -----------------------------------------------------------------------------------------------------------


def last(*args, **more):
    *_, preview = api.sample(*args, previews=0, **more)
    return preview.images


def test_samples_of_prompts(loaded):
    both = last(loaded, prompts=TWO, seed=3)
    assert both.shape == (2, 3, 16, 16)
    torch.testing.assert_close(last(loaded, prompts=TWO[1:], seed=3, first=1), both[1:])
    torch.testing.assert_close(last(loaded, [1], prompts=TWO, seed=3, first=1), both[1:])
    other = last(loaded, prompts=[TWO[1], TWO[1]], seed=3)
    torch.testing.assert_close(other[1], both[1])
    assert (other[0] - both[0]).abs().max() > 1e-3
    guided = last(loaded, prompts=TWO, seed=3, guidance=6.0)
    assert (guided - both).abs().max() > 1e-3
    assert len(loaded.class_names) == prompts.EXAMPLES
    assert len(last(loaded)) == prompts.EXAMPLES


def test_prompts_that_cannot_be_sampled_are_one_line(loaded):
    for texts, line in ((["a purble disc"], "did you mean 'purple'"), ([" ".join(["a"] * 13)], "takes 12; make it shorter"), ([], "labels is empty")):
        with pytest.raises(ConfigError, match=line) as caught:
            last(loaded, prompts=texts)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="label 2 is not one of this run's 2 classes"):
        last(loaded, [2], prompts=TWO)


def test_between_two_prompts(loaded):
    frames = [*interpolate.classes(loaded, (0, 3), frames=3)][-1].images
    noise = next(iter(interpolate.SampleRandom(0, [0]).randn(*loaded.tokenizer.latent_shape)[None]))
    ends = last(loaded, [0, 3], noise=noise.expand(2, -1, -1, -1))
    torch.testing.assert_close(frames[[0, 2]], ends, atol=1e-4, rtol=0)
    assert (frames[1] - frames[0]).abs().max() > 1e-4


def test_the_command_takes_prompts(run, root, tmp_path, capsys):
    call = ["sample", run.id, "--root", str(root), "--out", str(tmp_path / "o")]
    assert main.main([*call, "--prompt", *TWO]) == 0
    assert sorted(path.name for path in (tmp_path / "o").glob("0*.png")) == [
        "0000_a_striped_red_disc.png", "0001_two_plain_blue_rings_above_a_plain_white_cross.png"]
    capsys.readouterr()
    for more, line in ((["--labels", "1"], "an image has a class or a prompt"), (["--npz", "4"], "its prompts are the protocol's")):
        assert main.main([*call, "--prompt", "a disc", *more]) != 0
        assert line in capsys.readouterr().err
    tokenizer = api.tokenizer_run(run.id, root).id
    assert main.main(["sample", tokenizer, "--root", str(root), "--prompt", "a disc"]) != 0


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_numbers_of_prompts(run, root, tmp_path):
    report = api.evaluate(run.id, root)
    names = [f"prompt_{part}" for part in ("count", "shape", "texture", "colour", "side", "all")]
    assert all(0 <= report[name].value <= 1 and report[name].n == 16 for name in names)
    assert 0 <= report["prompt_all_own"].value <= 1
    assert report["prompt_all"].protocol != report["prompt_all_own"].protocol
    assert "'groups' knows no classes" in report["class_accuracy"].reason
    path = tmp_path / "mine.txt"
    path.write_text("a red disc\n\ntwo blue rings\n")
    mine = api.evaluate(run.id, root, {"prompts": str(path)})
    assert mine["prompt_all"].protocol != report["prompt_all"].protocol, "other prompts, another number"
    assert mine["prompt_side"].reason == "no prompt says a side"
    judge = api.evaluate(run.id, root, {"features": "judge"})
    assert "set protocol.features=groups" in judge["prompt_all"].reason
    assert judge["class_accuracy"].value is not None
    assert "have no classes" in api.evaluate(run.id, root, {"features": "judge", "prompts": str(path)})["class_accuracy"].reason
    for text, line in (("", "the file has no line"), (None, "one prompt a line")):
        path.unlink()
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=line) as caught:
            api.evaluate(run.id, root, {"prompts": str(path)})
        assert "\n" not in str(caught.value)
        path.write_text("x")


def test_samples_in_a_file_are_those_that_are_measured(run, root, tmp_path):
    report = api.evaluate(run.id, root)
    api.sample_npz(run.id, 16, root=root)
    again = api.evaluate(run.id, root, again=True)
    assert again["prompt_shape"].value == report["prompt_shape"].value
    assert again["gfd"].value == pytest.approx(report["gfd"].value)


def test_an_image_that_shows_its_caption_counts(run, monkeypatch):
    """The whole way of a number, with the held-out images in place of samples."""
    from vfmlab.evaluation import generation

    cfg = run.data.model_copy(update={"size": 32})
    setup = protocols.open_setup(cfg, run.protocol)
    images = [setup.source.batch(torch.arange(16)).images]
    setup.drawn = dataclasses.make_dataclass("Drawn", ["images"])(lambda size: images)
    tokenizer = make_tokenizer(run)
    net = prompts.prompted(network(), prompts.of(TWO, open_encoder("words", 12)))
    report = generation.evaluate_generation(net, tokenizer, cfg, run.protocol, 2, setup=setup)
    assert {name: report[name].value for name in report if name.startswith("prompt_") and name != "prompt_all_own"} == dict.fromkeys(
        (f"prompt_{part}" for part in ("count", "shape", "texture", "colour", "side", "all")), 1.0)


def make_tokenizer(run):
    from tiny import untrained

    return untrained(override(run, {"data.size": 32}))


def test_the_velocity_error_is_that_of_captions(run, root):
    from vfmlab.studies.measure import measure

    report = measure(run.id, ["time_loss"], root, compared_with="judge")
    assert report["velocity_error"].value > 0
    assert '"condition": "captions"' in json.dumps(report.as_json())


def test_the_app_takes_a_prompt_in_place_of_a_class(run, root):
    pytest.importorskip("gradio", reason="needs the package gradio")
    from apps import sample

    fields = (run.id, sample.NONE, TWO[1], 2, 0, 3, "euler", 2.0, 0.0, 1.0, 1.0, True)
    call = dict(zip(sample.FIELDS, fields, strict=True))
    one, labels, how = sample._call(root, call)
    assert (one.model.class_names, labels, how["prompts"]) == (TWO[1:], [0, 0], TWO[1:])
    assert last(one.model, labels, **how).shape == (2, 3, 16, 16)
    with pytest.raises(ConfigError, match="did you mean 'purple'"):
        sample._call(root, call | {"label": "a purble disc"})
    one, labels, how = sample._call(root, call | {"label": sample.EVERY})
    assert len(set(labels)) == prompts.EXAMPLES
    assert "prompts" not in how
