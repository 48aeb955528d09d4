"""The command line: one clear line and exit code 2 for bad input, 130 for Ctrl-C, tracebacks for faults of our own."""

from __future__ import annotations

import errno
import inspect
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from vfmlab import api, runs
from vfmlab.cli import main, pictures
from vfmlab.errors import RunError
from vfmlab.evaluation.number import Number, Report
from vfmlab.training.events import Event

ROOT = Path(__file__).resolve().parents[1]


def call(capsys, *args: object) -> tuple[int, str, str]:
    code = main.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *args: object) -> str:
    """The one line on stderr of a call that must be refused."""
    code, _, err = call(capsys, *args)
    assert code == 2
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("vfmlab: error: ")
    return lines[0]


# -- bad input ------------------------------------------------------------------------------------------------------


def test_unknown_command(capsys):
    assert "did you mean 'train'" in refused(capsys, "trian", "tiny_vfm_vae")


def test_fields_without_set_and_the_version(capsys):
    assert refused(capsys, "train", "tiny_plain_vae", "train.samples=8", "--set", "seed=1").endswith(
        "'train.samples=8': fields are given behind --set: --set train.samples=8 seed=1")
    assert "is no preset; a run goes on by the command" in refused(capsys, "train", "tiny_plain_vae-0d8d600b")
    code, out, _ = call(capsys, "--version")
    assert (code, out.split()[0]) == (0, "vfmlab")


@pytest.mark.parametrize("command", ["train", "plan"])
def test_unknown_preset(capsys, command, tmp_path):
    line = refused(capsys, command, "tiny_plane_vae", *(["--root", tmp_path] if command == "train" else []))
    assert "unknown preset 'tiny_plane_vae'" in line
    assert "did you mean 'tiny_plain_vae'" in line
    assert not list(tmp_path.iterdir())


def test_unknown_field(capsys, tmp_path):
    line = refused(capsys, "train", "tiny_plain_vae", "--set", "train.sample=5", "--root", tmp_path)
    assert "train.sample" in line
    assert "samples'?" in line
    assert not list(tmp_path.iterdir())


def test_value_of_the_wrong_type(capsys):
    line = refused(capsys, "plan", "tiny_plain_vae", "--set", "train.samples=many")
    assert "train.samples" in line
    assert "'many'" in line


def test_assignment_without_a_value(capsys):
    assert "field=value" in refused(capsys, "plan", "tiny_plain_vae", "--set=train.samples")


def test_size_that_does_not_divide(capsys):
    assert "divisible" in refused(capsys, "plan", "tiny_plain_vae", "--set", "data.size=17")


def test_unknown_vfm(capsys):
    line = refused(capsys, "plan", "tiny_vfm_vae", "--set", "vfm.name=dinov2_s41")
    assert "unknown VFM 'dinov2_s41'" in line
    assert "did you mean 'dinov2_s14'" in line


@pytest.mark.parametrize("command", [["eval"], ["sample"], ["reconstruct"]])
def test_unknown_run(capsys, command, tmp_path):
    image = ["image.png"] if command == ["reconstruct"] else []
    line = refused(capsys, *command, "nothing", *image, "--root", tmp_path)
    assert "unknown run 'nothing'" in line


