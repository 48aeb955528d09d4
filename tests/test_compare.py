"""Comparisons: rows, tables that hold every seed and never mix protocols, pages that know nothing of this machine."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from vfmlab import api, config, presets, runs
from vfmlab.cli.main import main
from vfmlab.errors import ConfigError, Interrupted, TrainingError
from vfmlab.evaluation import number
from vfmlab.evaluation.number import Number
from vfmlab.studies import compare, compare_page, executor, grids, measure, results
from vfmlab.studies.command import command
from vfmlab.studies.results import Result

SMALL = {"data.train": 48, "data.val": 16, "protocol.n": 16, "train.samples": 32, "diffusion.train.samples": 32, "diffusion.train.evaluate_at": [32]}
STAGES = [{"name": "first"}, {"name": "second", "losses": {"l1": 0.5}}]


def test_rows_are_settings_times_seeds():
    rows = compare.parse(["tiny_plain_vae", "no VF=tiny_vfm_vae:losses.vf.weight=0,vfm.layers=[0,-1],train.lr=0.001"], [0, 3])
    assert [(r.label, r.seed) for r in rows] == [(label, seed) for seed in (0, 3) for label in ("tiny_plain_vae", "no VF")]
    assert "vf" not in rows[1].run.losses
    assert rows[1].run.vfm.layers == (0, -1)
    assert (rows[3].run.seed, rows[3].run.train.lr) == (3, 0.001)
    assert rows[0].phases == rows[0].run.phases()
    nested = compare.parse(['tiny_vfm_vae:equivariance={"p_latent":0.5,"scales":[0.5,1]},train.lr=0.001'], [0])[0].run
    assert (nested.equivariance.p_latent, nested.equivariance.scales, nested.train.lr) == (0.5, (0.5, 1), 0.001)
    for specs, complaint in (
        (["a=tiny_plain_vae", "b=tiny_plain_vae"], "rows 'a' and 'b' have the same config"),
        (["a=tiny_plain_vae", "a=tiny_vfm_vae"], "rows 'a' and 'a' have the same label"),
        (["tiny_plane_vae"], "did you mean 'tiny_plain_vae'"),
        (["tiny_vfm_vae+fusoin"], "did you mean 'fusion'"),
        (["pocket_judge"], "trains no tokenizer"),
        (["tiny_rae@tiny_vfm_va"], "did you mean 'tiny_vfm_vae'"),
        (["tiny_rae@pocket_judge"], "'pocket_judge' has no diffusion or ar section"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            compare.parse(specs, [0])
    with pytest.raises(ConfigError, match="seeds 0, 1, 0: 0 is named twice; name each seed once"):
        compare.parse(["tiny_plain_vae", "tiny_vfm_vae"], [0, 1, 0])
    with pytest.raises(ConfigError, match="seeds: none is named"):
        compare.parse(["tiny_plain_vae"], [])
    with pytest.raises(ConfigError, match="until = 'encoder'"):
        compare.parse(["tiny_plain_vae"], [0], until="encoder")


def test_rows_name_variants_and_stages():
    row = compare.parse(["tiny_vfm_vae+no_style+d8:train.lr=0.5"], [1])[0]
    assert (row.run.tokenizer.channels, row.run.tokenizer.decoder.style, row.run.train.lr) == (8, False, 0.5)
    staged = config.override(presets.get("tiny_plain_vae"), {"stages": STAGES})
    for until, expected in ((None, ["first", "second", "diffusion"]), ("tokenizer", ["first", "second"]), ("first_stage", ["first"])):
        assert [phase.stage for phase in compare.Row("a", 0, staged, until).phases] == expected


def test_a_tokenizer_under_the_diffusion_model_of_another():
    own, common, other = compare.parse(["tiny_rae", "tiny_rae@tiny_plain_vae:diffusion.train.lr=0.5", "tiny_plain_vae"], [4])
    assert [stage.id for stage in common.tokenizers] == [stage.id for stage in own.tokenizers]
    assert own.run.diffusion.network.kind == "ddt"
    assert (common.run.diffusion.network, common.run.protocol, common.run.diffusion.train.lr) == (other.run.diffusion.network, other.run.protocol, 0.5)
    assert len({row.phases[-1].id for row in (own, common, other)}) == 3


def test_a_page_knows_nothing_of_this_machine():
    sets = ["data.source=parquet:DATA/cifar10", "train.samples=8"]
    made_by = command("compare", ["tiny_plain_vae"], {"--seeds": [0], "--title": [], "--out": ["out"], "--set": sets})
    assert made_by == "vfmlab compare tiny_plain_vae --seeds 0 --out out --set data.source=parquet:cifar10 train.samples=8"


def test_spread_shows_every_seed():
    assert results.spread([1.0]) == "1"
    assert results.spread([1032.0, 1046.4]) == "1,039 (1,032, 1,046)", "no powers of ten"
    assert results.spread([1000.0, 1200.0, 1400.0, 1600.0]) == "1,300 ± 260"
    assert results.spread([1.0, 2.0]) == "1.5 (1, 2)"
    assert results.spread([1.0, 2.0, 3.0, 4.0]) == "2.5 ± 1.3"


def record(label, seed, psnr, hash_="aaaa", **more):
    numbers = {"psnr": Number(psnr, hash_, 9)} if psnr is not None else {}
    protocol = {"n": 9, "images": {"n": 9, "ema": True}, "features": {"name": "judge", "version": "v"}}
    parameters = {"trained": 5, "tokenizer": 7, "decoder": 3, "vfm": 0}
    fields = {"hash": hash_, "protocol": protocol, "numbers": numbers, "parameters": parameters, "latent": (4, 2, 2)}
    return Result(label, f"{label}-{seed}", seed, "scenes", 32, seconds={"tokenizer": 10.0 + seed}, **fields | more)


def test_a_row_whose_weights_are_gone_has_no_picture(tmp_path: Path):
    row, = compare.parse(["tiny_plain_vae"], [0], SMALL, until="tokenizer")
    list(api.train(row.run, tmp_path, until="tokenizer"))
    assert list(grids.write([row], tmp_path, tmp_path / "images", "x")) == ["tiny_plain_vae"]
    runs.open_run(row.phases[-1].id, tmp_path).ema.unlink()
    assert grids.write([row], tmp_path, tmp_path / "images", "x") == {}


def test_every_label_has_a_picture_of_its_own(tmp_path: Path, monkeypatch):
    labels = ["VF 0.1", "VF 0-1", "日本", "東京", "plain"]
    rows = [compare.Row(label, 0, presets.get("tiny_plain_vae"), "first_stage") for label in labels]
    monkeypatch.setattr(grids, "finished", lambda phase, root: True)
    monkeypatch.setattr(grids.runs.RunDir, "ema", tmp_path)
    monkeypatch.setattr(grids.api, "reconstruct", lambda run, images, root: (images, images, images.mean((1, 2, 3))))
    files = grids.write(rows, tmp_path, tmp_path / "images", "page")
    names = {label: path.name for label, path in files.items()}
    assert len(set(names.values())) == len(labels) + 1
    assert (names["VF 0.1"], names["plain"], names[""]) == ("page_vf_0_1.png", "page_plain.png", "page.png")


def test_numbers_of_different_protocols_are_in_different_tables():
    """`c` shares a page with the others and is best of all, but it was measured otherwise."""
    found = [record("a", 0, 20.0), record("b", 0, 21.0), record("c", 0, 99.0, "bbbb"), record("a", 1, 24.0), record("d", 0, None, failed="it broke")]
    parts = number.groups(found)
    assert [[r.label for r in part] for part in parts] == [["a", "b", "a"], ["c"]]
    text = compare_page.build(found, "command", "title").markdown()
    assert "| a | **22 (20, 24)** | 10 | 5 / 7 | – | 4 x 2 x 2 |" in text
    assert "| b | 21 |" in text
    assert "| c | 99 |" in text
    assert text.count("PSNR (dB, 32 px) ↑") == 2
    assert "- `d`, seed 0: it broke" in text
    with pytest.raises(ConfigError, match="cannot be ranked"):
        results.best(found, "psnr")


def test_a_page_says_how_many_images_were_there():
    few, all_ = (record("a", 0, None, numbers={"rfd": Number(3.0, "x", n)}) for n in (4, 9))
    assert "N = 9 (4 images are there), " in compare_page.note([few, all_])
    assert "N = 9, " in compare_page.note([all_])


def test_best_follows_what_is_better():
    lower = [record(label, 0, None, numbers={"rfd": Number(v, "x", 9)}) for label, v in (("a", 3.0), ("b", 2.0))]
    assert results.best(lower, "rfd") == "b"
    assert results.best(lower[:1], "rfd") is None


def test_tables_by_stage():
    def stages(values):
        return [results.Stage(s, "tokenizer", s, 4, {"psnr": Number(v, "x", 1)}) for s, v in values.items()]

    found = [record("staged", 0, 2.0, stages=stages({"one": 1.0, "two": 2.0})), record("staged", 1, 4.0, stages=stages({"one": 3.0, "two": 4.0})),
             record("single", 0, 9.0, stages=stages({"tokenizer": 9.0}))]  # fmt: skip
    assert results.stage_records(found) == [
        {"row": "staged", "after stage": "one", "PSNR (dB, 32 px) ↑": "2 (1, 3)", "seconds": "4"},
        {"row": "staged", "after stage": "two", "PSNR (dB, 32 px) ↑": "3 (2, 4)", "seconds": "4"},
    ]


def test_sizes_count_what_any_stage_trains():
    run = config.override(presets.get("tiny_plain_vae"), {"stages": [{"name": "one", "trains": ["quant.*"]}, {"name": "two", "trains": ["decoder.*"]}]})
    whole, first = (results.sizes(compare.Row("a", 0, run, until)) for until in (None, "first_stage"))
    count = whole["parameters"]
    assert whole["latent"] == (4, 4, 4)
    assert count["trained"] == count["decoder"] + first["parameters"]["trained"] < count["tokenizer"]
    assert 0 < first["parameters"]["trained"] < count["decoder"]
    assert count["vfm"] == 0
    assert results.sizes(compare.parse(["tiny_vfm_vae"], [0])[0])["parameters"]["vfm"] > 100_000


def test_pages_do_not_tell_of_this_machine():
    assert results.shown_source("parquet:/somewhere/of/mine/cifar10") == "parquet:cifar10"
    assert results.shown_source("scenes:medium") == "scenes:medium"
    assert results._brief("LPIPS: weights could not be downloaded (no route); put a file into a folder") == "LPIPS: weights could not be downloaded"
    assert results._brief("LPIPS (AlexNet): weights could not be downloaded (no route); put a file into a folder") == "LPIPS (AlexNet): weights could not be downloaded"


def test_sheet_has_a_line_per_group():
    groups = {"original": torch.zeros(3, 3, 8, 8), "a longer name\n20.1 dB": torch.ones(3, 3, 8, 8)}
    picture = grids.sheet(groups, width=100)
    assert picture.height == 2 * 8 * 4 + 2 * 4
    assert picture.getpixel((picture.width - 1, 0)) == (128, 128, 128)
    assert picture.getpixel((picture.width - 1, picture.height - 1)) == (255, 255, 255)
    assert grids.slug("VFM-VAE, VF weight 0") == "vfm_vae_vf_weight_0"


@pytest.mark.timeout(600)
def test_end_to_end(tmp_path):
    """One row that cannot be trained and one with two stages; the second call trains nothing."""
    sets = SMALL | {"stages": STAGES}
    specs = ["plain=tiny_plain_vae", "broken=tiny_plain_vae:train.lr=1e30,train.guard_patience=1"]
    out = tmp_path / "docs" / "table"
    page = compare.run(specs, [1], tmp_path / "runs", out, jobs=1, overrides=sets)
    text, data = page.read_text(), json.loads((tmp_path / "docs" / "table.json").read_text())
    good = [r for r in data["results"] if r["label"] == "plain"]
    assert [r["seed"] for r in good] == [1]
    assert [s["stage"] for s in good[0]["stages"]] == ["first", "second", "diffusion"]
    for name in ("psnr", "ssim", "feature_distance", "rfd", "probe_linear", "probe_knn", "gfd", "class_accuracy"):
        assert good[0]["numbers"][name]["value"] is not None
    assert "lpips" in good[0]["absent"]
    assert {p["samples"] for r in good for p in r["logged"]["gfd"]} == {32}
    assert {p["protocol"] for p in good[0]["logged"]["gfd"]} == {good[0]["numbers"]["gfd"]["protocol"]}
    assert good[0]["seconds"].keys() == {"tokenizer", "diffusion"}
    assert "| plain | second |" in text
    assert "gFD over training" in text
    assert "- `broken`, seed 1: " in text
    assert str(tmp_path) not in text + json.dumps(data)
    assert (tmp_path / "docs" / "table.html").stat().st_size > 100_000
    assert "images/table_plain.png" in text
    assert (tmp_path / "docs" / "images" / "table_plain.png").stat().st_size > 1000
    before = {run.id: (run.path / "status.json").stat().st_mtime for run in runs.scan(tmp_path / "runs")}
    rows = compare.parse(["plain=tiny_plain_vae"], [1], sets)
    assert compare.train(rows, tmp_path / "runs", jobs=1, stream=io.StringIO()) == {}
    assert all(before[p.id] == (tmp_path / "runs" / p.id / "status.json").stat().st_mtime for row in rows for p in row.phases)


def test_rows_share_stages_and_fail_with_the_first_reason(tmp_path, monkeypatch):
    """Three rows with one first stage, and two whose first stage fails; the graph is the executor's matter."""
    base = presets.get("tiny_plain_vae")

    def row(label, lr, then):
        stages = [{"name": "first"}, {"name": "second", "train": {"lr": then}}]
        return compare.Row(label, 0, config.override(base, {"stages": stages, "train.lr": lr}), "tokenizer")

    rows = [row("a", 0.1, 0.1), row("b", 0.1, 0.2), row("x", 9.0, 0.1), row("y", 9.0, 0.2), row("c", 0.1, 0.3)]
    broken, unmeasured = rows[2].phases[0].id, rows[4].phases[1].id
    keys = []

    def perform(nodes, *_):
        keys.extend(node.key for node in nodes)
        outcomes = {}
        for node in nodes:
            failed = next((outcomes[need].error for need in node.needs if outcomes[need].error), None)
            own = {str(tmp_path / broken): "lr is too high", executor.report_key(str(tmp_path / unmeasured)): "no judge"}
            outcomes[node.key] = executor.Outcome(error=failed or own.get(node.key))
        return outcomes

    monkeypatch.setattr(executor, "run", perform)
    ids = [row.phases[-1].id for row in rows]
    assert compare.train(rows, tmp_path) == {ids[2]: "lr is too high", ids[3]: "lr is too high", ids[4]: "no judge"}
    assert keys.count(str(tmp_path / rows[0].phases[0].id)) == 3, "one key for what is shared"


