"""Two processes (gloo, CPU) measure and draw together what one process does alone."""

from __future__ import annotations

import json
import math

import measure_together
import numpy as np
import processes
import pytest
import tiny
import torch

from vfmlab import api, presets, runs
from vfmlab.evaluation import generation, samples
from vfmlab.evaluation.ranks import Ranks

SMALL = {"train.samples": 32, "diffusion.train.samples": 32, "diffusion.train.evaluate_at": [], "train.evaluate_at": []}
PROTOCOL = {"n": 13, "batch": 4, "sampler.steps": 3}  # 13 does not divide by two processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer and a generator, of a few steps, and their ids."""
    root = tmp_path_factory.mktemp("runs")
    recipe = presets.get("tiny_plain_vae", tiny.COMMON | SMALL)
    for _ in api.train(recipe, root):
        pass
    return root, *(phase.id for phase in recipe.phases())


def test_two_processes_measure_and_draw_what_one_does(trained, tmp_path):
    root, tokenizer, generator = trained
    alone = {"tokenizer": api.evaluate(tokenizer, root, PROTOCOL).record(), "generator": api.evaluate(generator, root, PROTOCOL).record()}
    with np.load(api.sample_npz(generator, 13, tmp_path / "one.npz", root, PROTOCOL)) as file:
        one = file["arr_0"]
    out = tmp_path / "two.npz"
    options = {"root": str(root), "tokenizer": tokenizer, "generator": generator, "protocol": PROTOCOL, "n": 13, "out": str(out)}
    process = processes.start(measure_together.__file__, options)
    output, _ = process.communicate(timeout=290)
    assert process.returncode == 0, output
    assert [(tmp_path / f"two.npz.{rank}.open").read_text() for rank in (0, 1)] == ["False", "False"], "of the process group"
    with np.load(out) as file:
        assert np.abs(file["arr_0"].astype(int) - one).max() <= 1
    first, second = (json.loads((tmp_path / f"two.npz.{rank}.json").read_text()) for rank in (0, 1))
    for kind, numbers in alone.items():
        assert first[kind].keys() == second[kind].keys() == numbers.keys()
        for name, entry in numbers.items():
            for theirs in (first[kind][name], second[kind][name]):
                assert theirs["protocol"] == entry["protocol"], name
                assert theirs.get("reason") == entry.get("reason")
                if isinstance(entry["value"], float):
                    assert math.isclose(theirs["value"], entry["value"], rel_tol=2e-3, abs_tol=2e-4), (kind, name, theirs, entry)
    assert (first["progress"], second["progress"]) == ([[13, 13]], [])
    for each in (first, second):
        assert each["line"].startswith("samples: process 0 has ")
        assert "\n" not in each["line"]


def test_samples_that_are_there_are_measured_and_not_drawn_anew(trained, monkeypatch):
    root, _, generator = trained
    alone = api.evaluate(generator, root, PROTOCOL, again=True)
    path = api.sample_npz(generator, 13, None, root, PROTOCOL)
    monkeypatch.setattr(generation, "drawn", None)  # must not be called
    again = api.evaluate(generator, root, PROTOCOL, again=True)
    path.unlink()
    for name in ("gfd", "gkd", "gfd_own", "class_accuracy"):
        assert again[name].value == pytest.approx(alone[name].value, rel=1e-5, abs=1e-7), name
        assert again[name].protocol == alone[name].protocol


def test_a_file_of_samples_may_be_at_home(trained, tmp_path, monkeypatch):
    root, _, generator = trained
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(samples, "write", lambda network, tokenizer, protocol, classes, path, *rest: path)
    assert api.sample_npz(generator, 13, "~/samples.npz", root, PROTOCOL) == tmp_path / "samples.npz"


def test_shares_are_equal_and_join_to_the_whole():
    """The joined shares, cut to n, are the batch; fewer rows than processes included."""
    for n in (1, 2, 5, 8):
        ids = torch.arange(n) + 3
        parts = [Ranks(k, 3).share(ids) for k in range(3)]
        assert len({len(part) for part in parts}) == 1
        assert torch.equal(torch.cat(parts)[:n], ids)


def test_precision_changes_numbers_and_hash(trained):
    root, _, generator = trained
    exact, half = (api.evaluate(generator, root, PROTOCOL | {"precision": precision}) for precision in ("fp32", "bf16"))
    assert exact["gfd"].protocol != half["gfd"].protocol
    assert half["gfd"].value != exact["gfd"].value
    assert half["gfd"].value == pytest.approx(exact["gfd"].value, rel=0.1)
    named = {f"protocol.{key}": value for key, value in (PROTOCOL | {"precision": "bf16"}).items()}
    assert api.evaluate(generator, root, named)["gfd"] == half["gfd"], "the names of a recipe are taken too"


def test_the_command_writes_the_file_and_says_where(trained, capsys):
    from vfmlab.cli import main

    root, tokenizer, generator = trained
    command = ["sample", generator, "--root", str(root), "--npz", "6", "--steps", "2"]
    assert main.main([*command, "--set", "labels=random"]) == 0
    (path,) = (runs.open_run(generator, root).path / "npz").glob("6-*.npz")
    assert str(path) in capsys.readouterr().out
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["format"], about["run"], about["protocol"]["labels"]) == (samples.FORMAT, generator, "random")
    assert main.main([*command, "--set", "protocol.seed=4"]) == 0
    drawn = [json.loads(path.read_text())["protocol"]["seed"] for path in (runs.open_run(generator, root).path / "npz").glob("6-*.json")]
    assert sorted(drawn) == [0, 4], "the protocol's seed, where the call gives none"
    for wrong, line in (
        ([*command, "--seed", "3", "--set", "seed=4"], "--set seed=4"),
        ([*command, "--set", "n=4"], "--set n=4"),
        ([*command, "--labels", "0"], "--labels with --npz"),
        ([*command[:-3], "0"], "--npz 0"),
        (["sample", generator, "--root", str(root), "--set", "n=3"], "--set n=3"),
        (["sample", tokenizer, "--root", str(root), "--npz", "6"], "draws no samples"),
        ([*command, "--out", "x.zip"], "ends in .npz"),
        ([*command, "--set", "precision=tf32"], "has no TF32"),
    ):
        assert main.main(wrong) == 2
        assert line in capsys.readouterr().err
