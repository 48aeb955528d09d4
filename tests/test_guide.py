"""Guidance over its scale: which kinds a run has, whose scale is chosen where, what is ahead; runs that do not belong together."""

from __future__ import annotations

import json

import pytest

from vfmlab import api, presets, runs
from vfmlab.cli.main import main
from vfmlab.config import override
from vfmlab.errors import ConfigError
from vfmlab.plots import figures
from vfmlab.studies import guide

CHANGES = {"data.train": 48, "data.val": 16, "vfm.weights": "random", "protocol.n": 8, "protocol.sampler.steps": 2, "train.samples": 8,
           "diffusion.train.samples": 16, "diffusion.train.evaluate_at": []}  # fmt: skip


def rows(kind, scale, values):
    return [{"run": f"r{seed}", "seed": seed, "kind": kind, "scale": scale, "gFD": gfd} for seed, gfd in enumerate(values)]


def test_each_kind_takes_its_best_scale_of_one_run():
    table = [*rows("none", 1.0, [9.0]), *rows("internal", 1.5, [7.0]), *rows("internal", 2.0, [6.0]), *rows("internal", 3.0, [8.0])]
    assert guide.chosen(table) == {"none": 1.0, "internal": 2.0}


def test_a_kind_needs_what_it_leads_away_from():
    full = presets.get("tiny_multi_layer_rae_raev2")
    assert guide.kinds_of(full, ()) == ["null label", "internal"]
    assert guide.kinds_of(override(full, {"diffusion.class_dropout": 0.0}), ["other"]) == ["internal", "auto"]
    assert guide.kinds_of(presets.get("tiny_ar_orders"), ()) == ["null label"]


def test_planted_kinds_are_ahead_level_or_undecided():
    """Seeds move all kinds together and do not count; what surely differs by less than what counts as none is level."""
    seeds = [0.0, 5.0, -3.0, 2.0]
    noise = {"a": [0.02, -0.01, 0.01, -0.02], "b": [-0.02, 0.01, 0.02, -0.01], "c": [0.01, 0.02, -0.02, -0.01]}
    means = {"a": 20.0, "b": 10.0, "c": 19.99}
    table = [row for kind in means for row in rows(kind, 2.0, [means[kind] + s + e for s, e in zip(seeds, noise[kind], strict=True)])]
    found = {(v.first, v.second): v for v in guide.verdicts(table, dict.fromkeys(means, 2.0), bound=1.0)}
    assert {pair: v.verdict for pair, v in found.items()} == {("b", "a"): "ahead", ("b", "c"): "ahead", ("c", "a"): "level"}
    assert found["b", "a"].interval.estimate == pytest.approx(10.0, abs=0.1)
    wild = [*rows("a", 2.0, [10.0, 30.0, 14.0]), *rows("b", 2.0, [28.0, 12.0, 26.0])]
    assert [v.verdict for v in guide.verdicts(wild, {"a": 2.0, "b": 2.0}, 1.0)] == ["undecided"]
    assert guide.verdicts(rows("a", 2.0, [1.0]) + rows("b", 2.0, [2.0]), {"a": 2.0, "b": 2.0}, 1.0) == [], "one seed decides nothing"


def test_the_figure_has_a_line_of_the_first_run_and_a_point_a_run():
    figure = figures.guidance_figure([*rows("none", 1.0, [9.0, 8.0]), *rows("auto", 2.0, [5.0, 7.0]), *rows("auto", 1.5, [6.0])])
    lines = {trace.name: trace for trace in figure.data if trace.mode == "lines"}
    assert (list(lines["auto"].x), list(lines["auto"].y)) == ([2.0, 1.5], [5.0, 6.0])
    assert sum(len(trace.x) for trace in figure.data if trace.mode == "markers") == 5
    (unguided,) = figure.layout.shapes
    assert unguided.y0 == 9.0
    figure = figures.guidance_figure([*rows("none", 1.0, [9.0]), *rows("auto", 2.0, [5.0])])
    assert [shape.y0 for shape in figure.layout.shapes] == [9.0]  # a kind at one scale is no level line


