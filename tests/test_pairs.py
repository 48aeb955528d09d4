"""JupyterLab opens the two files of a notebook as a pair: what its server does when it reads and saves one."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
jupyter_server = pytest.importorskip("jupyter_server.config_manager")
web = pytest.importorskip("tornado.web")
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAME = "00_start_here"


@pytest.fixture
def server(tmp_path):
    """The contents manager of JupyterLab's server, on a copy of one pair."""
    for name in (f"{NAME}.py", f"{NAME}.ipynb", "jupytext.toml"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    manager = jupytext.TextFileContentsManager()
    manager.root_dir = str(tmp_path)
    return manager


def text(server, ending) -> str:
    return (Path(server.root_dir) / f"{NAME}{ending}").read_text()


def test_the_server_uses_it_without_being_asked():
    from jupyter_core.paths import jupyter_config_path

    enabled = {}
    for folder in reversed(jupyter_config_path()):
        found = jupyter_server.BaseJSONConfigManager(config_dir=folder, read_directory=True).get("jupyter_server_config")
        enabled |= found.get("ServerApp", {}).get("jpserver_extensions", {})
    assert enabled.get("jupyterlab_jupytext") is True


@pytest.mark.parametrize("saved", [".ipynb", ".py"])
def test_an_edit_of_either_lands_in_both(server, saved):
    model = server.get(f"{NAME}{saved}", type="notebook", content=True)
    model["content"]["cells"][0]["source"] += "\n\nA line of a reader."
    model["content"]["cells"].append({"cell_type": "code", "source": "1 + 1", "metadata": {}, "outputs": [], "execution_count": None})
    server.save(model, f"{NAME}{saved}")
    for ending in (".py", ".ipynb"):
        assert "A line of a reader." in text(server, ending)
        assert "1 + 1" in text(server, ending)


def test_an_edit_in_an_editor_is_there_when_the_notebook_is_opened(server):
    model = server.get(f"{NAME}.ipynb", type="notebook", content=True)
    server.save(model, f"{NAME}.ipynb")
    path = Path(server.root_dir) / f"{NAME}.py"
    path.write_text(path.read_text().replace("# # Start here", "# # Begin here"))
    os.utime(path, (time.time() + 5, time.time() + 5))
    again = server.get(f"{NAME}.ipynb", type="notebook", content=True)
    assert again["content"]["cells"][0]["source"].startswith("# Begin here")


def test_a_conflict_is_an_error_and_loses_nothing(server):
    """Both changed behind the server: it names the two files and changes neither."""
    both = [Path(server.root_dir) / f"{NAME}{ending}" for ending in (".py", ".ipynb")]
    server.get(f"{NAME}.ipynb", type="notebook", content=True)
    both[1].write_text(both[1].read_text().replace("Start here", "Notebook side"))
    both[0].write_text(both[0].read_text().replace("Start here", "Text side"))
    os.utime(both[0], (time.time() - 100, time.time() - 100))
    before = [path.read_text() for path in both]
    with pytest.raises(web.HTTPError, match=rf"{NAME}.ipynb.*more recent|more recent.*{NAME}"):
        server.get(f"{NAME}.ipynb", type="notebook", content=True)
    assert [path.read_text() for path in both] == before
