"""The page of a comparison: verdict, tables by protocol, stages, curves over training, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from vfmlab.evaluation import course
from vfmlab.evaluation.number import TABLE, groups, quantities
from vfmlab.plots import primitives
from vfmlab.studies.page import Lines, Page, Picture, definitions
from vfmlab.studies.results import (
    Result,
    courses,
    curve_names,
    curve_records,
    records,
    stage_records,
    verdict,
)

QUESTION = (
    "The same budget, images and protocol for every row: which setting is better, and "
    "by more than its seeds differ?"
)
UNTIL = "Last column: images until the level that all runs reach (EP@k in images), at the earliest the first."
# of the first, second ... row of one colour
DASHES, SYMBOLS = ("solid", "dash", "dot", "dashdot"), ("circle", "diamond", "square", "x")


def build(results: Sequence[Result], command: str, title: str,
          pictures: Mapping[str, Path] | None = None) -> Page:
    """pictures: label -> file in the folder `images` beside the page; "" is the overview."""
    parts = groups(results)
    page = Page(title, QUESTION, verdict(results), definitions=definitions(), command=command)
    for part in parts:
        heading = f"Protocol {longest(part).hash}" if len(parts) > 1 else ""
        page.add(heading, note(part), primitives.table(records(part, "**{}**")))
        if stages := stage_records(part):
            text = "Each stage of a recipe is a run of its own, measured in the same way."
            page.add("Stage by stage", text, primitives.table(stages))
        for name in curve_names(part):
            curves, left_out = curve_records(part, name), course.left_out(c for _, c in courses(part, name))
            if curves or left_out:
                label = quantities()[name].label
                said = [f"{label} over training (images seen by the diffusion model).", left_out,
                        UNTIL if any(len(row) > 2 for row in curves) else ""]
                text = " ".join(filter(None, said))
                page.add("", text, *([primitives.table(curves)] if curves else []))
        page.add("", "", *over_training(part))
    add_failed(page, results)
    order = sorted((pictures or {}).items(), key=lambda item: item[0] != "")
    blocks = [Picture(path, label or "All rows", f"images/{path.name}") for label, path in order]
    if blocks:
        page.add("Reconstructions", "The same held-out images for every row, first seed.", *blocks)
    return page


def add_failed(page: Page, results: Sequence[Result]) -> None:
    """Which rows are not in the tables, and why."""
    if failed := dict.fromkeys(f"`{r.label}`, seed {r.seed}: {r.failed}" for r in results if r.failed):
        page.add("Not in the tables, or only in part", "", Lines(list(failed)))


def longest(results: Sequence[Result]) -> Result:
    """The row whose protocol says most (generation included)."""
    return max(results, key=lambda r: len(r.protocol))


def note(results: Sequence[Result], cells: str = "mean (each seed); bold: best mean") -> str:
    """Under what the numbers of a table were measured, and what could not be. cells: how to read one."""
    one = longest(results)
    protocol, seeds = one.protocol, sorted({r.seed for r in results})
    features = protocol.get("features", {})
    weights = "EMA" if protocol.get("images", {}).get("ema") else "raw"
    there = {r.numbers["rfd"].n for r in results if "rfd" in r.numbers} - {None, protocol.get("n")}
    fewer = f" ({min(there)} images are there)" if there else ""
    parts = [f"Images: `{one.data}`. Seeds: {', '.join(map(str, seeds))}. Protocol `{one.hash}`: N = "
             f"{protocol.get('n')}{fewer}",
             f"features `{features.get('name')}` ({str(features.get('version'))[:16]}), {weights} weights"]
    if sampling := protocol.get("sampling"):
        parts.append(sampler(sampling))
    text = ", ".join(parts) + "." + (f" Cells: {cells}." if cells else "")
    for name, q in quantities(TABLE).items():
        reasons = {r.absent[name] for r in results if name in r.absent}
        if reasons and not any(name in r.numbers for r in results):
            text += f" {q.label} was not measured: {sorted(reasons)[0]}."
    return text


def sampler(sampling: Mapping[str, Any]) -> str:
    """How samples were drawn: solver and steps, or for codes in order temperature and what cuts the choice;
    guidance."""
    guided = f"guidance {sampling['guidance']['scale']:g}"
    if "solver" in sampling:
        return f"{sampling['solver']} {sampling['steps']} steps, {guided}"
    cuts = {"top-k": sampling["top_k"] or None, "top-p": sampling["top_p"] if sampling["top_p"] < 1 else None}
    cut = "".join(f", {name} {value:g}" for name, value in cuts.items() if value is not None)
    return f"codes in order at temperature {sampling['temperature']:g}{cut}, {guided}"


def row_styles(results: Sequence[Result]) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Label -> looks of its line and of its markers: a method's own colour for its first row, the least used
    one for others; dash and symbol tell rows of one colour apart."""
    styles: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    for r in results:
        if r.label not in styles:
            used, own = [line["color"] for line, _ in styles.values()], primitives.colour(r.run)
            colour = own if own not in used else min(reversed(primitives.PALETTE), key=used.count)
            again = used.count(colour)
            styles[r.label] = ({"color": colour, "dash": DASHES[again % len(DASHES)]},
                               {"color": colour, "symbol": SYMBOLS[again % len(SYMBOLS)]})
    return styles


def over_training(results: Sequence[Result]) -> list[go.Figure]:
    """A panel per number over training, one colour per label; no figure where there are no curves."""
    styles, figures = row_styles(results), []
    for name in curve_names(results):
        figure = primitives.curves({}, y=quantities()[name].label, title=quantities()[name].label)
        for r, c in courses(results, name):
            if c.samples:
                line, marker = styles[r.label]
                figure.add_scatter(x=c.samples, y=c.values, mode="lines+markers", name=r.label, line=line,
                                   marker=marker)
        figures += [figure] if figure.data else []
    return [primitives.panels(figures, columns=3)] if figures else []
