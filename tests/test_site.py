"""The site of a small checkout: its pages lead to each other, and what is broken ends the build."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from vfmlab.errors import ConfigError, TrainingError
from vfmlab.studies import site

jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("papermill")
TREE = Path(__file__).resolve().parents[1]
CELLS = """# %% [markdown]
# # A reader's small notebook & more
# **Question.** Is it [in the manual](../docs/app.md)?

# %% [markdown]
# ## A section

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
    return out, site.build(out, site.executed({"00_small": {"broken": False}}, out / ".executed", tree), tree)


def test_pages_are_whole_and_need_no_network(built):
    out, first = built
    assert first == out / "index.html"
    pages = {path.relative_to(out).as_posix(): path.read_text() for path in out.glob("**/*.html")}
    assert {"docs/app.html", "docs/results/findings.html", "notebooks/00_small.html", "api/training.html"} <= set(pages)
    notebook = pages["notebooks/00_small.html"]
    assert 'href="../docs/app.html"' in notebook
    assert 'id="figure-1"' in notebook
    assert re.search(r'Plotly.newPlot\(\s*"figure-1"', notebook)
    again = [site._notebook(out / ".executed" / "00_small.ipynb", tree) for _ in range(2)]
    assert again[0] == again[1], "the same notebook is the same page"
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
        site.executed({"00_small": {"broken": True}}, tmp_path, tree)


