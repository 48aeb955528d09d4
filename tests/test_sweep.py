"""Sweeps on a notebook of three cells: nothing runs twice, whatever is killed; failures are kept and retried; searches go on."""

from __future__ import annotations

import csv
import io
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import pyarrow.parquet
import pytest

pytest.importorskip("papermill")
from vfmlab.cli import main
from vfmlab.errors import ConfigError, Stopped
from vfmlab.evaluation.number import Number, Report
from vfmlab.studies import cluster, executor, sweep
from vfmlab.studies.sweep import grid, page, table
from vfmlab.studies.sweep import notebook as notebooks
from vfmlab.studies.sweep.folder import Folder
from vfmlab.studies.sweep.sweep import _plan

NOTEBOOK = '''# %% tags=["parameters"]
x = 1
y = 0.5
kind = "a"
broken = ""  # a file: while it is there, kind "b" fails
root = "runs"
headless = False

# %%
import os, time
from pathlib import Path
from vfmlab.studies import sweep  # alone, so that a kernel need not wait for torch

Path(root).mkdir(parents=True, exist_ok=True)
open(f"{root}/begun", "a").write(f"{x} {y} {kind}\\n")
if kind == "b" and os.path.exists(broken):
    raise ValueError("no b today")

# %%
from PIL import Image

picture = Image.new("RGB", (8, 4), (60 * x, 90, 200))
sweep.result(loss=(x - 3) ** 2 + y, gpu=int(os.environ.get("CUDA_VISIBLE_DEVICES") or -1), images=picture)
open(f"{root}/ended", "a").write(f"{x} {y} {kind}\\n")
'''


@pytest.fixture
def notebook(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(NOTEBOOK)
    return path


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, "the sweep ended too early"
        assert time.time() < end, "nothing happened"
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_and_no_point_runs_twice(notebook, tmp_path):
    (tmp_path / "grid.yaml").write_text("parameters: {x: [1, 4], y: [0.1, 1e0]}\nmetrics: {loss: lower}\n")
    command = [sys.executable, "-m", "vfmlab", "sweep", str(notebook), "--grid", "grid.yaml", "--out", "out", "--jobs", "1"]
    out, options = tmp_path / "out", {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    first = subprocess.Popen(command, **options)
    wait_for(lambda: len(list(out.glob("points/*/result.json"))) >= 2 and len(lines(out / "runs/begun")) >= 3, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = {path: path.stat().st_mtime_ns for path in out.glob("points/*/result.json")}
    assert 2 <= len(before) < 4
    assert not (out / "table.csv").exists()

    second = subprocess.run(command, timeout=240, **options)
    assert second.returncode == 0, second.stdout
    assert f"{len(before)} of 4 points were done before" in second.stdout
    assert "4 of 4 points finished" in second.stdout
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    wanted = sorted(f"{x} {y} a" for x in (1, 4) for y in (0.1, 1.0))
    assert sorted(set(lines(out / "runs/ended"))) == wanted
    assert 4 <= len(lines(out / "runs/begun")) <= 5, "only the point that was cut off began again"
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text())))
    assert [(row["state"], row["x"], row["y"]) for row in rows] == [("finished", x, y) for x in "14" for y in ("0.1", "1")]
    assert [float(row["loss"]) for row in rows] == pytest.approx([4.1, 5, 1.1, 2])
    table = pyarrow.parquet.read_table(out / "table.parquet").to_pylist()
    assert [row["loss"] for row in table] == [float(row["loss"]) for row in rows]
    page = (out / "index.html").read_text()
    assert page.count("<figure><img alt=") == 4
    assert 'src="http' not in page


class Interrupting(io.StringIO):
    """A stream whose reader presses Ctrl-C as soon as a point is done."""

    def write(self, text):
        if ": done in" in text:
            raise KeyboardInterrupt
        return super().write(text)


