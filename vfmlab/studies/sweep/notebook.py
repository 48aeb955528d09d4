"""The notebook of a sweep: its parameters, the digest of its code, whether a point fits, its execution."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from vfmlab import api, config, runs
from vfmlab.errors import ConfigError, Stopped, TrainingError, nearest
from vfmlab.studies import executor
from vfmlab.studies.sweep import outputs
from vfmlab.studies.sweep.folder import Folder
from vfmlab.studies.sweep.grid import Point

TRAINS = "train:"  # a tag such as train:tokenizer on the cell that trains: how far, as `vfmlab train --until`


@dataclass(frozen=True)
class Notebook:
    """A notebook that can be swept.

    text: as .ipynb, without outputs. kernel: its name. code: digest of its code cells. parameters: name ->
    default, None if it is no literal. until: the last phase that it trains ("tokenizer", "diffusion"), None
    where no cell has such a tag.
    """

    path: Path
    text: str
    kernel: str
    code: str
    parameters: dict[str, Any]
    until: str | None = None

    def check(self, point: Point) -> list[config.Phase]:
        """The phases of the run that `point` stands for; none where the notebook has no parameter `preset`.

        Raises:
            ConfigError: an unknown parameter, a config that cannot be, or one value from two sources.
        """
        for name in point.parameters:
            if name not in self.parameters:
                raise ConfigError(f"'{self.path.name}' has no parameter "
                                  f"'{name}'{nearest(name, self.parameters)}")
        if point.set and "overrides" not in self.parameters:
            raise ConfigError(f"'{self.path.name}' has no parameter 'overrides', through which 'set' goes; "
                              "add it, or vary its parameters")
        for name in point.set:
            if name in self.parameters:
                raise ConfigError(f"set.{name}: '{self.path.name}' has a parameter '{name}', which decides; "
                                  "write it under 'parameters'")
        preset = point.parameters.get("preset", self.parameters.get("preset"))
        if not isinstance(preset, str):
            return []
        seed = point.parameters.get("seed", self.parameters.get("seed"))
        return api.resolve(preset, self.overrides(point), seed=seed).phases()

    def trained(self, phases: Sequence[config.Phase]) -> Sequence[config.Phase]:
        """Those of `phases` that the notebook trains, as far as its tag says."""
        ends = [i + 1 for i, phase in enumerate(phases) if self.until in (phase.stage, phase.kind)]
        return phases[: max(ends, default=0)]

    def overrides(self, point: Point) -> dict[str, Any]:
        """The notebook's own overrides with the point's fields on top."""
        own = self.parameters.get("overrides") or "{}"
        try:
            return {**json.loads(own), **point.set}
        except (TypeError, ValueError):
            raise ConfigError(f"'{self.path.name}': its parameter overrides = {own!r} is no JSON object; "
                              "write '{}'") from None

    def values(self, point: Point, root: Path) -> dict[str, Any]:
        """The parameters that papermill sets."""
        own = {"root": str(root), "headless": True}
        own = {name: value for name, value in own.items() if name in self.parameters}
        overrides = {"overrides": json.dumps(self.overrides(point))} if point.set else {}
        return {**point.parameters, **own, **overrides}


def read(path: str | Path) -> Notebook:
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
        raise ConfigError(f"notebook '{path}' cannot be read: {error.strerror}; name an .ipynb or py:percent "
                          "file") from None
    except Exception as error:  # the reader raises whatever it stumbles over
        raise ConfigError(f"'{path}' is no notebook ({type(error).__name__}); name an .ipynb or py:percent "
                          "file") from None
    spec = {"name": "python3", "display_name": "Python 3", "language": "python",
            **notebook.metadata.get("kernelspec", {})}
    notebook.metadata["kernelspec"] = spec
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    if "parameters" not in tags:
        raise ConfigError(f"notebook '{path}' has no cell tagged 'parameters'; tag the one that sets what "
                          "the sweep varies")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    text = nbformat.writes(notebook)
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "notebook.ipynb"  # as it will be executed, whatever format it came in
        clean.write_text(text, encoding="utf-8")
        inspected = papermill.inspect_notebook(clean)
    parameters = dict.fromkeys(inspected)
    for name, facts in inspected.items():
        with contextlib.suppress(ValueError, SyntaxError):
            parameters[name] = ast.literal_eval(facts["default"])
    until = next((tag.removeprefix(TRAINS) for tag in tags if tag.startswith(TRAINS)), None)
    return Notebook(path, text, spec["name"], digest(code), parameters, until)


def digest(cells: Sequence[Any]) -> str:
    """Of the code of a notebook, without what papermill set."""
    return config.digest([cell.source for cell in cells if cell.cell_type == "code"
                          and "injected-parameters" not in cell.metadata.get("tags", [])])


IMPORTS = ("import vfmlab", "from vfmlab import")  # lines of a notebook that uses the library at large
PATIENCE = 600  # seconds that a kernel has to start in: on a busy machine importing takes minutes

# -- on a worker -------------------------------------------------------------------------------------------


def execute_point(folder: str, root: str) -> None:
    """Execute the notebook of a point and write down what comes out, also where it fails; once.

    Raises:
        TrainingError: the notebook fails. Stopped: it was interrupted, which decides nothing about the point.
    """
    point, lock = Folder(Path(folder)), filelock.FileLock(Path(folder) / ".lock")
    while True:
        try:  # another sweep may be at this point, or the process of a killed one still be saving
            held = lock.acquire(timeout=executor.POLL)
            break
        except filelock.Timeout:
            if executor.stopping(folder):
                raise Stopped("stopped on request; started again, it goes on") from None
    with held:
        if (result := point.outcome()) is None:
            began, job = time.monotonic(), point.job()
            try:
                notebook = execute(job["notebook"], point.notebook, job["parameters"], job["kernel"])
                result, picture = outputs.read(notebook)
                reported = [Path(root) / run for run in result["runs"]]
                if name := _ignored(job["point"]["set"], job["phases"], reported):
                    value = json.dumps(job["point"]["set"][name])
                    raise TrainingError(f"the notebook trained with another '{name}' than the {value} of the "
                                        "grid; mend its code")
            except TrainingError as error:
                if executor.stopping(folder):  # a kernel that is interrupted while it starts just dies
                    raise Stopped("stopped on request; started again, it goes on") from None
                point.end("failed", time.monotonic() - began, str(error))
                raise
            if picture is not None:
                runs.write_atomic(point.image, picture)
            point.end("finished", time.monotonic() - began, **result)
        elif result["state"] == "failed":
            raise TrainingError(result["error"])


def execute(source: str | Path, target: str | Path, parameters: Mapping[str, Any],
            kernel: str = "python3") -> Any:
    """The executed notebook, which is written to `target` too.

    Raises:
        TrainingError: a cell, or papermill itself, fails. Stopped: the kernel or its run was stopped.
    """
    import papermill
    from traitlets.config import Config

    from vfmlab.studies.kernels import Kernels
    from vfmlab.studies.sweep.engine import NAME

    try:
        text = Path(source).read_text(encoding="utf-8")
        settings = {"Kernels": {"forks": any(f'"{line}' in text for line in IMPORTS)}}
        with tempfile.TemporaryDirectory(prefix="vfmlab-") as folder:
            if os.name != "nt":  # sockets that only this user opens, in a folder of this kernel alone
                settings["KernelManager"] = {"transport": "ipc", "ip": f"{folder}/kernel"}
            return papermill.execute_notebook(
                source, target, dict(parameters), NAME, progress_bar=False, kernel_name=kernel,
                start_timeout=PATIENCE, kernel_manager_class=Kernels, config=Config(settings)
            )
    except papermill.PapermillExecutionError as error:
        if error.ename in ("KeyboardInterrupt", "Interrupted", "Stopped"):
            raise Stopped("stopped on request; started again, it goes on") from None
        message = " ".join(f"{error.ename}: {error.evalue}".split())[:1000]
        raise TrainingError(f"{message} (cell {error.exec_count})") from None
    except Exception as error:  # a kernel that died, a notebook that cannot be written
        raise TrainingError(" ".join(f"{type(error).__name__}: {error}".split())[:1000]) from None


def executed(source: str | Path, target: str | Path, parameters: Mapping[str, Any]) -> Any:
    """The notebook at `target` where it was executed with these parameters (:func:`ended`), else
    :func:`execute`."""
    book = ended(source, target)
    if book is not None and book.metadata.papermill.parameters == dict(parameters):
        return book
    return execute(source, target, parameters)


def ended(source: str | Path, target: str | Path) -> Any:
    """The notebook at `target` where the code of `source` was executed to its end, with the text that
    `source` has now; else None."""
    import nbformat

    with contextlib.suppress(OSError, ValueError):  # not there, or cut short
        book = nbformat.read(target, as_version=4)
        facts = book.metadata.get("papermill", {})
        cells = [cell for cell in book.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        own = nbformat.read(source, as_version=4).cells
        whole = facts.get("duration") and facts.get("exception") is None and all(
            cell.execution_count for cell in cells if cell.cell_type == "code" and cell.source.strip())
        if whole and _code(cells) == _code(own):
            for cell, now in zip(cells, own, strict=True):
                cell.source = now.source
            nbformat.write(book, target)
            return book
    return None


def _code(cells: Sequence[Any]) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source if cell.cell_type == "code" else "") for cell in cells]


def _ignored(fields: Mapping[str, Any], expected: Sequence[dict[str, Any]],
             reported: Sequence[Path]) -> str | None:
    """The first field of `set` in which no reported run is as expected; numbers carry their protocols."""
    trained = [runs.RunDir(path).raw_config for path in reported if (path / "config.json").exists()]

    def at(tree: Any, dotted: str) -> Any:
        for key in dotted.split("."):
            tree = tree.get(key) if isinstance(tree, dict) else None
        return tree

    for name in fields if trained and expected else ():
        values = [at(phase, name) for phase in expected]
        if not name.startswith("protocol.") and not any(at(phase, name) in values for phase in trained):
            return name
    return None
