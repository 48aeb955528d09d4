"""The tables of a comparison as Markdown and as one HTML page with curves and pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfmlab.evaluation.protocol import groups
from vfmlab.plots import primitives
from vfmlab.studies.results import CURVES, METRICS, Result, arrow, curve_records, records, stage_records

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; color: #1b1f23; background: #fff; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; } th, td { text-align: left; padding: .25rem .7rem .25rem 0;
border-bottom: 1px solid #d8dee4; white-space: nowrap; } img { max-width: 100%; } h2 { font-size: 1.15rem; margin-top: 2rem; }"""

DASHES, SYMBOLS = ("solid", "dash", "dot", "dashdot"), ("circle", "diamond", "square", "x")  # of the first, second ... row of one colour


def sections(results: Sequence[Result]) -> list[tuple[str, str, list[dict[str, str]]]]:
    """(heading, note, table) of everything there is: one main table per protocol, then stages, then curves."""
    found, parts = [], groups(results)
    for part in parts:
        heads = {METRICS[k]: f"{METRICS[k]} {arrow(k)}" for k in METRICS}
        table = [{heads.get(k, k): v for k, v in row.items()} for row in records(part, "**{}**")]
        found.append((f"Protocol {_longest(part)['hash']}" if len(parts) > 1 else "", note(part), table))
        if stages := stage_records(part):
            found.append(("Stage by stage", "Each stage of a recipe is a run of its own, measured in the same way.", stages))
        for key in CURVES:
            if table := curve_records(part, key):
                found.append(("", f"{METRICS[key]} over training (images seen by the diffusion model):", table))
    return found


def _longest(results: Sequence[Result]) -> Result:
    """The row whose protocol says most (generation included)."""
    return max(results, key=lambda r: len(r["protocol"]))


def note(results: Sequence[Result], cells: str = "mean (each seed); bold: best mean") -> str:
    """Under what the numbers of a table were measured, and what could not be. cells: how to read one."""
    one = _longest(results)
    protocol, seeds = one["protocol"], sorted({r["seed"] for r in results})
    features = protocol.get("features", {})
    parts = [
        f"Images: `{one['data']}`. Seeds: {', '.join(map(str, seeds))}. Protocol `{one['hash']}`: N = {protocol['n']}",
        f"features `{features.get('name')}` ({str(features.get('version'))[:16]}), {'EMA' if protocol['images'].get('ema') else 'raw'} weights",
    ]
    if sampling := protocol.get("sampling"):
        parts.append(f"{sampling['solver']} {sampling['steps']} steps, guidance {sampling['guidance']['scale']:g}")
    text = ", ".join(parts) + f". Cells: {cells}. Feature distance: 1 - cosine in the features named."
    for key in METRICS:
        reasons = {r["absent"][key] for r in results if key in r["absent"]}
        if reasons and not any(key in r["metrics"] for r in results):
            text += f" {METRICS[key]} was not measured: {sorted(reasons)[0]}."
    return text


def failures(results: Sequence[Result]) -> list[str]:
    return [f"`{r['label']}`, seed {r['seed']}: {r['failed']}" for r in results if r["failed"]]


def markdown(results: Sequence[Result], command: str, title: str, pictures: Mapping[str, str] | None = None) -> str:
    """Tables; pictures: label -> path as seen from the page ("" is the overview)."""
    lines = [f"# {title}", ""]
    for heading, text, table in sections(results):
        columns = list(dict.fromkeys(key for row in table for key in row))
        lines += [*([f"## {heading}", ""] if heading else []), text, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(row.get(c, '–').replace('|', '/') for c in columns)} |" for row in table] + [""]
    if failed := failures(results):
        lines += ["Not in the tables, or only in part:", "", *(f"- {line}" for line in failed), ""]
    if pictures:
        lines += ["## Reconstructions", "", "The same held-out images for every row, first seed.", ""]
        lines += [f"{label or 'All rows'}:\n\n![{label or 'all rows'}]({path})\n" for label, path in _overview_first(pictures)]
    lines += [f"Made by `{command}`."]
    return "\n".join(lines) + "\n"


def page(results: Sequence[Result], command: str, title: str, pictures: Mapping[str, Path] | None = None) -> str:
    """All of it in one file that needs no network: tables, curves over training, pictures."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, text, table in sections(results):
        body.append(f"<h2>{html.escape(heading)}</h2>" if heading else "")
        body.append(f"<p>{html.escape(text.replace('`', ''))}</p>{html_table(table)}")
    if failed := failures(results):
        body.append("<h2>Failed</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in failed) + "</ul>")
    figures = curves(results)
    if figures:
        body.append("<h2>Over training</h2>" + primitives.fragment(primitives.panels(figures, columns=3), first=True))
    for label, path in _overview_first(pictures or {}):
        data = base64.b64encode(path.read_bytes()).decode()
        body.append(f"<h2>{html.escape(label or 'All rows')}</h2><img alt='reconstructions' src='data:image/png;base64,{data}'>")
    body.append(f"<p>Made by <code>{html.escape(command)}</code></p>")
    return document(title, body)


def document(title: str, body: Sequence[str]) -> str:
    """Parts of a page in the frame of one that needs nothing from outside."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'


def _overview_first(pictures: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(pictures.items(), key=lambda item: item[0] != "")


def html_table(table: Sequence[Mapping[str, str]]) -> str:
    """Records as a table; a cell in ** is bold."""
    columns = list(dict.fromkeys(key for row in table for key in row))

    def cell(text: str) -> str:
        bold = text.startswith("**")
        return f"<td>{'<b>' if bold else ''}{html.escape(text.strip('*'))}{'</b>' if bold else ''}</td>"

    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    rows = "".join(f"<tr>{''.join(cell(row.get(c, '–')) for c in columns)}</tr>" for row in table)
    return f'<div class="table"><table><tr>{head}</tr>{rows}</table></div>'


def row_styles(rows: Sequence[tuple[str, str]]) -> dict[str, tuple[str, int]]:
    """(label, run) -> (colour, how many rows before have it): a method's own colour for its first row, the least used one for its variants.

    The count chooses a dash or a symbol where there are more rows than colours.
    """
    styles: dict[str, tuple[str, int]] = {}
    for label, run in rows:
        if label not in styles:
            used = [colour for colour, _ in styles.values()]
            own = primitives.colour(run)
            colour = own if own not in used else min(reversed(primitives.PALETTE), key=used.count)
            styles[label] = (colour, used.count(colour))
    return styles


def curves(results: Sequence[Result]) -> list:
    """One figure per metric over training; the same label has the same colour for every seed."""
    styles = row_styles([(r["label"], r["run"]) for r in results])
    figures = []
    for key in CURVES:
        lines = [(r["label"], [(p["samples"], p[key]) for p in r["curve"] if p.get(key) is not None]) for r in results]
        if any(points for _, points in lines):
            figure = primitives.curves({}, y=METRICS[key], title=METRICS[key])
            for label, points in lines:
                if points:
                    x, y = zip(*points, strict=True)
                    colour, again = styles[label]
                    line, marker = {"color": colour, "dash": DASHES[again % len(DASHES)]}, {"symbol": SYMBOLS[again % len(SYMBOLS)]}
                    figure.add_scatter(x=x, y=y, mode="lines+markers", name=label, line=line, marker=marker)
            figures.append(figure)
    return figures