def test_one_page_of_what_several_studies_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def study(name, *rows):
        cells = [Result(label, label, seed, "scenes", hash=hash_, protocol={"n": 9}, numbers={"psnr": Number(value, "t"), "gfd": Number(value, hash_)})
                 for label, seed, hash_, value in rows]
        Path(name).write_text(json.dumps({"results": [cell.as_json() for cell in cells]}))
        return name

    one = study("one.json", ("VAE", 0, "free", 20.5), ("VAE", 1, "free", 21.5))
    two = study("two.json", ("RAE", 0, "free", 30.5), ("RAE", 1, "free", 31.5), ("guided VAE", 0, "guided", 9.5))
    asked = ["compare", "--from", one, two, "--title", "The bench", "--out", "bench"]
    assert main(asked) == 0
    text = Path("bench.md").read_text()
    assert text.startswith("# The bench")
    _, free, guided = text.split("## Protocol ")
    assert all(f"| {label} |" in free for label in ("VAE", "RAE"))
    assert "| guided VAE |" in guided
    assert "| guided VAE |" not in free
    capsys.readouterr()
    for more, said in ((["tiny_plain_vae"], "not both"), (["--seeds", "0"], "--seeds with --from"), (["--until", "tokenizer"], "--until with --from")):
        assert main([asked[0], *(more if more[0][0] != "-" else []), *asked[1:], *(more if more[0][0] == "-" else [])]) == 2
        assert said in capsys.readouterr().err
    assert main(["compare", "--from"]) == 2
    assert main(["compare", "--from", "bench.json", "--out", "again"]) != 0, "its rows stand in the files that it was made of"


