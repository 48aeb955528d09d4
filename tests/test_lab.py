"""Notebooks in JupyterLab, in a real browser: run all, move a widget, stop a training and go on, change an own part.

Pictures of what is seen go to the folder VFMLAB_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfmlab import runs

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupyterlab")
pytest.importorskip("ipywidgets")
playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
WAIT = 600_000  # ms; machines of CI are slow now and then
SHORT = {"data.train": 64, "data.val": 32, "protocol.n": 32}
LONG = 256  # images; as long a training waits for the hand that stops it, however slow the machine
PARAMETERS = {
    "02_train_a_tokenizer": {"preset": "tiny_vfm_vae", "overrides": {**SHORT, "train.samples": LONG, "train.log_every": 32}, "own_steps": 3},
    "04_decoder_ablations": {"preset": "tiny_vfm_vae", "overrides": {**SHORT, "train.samples": LONG, "train.log_every": 32}, "rows": "multi_layer",
                             "seeds": 1, "own_steps": 3},
    "08_diffusion_alignment": {"preset": "tiny_vfm_vae", "baseline": "", "overrides": SHORT, "settings": "repa"},
}
PATIENT = """
def patient():  # a kernel that, between two events of a long training, reads messages until the file `hold` is gone
    import asyncio, pathlib, types
    from vfmlab.widgets import monitor

    hold, show, last = pathlib.Path("hold"), monitor.Monitor.show, []

    def noted(self, event):
        show(self, event)
        last[:] = [event]

    async def sleep(seconds):
        await asyncio.sleep(seconds)
        while hold.exists() and last[0].samples and last[0].total >= {long}:
            await asyncio.sleep(0.02)

    monitor.Monitor.show, monitor.asyncio = noted, types.SimpleNamespace(sleep=sleep)