def test_config_file_that_is_none(capsys, tmp_path):
    assert "cannot be read" in refused(capsys, "plan", tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{")
    assert "not JSON" in refused(capsys, "plan", tmp_path / "broken.json")
    (tmp_path / "other.json").write_text("{}")
    assert "'name' is missing" in refused(capsys, "plan", tmp_path / "other.json")


def test_errors_of_several_lines_become_one(capsys, monkeypatch):
    def fail(*args, **more):
        raise RunError("first\n  second")

    monkeypatch.setattr(api, "evaluate", fail)
    assert refused(capsys, "eval", "x") == "vfmlab: error: first second"


def test_own_faults_keep_their_traceback(monkeypatch):
    def fail(*args, **more):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(api, "evaluate", fail)
    with pytest.raises(ZeroDivisionError):
        main.main(["eval", "x"])


# -- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(api.resolve("tiny_plain_vae").model_dump(mode="json")))
    return path


def test_train_takes_presets_files_and_assignments(capsys, monkeypatch, tmp_path, config_file):
    seen = []

    def train(run, root, until=None):
        seen.append((run, root, until))
        yield Event("start", run.id, "tokenizer", 0, 10)
        yield Event("step", run.id, "tokenizer", 10, 10, 0.0, {"loss": 1.0})
        yield Event("finish", run.id, "tokenizer", 10, 10)

    monkeypatch.setattr(api, "train", train)
    sets = ["--set", "train.samples=128", "train.lr=0.01", "--root", tmp_path, "--set", "data.source=scenes:hard"]
    for what in ("tiny_plain_vae", config_file):
        code, out, _ = call(capsys, "train", what, *sets, "--until", "tokenizer")
        assert code == 0
        run, root, until = seen.pop()
        assert (run.train.samples, run.train.lr, run.data.source) == (128, 0.01, "scenes:hard")
        assert (root, until) == (tmp_path, "tokenizer")
        assert run.id in out
        assert f"vfmlab eval {run.id} --root {tmp_path}" in out


def test_ctrl_c_says_what_is_kept(capsys, monkeypatch, tmp_path):
    closed = []

    def train(run, root, until=None):
        try:
            yield Event("start", run.id, "tokenizer", 0, 10)
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setattr(api, "train", train)
    monkeypatch.setattr(sys, "argv", ["vfmlab", "train", "tiny_plain_vae", "--root", str(tmp_path)])
    code = main.main()
    err = capsys.readouterr().err
    assert code == 130
    assert closed == [True]
    line = next(line for line in err.splitlines() if line.startswith("vfmlab: "))
    run_id = api.resolve("tiny_plain_vae").id
    assert f"run '{run_id}' is saved" in line
    assert f"To go on: vfmlab train tiny_plain_vae --root {tmp_path}" in line


def test_only_the_first_process_speaks(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(api, "train", lambda run, root, until=None: (e for e in [Event("start", run.id, "x", 0, 1)]))
    monkeypatch.setenv("RANK", "1")
    assert call(capsys, "train", "tiny_plain_vae", "--root", tmp_path) == (0, "", "")


@pytest.mark.parametrize(
    ("given", "gathered"),
    [
        (["train", "p", "--set", "a=1", "b=2", "--root", "r"], ["train", "p", "--root", "r", "--set", "a=1", "b=2"]),
        (["train", "--set", "a=1", "p"], ["train", "p", "--set", "a=1"]),
        (["train", "p", "--set", "a=1", "--set=b=2"], ["train", "p", "--set", "a=1", "b=2"]),
        (["train", "p", "--root", "x=y"], ["train", "p", "--root", "x=y"]),
    ],
)
def test_set_may_be_repeated_and_stand_anywhere(given, gathered):
    assert main.gather(given) == gathered


# -- reports, samples, pictures -------------------------------------------------------------------------------------


def test_eval_prints_numbers_with_their_hash(capsys, monkeypatch, tmp_path):
    asked = {}

    def evaluate(ref, root, protocol=None, again=False, progress=None):
        asked.update(ref=ref, protocol=protocol, again=again)
        return Report({"gfd": Number(12.34567), "lpips": Number(None, reason="no weights")}, run="r-1", hash="abcd1234", warnings=("N = 2",))

    monkeypatch.setattr(api, "evaluate", evaluate)
    code, out, err = call(capsys, "eval", "r", "--set", "n=50", "--again", "--root", tmp_path)
    assert code == 0
    assert asked == {"ref": "r", "protocol": {"n": 50}, "again": True}
    assert "abcd1234" in out
    assert re.search(r"gfd +12\.3457", out)
    assert re.search("lpips +no weights", out)
    assert "warning: N = 2" in err
    code, out, _ = call(capsys, "eval", "r", "--json")
    assert json.loads(out)["metrics"]["gfd"]["value"] == 12.34567


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """A diffusion run that draws grey images, and what was asked of it."""
    asked = []
    names = ["disc", "ring", "cross/plain"]
    run = api.resolve("tiny_plain_vae").phases()[-1]
    model = SimpleNamespace(num_classes=3, class_names=names, folder=runs.create(run, tmp_path), run=run)

    def sample(model, labels, **how):
        asked.append((list(labels), how))
        yield SimpleNamespace(images=torch.ones(len(labels), 3, 8, 8), note="")
        yield SimpleNamespace(images=torch.zeros(len(labels), 3, 8, 8), note="")

    monkeypatch.setattr(api, "load_generator", lambda run, root, ema=True, decoder=None: model)
    monkeypatch.setattr(api, "sample", sample)
    return asked


def test_sample_writes_a_grid_and_its_images(capsys, loaded, tmp_path):
    args = ["sample", "r", "--labels", "ring", "2", "--seed", 5, "--steps", 3, "--guidance", 2, "--out", tmp_path / "o"]
    code, out, _ = call(capsys, *args)
    assert code == 0
    labels, how = loaded[0]
    assert labels == [1, 2]
    assert (how["seed"], how["steps"], how["guidance"]) == (5, 3, {"scale": 2.0})
    files = ["0000_ring.png", "0001_cross_plain.png", "grid.png", "manifest.json"]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == files
    assert str(tmp_path / "o" / "grid.png") in out
    image = Image.open(tmp_path / "o" / "0000_ring.png")
    assert image.size == (8, 8)
    assert image.getpixel((0, 0)) == (128, 128, 128)  # 0 in [-1, 1]


def test_sample_draws_every_class_by_default(capsys, loaded, tmp_path):
    assert call(capsys, "sample", "r")[0] == 0
    assert loaded[0][0] == [0, 1, 2]
    (run,) = runs.scan(tmp_path)
    assert (run.path / "samples" / "grid.png").is_file()


def test_sample_of_an_unknown_class(capsys, loaded):
    assert "did you mean 'ring'" in refused(capsys, "sample", "r", "--labels", "rings")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--labels"], "--labels: no class given"),
        (["--labels", "\u00b2"], "unknown class '\u00b2'"),
        (["--labels", "1" * 5000], "unknown class"),
        (["--labels", "-1"], "label -1 is not one of"),
        (["--labels", "3"], "label 3 is not one of"),
        (["--steps", "0"], "sampler.steps' = 0"),
        (["--guidance", "1e30"], "guidance.scale = 1e+30"),
        (["--guidance", "nan"], "guidance.scale"),
        (["--guidance", "-1"], "guidance.scale"),
        (["--seed", "-1"], "seed = -1"),
        (["--seed", str(2**63)], "seed = "),
    ],
)
def test_values_that_no_sample_can_have(capsys, loaded, tmp_path, given, said):
    assert said in refused(capsys, "sample", "r", "--out", tmp_path / "o", *given)
    assert not loaded
    assert not (tmp_path / "o").exists()


def test_names_of_classes_win_over_their_numbers(capsys, loaded, tmp_path, monkeypatch):
    model = api.load_generator("r", tmp_path)
    model.class_names[:] = ["2", "0", "b"]
    assert call(capsys, "sample", "r", "--labels", "2", "0", "1", "b")[0] == 0
    assert loaded[0][0] == [0, 1, 1, 2]


def test_a_folder_holds_one_call(capsys, loaded, tmp_path):
    """What an earlier call has written is moved away whole; a folder of somebody else is refused and left as it was."""
    out = tmp_path / "o"
    assert call(capsys, "sample", "r", "--labels", "disc", "ring", "--seed", 1, "--out", out)[0] == 0
    assert call(capsys, "sample", "r", "--labels", "ring", "--seed", 2, "--guidance", 3, "--out", out)[0] == 0
    assert sorted(p.name for p in out.iterdir()) == ["0000_ring.png", "earlier", "grid.png", "manifest.json"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["seed"] == 2
    assert manifest["guidance"]["scale"] == 3
    assert (manifest["labels"], manifest["classes"], manifest["pictures"]) == ([1], ["ring"], ["0000_ring"])
    assert manifest["run"] == runs.scan(tmp_path)[0].id
    before = out / "earlier" / "1"
    assert sorted(p.name for p in before.iterdir()) == ["0000_disc.png", "0001_ring.png", "grid.png", "manifest.json"]
    assert json.loads((before / "manifest.json").read_text())["seed"] == 1
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "grid.png").write_text("theirs")
    assert "holds other files" in refused(capsys, "sample", "r", "--out", tmp_path / "theirs")
    assert [p.read_text() for p in (tmp_path / "theirs").iterdir()] == ["theirs"]


def test_a_call_that_broke_off_is_moved_away_by_the_next(capsys, loaded, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "x.png")

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "_grid", full)
        assert "No space left" in refused(capsys, "sample", "r", "--out", tmp_path / "o")
    assert call(capsys, "sample", "r", "--labels", 0, "--out", tmp_path / "o")[0] == 0
    assert len([p for p in (tmp_path / "o").iterdir() if p.suffix == ".png"]) == 2


