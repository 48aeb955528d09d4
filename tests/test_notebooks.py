"""Every notebook runs top to bottom at the `tiny` tier under papermill, and without widgets says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

papermill = pytest.importorskip("papermill")
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook_runs")


@pytest.mark.xdist_group("notebooks")  # one process: they share the runs that the first ones train
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_runs_headless(name, root):
    parameters = {"preset": "tiny_vfm_vae", "root": str(root), "headless": True}
    if name.startswith(("03", "10")):
        parameters["baseline"] = "tiny_plain_vae"
    if name.startswith("01"):
        parameters["n"] = 32
    target = root / f"{name}.ipynb"
    book = papermill.execute_notebook(FOLDER / f"{name}.ipynb", target, parameters, progress_bar=False, kernel_name="python3")
    code = [cell for cell in book.cells if cell.cell_type == "code" and cell.source.strip()]
    figures = [o for cell in code for o in cell.outputs if "application/vnd.plotly.v1+json" in o.get("data", {})]
    assert len(figures) >= 3
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    if name.startswith("10"):
        page = (root / "report.html").read_text()
        assert "protocol" in page
        assert "plotly" in page


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_told_as_a_story(name):
    text = (FOLDER / f"{name}.py").read_text()
    for part in ("**Question.**", 'tags=["parameters"]', "Prediction", "## Finding", "## What next"):
        assert part in text
    for cell in text.split("# %%")[1:]:
        if not cell.startswith(" [markdown]"):
            lines = [line for line in cell.splitlines()[1:] if line.strip()]
            assert len(lines) <= 16
            assert not any(line.startswith(("class ", "def ")) for line in lines)
