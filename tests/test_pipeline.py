"""Runs as diffusers has models: what from_pretrained gives back decodes and samples as the run does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from test_export import images, smallest, untrained
from tiny import train_tiny
from tiny import untrained as made_up

from vfmlab import api, runs
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.weights import load
from vfmlab.weights.import_release import write

pytest.importorskip("diffusers")
from diffusers import DiffusionPipeline

from vfmlab.cli import main
from vfmlab.weights import pipeline


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """(root, run directory, folder) of a VFM-VAE as an autoencoder."""
    root = tmp_path_factory.mktemp("autoencoder")
    run_dir = untrained(smallest("vfm_vae"), root)
    return root, run_dir, pipeline.save(run_dir.id, root / "out", root)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """(root, run, folder) of a diffusion run with its tokenizer as a pipeline."""
    return exported("diffusion", tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The same of a run that reads text, after one step."""
    short = {"diffusion.train.samples": 8, "diffusion.train.evaluate_at": [], "data.flip": False}
    return exported("text", tmp_path_factory.mktemp("reader"), **short)


def exported(kind, root, **overrides):
    run_dir, _ = train_tiny(kind, root, **overrides)
    before = run_dir.config().before
    write(runs.create(before, root), made_up(before).state_dict(), None, {"fingerprint": "made up"})
    return root, run_dir, pipeline.save(run_dir.id, root / "out", root)


@torch.no_grad()
def test_an_autoencoder_is_the_tokenizer(tokenizer):
    root, run_dir, folder = tokenizer
    ours = api.load_tokenizer(run_dir.id, root, on="cpu")
    vae = pipeline.VFMLabAutoencoder.from_pretrained(folder)
    x = images(run_dir.config(), 2)
    q = ours.encode(x)
    found = vae.encode(x).latent_dist
    assert torch.equal(found.mode(), q.mean)
    torch.testing.assert_close(found.std, q.std)
    assert torch.equal(vae.decode(q.mean).sample, ours.decode(q.mean))
    assert torch.equal(vae(x).sample, ours.decode(q.mean))
    assert vae.config.scaling_factor == 1
    assert vae.config.latent_channels == q.mean.shape[1]
    assert not vae.training
    assert vae.tokenizer.fingerprint == "eight scenes"