def test_out_is_checked_before_the_work(capsys, loaded, tmp_path):
    (tmp_path / "file").write_text("")
    run = runs.scan(tmp_path)[0]
    for out in (tmp_path / "file", tmp_path / ("n" * 300), run.path, run.path / "deep" / "er"):
        assert str(out) in refused(capsys, "sample", "r", "--out", out)
    assert not loaded


def test_many_images_are_drawn_and_written_in_parts(capsys, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "CHUNK", 4)
    assert call(capsys, "sample", "r", "--labels", *[i % 3 for i in range(10)], "--out", tmp_path / "o")[0] == 0
    assert [labels for labels, _ in loaded] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0]]
    assert [how["first"] for _, how in loaded] == [0, 4, 8]
    assert len(list((tmp_path / "o").glob("0*.png"))) == 10


def test_home_is_known_in_every_path(capsys, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call(capsys, "sample", "r", "--out=~/o", "--root=~")[0] == 0
    assert (tmp_path / "o" / "grid.png").is_file()
    assert not Path("~").exists()


def picture(path: Path, colour=(200, 30, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def test_reconstruct_takes_files_and_folders_and_names_bad_ones(capsys, monkeypatch, tmp_path):
    run = runs.create(api.resolve("tiny_plain_vae").phases()[0], tmp_path / "runs")
    tokenizer = SimpleNamespace(size=8)
    monkeypatch.setattr(api, "load_tokenizer", lambda run, root: tokenizer)
    monkeypatch.setattr(api, "tokenizer_run", lambda ref, root: run)
    monkeypatch.setattr(api, "reconstruct", lambda tokenizer, images: (images, images, torch.full((len(images),), 25.5)))
    monkeypatch.setattr(pictures, "CHUNK", 2)
    for name in ("b/1.png", "b/deep/2.png", "a b.png"):
        picture(tmp_path / "in" / name)
    (tmp_path / "in" / "b" / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "in" / "b" / "notes.txt").write_text("")
    code, out, err = call(capsys, "reconstruct", run.id, tmp_path / "in" / "a b.png", tmp_path / "in" / "b")
    assert code == 0
    assert out.count("PSNR 25.50 dB") == 4, "three and their mean"
    assert "1 left out" in out
    assert "bad.png" in err
    folder = run.path / "reconstructions"
    assert Image.open(folder / "0000_a_b.png").size == (16, 8)
    assert json.loads((folder / "manifest.json").read_text())["psnr"] == [25.5, 25.5, None, 25.5]
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(capsys, "reconstruct", run.id, tmp_path / "empty")
    assert "no image given" in refused(capsys, "reconstruct", run.id)


# -- what the machine refuses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "state.pt"), "'state.pt': No space left on device; free space"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "read-only"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300), "shorter name"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/x"), "circle"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "permissions"),
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out of memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(capsys, monkeypatch, error, said):
    def fail(*args, **more):
        raise error

    monkeypatch.setattr(api, "evaluate", fail)
    assert said in refused(capsys, "eval", "x")


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "x"), ("RANK", "\u00b2"), ("WORLD_SIZE", "-1"), ("ACCELERATE_USE_CPU", "maybe")])
def test_variables_of_launchers_are_checked(capsys, monkeypatch, tmp_path, name, value):
    monkeypatch.setenv(name, value)
    line = refused(capsys, "train", "tiny_plain_vae", "--root", tmp_path)
    assert name in line
    assert value in line
    assert not list(tmp_path.iterdir())


