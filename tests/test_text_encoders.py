"""Frozen text encoders: every registered one gives tokens of one shape; what does not fit is one line."""

from __future__ import annotations

import builtins
import json
from types import SimpleNamespace

import pytest
import torch

from vfmlab import config, presets, runs
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.registry import TEXT_ENCODERS
from vfmlab.seeding import StepRandom
from vfmlab.training.contrast import ContrastObjective
from vfmlab.training.pretrain import PretrainTask
from vfmlab.vfm import pocket_text
from vfmlab.vfm.text import numbered, open_encoder
from vfmlab.weights import io

PROMPTS = ["a red disc", "", "two red discs left of a blue cross"]


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A tiny CLIP text tower of random weights, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    folder = tmp_path_factory.mktemp("tower")
    pairs = {"<|startoftext|>": 0, "<|endoftext|>": 1} | {c + end: i for i, (c, end) in enumerate(
        ((chr(c), end) for c in range(97, 123) for end in ("", "</w>")), 2)}
    (folder / "vocab.json").write_text(json.dumps(pairs))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    config = transformers.CLIPTextConfig(vocab_size=len(pairs), bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes)
    torch.manual_seed(0)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return f"transformers:{folder}"


@pytest.fixture(params=TEXT_ENCODERS.names())
def encoder(request):
    if request.param in ("words", "pocket"):
        return open_encoder(request.param, 12)
    assert request.param == "transformers", "say here how a new encoder is opened without a network"
    return open_encoder(request.getfixturevalue("tower"), 40)


def test_prompts_become_tokens(encoder):
    tokens = encoder(PROMPTS)
    assert tokens.shape == (3, encoder.length, encoder.width)
    assert tokens.dtype == torch.float32
    assert torch.isfinite(tokens).all()
    assert torch.allclose(encoder(PROMPTS[2:])[0], tokens[2], atol=1e-5)
    assert not torch.allclose(tokens[0], tokens[1])
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.fingerprint
    turned = encoder(["a red disc above a blue ring", "a blue ring above a red disc"])
    assert not torch.allclose(*turned), "the order of words is seen"


def test_a_prompt_that_is_too_long_is_one_line(encoder):
    with pytest.raises(ConfigError, match=rf"tokens, encoder '.*' takes {encoder.length}; make it shorter") as caught:
        encoder(["a " * 60])
    assert "\n" not in str(caught.value)


def test_words_are_closed_and_have_no_options():
    with pytest.raises(ConfigError, match=r"'purble' is not among the \d+ words of drawn scenes \(did you mean 'purple'\?\)"):
        open_encoder("words", 12)(["a purble disc"])
    with pytest.raises(ConfigError, match="'words' has no options"):
        open_encoder("words:large", 12)
    with pytest.raises(ConfigError, match=r"unknown text encoder 'wrds' \(did you mean 'words'\?\)"):
        open_encoder("wrds", 12)


def test_the_bundled_tower_knows_what_belongs_together():
    """On scenes of another seed than its training's."""
    task = PretrainTask(config.override(presets.get("pocket_text"), {"data.val": 256, "data.train": 64, "seed": 9}).last)
    found = task.evaluate(pocket_text.read(io.ASSETS / "pocket_text.safetensors")[0], 0)
    assert found["captions_found"] > 0.9
    assert found["order_right"] > 0.65, "a bag of words has a half"
    with pytest.raises(ConfigError, match="17 tokens a prompt, but 'pocket' takes at most 16"):
        open_encoder("pocket", 17)
    with pytest.raises(CheckpointError, match="is not a text"):
        open_encoder(f"pocket:{io.ASSETS / 'judge.safetensors'}", 12)


def test_another_tower_is_trained_and_read_from_its_run(tmp_path):
    recipe = config.override(presets.get("pocket_text"), {"data.train": 64, "data.val": 64, "train.batch": 32})
    task = PretrainTask(recipe.last)
    optimizer, losses = torch.optim.Adam(task.objective.parameters(), 3e-3), []
    for step in range(12):
        loss, parts = task.objective(task.source.batch(torch.arange(32)), StepRandom(0, step, 32), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert 0 < parts["captions_found"] <= 1
    task.finish(task.weights.eval(), runs.RunDir(tmp_path))
    rows = numbered(PROMPTS, task.weights.numbers, 12)
    torch.testing.assert_close(open_encoder(f"pocket:{tmp_path}", 12)(PROMPTS), task.weights(rows), rtol=0, atol=0.02)
    with pytest.raises(ConfigError, match=r"needs captions, which '.*' does not have; set data\.source=scenes:groups"):
        ContrastObjective(SimpleNamespace(what="folder:mine", captions=lambda _: None))
    single = PretrainTask(config.override(recipe, {"data.source": "scenes:easy"}).last)
    assert single.evaluate(single.weights, 0).keys() == {"captions_found"}, "things without sides have no order"


def test_words_of_a_later_version_are_the_same_vectors():
    """They follow from the word alone, so that a run can be opened when the language has grown."""
    one = open_encoder("words", 12)(["red"])[0, 0]
    assert torch.equal(one, open_encoder("words", 16)(["red"])[0, 0])
    assert one[:3].tolist() == pytest.approx([0.58241, 0.64863, -0.30259], abs=1e-4)


def test_a_tower_that_is_not_to_be_had_is_one_line(tower, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="41 tokens a prompt, but '.*' takes at most 40"):
        open_encoder(tower, 41)
    with pytest.raises(CheckpointError, match="cannot be loaded .*check name and network, or give a folder") as caught:
        open_encoder(f"transformers:{tmp_path}", 12)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="names no model; write for example"):
        open_encoder("transformers", 12)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"needs the package 'transformers'; run: pip install 'vfmlab\[text\]'"):
        open_encoder("transformers:any", 12)
