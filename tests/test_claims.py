"""The claims ledger: records that name what is there, verdicts by the rule, and nothing dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vfmlab import api, registry
from vfmlab.cli.main import main
from vfmlab.cli.studies import seconds
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation import number
from vfmlab.evaluation.number import Number
from vfmlab.presets.variants import decoder_size
from vfmlab.studies import claims, claims_page, claims_study, results
from vfmlab.studies.claims import Claim, Contrast, Entry, Ledger, better, decide, gains_more, same
from vfmlab.studies.results import Result, Stage

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
BLOCKS = dict.fromkeys("abcd", "")


def measured(values: dict[str, list[float]], metric: str = "gfd", mark: str = "p0") -> list[Result]:
    return [
        Result(label, f"{label}-{seed}", seed, numbers={metric: Number.from_json(metric, {"value": float(value), "protocol": mark})})
        for label, mine in values.items() for seed, value in enumerate(mine)
    ]  # fmt: skip


def rows(gap: float = 6.0, seeds: int = 3) -> list[Result]:
    rng = np.random.default_rng(0)
    means = {"a": 20.0, "b": 20.0 + gap, "c": 40.0, "d": 41.0}
    return measured({label: list(mean + rng.normal(size=seeds) * 0.3) for label, mean in means.items()})


def train_here(study, root: Path, *_) -> dict[str, str]:
    for phase in (phase for row in study for phase in row.phases):
        for _ in api.train(phase.recipe, root):
            pass
    return {}


def claim(*contrasts, **more) -> Claim:
    return Claim("one", "A statement.", "a paper", "1 < 2", contrasts, **more)


@pytest.mark.parametrize("name", registry.LEDGERS.names())
def test_every_record_names_rows_and_numbers_that_are_there(name: str):
    book = claims.ledger(name)
    assert len({one.id for one in book.claims}) == len(book.claims)
    for one in book.claims:
        assert one.contrasts or one.open, one.id
        assert all(contrast.bound > 0 for contrast in one.contrasts)
        assert one.statement.endswith(".")


@pytest.mark.parametrize("name", registry.LEDGERS.names())
def test_every_row_is_a_recipe(name: str):
    book = claims.ledger(name)
    assert set(book.rows) == {label for one in book.claims for label in one.rows}, "a row that no claim names is never trained"
    for domain in book.domains:
        study = book.study(domain, book.claims, [0], {})
        assert {row.label for row in study} == {label for one in book.claims for label in one.rows if domain in book.rows[label].spec}
        assert len({row.phases[-1].id for row in study}) == len(study)
        assert {row.run.protocol.guidance.scale for row in study} == {1.0}, "unguided; a variant may bring guidance of its own"


@pytest.mark.parametrize("name", registry.LEDGERS.names())
def test_rows_of_a_contrast_decode_with_the_same_means(name: str):
    """What an option changes beside itself is not seen in its name: more channels once made a decoder 29 times as large."""
    book = claims.ledger(name)
    for domain in book.domains:
        runs = {row.label: row.run for row in book.study(domain, book.claims, [0], {})}
        sizes = {label: decoder_size(run) for label, run in runs.items() if hasattr(run.tokenizer, "decoder")}
        for contrast in (contrast for one in book.claims for contrast in one.contrasts):
            own = [sizes[row] for row in contrast.rows if row in sizes]
            assert not own or max(own) < 2 * min(own), f"{domain}: {contrast.says}: parameters of the decoders {own}"


def test_vqrae_end_to_end_sees_as_many_images_as_in_two_stages():
    """Its first stage is one step that leaves the encoder, which is then the one that it distils from, as it is."""
    book = claims.ledger("c")
    labels = ["VQRAE, SimVQ, width 128", "VQRAE, end to end", "VQRAE, end to end, no distillation"]
    for domain in book.domains:
        study = {row.label: row.tokenizers for row in book.study(domain, book.claims, [0], {})}
        two, one, bare = ([stage.train for stage in study[label]] for label in labels)
        assert sum(train.samples for train in two) == sum(train.samples for train in one) == sum(train.samples for train in bare)
        assert one[0].samples == one[0].batch
        assert not any(glob.startswith(("*", "encoder")) for glob in study[labels[1]][0].trains)
        assert ["preservation" in study[label][-1].losses for label in labels] == [True, True, False]


def test_verdicts_follow_the_planted_truth():
    chosen = [claim(better("gfd", "a", "b")), claim(better("gfd", "b", "a")), claim(same("gfd", "a", "c")), claim(better("gfd", "a", "b"), better("gfd", "c", "a"))]
    assert [d.verdict for d in decide(chosen, rows(), BLOCKS)] == ["supported", "refuted", "refuted", "refuted"]


def test_a_gain_of_gains():
    contrast = gains_more("gfd", ("d", "b"), ("b", "a"))  # 41 -> 26 against 26 -> 20
    assert contrast.weights == {"b": -2.0, "d": 1.0, "a": 1.0}
    assert decide([claim(contrast)], rows(), BLOCKS)[0].verdict == "supported"


def test_ratios_are_compared_as_ratios():
    results = measured({"a": [0.1, 0.11], "b": [1.0, 1.1], "c": [0.5, 0.55]}, "rfd")
    finding = decide([claim(better("rfd", "a", "b"))], results, BLOCKS)[0].findings[0]
    assert np.exp(finding.interval.estimate) == pytest.approx(10)
    assert claims_page.line(finding)["estimate"] == "+900 %"


def test_what_is_missing_is_named_and_nothing_is_decided():
    whole = rows()
    failed = [r.replace(failed="out of memory") if (r.label, r.seed) == ("b", 1) else r for r in whole]
    other = [r.replace(numbers={"gfd": Number(r.numbers["gfd"].value, "p1")}) if r.label == "b" else r for r in whole]
    lacking = [r for r in whole if (r.label, r.seed) != ("b", 2)]
    bare = [r.replace(numbers={}) if r.label == "b" else r for r in whole]
    for given, text in (
        (failed, "row 'b', seed 1, failed: out of memory"), (other, "rows of two protocols (p0, p1)"), (lacking, "lacks a seed"),
        (bare, "has no gFD"), ([r for r in whole if r.label != "b"], "row 'b' was not run"), (rows(seeds=1), "1 seed: nothing is known of the spread"),
    ):  # fmt: skip
        decided = decide([claim(better("gfd", "a", "b"))], given, BLOCKS)
        assert decided[0].verdict == "not run"
        assert text in decided[0].lacks[0]
        page = claims_page.build(decided, given, "Ledger", "vfmlab claims", ())
        assert text in page.markdown()


@pytest.mark.parametrize(("metric", "value"), [("rfd", 0.0), ("gfd", float("nan"))])
def test_a_number_that_cannot_be_compared_is_named_and_spoils_no_other_claim(metric: str, value: float):
    results = measured({"a": [1.0, 1.01, value], "b": [2.0, 2.02, 2.01], "c": [3.0, 3.01, 3.03]}, metric)
    blocks = dict.fromkeys("abc", "one")
    odd, whole = decide([claim(better(metric, "a", "b")), claim(better(metric, "b", "c"))], results, blocks)
    assert odd.verdict == "not run"
    assert odd.lacks[0].startswith("row 'a', seed 2")
    assert whole.verdict == "supported"


def test_what_counts_as_none_in_the_judges_features_says_nothing_in_others():
    """A gFD of the factors is below 1: by a tolerance of 1 what is undecided would be refuted."""
    close = measured({"a": [0.60, 0.62, 0.61], "b": [0.61, 0.60, 0.63], "c": [0.90, 0.91, 0.89]})
    chosen = [claim(better("gfd", "a", "b")), claim(better("gfd", "a", "c")), claim(same("gfd", "a", "b"))]
    judged = [d.verdict for d in decide(chosen, close, BLOCKS)]
    elsewhere = [r.replace(protocol={"features": {"name": "factors:RUN", "version": "1"}}) for r in close]
    decided = decide(chosen, elsewhere, BLOCKS)
    assert judged == ["refuted", "supported", "supported"]
    assert [d.verdict for d in decided] == ["undecided", "supported", "not run"]
    assert "counts as none in the features 'factors' is not set" in decided[2].lacks[0]
    page = claims_page.build(decided, elsewhere, "Ledger", "vfmlab claims", ())
    assert "not set" in page.markdown()


def test_rows_of_another_block_do_not_widen_the_interval():
    noisy = rows() + measured({"e": [0.0, 90.0, 10.0], "f": [70.0, 0.0, 50.0]})
    blocks = BLOCKS | {"e": "wide", "f": "wide"}
    alone, beside = (decide([claim(better("gfd", "a", "b"))], given, blocks)[0].findings[0].interval for given in (rows(), noisy))
    assert alone == beside


def test_what_many_contrasts_leave_undecided_needs_more_seeds_than_it_has():
    """Also where the interval of such a one alone would decide it."""
    results = measured({"a": [20.0, 20.4, 20.2], "b": [20.7, 20.8, 21.0], "c": [20.5, 20.3, 20.6], "d": [20.4, 20.6, 20.3]})
    chosen = [claim(*(better("gfd", first, second) for first in "abcd" for second in "abcd" if first != second))]
    left = [f for f in decide(chosen, results, BLOCKS)[0].findings if f.verdict == "undecided"]
    assert any(f.alone != "undecided" for f in left)
    assert all(f.seeds is None or f.seeds > 3 for f in left)


def test_stages_stand_for_themselves():
    def stages(seed: int) -> tuple[Stage, ...]:
        values = {"first": 2.0 + seed / 100, "second": 1.0 + seed / 100}
        return tuple(Stage(name, "tokenizer", name, 1.0, {"rfd": Number(v, "p")}) for name, v in values.items())

    given = [Result("a", f"a-{seed}", seed, numbers=stages(seed)[-1].numbers, stages=stages(seed)) for seed in range(3)]
    finding = decide([claim(better("rfd", "a#second", "a#first"))], given, BLOCKS)[0].findings[0]
    assert finding.verdict == "supported"
    assert finding.interval.rows == 2, "the row itself is its last stage, and says nothing more of the spread"


def test_page_json_and_results_go_round(tmp_path: Path):
    whole = rows()
    decided = decide([claim(better("gfd", "a", "b")), claim(open="it needs more rows"),
                      claim(open="one network under two protocols", elsewhere="guide.md")], whole, BLOCKS)
    page = claims_page.build(decided, whole, "Ledger", "vfmlab claims", (), [claim(better("gfd", "c", "d"))])
    record = {"claims": [claims_page.record(one) for one in decided], "results": [r.as_json() for r in whole]}
    written = page.publish(tmp_path / "ledger", record)
    text = written.read_text()
    assert "Of 3 claims: 1 supported, 1 elsewhere, 1 not run." in text
    assert "Missing: it needs more rows." in text
    assert "Verdict: elsewhere: [guide.md](guide.md)." in text
    assert "Not contrasts of rows: one network under two protocols." in text
    assert "Not run for want of budget" in text
    assert text.count("## Rows under protocol") == len(number.groups(whole))
    assert "parameters trained / all" in text
    data = json.loads((tmp_path / "ledger.json").read_text())
    assert data["claims"][0]["contrasts"][0]["verdict"] == "supported"
    assert results.read(tmp_path / "ledger.json") == whole
    assert claims_page.forest(decided[0].findings).data[0].x[0] > 1
    assert "plotly" in (tmp_path / "ledger.html").read_text()


def test_a_row_in_two_files_has_the_numbers_of_both(tmp_path: Path):
    """Of what both have, those of the first file."""
    stages = (Stage("tokenizer", "tokenizer", "a-0", 1.0), Stage("diffusion", "diffusion", "a-1", 1.0))
    whole = measured({"a": [20.0]})[0].replace(stages=stages)
    short = measured({"a": [30.0]}, "psnr")[0].replace(stages=stages[:1], failed="out of memory", instruments={"lds": Number(0.1, "p0")})
    whole = whole.replace(instruments={"lds": Number(0.2, "p0"), "gsq": Number(0.3, "p0")})
    for name, one in (("short", short), ("whole", whole.replace(numbers={**whole.numbers, "psnr": Number(31.0, "p0")}))):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": [one.as_json()]}))
    both, = results.together([tmp_path / "short.json", tmp_path / "whole.json"])
    assert {name: number.value for name, number in both.numbers.items()} == {"gfd": 20.0, "psnr": 30.0}
    assert {name: number.value for name, number in both.instruments.items()} == {"lds": 0.1, "gsq": 0.3}
    assert both.failed is None
    assert len(both.stages) == 2
    longer = whole.replace(hash="p1", seconds={"tokenizer": 1.0, "diffusion": 2.0})
    (tmp_path / "whole.json").write_text(json.dumps({"results": [longer.as_json()]}))
    both, = results.together([tmp_path / "short.json", tmp_path / "whole.json"])
    assert (both.hash, both.seconds) == ("p1", longer.seconds), "curves, costs and protocol are those of the longer one"


def test_results_of_another_version_are_refused_in_one_line(tmp_path: Path):
    for text, message in (('{"results": [{"version": 1}]}', "version 1"), ("[1]", "holds no results"), ("{", "holds no results")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=message):
            results.read(tmp_path / "x.json")
    with pytest.raises(DataError, match="cannot be read"):
        results.read(tmp_path / "none.json")


def test_shared_phases_are_paid_once_and_a_budget_holds():
    book = Ledger("t", {"a": Entry({"scenes": "tiny_plain_vae"}), "b": Entry({"scenes": "tiny_plain_vae:diffusion.train.lr=0.5"})},
                  [Claim("x", "X.", "p", "1", (better("gfd", "a", "b"),)), Claim("y", "Y.", "p", "1", (better("gfd", "b", "a"),))], {"scenes": {}})
    study = book.study("scenes", book.claims, [0], {})

    def listed(budget: float):
        return claims.prices(study, book.claims, lambda row: {phase.id: 10.0 for phase in row.phases}, budget)

    assert [seconds for _, seconds in listed(30.0)] == [30.0, 0.0]  # the tokenizer is the same
    assert claims.affordable(listed(30.0), 30.0) == (list(book.claims), [])
    assert [seconds for _, seconds in listed(29.0)] == [30.0, 30.0]  # nobody has paid for it
    assert claims.affordable(listed(29.0), 29.0) == ([], list(book.claims))


def test_a_page_that_decides_in_a_ledgers_place_is_there():
    pages = [one.elsewhere for name in "abc" for one in claims.ledger(name).claims if one.elsewhere]
    assert len(pages) > 4
    assert [page for page in pages if not (RESULTS / page if page.endswith(".md") else ROOT / f"{page}.py").exists()] == []


def test_bad_input_is_one_line():
    book = claims.ledger("a")
    with pytest.raises(ConfigError, match="unknown claim 'ordr' .*order"):
        book.chosen(["ordr"])
    assert [one.id for one in book.chosen(["order", "vf_loss", "order"])] == ["order", "vf_loss"], "named twice, counted once by Holm"
    with pytest.raises(ConfigError, match="unknown domain 'moon'"):
        book.study("moon", book.claims, [0], {})
    with pytest.raises(ConfigError, match="unknown ledger of claims"):
        claims.ledger("z")
    assert [seconds(text) for text in ("90m", "2h", "45s")] == [5400, 7200, 45]
    for text in ("90", "h", "-1h", "nan s"):
        with pytest.raises(ConfigError, match="--budget"):
            seconds(text)


@pytest.mark.timeout(600)
def test_a_ledger_runs_from_its_price_to_its_page(tmp_path: Path, monkeypatch):
    rows = {"plain": Entry({"scenes": "tiny_plain_vae"}, "tokenizer"), "slow": Entry({"scenes": "tiny_plain_vae:train.lr=1e-6"}, "tokenizer")}
    spread = Claim("even", "Its latents are spread more evenly.", "none", "none", (Contrast("density_gini", {"slow": 1.0, "plain": -1.0}, "it is", delta=0.01),))
    learns = Claim("learns", "A higher rate learns more.", "none", "none", (better("psnr", "plain", "slow"),))
    book = Ledger("Tiny", rows, [learns, spread], {"scenes": {"protocol.n": 16}})
    monkeypatch.setattr(claims, "ledger", lambda name: book)
    monkeypatch.setattr(claims_study.compare, "train", train_here)  # the executor has tests of its own
    (claim, seconds), _ = claims_study.listed("tiny", "scenes", tmp_path, (0, 1))
    assert claim.id == "learns"
    assert seconds > 0
    page = claims_study.run("tiny", "scenes", tmp_path, tmp_path / "tiny", "vfmlab claims tiny", (0, 1), budget=1e6, jobs=1)
    assert "learns" in page.read_text()
    assert claims_study.listed("tiny", "scenes", tmp_path, (0, 1))[0][1] == 0.0
    for decided in json.loads((tmp_path / "tiny.json").read_text())["claims"]:  # the second needs an instrument
        finding, = decided["contrasts"]
        assert finding["rows"] == 2, decided
        assert finding["seeds"] == 2


@pytest.mark.parametrize("name", sorted(path.stem for path in RESULTS.glob("claims*.md")))
def test_a_page_in_docs_follows_from_its_files(name: str, tmp_path: Path):
    """From those that its command names, or from its own rows where it trained them; numbers and all."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    words = record["command"].split()
    named = words[words.index("--from") + 1 :] if "--from" in words else [f"docs/results/{name}.json"]
    files = [RESULTS.parents[1] / word for word in named if word.endswith(".json")]
    only = [one["id"] for one in record["claims"]]
    claims_study.from_files(words[2], files, only, tmp_path / "new" / "claims.md", record["command"])
    again = json.loads((tmp_path / "new" / "claims.json").read_text())
    for new, old in zip(again["claims"], record["claims"], strict=True):
        assert new["verdict"] == old["verdict"], new["id"]
        for one, other in zip(new["contrasts"], old["contrasts"], strict=True):
            numbers = [{key: side[key] for key in ("estimate", "low", "high", "p") if key in side} for side in (one, other)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-6), (new["id"], one["says"])


def test_files_without_rows_decide_nothing_and_train_nothing(tmp_path: Path, capsys):
    for command, said in (
        (["claims", "a", "--from", str(RESULTS / "claims.json")], "has a number; name the .json of a study that trained rows"),
        (["claims", "a", "--from"], "--from names no file"),
        (["correlate", "--from"], "--from names no file"),
    ):
        assert main([*command, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--seeds", "0", "1", "2"], ["--set", "seed=1"], ["--budget", "90m"], ["--domain", "scenes"], ["--dry"]])
def test_results_from_files_are_taken_as_they_are(option: list[str], tmp_path: Path, capsys):
    command = ["claims", "a", "--from", str(RESULTS / "tokenizers.json"), "--out", str(tmp_path / "out")]
    assert main([*command, *option]) == 2
    assert f"error: {option[0]} with --from: results are taken as the files have them" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