def test_a_line_comes_at_once_on_a_terminal(capsys, monkeypatch):
    said = []

    def evaluate(*args, **more):
        said.append(capsys.readouterr().err)
        raise RunError("done")

    monkeypatch.setattr(api, "evaluate", evaluate)
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
    assert main.main(["eval", "x"]) == 2
    assert "vfmlab eval" in said[0]


# -- looking around -------------------------------------------------------------------------------------------------


def test_runs_lists_what_is_there(capsys, tmp_path):
    code, out, _ = call(capsys, "runs", "--root", tmp_path)
    assert code == 0
    assert f"begin with: vfmlab train tiny_vfm_vae --root {tmp_path}" in out
    run = api.resolve("tiny_plain_vae").phases()[0]
    folder = runs.create(run, tmp_path)
    folder.save_report({"hash": "x", "metrics": {"psnr": {"value": 21.5}}})
    code, out, _ = call(capsys, "runs", "--root", tmp_path)
    assert run.id in out
    assert "psnr 21.5" in out
    code, out, _ = call(capsys, "runs", "--root", tmp_path, "--json")
    (row,) = json.loads(out)
    assert (row["id"], row["kind"], row["state"]) == (run.id, "tokenizer", "created")
    assert row["metrics"] == {"psnr": 21.5}
    other = runs.create(api.resolve("tiny_plain_vae", {"seed": 3}).phases()[0], tmp_path)
    (folder.path / "status.json").write_text("{")
    code, out, err = call(capsys, "runs", "--root", tmp_path)
    assert code == 0
    assert "seed=3" in out
    assert other.id in out
    assert f"damaged: run '{folder.id}'" in err