def test_failures_are_kept_and_retried_and_the_rest_goes_on(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "gpus", lambda: ["3", "5"])  # two processes, whatever this machine has
    broken = tmp_path / "broken"
    broken.touch()
    spec = {"parameters": {"broken": str(broken), "kind": ["a", "b", "c"]}, "metrics": ["loss", "lots"]}
    with pytest.raises(KeyboardInterrupt):
        sweep.run(notebook, spec, tmp_path / "out", jobs=1, stream=Interrupting())
    states = [row["state"] for row in csv.DictReader((tmp_path / "out/table.csv").open())]
    assert "finished" in states, "what was done is in the table of an interrupted sweep"
    told = io.StringIO()
    found = sweep.run(notebook, spec, tmp_path / "out", stream=told)
    assert [row["state"] for row in found.records] == ["finished", "failed", "finished"], [row["error"] for row in found.records]
    assert found.records[1]["error"] == "ValueError: no b today (cell 3)"
    assert "no b today" in found.page.read_text()
    assert "warning: metrics: no point hands out 'lots' (did you mean 'loss'?)\n" in told.getvalue()
    assert "KeyboardInterrupt" not in told.getvalue()

    began = len(lines(tmp_path / "out/runs/begun"))
    again = sweep.run(notebook, spec, tmp_path / "out", stream=io.StringIO())
    assert (again.count("failed"), len(lines(tmp_path / "out/runs/begun"))) == (1, began), "nothing runs again unless it is asked for"
    broken.unlink()
    mended = sweep.run(notebook, spec, tmp_path / "out", retry=True, stream=io.StringIO())
    assert mended.count("finished") == 3
    assert len(lines(tmp_path / "out/runs/begun")) == began + 1
    assert sorted(lines(tmp_path / "out/runs/ended")) == ["1 0.5 a", "1 0.5 b", "1 0.5 c"]


# -- what a grid says -------------------------------------------------------------------------------------------------


def labels(spec):
    return [p.label() for p in grid.expand(grid.read(spec), "code")]


def test_axes_are_multiplied_and_points_stand_together():
    assert labels({"parameters": {"a": [1, 2], "b": 0}, "set": {"c.d": ["x", "y"]}}) == [
        "b=0, a=1, c.d=x", "b=0, a=1, c.d=y", "b=0, a=2, c.d=x", "b=0, a=2, c.d=y",
    ]  # fmt: skip
    both = {"parameters": {"seed": [0, 1]}, "points": [{"parameters": {"a": 1}}, {"set": {"c": [3, 4]}}]}
    assert labels(both) == ["a=1, seed=0", "a=1, seed=1", "seed=0, c=[3, 4]", "seed=1, c=[3, 4]"]
    assert labels({"set": {"vfm.layers": [[0, 3], [0]]}}) == ["vfm.layers=[0, 3]", "vfm.layers=[0]"]
    assert labels({}) == [""]


def test_numbers_are_read_as_people_write_them(tmp_path):
    (tmp_path / "g.yaml").write_text("set:\n  train.lr: [1e-4, 3E-3, .5, 1e2]\nparameters: {kind: [1e, e1, '1e-4']}\n")
    read = grid.read(tmp_path / "g.yaml")
    assert read.set["train.lr"] == [1e-4, 3e-3, 0.5, 100.0]
    assert read.parameters["kind"] == ["1e", "e1", "1e-4"]


def test_a_point_is_known_by_code_and_values(notebook, tmp_path):
    before = notebooks.read(notebook)
    notebook.write_text("# %% [markdown]\n# Words.\n\n" + NOTEBOOK)
    assert notebooks.read(notebook).code == before.code, "words may change"
    notebook.write_text(NOTEBOOK.replace("x - 3", "x - 4"))
    assert notebooks.read(notebook).code != before.code
    assert before.parameters == {"x": 1, "y": 0.5, "kind": "a", "broken": "", "root": "runs", "headless": False}
    keys = [grid.point(before.code, values, fields).key for values in ({"x": 1}, {"x": 2}, {"x": 1.0}) for fields in ({}, {"x": 1})]
    assert len(set(keys)) == 6
    assert grid.point(before.code, {"x": 1, "root": "elsewhere"}, {}).key == keys[0], "a folder that was moved is the same sweep"


