"""Whole reports, and the reports kept in a run directory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from evaluation_toys import CFG, Knows, Lossless, Toy, one_per_class, setup

from vfmlab import config, data
from vfmlab.errors import RunError
from vfmlab.evaluation import evaluate, number
from vfmlab.evaluation.instruments import pixels
from vfmlab.evaluation.number import Report, quantities, rank

BASE = config.Protocol(n=60, batch=25, sampler=config.Sampler(steps=3))


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "perceptual", lambda device: "no weights in this test")
    monkeypatch.setattr(evaluate, "open_space", lambda *args: SimpleNamespace(version="toy"))


def check(report: Report) -> None:
    assert Report.from_json(json.loads(json.dumps(report.as_json(), allow_nan=False))) == report
    assert set(report) <= set(quantities())
    for name, entry in report.items():
        if entry.absent:
            assert entry.reason, name
        else:
            assert entry.protocol in report.protocols, name
            assert entry.n > 0
        assert entry.label
    assert any("below 10000" in line for line in report.warnings)


def test_tokenizer_report():
    report = evaluate.tokenizer_report(Lossless(), CFG, BASE, setup(BASE))
    check(report)
    metrics = report
    assert {"psnr", "psnr_mask", "ssim", "lpips", "rfd", "rkd", "probe_linear", "probe_knn", "cknna"} <= set(metrics)
    assert 0 <= metrics["probe_linear"].value <= 1
    assert metrics["cknna"].value > 0.02  # colours in, colours out: related
    chance = 10 / (metrics["cknna"].n - 1)
    assert metrics["cknna_corrected"].value == pytest.approx((metrics["cknna"].value - chance) / (1 - chance))
    assert report.curves["noise_psnr"].facts["sigma"][0] == 0
    assert report.protocol["n"] == 60
    fitted = report.protocols[metrics["probe_linear"].protocol]["latents"]
    assert fitted["train_images"] == 200, "as many as there are, not as many as are wanted"


def test_tokenizer_report_without_classes_statistics_or_enough_images():
    protocol = BASE.model_copy(update={"n": 6})
    s = setup(protocol)
    s.source.class_names = ["all"]
    metrics = evaluate.tokenizer_report(Lossless(statistics=False), CFG, protocol, s)
    assert metrics["probe_linear"].reason == "the data has no classes"
    assert "lower k or use more samples" in metrics["cknna"].reason
    assert metrics["psnr"].value == 100


def test_diffusion_report_has_reconstruction_beside():
    source, tokenizer = data.open_source(CFG, "val"), Lossless()
    network = Knows(tokenizer.encode(one_per_class(source)).mode())
    report = evaluate.generator_report(network, tokenizer, CFG, BASE, source.num_classes, setup(BASE))
    check(report)
    assert {"gfd", "gkd", "gfd_own", "gkd_own", "rfd", "psnr"} <= set(report)
    own = evaluate.tokenizer_report(tokenizer, CFG, BASE, setup(BASE))
    assert report["rfd"] == own["rfd"]
    assert rank({"a": report, "b": own}, "rfd")  # one hash, although one report also sampled


def test_more_wanted_than_there_is_warns():
    protocol = BASE.model_copy(update={"n": 90})
    report = evaluate.tokenizer_report(Lossless(), CFG, protocol, setup(protocol))
    assert any("more than the 60 held-out" in line for line in report.warnings)
    assert report["psnr"].n == 60


class Folder:
    """What a report needs of a run directory."""

    def __init__(self, path, run):
        self.path, self.id, self.run = path, "toy-1", run
        self.ema = self.model = path / "weights"
        self.model.write_bytes(b"first")

    def config(self):
        return self.run

    @property
    def report(self):
        return number.of_run(self)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    protocol = BASE.model_copy(update={"n": 40})
    run = config.Recipe.model_construct(
        name="toy", data=CFG, protocol=protocol, tokenizer=Lossless().config, pretrain=None, diffusion=None
    )
    monkeypatch.setattr(evaluate, "open_setup", lambda cfg, protocol, root, device, ranks: setup(protocol, cfg))
    return run, Folder(tmp_path, run)


def test_reports_are_kept_by_request(run_dir, monkeypatch):
    run, folder = run_dir
    loads = []

    def load(ema=True):
        loads.append(ema)
        return Lossless()

    first = evaluate.cached(run, folder, load)
    assert first.run == "toy-1"
    assert folder.report == first
    assert evaluate.cached(run, folder, load) == first
    assert loads == [True]
    batch = run.model_copy(update={"protocol": run.protocol.model_copy(update={"batch": 7})})
    assert evaluate.cached(batch, folder, load).hash == first.hash
    changed = run.model_copy(update={"protocol": run.protocol.model_copy(update={"n": 30, "ema": False})})
    other = evaluate.cached(changed, folder, load)
    assert loads[-1] is False  # raw weights were asked for
    assert other.hash != first.hash
    assert folder.report.hash == first.hash  # the run's own report stays
    count = len(loads)
    assert evaluate.cached(changed, folder, load).hash == other.hash
    assert len(loads) == count
    evaluate.cached(run, folder, load, again=True)
    assert len(loads) == count + 1
    folder.model.write_bytes(b"second")  # as many images seen or not: the old numbers are of other weights
    evaluate.cached(run, folder, load)
    assert len(loads) == count + 2
    changed_images = data.open_source(CFG, "val")
    changed_images.fingerprint = "other pixels or labels"
    monkeypatch.setattr(data, "open_source", lambda cfg, split: changed_images)
    last = evaluate.cached(run, folder, load)
    assert len(loads) == count + 3
    folder.model.unlink()  # weights take room: the numbers are there without them
    assert evaluate.cached(run, folder, load) == last
    assert len(loads) == count + 3


@pytest.mark.parametrize(("source", "again"), [("folder:photographs", True), ("scenes:easy", False)])
def test_other_training_images_of_a_folder_are_other_numbers(run_dir, monkeypatch, source, again):
    """Probes are fitted on them. Drawn scenes are what their config says."""
    run, folder = run_dir
    cfg, real, prints = CFG.model_copy(update={"source": source}), data.open_source, {"train": "first", "val": "held out"}
    run = folder.run = run.model_copy(update={"data": cfg})
    loads = []

    def opened(cfg, split):
        images = real(CFG, split)
        images.fingerprint = prints[split]
        return images

    monkeypatch.setattr(data, "open_source", opened)
    monkeypatch.setattr(evaluate, "open_setup", lambda cfg, protocol, root, device, ranks: setup(protocol, CFG))
    monkeypatch.setattr(evaluate, "tokenizer_report", lambda tokenizer, cfg, *given: kept)
    kept = Report({}, hash="0")
    for count, fingerprint in ((1, "first"), (1, "first"), (1 + again, "second")):
        prints["train"] = fingerprint
        evaluate.cached(run, folder, lambda ema=True: loads.append(ema) or Lossless())
        assert len(loads) == count


def test_a_study_with_another_protocol_loses_no_report(run_dir):
    """It becomes the run's own; going back, or asking for either, measures nothing again."""
    run, folder = run_dir
    loads = []

    def report(run, own):
        folder.run = own
        return evaluate.cached(run, folder, lambda ema=True: loads.append(ema) or Lossless())

    guided = run.model_copy(update={"protocol": run.protocol.model_copy(update={"n": 30})})
    first, second = report(run, run), report(guided, guided)
    assert (len(loads), first.hash == second.hash, folder.report) == (2, False, second)
    assert report(run, guided) == first
    assert folder.report == second
    assert report(run, run) == first == folder.report
    assert report(guided, run) == second
    assert len(loads) == 2
    folder.model.write_bytes(b"second")
    assert report(guided, run).request != second.request
    assert len(loads) == 3


