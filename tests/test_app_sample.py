"""The app's tab of samples, its handler called as a function: what it gives out draws what it shows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

gr = pytest.importorskip("gradio")

from apps import sample  # noqa: E402
from vfmlab import api  # noqa: E402


def test_each_side_has_the_python_of_its_own_settings(monkeypatch, tmp_path):
    """A diffusion run beside one of tokens: the one has steps and a solver, the other refuses them."""
    hows = {"flow": {"seed": 0, "steps": 7}, "tokens": {"seed": 0}}
    drawn = {}

    def call(root, fields):
        run = fields["run"]
        shown = SimpleNamespace(model=SimpleNamespace(class_names=["cat"], num_classes=1, folder=SimpleNamespace(id=run),
                                                      run=SimpleNamespace(ar=None if run == "flow" else {}), tokenizer=None), card=lambda *_, **__: "")
        return shown, [0], hows[run]

    def draw(model, labels, previews, **how):
        drawn[model.folder.id] = how
        yield api.Preview(1, 1, 0.0, torch.zeros(1, 3, 8, 8), final=True)

    monkeypatch.setattr(sample, "_call", call)
    monkeypatch.setattr(sample.api, "sample", draw)
    monkeypatch.setattr(sample, "until_stopped", lambda steps: steps)
    with gr.Blocks() as blocks:
        sample.build(tmp_path)
    handler = next(fn.fn for fn in blocks.fns.values() if fn.api_name == "sample")
    *_, last = handler("flow", "tokens", "every class", 1, 0, 7, "euler", 1.5, 0, 1, 1, True)
    flow, tokens = [line for text in last if isinstance(text, str) for line in text.splitlines() if "vfmlab.sample(" in line]
    assert drawn == hows
    assert ("steps=7" in flow, "steps" in tokens) == (True, False)


def test_what_a_reader_must_know_of_the_settings_stands_in_the_facts():
    shown = SimpleNamespace(model=SimpleNamespace(class_names=["cat"], num_classes=1), card=lambda figures, facts, many: facts)
    said = {note: sample._cards({"run": api.Preview(1, 1, 0.0, torch.zeros(1, 3, 8, 8), True, note)}, {"run": shown}, {"run": [0]}, True, 1.0)
            for note in ("", "no guidance here")}  # fmt: skip
    assert "done; no guidance here; N = 1, 8 px" in said["no guidance here"]
    assert "done; N = 1, 8 px" in said[""]


def test_a_table_is_headed_by_what_is_drawn(tmp_path):
    with gr.Blocks():
        fields = {"seed": gr.Number(0, precision=0, minimum=0, maximum=sample.SEED, label="seed"), "scale": gr.Slider(0, 8, step=0.1, label="guidance (1: off)")}
    assert sample._values(tmp_path, "seed", "1.6, 7", fields) == [("seed 2", 2), ("seed 7", 7)]
    assert sample._values(tmp_path, "guidance", "1, 1.50", fields) == [("guidance 1", 1.0), ("guidance 1.5", 1.5)]


def test_the_link_of_a_table_brings_its_axes_back(monkeypatch, tmp_path):
    one = SimpleNamespace(name="flow", model=SimpleNamespace(class_names=["cat"], folder=SimpleNamespace(id="flow"), run=SimpleNamespace(ar=None)))
    monkeypatch.setattr(sample, "_call", lambda root, call: (one, [0], {}))
    monkeypatch.setattr(sample.api, "sample", lambda *_, **__: iter([api.Preview(1, 1, 0.0, torch.zeros(1, 3, 8, 8), final=True)]))
    with gr.Blocks() as blocks:
        tab = sample.build(tmp_path)
    handler = next(fn.fn for fn in blocks.fns.values() if fn.api_name == "sample_table")
    axes = {"across": "seed", "columns": "3, 4", "down": "run", "rows": ""}
    monkeypatch.setattr(sample, "_values", lambda root, axis, values, fields: [(axis, 1)])
    *_, last = handler("flow", "none", None, 1, 0, 7, "euler", 1.5, 0, 1, 1, True, *axes.values())
    state = sample.share.parse(last[-1])
    assert {name: state.get(name) for name in axes} == axes
    assert state["label"] == sample.EVERY
    changes = dict(zip(tab.fields, sample.share.updates(tab, state), strict=True))
    assert {name: changes[name].get("value") for name in axes} == axes
