"""The engine: shared nodes run once, failures stay where they are, stops save, and a killed worker costs nothing."""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("distributed")
from toy import outcome

from vfmlab import api, runs
from vfmlab.cli import main
from vfmlab.errors import ConfigError, TrainingError
from vfmlab.studies import cluster as clusters
from vfmlab.studies import compare, executor, results, rows
from vfmlab.studies.executor import Node

SMALL = {"data.train": 48, "data.val": 16, "protocol.n": 16, "train.samples": 64, "train.checkpoint_every": 16, "train.log_every": 16}


def append(path, text, fail=""):
    with open(path, "a") as file:
        file.write(text + "\n")
    if fail:
        raise TrainingError(fail)


def node(path, name, *needs, fail="", **more):
    return Node(name, "test", name, append, {"path": str(path), "text": name, "fail": fail}, needs, **more)


def test_a_graph_runs_once_in_order_and_failures_spread_to_what_needs_them(tmp_path):
    log, stream, ended = tmp_path / "log", io.StringIO(), []
    graph = [
        node(log, "shared"), node(log, "a", "shared"), node(log, "b", "shared", fail="lr is too high"), node(log, "shared"),
        node(log, "c", "b"), node(log, "d", "c"), node(log, "e", "a", after=("c",)),
    ]  # fmt: skip
    later = [node(log, "f", "e"), node(log, "a")]
    outcomes = executor.run(graph, 1, stream=stream, more=lambda free: [later.pop()] if later else [], done=lambda n, o: ended.append(n.key))
    assert {key for key, o in outcomes.items() if o.error is None} == {"shared", "a", "e", "f"}
    assert {outcomes[key].error for key in "bcd"} == {"lr is too high"}
    lines = log.read_text().split()
    assert sorted(lines) == ["a", "b", "e", "f", "shared"], "each at most once; what needs a failed node does not begin"
    assert lines.index("shared") < lines.index("a") < lines.index("e") < lines.index("f")
    assert sorted(ended) == sorted(outcomes)
    assert stream.getvalue() == "b failed: lr is too high\n", "the reason once, where it happened"


def test_a_program_error_is_an_outcome_with_its_trace():
    bad = Node("bad", "test", "bad", append, {"path": "/nowhere/at/all", "text": ""})
    stream = io.StringIO()
    outcomes = executor.run([bad], 1, stream=stream)
    assert outcomes["bad"].error.startswith("FileNotFoundError: ")
    assert "Traceback" in stream.getvalue()


def test_progress_counts_images_and_time_left(tmp_path):
    run = api.resolve("tiny_plain_vae", SMALL)
    nodes = executor.phase_nodes(run.phases(), tmp_path, "row")
    graph = executor._Graph(io.StringIO(), lambda free: (), lambda node, outcome: None, nodes={n.key: n for n in nodes})
    assert graph._progress(2) == (0.0, "0 of 2 done; time left unknown yet")
    runs.create(run.phases()[0], tmp_path).set_status(state="running", samples=32, seconds=8.0)
    share, line = graph._progress(2)
    later = nodes[1].units
    assert share == pytest.approx(32 / (64 + later))
    assert line == f"0 of 2 done; row tokenizer 50%; about {executor.clock(8.0 / 32 * (32 + later))} left", "one after the other: two workers do not help"
    graph.nodes["book"] = Node("book", "notebook", "book", append, {}, (nodes[-1].key,))
    graph.outcomes.update({node.key: executor.Outcome(seconds=4.0) for node in nodes})
    assert graph._progress(2) == (pytest.approx(2 / 3), "2 of 3 done; time left unknown yet"), "no notebook has ended yet"


def test_what_failed_before_is_left_or_tried_again(tmp_path):
    run = api.resolve("tiny_plain_vae", SMALL).phases()[:1]
    folder = runs.create(run[0], tmp_path)
    folder.set_status(state="failed", message="out of memory")
    (only,) = executor.phase_nodes(run, tmp_path, "row", retry=False)
    assert executor.run([only], 1, stream=io.StringIO())[only.key].error == "out of memory (failed before; --retry trains it again)"
    (again,) = executor.phase_nodes(run, tmp_path, "row", retry=True)
    assert executor.run([again], 1, stream=io.StringIO())[again.key].error is None
    assert folder.status().state == "finished"
    folder.set_status(state="failed", message="in this study")
    with pytest.raises(TrainingError, match="in this study"):
        executor.train_phase(**again.arguments)


