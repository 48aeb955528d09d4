"""The page of a correlation: rows, correlations, and a picture of every metric."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import plotly.graph_objects as go

from vfmlab.evaluation.contrasts import holm
from vfmlab.evaluation.number import HEADLINE, HIGHER, LOWER, quantities, quantity
from vfmlab.plots import primitives
from vfmlab.studies import compare_page
from vfmlab.studies.correlation import DRAWS, ENOUGH, GIVEN, Correlation, Lead, leads, values
from vfmlab.studies.page import Lines, Page, definitions
from vfmlab.studies.results import Result, spread

SHOWN = 12  # metrics with a picture
ABOUT_LEADS = ("How much closer the first goes along with the target than the second: the difference of "
               "their correlations, signed so that better with better is above 0, by draws of the same rows. "
               "Undecided where an interval holds 0.")
ABOUT_PUBLISHED = ("Correlations with gFID that papers give for their own tokenizers (of which kind is not "
                   "known here), and those found here; above 0 a worse gFID goes with more of the "
                   "metric. Of 2606.03578 only sizes are known: the sign is that of its claim. "
                   "Constants of several metrics are ours (docs/instruments.md).")


def table(results: Sequence[Result], target: str) -> list[dict[str, str]]:
    """One line per row, best target first: target and headline metrics, with every seed."""
    cells = {key: values(results, key) for key in dict.fromkeys([target, *quantities(HEADLINE)])}
    order = sorted(cells[target], key=lambda label: statistics.fmean(cells[target][label].values()),
                   reverse=quantity(target).better == HIGHER)
    return [{"row": label,
             **{quantity(key).head: spread(list(own[label].values())) if label in own else "–"
                for key, own in cells.items() if own}}
            for label in order]


def correlations(ranked: Sequence[Correlation]) -> list[dict[str, str]]:
    """One line per metric, strongest first."""
    grouped = any(c.methods for c in ranked)
    return [
        {
            "metric": quantity(c.metric).head, "Spearman": f"{c.rho:+.2f}", "each seed": ", ".join(f"{r:+.2f}" for r in c.seeds) or "–",
            "95 % over rows": _range(c.low, c.high), **({"95 % over methods": _range(*c.methods) if c.methods else "–"} if grouped else {}),
            "p": _p(c.p), "rows": str(c.rows),
            f"given the {quantity(GIVEN).label}": "–" if c.partial is None else f"{c.partial:+.2f}",
        }
        for c in ranked
    ]  # fmt: skip


def published(ranked: Sequence[Correlation]) -> list[dict[str, str]]:
    """One line per metric whose correlation with gFID others report, their strongest first; both so signed
    that above 0 a worse gFID goes with more of the metric. Too few rows describe themselves alone."""
    own = [(q, c) for c in ranked if c.rows >= ENOUGH and (q := quantity(c.metric)).published]
    lines = []
    for q, c in sorted(own, key=lambda pair: -abs(pair[0].published.rho)):
        ends = [(c.low, c.high), *([c.methods] if c.methods else [])]
        inside = all(low <= q.published.rho <= high for low, high in ends)
        lines.append({"metric": q.head, "theirs": f"{q.published.rho:+.2f}", "over": q.published.over,
                      "here": f"{c.rho:+.2f}", "95 % over rows": _range(c.low, c.high),
                      "95 % over methods": _range(*c.methods) if c.methods else "–",
                      "in both intervals": "yes" if inside else "no"})
    return lines


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< .001"


def _range(low: float, high: float) -> str:
    return f"{low:+.2f} … {high:+.2f}"


def reading(ranked: Sequence[Correlation], target: str) -> str:
    """What the table may be read for, and what luck alone would give."""
    chance, small = 0.05 * len(ranked), sum(c.p < 0.05 for c in ranked)
    levels = holm([c.p for c in ranked])
    left = [quantity(c.metric).label for c, level in zip(ranked, levels, strict=True) if level < 0.05]
    good = "smaller" if quantity(target).better == LOWER else "larger"
    kinds, units = "", "rows"
    if any(c.methods for c in ranked):
        kinds = ", and when methods are drawn and bring all their rows along"
        units = "means of methods, since variants of one method are no independent rows"
    return (f"Spearman's rank correlation of each metric of the tokenizer with {quantity(target).label} "
            f"({good} is better) over the means of the rows; the same over the rows of each seed; the middle "
            f"95 % when rows are drawn with replacement ({DRAWS:,} times){kinds}; p by permutation of the "
            f"{units}. {small} of {len(ranked)} metrics have p < .05; {chance:.1f} would by luck if they "
            "were independent, which they are not; by Holm over all of them "
            f"{', '.join(left) or 'none'} {'stay' if len(left) > 1 else 'stays'} below. Last column: the "
            "correlation with what both sides share with the "
            f"{quantity(GIVEN).label} taken out.")


def lead_text(one: Lead) -> str:
    """Both names, the gap with its intervals, and what they decide."""
    ends = [(one.low, one.high), *([one.methods] if one.methods else [])]
    sides = {(low > 0) - (high < 0) for low, high in ends}
    said = "closer" if sides == {1} else "less close" if sides == {-1} else "undecided"
    over = f", over methods {_range(*one.methods)}" if one.methods else ""
    return (f"{quantity(one.metric).label} against {quantity(one.other).label}: {one.gap:+.2f} (95 % over "
            f"rows {_range(one.low, one.high)}{over}), {one.rows} rows: **{said}**.")


def left_out(results: Sequence[Result], target: str) -> list[str]:
    """Rows that stand in no correlation, or lack some numbers, and why."""
    goal = values(results, target)
    reasons, name = {}, quantity(target).label
    for r in results:
        if r.label not in goal:
            other = f"its {name} was measured under another protocol"
            reasons[r.label] = r.failed or (other if target in r.numbers else f"it has no {name}")
        elif r.failed:
            reasons[f"{r.label}, seed {r.seed}"] = r.failed
    return [f"`{label}`: {why}" for label, why in reasons.items()]


def build(results: Sequence[Result], ranked: Sequence[Correlation], target: str, command: str,
          title: str) -> Page:
    """Rows, correlations, and a picture of the strongest."""
    goal = values(results, target)
    mine = [r for r in results if r.label in goal and target in r.numbers]
    label = quantity(target).label
    page = Page(title, f"Which numbers of a tokenizer, measured before any diffusion model is trained, go along with {label}?",
                verdict(ranked), compare_page.note(mine, "mean (each seed)"), definitions(), command=command)  # fmt: skip
    metrics = [c.metric for c in ranked]
    shown = [metric for metric in quantities(HEADLINE) if metric in metrics]
    shown += [metric for metric in metrics if metric not in shown][: SHOWN - len(shown)]
    page.add("", "", strengths(ranked, target), scatters(results, shown, target))
    page.add("Rows", "Best first.", primitives.table(table(results, target)))
    page.add(f"What goes along with {label}", reading(ranked, target), primitives.table(correlations(ranked)))
    if target == "gfd" and (beside := published(ranked)):
        page.add("Beside what others report", ABOUT_PUBLISHED, primitives.table(beside))
    if pairs := leads(results, target):
        page.add("One metric against another", ABOUT_LEADS, Lines([lead_text(one) for one in pairs]))
    if missing := left_out(results, target):
        page.add("Left out, or only in part", "", Lines(missing))
    return page


def verdict(ranked: Sequence[Correlation]) -> str:
    """The strongest correlation whose intervals leave out 0; none where there is no such metric."""
    clear = [pair for pair in zip(ranked, holm([c.p for c in ranked]), strict=True) if pair[0].clear]
    if not clear:
        return "None: an interval of every metric, over rows or over methods, holds 0."
    one, level = clear[0]
    what = "methods" if one.kinds else "rows"
    few = f" Fewer than {ENOUGH} {what}: this describes them, and decides nothing."
    few *= one.independent < ENOUGH
    kinds = f", over methods {_range(*one.methods)}" if one.methods else ""
    of = f" of {one.kinds} methods" * bool(one.methods)
    return (f"Strongest: {quantity(one.metric).label}, {one.rho:+.2f} (95 % over rows "
            f"{_range(one.low, one.high)}{kinds}), over {one.rows} rows{of}; p {_p(level)} by "
            f"Holm over {len(ranked)} metrics.{few}")


def strengths(ranked: Sequence[Correlation], target: str) -> go.Figure:
    """Spearman's rho of every metric with its interval over methods, or else over rows, strongest on top;
    small dots: seeds."""
    shown = list(reversed(ranked))
    ends = [c.methods or (c.low, c.high) for c in shown]
    labels = [quantity(c.metric).label or c.metric for c in shown]
    figure = go.Figure().add_vline(x=0, line={"color": "#888", "width": 1})
    figure.add_scatter(
        x=[c.rho for c in shown], y=labels, mode="markers", name="over means of rows", marker={"size": 10, "color": primitives.PALETTE[0]},
        error_x={
            "type": "data", "symmetric": False, "thickness": 1,
            "array": [max(0, high - c.rho) for c, (_, high) in zip(shown, ends, strict=True)],
            "arrayminus": [max(0, c.rho - low) for c, (low, _) in zip(shown, ends, strict=True)],
        },
    )  # fmt: skip
    seeds = [(r, label) for c, label in zip(shown, labels, strict=True) for r in c.seeds]
    figure.add_scatter(x=[r for r, _ in seeds], y=[label for _, label in seeds], mode="markers",
                       name="one seed", marker={"size": 5, "color": primitives.PALETTE[1]})
    over = "methods" if any(c.methods for c in ranked) else "rows"
    figure.update_xaxes(range=[-1.05, 1.05],
                        title=f"rank correlation with {quantity(target).label}, 95 % over {over}")
    return figure.update_layout(template=primitives.TEMPLATE, height=120 + 18 * len(shown),
                                margin={"l": 180, "r": 12, "t": 24, "b": 44})


def scatters(results: Sequence[Result], metrics: Sequence[str], target: str) -> go.Figure:
    """Target against metric, a panel per metric, a line over the seeds per row."""
    goal, styles, figures = values(results, target), compare_page.row_styles(results), []
    for metric in metrics:
        mine, figure = values(results, metric), go.Figure()
        for label in [label for label in styles if label in goal and label in mine]:
            seeds = [s for s in goal[label] if s in mine[label]]
            x, y = [mine[label][s] for s in seeds], [goal[label][s] for s in seeds]
            line, marker = styles[label]
            figure.add_scatter(x=x, y=y, mode="lines+markers", name=label, marker={**marker, "size": 9},
                               line={"color": line["color"], "width": 1})
        figures.append(primitives.framed(figure, None, quantity(target).label, quantity(metric).head))
    return primitives.panels(figures, columns=3)
