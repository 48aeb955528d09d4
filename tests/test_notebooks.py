"""Every notebook runs top to bottom at the `tiny` tier under papermill: those of the demo by the demo, stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from vfmlab import runs
from vfmlab.errors import TrainingError
from vfmlab.studies import site
from vfmlab.studies.sweep import outputs
from vfmlab.studies.sweep.notebook import execute

engines = pytest.importorskip("papermill.engines")
jupytext = pytest.importorskip("jupytext")
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo at `tiny`, interrupted once a run is finished, then run to its end: (folder, output of the second start).

    First over a process for each core, then in one, which imports once.
    """
    root = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "vfmlab", "demo", "--preset", "tiny_vfm_vae", "--baseline", "tiny_plain_vae", "--root", str(root)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": FOLDER.parent, "start_new_session": True}
    first = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
    end = time.time() + 600
    while not any(folder.status().state == "finished" for folder in runs.scan(root / "runs")):
        assert first.poll() is None, first.communicate()[0]
        assert time.time() < end, "no run was finished"
        time.sleep(0.2)
    kept = {folder.id: folder.status().created for folder in runs.scan(root / "runs") if folder.status().state == "finished"}
    os.killpg(first.pid, signal.SIGINT)
    told = first.communicate(timeout=240)[0]
    assert first.returncode == 130, told
    assert "the same command goes on from there" in told
    assert not (root / "report.html").exists()
    second = subprocess.run([*command, "--jobs", "1"], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1500, **options)
    assert second.returncode == 0, second.stdout
    after = {folder.id: folder.status() for folder in runs.scan(root / "runs")}
    assert all(after[run].created == created for run, created in kept.items())
    assert {status.state for status in after.values()} == {"finished"}
    return root, second.stdout


@pytest.mark.timeout(2400)
def test_the_demo_says_where_and_what_and_how(demo):
    root, told = demo
    assert "\x1b" not in told, "no escape codes in a pipe"
    assert "\r" not in told, "no bars in a pipe"
    *_, tokenizer, baseline, seconds, report, app = told.strip().splitlines()
    assert tokenizer.startswith("tiny_vfm_vae ")
    assert baseline.startswith("tiny_plain_vae ")
    assert all("psnr" in line and "gfd" in line and "protocol" in line for line in (tokenizer, baseline))
    assert seconds.startswith("time: ")
    assert str(root / "report.html") in report
    assert app.endswith(f"vfmlab app --root {root / 'runs'}")
    page = (root / "report.html").read_text()
    assert "protocol" in page
    assert "plotly" in page


OWN = {  # not in the demo
    "04": {"seeds": 1, "widths": "4,8"}, "05": {"preset": "tiny_aligntok", "ablations": "w_sp 0"}, "06": {"baseline": "tiny_plain_vae"},
    "08": {"baseline": "tiny_plain_vae", "settings": "joint"}, "11": {"baseline": "tiny_plain_vae", "drawn": 40},
    "12": {"preset": "tiny_vqgan", "entries": 64, "steps": 20, "quantisers": "vq,simvq", "draws": 20},
    "13": {"preset": "tiny_epsilon_vae", "baseline": "tiny_plain_vae", "steps": 20, "dimensions": "2,8", "networks": 2},
}  # fmt: skip

