"""Widgets in a real kernel: a control is changed as a browser would change it, and the figure in the output follows."""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace

import pytest

from vfmlab import api, runs, widgets
from vfmlab.data import examples
from vfmlab.errors import ConfigError, RunError

pytest.importorskip("ipywidgets")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
manager = pytest.importorskip("jupyter_client.manager")
util = pytest.importorskip("jupyter_core.utils")
SMALL = {"data.train": 32, "data.val": 16, "protocol.n": 8, "train.samples": 32, "diffusion.train.samples": 32, "diffusion.train.evaluate_at": []}


class Kernel:
    """A notebook that grows cell by cell in a real kernel."""

    def __init__(self, folder):
        self.client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=200, kernel_name="python3", resources={"metadata": {"path": str(folder)}})

    def __enter__(self):
        self.context = self.client.setup_kernel()
        self.context.__enter__()
        return self

    def __exit__(self, *error):
        self.context.__exit__(*error)

    def __call__(self, source, fails=False):
        """Execute a cell and return it; its outputs change when later cells update them."""
        cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["raises-exception"]} if fails else {})
        self.client.nb.cells.append(cell)
        self.client.execute_cell(cell, len(self.client.nb.cells) - 1)
        return cell

    def text(self, source):
        return "".join(o.get("text", "") for o in self(source).outputs)

    def set(self, control, **state):
        """What a browser sends when somebody moves a control, and what it does with the answers."""
        comm, kc = self.text(f"print({control}.model_id)").strip(), self.client.kc
        message = kc.session.msg("comm_msg", {"comm_id": comm, "data": {"method": "update", "state": state, "buffer_paths": []}})
        kc.shell_channel.send(message)
        while True:
            answer = util.run_sync(kc.get_iopub_msg)(timeout=120)
            if answer["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                if answer["content"].get("execution_state") == "idle":
                    return
                self.client.process_message(answer, self.client.nb.cells[-1], len(self.client.nb.cells) - 1)


def is_figure(data):
    """Plotly's call with a figure, and not the library itself."""
    return "Plotly.newPlot(" in data.get("text/html", "") and len(data["text/html"]) < 1e6


def drawn(cell):
    """The data and the layout of the one figure in a cell's output."""
    (page,) = [o["data"]["text/html"] for o in cell.outputs if is_figure(o.get("data", {}))]
    decode, at = json.JSONDecoder().raw_decode, page.index("[", page.index("Plotly.newPlot("))
    data, end = decode(page, at)
    layout, _ = decode(page, page.index("{", end))
    return {"data": data, "layout": layout}


def rows(figure):
    return figure["layout"]["yaxis"]["ticktext"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(root, id of a diffusion run, id of its tokenizer), trained in seconds."""
    root = tmp_path_factory.mktemp("runs")
    run = api.resolve("tiny_vfm_vae", SMALL)
    for _ in api.train(run, root):
        pass
    return root, run.id, run.tokenizer_phase.id


@pytest.fixture(scope="module")
def kernel(trained, tmp_path_factory):
    root, diffusion, tokenizer = trained
    with Kernel(tmp_path_factory.mktemp("kernel")) as running:
        running("import vfmlab\nfrom vfmlab import widgets\nfrom vfmlab.plots import primitives\nprimitives.use_notebook_renderer()")
        running(f"root = {str(root)!r}\ntok = vfmlab.load_tokenizer({tokenizer!r}, root)\nmodel = vfmlab.load_diffusion({diffusion!r}, root)")
        running("data = model.run.data\nimages, labels, names = vfmlab.data.examples(data, n=3)\ntwo = {'one': tok, 'other': tok}")
        yield running


def page(cell):
    """The tables below a cell, as HTML."""
    return " ".join(o["data"].get("text/html", "") for o in cell.outputs if "data" in o and "<table" in o["data"].get("text/html", ""))


def test_the_run_picker_shows_the_run_that_is_picked(kernel, trained):
    _, diffusion, tokenizer = trained
    cell = kernel("picker = widgets.pick_run(root)\npicker")
    assert diffusion in page(cell), "the newest first"
    kernel.set("picker.controls['run']", index=1)
    assert kernel.text("print(picker.value['run'])").strip() == tokenizer
    assert tokenizer in page(cell)
    assert any("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in cell.outputs)
    kernel("from vfmlab import config, runs\nruns.create(vfmlab.resolve('tiny_plain_vae').tokenizer_phase, root)")
    kernel("picker.box.children[0].children[-1].click()")
    assert kernel.text("print(picker.value['run'], len(picker.controls['run'].options))").split() == [tokenizer, "3"], "refreshing keeps the choice"


def test_the_reconstruction_viewer_follows_its_controls(kernel):
    cell = kernel("viewer = widgets.reconstructions(two, images, data=data)\nviewer")
    before = drawn(cell)
    assert [name.split("  ")[0].strip() for name in rows(before)] == ["original", "one", "error x4", "other", "error x4"]
    kernel.set("viewer.controls['sigma']", value=1.5)
    noisy = drawn(cell)
    assert rows(noisy)[1] != rows(before)[1], "PSNR under noise is another"
    kernel.set("viewer.controls['shown']", index=[1])
    kernel.set("viewer.controls['errors']", value=False)
    assert [name.split("  ")[0] for name in rows(drawn(cell))] == ["original", "other"]
    kernel("with viewer.together():\n    viewer.controls['sigma'].value, viewer.controls['bits'].value = 0.0, 1")
    assert rows(drawn(cell))[1] not in (rows(noisy)[1], rows(before)[3])
    assert kernel.text("print(viewer.value)").strip() == "{'shown': ('other',), 'sigma': 0.0, 'errors': False, 'channels': 0, 'bits': 1}"


def test_the_feature_explorer_follows_its_query(kernel):
    cell = kernel("seen = widgets.features(tok.vfm, images)\nseen")
    colours = drawn(cell)
    kernel.set("seen.controls['view']", index=1)
    alike = drawn(cell)
    assert rows(colours)[1:] == rows(alike)[1:]
    assert (rows(colours)[0], rows(alike)[0]) == ("image", "query")
    kernel.set("seen.controls['x']", value=0.9)
    assert drawn(cell)["data"] != alike["data"]


def test_the_guidance_explorer_follows_its_controls(kernel):
    cell = kernel("sampler = widgets.sampling(model, classes=2)\nsampler")
    usual = drawn(cell)
    assert rows(usual)[0].endswith("guidance 1")
    kernel("with sampler.together():\n    sampler.controls['scale'].value, sampler.controls['steps'].value = 4.0, 3")
    guided = drawn(cell)
    assert rows(guided)[0] == "euler 3, guidance 4"
    assert rows(guided)[1] == rows(usual)[1]
    kernel.set("sampler.controls['view']", index=1)
    assert rows(drawn(cell)) == kernel.text("print('\\n'.join(model.class_names[:2]))").split("\n")[:2]


def test_the_interpolator_says_what_is_wrong_and_goes_on(kernel):
    cell = kernel("between = widgets.interpolation({'one': tok}, images)\nbetween")
    straight = drawn(cell)
    assert rows(straight)[0] == "pixels"
    kernel.set("between.controls['second']", value=2)
    assert drawn(cell)["data"] != straight["data"]
    kernel("before = between.draw\ndef broken(**how): raise vfmlab.errors.ConfigError('no <way>')\nbetween.draw = broken")
    kept = drawn(cell)
    kernel.set("between.controls['frames']", value=5)
    assert "no &lt;way&gt;" in kernel.text("print(between.note.value)")
    assert drawn(cell) == kept, "the figure before stays"
    kernel("between.draw = before\nbetween.redraw()")
    assert kernel.text("print(repr(between.note.value))").strip() == "''"
    assert drawn(cell)["data"] != kept["data"]


def test_a_panel_in_an_exported_page_is_its_figure(kernel):
    nbconvert = pytest.importorskip("nbconvert")
    kernel("widgets.choose(lambda n: primitives.bars({'a': n}, y='n', title=f'the figure of {n}'), n=[3, 4])")
    page, _ = nbconvert.HTMLExporter().from_notebook_node(kernel.client.nb)
    assert "the figure of 3" in page



# -- training ---------------------------------------------------------------------------------------------------------

LONG = {"data.train": 32, "data.val": 16, "train.samples": 80_000, "train.log_every": 16, "train.checkpoint_every": 80_000}


@pytest.fixture
def plain():
    """The client of a kernel that is talked to message by message."""
    running, client = manager.start_new_kernel(kernel_name="python3")
    yield client
    client.stop_channels()
    running.shutdown_kernel(now=True)


def click(client, comm):
    """A button pressed while a cell computes."""
    client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}))


def test_the_stop_button_saves_and_the_same_cell_goes_on(plain, tmp_path):
    setup = "import vfmlab\nfrom vfmlab import widgets\nfrom vfmlab.plots import primitives\nprimitives.use_notebook_renderer()\n"
    setup += f"run = vfmlab.resolve('tiny_plain_vae', {LONG}).tokenizer_phase"
    assert plain.execute_interactive(setup, timeout=200)["content"]["status"] == "ok"
    sent = plain.execute(f"events = await widgets.train(run, {str(tmp_path)!r})")
    button, pressed, said, shown = None, False, "", []
    while True:
        message = plain.get_iopub_msg(timeout=120)
        kind, content = message["msg_type"], message["content"]
        if kind == "comm_open" and content["data"]["state"].get("_model_name") == "ButtonModel":
            button = content["comm_id"]
        elif kind == "comm_msg" and not pressed and any(is_figure(data) for data in shown) and "loss" in str(content["data"].get("state", {}).get("value")):
            said, pressed = content["data"]["state"]["value"], True
            click(plain, button)
        elif kind in ("display_data", "update_display_data"):
            shown.append(content["data"])
        elif kind == "error":
            assert content["ename"] == "Interrupted"
            assert content["traceback"] == [content["evalue"]], "one line, no traceback"
            assert "is saved: run this cell again to go on" in content["evalue"]
        elif kind == "status" and content["execution_state"] == "idle" and message["parent_header"]["msg_id"] == sent:
            break
    assert plain.get_shell_msg(timeout=10)["content"]["status"] == "error", "what stands below in the notebook is not run"
    assert " left" in said
    assert sum(len(data.get("text/html", "")) >= 1e6 for data in shown) == 1, "plotly.js is in the notebook once"
    (folder,) = runs.scan(tmp_path)
    stopped = folder.status()
    assert stopped.state == "interrupted"
    assert 0 < stopped.samples < stopped.total
    assert folder.ema.exists()
    events = api.train(folder.config(), tmp_path)
    begun = next(event for event in events if event.kind == "start")
    events.close()
    assert begun.data["resumed"] == stopped.samples, "it goes on where it was"


def test_headless_is_the_figure_itself(trained, capsys):
    root, diffusion, tokenizer = trained
    tok, model = api.load_tokenizer(tokenizer, root), api.load_diffusion(diffusion, root)
    images, _, _ = examples(model.run.data, n=3)
    assert diffusion in str(widgets.pick_run(root, "diffusion", headless=True).rows)
    for figure, first in (
        (widgets.reconstructions({"one": tok}, images, headless=True), "original"), (widgets.features(tok, images, headless=True), "image"),
        (widgets.sampling(model, headless=True, classes=2, steps=2), "euler 2, guidance 1"), (widgets.interpolation({"one": tok}, images, headless=True), "pixels"),
    ):  # fmt: skip
        assert figure.layout.yaxis.ticktext[0] == first
    assert widgets.choose(lambda n: n, headless=True, n=[3, 4]) == 3
    events = asyncio.run(widgets.train(model.run, root, headless=True))
    assert {event.kind for event in events} == {"skip"}
    assert "was finished before" in capsys.readouterr().out


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="no diffusion run in"):
        widgets.pick_run(tmp_path, "diffusion")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ConfigError, match="or set headless = True"):
        widgets.choose(lambda n: n, n=[3])


def test_a_generator_of_codes_has_no_sampler_to_choose():
    model = SimpleNamespace(run=SimpleNamespace(ar={}, protocol=None), folder=SimpleNamespace(id="codes-1"), num_classes=2)
    with pytest.raises(ConfigError, match="run 'codes-1' draws codes one after the other"):
        widgets.sampling(model, headless=True)


def test_a_parameter_that_a_notebook_does_not_have_is_refused():
    own = "seed = 0  # of all\npreset: str = 'a'\n"
    for cells in ([own, "x = 1"], [own, "# Parameters\nseed = 1\npreset = 'b'\n", "import sys"], []):
        widgets.notebook.check_parameters(cells)
    with pytest.raises(ConfigError, match=r"this notebook has no parameter 'sede' \(did you mean 'seed'\?\)"):
        widgets.notebook.check_parameters(["", own, "# Parameters\nseed = 1\nsede = 1\n", "import sys"])