def test_weights_are_all_that_a_number_depends_on(run_dir, tmp_path, monkeypatch):
    """Also those that guidance leads away from; of raw weights' generator the tokenizer is averaged all the same."""
    run, folder = run_dir
    others = {}
    for name in ("weaker", "decoder"):
        (tmp_path / name).mkdir()
        others[name] = Folder(tmp_path / name, run)
        others[name].model = tmp_path / name / "raw"
    monkeypatch.setattr(evaluate.runs, "open_run", lambda ref, root: others[ref])
    guided = run.protocol.model_copy(update={"guidance": config.Guidance(kind="auto", weaker="weaker"), "decoder": "decoder"})
    for ema in (True, False):
        protocol = guided.model_copy(update={"ema": ema})
        seen = {tuple(evaluate.weights(folder, protocol))}
        for other in others.values():
            other.ema.write_bytes(f"changed {ema}".encode())
            seen.add(tuple(evaluate.weights(folder, protocol)))
        assert len(seen) == 3, ema
    assert len(evaluate.weights(folder, run.protocol)) == 1


def test_numbers_are_not_lost_where_they_cannot_be_written(run_dir, monkeypatch):
    run, folder = run_dir

    def refuse(path, tree):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(number, "write_json", refuse)
    report = evaluate.cached(run, folder, lambda: Lossless())
    assert report["psnr"].value == 100
    assert "could not be written" in report.warnings[-1]
    assert not (folder.path / "report.json").exists()


def test_a_pretraining_run_has_no_report(run_dir):
    run, folder = run_dir
    pretrain = run.model_copy(update={"pretrain": config.Pretrain(), "tokenizer": None}).last
    with pytest.raises(RunError, match="toy-1' is a pretrain run"):
        evaluate.cached(pretrain, folder, lambda: None)


def test_toy_space_is_what_the_tests_think_it_is():
    x = torch.zeros(2, 3, 16, 16)
    assert Toy()(x).features.shape == (2, 10)
