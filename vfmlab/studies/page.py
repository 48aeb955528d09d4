"""The one writer of pages: one HTML file that needs no network (`page.html.j2`), or Markdown.

A page begins with its question, its verdict and what its words mean. Text is escaped by the template, which
makes links of those in Markdown; the only parts that bring their own HTML are tables and figures.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfmlab import presets, runs
from vfmlab.errors import ConfigError
from vfmlab.evaluation.number import quantities, quantity
from vfmlab.plots import primitives
from vfmlab.plots.primitives import Table
from vfmlab.presets import published

DEFINED = ("rfd", "gfd", "gfd_own")
WORDS = {
    "protocol": "everything a number depends on: images, crop, size, N, seed, weights, feature space, "
                "sampler and guidance; its hash "
    "stands beside the number, and numbers of different hashes never stand in one ranking, table or curve",
    "judge": "the frozen classifier whose features the distances are taken in and whose classes the "
             "accuracies count; it is trained "
    "apart from every tokenizer and vision model here",
}


@dataclass(frozen=True)
class Picture:
    """A PNG (bytes or a file). seen: its path for Markdown. bold: first line of the caption."""

    source: bytes | Path
    caption: str = ""
    seen: str = ""
    bold: str = ""

    @property
    def uri(self) -> str:
        source = self.source
        return primitives.data_uri(source if isinstance(source, bytes) else source.read_bytes())


@dataclass(frozen=True)
class Lines:
    """A list of sentences."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Folded:
    """Text that opens on a click: a config, a protocol. HTML only."""

    summary: str
    text: str


@dataclass(frozen=True)
class Html:
    """A part that is HTML already: an exported notebook, Markdown."""

    body: str


@dataclass(frozen=True)
class Section:
    """blocks: Table, Picture, Lines, Folded, figures, lists of pictures. No heading: goes on."""

    heading: str
    note: str = ""
    blocks: Sequence[Any] = ()


@dataclass
class Page:
    """What a page says. verdict: only with a spread behind it. command: makes it again."""

    title: str
    question: str = ""
    verdict: str = ""
    lead: str = ""
    definitions: Mapping[str, str] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    command: str = ""

    def add(self, heading: str, note: str = "", *blocks: Any) -> None:
        self.sections.append(Section(heading, note, [b for b in blocks if b is not None]))

    def html(self) -> str:
        """One HTML file. Raises ConfigError where jinja2 is not installed."""
        figures = 0

        def fragment(figure: Any) -> Any:
            nonlocal figures
            figures += 1
            return primitives.fragment(figure, first=figures == 1)

        return _template().render(page=self, fragment=fragment,
                                  kind=lambda block: type(block).__name__.lower())

    def markdown(self) -> str:
        """The same without figures; pictures by their path."""
        parts = [f"# {self.title}", ""]
        for name, text in (("Question", self.question), ("Verdict", self.verdict), ("", self.lead)):
            parts += [f"**{name}.** {text}" if name else text, ""] if text else []
        parts += ([*(f"- **{name}**: {text}" for name, text in self.definitions.items()), ""]
                  if self.definitions else [])
        for section in self.sections:
            blocks = [line for block in section.blocks for line in _markdown(block)]
            if blocks or (section.note and not section.blocks):
                parts += [f"## {section.heading}", ""] if section.heading else []
                parts += [section.note, ""] if section.note else []
                parts += blocks
        return "\n".join([*parts, *([f"Made by `{self.command}`."] if self.command else [])]) + "\n"

    def write(self, target: str | Path) -> Path:
        """Write the HTML file and return its path."""
        target = Path(target).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        runs.write_atomic(target, self.html())
        return target

    def publish(self, out: Path, record: Mapping[str, Any]) -> Path:
        """Write `out`.json (title, command and `record`), `out`.html and `out`.md; returns the last."""
        json, html, markdown = (out.with_name(f"{out.name}.{end}") for end in ("json", "html", "md"))
        runs.write_json(json, {"title": self.title, "command": self.command, **record})
        self.write(html)
        runs.write_atomic(markdown, self.markdown())
        return markdown


def definitions(names: Sequence[str] = DEFINED) -> dict[str, str]:
    """What a page's words mean: these numbers, protocol and judge."""
    return {quantity(name).label: quantity(name).definition for name in names} | WORDS


def metrics_table() -> Table:
    """Every registered number: name, good end, meaning. The page `docs/metrics.md`."""
    ends = {"higher": "higher", "lower": "lower", None: ""}
    return Table([{"name": f"`{q.name}`", "called": q.title, "better": ends[q.better],
                   "meaning": q.definition}
                  for q in quantities().values()])


def published_page() -> str:
    """Every `paper` preset beside its paper and its release. The page `docs/paper_presets.md`."""
    text = ["# The paper presets beside their sources", "",
            "What papers and releases say of a field, in this project's units (images, not steps; t = 1 is "
            "noise), and what the preset has. Grades: C, released code or configuration; P, a paper's text; "
            "N, a third party's note or another paper's table. *unknown* is stated in no source that was "
            "read: the value is ours.", ""]
    for name in published.presets():
        about = presets.row(name)
        text += [f"## {name}", "", about.about + (f" Ours: {about.ours}." if about.ours else ""), "",
                 Table(published.rows(name)).markdown(), ""]
    return "\n".join([*text, "Written by `vfmlab presets --published > docs/paper_presets.md`."])


def _markdown(block: Any) -> list[str]:
    if isinstance(block, Table):
        return [block.markdown(), ""]
    if isinstance(block, Lines):
        return [*(f"- {line}" for line in block.lines), ""]
    if isinstance(block, Picture) and block.seen:
        return [f"{block.caption}:\n\n![{block.caption}]({block.seen})\n"]
    return [line for picture in block for line in _markdown(picture)] if isinstance(block, list) else []


@functools.cache
def _template() -> Any:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError:
        raise ConfigError("pages are written with jinja2, which is not installed: pip install "
                          "'vfmlab[studies]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["plain"] = lambda text: Markup(
        primitives.linked(str(text).replace("`", "").replace("**", "")))
    return environment.get_template("page.html.j2")
