"""Notebook pairs: `notebooks/NN_name.py` (py:percent) is the source, the `.ipynb` beside it is generated from it.

`python -m vfmlab.pairs write` generates, `python -m vfmlab.pairs check` regenerates in memory and compares. The
generated file is a pure function of the source: numbered cell ids, no outputs, no execution counts, one fixed kernel.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vfmlab.errors import DataError, VfmlabError

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
    "jupytext": {"formats": "ipynb,py:percent", "main_language": "python"},
}


def generate(source: Path) -> str:
    """The text of the `.ipynb` that belongs to the py:percent file `source`."""
    import jupytext
    import nbformat

    notebook = jupytext.read(source, fmt="py:percent")
    if not any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells):
        raise DataError(f"{source.name}: no cell is tagged 'parameters'; begin one with: # %% tags=[\"parameters\"]")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        if cell.cell_type == "code":
            cell["outputs"], cell["execution_count"] = [], None
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def sources(folder: Path) -> list[Path]:
    """The py:percent notebooks `NN_name.py` of `folder`, in order."""
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def stale(folder: Path) -> list[str]:
    """One line for each pair that is not in sync; empty when all are."""
    found, wanted = [], {source.with_suffix(".ipynb") for source in sources(folder)}
    for source in sources(folder):
        pair = source.with_suffix(".ipynb")
        if not pair.is_file():
            found.append(f"{pair.name} is missing")
        elif pair.read_text(encoding="utf-8") != generate(source):
            found.append(f"{pair.name} differs from {source.name}")
    lone = [pair for pair in sorted(folder.glob("[0-9][0-9]_*.ipynb")) if pair not in wanted]
    return found + [f"{pair.name} has no {pair.stem}.py" for pair in lone]


def write(folder: Path) -> list[Path]:
    """Generate every pair of `folder`; the files that changed."""
    changed = []
    for source in sources(folder):
        pair, text = source.with_suffix(".ipynb"), generate(source)
        if not pair.is_file() or pair.read_text(encoding="utf-8") != text:
            pair.write_text(text, encoding="utf-8")
            changed.append(pair)
    return changed


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv not in (["write"], ["check"]):
        sys.stderr.write("usage: python -m vfmlab.pairs write|check\n")
        return 2
    try:
        if argv == ["write"]:
            changed = write(FOLDER)
            sys.stdout.write("".join(f"wrote {path.name}\n" for path in changed) or "notebook pairs are in sync\n")
            return 0
        problems = stale(FOLDER)
    except VfmlabError as error:
        sys.stderr.write(f"vfmlab: error: {error}\n")
        return 2
    for problem in problems:
        sys.stderr.write(f"notebooks: {problem}; run make notebooks\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