def test_what_the_scale_does_by_planted_runs():
    """Seeds move all scales together; the first run chooses the scale and has no say on it."""
    shift, numbers = [40.0, 2.0, -1.0], {1.0: (20.0, 0.5, 0.8), 2.0: (10.0, 0.6, 0.7), 4.0: (15.0, 0.7, 0.6)}
    table = [{"run": f"r{seed}", "seed": seed, "kind": "none" if scale == 1 else "null label", "scale": scale, "gFD": gfd + shift[seed] + 0.01 * seed * scale,
              "precision": precision + 0.01 * seed, "recall": recall - 0.01 * seed}
             for seed in range(3) for scale, (gfd, precision, recall) in numbers.items()]  # fmt: skip
    found = {row["expected"]: row for row in guide.shape(table, {"none": 1.0, "null label": 2.0})}
    assert list(found) == ["gFD at 1 above that at 2", "gFD at 4 above that at 2", "precision at 4 above that at 1", "recall at 1 above that at 4"]
    assert {row["verdict"] for row in found.values()} == {"supported"}
    assert found["gFD at 1 above that at 2"]["difference"] == pytest.approx(10.0, abs=0.1)
    at_the_edge = guide.shape(table, {"none": 1.0, "null label": 4.0})
    assert [row["expected"] for row in at_the_edge][0:2] == ["gFD at 1 above that at 4", "precision at 4 above that at 1"], "nothing beyond the largest"
    flat = [{**row, "recall": 0.5 + 0.1 * (row["seed"] == 1) * (row["scale"] == 2)} for row in table]
    assert guide.shape(flat, {"none": 1.0, "null label": 2.0})[-1]["verdict"] == "undecided"
    assert guide.shape([row for row in table if row["seed"] < 1], {"none": 1.0, "null label": 2.0}) == [], "one run decides nothing"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Generators with a second read-out, of three seeds, and the root."""
    root, ids = tmp_path_factory.mktemp("runs"), []
    for seed in range(3):
        run = override(presets.get("tiny_multi_layer_rae_raev2"), {**CHANGES, "seed": seed})
        list(api.train(run, root))
        ids.append(run.last.id)
    return root, ids


def test_the_study_at_tiny(trained, tmp_path):
    """The first run chooses, the others are compared; every number stands under its own protocol."""
    root, ids = trained
    command = ["guide", *ids, "--root", str(root), "--out", str(tmp_path / "new" / "page.md"), "--scales", "1.5", "2", "--weaker", ids[1]]
    assert main(command) == 0
    record = json.loads((tmp_path / "new" / "page.json").read_text())
    table = record["records"]
    assert [(r["kind"], r["scale"]) for r in table[:7]] == [
        ("none", 1.0), ("null label", 1.5), ("null label", 2.0), ("internal", 1.5), ("internal", 2.0), ("auto", 1.5), ("auto", 2.0),
    ]  # fmt: skip
    assert len({r["protocol"] for r in table[:7]}) == 7
    assert record["chosen"] == guide.chosen(table[:7])
    for rest in (table[7:11], table[11:]):
        assert {r["kind"]: r["scale"] for r in rest} == record["chosen"], "the others at the chosen scales"
    assert len(record["verdicts"]) == 6
    one = api.evaluate(ids[2], root, {"guidance.kind": "internal", "guidance.scale": record["chosen"]["internal"]})
    mine = next(r for r in table[11:] if r["kind"] == "internal")
    assert (mine["gFD"], mine["protocol"]) == (one.value("gfd"), one.hash), "under the run's own interval of t"
    text = (tmp_path / "new" / "page.md").read_text()
    assert "Scales are chosen on seed 0, and compared on 1, 2." in text
    assert "gFD over the scale of guidance" in (tmp_path / "new" / "page.html").read_text()
    assert "precision over the scale of guidance" in (tmp_path / "new" / "page.html").read_text()

    assert main([*command[:-2], "--whole"]) == 0
    whole = json.loads((tmp_path / "new" / "page.json").read_text())
    assert [(r["seed"], r["kind"], r["scale"]) for r in whole["records"]] == [
        (seed, kind, scale) for seed in range(3) for kind, scale in (("none", 1.0), *((k, s) for k in ("null label", "internal") for s in (1.5, 2.0)))
    ]  # fmt: skip
    assert whole["records"][:5] == table[:5], "what was measured is read"
    assert {row["kind"] for row in whole["shape"]} == {"null label", "internal"}
    assert "--whole" in (tmp_path / "new" / "page.md").read_text()

    assert main([command[0], ids[0], *command[4:-2]]) == 0
    text = (tmp_path / "new" / "page.md").read_text()
    assert "None: one run chooses the scales" in text
    assert "At the chosen scales" not in text, "no empty table"


def test_a_report_without_precision_is_measured_anew(trained):
    """As versions before it wrote it."""
    root, ids = trained
    path = runs.open_run(ids[0], root).path / "report.json"
    api.evaluate(ids[0], root)
    report = json.loads(path.read_text())
    group = next(group for group in report.values() if isinstance(group, dict) and "precision" in group)
    now = group.pop("precision")
    path.write_text(json.dumps(report))
    assert "precision" not in api.evaluate(ids[0], root)
    assert guide.records(ids[:1], root, scales=(1.5,))[0]["precision"] == now["value"]


def test_runs_that_do_not_belong_together_are_one_line(trained):
    root, ids = trained
    with pytest.raises(ConfigError, match="scales 1, 2: give at least one run, and scales above 1"):
        guide.records(ids, root, scales=(1, 2))
    with pytest.raises(ConfigError, match="2 weaker models for 3 runs"):
        guide.records(ids, root, weaker=ids[:2])
    with pytest.raises(ConfigError, match="two runs have seed 0"):
        guide.records([ids[0], ids[0]], root)
    tokenizer = next(path.name for path in root.iterdir() if "tokenizer" in path.name)
    with pytest.raises(ConfigError, match="is a tokenizer run; name runs of a generator"):
        guide.records([tokenizer], root)
    other = override(presets.get("tiny_multi_layer_rae_raev2"), {**CHANGES, "seed": 3, "diffusion.train.samples": 8})
    list(api.train(other, root))
    with pytest.raises(ConfigError, match="differ in 'diffusion'; name runs that differ in their seed alone"):
        guide.records([ids[0], other.last.id], root)
    apart = override(presets.get("tiny_multi_layer_rae_raev2"), {**CHANGES, "seed": 4, "train.lr": 1e-5})
    runs.create(apart.last, root)  # its tokenizer learns otherwise
    with pytest.raises(ConfigError, match="differ in 'train'; name runs that differ in their seed alone"):
        guide.records([ids[0], apart.last.id], root)