class Interrupting(io.StringIO):
    """A stream whose reader sends a signal when the first line about progress comes."""

    number = signal.SIGINT

    def write(self, text):
        if "0 of 1 done; row" in text:
            os.kill(os.getpid(), self.number)
        return super().write(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves(tmp_path, monkeypatch, number):
    monkeypatch.setattr(Interrupting, "number", number)
    monkeypatch.setattr(executor, "EVERY", 0.0)
    run = api.resolve("tiny_plain_vae", {**SMALL, "train.samples": 100_000}).phases()[:1]
    nodes = executor.phase_nodes(run, tmp_path, "row")
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        executor.run(nodes, 1, stream=Interrupting())
    status = runs.RunDir(tmp_path / run[0].id).status()
    assert (status.state, status.message) == ("interrupted", "stopped by hand; start the run again to go on")
    assert 0 < status.samples < 100_000


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(executor, "POLL", 0.01)
    run = api.resolve("tiny_plain_vae", SMALL).phases()[:1]
    (only,) = executor.phase_nodes(run, tmp_path, "row")
    folder, tries = runs.create(run[0], tmp_path), []
    train = api.train

    def trying(*args):
        tries.append(args)
        if len(tries) == 3:
            held.__exit__(None, None, None)
        return train(*args)

    monkeypatch.setattr(api, "train", trying)
    held = folder.lock()
    held.__enter__()
    executor.train_phase(**only.arguments)
    assert len(tries) == 3
    assert folder.status().state == "finished"


def test_vfmlab_stop(tmp_path, capsys):
    run = api.resolve("tiny_plain_vae", SMALL).phases()[0]
    folder = runs.create(run, tmp_path)
    assert main.main(["stop", run.id, "--root", str(tmp_path)]) == 2
    assert "is not being trained (state: created)" in capsys.readouterr().err
    folder.set_status(state="running")
    assert main.main(["stop", run.id, "--root", str(tmp_path)]) == 0
    assert folder.stop_requested


@pytest.mark.parametrize(
    ("cluster", "jobs", "complaint"),
    [
        ("nowhere.yaml", None, "cannot be read"), ("bad.yaml", None, "expected one of"), ("many.yaml", None, "expected one of"), ("tcp://127.0.0.1:9", 2, "leave it out"),
        ("tcp://127.0.0.1:9", None, "no dask scheduler answers there"), (None, 0, "at least one worker"),
    ],
)  # fmt: skip
def test_a_cluster_that_cannot_be_is_one_line(cluster, jobs, complaint, tmp_path, monkeypatch):
    import dask

    (tmp_path / "bad.yaml").write_text("slorm: {memory: 1GB}")
    (tmp_path / "many.yaml").write_text("slurm: {memory: 1GB, jobs: many}")
    monkeypatch.chdir(tmp_path)
    if cluster and cluster.endswith(".yaml") and importlib.util.find_spec("dask_jobqueue") is None:
        pytest.skip("dask-jobqueue is not installed")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), pytest.raises(ConfigError, match=complaint):
        executor.run([], jobs, cluster)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "Ctrl-C is the caller's, whatever was imported"


def test_a_script_that_every_worker_would_begin_again_is_told_so(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)  # as a worker has it that imports the script
    with pytest.raises(SystemExit, match="put what it does behind `if __name__ =="), clusters.connect(None, 2, 2):
        pass
    failed = SimpleNamespace(workers={0: SimpleNamespace(status=SimpleNamespace(name="failed"))})
    with pytest.raises(ConfigError, match="no worker process could begin"):
        clusters._begun(SimpleNamespace(nthreads=dict), failed)


def test_each_gpu_has_a_process_that_sees_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "gpus", lambda: ["3", "5"])
    told = Node("env", "test", "env", write_environment, {"folder": str(tmp_path)})
    executor.run([told, Node("more", "test", "more", write_environment, {"folder": str(tmp_path)})], 2, stream=io.StringIO())
    seen = [path.read_text().split() for path in tmp_path.iterdir()]
    assert {words[0] for words in seen} <= {"3", "5"}
    assert {words[1] for words in seen} == {"1"}, "one thread each"
    assert {words[2] for words in seen} == {"True"}, "Ctrl-C in the terminal is for the study"
    assert str(os.getpid()) not in [path.name for path in tmp_path.iterdir()]


def test_nothing_of_a_study_listens_beyond_this_machine():
    def ports():
        return {c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}

    before = ports()
    with clusters.connect(None, 1, 1):
        assert {address.ip for address in ports() - before} <= {"127.0.0.1"}


def write_environment(folder):
    ignores = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    text = f"{os.environ['CUDA_VISIBLE_DEVICES']} {os.environ['OMP_NUM_THREADS']} {ignores}"
    (Path(folder) / str(os.getpid())).write_text(text)


# -- a cluster started by hand, one worker of which is killed ---------------------------------------------------------