def test_presets_are_listed(capsys):
    from vfmlab import presets

    code, out, _ = call(capsys, "presets")
    assert code == 0
    listed = [line.split()[0] for line in out.splitlines()]
    assert [name for name in listed if name[0] != "+"] == presets.names()
    assert "+no_kl" in listed
    assert all(len(line.split()) > 3 for line in out.splitlines()), "every preset says what it is for"


def test_a_preset_as_a_file_is_the_preset(capsys, tmp_path):
    from vfmlab import api

    code, out, _ = call(capsys, "presets", "tiny_vfm_vae+no_kl", "--json")
    assert code == 0
    (tmp_path / "mine.json").write_text(out)
    assert api.resolve(tmp_path / "mine.json").id == api.resolve("tiny_vfm_vae+no_kl").id
    assert "vfmlab presets PRESET --json" in refused(capsys, "presets", "--json")
    assert "did you mean 'tiny_vfm_vae'" in refused(capsys, "presets", "tiny_vfm_va", "--json")


def test_a_preset_with_changes_says_what_they_are(capsys):
    code, out, _ = call(capsys, "presets", "tiny_rae+no_vf@tiny_plain_vae+repa")
    assert code == 0
    assert all(part in out for part in ("tiny_rae+no_vf@tiny_plain_vae+repa", "+no_vf ", "@tiny_plain_vae ", "+repa ", "vfmlab train tiny_rae+no_vf@"))
    assert "did you mean 'no_kl'" in refused(capsys, "presets", "tiny_vfm_vae+no_lk")


def test_doctor_fails_when_something_must_be_mended(capsys, monkeypatch):
    from vfmlab.cli import doctor

    found = [doctor.Check("torch", "ok", "2"), doctor.Check("assets", "fail", "gone", "get it")]
    monkeypatch.setattr(doctor, "checks", lambda root: iter(found))
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False
    found.pop()
    assert call(capsys, "doctor")[0] == 0


