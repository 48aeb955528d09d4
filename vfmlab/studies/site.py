"""The site: README, manual, results, executed notebooks and API, as pages that are read without a network.

    make site        or        vfmlab site --out docs/site --preset pocket_vfm_vae

Pages lie as their sources do (docs/app.md is docs/app.html), so that links stay what they are; plotly.js is
one file beside them. A cell that fails, a link that leads nowhere and a page that is too large end the build.
"""

from __future__ import annotations

import html
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import vfmlab
from vfmlab import runs
from vfmlab.errors import ConfigError
from vfmlab.plots import primitives
from vfmlab.studies.page import Html, Page
from vfmlab.studies.sweep import notebook
from vfmlab.training.progress import clock

TREE = Path(__file__).resolve().parents[2]
LARGEST = 3_000_000  # bytes of a page
LONG = 70  # characters of a cell that breaks into lines
SCRIPT = "plotly.min.js"
DRAWN_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
PLOTLY = "application/vnd.plotly.v1+json"
# what stands between a text cell's frame, as nbconvert writes it
TEXT = (r'(?<=<div class="text_cell_render border-box-sizing rendered_html">\n)'
        r"(.*?)(?=\n</div>\n</div>\n</div>)")
CHANGED = "The notebook's code has changed since this was executed."
SHORT = ("Executed at the tiny tier, which shows that every cell runs: its networks have seen a few images, "
         "so figures of what was trained here are noise and verdicts on it say nothing. At pocket they do.")


def executed(parameters: Mapping[str, Mapping[str, Any]], folder: Path, tree: Path = TREE) -> list[Path]:
    """Execute notebooks of a checkout into `folder`, where they are not there with these parameters.

    parameters: name of a notebook (without ending) -> what papermill sets in it.

    Returns the executed notebooks of `folder`: these, and others whose code is still that of the checkout.

    Raises:
        TrainingError: a cell fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in parameters.items():
        notebook.executed(tree / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb", values)
    sources = sorted((tree / "notebooks").glob("[0-9]*.ipynb"))
    return [book for source in sources if notebook.ended(source, book := folder / source.name)]


def build(out: str | Path, books: Sequence[Path], tree: Path = TREE) -> Path:
    """Write the site and return its first page.

    Args:
        out: folder, made anew page by page. books: executed notebooks; a page that is there of another one
            stays as it was executed, and says so where the notebook's code has changed. tree: a checkout.

    Raises:
        ConfigError: a link that leads nowhere, a page of more than `LARGEST` bytes, a package that is
        missing.
    """
    out = Path(out).expanduser().resolve()
    front = _markdown((tree / "README.md").read_text(encoding="utf-8"))
    bodies = {Path("index.html"): front.replace('href="docs/site/', 'href="')}  # which leads into this site
    for source in _manual(tree, out, ".md"):
        page = source.relative_to(tree).with_suffix(".html")
        bodies[page] = _markdown(source.read_text(encoding="utf-8"))
    own = {Path("notebooks", f"{book.stem}.html"): _notebook(book, tree) for book in books}
    own = dict(sorted((_earlier(out, tree) | own).items()))
    if own:
        bodies[Path("notebooks", "index.html")] = _list(own)
    bodies |= own
    for room, body in _api():
        bodies[Path("api", f"{room}.html")] = body
    _copy(tree, out)
    for path, body in bodies.items():
        page = Page(_title(body) or path.stem, sections=[])
        rest = re.sub(r"<h1\b.*?</h1>", "", body, count=1, flags=re.S)  # the page has a title of its own
        page.add("", "", Html(_menu(path, bodies)), Html(rest))
        page.write(out / path)
    check(out)
    return out / "index.html"


def parameters(preset: str, baseline: str, given: Mapping[str, Any], only: Sequence[str] = (),
               own: Mapping[str, Mapping[str, Any]] | None = None,
               tree: Path = TREE) -> dict[str, dict[str, Any]]:
    """What each notebook is executed with: `given`, and preset and baseline where it has such parameters.

    A notebook on another method than VFM-VAE takes its own preset, of the tier of `preset`.

    only: numbers of notebooks, such as "02"; none: all. own: number -> what is set in that notebook alone.

    Raises:
        ConfigError: a number that no notebook has.
    """
    paths = {path.name[:2]: path for path in sorted((tree / "notebooks").glob("[0-9]*.ipynb"))}
    for number in (*only, *(own or ())):
        if number not in paths:
            raise ConfigError(f"there is no notebook '{number}'; their numbers are {', '.join(paths)}")
    tier, values = preset.partition("_")[0], {}
    for number in only or paths:
        defaults = notebook.read(paths[number]).parameters
        names = {"preset": preset, "baseline": baseline}
        if (method := str(defaults.get("preset")).partition("_")[2]) != "vfm_vae":
            names["preset"] = f"{tier}_{method}"
        mine = {k: v for k, v in names.items() if k in defaults}
        values[paths[number].stem] = {**given, **mine, **(own or {}).get(number, {})}
    return values


def missing(out: Path, tree: Path = TREE) -> list[str]:
    """Numbers of notebooks of which there is no page with today's code."""
    there = _earlier(out, tree)
    names = sorted(path.stem for path in (tree / "notebooks").glob("[0-9]*.ipynb"))
    return [name[:2] for name in names if CHANGED in there.get(Path("notebooks", f"{name}.html"), CHANGED)]


