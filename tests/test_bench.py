"""The benchmark: what a ratio means, on a clock of our own, and that every benchmark runs (small where it can be)."""

from __future__ import annotations

import json

import pytest
import torch

from vfmlab import api, bench, bench_evaluation, config
from vfmlab.cli import main
from vfmlab.errors import ConfigError


@pytest.fixture
def clock(monkeypatch):
    """A clock that functions move by hand."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def lasts(*seconds: float):
        turns = iter(seconds * 100)

        def function() -> None:
            now[0] += next(turns)

        return function

    return lasts


def test_ratio_is_the_median_of_pairs(clock):
    found = bench.compare(clock(1.0), clock(5.0), repeats=5)
    assert (found["ratio"], found["ours_seconds"], found["other_seconds"]) == (5.0, 1.0, 5.0)
    assert found["spread"] == [5.0, 5.0]


def test_a_machine_that_slows_down_does_not_move_the_ratio(clock):
    slowing = [2.0**k for k in range(10)]
    found = bench.compare(clock(*slowing), clock(*(3 * s for s in slowing)), repeats=6)
    assert found["ratio"] == 3.0


def test_pairs_alternate():
    calls = []
    bench.compare(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3, warm=0)
    assert "".join(calls) == "abbaab"


def test_formulations_of_modulation_agree_and_are_told():
    found = bench.modulated_layers([(8, 16, 4)], batch=2, repeats=3)
    assert found["detail"]["relative difference"] < 1e-5
    assert found["ratio"] > 0
    told = bench.line({"name": "modulation", **found})
    assert told.startswith("modulation")
    assert "8 -> 16 at 4 px" in told


def test_cknna_in_three_formulations():
    found = bench_evaluation.cknna_sparse(3, n=60, width=8)
    assert found["detail"]["relative difference"] < 1e-5
    assert 0.1 < found["detail"].get("peak memory (GB)", 1) < 4
    a, b = bench_evaluation.related(60, 8)
    assert float(bench_evaluation.dense_cknna(a, b)) == pytest.approx(float(bench_evaluation.dense_cknna(a, b, product=False)), rel=1e-5)


@pytest.fixture
def tiny(monkeypatch) -> config.Run:
    run = api.resolve("tiny_plain_vae", {"data.train": 64})
    monkeypatch.setattr(bench, "pocket", lambda: run)
    return run


@pytest.mark.parametrize("name", ["bf16", "bf16_vae", "latents", "loading"])
def test_training_benchmarks_run(tiny, name):
    (found,) = bench.run([name], repeats=3)
    assert found["name"] == name
    assert found["ratio"] > 0
    assert found["repeats"] == 3
    assert found["seconds"] > 0


def test_gpu_benchmarks_run_on_small_parts(tiny):
    for function in (bench.gpu_decoder, bench.gpu_dit):
        figures = function(3, run=tiny, batch=2)["figures"]
        assert all(value >= 0 for value in figures.values())
        assert figures["images_per_second"] > 0
    assert figures["samples_per_second"] > 0


def test_unknown_benchmark_and_too_few_repeats():
    with pytest.raises(ConfigError, match="did you mean 'frechet'"):
        next(bench.run(["freche"]))
    with pytest.raises(ConfigError, match="at least 3"):
        next(bench.run(["bf16"], repeats=2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so GPU benchmarks are not refused")
def test_gpu_benchmarks_are_refused_without_one():
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        next(bench.run(["gpu_dit"]))


def test_command_writes_json(tiny, capsys, tmp_path):
    out = tmp_path / "new" / "bench.json"
    assert main.main(["bench", "--only", "bf16", "--repeats", "3", "--out", str(out)]) == 0
    assert "fp32 / bf16" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["results"][0]["name"] == "bf16"
    assert saved["machine"]["versions"]["torch"]