def test_app_without_gradio_says_what_to_install():
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "from vfmlab.cli import main\n"
        "sys.exit(main.main(['app']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2, done.stderr
    assert "'app' needs gradio, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_quick_to_import():
    """Help and mistakes must not wait for torch."""
    code = (
        "import sys\n"
        "from vfmlab.cli import main\n"
        "code = main.main(['trian'])\n"
        "print(code, [m for m in ('torch', 'timm', 'numpy', 'gradio', 'torchvision') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "2 []", done.stderr


def letters(text):
    return re.sub(r"[\s│]", "", text)


def test_module_and_every_command_have_help(capsys):
    for name, command in main.COMMANDS.items():
        assert command.__doc__
        with pytest.raises(SystemExit):
            main.main([name, "--help"])
        text = capsys.readouterr().out
        assert "Args:" not in text, "what options mean stands beside them"
        meanings = re.split(r"^ {4,8}\w+:", inspect.getdoc(command).partition("Args:")[2], flags=re.MULTILINE)[1:]
        assert [m for m in map(letters, meanings) if m not in letters(text)] == [], f"{name}: not in its help"
        assert len(command.__doc__.splitlines()[0]) > 20
    done = subprocess.run([sys.executable, "-m", "vfmlab", "--help"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0
    for name in main.COMMANDS:
        assert name in done.stdout
    assert "labels:" not in done.stdout, "of each command its first words"


# -- the whole way, as a person would go it -------------------------------------------------------------------------


def start(*args: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "vfmlab", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    """A real signal to a real run, twice: exit code 130, one line, and the second start goes on where the first was."""
    root = tmp_path / "runs"
    args = ["train", "tiny_plain_vae", "--set", "train.samples=200000", "--root", root, "--progress", "plain"]
    reached = []
    for _ in range(2):
        process = start(*args)
        while not any(step["samples"] > max(reached, default=0) for run in runs.scan(root) for step in run.metrics("step")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)  # until it has logged a later step than before
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=280)
        assert process.returncode == 130, err
        told = [line for line in err.splitlines() if line.startswith("vfmlab: ")]
        assert len(told) == 1
        assert "is saved. To go on: vfmlab train tiny_plain_vae" in told[0]
        assert "Traceback" not in err
        (run,) = runs.scan(root)
        assert run.status().state == "interrupted"
        reached.append(run.status().samples)
    assert 0 < reached[0] < reached[1]


def test_train_eval_sample_reconstruct(capsys, tmp_path):
    root = tmp_path / "runs"
    small = ["--set", "data.train=32", "train.samples=16", "diffusion.train.samples=16", "diffusion.train.evaluate_at=[]"]
    code, out, _ = call(capsys, "train", "tiny_plain_vae", *small, "--root", root)
    assert code == 0
    tokenizer, diffusion = runs.scan(root)
    assert f"trained {diffusion.id}" in out
    code, out, _ = call(capsys, "eval", diffusion.id, "--set", "n=8", "batch=8", "--root", root)
    assert code == 0
    assert "gfd" in out
    code, out, _ = call(capsys, "sample", diffusion.id, "--labels", 0, 1, "--steps", 2, "--root", root)
    assert code == 0
    assert Image.open(diffusion.path / "samples" / "grid.png").size[0] > 16
    picture = tmp_path / "in.png"
    Image.new("RGB", (40, 30), (200, 30, 60)).save(picture)
    code, out, _ = call(capsys, "reconstruct", tokenizer.id, picture, "--root", root)
    assert code == 0
    assert re.search(r"PSNR \d+\.\d+ dB", out)
    picture.write_bytes(b"")
    assert "in.png" in refused(capsys, "reconstruct", tokenizer.id, picture, "--root", root)
    line = refused(capsys, "sample", tokenizer.id, "--root", root)
    assert "diffusion" in line
    (tokenizer.checkpoints / "ema.safetensors").write_bytes(b"\x80\x04 a pickle")
    assert "ema.safetensors" in refused(capsys, "reconstruct", tokenizer.id, picture, "--root", root)
