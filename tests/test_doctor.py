"""The doctor: it tells a broken installation apart without breaking, and damaged files from whole ones."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vfmlab import runs
from vfmlab.cli import doctor
from vfmlab.cli.doctor import Check
from vfmlab.config import parse

NMS = "operator torchvision::nms does not exist"


@pytest.fixture(scope="module")
def healthy() -> dict:
    """What the probe finds in this environment."""
    return doctor.probe(timeout=280)


def states(checks) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_this_environment_is_whole(healthy):
    assert healthy["errors"] == {}
    assert states(doctor.torch_checks(healthy)) == {"torch": "ok", "torchvision": "ok", "timm": "ok"}
    assert [c.state for c in doctor.device_checks(healthy)] != []


def test_torchvision_of_another_build_is_recognised(tmp_path: Path):
    """A torchvision whose import fails as that of another build does: the doctor lives and says what to do."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "version.py").write_text("__version__ = '0.28.0+cu130'\n")
    (package / "__init__.py").write_text(f"raise RuntimeError({NMS!r})\n")
    found = doctor.probe(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert NMS in found["errors"]["torchvision"]
    assert NMS in found["errors"]["timm"]
    checks = {c.name: c for c in doctor.torch_checks(found)}
    assert checks["torch"].state == "ok"
    assert checks["torchvision"].state == "fail"
    assert "not of one build" in checks["torchvision"].detail
    assert "0.28.0+cu130" in checks["torchvision"].detail
    assert "--reinstall" in checks["torchvision"].advice
    assert checks["timm"].state == "fail"
    assert "torchvision" in checks["timm"].advice


def test_import_that_kills_the_process_is_a_finding(tmp_path: Path):
    (tmp_path / "torch.py").write_text("import os; os._exit(139)\n")
    found = doctor.probe(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert "code 139" in found["errors"]["torch"]
    assert next(iter(doctor.torch_checks(found))).state == "fail"


def test_a_file_of_the_folder_stands_for_no_module(tmp_path: Path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('of the folder')\n")
    monkeypatch.chdir(tmp_path)
    assert "of the folder" not in str(doctor.probe(timeout=280)["errors"])


def test_missing_torch_is_a_finding(tmp_path: Path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    found = doctor.probe(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert states(doctor.torch_checks(found))["torch"] == "fail"
    assert list(doctor.device_checks(found)) == []


def fake(**changes) -> dict:
    return {"errors": {}, "torch": "2.15.0", "torchvision": "0.29.2", "timm": "1.0.31", **changes}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"torch": "2.15.0+cpu", "torchvision": "0.29.2+cu132"}, "torchvision"),
        ({"torch": "2.9.1"}, "torch"),
        ({"errors": {"timm": "ImportError: broken"}}, "timm"),
        ({"errors": {"torchvision": "ModuleNotFoundError: No module named 'torchvision'"}}, "torchvision"),
    ],
)
def test_faults_are_told_apart(changes, name):
    found = {c.name: c for c in doctor.torch_checks(fake(**changes))}
    assert found[name].state == "fail"
    assert found[name].advice


def test_builds_of_one_kind_are_no_fault():
    found = fake(torch="2.15.0+cu132", torchvision="0.29.2+cu132")
    assert set(states(doctor.torch_checks(found)).values()) == {"ok"}


def test_gpu_without_bf16_is_a_warning():
    device = {"name": "old", "memory": 8 * 2**30, "bf16": False}
    checks = list(doctor.device_checks(fake(devices=[device], mps=False)))
    assert [c.state for c in checks] == ["warn"]
    assert "fp16" in checks[0].advice


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_file({"w": torch.arange(6.0)}, path, metadata={"recipe": "preset"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.with_suffix(".json").write_text(json.dumps({"sha256": digest}))
    return tmp_path


def check_assets(folder: Path) -> Check:
    (check,) = doctor.asset_checks(folder, expected=("net",))
    return check


def test_whole_asset(assets: Path):
    assert check_assets(assets).state == "ok"


def test_bundled_weights_are_whole():
    found = list(doctor.asset_checks(doctor.ASSETS))
    assert {"judge.safetensors", "pocket.safetensors"} <= {check.detail.split(",")[0] for check in found}
    assert [check.state for check in found] == ["ok"] * len(found), found


def test_missing_asset(tmp_path: Path):
    assert check_assets(tmp_path).state == "fail"


def test_truncated_asset(assets: Path):
    path = assets / "net.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert check_assets(assets).state == "fail"
    assert "truncated" in check_assets(assets).detail


def test_exchanged_asset(assets: Path):
    save_file({"w": torch.zeros(6)}, assets / "net.safetensors", metadata={"recipe": "preset"})
    assert check_assets(assets).state == "fail"
    assert "sha256" in check_assets(assets).detail


def test_asset_whose_facts_are_damaged(assets: Path):
    (assets / "net.json").write_text('{"sha256": ')
    assert check_assets(assets).state == "fail"
    assert "net.json' is damaged: not JSON" in check_assets(assets).detail


def test_every_bundled_file_is_missed():
    assert {path.stem for path in doctor.ASSETS.glob("*.safetensors")} == set(doctor.BUNDLED)


def test_asset_that_is_no_safetensors(assets: Path):
    (assets / "net.safetensors").write_bytes(b"PK\x03\x04" + bytes(200))
    assert check_assets(assets).state == "fail"


def test_asset_without_provenance(assets: Path):
    save_file({"w": torch.zeros(6)}, assets / "net.safetensors")
    (assets / "net.json").unlink()
    assert check_assets(assets).state == "warn"


def test_what_is_shown():
    found = [Check("a", "ok", "fine"), Check("b", "fail", "bad", "mend it")]
    text = doctor.table(found)
    assert "-> mend it" in text
    assert text.endswith("1 ok, 0 to look at, 1 to mend")
    told = json.loads(doctor.as_json(found))
    assert told["ok"] is False
    assert told["checks"][1] == {"name": "b", "state": "fail", "detail": "bad", "advice": "mend it"}


def test_nothing_heavy_is_imported_by_the_doctor():
    import subprocess

    code = "import sys, vfmlab.cli.doctor; print([m for m in ('torch', 'torchvision', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "[]", done.stderr


def test_runs_and_what_is_damaged_in_them(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (none, demo) = doctor.run_checks(tmp_path / "runs")
    assert (none.state, demo.state) == ("ok", "ok")
    assert "0 runs" in none.detail
    assert "make demo" in demo.advice
    phase = parse({"name": "a", "pretrain": {}, "train": {"samples": 64}}).phases()[0]
    runs.create(phase, "demo/runs").set_status(state="finished")
    (runs.create(phase, "runs").path / "status.json").write_text("{")
    checks = list(doctor.run_checks(tmp_path / "runs"))
    assert [check.state for check in checks] == ["ok", "warn", "ok"]
    assert "status.json" in checks[1].detail
    assert "1 runs in 'demo/runs', 1 of them finished" in checks[2].detail