def test_a_notebook_is_executed_once_for_its_cells_and_parameters(built, tree, monkeypatch):
    (book,) = site.executed({"00_small": {"broken": False}}, built[0] / ".executed", tree)
    asked, whole = [], book.read_text()
    monkeypatch.setattr(site.notebook, "execute", lambda *given: asked.append(given))
    site.executed({"00_small": {"broken": False}}, book.parent, tree)
    assert not asked
    source = tree / "notebooks" / "00_small.ipynb"
    text = source.read_text()
    source.write_text(text.replace("# A reader's small notebook & more", "# A reader's small notebook & more with a finding"))
    site.executed({"00_small": {"broken": False}}, book.parent, tree)
    assert not asked
    assert "with a finding" in book.read_text(), "text is that of the source"
    source.write_text(text)
    for changed in (whole[: len(whole) // 2], whole.replace("y=[1, 2]", "y=[1, 3]"), whole.replace('"execution_count": 3', '"execution_count": null')):
        book.write_text(changed)
        site.executed({"00_small": {"broken": False}}, book.parent, tree)
    book.write_text(whole)
    site.executed({"00_small": {"broken": True}}, book.parent, tree)
    assert len(asked) == 4


def test_notebooks_of_another_call_stay_while_their_code_does(built, tree, tmp_path):
    shutil.copytree(tree / "notebooks", tmp_path / "notebooks")
    source, folder = tmp_path / "notebooks" / "01_other.ipynb", tmp_path / ".executed"
    shutil.copyfile(tree / "notebooks" / "00_small.ipynb", source)
    folder.mkdir()
    for name in ("00_small", "01_other"):
        shutil.copyfile(built[0] / ".executed" / "00_small.ipynb", folder / f"{name}.ipynb")
    assert [book.stem for book in site.executed({}, folder, tmp_path)] == ["00_small", "01_other"]
    source.write_text(source.read_text().replace("y=[1, 2]", "y=[1, 3]"))
    assert [book.stem for book in site.executed({}, folder, tmp_path)] == ["00_small"]


def test_pages_stay_without_the_executed_notebooks(built, tree, tmp_path):
    out, folder = tmp_path / "site", tmp_path / "tree"
    shutil.copytree(built[0], out, ignore=shutil.ignore_patterns(".executed"))
    shutil.copytree(tree, folder)
    page = out / "notebooks" / "00_small.html"
    before = page.read_text()
    assert site.missing(out, folder) == []
    (folder / "docs" / "new.md").write_text("# A new page")
    site.build(out, [], folder)
    assert 'href="../docs/new.html"' in page.read_text()
    assert page.read_text().replace(' · <a href="../docs/new.html">new</a>', "") == before
    assert "<title>A reader&#39;s small notebook &amp; more</title>" in before
    assert "Is it" in (out / "notebooks" / "index.html").read_text()
    source = folder / "notebooks" / "00_small.ipynb"
    source.write_text(source.read_text().replace("A section", "A section, *corrected*"))
    site.build(out, [], folder)
    assert "A section, <em>corrected</em>" in page.read_text(), "text is written after the execution"
    assert page.read_text().count("small notebook &amp; more</h1>") == 1
    assert site.CHANGED not in page.read_text()
    before = page.read_text()
    source.write_text(source.read_text().replace("y=[1, 2]", "y=[1, 3]"))
    assert site.missing(out, folder) == ["00"]
    for _ in range(2):
        site.build(out, [], folder)
        assert page.read_text().count(site.CHANGED) == 1, "an older page stays, and says so once"
        assert site.CHANGED in (out / "notebooks" / "index.html").read_text()
        assert page.read_text()[page.read_text().index("<article") :] == before[before.index("<article") :]
    assert site.missing(out, folder) == ["00"]


def test_a_page_says_when_and_with_what_it_was_executed(built):
    out, _ = built
    for name in ("00_small", "index"):
        text = (out / "notebooks" / f"{name}.html").read_text()
        assert "broken = False" in text
        assert "Is it" in text
        assert re.search(r"executed on \d{4}-\d\d-\d\d", text)
    assert str(out) not in text
    assert str(TREE) not in "".join(path.read_text() for path in (out / "api").glob("*.html"))


@pytest.mark.parametrize(("preset", "short"), [("tiny_rae", True), ("pocket_rae", False)])
def test_a_page_of_the_tiny_tier_says_that_its_figures_are_noise(built, tmp_path, preset, short):
    book = nbformat.read(built[0] / ".executed" / "00_small.ipynb", as_version=4)
    book.metadata.papermill.parameters["preset"] = preset
    nbformat.write(book, tmp_path / "00_small.ipynb")
    assert (site.SHORT in site._notebook(tmp_path / "00_small.ipynb", TREE)) == short


def test_the_log_of_a_training_is_one_block():
    new = nbformat.v4.new_output
    cell = [new("stream", name="stdout", text="a\n"), new("stream", name="stdout", text="b\n"), new("display_data", {"text/plain": "figure"}),
            new("stream", name="stdout", text="c\n"), new("stream", name="stderr", text="d\n")]
    assert [o.get("text") for o in site._joined(cell)] == ["a\nb\n", None, "c\n", "d\n"]


def test_signatures_are_the_same_at_every_build(built):
    assert not [path.name for path in (built[0] / "api").glob("*.html") if " at 0x" in path.read_text()]


def test_long_cells_of_tables_break_into_lines():
    row = f"<tr><td>short</td><td>{'word ' * 20}</td><td style='x'>1</td></tr>"
    assert re.findall('<td class="long">(.{4})', site._linked(row)) == ["word"]


def test_the_readme_is_the_first_page():
    assert site._linked('<a href="../README.md#tiers">') == '<a href="../index.html#tiers">'


def test_anchors_are_those_of_github():
    assert 'id="guidance-with-muon-and-more"' in site._linked('<h2 id="Guidance,-with-Muon-(and-more)">')


def test_readme_says_at_which_tier_each_page_was_executed():
    said = {n: tier for tier, numbers in re.findall(r"at `(\w+)`: ([\d ]+)", (TREE / "README.md").read_text()) for n in numbers.split()}
    pages = {path.stem[:2]: path.read_text() for path in (TREE / "docs" / "site" / "notebooks").glob("[0-9]*.html")}
    assert said == {n: re.search(r'class="note">executed on .*?preset = (\w+?)_', text)[1] for n, text in pages.items()}


def test_every_notebook_of_the_project_has_its_parameters():
    given = site.parameters("tiny_vfm_vae", "tiny_plain_vae", {"headless": True}, own={"04": {"seeds": 1}})
    assert len(given) == len(list((TREE / "notebooks").glob("[0-9]*.ipynb")))
    assert given["05_aligntok_three_stages"]["preset"] == "tiny_aligntok"
    assert given["12_tokens_in_order"]["preset"] == "tiny_vqgan"
    assert [name for name, values in given.items() if "seeds" in values] == ["04_decoder_ablations"]
    with pytest.raises(ConfigError, match="there is no notebook '99'; their numbers are 00, 01"):
        site.parameters("a", "b", {}, ["99"])
    assert given["10_compare_and_report"]["baseline"] == "tiny_plain_vae"
    assert "baseline" not in given["00_start_here"]
    assert list(site.parameters("a", "b", {}, ["02"])) == ["02_train_a_tokenizer"]