def check(out: Path) -> None:
    """Every link and source of every page leads to a file, or a place, of the site; no page is too large.

    Raises:
        ConfigError: with all that is wrong, one line each.
    """
    pages = {path: _Links(path.read_text(encoding="utf-8")) for path in sorted(out.glob("**/*.html"))}
    wrong = [f"{path.relative_to(out)}: {size:,} bytes, more than {LARGEST:,}" for path in pages
             if (size := path.stat().st_size) > LARGEST]
    for path, links in pages.items():
        for link in links.links:
            name, _, place = unquote(link).partition("#")
            target = Path(os.path.normpath(path.parent / name)) if name else path
            places = pages[target].places if target in pages else {place.lower()}
            if not target.exists() or (place and place.lower() not in places):
                wrong.append(f"{path.relative_to(out)}: '{link}' leads nowhere")
    if wrong:
        raise ConfigError("the site is not whole:\n" + "\n".join(wrong))


class _Links(HTMLParser):
    """links: of a page, to files of the site. places: its ids."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.places.add(value.lower())
            if name in ("href", "src") and value and not re.match(r"[a-z]+:|//", value):
                self.links.append(value)


# -- bodies -------------------------------------------------------------------------------------------------


def _filters() -> Any:
    try:
        from nbconvert import filters
    except ImportError:
        raise ConfigError("the site is made with nbconvert, which is not installed: pip install "
                          "'vfmlab[notebooks]'") from None
    return filters


def _markdown(text: str) -> str:
    return _linked(_filters().markdown2html(text))


def _linked(body: str) -> str:
    """Links to sources become links to their pages; anchors are written as GitHub writes them; long cells of
    tables are marked, because only they break into lines."""
    body = re.sub(rf"<td(?=[^>]*>(?:(?!</td>).){{{LONG}}})", '<td class="long"', body, flags=re.S)
    body = re.sub(r'<a class="anchor-link".*?</a>', "", body)
    body = re.sub(r'(href="(?![a-z]+:)[^"#]*)\.(?:md|ipynb)\b', r"\1.html", body)
    body = re.sub(r'(href="(?:\.\./)*)README\.html', r"\1index.html", body)
    return re.sub(r'(?<=<h\d id=")[^"]*', lambda m: re.sub(r"[^\w-]", "", m[0].lower()), body)


def _notebook(path: Path, tree: Path) -> str:
    """An executed notebook; its figures draw with the site's copy of plotly.js, and its paths begin at its
    root or at the checkout."""
    import nbformat
    import plotly.io
    from nbconvert import HTMLExporter

    _filters()
    text, facts = path.read_text(encoding="utf-8"), _facts(path)
    root = facts.get("root", "")
    for folder, shown in ((str(root), Path(root).name), (f"{tree}{os.sep}", "")):
        text = text.replace(folder, shown) if os.path.isabs(folder) else text
    book = nbformat.reads(text, as_version=4)
    for cell in book.cells:
        shown = [o for o in cell.get("outputs", []) if PLOTLY in o.get("data", {})
                 or "plotly.js v" not in str(o.get("data", {}).get("text/html", ""))]
        for output in shown:
            if PLOTLY in output.get("data", {}):
                text = plotly.io.json.to_json_plotly(output.data[PLOTLY])
                figure = plotly.io.from_json(text, skip_invalid=True)
                output.data = nbformat.NotebookNode({"text/html": primitives.fragment(figure)})
        if "outputs" in cell:
            cell.outputs = _joined(shown)
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(book)
    numbers: dict[str, str] = {}  # of figures, whose ids are drawn at random: the same page is the same file
    body = re.sub(DRAWN_ID, lambda m: numbers.setdefault(m[0], f"figure-{len(numbers) + 1}"), body)
    when, code = _escape(" · ".join(_when(book, facts))), notebook.digest(book.cells)
    short = f"<p><em>{SHORT}</em></p>" if str(facts.get("preset")).startswith("tiny_") else ""
    return f'<article data-code="{code}"><p class="note">{when}</p>{short}{_linked(body)}</article>'


def _earlier(out: Path, tree: Path) -> dict[Path, str]:
    """Pages of executed notebooks that are in `out`, with the text that their notebooks have today; one whose
    notebook has other code says so, and keeps its text."""
    import nbformat

    pages = {}
    for source in sorted((tree / "notebooks").glob("[0-9]*.ipynb")):
        path = Path("notebooks", f"{source.stem}.html")
        page = (out / path).read_text(encoding="utf-8") if (out / path).exists() else ""
        cells = nbformat.read(source, as_version=4).cells
        code = notebook.digest(cells)
        if body := re.search('<article data-code="(.*?)">.*</article>', page, re.S):
            article = _with_text(body[0], cells) if body[1] == code else f"<p><em>{CHANGED}</em></p>{body[0]}"
            pages[path] = f"<h1>{_escape(_title(page))}</h1>{article}"
    return pages


def _with_text(article: str, cells: Sequence[Any]) -> str:
    """An executed page whose text cells are those of `cells`: a finding is written after the execution."""
    texts = [cell.source for cell in cells if cell.cell_type == "markdown"]
    parts = re.split(TEXT, article, flags=re.S)
    if len(parts) != 2 * len(texts) + 1:  # text was added or taken away
        return article
    for i, text in enumerate(texts):
        now = _markdown(text).strip("\n")
        now = now if i else re.sub(r"<h1\b.*?</h1>", "", now, flags=re.S)  # the page has a title of its own
        if _words(now) != _words(parts[2 * i + 1]):  # not where other versions wrote the same
            parts[2 * i + 1] = now
    return "".join(parts)


def _words(body: str) -> list[str]:
    return html.unescape(re.sub(r"<[^>]+>", " ", body)).split()


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """Outputs of a cell with lines of one stream in one output: the log of a training is one block."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and output.name == last.get("name"):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def _facts(path: Path) -> dict[str, Any]:
    """The values of an executed notebook's parameters: those of its tagged cell, and what papermill set."""
    import nbformat

    given = nbformat.read(path, as_version=4).metadata.papermill.parameters
    return notebook.read(path).parameters | dict(given)


