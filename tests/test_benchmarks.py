"""The benchmarks: what a ratio means, that the variants agree, and that each runs (small where it can be)."""

from __future__ import annotations

import json

import benchmarks
import benchmarks_gpu
import pytest
from filelock import FileLock

from vfmlab import api, config
from vfmlab.errors import ConfigError


@pytest.fixture
def clock(monkeypatch):
    """Functions that take as long as they are told to, on a clock of their own."""
    monkeypatch.setattr(benchmarks, "seconds", lambda function: function())

    def lasts(*times: float):
        turns = iter(times * 100)
        return lambda: next(turns)

    return lasts


def test_ratio_is_the_median_of_pairs(clock):
    result = benchmarks.ratio(clock(1.0), clock(5.0), repeats=5)
    assert (result["ratio"], result["ours_seconds"], result["other_seconds"]) == (5.0, 1.0, 5.0)
    assert result["spread"] == [5.0, 5.0]


def test_a_machine_that_slows_down_does_not_move_the_ratio(clock):
    slowing = [2.0**k for k in range(10)]
    assert benchmarks.ratio(clock(*slowing), clock(*(3 * s for s in slowing)), repeats=6)["ratio"] == 3.0


def test_pairs_alternate(monkeypatch):
    calls = []
    monkeypatch.setattr(benchmarks, "seconds", lambda function: function() or 1.0)
    benchmarks.ratio(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3)
    assert "".join(calls) == "abbaab"


def test_formulations_of_modulation_agree():
    result = benchmarks.modulated_layers([(8, 16, 4)], batch=2, repeats=3)
    assert result["detail"]["relative difference"] < 1e-5
    assert "8 -> 16 at 4 px" in benchmarks.line("modulation", result)


def test_cknna_in_three_formulations():
    result = benchmarks.cknna_neighbours(3, n=60, width=8)
    assert result["detail"]["relative difference"] < 1e-5
    assert 0.1 < result["detail"].get("peak memory (GB)", 1) < 4
    a, b = benchmarks.related(60, 8)
    summed = float(benchmarks.dense_cknna(a, b, product=False))
    assert float(benchmarks.dense_cknna(a, b)) == pytest.approx(summed, rel=1e-5)


@pytest.fixture
def tiny(monkeypatch) -> config.Recipe:
    run = api.resolve("tiny_plain_vae", {"data.train": 64})
    monkeypatch.setattr(benchmarks, "pocket", lambda: run)
    return run


def test_training_benchmarks_run_and_are_written(tiny, capsys, tmp_path):
    out, names = tmp_path / "new" / "bench.json", ("bf16", "bf16_vae", "latents", "loading")
    benchmarks.main(names, 3, out)
    assert "fp32 / bf16" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert [(r["name"], r["repeats"]) for r in saved["results"]] == [(name, 3) for name in names]
    assert all(r["ratio"] > 0 for r in saved["results"])
    assert saved["machine"]["versions"]["torch"]


def test_steps_of_whole_phases_are_timed_and_tabled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmarks_gpu, "STEPS", 3)
    found = [benchmarks_gpu.measure(case, FileLock(tmp_path / "lock")) for case in benchmarks_gpu.GROUPS["tiny"]]
    assert [(each["phase"], each["precision"]) for each in found] == [("tokenizer", "fp32"), ("tokenizer", "bf16"), ("diffusion", "fp32")]
    failed = {**found[0], "failed": "not done after 1 s"}
    del failed["seconds_per_step"]
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"machine": {"gpu": "NVIDIA H200", "versions": {"torch": "2"}}, "results": [*found, failed]}))
    benchmarks_gpu.main(page_of=file)
    shown = capsys.readouterr().out
    assert f"{8 / found[0]['seconds_per_step']:,.0f}" in shown
    assert "not done after 1 s" in shown
    assert shown.count("%") == 2  # in the heading, and of the one step in bf16


def test_every_case_on_a_gpu_sets_the_phase_that_it_names():
    for case in (case for cases in benchmarks_gpu.GROUPS.values() for case in cases):
        (phase,) = [each for each in case.recipe.phases() if each.stage == case.phase]
        train = phase.train if phase.generator is None else phase.diffusion.train
        assert (train.batch, train.precision, train.compile) == (case.batch, case.precision, case.compiled)


def test_bad_requests_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'frechet'"):
        benchmarks.main(("freche",))
    with pytest.raises(ConfigError, match="at least 3"):
        benchmarks.main(("bf16",), repeats=2)
