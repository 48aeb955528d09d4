"""The app's card of choices: what `vfmlab choose` wrote, or the command that writes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio")

from apps import app, choices, compare, models, share  # noqa: E402

PAGE = "# Which tokenizer for these images?\n\n**Verdict.** {}.\n\n## Ranking\n\n| row | gFD |\n\n## Finalists\n\nlong tables\n"


def card(root):
    """The names that the card offers, the one that it shows, its text, and what looks again."""
    with gr.Blocks() as blocks:
        choices.build(root)
    box = next(b for b in blocks.blocks.values() if isinstance(b, gr.Dropdown))
    shown = next(b for b in blocks.blocks.values() if isinstance(b, gr.Markdown))
    return [name for name, _ in box.choices], box.value, shown.value, next(iter(blocks.fns.values())).fn


def test_a_folder_without_choices_shows_the_command(tmp_path):
    names, value, shown, _ = card(tmp_path / "runs")
    assert (names, value) == ([], None)
    assert f"vfmlab choose --data folder:PATH --vfm efficientnet_lite0 mobilenetv2 --root {tmp_path / 'runs'}" in shown


def test_choices_beside_the_runs_and_in_their_folder(tmp_path):
    root = tmp_path / "runs"
    root.mkdir()
    names, _, _, look = card(root)
    assert not names
    for folder, name in ((tmp_path, "cats"), (root, "dogs")):
        (folder / f"{name}.recipe.json").write_text("{}")
        (folder / f"{name}.md").write_text(PAGE.format(name))
    (tmp_path / "notes.md").write_text("not a choice")
    assert card(root)[:2] == (["cats", "dogs"], "cats")
    for asked, given in (("dogs", "dogs"), ("../notes", "cats"), (None, "cats"), (["dogs"], "cats")):
        update, page = look(asked)
        assert (update["choices"], update["value"]) == (["cats", "dogs"], given)
        assert f"**Verdict.** {given}." in page
        assert "long tables" not in page


def test_what_a_list_of_classes_keeps_when_the_run_changes(monkeypatch, tmp_path):
    """A shared link sets run and class at once; the change of the run must not take the class away."""
    known = {"plain": SimpleNamespace(raw_config={}), "text": SimpleNamespace(raw_config={"protocol": {"prompts": "held_out"}})}
    monkeypatch.setattr(models, "_known", lambda root: (known, {}))
    monkeypatch.setattr(models, "class_names", lambda root, run: ["cat", "dog"])
    for run, chosen, stays in (("plain", "dog", True), ("plain", "1", True), ("plain", "2", False), ("plain", "bird", False),
                               ("text", "a red square", True), ("gone", "dog", False), (None, "dog", False), ("plain", None, False)):  # fmt: skip
        assert bool(models.fits(tmp_path, run, chosen, ["every class", "cat", "dog"])) is stays, (run, chosen)


def test_a_shared_state_says_what_of_it_is_not_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "choices", lambda root, *kinds: [("new", "new-1"), ("old", "old-1")])
    with gr.Blocks():
        run, runs = models.dropdown(tmp_path, ("tokenizer",), "tokenizer"), models.dropdown(tmp_path, ("tokenizer",), "tokenizers", most=2)
        tab = share.Tab("t", {"run": run, "runs": runs, "steps": gr.Slider(1, 9, 3, step=1, label="steps (of the sampler)")})
    for state, names in (({"run": "old-1", "runs": ["new-1"], "steps": 4}, []), ({"run": "gone", "steps": 4}, ["tokenizer"]),
                         ({"runs": ["old-1", "gone"]}, ["tokenizers"]), ({"steps": 70}, ["steps"]), ({}, [])):  # fmt: skip
        state |= {"tab": "t"}
        assert share.left_out(tab, state, share.updates(tab, state)) == names, state


def test_a_run_that_is_gone_is_not_replaced_without_a_word(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "choices", lambda root, *kinds: [("new", "new-1")])
    with gr.Blocks():
        _, (read, *_) = compare.build(tmp_path)
    for run, said in (("gone-1", True), ("new-1", False), ("", False)):
        shown = read("", False, "gfd", "rfd", "gfd", run)
        assert shown[2].startswith("The run that was asked for is not here") is said
        assert shown[8]["value"] == "new-1"


def test_a_state_that_is_none_is_said(tmp_path):
    (tmp_path / "examples").mkdir()
    page = app.build(tmp_path / "runs", tmp_path)
    restore = next(fn.fn for fn in page.fns.values() if fn.name == "restore")
    said = {text: restore(text)[0] for text in ("", None, "{", '{"tab": "sample", "seed": 3}', '{"tab": "sample", "run": "gone"}')}
    assert said[""] == said[None] == ""
    assert said["{"] == "This is no shared state of this page."
    assert said['{"tab": "sample", "seed": 3}'] == "Set to a shared state of 'sample'."
    assert said['{"tab": "sample", "run": "gone"}'].endswith("fitting: diffusion or ar run.")
