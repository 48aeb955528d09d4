"""What came of a ledger: for each claim a forest plot of its contrasts, the verdict, and what would decide
it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from vfmlab.evaluation.number import groups
from vfmlab.plots import primitives
from vfmlab.studies import compare_page
from vfmlab.studies.claims import RATIOS, Claim, Decided, Finding
from vfmlab.studies.page import Lines, Page, definitions
from vfmlab.studies.results import Result, records

COLOURS = {
    "supported": primitives.PALETTE[2],
    "refuted": primitives.PALETTE[1],
    "undecided": primitives.PALETTE[7],
}
RULE = (
    "A contrast is a weighted sum of row means, so written that the claim puts it above 0. Its 95 % interval "
    "comes from all rows and seeds of a block (value = row + seed + rest), which takes one spread for its "
    "rows; a contrast over two blocks adds their variances. A row that spreads more than its block "
    "(p < .05), or is alone in it, is not pooled: contrasts with it have the spread of their own value over "
    "the seeds, marked *. Supported: wholly above 0. "
    "Refuted: wholly below 0, or wholly within the largest difference that counts as none. A claim of no gap "
    "is supported within it, and refuted wholly outside of it. Levels are adjusted by Holm over all "
    "contrasts of the page, also for the seeds that would decide; what its own interval alone would say "
    "stands beside. Everything else is undecided."
)


def number(metric: str, value: float) -> str:
    """An estimate or a border; a ratio in percent."""
    return f"{100 * math.expm1(value):+.0f} %" if metric in RATIOS else f"{value:+.3g}"


def line(finding: Finding) -> dict[str, str]:
    """A contrast as a row of a table."""
    one, c = finding.interval, finding.contrast
    record = {"contrast": c.says, "number": c.unit.replace("log ratio of ", ""),
              "estimate": "–" if one is None else number(c.metric, one.estimate),
              "95 % interval": "–",
              "none within": number(c.metric, c.bound).replace("+", "±") if c.bound else "not set"}
    if one is not None and one.freedom:
        seeds = str(finding.seeds or "more than 99") if finding.verdict == "undecided" else "–"
        own = "" if one.odd is None else " *"
        record |= {"95 % interval": f"{number(c.metric, one.low)} … {number(c.metric, one.high)}{own}",
                   "each seed": ", ".join(number(c.metric, value) for value in one.each),
                   "p (Holm)": f"{finding.p:.3f}" if finding.p >= 0.001 else "< .001",
                   "alone": finding.alone, "verdict": finding.verdict,
                   "seeds that would decide": seeds}
    return record


def forest(findings: Sequence[Finding]) -> go.Figure | None:
    """Contrasts of one number as dots with intervals, in units of the difference that counts as none, or of
    the interval's half width where none is set; None without any."""
    shown = [f for f in reversed(findings) if f.interval is not None and f.interval.freedom]
    if not shown:
        return None
    figure = go.Figure().add_vrect(x0=-1, x1=1, fillcolor="#999", opacity=0.15, line_width=0)
    figure.add_vline(x=0, line={"color": "#444", "width": 1})
    for finding in shown:
        one, colour = finding.interval, COLOURS[finding.verdict]
        scale = finding.contrast.bound or one.half_width()
        figure.add_scatter(x=[one.estimate / scale], y=[finding.contrast.says], mode="markers",
                           showlegend=False, name=finding.verdict, marker={"size": 10, "color": colour},
                           error_x={"type": "data", "array": [one.half_width() / scale], "color": colour,
                                    "thickness": 2},
                           text=number(finding.contrast.metric, one.estimate),
                           hovertemplate="%{text}, %{fullData.name}<extra></extra>")
    figure.update_yaxes(automargin=True)
    unit = "the difference that counts as none" if all(f.contrast.bound for f in shown) else (
        "the difference that counts as none, or of the half interval where none is set")
    title = f"contrast in units of {unit} (grey); the claim says: to the right"
    return primitives.framed(figure, title, "", "", 120 + 36 * len(shown))


def verdict(decided: Sequence[Decided]) -> str:
    """How many claims came out how."""
    count = {word: sum(d.verdict == word for d in decided)
             for word in ("supported", "refuted", "undecided", "elsewhere", "not run")}
    claims = "claim" if len(decided) == 1 else "claims"
    return f"Of {len(decided)} {claims}: " + ", ".join(f"{n} {word}" for word, n in count.items() if n) + "."


def build(decided: Sequence[Decided], results: Sequence[Result], title: str, command: str,
          sources: Sequence[str], left_out: Sequence[Claim] = ()) -> Page:
    """The page. sources: files that the numbers come from. left_out: claims that the budget did not reach."""
    lead = compare_page.note([r for r in results if r.numbers], "mean (each seed)") + " " + RULE
    if sources:
        lead += f" Numbers from {', '.join(f'`{name}`' for name in sources)}."
    page = Page(title, "Which claims of the papers hold here, which do not, and which are undecided?",
                verdict(decided), lead, definitions(), command=command)
    page.add("Claims", "", primitives.table([
        {"claim": d.claim.id, "statement": d.claim.statement, "verdict": _said(d),
         "the paper's figures": d.claim.figures, "source": d.claim.source} for d in decided]))
    for d in decided:
        note = f"{d.claim.statement} Source: {d.claim.source}; {d.claim.figures}. Verdict: {_said(d)}."
        table = primitives.table([line(f) for f in d.findings if f.interval is not None])
        blocks = [forest(d.findings), table if table.records else None]
        page.add(d.claim.id, note, *blocks,
                 Lines([f"{'Missing' if d.verdict != 'elsewhere' else 'Not contrasts of rows'}: {text}."
                        for text in d.lacks]) if d.lacks else None)
    for part in groups(results):  # what the contrasts are made of, with the parameters that the rows have
        page.add(f"Rows under protocol {compare_page.longest(part).hash}", "Bold: best mean.",
                 primitives.table(records(part, "**{}**")))
    if left_out:
        page.add("Not run for want of budget", "",
                 Lines([f"{claim.id}: {claim.statement}" for claim in left_out]))
    return page


def _said(decided: Decided) -> str:
    """The verdict, or where it is."""
    where = decided.claim.elsewhere
    if not where:
        return decided.verdict
    return f"elsewhere: [{where}]({where})" if where.endswith(".md") else f"elsewhere: `{where}`"


def record(decided: Decided) -> dict[str, Any]:
    """A claim as JSON."""
    claim = decided.claim
    findings = []
    for f in decided.findings:
        entry: dict[str, Any] = {"metric": f.contrast.metric, "weights": dict(f.contrast.weights),
                                 "says": f.contrast.says, "kind": f.contrast.kind, "delta": f.contrast.bound,
                                 "verdict": f.verdict, "alone": f.alone, "p": f.p, "lacks": f.lacks}
        if f.interval is not None and f.interval.freedom:
            entry |= {"estimate": f.interval.estimate, "low": f.interval.low, "high": f.interval.high,
                      "freedom": f.interval.freedom, "seeds": f.interval.seeds, "rows": f.interval.rows,
                      "each": f.interval.each, "odd": f.interval.odd,
                      "seeds_to_decide": f.seeds}
        findings.append(entry)
    return {"id": claim.id, "statement": claim.statement, "source": claim.source, "figures": claim.figures,
            "verdict": decided.verdict, "contrasts": findings}
