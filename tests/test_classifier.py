"""Judges made of a vision model and a fitted head: what they know, what enters the hash, and whose family they are of."""

from __future__ import annotations

import pytest
import torch

from vfmlab import config, data, vfm
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.evaluation import classifier, protocol, reference
from vfmlab.evaluation.features import VisionModelSpace, open_space
from vfmlab.training import check
from vfmlab.vfm import source
from vfmlab.vfm.shipped import SHIPPED

CFG = config.Data(source="scenes:easy", size=32, train=120, val=80)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))


def opened(name: str = "classifier:pocket", cfg: config.Data = CFG) -> protocol.Setup:
    return protocol.open_setup(cfg, config.Protocol(features=name, n=40))


def test_head_is_the_ridge_on_training_images():
    setup = opened()
    space = setup.space
    drawn = data.open_source(CFG, "train")
    x = space.plain(data.to_float(drawn.batch(torch.arange(120)).images)).features
    expected = classifier.linear.Ridge(x).fit(torch.nn.functional.one_hot(drawn.labels, 10))
    images = data.to_float(setup.source.batch(torch.arange(80)).images)
    seen = space(images)
    torch.testing.assert_close(seen.logits, expected(seen.features).float(), atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(seen.features, space.plain(images).features)
    assert space.accuracy == pytest.approx(float((seen.logits.argmax(1) == setup.source.labels).float().mean()))
    assert space.accuracy > 0.5
    assert setup.unknown_classes is None
    assert len(setup.classify(seen.logits)) == 80


def test_what_enters_the_hash(monkeypatch):
    setup = opened()
    facts = setup.resolved().sections["features"]
    assert facts["name"] == "classifier:pocket"
    assert facts["accuracy"] == round(setup.space.accuracy, 4)
    mark = setup.resolved().hash
    monkeypatch.setattr(classifier.ClassifierSpace, "_fit", lambda *args: pytest.fail("the head is in the cache"))
    assert opened().resolved().hash == mark
    monkeypatch.undo()
    other = opened(cfg=CFG.model_copy(update={"train": 100}))
    assert other.space.version != setup.space.version
    facts["accuracy"] = 0.0
    assert setup.resolved().hash == mark, "the accuracy is shown beside the hash, and no part of it"


def test_damaged_head_is_fitted_again(tmp_path):
    first = opened().space
    (path,) = (tmp_path / "cache" / "heads").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    again = opened().space
    torch.testing.assert_close(again.weight, first.weight)


def test_data_without_classes(monkeypatch):
    drawn = data.open_source(CFG, "train")
    drawn.class_names = ["all"]
    monkeypatch.setattr(classifier.data, "open_source", lambda cfg, split: drawn)
    space = open_space("classifier:pocket", 32)
    space.prepare(CFG)
    assert space(torch.zeros(2, 3, 32, 32)).logits is None
    assert space.class_names is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("classifier:", "unknown VFM ''"),
        ("classifier:mobilenetv3", "unknown VFM 'mobilenetv3'.*mobilenetv2"),
        ("classifier:pocket@large", r"'pocket@large': the side after '@' is a number of pixels, for example pocket@32"),
        ("pocket@30", r"protocol.features 'pocket@30': .*multiple of its patch of 4"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_space(name, 32)
    assert "\n" not in str(caught.value)


def test_families():
    assert reference.related("efficientnet_lite0", "classifier:mobilenetv2@128") == ""
    assert reference.related(None, "classifier:mobilenetv2@128") == reference.related("pocket", "judge") == ""
    line = reference.related("efficientnet_lite0", "classifier:efficientnet_lite2@128")
    assert "are of one family" in line
    assert "classifier:mobilenetv2@128" in line
    same = reference.related("mobilenetv2", "classifier:mobilenetv2@128")
    assert "the same vision model" in same
    assert "classifier:efficientnet_lite2@128" in same
    assert reference.family("timm:tf_efficientnet_b0") == reference.family("classifier:efficientnet_lite0@64") == "efficientnet"
    assert reference.default("efficientnet_lite0", "classifier:mobilenetv2@128") == "mobilenetv2@128"
    assert reference.default("mobilenetv2", "classifier:mobilenetv2@128") == "efficientnet_lite2@128"
    assert reference.default("efficientnet_lite0", "classifier:efficientnet_lite2") == "mobilenetv2@128"


def test_own_vfm_as_judge_is_refused_before_training():
    fields = {"name": "pocket", "layers": [0, -1]}
    recipe = {
        "name": "x", "tokenizer": {"method": "vfm_vae", "channels": 4, "factor": 4, "decoder": {"kind": "conv", "width": 8}},
        "vfm": fields, "train": {"samples": 1, "evaluate_at": [1]}, "protocol": {"features": "classifier:pocket"},
        "data": {"source": "scenes:easy", "size": 16, "train": 8},
    }  # fmt: skip
    with pytest.raises(ConfigError, match="the VFM 'pocket' and protocol.features .* same vision model") as caught:
        check.check(config.parse(recipe).phases())
    assert "\n" not in str(caught.value)


def test_warning_in_the_report():
    from evaluation_toys import Lossless

    from vfmlab.evaluation import evaluate

    toy, setup = Lossless(), opened("pocket")
    toy.frozen["vfm"] = vfm.build(config.VFM(name="pocket_random"), 32)
    report = evaluate.tokenizer_report(toy, CFG, setup.protocol, setup)
    assert any("of one family" in line for line in report.warnings)


@pytest.mark.parametrize("name", ["efficientnet_lite2", "mobilenetv2"])
def test_shipped_networks_as_judges_of_photographs(name, shared_data):
    try:
        source.find(SHIPPED[name])
    except CheckpointError as error:
        pytest.skip(str(error))
    cfg = config.Data(source=f"parquet:{shared_data / 'cifar10'}", size=32, train=200, val=100)
    setup = protocol.open_setup(cfg, config.Protocol(features=f"classifier:{name}@64", n=50))
    assert setup.space.accuracy > 0.25, "ten classes, two hundred images"
    assert setup.space.dimension == 1280
    assert isinstance(reference.Reference(open_space(f"{name}@64", 32)).space, VisionModelSpace)
