"""The site of a small checkout: its pages lead to each other, and what is broken ends the build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vfmlab.errors import ConfigError, TrainingError
from vfmlab.studies import site

jupytext = pytest.importorskip("jupytext")
pytest.importorskip("papermill")
TREE = Path(__file__).resolve().parents[1]
CELLS = """# %% [markdown]
# # A notebook
# See [the manual](../docs/app.md).

# %% tags=["parameters"]
broken = False

# %%
import plotly.graph_objects as go
import plotly.io as pio

pio.renderers.default = "plotly_mimetype+notebook"
if broken:
    raise ValueError("this cell fails")
go.Figure(go.Scatter(y=[1, 2]))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The manual as it is, and one small notebook."""
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(TREE / "docs", folder / "docs", ignore=shutil.ignore_patterns("site"))
    shutil.copyfile(TREE / "README.md", folder / "README.md")
    (folder / "notebooks").mkdir()
    book = jupytext.reads(CELLS, "py:percent")
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    jupytext.write(book, folder / "notebooks" / "00_small.ipynb")
    return folder


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    return out, site.build(out, {"00_small": {}}, tree)


def test_pages_are_whole_and_need_no_network(built):
    out, first = built
    assert first == out / "index.html"
    pages = {path.relative_to(out).as_posix(): path.read_text() for path in out.glob("**/*.html")}
    assert {"docs/app.html", "docs/results/findings.html", "notebooks/00_small.html", "api/training.html"} <= set(pages)
    notebook = pages["notebooks/00_small.html"]
    assert 'href="../docs/app.html"' in notebook
    assert "Plotly.newPlot" in notebook
    assert 'src="../plotly.min.js"' in notebook
    assert len(notebook) < 200_000, "plotly.js is beside it"
    assert (out / "plotly.min.js").stat().st_size > 1_000_000
    assert "open_step" in pages["api/training.html"]
    for name, text in pages.items():
        assert "https://cdn" not in text, name


def test_what_is_broken_is_named(built, tree, tmp_path):
    out, first = built
    text = first.read_text()
    try:
        first.write_text(text + '<a href="docs/nowhere.html">x</a> <a href="docs/app.html#no-such-place">y</a>')
        with pytest.raises(ConfigError, match=r"(?s)nowhere\.html' leads nowhere.*no-such-place' leads nowhere"):
            site.check(out)
    finally:
        first.write_text(text)
    with pytest.raises(TrainingError, match="this cell fails"):
        site.build(tmp_path, {"00_small": {"broken": True}}, tree)


def test_every_notebook_of_the_project_has_its_parameters():
    given = site.parameters("tiny_vfm_vae", "tiny_plain_vae", {"headless": True})
    assert len(given) == len(list((TREE / "notebooks").glob("[0-9]*.ipynb")))
    assert given["05_aligntok_three_stages"]["preset"] == "tiny_aligntok"
    assert given["10_compare_and_report"]["baseline"] == "tiny_plain_vae"
    assert "baseline" not in given["00_start_here"]
    assert list(site.parameters("a", "b", {}, ["02"])) == ["02_train_a_tokenizer"]