POINTS = [(seed, lr) for seed in (0, 1) for lr in (1e-3, 2e-3)]  # two tokenizers, four generators
BUDGET = {"data.train": 48, "data.val": 16, "protocol.n": 16, "train.samples": 192, "train.checkpoint_every": 64, "diffusion.train.samples": 192,
          "diffusion.train.checkpoint_every": 64}  # fmt: skip


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers as somebody starts them: (address, worker processes)."""
    file, processes = tmp_path / "scheduler.json", []

    def start(*arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "distributed.cli." + arguments[0], *arguments[1:], "--scheduler-file", str(file), "--no-dashboard"]
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return processes[-1]

    start("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
    while not file.exists():
        assert processes[0].poll() is None
        time.sleep(0.05)
    workers = [start("dask_worker", "--no-nanny", "--nthreads", "1", "--memory-limit", "0") for _ in range(2)]
    import json

    yield json.loads(file.read_text())["address"], workers
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.timeout(900)
def test_a_killed_worker_costs_nothing(cluster, tmp_path):
    """Four recipes over two workers, one killed by force in the middle of a phase: as if one process had done it all."""
    address, (victim, _) = cluster
    root, kept = tmp_path / "two", {}
    recipes = [api.resolve("tiny_plain_vae", {**BUDGET, "diffusion.train.lr": lr}, seed=seed) for seed, lr in POINTS]

    def kill():
        while victim.poll() is None:
            for run in runs.scan(root):
                status = run.status()
                if (status.state, status.pid) == ("running", victim.pid) and (run.checkpoints / "state.pt").exists():
                    victim.kill()
                    victim.wait()
                    for other in runs.scan(root):
                        if other.status().state == "finished":
                            kept[other.id] = other.model.stat().st_mtime_ns
                    return
            time.sleep(0.005)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    stream = io.StringIO()
    nodes = [node for recipe in recipes for node in executor.phase_nodes(recipe.phases(), root, recipe.id)]
    outcomes = executor.run(nodes, cluster=address, stream=stream)
    killer.join()
    assert victim.returncode == -signal.SIGKILL
    assert not [ended.error for ended in outcomes.values() if ended.error], stream.getvalue()
    trained = runs.scan(root)
    assert len(trained) == 6, "two tokenizers, four generators"
    assert all(run.model.stat().st_mtime_ns == kept[run.id] for run in trained if run.id in kept), "what was finished stays"
    assert {run.status().state for run in trained} == {"finished"}

    for recipe in recipes:
        list(api.train(recipe, tmp_path / "one"))
    for run in trained:
        assert outcome(run) == outcome(runs.RunDir(tmp_path / "one" / run.id)), run.id


def test_workers_hold_on_to_freed_memory_and_have_one_thread():
    """dask's default gives each freed tensor back to the system, which cost two fifths of the CPU of two workers."""
    import dask
    import distributed  # noqa: F401  # its defaults

    with dask.config.set(clusters.SETTINGS):
        environment = dask.config.get("distributed.nanny.pre-spawn-environ")
    assert "MALLOC_TRIM_THRESHOLD_" not in environment
    assert environment["OMP_NUM_THREADS"] == "1"


def test_a_row_is_measured_under_its_own_protocol_whatever_another_study_left(tmp_path):
    """Both train one tokenizer, whose directory holds the protocol of the one that came last."""
    few, many = (rows.parse(["a=tiny_plain_vae"], [0], SMALL | {"protocol.n": n}, "tokenizer") for n in (8, 16))
    for study in (many, few):
        deque(api.train(study[0].run, tmp_path), maxlen=0)
    assert few[0].run.id == many[0].run.id
    for study, n in ((many, 16), (few, 8), (many, 16)):
        result, = results.collect(study, tmp_path)
        assert result.number("psnr").n == n
    *_, last = executor.phase_nodes(many[0].phases, tmp_path, "row", evaluate=True)
    assert last.task(**last.arguments)["psnr"].n == 16


def test_the_default_root_is_one_place_for_training_and_measuring(tmp_path, monkeypatch):
    """A notebook says "runs"; $VFMLAB_ROOT, or the checkout, says where that is."""
    monkeypatch.setenv("VFMLAB_ROOT", str(tmp_path / "there"))
    monkeypatch.chdir(tmp_path)

    def here(nodes, *_):
        for each in nodes:
            each.task(**each.arguments)
        return {each.key: executor.Outcome() for each in nodes}

    monkeypatch.setattr(compare.executor, "run", here)
    result, = compare.measured(rows.parse(["a=tiny_plain_vae"], [0], SMALL, "tokenizer"), "runs")
    assert result.failed is None
    assert result.number("psnr").n == 16
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