def test_a_pipeline_samples_as_the_run_does(generator):
    root, run_dir, folder = generator
    assert {path.name for path in folder.iterdir()} == {"model_index.json", "vae", "transformer", "README.md"}
    *_, ours = api.sample(run_dir.id, [0, 3], seed=7, guidance=1.5, steps=3, root=root)
    pipe = pipeline.VFMLabPipeline.from_pretrained(folder)
    assert isinstance(pipe, DiffusionPipeline)
    seen = []
    found = pipe([0, 3], seed=7, guidance_scale=1.5, num_inference_steps=3, output_type="pt",
                 callback=lambda *step: seen.append(step)).images
    torch.testing.assert_close(found, (ours.images / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    assert [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert all(step[3].shape == ours.images.shape for step in seen)
    assert torch.equal(seen[-1][3], ours.images)
    [picture] = pipe([1], num_inference_steps=1).images
    assert picture.size == (run_dir.config().data.size,) * 2
    with pytest.raises(ConfigError, match="output_type 'jpg'"):
        pipe([1], output_type="jpg")
    with pytest.raises(ConfigError, match="not one of this run's"):
        pipe([999])


def test_a_prompt_is_drawn_as_the_run_draws_it(reader):
    root, run_dir, folder = reader
    texts = ["two striped red discs", "a plain cross"]
    *_, ours = api.sample(run_dir.id, seed=3, steps=2, root=root, prompts=texts)
    pipe = pipeline.VFMLabPipeline.from_pretrained(folder)
    both = pipe(prompt=texts, seed=3, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(both, (ours.images / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)
    [one] = pipe(prompt=texts[0], seed=3, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(one, both[0], rtol=0, atol=1e-6)
    second = pipe([1], prompt=texts, seed=3, num_inference_steps=2, output_type="pt").images
    assert second.shape == both[1:].shape, "labels are numbers of prompts"


def test_prompts_that_cannot_be_are_one_line(reader, generator):
    pipe = pipeline.VFMLabPipeline.from_pretrained(reader[2])
    most = pipe.transformer.network.prompts.encoder.length
    lines = {
        " ".join(["disc"] * (most + 1)): rf"has {most + 1} tokens, encoder 'words' takes {most}; make it shorter",
        "two striped zebras": "'zebras'",
    }
    for text, line in lines.items():
        with pytest.raises(ConfigError, match=line) as error:
            pipe(prompt=["a plain cross", text], num_inference_steps=1)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="label 2 is not one of this run's 2"):
        pipe([2], prompt=["a plain cross"] * 2, num_inference_steps=1)
    with pytest.raises(ConfigError, match="reads no text; leave prompts out"):
        pipeline.VFMLabPipeline.from_pretrained(generator[2])(prompt="a plain cross")


def test_weights_in_several_files(generator, tmp_path):
    """diffusers splits what is large; here from 50 kB on."""
    _, _, folder = generator
    pipe = pipeline.VFMLabPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path, max_shard_size="50kB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    again = pipeline.VFMLabPipeline.from_pretrained(tmp_path)
    mine, theirs = again.transformer.state_dict(), pipe.transformer.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_the_card_says_how_to_load_it(generator):
    root, run_dir, folder = generator
    text = (folder / "README.md").read_text()
    assert "library_name: diffusers" in text
    assert "VFMLabPipeline.from_pretrained" in text
    assert "drawn by vfmlab's own code" in text
    assert f"Evaluation of the tokenizer, {run_dir.config().parent}" in text
    for path in ("vae/config.json", "transformer/config.json", "README.md"):
        assert str(root) not in (folder / path).read_text()


def test_from_the_command_line(tokenizer, capsys):
    root, run_dir, _ = tokenizer
    command = ["export", run_dir.id, "--form", "diffusers", "--to", str(root / "other"), "--root", str(root)]
    assert main.main([*command, "--data-licence", "cc0-1.0"]) == 0
    assert "exported" in capsys.readouterr().out
    assert "| licence of the training images | cc0-1.0 |" in (root / "other" / "README.md").read_text()
    assert json.loads((root / "other" / "config.json").read_text())["_class_name"] == "VFMLabAutoencoder"


def test_what_does_not_fit_is_one_line(tokenizer, generator, tmp_path):
    _, _, folder = tokenizer
    with pytest.raises(CheckpointError, match="is of class 'VFMLabAutoencoder'"):
        pipeline.VFMLabGenerator.from_pretrained(folder)
    with pytest.raises(ConfigError, match="weights stay fp32"):
        pipeline.VFMLabAutoencoder.from_pretrained(folder, torch_dtype=torch.float16)
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["run"]["tokenizer"]["channels"] += 1
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="of another shape"):
        pipeline.VFMLabAutoencoder.from_pretrained(other)
    config["vfm_fingerprint"] = "0" * 16
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was trained on VFM weights"):
        pipeline.VFMLabAutoencoder.from_pretrained(other)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        pipeline.save(generator[1].id, tmp_path / "foreign", generator[0])


@pytest.mark.parametrize("source", ["/no/such/folder", "no folder", "../out"])
def test_a_folder_that_is_not_there_is_one_line(source, tmp_path):
    with pytest.raises(CheckpointError, match=f"'{source}' is neither a folder that is there nor the name of a hub repository"):
        pipeline.VFMLabAutoencoder.from_pretrained(source)
    with pytest.raises(CheckpointError, match="no folder '.*vae'"):
        pipeline.VFMLabAutoencoder.from_pretrained(tmp_path, subfolder="vae")


def test_a_tokenizer_is_not_written_over_a_pipeline(tokenizer, generator, tmp_path):
    """A reader takes the autoencoder of a pipeline where there is one: the old one."""
    root, run_dir, folder = tokenizer
    old = shutil.copytree(generator[2], tmp_path / "pipeline")
    with pytest.raises(ConfigError, match="holds other files"):
        pipeline.save(run_dir.id, old, root)
    new = shutil.copytree(folder, tmp_path / "autoencoder")
    with pytest.raises(ConfigError, match="holds other files"):
        pipeline.save(generator[1].id, new, generator[0])
    assert pipeline.save(run_dir.id, new, root) == new
    assert pipeline.save(generator[1].id, old, generator[0]) == old


def test_codes_have_no_such_form(tmp_path):
    run_dir = untrained(smallest("vqgan"), tmp_path)
    with pytest.raises(ConfigError, match="makes codes"):
        pipeline.save(run_dir.id, tmp_path / "out", tmp_path)


def test_loaded_is_what_sample_takes(generator):
    pipe = pipeline.VFMLabPipeline.from_pretrained(generator[2])
    assert isinstance(pipe.loaded, load.LoadedDiffusion)
    assert pipe.loaded.class_names == load.load_diffusion(generator[1].id, generator[0]).class_names