def test_instruments_are_nodes_of_the_graph_and_fail_no_row(tmp_path, monkeypatch):
    """On whichever worker is free, once the tokenizer has its report; rows of one tokenizer share the node."""
    seen: dict[str, executor.Node] = {}

    def run(nodes, *_):
        seen.update({node.key: node for node in nodes})
        return {key: executor.Outcome(error="no such thing" if node.kind == "instruments" else None) for key, node in seen.items()}

    monkeypatch.setattr(compare.executor, "run", run)
    rows = compare.parse(["a=tiny_plain_vae", "b=tiny_plain_vae:diffusion.train.lr=0.5", "c=tiny_sd_vae"], [0])
    assert compare.train(rows, tmp_path, instruments={"a": ["lds"], "b": ["lds"]}) == {}
    (node,) = (node for node in seen.values() if node.kind == "instruments")
    mine = str(tmp_path / rows[0].tokenizers[-1].id)
    assert (node.task, node.needs) == (measure.measure, (executor.report_key(mine),))
    assert (node.arguments["ref"], node.arguments["names"]) == (rows[0].tokenizers[-1].id, ["lds"])


@pytest.mark.parametrize(("specs", "overrides"), [(["tiny_plain_vae"], {"seed": 5}), (["a=tiny_plain_vae:seed=5"], None)])
def test_seeds_of_rows_have_one_source(specs, overrides):
    with pytest.raises(ConfigError, match=r"its seeds are 0, 1; leave 'seed' out"):
        compare.parse(specs, [0, 1], overrides)


