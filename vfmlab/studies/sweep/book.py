"""The notebook of a sweep: its parameters, the digest of its code, and whether a point fits it."""

from __future__ import annotations

import ast
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfmlab import config
from vfmlab.errors import ConfigError, nearest
from vfmlab.studies.sweep.grid import Point


@dataclass(frozen=True)
class Book:
    """A notebook that can be swept.

    text: as .ipynb, without outputs. kernel: its name. code: digest of its code cells. parameters: name -> default, None if
    it is no literal.
    """

    path: Path
    text: str
    kernel: str
    code: str
    parameters: dict[str, Any]

    def check(self, point: Point) -> list[config.Phase]:
        """The phases of the run that `point` asks for; none where the notebook has no parameter `preset`.

        Raises:
            ConfigError: an unknown parameter, or a config that cannot be.
        """
        for name in point.parameters:
            if name not in self.parameters:
                raise ConfigError(f"'{self.path.name}' has no parameter '{name}'{nearest(name, self.parameters)}")
        if point.set and "overrides" not in self.parameters:
            raise ConfigError(f"'{self.path.name}' has no parameter 'overrides', which 'set' is handed over by; add it, or vary its parameters")
        preset = point.parameters.get("preset", self.parameters.get("preset"))
        if not isinstance(preset, str):
            return []
        from vfmlab import api

        run = api.resolve(preset, self.overrides(point), seed=point.parameters.get("seed", self.parameters.get("seed")))
        return run.phases()

    def overrides(self, point: Point) -> dict[str, Any]:
        """The notebook's own overrides with the point's fields on top."""
        own = self.parameters.get("overrides") or "{}"
        try:
            return {**json.loads(own), **point.set}
        except (TypeError, ValueError):
            raise ConfigError(f"'{self.path.name}': its parameter overrides = {own!r} is no JSON object; write '{{}}'") from None

    def given(self, point: Point, root: Path) -> dict[str, Any]:
        """What papermill hands to the notebook."""
        own = {"root": str(root), "headless": True}
        handed = {name: value for name, value in own.items() if name in self.parameters}
        if point.set:
            handed["overrides"] = json.dumps(self.overrides(point))
        return {**point.parameters, **handed}


def read(path: str | Path) -> Book:
    """The notebook at `path`: .ipynb, or .py in the percent format.

    Raises:
        ConfigError: it is not there, is no notebook, or has no cell tagged 'parameters'.
    """
    import jupytext
    import nbformat
    import papermill

    path = Path(path)
    try:
        notebook = jupytext.read(path, fmt="py:percent" if path.suffix == ".py" else None)
    except OSError as error:
        raise ConfigError(f"notebook '{path}' cannot be read: {error.strerror}; name an .ipynb or py:percent file") from None
    except Exception as error:  # the reader raises whatever it stumbles over
        raise ConfigError(f"'{path}' is no notebook ({type(error).__name__}); name an .ipynb or py:percent file") from None
    spec = {"name": "python3", "display_name": "Python 3", "language": "python", **notebook.metadata.get("kernelspec", {})}
    notebook.metadata["kernelspec"] = spec
    if not any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        raise ConfigError(f"notebook '{path}' has no cell tagged 'parameters'; tag the one that sets what the sweep varies")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    text = nbformat.writes(notebook)
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "notebook.ipynb"  # as it will be executed, whatever format it came in
        clean.write_text(text, encoding="utf-8")
        found = papermill.inspect_notebook(clean)
    return Book(path, text, spec["name"], config.digest(code), {name: _literal(facts["default"]) for name, facts in found.items()})


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
