"""The demo's flags, its seed and its graph; that it runs is test_notebooks' matter."""

from __future__ import annotations

import json
import shlex

import pytest

from vfmlab.cli import main
from vfmlab.errors import TrainingError
from vfmlab.studies import demo, executor

OUTCOME = executor.Outcome()
FLAGS = ["--preset", "tiny_vfm_vae", "--baseline", "tiny_plain_vae"]


class Planned(Exception):
    """Ends a demo whose graph is known."""


@pytest.fixture
def graph(monkeypatch):
    """The nodes that a demo would run."""
    nodes = []

    def plan(found, jobs, cluster):
        nodes.extend(found)
        raise Planned(jobs, cluster)

    monkeypatch.setattr(executor, "run", plan)
    return nodes


@pytest.mark.parametrize(
    ("flags", "seed"),
    [([], 0), (["--seed", "2"], 2), (["--overrides", '{"seed": 1}'], 1), (["--overrides", '{"seed": 1}', "--seed", "1"], 1)],
)
def test_the_seed_reaches_trainings_and_notebooks(graph, tmp_path, flags, seed):
    """The example of the Makefile is among them."""
    with pytest.raises(Planned):
        main.main(["demo", *FLAGS, "--root", str(tmp_path), *flags])
    trained = [node.arguments["recipe"] for node in graph if node.folder]
    assert {phase["seed"] for phase in trained} == {seed}
    books = [node.arguments["parameters"] for node in graph if node.kind == "notebook"]
    assert {parameters["seed"] for parameters in books} == {seed}
    assert {parameters["overrides"] for parameters in books} == {"{}"}, "one source for one value"
    assert len(trained) == 4
    assert len(books) == 9


def test_every_flag_reaches_the_demo(monkeypatch, tmp_path, capsys):
    """One definition for `vfmlab demo` and `make demo`."""
    calls = []
    monkeypatch.setattr(demo, "run", lambda *values: calls.append(values) or tmp_path / "report.html")
    flags = {"--preset": "a", "--baseline": "b", "--data": "folder:it's", "--overrides": '{"train.lr": 1}', "--root": "r", "--seed": "7", "--jobs": "3"}
    assert main.main(["demo", *[word for pair in flags.items() for word in pair]]) == 0
    (call,) = calls
    assert [str(value) for value in call] == ["a", "b", "folder:it's", str({"train.lr": 1}), "r", "7", "3", "None"]
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--overrides {", "--overrides: not JSON"), ("--overrides 5", "expected a JSON object"), ("--overrides '{\"seed\": 1}' --seed 2", "give one of them"),
        ("--preset tiny_plane_vae", "did you mean"), ("--data scenes:easy", "drawn scenes are what the presets use already"),
    ],
)  # fmt: skip
def test_a_demo_that_cannot_be_is_one_line(graph, tmp_path, capsys, flags, complaint):
    assert main.main(["demo", *FLAGS, "--root", str(tmp_path), *shlex.split(flags)]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not graph


def test_what_fails_is_named(monkeypatch, tmp_path):
    def run(nodes, jobs, cluster):
        return {node.key: executor.Outcome(error="disk full" if "07" in node.key else None) for node in nodes}

    monkeypatch.setattr(executor, "run", run)
    with pytest.raises(TrainingError, match=r"notebook 07_train_diffusion.tiny_vfm_vae failed: disk full; .* \(2 of 17 parts"):
        demo.run("tiny_vfm_vae", "tiny_plain_vae", "", {}, tmp_path)


def test_notebooks_come_after_what_they_show(graph, tmp_path):
    with pytest.raises(Planned):
        main.main(["demo", *FLAGS, "--root", str(tmp_path)])
    nodes = {node.key: node for node in graph}
    assert list(nodes) == [node.key for node in graph]

    def before(key):
        return {key}.union(*(before(need) for need in nodes[key].needs))

    for node in graph:
        if node.kind == "notebook" and node.key.endswith("10_compare_and_report.ipynb"):
            assert sum(nodes[key].folder is not None for key in before(node.key)) == 4
            assert json.dumps(node.arguments)