def test_a_target_that_cannot_be_written_is_seen_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write to folder"):
        compare.run(["tiny_plain_vae"], [0], tmp_path, tmp_path / "file/table", overrides=SMALL)
    assert not runs.scan(tmp_path)


def test_all_rows_failing_is_one_error(tmp_path):
    with pytest.raises(TrainingError, match="all 1 rows failed; the first: .*lr"):
        compare.run(["tiny_plain_vae:train.lr=1e30,train.guard_patience=1"], [0], tmp_path, tmp_path / "out", jobs=1, overrides=SMALL)


def test_a_failed_row_is_the_exit_code(tmp_path, capsys):
    rows = ["good=tiny_plain_vae", "bad=tiny_plain_vae:train.lr=1e30,train.guard_patience=1"]
    small = [f"{key}={value}" for key, value in SMALL.items()]
    arguments = ["compare", *rows, "--seeds", "0", "--until", "tokenizer", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert main([*arguments, "--set", *small]) == 1
    assert "1 rows failed; the first, bad, seed 0: " in capsys.readouterr().out


def test_a_study_that_is_interrupted_in_a_notebook_says_so_in_one_line(monkeypatch, tmp_path):
    def train(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train", train)
    with pytest.raises(Interrupted, match="run this cell again to go on") as caught:
        compare.measured(compare.parse(["tiny_plain_vae"], [0]), tmp_path)
    assert caught.value._render_traceback_() == [str(caught.value)]
