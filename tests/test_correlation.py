"""Correlations: planted ranks are found, luck is not, protocols do not mix, and one command does it all."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from vfmlab.errors import ConfigError
from vfmlab.evaluation.number import Number
from vfmlab.studies import compare, correlation, correlation_page
from vfmlab.studies.results import Result, Stage

SMALL = {"data.train": 48, "data.val": 16, "protocol.n": 16, "train.samples": 32, "diffusion.train.samples": 32, "diffusion.train.evaluate_at": []}


LUCK = [4, 0, 7, 2, 8, 1, 6, 3, 5]  # an order with little of the row's own in it


def cell(value, hash_="a"):
    return Number(float(value), hash_)


def record(label, seed, gfd, metrics, measured=None, hash_="a", failed=None):
    """A row with a gFD, metrics of its tokenizer and numbers of instruments."""
    mine = {k: cell(v) for k, v in metrics.items()}
    every = mine | ({"gfd": cell(gfd, hash_)} if gfd is not None else {})
    protocol = {"n": 9, "images": {"ema": True}, "features": {"name": "judge", "version": "v"}}
    stage = Stage("tokenizer", "tokenizer", label, 1, mine)
    return Result(label, label, seed, "scenes", hash=hash_, protocol=protocol, numbers=every, failed=failed, stages=(stage,),
                  instruments={k: cell(v) for k, v in (measured or {}).items()})  # fmt: skip


def planted(n=9):
    """gFD falls as `lds` grows, grows with PSNR, and has nothing to do with what `se_cknna` holds."""
    return [
        record(f"row {i}", seed, 10 + i + 0.1 * seed, {"psnr": i**3 + seed, "ssim": 1.0}, {"lds": -(i**0.5), "se_cknna": LUCK[i % 9]})
        for seed in (0, 1)
        for i in range(n)
    ]


def test_planted_ranks_are_found():
    found = {c.metric: c for c in correlation.correlate(planted())}
    assert found.keys() == {"psnr", "lds", "se_cknna"}  # the constant is left out
    for metric, rho in (("psnr", 1.0), ("lds", -1.0)):
        one = found[metric]
        assert (one.rho, one.seeds, one.rows) == (pytest.approx(rho), pytest.approx((rho, rho)), 9)
        assert (one.low, one.high) == pytest.approx((rho, rho))
        assert one.p < 0.002
    luck = found["se_cknna"]
    assert luck.low < luck.rho < luck.high
    assert luck.p > 0.05
    assert luck.rho == pytest.approx(stats.spearmanr(LUCK, range(9)).statistic)
    assert correlation.correlate(planted()) == correlation.correlate(planted())  # draws are seeded


def test_short_trainings_are_ranked_by_the_target_of_long_ones():
    """What the short runs have of the target is a number like any other; rows in one of the two are left out."""
    short = [record(f"row {i}", 0, LUCK[i], {"psnr": 30 - i}, hash_="short") for i in range(9)]
    long = [record(f"row {i}", seed, 10 + i + 0.1 * seed, {"psnr": 7.0}, hash_="long") for seed in (0, 1) for i in range(1, 12)]
    results = correlation.aimed(short, long, "gfd")
    assert [r.label for r in results] == [f"row {i}" for i in range(1, 9)]
    assert results[0].numbers["gfd"].value == pytest.approx(11.05)
    found = {c.metric: c.rho for c in correlation.correlate(results)}
    assert found == {"psnr": pytest.approx(-1.0), "gfd_short": pytest.approx(stats.spearmanr(LUCK[1:], range(1, 9)).statistic)}
    alike = correlation.aimed([*short, *(r.replace(seed=1) for r in short)], long, "gfd")
    assert [(r.label, r.numbers["gfd"].value) for r in alike if r.label == "row 2"] == [("row 2", 12.0), ("row 2", 12.1)]
    with pytest.raises(ConfigError, match=r"no row has 'gfd' in --goal and stands in --from too; rows there: row 30"):
        correlation.aimed(short, [record("row 30", 0, 1.0, {})], "gfd")


@given(arrays.arrays(float, (2, 7), elements=st.integers(-3, 3).map(float)))
def test_spearman_is_scipys_with_ties(values):
    x, y = values
    ours = correlation.spearman(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
        assert correlation.spearman(np.exp(x), y) == pytest.approx(ours)  # ranks only


@given(arrays.arrays(float, (2, 7), elements=st.integers(-3, 3).map(float)),
       arrays.arrays(int, (3, 7), elements=st.integers(0, 3)))
def test_rows_that_are_there_more_than_once_are_repeated(values, times):
    """Also none of them, or one value alone, which have no ranks."""
    for ours, often in zip(correlation.spearman(*values, times), times, strict=True):
        repeated = np.repeat(values, often, axis=1)
        assert ours == pytest.approx(correlation.spearman(*repeated), abs=1e-9, nan_ok=True)


def test_variants_of_a_method_are_no_independent_rows():
    """Five methods of four rows each, alike within a method: the interval over methods is the wider one."""
    random = np.random.default_rng(1)
    centres = random.normal(size=(5, 2))
    rows = [record(f"row {i}", 0, 10 + y, {"psnr": x}).replace(method=f"method {i // 4}")
            for i, (x, y) in enumerate(centres.repeat(4, axis=0) + 0.01 * random.normal(size=(20, 2)))]
    one = correlation.correlate(rows)[0]
    assert one.kinds == 5
    assert one.methods[0] < one.low < one.rho < one.high < one.methods[1] + 1e-9
    alone = [r.replace(method=r.label) for r in rows]
    single = correlation.correlate(alone)[0]
    assert single.kinds == 20
    assert single.methods == pytest.approx((single.low, single.high), abs=0.1), "every row a method of its own"
    assert "| 95 % over rows | 95 % over methods | p |" in correlation_page.build(rows, [one], "gfd", "", "Title").markdown()
    few = correlation.correlate([r.replace(method=f"method {int(r.label[4:]) % 3}") for r in rows])[0]
    assert few.methods is None
    planned = [one._replace(rho=0.5, low=0.1, high=0.7, methods=methods) for methods in ((-0.2, 0.9), (0.05, 0.9), None)]
    assert [c.clear for c in planned] == [False, True, True]
    assert correlation_page.verdict(planned[:1]) == "None: an interval of every metric, over rows or over methods, holds 0."
    assert "(95 % over rows +0.10 … +0.70, over methods +0.05 … +0.90), over 20 rows of 5 methods; p 0." in correlation_page.verdict(planned[1:2])


def test_one_metric_against_another():
    """Better goes with better in the one, luck is in the other; the same two the other way round."""
    rows = [record(f"row {i}", 0, 10 + i, {"psnr": i}, {"se_cknna": -i, "alignment_cknna": LUCK[i]}) for i in range(9)]
    one = correlation.leads(rows)[0]
    assert one.gap == pytest.approx(1 + stats.spearmanr(LUCK, range(9)).statistic)
    assert 0 < one.low < one.gap < one.high
    assert one.methods is None
    assert correlation_page.lead_text(one).endswith("9 rows: **closer**.")
    other = correlation.leads([r.replace(instruments={"se_cknna": cell(LUCK[i]), "alignment_cknna": cell(-i)}) for i, r in enumerate(rows)])[0]
    assert other.gap == pytest.approx(-one.gap)
    assert correlation_page.lead_text(other).endswith("**less close**.")
    in_methods = [r.replace(method=f"method {i % 4}") for i, r in enumerate(rows)]
    assert ", over methods +" in correlation_page.lead_text(correlation.leads(in_methods)[0])
    assert correlation_page.lead_text(one._replace(methods=(-0.1, 1.0))).endswith("**undecided**.")
    assert correlation.leads([r.replace(instruments={"se_cknna": cell(1)}) for r in rows]) == []
    assert "## One metric against another" in correlation_page.build(rows, correlation.correlate(rows), "gfd", "", "Title").markdown()


def test_a_metric_that_one_row_alone_differs_in_has_no_clear_interval():
    """Most draws leave that row out, and say nothing; those that hold it all say the same."""
    rows = [record(f"row {i}", 0, 10 + i, {"psnr": float(i == 0)}) for i in range(7)]
    one, = correlation.correlate(rows)
    assert abs(one.rho) > 0.5
    assert 0 in (one.low, one.high)
    assert min(one.low, one.high) < 0 or max(one.low, one.high) > 0


def test_p_is_uniform_enough_under_luck():
    random = np.random.default_rng(0)
    ps = []
    for _ in range(60):
        x, y = random.normal(size=(2, 8))
        goal, mine = ({str(i): {0: float(v)} for i, v in enumerate(values)} for values in (y, x))
        ps.append(correlation._one("psnr", mine, goal, {}, 0, {}).p)
    assert 0.35 < statistics.fmean(ps) < 0.65


def test_variants_do_not_make_luck_significant():
    """Six methods that have nothing to do with the target, with four variants each: p counts the methods."""
    random, ps = np.random.default_rng(0), []
    labels = [f"{i}-{k}" for i in range(6) for k in range(4)]
    methods = {label: label[0] for label in labels}
    for _ in range(60):
        values = random.normal(size=(2, 6)).repeat(4, axis=1) + 0.01 * random.normal(size=(2, 24))
        goal, mine = ({label: {0: float(v)} for label, v in zip(labels, side, strict=True)} for side in values)
        one = correlation._one("psnr", mine, goal, {}, 0, methods)
        assert one.independent == 6
        ps.append(one.p)
    assert 0.35 < statistics.fmean(ps) < 0.65
    assert "Fewer than 24 methods: this describes them" in correlation_page.verdict([one._replace(rho=0.5, low=0.1, high=0.7, methods=(0.1, 0.7))])


def test_rows_of_another_protocol_stand_apart():
    rows = [*planted(), record("other", 0, 1.0, {"psnr": 0.0}, {"lds": 0.0}, hash_="b"), record("broken", 0, None, {"psnr": 1.0}, failed="it broke")]
    rows[3] = rows[3].replace(failed="instruments: no masks")
    found = correlation.correlate(rows)
    assert {c.rows for c in found} == {9}
    page = correlation_page.build(rows, found, "gfd", "vfmlab correlate ...", "Title")
    text = page.markdown()
    assert "- `other`: its gFD was measured under another protocol" in text
    assert "- `broken`: it broke" in text
    assert "- `row 3, seed 0`: instruments: no masks" in text
    assert "| row 0 | 10.1 (10, 10.1) |" in text
    assert "| LDS ↑ | -1.00 | -1.00, -1.00 | -1.00 … -1.00 | < .001 | 9 |" in text
    assert "methods" not in text
    assert "2 of 3 metrics have p < .05; 0.2 would by luck" in text
    assert "by Holm over all of them PSNR, LDS stay below" in text
    assert page.html().count("plotly-graph-div") == 2
    assert "it broke" in page.html()
    assert page.verdict.startswith("Strongest: ")
    assert "by Holm over 3 metrics" in page.verdict


def test_a_seed_in_which_a_metric_is_constant_has_no_ranks():
    rows = [r.replace(instruments={**r.instruments, "lds": cell(1.0)}) if r.seed == 1 else r for r in planted()]
    found = next(c for c in correlation.correlate(rows) if c.metric == "lds")
    assert len(found.seeds) == 1
    assert found.seeds[0] == pytest.approx(-1)


def test_better_first_whichever_end_that_is():
    rows = [r.replace(numbers={**r.numbers, "class_accuracy": cell(r.numbers["gfd"].value)}) for r in planted()]
    assert correlation_page.table(rows, "gfd")[0]["row"] == "row 0"
    assert correlation_page.table(rows, "class_accuracy")[0]["row"] == "row 8"


@pytest.mark.parametrize(
    ("rows", "target", "said"),
    [(planted(3), "gfd", "3 rows have 'gfd' under one protocol; ranks need at least 4"), (planted(), "fid", "target = 'fid': choose from gfd")],
)
def test_what_has_no_ranks_is_refused(rows, target, said):
    with pytest.raises(ConfigError, match=said):
        correlation.correlate(rows, target)


def test_wrong_names_are_refused_before_anything_is_trained(tmp_path):
    specs = [f"{i}=tiny_plain_vae:train.lr={i}e-3" for i in range(1, 5)]
    with pytest.raises(ConfigError, match="unknown instrument 'ldss'"):
        compare.correlate(specs, [0], tmp_path, tmp_path / "out", names=["ldss"])
    with pytest.raises(ConfigError, match="target = 'fid'"):
        compare.correlate(specs, [0], tmp_path, tmp_path / "out", target="fid")
    assert not list(tmp_path.iterdir())


def test_published_correlations_stand_beside_ours():
    """Theirs counts as met where both intervals hold it; of metrics that nobody reports, and for other targets, nothing stands there."""
    rows = planted(correlation.ENOUGH)
    ranked = correlation.correlate(rows)
    (line,) = correlation_page.published(ranked)
    assert (line["metric"], line["theirs"], line["here"], line["in both intervals"]) == ("LDS ↑", "-0.13", "-1.00", "no")
    wide = [c._replace(low=-1.0, high=0.2, methods=(-0.9, 0.1)) for c in ranked]
    assert [line["in both intervals"] for line in correlation_page.published(wide)] == ["yes"]
    headings = [[part.heading for part in correlation_page.build(rows, ranked, target, "", "").sections] for target in ("gfd", "psnr")]
    assert ["Beside what others report" in each for each in headings] == [True, False]
    assert correlation_page.published([c._replace(rows=9) for c in ranked]) == []


@pytest.mark.timeout(600)
def test_one_command(tmp_path, capsys):
    """Four settings of a tokenizer, trained, measured and ranked; the second call measures nothing again."""
    from vfmlab.cli import main

    specs = [f"{name}=tiny_plain_vae:train.lr={lr}" for name, lr in (("a", 1e-4), ("b", 1e-3), ("c", 3e-3), ("d", 1e-2))]
    sets = [f"{k}={json.dumps(v)}" for k, v in SMALL.items()]
    command = ["correlate", *specs, "--seeds", "0", "--jobs", "1", "--root", str(tmp_path / "runs"), "--out", str(tmp_path / "why"), "--instruments", "lds"]
    assert main.main([*command, "--set", *sets]) == 0
    data = json.loads((tmp_path / "why.json").read_text())
    assert {c["metric"] for c in data["correlations"]} >= {"psnr", "rfd", "lds"}
    assert all(-1 <= c["low"] <= c["high"] <= 1 and c["rows"] == 4 for c in data["correlations"])
    text = (tmp_path / "why.md").read_text()
    assert all(f"| {name} |" in text for name in "abcd")
    assert str(tmp_path) not in text
    assert (tmp_path / "why.html").stat().st_size > 100_000
    again = ["correlate", "--from", str(tmp_path / "why.json"), "--out", str(tmp_path / "again")]
    assert main.main(again) == 0
    reread = json.loads((tmp_path / "again.json").read_text())
    assert reread["correlations"] == data["correlations"]
    assert reread["results"] == [], "they stand in the file that it was made of"
    capsys.readouterr()
    assert main.main([*again, *specs]) == 2
    assert "not both" in capsys.readouterr().err
    for option in (["--seeds", "0", "1"], ["--set", "seed=1"], ["--instruments", "lds"], ["--retry"]):
        assert main.main([*again, *option]) == 2
        assert f"error: {option[0]} with --from: results are taken as the files have them" in capsys.readouterr().err
    goal = ["--goal", str(tmp_path / "why.json")]
    there = set((tmp_path / "runs").iterdir())
    elsewhere = [str(tmp_path / "aimed") if part == str(tmp_path / "why") else part for part in command]
    assert main.main([*elsewhere, *goal, "--set", *sets, "diffusion.train.lr=1e-3"]) == 0
    assert set((tmp_path / "runs").iterdir()) == there, "tokenizers are there; no generator is trained"
    aimed = json.loads((tmp_path / "aimed.json").read_text())
    assert [r["numbers"]["gfd"] for r in aimed["results"]] == [r["numbers"]["gfd"] for r in data["results"]]
    capsys.readouterr()
    assert main.main([*elsewhere[:4], "e=tiny_plain_vae", *elsewhere[5:], *goal]) == 2
    assert "error: --goal: no 'gfd' of row 'e'; rows there: a, b, c, d" in capsys.readouterr().err
    assert main.main(["correlate", *specs[:2]]) == 2
    assert "need at least 4" in capsys.readouterr().err


def test_partial_correlation_takes_out_what_is_shared():
    random = np.random.default_rng(0)
    z = random.normal(size=400)
    x, y = z + random.normal(size=400), z + random.normal(size=400)
    assert correlation.spearman(x, y) > 0.4
    assert abs(correlation.partial(x, y, z)) < 0.1
    assert correlation.partial(x, y, random.normal(size=400)) == pytest.approx(float(correlation.spearman(x, y)), abs=0.01)
    assert correlation.partial(x, y, x) is None