def _when(book: Any, facts: Mapping[str, Any]) -> list[str]:
    """Of an executed notebook: the day, how long it took, and its parameters."""
    took, hidden = book.metadata.papermill, ("root", "headless", "report", "jobs")
    given = ", ".join(f"{k} = {v}" for k, v in facts.items() if k not in hidden and v not in ("", "{}"))
    return [f"executed on {took.start_time[:10]}", f"in {clock(took.duration)}", given]


def _list(pages: Mapping[Path, str]) -> str:
    """The executed notebooks: title, question, day, and what was set."""
    rows = []
    for path, body in pages.items():
        link = f'<a href="{path.name}">{_escape(_title(body))}</a>'
        link += f"<br><em>{CHANGED}</em>" if CHANGED in body else ""
        question = re.search(r"<strong>Question\.</strong>(.*?)</p>", body, re.S)
        when = re.search(r'<p class="note">(.*?)</p>', body, re.S)
        rows.append([link, question[1] if question else "", *(when[1].split(" · ") if when else ())])
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return ("<h1>Executed notebooks</h1><p>A run that was there already is not trained again, so that a time "
            f"may be without the trainings.</p><table class='text'>{body}</table>")


def _api() -> Iterator[tuple[str, str]]:
    """Room -> its public classes and functions: signature and docstring, from the modules themselves."""
    rooms = sorted(m.name for m in pkgutil.iter_modules(vfmlab.__path__) if not m.name.startswith("_"))
    links = "".join(f'<li><a href="{room}.html">vfmlab.{room}</a></li>' for room in rooms)
    yield "index", f"<h1>API</h1><ul>{links}</ul>"
    for room in rooms:
        package = importlib.import_module(f"vfmlab.{room}")
        inside = [m.name for m in pkgutil.walk_packages(getattr(package, "__path__", []), f"vfmlab.{room}.")]
        parts = [f"<h1>vfmlab.{room}</h1>"]
        for name in (package.__name__, *inside):
            module = importlib.import_module(name)
            parts.append(f'<h2 id="{name}">{name}</h2><pre>{_escape(inspect.getdoc(module) or "")}</pre>')
            own = [thing for thing in vars(module).values() if getattr(thing, "__module__", "") == name
                   and (inspect.isclass(thing) or inspect.isfunction(thing))]
            parts += [_described(thing) for thing in own
                      if not thing.__name__.startswith("_") and inspect.getdoc(thing)]
        yield room, "\n".join(parts)


