"""Whole reports, and the reports kept in a run directory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from evaluation_toys import CFG, Knows, Lossless, Toy, one_per_class, setup

from vfmlab import config, data
from vfmlab.errors import RunError
from vfmlab.evaluation import evaluate, reconstruction
from vfmlab.evaluation.protocol import BETTER, rank

BASE = config.Protocol(n=60, batch=25, sampler=config.Sampler(steps=3))


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reconstruction, "perceptual", lambda device: "no weights in this test")
    monkeypatch.setattr(evaluate, "open_space", lambda *args: SimpleNamespace(version="toy"))


def check(report: dict) -> None:
    json.dumps(report, allow_nan=False)
    assert report["protocols"][report["hash"]] == report["protocol"]
    assert set(report["metrics"]) <= set(BETTER)
    for name, entry in report["metrics"].items():
        if entry["value"] is None:
            assert entry["reason"], name
        else:
            assert entry["protocol"] in report["protocols"], name
            assert entry["n"] > 0
    assert any("below 10000" in line for line in report["warnings"])


def test_tokenizer_report():
    report = evaluate.tokenizer_report(Lossless(), CFG, BASE, setup(BASE))
    check(report)
    metrics = report["metrics"]
    assert {"psnr", "psnr_mask", "ssim", "lpips", "rfd", "rkd", "probe_linear", "probe_knn", "cknna"} <= set(metrics)
    assert 0 <= metrics["probe_linear"]["value"] <= 1
    assert metrics["cknna"]["value"] > 0.02  # colours in, colours out: related
    assert report["curves"]["noise_psnr"]["sigma"][0] == 0
    assert report["protocol"]["n"] == 60


def test_tokenizer_report_without_classes_statistics_or_enough_images():
    protocol = BASE.model_copy(update={"n": 6})
    s = setup(protocol)
    s.source.class_names = ["all"]
    metrics = evaluate.tokenizer_report(Lossless(statistics=False), CFG, protocol, s)["metrics"]
    assert metrics["probe_linear"]["reason"] == "the data has no classes"
    assert "lower k or use more samples" in metrics["cknna"]["reason"]
    assert metrics["psnr"]["value"] == 100


def test_diffusion_report_has_reconstruction_beside():
    source, tokenizer = data.open_source(CFG, "val"), Lossless()
    network = Knows(tokenizer.encode(one_per_class(source)).mode())
    report = evaluate.diffusion_report(network, tokenizer, CFG, BASE, source.num_classes, setup(BASE))
    check(report)
    assert {"gfd", "gkd", "gfd_own", "gkd_own", "rfd", "psnr"} <= set(report["metrics"])
    own = evaluate.tokenizer_report(tokenizer, CFG, BASE, setup(BASE))
    assert report["metrics"]["rfd"] == own["metrics"]["rfd"]
    assert rank({"a": report, "b": own}, "rfd")  # one hash, although one report also sampled


def test_more_wanted_than_there_is_warns():
    protocol = BASE.model_copy(update={"n": 90})
    report = evaluate.tokenizer_report(Lossless(), CFG, protocol, setup(protocol))
    assert any("more than the 60 held-out" in line for line in report["warnings"])
    assert report["metrics"]["psnr"]["n"] == 60


class Folder:
    """What a report needs of a run directory."""

    def __init__(self, path, run):
        self.path, self.id, self.run, self.kept, self.samples = path, "toy-1", run, None, 640

    def config(self):
        return self.run

    def status(self):
        return SimpleNamespace(samples=self.samples)

    def report(self):
        return self.kept

    def save_report(self, report):
        self.kept = json.loads(json.dumps(report, allow_nan=False))


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    protocol = BASE.model_copy(update={"n": 40})
    run = config.Recipe.model_construct(
        name="toy", data=CFG, protocol=protocol, tokenizer=Lossless().config, pretrain=None, diffusion=None
    )
    monkeypatch.setattr(evaluate, "open_setup", lambda cfg, protocol, root, device: setup(protocol, cfg))
    return run, Folder(tmp_path, run)


def test_reports_are_kept_by_request(run_dir):
    run, folder = run_dir
    loads = []

    def load(ema=True):
        loads.append(ema)
        return Lossless()

    first = evaluate.cached(run, folder, load)
    assert first["run"] == "toy-1"
    assert folder.kept["hash"] == first["hash"]
    assert evaluate.cached(run, folder, load)["metrics"] == first["metrics"]
    assert loads == [True]
    batch = run.model_copy(update={"protocol": run.protocol.model_copy(update={"batch": 7})})
    assert evaluate.cached(batch, folder, load)["hash"] == first["hash"]
    changed = run.model_copy(update={"protocol": run.protocol.model_copy(update={"n": 30, "ema": False})})
    other = evaluate.cached(changed, folder, load)
    assert loads[-1] is False  # raw weights were asked for
    assert other["hash"] != first["hash"]
    assert folder.kept["hash"] == first["hash"]  # the run's own report stays
    count = len(loads)
    assert evaluate.cached(changed, folder, load)["hash"] == other["hash"]
    assert len(loads) == count
    evaluate.cached(run, folder, load, again=True)
    assert len(loads) == count + 1
    folder.samples = 1280  # trained on: the old numbers are of other weights
    evaluate.cached(run, folder, load)
    assert len(loads) == count + 2


def test_a_pretraining_run_has_no_report(run_dir):
    run, folder = run_dir
    pretrain = run.model_copy(update={"pretrain": config.Pretrain(), "tokenizer": None}).last
    with pytest.raises(RunError, match="toy-1' is a pretrain run"):
        evaluate.cached(pretrain, folder, lambda: None)


def test_toy_space_is_what_the_tests_think_it_is():
    x = torch.zeros(2, 3, 16, 16)
    assert Toy()(x).features.shape == (2, 10)
