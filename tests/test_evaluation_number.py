"""Numbers and reports: JSON both ways, earlier versions open, damaged files are no reports; one registration reaches every page."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evaluation_toys import CFG, Lossless, setup

from vfmlab import api, config, runs
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation import evaluate, number
from vfmlab.evaluation.instruments import pixels
from vfmlab.evaluation.instruments.base import Metric, Metrics
from vfmlab.evaluation.number import CURVE, HIGHER, TABLE, TARGET, Draft, Number, Quantity, Report, quantities
from vfmlab.registry import INSTRUMENTS
from vfmlab.studies import compare_page, correlation, leaderboard, page, results, sweep
from vfmlab.studies.results import Result, Stage

PROTOCOL = config.Protocol(n=40, batch=25)
EARLIER = {  # report.json as it was written before numbers had labels
    "run": "old-1", "request": "abc", "kind": "tokenizer", "hash": "h", "protocol": {"n": 9, "images": {"n": 9}},
    "metrics": {"psnr": {"value": 20.5, "protocol": "p", "n": 9, "spread": 1.0}, "lpips": {"value": None, "reason": "no weights"}},
    "curves": {"noise_psnr": {"value": [20.5, 19.0], "protocol": "p", "n": 9, "sigma": [0.0, 0.1]}},
    "protocols": {"p": {"n": 9}}, "warnings": ["few"], "seconds": 3.5,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "perceptual", lambda device: "no weights in this test")


def test_reports_of_earlier_versions_open():
    report = Report.from_json(EARLIER)
    assert report["psnr"] == Number(20.5, "p", 9, 1.0, HIGHER, "PSNR", "dB")
    assert report.missing == {"lpips": "no weights"}
    assert report.curves["noise_psnr"].facts == {"sigma": [0.0, 0.1]}
    assert (report.run, report.hash, report.warnings, report.protocol["n"]) == ("old-1", "h", ("few",), 9)
    assert Report.from_json(json.loads(json.dumps(report.as_json(), allow_nan=False))) == report
    instruments = Report.from_json({"metrics": {}, "instruments": {"lds": {"seconds": 0.5}}, "reference": "judge"})
    assert instruments.instruments == {"lds": 0.5}
    assert instruments.about == {"reference": "judge"}


@pytest.mark.parametrize("damage", [
    b"", b"[1]", b'{"metrics": 3}', b'{"metrics": {"psnr": 3}}', b'{"metrics": {"psnr": {"value": "x"}}}', b"\xff\xfe{",
    b'{"metrics": {}, "version": 99}', b'{"metrics": {"psnr": {"value": true}}}', b"[" * 100_000,
])  # fmt: skip
def test_damaged_reports_are_none(tmp_path, damage):
    path = tmp_path / "report.json"
    path.write_bytes(damage)
    assert number.read(path) is None
    assert number.read(tmp_path / "none.json") is None


def test_plain_numbers_say_that_they_have_no_protocol():
    """What reads points of a sweep asks for both fields."""
    assert Number(1.0).as_json() == Number(1.0).entry() == {"value": 1.0, "protocol": None}


def test_a_report_reads_as_lines_and_names_what_was_meant():
    report = Report({"psnr": Number(12.5, "p", unit="dB"), "lpips": Number(None, reason="no weights")}, run="run-1", hash="aaaa")
    assert [line.split(maxsplit=1) for line in str(report).splitlines()] == [["run-1", "protocol aaaa"], ["psnr", "12.5000 dB"], ["lpips", "no weights"]]
    with pytest.raises(KeyError, match="no number 'PSNR'.*psnr"):
        report["PSNR"]
    assert "PSNR" not in report
    assert report.get("PSNR") is None


def test_a_number_that_is_not_finite_is_absent():
    one = Number.from_json("psnr", {"value": math.nan, "protocol": "p"})
    assert one.absent
    assert "nan" in one.reason
    with pytest.raises(DataError, match="no entry of a report"):
        Number.from_json("psnr", 3.0)


def test_what_is_not_written_is_absent_with_its_reason():
    """Whatever a metric cannot measure ends that metric, never the report."""

    class Fails(Metric):
        quantities = (Quantity("one"), Quantity("two"))

        def write(self, draft):
            draft.numbers["one"] = Number(1.0)
            raise DataError("all images are black")

    metrics = Metrics("nothing", None)
    metrics.metrics = [Fails(None)]
    report = metrics.write().report()
    assert report["one"].value == 1.0
    assert report["two"].reason == "all images are black"


def test_black_and_single_images_give_a_report_with_reasons(monkeypatch):
    """Probes, distances and alignments that cannot be had on such data are absent; the report is there."""
    for n, black in ((40, True), (1, False)):
        s = setup(PROTOCOL.model_copy(update={"n": n}))
        if black:
            batch = s.source.batch
            monkeypatch.setattr(type(s.source), "batch", lambda self, ids, batch=batch: batch(ids)._replace(images=torch.zeros_like(batch(ids).images)))
        report = evaluate.tokenizer_report(Lossless(), CFG, s.protocol, s)
        assert report["psnr"].value == 100
        assert report["cknna"].absent
        assert all(report.missing.values())
        monkeypatch.undo()
        monkeypatch.setattr(pixels, "perceptual", lambda device: "no weights in this test")


def test_without_a_good_end_there_is_no_ranking():
    with pytest.raises(ConfigError, match="which end of it is good is open"):
        number.rank({"a": {"uniformity": Number(1.0, "p")}}, "uniformity")


# -- one file a metric --------------------------------------------------------------------------------------------------


@pytest.fixture
def brightness():
    """A metric as a new file of `evaluation/instruments` would bring it; nothing else knows of it."""

    class Brightness(Metric):
        order = 11
        quantities = (Quantity("brightness", "brightness", HIGHER, "cd", (TABLE, CURVE, TARGET), definition="how bright reconstructions are"),)

        def __init__(self, gathered):
            super().__init__(gathered)
            self.total, self.n = 0.0, 0

        def update(self, part):
            self.total, self.n = self.total + float(part.output.mean((1, 2, 3)).sum()), self.n + len(part.output)

        def write(self, draft):
            draft.add("brightness", self.total / self.n, self.gathered.resolved, self.n)

    INSTRUMENTS.register("brightness")(Brightness)
    yield
    del INSTRUMENTS._table["brightness"]


def rows(report, n=5):
    """Results of n rows and two seeds, with a curve."""
    made = []
    for i in range(n):
        for seed in (0, 1):
            numbers = {k: Number(v.value + i, v.protocol, v.n, label=v.label) for k, v in report.measured.items()}
            logged = {"brightness": [(8, numbers["brightness"]), (16, numbers["brightness"])]}
            stage = Stage("tokenizer", "tokenizer", f"row {i}", 1.0, numbers)
            made.append(Result(f"row {i}", f"row {i}-{seed}", seed, "scenes", 16, report.hash, report.protocol, numbers, stages=(stage,), logged=logged,
                               latent=(12, 8, 8), method="rae", name=f"row {i}"))  # fmt: skip
    return made


def test_a_new_metric_reaches_every_page_from_its_own_file(brightness, capsys):
    head = "brightness (cd) ↑"
    report = evaluate.tokenizer_report(Lossless(), CFG, PROTOCOL, setup(PROTOCOL))
    assert report["brightness"].unit == "cd"
    assert head in results.report_records({"a": report})[0]  # notebooks and the demo's report
    found = rows(report)
    text = compare_page.build(found, "vfmlab compare", "Title").markdown()
    assert f"| {head} |" in text
    assert "brightness over training" in text
    assert "brightness over training" not in compare_page.build([r.replace(logged={}) for r in found], "", "").markdown()
    assert correlation.correlate(found, "brightness")[0].metric in report.measured
    assert "brightness" in correlation.candidates(found)
    ((_, _, table),) = leaderboard.tables(found)  # and the app's leaderboard
    assert head in table[0]
    assert leaderboard.convergence(found, "brightness").data
    assert "brightness" in leaderboard.metrics(found)
    sweep.result(report)
    assert "brightness" in capsys.readouterr().out
    assert "| `brightness` | brightness (cd) | higher | how bright reconstructions are |" in page.metrics_table().markdown()
    pytest.importorskip("gradio")
    import gradio as gr

    from apps import compare

    with gr.Blocks() as blocks:
        compare.build(runs.root_folder("runs"))
    radio = next(b for b in blocks.blocks.values() if isinstance(b, gr.Radio))
    assert ("brightness", "brightness") in radio.choices


def test_the_manual_lists_every_number():
    listed = (api.Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    assert page.metrics_table().markdown() in listed, "write docs/metrics.md anew: see its last line"


def test_drafts_know_what_they_write():
    draft = Draft()
    draft.absent("lds", "too few")
    draft.absent("rate", "too few")
    report = draft.report()
    assert report["lds"].label == "LDS"
    assert list(report.curves) == ["rate"]
    assert all(q.definition for q in quantities(TABLE).values())


# -- verdicts -----------------------------------------------------------------------------------------------------------


def generated(label, values):
    return [Result(label, f"{label}-{i}", i, numbers={"gfd": Number(v, "p")}) for i, v in enumerate(values)]


def test_no_verdict_without_a_spread():
    assert results.verdict(generated("a", [3.0]) + generated("b", [4.0])).startswith("None: one seed a row")
    assert results.verdict(generated("a", [3.0])).startswith("None: fewer than two rows")
    uneven = generated("a", [3.0, 3.1]) + generated("b", [4.0, 4.1, 4.2])
    assert results.verdict(uneven).startswith("None: a and b were not measured with the same seeds")


def test_a_verdict_is_of_one_protocol():
    other = [Result("c", "c-0", 0, numbers={"gfd": Number(1.0, "q")})]
    said = results.verdict(other + generated("a", [3.0]) + generated("b", [4.0]))
    assert said == "None: one seed a row, so nothing is known of the spread. gFD ↓: a 3; b 4."


def test_a_verdict_is_an_interval():
    """Seeds that do not overlap are not enough, and seeds that do may be, where the rows move together."""
    apart = generated("a", [3.0, 3.9]) + generated("b", [4.0, 9.0])
    assert results.verdict(apart).startswith("None: the difference of a and b, 3.05 ± 26 (95 %), may be none. gFD ↓: a 3.45")
    together = generated("a", [5.0, 5.5, 7.0]) + generated("b", [4.0, 4.5, 6.1])
    assert results.verdict(together).startswith("b is best: ahead of a by 0.967 ± 0.14 (95 %). gFD ↓: b 4.87 (4, 4.5, 6.1); a")