def _described(thing: Any) -> str:
    try:
        signature = str(inspect.signature(thing))
    except (TypeError, ValueError):
        signature = ""
    for place in (str(TREE), sys.prefix, str(Path.home())):  # defaults that are folders of this machine
        signature = signature.replace(place, "...")
    signature = re.sub(r"( object)? at 0x[0-9a-f]+", "", signature)  # another one at every build
    text = _escape(inspect.getdoc(thing) or "")
    head = f"<code>{thing.__name__}{_escape(signature)}</code>"
    return f"<details open><summary>{head}</summary><pre>{text}</pre></details>"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


# -- around them --------------------------------------------------------------------------------------------


def _title(body: str) -> str:
    """The first heading as text."""
    heading = re.search(r"<h1\b[^>]*>(.*?)</h1>", body, re.S)
    return html.unescape(re.sub(r"<[^>]+>", "", heading[1])).strip() if heading else ""


def _menu(here: Path, pages: Sequence[Path] | Mapping[Path, str]) -> str:
    """Links to the other pages, by folder, and the script that figures need."""
    up = "../" * (len(here.parts) - 1)
    groups: dict[str, list[str]] = {}
    for path in pages:
        name = f"<b>{path.stem}</b>" if path == here else f'<a href="{up}{path.as_posix()}">{path.stem}</a>'
        groups.setdefault(str(path.parent).replace(".", "home"), []).append(name)
    lines = "".join(f"<p class='note'>{group}: {' · '.join(names)}</p>" for group, names in groups.items())
    return f'<nav>{lines}</nav><script src="{up}{SCRIPT}"></script>'


def _manual(tree: Path, out: Path, *endings: str) -> list[Path]:
    """Files of docs/, those of a site in it left out."""
    return sorted(path for path in (tree / "docs").glob("**/*")
                  if path.suffix in endings and not {tree / "docs" / "site", out} & set(path.parents))


def _copy(tree: Path, out: Path) -> None:
    """What pages link to besides pages: pictures and data of the manual, and plotly.js."""
    from plotly.offline import get_plotlyjs

    for source in _manual(tree, out, ".png", ".svg", ".json"):
        target = out / source.relative_to(tree)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    runs.write_atomic(out / SCRIPT, get_plotlyjs())