PRESET = '# %% tags=["parameters"]\npreset = "tiny_plain_vae"\noverrides = "{}"\nseed = 0\n\n# %%\n1\n'


@pytest.mark.parametrize(
    ("notebook", "text", "complaint"),
    [
        (NOTEBOOK, "parametres: {x: [1]}", "unknown key 'parametres' (did you mean 'parameters'?)"),
        (NOTEBOOK, "parameters: {x: []}", "axis 'parameters.x' is empty"),
        (NOTEBOOK, "parameters: {x: [1, 2, 1]}", "names 1 twice"),
        (NOTEBOOK, "parameters: {z: [1]}", "has no parameter 'z'"),
        (NOTEBOOK, "parameters: {x: [1], headless: true}", "it is always true"),
        (NOTEBOOK, "parameters: {root: [a, b]}", "all points keep their runs in one folder"),
        (NOTEBOOK, "parameters: {x: {low: 1, high: 2}}", "needs a 'search'"),
        (NOTEBOOK, "parameters: {x: {low: 2, high: 1}}\nsearch: {objective: loss, trials: 2}", "from 2 to 1 is empty"),
        (NOTEBOOK, "parameters: {x: [1]}\nsearch: {objective: loss}", "field 'search.trials' is missing"),
        (NOTEBOOK, "parameters: {x: [1, 2]}\nsearch: {objective: loss, trials: 2}", "write 'direction: minimize' or 'maximize'"),
        (NOTEBOOK, "parameters: {x: 1}\nsearch: {objective: psnr, trials: 2}", "needs an axis to search along"),
        (NOTEBOOK, "parameters: {x: [1]}\nset: {train.lr: [1]}", "has no parameter 'overrides'"),
        (NOTEBOOK, "parameters: {x: 2020-01-01}", "put quotes around it"),
        (NOTEBOOK, "parameters: {x: 1}\nparameters: {x: 2}", "'parameters' stands twice"),
        (NOTEBOOK, "parameters: {x: [1", "cannot be used as YAML"),
        (NOTEBOOK, "- x", "in place of fields"),
        (NOTEBOOK, "points: [{parameters: {x: 1}}, {parameters: {x: 1}}]", "points 1 and 2 are the same"),
        (NOTEBOOK, "points: [{x: 1}]", "points[0]: unknown key 'x'"),
        (NOTEBOOK.replace("parameters", "other"), "{}", "has no cell tagged 'parameters'"),
        (PRESET, "set: {train.samplse: [8]}", "point 1 (train.samplse=8): overrides: unknown field 'train.samplse' = 8 (did you mean 'train.samples'?)"),
        (PRESET, "set: {tokenizer.channels: [4, 0]}", "point 2 (tokenizer.channels=0)"),
        (PRESET, "parameters: {preset: [tiny_plane_vae]}", "did you mean 'tiny_plain_vae'"),
        (PRESET, "set: {seed: [0, 1]}", "has a parameter 'seed', which decides; write it under 'parameters'"),
        (PRESET, "set: {preset: [tiny_rae]}", "has a parameter 'preset', which decides"),
        (PRESET.replace("seed = 0", "seed = 0\nname = 'x'"), "set: {name: [a, b]}", "has a parameter 'name', which decides"),
        (NOTEBOOK, "points: 5", "points"),
        (NOTEBOOK, "points: [5]", "points"),
        (NOTEBOOK, "parameters: 5", "parameters"),
        (NOTEBOOK, "parameters: {root: 5}", "give one path"),
        (NOTEBOOK, "parameters: {x: [1, 9223372036854775808]}", "whole numbers stay below 2^63"),
        (NOTEBOOK, f"parameters: {{{', '.join(f'p{i}: {list(range(100))}' for i in range(10))}}}", "stand for 100,000,000,000,000,000,000 points"),
        (NOTEBOOK, "a: &a [1, 2]\nparameters: {x: *a}", "anchors and aliases"),
        (NOTEBOOK, "parameters: &a {x: *a}", "anchors and aliases"),
        (NOTEBOOK, "parameters: " + "[" * 5000, "grid '"),
        (PRESET, "parameters: {seed: [0]}\nset: {seed: [1]}", "stands under 'parameters' and under 'set'"),
        (PRESET, "set: {protocol.n: [8, 16]}\nsearch: {objective: psnr, trials: 2}", "numbers of different protocols cannot be ranked"),
        (PRESET, "set: {train.lr: {low: -1, high: 1}}\nsearch: {objective: psnr, trials: 2}", "set.train.lr = -1"),
    ],
)
def test_a_bad_grid_is_one_line_and_exit_code_2(notebook, text, complaint, tmp_path, capsys):
    (tmp_path / "n.py").write_text(notebook)
    (tmp_path / "g.yaml").write_text(text)
    assert main.main(["sweep", str(tmp_path / "n.py"), "--grid", str(tmp_path / "g.yaml"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert complaint in said
    assert not (tmp_path / "out/points").exists()


def test_json_grids_are_json(tmp_path):
    path = tmp_path / "g.json"
    path.write_text('{"parameters": {"kind": ["\\ud83d\\ude00", "b"]}}')
    assert grid.read(path).parameters["kind"] == ["\U0001f600", "b"]
    for text, complaint in (
        ('{"parameters": {"kind": "\\ud83d"}}', "half of a character"), ('{"parameters": {}, "parameters": {}}', "'parameters' stands twice"),
        ("{", "cannot be used as JSON"), ("[" * 100_000, "levels deep"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            grid.read(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        grid.read("/dev/zero")


def test_the_root_of_a_grid_may_be_at_home(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plan = sweep.sweep._plan(notebook, {"parameters": {"root": "~/mine"}}, "~/out", False, io.StringIO())
    assert (plan.root, plan.out) == (tmp_path / "mine", tmp_path / "out")
    nowhere = sweep.sweep._plan(notebook, {"parameters": {"root": ""}}, "~/out", False, io.StringIO())
    assert nowhere.root == tmp_path / "out" / "runs"


@pytest.mark.parametrize("text", ["", "[]", "5", '{"state": "finished"}', '{"state": "finished", "seconds": 1, "runs": [1], "numbers": {}}',
                                  '{"state": "finished", "seconds": 1, "runs": [], "numbers": {"a": 5}}', "[" * 100_000])  # fmt: skip
def test_a_broken_result_is_none(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    assert Folder(tmp_path).outcome() is None


DEAF = PRESET.replace("# %%\n1", """# %%
import vfmlab
from vfmlab import runs
from vfmlab.evaluation.number import Report
from vfmlab.studies import sweep

folder = runs.create(vfmlab.resolve(preset, seed=seed).phases()[0], root)
sweep.result(Report({}, run=folder.id), loss=1)""").replace("seed = 0", 'seed = 0\nroot = "runs"')


def test_a_notebook_that_does_not_heed_the_grid_fails(tmp_path):
    """Whatever the field: a row of the table never stands under a value that was not used."""
    (tmp_path / "n.py").write_text(DEAF)
    result = sweep.run(tmp_path / "n.py", {"set": {"train.lr": [0.5]}, "parameters": {"seed": 3}}, tmp_path / "out", jobs=1, stream=io.StringIO())
    assert result.records[0]["error"] == "the notebook trained with another 'train.lr' than the 0.5 of the grid; mend its code"


def test_a_point_at_which_another_sweep_is_can_be_left(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "POLL", 0.01)
    monkeypatch.setattr(executor, "_stopping", {str(tmp_path)})
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(Stopped, match="started again, it goes on"):
        notebooks.execute_point(str(tmp_path), str(tmp_path))


def test_a_cluster_that_ends_decides_nothing_about_its_points(notebook, tmp_path):
    plan = _plan(notebook, {"parameters": {"x": 2}}, tmp_path / "out", False, io.StringIO())
    (point,) = plan.points
    plan.nodes(point)  # makes its folder
    plan.record(point, executor._outcome(SimpleNamespace(status="cancelled")))
    assert plan.folder(point).outcome() is None, "it is open, and runs when the sweep is started again"
    plan.record(point, executor.Outcome(error="its phase failed"))
    assert plan.folder(point).outcome()["state"] == "failed"


def test_files_that_are_not_there(tmp_path, notebook, capsys):
    (tmp_path / "g.yaml").write_text("{}")
    (tmp_path / "text.ipynb").write_text("no notebook")
    for arguments, complaint in (
        (["none.ipynb", "--grid", str(tmp_path / "g.yaml")], "notebook 'none.ipynb' cannot be read"),
        ([str(tmp_path / "text.ipynb"), "--grid", str(tmp_path / "g.yaml")], "is no notebook"),
        ([str(notebook), "--grid", "none.yaml"], "grid 'none.yaml' cannot be read"),
        ([str(notebook), "--grid", str(tmp_path / "g.yaml"), "--out", str(tmp_path / "out"), "--jobs", "0"], "jobs = 0"),
    ):
        assert main.main(["sweep", *arguments]) == 2
        said = capsys.readouterr().err
        assert complaint in said
        assert said.count("\n") == 1


# -- tables and pages -------------------------------------------------------------------------------------------------


def numbers(**values):
    """Entries of a result.json."""
    return {name: {"value": v[0], "protocol": v[1], "n": 9} if isinstance(v, tuple) else {"value": v, "protocol": None} for name, v in values.items()}


def outcome(point, values):
    return page.Outcome(point, {name: Number.from_json(name, entry) for name, entry in numbers(**values).items()})


def filled(tmp_path, spec, results):
    """Points of `spec` with made-up results: dicts of numbers, or the text of an error."""
    points = grid.expand(grid.read(spec), "code")
    folders = {p.key: Folder(tmp_path / p.key) for p in points}
    for p, found in zip(points, results, strict=True):
        folders[p.key].begin()
        if isinstance(found, str):
            folders[p.key].end("failed", 1.0, found)
        elif found is not None:
            folders[p.key].end("finished", 2.0, numbers=numbers(**found))
    return points, folders


def test_a_table_keeps_what_is_a_number_a_number(tmp_path):
    spec = {"parameters": {"psnr": ["a"], "x": [1, 2.5, 3]}, "set": {"vfm.layers": [[0, 1]]}}
    points, folders = filled(tmp_path, spec, [{"psnr": (30, "aa"), "plain": 1}, "went wrong", None])
    table.write(table.records(points, folders), tmp_path)
    rows = pyarrow.parquet.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["finished", "failed", "open"]
    assert [row["x"] for row in rows] == [1.0, 2.5, 3.0]
    assert rows[0]["given.psnr"] == "a", "a number of the same name does not hide what was given"
    assert (rows[0]["psnr"], rows[0]["psnr.protocol"], rows[0]["plain"], rows[0]["vfm.layers"]) == (30, "aa", 1, "[0, 1]")
    assert "plain.protocol" not in rows[0]
    assert (rows[1]["psnr"], rows[1]["error"]) == (None, "went wrong")


def test_a_page_never_ranks_across_protocols(tmp_path):
    spec = {"parameters": {"x": [1, 2, 3, 4, 5]}}
    found = [{"psnr": (30, "aa")}, {"psnr": (20, "aa")}, {"psnr": (99, "bb")}, {"other": 1}, "<b>wrong</b>"]
    points, folders = filled(tmp_path, spec, found)
    text = page.write(grid.read(spec), "n.ipynb", points, folders, ["x"], tmp_path / "index.html").read_text()
    one, two, three = (text.index(f"Protocol {i} of 3") for i in (1, 2, 3))
    first, second = points[0].key, points[1].key
    assert one < text.index(f"<td>{first}") < text.index(f"<td>{second}") < two < text.index(f"<td>{points[2].key}") < three, "better first, then the other protocol"
    assert "&lt;b&gt;wrong" in text
    assert "<b>wrong" not in text
    results = [outcome(p, f) for p, f in zip(points[:2], found[:2], strict=True)]
    assert [r.point.key for r in page.rank(results, "psnr", "lower")] == [second, first]
    assert [r.point.key for r in page.rank(results, "psnr", None)] == [first, second], "no end is good: their own order"


def test_a_page_takes_text_lists_and_missing_values(tmp_path):
    spec = {"parameters": {"x": [1e-4, 1e-1]}, "set": {"l": [[0], [0, 1]]}, "points": [{}, {"parameters": {"only": "here"}}], "metrics": ["a"]}
    results = [{"a": i, "b": 2 * i} if i else {"b": 1} for i in range(8)]
    points, folders = filled(tmp_path, spec, results)
    text = page.write(grid.read(spec), "n.ipynb", points, folders, ["x", "l", "only"], tmp_path / "index.html").read_text()
    assert "8 of 8 points finished" in text
    shown = [outcome(p, r) for p, r in zip(points, results, strict=True)]
    figure = page.parallel(shown, ["x", "l", "only"], ["a"], None)
    axes = {axis.label: axis for axis in figure.data[0].dimensions}
    assert list(axes["l"].ticktext) == ["[0, 1]", "[0]"]
    assert list(axes["a"].values) == list(range(1, 8)), "a point without the number has no line"
    means = [t for t in page.marginal(shown, ["x"], ["a"], grid.read(spec)).data if t.mode == "lines+markers"]
    assert list(means[0].y) == pytest.approx([(1 + 4 + 5) / 3, (2 + 3 + 6 + 7) / 4])


def test_results_are_checked_where_they_are_handed_out():
    report = Report({"psnr": Number(1.0, "aa")})
    for arguments, named, complaint in (
        (["text"], {}, "expected a report"), ([{}], {}, "expected a report"), ([report, report], {}, "two reports have the number 'psnr'"),
        ([report], {"psnr": 2}, "'psnr' is in a report already"), ([], {"loss": "much"}, "'loss' = 'much' is no number"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=complaint):
            sweep.result(*arguments, **named)


# -- searches ---------------------------------------------------------------------------------------------------------

SEARCH = {
    "parameters": {"y": [1, 2, 3], "x": {"low": 0, "high": 4}}, "set": {"lr": {"low": 1e-4, "high": 1.0, "log": True}},
    "search": {"objective": "loss", "trials": 12, "direction": "minimize", "startup": 4},
}  # fmt: skip


class Points:
    """Outcomes of points without running them: loss = (x - 3)^2 + y."""

    def __init__(self, protocol=lambda point: None):
        self.found, self.protocol, self.run = {}, protocol, []

    def finish(self, p):
        self.run.append(p.key)
        loss = {"value": (p.values["x"] - 3.0) ** 2 + p.values["y"], "protocol": self.protocol(p)}
        self.found[p.key] = {"state": "finished", "numbers": {"loss": loss}}

    def refuse(self, p, why):
        self.found[p.key] = {"state": "failed", "numbers": {}, "error": why}

    def check(self, p):
        if p.values["y"] == 2:
            raise ConfigError("y = 2 cannot be")

    def study(self, out, spec=SEARCH):
        pytest.importorskip("optuna")
        from vfmlab.studies.sweep.search import Study

        return Study(grid.read(spec), "code", out, "minimize", lambda p: self.found.get(p.key), self.check, self.refuse)


def test_a_search_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    whole, parts = Points(), Points()
    study = whole.study(tmp_path)
    assert study.left == 12
    while (p := study.take()) is not None:
        whole.finish(p)
        study.ended(p, whole.found[p.key])
    assert study.left == 0
    assert len(set(whole.run)) == len(whole.run), "no point ran twice"
    (tmp_path / "again").mkdir()
    for stop in (3, 4, 99):
        study = parts.study(tmp_path / "again")
        for _ in range(stop):
            if (p := study.take()) is None:
                break
            parts.finish(p)
            study.ended(p, parts.found[p.key])
        study.take()  # began, and was killed
    assert parts.run == whole.run
    assert [p.values for p in study.points] == [p.values for p in whole.study(tmp_path).points]
    values = [p.values for p in study.points]
    assert all(isinstance(v["x"], int) and 0 <= v["x"] <= 4 and 1e-4 <= v["lr"] <= 1 for v in values)
    assert any(f["state"] == "failed" and f["error"] == "y = 2 cannot be" for f in parts.found.values()), "what cannot be is a failed trial"
    losses = [parts.found[key]["numbers"]["loss"]["value"] for key in parts.run]
    assert min(losses) <= 2


def test_what_cannot_be_is_no_point_when_failed_ones_are_run_again(tmp_path):
    points = Points()
    study = points.study(tmp_path)
    while (p := study.take()) is not None:
        points.finish(p)
    refused = [key for key, outcome in points.found.items() if outcome["state"] == "failed"]
    assert refused
    for key in refused:  # --retry
        del points.found[key]
    again = points.study(tmp_path)
    assert again.left == len(refused)
    assert again.take() is None
    assert {points.found[key]["state"] for key in refused} == {"failed"}


def test_a_search_side_by_side_takes_no_point_twice(tmp_path):
    points = Points()
    spec = SEARCH | {"set": {}, "parameters": {"y": [1, 3], "x": [0, 1, 2]}}
    study = points.study(tmp_path, spec)
    taken = [p for p in (study.take() for _ in range(12)) if p is not None]
    assert len({p.key for p in taken}) == len(taken) <= 6


def test_a_search_ranks_one_protocol_only(tmp_path):
    points = Points(protocol=lambda p: f"hash{len(points.run) - 1}")
    study = points.study(tmp_path)
    first, second = study.take(), study.take()
    points.finish(first)
    study.ended(first, points.found[first.key])
    points.finish(second)
    with pytest.raises(ConfigError, match=r"measured under different protocols \(hash0, hash1\)"):
        study.ended(second, points.found[second.key])
    with pytest.raises(ConfigError, match="hands out no 'gfd', only: loss"):
        points.study(tmp_path, SEARCH | {"search": SEARCH["search"] | {"objective": "gfd"}}).ended(first, points.found[first.key])


def test_two_processes_do_not_search_in_one_folder(notebook, tmp_path):
    """Each would overwrite what the other has drawn."""
    spec = {"parameters": {"y": {"low": 0.0, "high": 1.0}}, "search": {"objective": "loss", "trials": 1, "direction": "minimize"}}
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / ".search.lock"), pytest.raises(ConfigError, match="another process searches in"):
        sweep.run(notebook, spec, tmp_path / "out", stream=io.StringIO())
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_a_search_on_a_notebook(notebook, tmp_path):
    pytest.importorskip("optuna")
    spec = {"parameters": {"x": [1, 2], "y": {"low": 0.0, "high": 1.0}}, "search": {"objective": "loss", "trials": 1, "direction": "minimize"}}
    sweep.run(notebook, spec, tmp_path / "out", jobs=1, stream=io.StringIO())
    more = spec | {"search": spec["search"] | {"trials": 2}}
    found = sweep.run(notebook, more, tmp_path / "out", stream=io.StringIO())
    assert found.count("finished") == 2 == len(lines(tmp_path / "out/runs/begun"))
    assert [row["loss"] for row in found.records] == pytest.approx([(row["x"] - 3) ** 2 + row["y"] for row in found.records])
    assert "Course of the search" in found.page.read_text()


def test_ctrl_c_says_how_to_go_on(notebook, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(executor, "run", interrupted)
    (tmp_path / "g.yaml").write_text("parameters: {x: [1, 2]}\n")
    command = ["sweep", str(notebook), "--grid", str(tmp_path / "g.yaml"), "--out", str(tmp_path / "out")]
    assert main.main(command) == 130
    assert f"what was done is saved. To go on: vfmlab {shlex.join(command)}" in capsys.readouterr().err
    assert "2 still to be run" in (tmp_path / "out/index.html").read_text()


HERE = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted((HERE / "notebooks" / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_grid_of_the_project_fits_the_notebook_that_its_head_names(path, tmp_path):
    source = re.search(r"vfmlab sweep (\S+) --grid (\S+)", path.read_text())
    assert HERE / source[2] == path
    plan = _plan(HERE / source[1], path, tmp_path, False, io.StringIO())
    assert plan.points or plan.grid.search