patient()
"""
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on copies of the pairs, at the `tiny` tier: (address, their folder)."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("notebooks")
    shutil.copyfile(FOLDER / "jupytext.toml", folder / "jupytext.toml")
    for name, values in PARAMETERS.items():
        book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
        for key, value in {**values, "root": str(folder / f"runs_{name[:2]}")}.items():
            written = json.dumps(value) if isinstance(value, dict) else value
            cell.source, found = re.subn(rf"^{key} = .*$", lambda _, k=key, v=written: f"{k} = {v!r}", cell.source, flags=re.M)
            assert found == 1, key
        put(book, folder / name)
    for part, text in {"notebook-extension/tracker": {"windowingMode": "none"}, "apputils-extension/notification": {"fetchNews": "false"}}.items():
        settings = home / "settings" / "@jupyterlab" / f"{part}.jupyterlab-settings"  # all cells are in the page, and no question over it
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(text))
    startup = home / "ipython" / "profile_default" / "startup" / "patient.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(PATIENT.format(long=LONG))
    own = {"IPYTHONDIR": "ipython", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
           "JUPYTERLAB_WORKSPACES_DIR": "spaces"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
               "--ServerApp.port=0", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | {key: str(home / name) for key, name in own.items()}, stdout=log, stderr=log,
                                  start_new_session=True)
    try:
        yield address(home, server), folder
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def put(book, stem: Path) -> None:
    """Both files of a pair."""
    nbformat.write(book, stem.with_suffix(".ipynb"))
    jupytext.write(book, stem.with_suffix(".py"), fmt="py:percent")


def address(home: Path, server: subprocess.Popen, patience: float = 120) -> str:
    end = time.monotonic() + patience
    while time.monotonic() < end and server.poll() is None:
        for found in (home / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(json.JSONDecodeError):  # it is there before it is written
                return json.loads(found.read_text())["url"]
        time.sleep(0.1)
    raise AssertionError((home / "log").read_text())


@pytest.fixture(scope="module")
def browser(lab):
    """Its pages share what was fetched once."""
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser.new_context(viewport={"width": 1366, "height": 900})
        browser.close()


class Book:
    """A notebook in a page of the browser."""

    def __init__(self, page, name):
        self.page, self.name = page, name

    def cell(self, text):
        """The one code cell whose source or output holds `text`."""
        return self.page.locator(".jp-CodeCell", has_text=text).first

    def run_all(self):
        self.menu("Run All Cells")

    def run_until(self, text):
        """All cells above the one that holds `text`."""
        self.choose(text)
        self.menu("Run All Above Selected Cell")

    def menu(self, item, menu="Run"):
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{item}$")).click()

    def edit(self, line, *keys, text):
        """Type `text` into the code at the end of the line that holds `line`, `keys` before it."""
        self.page.locator(".cm-line", has_text=line).first.click()
        for key in ("End", *keys):
            self.page.keyboard.press(key)
        self.page.keyboard.type(text)

    def choose(self, text):
        """Make the cell the active one."""
        self.cell(text).locator(".jp-InputPrompt").click()

    def idle(self):
        """Nothing is executed, or waits to be."""
        busy = "[...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('*'))"
        self.page.wait_for_function(f"() => !{busy}", polling=300)

    def errors(self):
        """Of cells, in red; what a cell writes to stderr looks the same."""
        return self.page.locator("[data-mime-type='application/vnd.jupyter.stderr'], [data-mime-type='application/vnd.jupyter.error']").all_inner_texts()

    def seen(self, what, text=""):
        if where := os.environ.get("VFMLAB_SCREENSHOTS"):
            if text:
                self.cell(text).scroll_into_view_if_needed()
            self.page.screenshot(path=Path(where) / f"{self.name[:2]}_{what}.png")

    def slide(self, text, name, key="ArrowRight"):
        """Move the slider `name` below a cell, by a key."""
        row = self.cell(text).locator(".widget-hslider", has=self.page.get_by_text(name, exact=True))
        row.locator(".noUi-handle").press(key)


@contextmanager
def opened(browser, lab, name):
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{lab[0]}lab/tree/{name}.ipynb?reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text(re.compile(r"^Python 3 .*\| Idle$")).first.wait_for()  # before, Run asks which kernel to take
    book = Book(page, name)
    yield book
    book.menu("Shut Down Kernel", "Kernel")
    page.get_by_text(re.compile(r"No Kernel")).first.wait_for()
    page.close()
    assert not wrong


def right(book):
    """The last table: no prediction that was not measured."""
    table = book.page.locator("table", has_text="verdict").last
    assert "not measured" not in table.inner_text()


def stop(book, text, folder):
    """Press the button of the training in the cell that holds `text`, when it is on its way."""
    training = book.cell(text)
    training.get_by_text(re.compile(rf"tokenizer\s+\d+/{LONG} images.*left")).wait_for()
    book.seen("training", text)
    training.get_by_role("button", name="stop and save").click()
    training.get_by_text("stopping ...").wait_for()
    (folder / "hold").unlink()
    training.get_by_text("run this cell again to go on").last.wait_for()
    book.idle()


def test_a_tokenizer_is_trained_stopped_and_taken_up_again(browser, lab):
    """02: run all, stop and save, go on; a channel moves; the own loss is another one after an edit, in both files."""
    (lab[1] / "hold").touch()
    with opened(browser, lab, "02_train_a_tokenizer") as book:
        book.run_all()
        stop(book, "folders = [runs.open_run", lab[1])
        book.seen("stopped", "folders = [runs.open_run")
        (stopped,) = [run for run in runs.scan(lab[1] / "runs_02") if run.status().state == "interrupted"]
        assert 0 < stopped.status().samples < LONG
        assert len(book.errors()) == 1
        book.choose("folders = [runs.open_run")
        book.menu("Run Selected Cell and All Below")
        book.page.locator("table", has_text="verdict").last.wait_for()
        book.idle()
        assert stopped.status().state == "finished"
        assert not book.errors()
        right(book)
        figure = book.cell("def moved(channel, by)")
        figure.get_by_text("channel 0 +2").wait_for()
        book.slide("def moved(channel, by)", "channel")
        figure.get_by_text("channel 1 +2").wait_for()
        book.seen("channel", "def moved(channel, by)")
        before = len(runs.scan(lab[1] / "runs_02"))
        book.edit("return wrong.diff(dim=-1)", text=" + 0 * r.z.sum()")
        book.page.keyboard.press("Control+Enter")
        book.page.wait_for_timeout(200)
        book.idle()
        assert len(runs.scan(lab[1] / "runs_02")) == before + 1
        assert not book.errors()
        book.seen("own_loss", "def edges(r)")
        book.page.keyboard.press("Control+s")
        for ending in (".py", ".ipynb"):
            end = time.monotonic() + 60
            while "0 * r.z.sum()" not in (lab[1] / f"02_train_a_tokenizer{ending}").read_text():
                assert time.monotonic() < end, f"the edit is not in the {ending}"
                time.sleep(0.2)


def interrupted(book, root, wanted):
    """When each run began that a stop left on its way to `wanted` finished ones."""
    book.idle()
    assert len(book.errors()) == 1
    found = {run.id: run.status() for run in runs.scan(root)}
    assert sum(status.state == "finished" for status in found.values()) < wanted
    assert {status.state for status in found.values()} <= {"finished", "interrupted"}
    return {run: status.created for run, status in found.items()}


def finished(book, root, wanted, before):
    """All `wanted` runs are, and those of `before` among them are the same ones."""
    book.idle()
    assert not book.errors()
    after = {run.id: run.status() for run in runs.scan(root)}
    assert len(after) == wanted
    assert {status.state for status in after.values()} == {"finished"}
    assert before.items() <= {run: status.created for run, status in after.items()}.items()


def test_a_decoder_is_taken_apart(browser, lab):
    """04, its first half: stop and save, go on; fusion is turned up by a slider; the own block is another one after an edit."""
    root, scale = lab[1] / "runs_04", "results = compare.measured"
    (lab[1] / "hold").touch()
    with opened(browser, lab, "04_decoder_ablations") as book:
        book.run_until(scale)
        stop(book, "tokenizer = vfmlab.load_tokenizer(run.id, root)", lab[1])
        before = interrupted(book, root, 1)
        assert before
        book.run_until(scale)
        book.cell("swapped, shown =").get_by_text("plain: ").wait_for()
        finished(book, root, 3, before)
        book.seen("blocks", "def enlarged")
        figure = book.cell("def weaker(times)")
        figure.get_by_text("fusion x 0.5").wait_for()
        book.slide("def weaker(times)", "times")
        figure.get_by_text("fusion x 0.75").wait_for()
        book.seen("fusion", "def weaker(times)")
        book.edit("x = x + self.conv(F.gelu(x))", text=" / 2")
        for _ in ("the block", "both recipes", "the text", "both trainings"):
            book.page.keyboard.press("Shift+Enter")
        book.page.wait_for_timeout(200)
        finished(book, root, 4, before)
        book.seen("own_block", "swapped, shown =")


def test_gradients_of_an_alignment_are_weighed(browser, lab):
    """08, its first half: REPA's weight is moved by a slider, the own loss is drawn; then a study is interrupted, and goes on."""
    root, scale = lab[1] / "runs_08", "results = compare.measured"
    with opened(browser, lab, "08_diffusion_alignment") as book:
        book.run_until(scale)
        book.cell("joint.explain()").get_by_text("token_velocity", exact=True).last.wait_for()
        book.idle()
        assert not book.errors()
        figure = book.cell("def weighed(weight)")
        figure.get_by_text("weight 0.5, cosine").wait_for()
        book.slide("def weighed(weight)", "weight")
        figure.get_by_text("weight 1, cosine").wait_for()
        book.seen("weighed", "def weighed(weight)")
        book.edit('"REPA, stopped": repa', "ArrowLeft", text=', "REPA, twice": 2 * repa(tokens)')
        book.page.keyboard.press("Control+Enter")
        book.cell("def norm(loss, module)").get_by_text("REPA, twice", exact=True).last.wait_for()
        book.seen("own_loss", "def norm(loss, module)")
        book.choose(scale)
        book.page.keyboard.press("Control+Enter")
        while not any(run.status().samples for run in runs.scan(root)):
            time.sleep(0.1)
        book.menu("Interrupt Kernel", "Kernel")
        study = book.cell(scale)
        study.get_by_text("run this cell again to go on").last.wait_for()
        book.seen("interrupted", scale)
        before = interrupted(book, root, 3)
        book.choose(scale)
        book.page.keyboard.press("Control+Enter")
        study.get_by_text("images a second, as logged").wait_for()
        finished(book, root, 3, before)
        book.seen("study", scale)
