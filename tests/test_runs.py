"""Run directories: the same config is the same directory, and no reader sees half a file."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from vfmlab import runs
from vfmlab.config import files, parse
from vfmlab.errors import ConfigError, RunBusy, RunError, TrainingError


def config(name="a", **changes):
    """A pretraining run: the one kind that needs no registered part."""
    return parse({"name": name, "pretrain": {}, "train": {"samples": 64}, **changes}).last


def tokenizer_dir(root, name, diffusion=None):
    """A run directory of another kind, written by hand: readers of a directory must not need its parts."""
    path = root / name
    path.mkdir(parents=True)
    tree = {"name": name.rpartition("-")[0], "data": {}, "tokenizer": {"method": "x"}, "diffusion": diffusion}
    (path / "config.json").write_text(json.dumps(tree))


def test_create_is_idempotent_and_complete(tmp_path):
    first, second = runs.create(config(), tmp_path), runs.create(config(), tmp_path)
    assert first == second
    assert first.config() == config()
    assert first.status().state == "created"
    assert first.status().total == 64
    assert first.kind == "pretrain"
    assert first.metrics() == []
    assert first.report() is None


def test_another_config_under_the_same_id_is_refused(tmp_path):
    run = runs.create(config(), tmp_path)
    tree = json.loads((run.path / "config.json").read_text())
    tree["train"]["lr"] = 0.5
    (run.path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(RunError, match=r"train\.lr"):
        runs.create(config(), tmp_path)


def test_a_run_of_a_version_that_knew_fewer_fields_goes_on(tmp_path):
    run = runs.create(config(), tmp_path)
    tree = json.loads((run.path / "config.json").read_text())
    assert tree.pop("vfm") is None
    (run.path / "config.json").write_text(json.dumps(tree))
    assert runs.create(config(), tmp_path).path == run.path


def test_a_new_protocol_is_stored_under_the_same_id(tmp_path):
    run = runs.create(config(), tmp_path)
    again = runs.create(config(protocol={"n": 7}), tmp_path)
    assert again.path == run.path
    assert again.config().protocol.n == 7


def test_references(tmp_path):
    one, two = runs.create(config("pocket"), tmp_path), runs.create(config("pocket_more"), tmp_path)
    assert runs.open_run(one.id, tmp_path) == one
    assert runs.open_run("pocket_m", tmp_path) == two
    assert runs.open_run(str(one.path), tmp_path / "elsewhere") == one
    assert runs.open_run("pocket", tmp_path) == one  # the whole name of one of two
    with pytest.raises(RunError, match=r"fits 2 runs.*pocket-.*pocket_more-"):
        runs.open_run("poc", tmp_path)
    with pytest.raises(RunError, match="did you mean 'pocket-"):
        runs.open_run("pokcet" + one.id[6:], tmp_path)
    with pytest.raises(RunError, match="holds no runs"):
        runs.open_run("x", tmp_path / "empty")
    (tmp_path / "foreign").mkdir()
    with pytest.raises(RunError, match="not a run"):
        runs.open_run(str(tmp_path / "foreign"), tmp_path / "empty")


def test_kind_decides_between_matches(tmp_path):
    tokenizer_dir(tmp_path, "p_tokenizer-11111111")
    tokenizer_dir(tmp_path, "p-22222222", diffusion={"network": {}})
    assert runs.open_run("p", tmp_path, kind="tokenizer").id == "p_tokenizer-11111111"
    assert runs.open_run("p", tmp_path, kind="diffusion").id == "p-22222222"
    assert runs.open_run("p_", tmp_path, kind="diffusion").kind == "tokenizer"  # the only match: the caller decides


def test_scan_is_ordered_and_tolerates_anything(tmp_path):
    made = [runs.create(config(name), tmp_path) for name in ("z", "m", "a")]
    for i, run in enumerate(made):
        run.set_status(created=1000.0 + i)
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"name": "half", "da')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("[1, 2]")
    (tmp_path / "file.txt").write_text("")
    (made[0].path / "status.json").write_text("{")  # broken status: still a run
    assert {run.id for run in runs.scan(tmp_path)} == {run.id for run in made}
    assert [run.id for run in runs.scan(tmp_path)][:2] == [made[1].id, made[2].id]
    assert runs.scan(tmp_path / "nowhere") == []


def test_metrics_survive_a_torn_line(tmp_path):
    run = runs.create(config(), tmp_path)
    run.log({"kind": "step", "step": 1, "loss": 2.0})
    run.log({"kind": "evaluation", "step": 1, "gfd": float("nan")})
    with open(run.path / "metrics.jsonl", "a") as handle:
        handle.write('{"kind":"step","st')
    assert [r["step"] for r in run.metrics("step")] == [1]
    run.log({"kind": "step", "step": 2})
    assert [r["step"] for r in run.metrics("step")] == [1, 2]
    assert run.metrics("evaluation") == [{"kind": "evaluation", "step": 1, "gfd": None}]
    run.truncate(1)
    assert (run.path / "metrics.jsonl").read_text().count("\n") == 2
    assert [r["step"] for r in run.metrics()] == [1, 1]


def test_a_dead_process_shows_as_interrupted(tmp_path):
    run = runs.create(config(), tmp_path)
    run.set_status(state="running")
    assert run.status().state == "running"
    code = "import sys; from vfmlab import runs; runs.RunDir(runs.Path(sys.argv[1])).set_status(state='running')"
    subprocess.run([sys.executable, "-c", code, str(run.path)], check=True)
    assert run.status().state == "interrupted"
    run.set_status(state="running")
    status = json.loads((run.path / "status.json").read_text())
    (run.path / "status.json").write_text(json.dumps({**status, "born": status["born"] - 100}))  # the number was reused
    assert run.status().state == "interrupted"
    (run.path / "status.json").write_text(json.dumps({**status, "host": "elsewhere"}))
    assert run.status().state == "running"
    (run.path / "status.json").write_text(json.dumps({**status, "host": "elsewhere", "heartbeat": 1.0}))
    assert run.status().state == "interrupted"


def _hold(path, ready, go):
    with runs.RunDir(path).lock():
        ready.set()
        go.wait(30)


def test_lock(tmp_path):
    run = runs.create(config(), tmp_path)
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(run.path, ready, go))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match="is being trained"), run.lock():
        pass
    holder.kill()  # a lock of a dead process is taken over
    holder.join()
    (run.checkpoints / ".model.safetensors.99.tmp").write_text("half")
    with run.lock():
        assert not list(run.checkpoints.glob(".*.tmp"))
        with pytest.raises(RunError), run.lock():  # the same process cannot train it twice either
            pass


def test_a_run_that_fails_to_start_leaves_nothing_behind(tmp_path):
    with pytest.raises(TrainingError), runs.starting(config(), tmp_path):
        raise TrainingError("a file is missing")
    assert list(tmp_path.iterdir()) == []
    runs.create(config(), tmp_path)
    with pytest.raises(TrainingError), runs.starting(config(), tmp_path):
        raise TrainingError("again")
    assert len(runs.scan(tmp_path)) == 1, "what was there stays"


def test_who_comes_second_to_a_new_run_leaves_it_to_the_first(tmp_path):
    """Two studies want one tokenizer; the first holds it and has not yet written that it runs."""
    def second():
        with runs.starting(config(), tmp_path) as folder:
            first.enter_context(first.enter_context(runs.starting(config(), tmp_path)).lock())
            with folder.lock():
                pass

    with ExitStack() as first:
        with pytest.raises(RunBusy):
            second()
        assert len(runs.scan(tmp_path)) == 1


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    runs.write_json(path, {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"disk full while writing .*x\.json"):
        runs.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another root"):
        runs.create(config(), tmp_path / "file")


def test_env_keeps_what_a_resumed_run_had_before(tmp_path):
    run = runs.create(config(), tmp_path)
    run.save_env(device="cpu", threads=2)
    run.save_env(device="cpu", threads=2)
    assert run.env()["earlier"] == []
    assert run.env()["versions"]["torch"]
    run.save_env(device="cuda", threads=2)
    assert [e["device"] for e in run.env()["earlier"]] == ["cpu"]


def test_runs_does_not_import_torch():
    code = "import sys, vfmlab.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- files from elsewhere -------------------------------------------------------------------------------------------

DAMAGED = {
    "torn": b'{"name": "x", "da',
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "deep": b'{"name": "x", "data": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    "deeper than the parser": b"[" * 200_000,
    "a long number": b'{"name": "x", "data": {}, "seed": ' + b"1" * 5000 + b"}",
    "not a number": b'{"name": "x", "data": {}, "seed": NaN}',
    "types": b'{"name": 5, "data": [], "metrics": 3, "samples": {}, "earlier": 1}',
}
FILES = ("config.json", "status.json", "report.json", "env.json", "metrics.jsonl")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [*DAMAGED, "pipe", "folder", "device", "loop"])
def test_a_damaged_file_of_one_run_leaves_the_others_alone(tmp_path, file, damage):
    """Nothing hangs and nothing raises: the rest is listed, and the damage has a line that names run and file."""
    whole, broken = runs.create(config("whole"), tmp_path), runs.create(config("broken"), tmp_path)
    path = broken.path / file
    path.unlink(missing_ok=True)
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    elif damage == "device":
        path.symlink_to("/dev/zero")
    elif damage == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(DAMAGED[damage])
        if file == "metrics.jsonl":
            path.write_bytes(b"\n".join([DAMAGED[damage]] * 3))
    found, named = runs.listing(tmp_path)
    assert whole in found
    assert whole.faults() == []
    lines = [*runs.RunDir(broken.path).faults(), *named.values()]
    if not (file == "config.json" and damage == "a list"):  # a list is the config.json of something else
        assert lines
        assert all("broken-" in line and "\n" not in line for line in lines)
    for run in found:
        assert isinstance(run.status().samples, int)
        assert isinstance((run.report() or {}).get("metrics", {}), dict)
        assert isinstance(run.env(), dict)
        assert all(isinstance(record["step"], int) for record in run.metrics())
    assert runs.open_run(whole.id, tmp_path) == whole
    if file == "config.json":
        assert broken.id not in [run.id for run in found]
        with pytest.raises(RunError):
            runs.open_run(broken.id, tmp_path)
    else:
        broken.save_env(device="cpu") if damage != "folder" else None
        assert runs.open_run(broken.id, tmp_path) == broken


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_of_json(tmp_path, encoding):
    run = runs.create(config(), tmp_path)
    path = run.path / "config.json"
    path.write_bytes(path.read_text().encode(encoding))
    assert runs.RunDir(run.path).config() == config()


def test_paths_are_text_or_path_and_know_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = runs.create(config(), "~/my runs")
    assert run.path == tmp_path / "my runs" / config().id
    assert runs.RunDir(str(run.path)) == runs.RunDir(f"~/my runs/{run.id}") == run
    assert runs.scan("~/my runs") == [run]
    assert runs.open_run(f"~/my runs/{run.id}") == run
    for path in ("~nobody_of_this_name/x", "a\0b"):
        with pytest.raises(ConfigError, match="path"):
            runs.RunDir(path)


def test_the_default_root_is_one_for_notebooks_and_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv("VFMLAB_ROOT", raising=False)
    checkout = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(checkout / "notebooks")
    assert runs.root_folder() == checkout / "runs"
    monkeypatch.chdir(checkout)
    assert runs.root_folder().resolve() == checkout / "runs"
    monkeypatch.chdir(tmp_path)
    assert runs.root_folder().resolve() == tmp_path / "runs"
    monkeypatch.setenv("VFMLAB_ROOT", str(tmp_path / "elsewhere"))
    assert runs.create(config()).path.parent == tmp_path / "elsewhere"
    assert runs.root_folder(tmp_path / "x") == tmp_path / "x"


def test_runs_are_closed_to_other_users(tmp_path):
    old = os.umask(0o022)
    try:
        run = runs.create(config(), tmp_path / "runs")
    finally:
        os.umask(old)
    assert stat.S_IMODE(run.path.stat().st_mode) == stat.S_IMODE(run.path.parent.stat().st_mode) == 0o700


def test_runs_of_one_name_are_told_apart(tmp_path):
    made = [runs.create(config("a", **changes), tmp_path) for changes in ({}, {"seed": 3}, {"train": {"samples": 9}})]
    other = runs.create(config("b"), tmp_path)
    texts = runs.contrast([*made, other])
    assert texts[other.id] == ""
    assert len({texts[run.id] for run in made}) == 3
    assert "seed=3" in texts[made[1].id]
    assert "train.samples=9" in texts[made[2].id]
    with pytest.raises(RunError, match=r"fits 3 runs.*seed=3"):
        runs.open_run("a", tmp_path)


def test_leftovers_of_dead_processes_are_swept(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {"old": f".a.{gone.pid}.tmp", "young": f".b.{gone.pid}.tmp", "mine": f".c.{os.getpid()}.tmp", "other": ".d.tmp"}
    for name in names.values():
        (tmp_path / "deep").mkdir(exist_ok=True)
        (tmp_path / "deep" / name).write_text("")
        if name != names["young"]:
            os.utime(tmp_path / "deep" / name, (1, 1))
    files.sweep(tmp_path)
    assert {path.name for path in (tmp_path / "deep").iterdir()} == set(names.values()) - {names["old"]}


def test_a_command_fills_only_folders_that_are_its_own(tmp_path):
    """New, empty, or filled by it before; never inside a run, not even through a link or past a damaged config."""
    mine = lambda folder: (folder / "mine").exists()  # noqa: E731
    run = runs.create(config(), tmp_path / "runs")
    (run.path / "config.json").write_text("{")
    (tmp_path / "link").symlink_to(run.path)
    for inside in (run.path, run.path / "pictures", run.path / "images" / "deep", tmp_path / "link", tmp_path / "link" / "x"):
        with pytest.raises(ConfigError, match="inside run"):
            runs.output_folder(inside, mine)
    for spelling in (run.path, tmp_path / "runs" / ".." / "runs" / run.path.name, tmp_path / "link"):
        assert runs.output_folder(spelling / "pictures", mine, within=run.path) == spelling / "pictures"
    (tmp_path / "file").write_text("")
    for impossible in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError, match="choose another"):
            runs.output_folder(impossible, mine)
    folder = runs.output_folder(str(tmp_path / "new" / "deep"), mine)
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    (folder / "README.md").write_text("somebody's")
    with pytest.raises(ConfigError, match="other files"):
        runs.output_folder(folder, mine)
    assert runs.output_folder(folder, mine, overwrite=True) == folder
    (folder / "mine").write_text("")
    assert runs.output_folder(folder, mine) == folder