HANDED_OUT = {"02": "psnr", "07": "gfd"}  # what a sweep collects


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_headless(name, demo):
    root, _ = demo
    if name[:2] in OWN:
        parameters = {"preset": "tiny_vfm_vae", "root": str(root / "runs"), "headless": True, **OWN[name[:2]]}
        book = execute(FOLDER / f"{name}.ipynb", root / f"{name}.ipynb", parameters)
    else:
        suffix = ".tiny_vfm_vae" if name[:2] in ("02", "07") else ""
        book = nbformat.read(root / "notebooks" / f"{name}{suffix}.ipynb", as_version=4)
        assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code" and cell.source.strip())
    code = [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]
    figures = [o for cell in code for o in cell.outputs if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert len(figures) >= 3
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    verdicts = [text for cell in code for o in cell.outputs if (text := o.get("data", {}).get("text/plain", "")).startswith("| prediction")]
    assert any(f"| {verdict} |" in verdicts[-1] for verdict in ("right", "wrong", "undecided"))
    if name[:2] in HANDED_OUT:
        found, picture = outputs.read(book)
        assert found["numbers"][HANDED_OUT[name[:2]]]["protocol"]
        assert picture.startswith(b"\x89PNG")


@pytest.mark.timeout(600)
def test_the_site_of_all_notebooks_is_whole(demo, tmp_path):
    """`make site` at `tiny`, on the notebooks that the tests above have executed."""
    root, _ = demo
    books = [path for name in NOTEBOOKS for path in (root / f"{name}.ipynb", root / "notebooks" / f"{name}.ipynb") if path.exists()]
    first = site.build(tmp_path, books)
    pages = {path.stem: path for path in (tmp_path / "notebooks").glob("*.html")}
    assert len(pages) == len(books) + 1
    assert all(f'href="{path.stem}.html"' in pages["index"].read_text() for path in books)
    assert str(site.TREE) not in "".join(path.read_text() for path in pages.values())
    assert "docs/results/findings.html" in first.read_text()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_two_files_of_a_pair_agree(name):
    """In what a person writes: outputs, counts and the kernel's header may differ."""
    sides = [jupytext.read(FOLDER / f"{name}{ending}") for ending in (".py", ".ipynb")]
    cells = [[(c.cell_type, c.source.strip(), c.metadata.get("tags", [])) for c in side.cells] for side in sides]
    assert cells[0] == cells[1], f"{name}.py and {name}.ipynb differ: make notebooks"


@pytest.mark.skipif(not os.environ.get("CI"), reason="a working copy may hold outputs; what is committed may not (CI)")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_outputs_are_committed(name):
    book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    filled = [number for number, cell in enumerate(book.cells) if cell.get("outputs")]
    assert not filled, f"strip cells {filled}: jupyter nbconvert --clear-output --inplace notebooks/{name}.ipynb"


def test_a_misspelt_parameter_is_refused_in_the_first_cell(tmp_path):
    with pytest.raises(TrainingError, match="this notebook has no parameter 'sede'"):
        execute(FOLDER / "00_start_here.ipynb", tmp_path / "a.ipynb", {"sede": 1})


FORKED = """# %% tags=["parameters"]
said = ""

# %%
import atexit, json, os, pathlib, sys
from vfmlab import runs

atexit.register(pathlib.Path(said + ".end").touch)
left = open(said + ".left", "w")
left.write("not flushed")

ready = "torch._dynamo" in sys.modules
import numpy, torch

own = [os.getppid(), os.getcwd(), os.environ.get("SAID"), ready, torch.cuda.is_initialized(), said]
print(json.dumps(own + [numpy.random.rand()]))
"""


def written(text, folder):
    """A notebook of the percent format as .ipynb."""
    book = jupytext.reads(text, fmt="py:percent")
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    jupytext.write(book, folder / "n.ipynb")
    return folder / "n.ipynb"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a kernel starts as jupyter starts it")
def test_kernels_are_forks_of_one_process(tmp_path, monkeypatch):
    """Each has the imports, and a folder, variables and random numbers of its own; without that process they start anew."""
    monkeypatch.chdir(tmp_path)
    source = written(FORKED, tmp_path)

    def run(said):
        monkeypatch.setenv("SAID", said)
        done = execute(source, tmp_path / f"{said}.ipynb", {"said": said})
        return json.loads("".join(o.get("text", "") for cell in done.cells for o in cell.get("outputs", ())))

    (parent, *one, first), (same, *other, second) = run("a"), run("b")
    assert parent == same != os.getpid()
    assert [(tmp_path / f"{said}.end").exists() for said in "ab"] == [True, True], "what is to be done at exit is done"
    assert [(tmp_path / f"{said}.left").read_text() for said in "ab"] == ["not flushed"] * 2, "files left open are written"
    assert [one, other] == [[str(tmp_path), said, True, False, said] for said in "ab"]
    assert first != second
    os.kill(parent, signal.SIGKILL)
    psutil.Process(parent).wait(60)
    assert run("c")[2] == "c"
    assert run("d")[0] not in (parent, os.getpid()), "and the next is a fork again"


KILLED = """# %% tags=["parameters"]
said = ""

# %%
print("so far", said)

# %%
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kernel_that_dies_leaves_what_it_had_and_few_writes(tmp_path, monkeypatch):
    """Twice a cell would be eight of a notebook that is over in a moment."""
    count, write = [], engines.write_ipynb
    monkeypatch.setattr(engines, "write_ipynb", lambda *arguments: (count.append(1), write(*arguments)))
    with pytest.raises(TrainingError, match="[Kk]ernel died"):
        execute(written(KILLED, tmp_path), tmp_path / "out.ipynb", {"said": "good"})
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    assert [o["text"] for cell in cells for o in cell.get("outputs", ()) if "text" in o] == ["so far good\n"]
    assert len(count) <= 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_first_cell_checks_the_parameters(name):
    cells = (FOLDER / f"{name}.py").read_text().split("# %%")
    after = next(i for i, cell in enumerate(cells) if cell.startswith(' tags=["parameters"]'))
    assert "widgets.set_up_notebook()" in cells[after + 1]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_one_story_in_short_cells(name):
    """Predictions are lines of code, made before their verdicts; cells hold steps and no bookkeeping."""
    text = (FOLDER / f"{name}.py").read_text()
    story = ("**Question.**", 'tags=["parameters"]', "expect(", "verdicts()\n", "## Finding", "## What next")
    assert sorted(story, key=text.index) == list(story)
    assert "json.loads" not in text
    assert "failed =" not in text
    for cell in text.split("# %%")[1:]:
        if not cell.startswith(" [markdown]"):
            lines = [line for line in cell.splitlines()[1:] if line.strip()]
            assert len(lines) <= 15
