"""Tab: what the runs of the folder measured: leaderboard, convergence, and any number against any other."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from apps import cards, choices, models, share
from apps.common import COMPUTE, LIGHT, problem, text, themed
from vfmlab import api, runs
from vfmlab.evaluation.number import CURVE, quantities, quantity
from vfmlab.plots import primitives
from vfmlab.studies import leaderboard
from vfmlab.studies.results import scan

LOGGED = 4  # of the images of a run, the newest
EVERY_PHASE = "show stages and tokenizers of other runs too"


def build(root: Path) -> tuple[share.Tab, tuple]:
    """Lay the tab out. root: folder of runs. Beside the tab: what fills it, as (handler, inputs, outputs)."""
    with gr.Column(elem_id="vl-compare"):
        which = gr.Dropdown([], label="table (numbers of one protocol)", allow_custom_value=True)
        with gr.Row():
            phases = gr.Checkbox(False, label=EVERY_PHASE, min_width=240, scale=3)
            again = gr.Button("read the folder again", min_width=180)
        board = gr.Dataframe(interactive=False, wrap=False, datatype=["str", "html", *["str"] * 20],
                             label="leaderboard", show_search="filter", elem_id="vl-board")
        note = gr.Markdown(elem_classes="vl-facts")
        with gr.Row():
            with gr.Column(min_width=300):
                followed = [(q.label, key) for key, q in quantities(CURVE).items()]
                metric = gr.Radio(followed, value="gfd", label="over training")
                curves = gr.Plot(show_label=False)
            with gr.Column(min_width=300):
                with gr.Row():
                    look = {"min_width": 120, "allow_custom_value": True}
                    x = gr.Dropdown(["rfd"], value="rfd", label="across", **look)
                    y = gr.Dropdown(["gfd"], value="gfd", label="up", **look)
                cloud = gr.Plot(show_label=False)
                cloud_note = gr.Markdown(elem_classes="vl-facts")
        with gr.Row():
            look = {"allow_custom_value": True, "scale": 3, "min_width": 200}
            picked = gr.Dropdown([], label="run A (or click a row or a point)", **look)
            beside = gr.Dropdown([], label="run B, beside it", **look)
            clicked = gr.Textbox(elem_id="vl-picked", visible="hidden")
            measure = gr.Button("measure this run under its own protocol", min_width=200)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gallery = gr.HTML(min_height=120)
            with gr.Column(min_width=300):
                config = gr.JSON(label="config of A, or what differs from B", open=False, max_height=340)
        status = gr.Markdown(elem_classes="vl-facts")
        panel = share.panel()
        choices.build(root)

    def read_leaderboard(which: str | None, phases: bool, metric: str, x: str, y: str, run: str | None):
        """The leaderboard: rows of one table, notes, figures of convergence and of a number against another,
        and the names of all tables.

        which: the heading of a table (empty: the one with `run`, or the largest). metric: gfd, gfd_own or
        class_accuracy. x, y: numbers of the cloud of points. run: the one that is shown below.
        """
        which, metric, x, y, run = (text(value) for value in (which, metric, x, y, run))
        results = scan(root, phases)
        largest = sorted(leaderboard.tables(results), key=lambda table: -len(table[2]))
        tables = {heading: (about, rows) for heading, about, rows in largest}
        holds = (heading for heading, (_, rows) in tables.items() if run in [row["run"] for row in rows])
        heading = which if which in tables else next(holds, next(iter(tables), None))
        nothing = "Nothing is measured here yet. Choose a run below and press 'measure'."
        about, rows = tables.get(heading, (nothing, []))
        columns = list(dict.fromkeys(key for row in rows for key in row)) or ["run"]
        known = leaderboard.metrics(results)
        named = [(quantity(key).label or key, key) for key in known] or [("rFD", "rfd"), ("gFD", "gfd")]
        measurable = models.choices(root, *models.GENERATORS, "tokenizer")
        ids = [run_id for _, run_id in measurable]
        here = {*ids, *(r.run for r in results)}
        if run and run not in here:
            about = f"The run that was asked for is not here (any more). {about}"
        run = run if run in here else rows[0]["run"] if rows else (ids or [None])[0]
        state = {"which": heading, "phases": phases, "metric": metric, "x": x, "y": y, "run": run}
        code = [
            "from vfmlab.studies import leaderboard, results", "",
            f"found = results.scan({str(root)!r}, every_phase={phases})",
            "for heading, note, rows in leaderboard.tables(found):",
            "    print(heading, note, *rows, sep='\\n')", f"leaderboard.convergence(found, {metric!r})",
            f"leaderboard.scatter(leaderboard.cloud(found, {x!r}, {y!r})[0], {x!r}, {y!r})",
        ]  # fmt: skip
        cells = [[_cell(column, row) for column in columns] for row in rows]
        listed, beside_it = gr.update(choices=named), gr.update(choices=[("none", ""), *measurable])
        points, points_note = _cloud(results, x, y, known)
        return (gr.update(choices=list(tables), value=heading), gr.update(headers=columns, value=cells),
                about, themed(leaderboard.convergence(results, metric)), listed, listed, points, points_note,
                gr.update(choices=measurable, value=run), beside_it, *share.outputs("compare", state, code))

    def show(run_id: str | None, other: str | None):
        run_id, other = text(run_id), text(other)
        if not run_id:
            return gr.skip(), gr.skip(), gr.skip()
        folders = [models.checked(root, one) for one in dict.fromkeys((run_id, other or run_id))]
        lines, parts = [], []
        for folder in folders:
            status, logged = folder.status(), sorted(folder.images.glob("*.png"))[-LOGGED:]
            figures = [cards.figure(Image.open(path), path.stem) for path in logged]
            size = f"{(folder.raw_config.get('data') or {}).get('size')} px"
            facts = f"{size}; images logged in training, by images seen"
            parts.append(models.shown(root, folder.id).card(figures, facts))
            seen = f"{status.samples:,} of {status.total:,} images, {status.seconds:,.0f} s of training"
            lines.append(f"**{folder.id}**: {folder.kind}, {size}, {status.state}, {seen}")
        configs = [folder.raw_config for folder in folders]
        fields = configs[0] if len(configs) == 1 else runs.differences(configs)
        return cards.cards(parts), json.loads(json.dumps(fields)), "\n\n".join(lines)

    def evaluate(run_id: str):
        """Measure a run under its own protocol, or read what was measured before; its report.json as JSON."""
        folder = models.checked(root, run_id)
        kind = folder.kind
        if kind not in (*models.GENERATORS, "tokenizer"):
            raise problem(f"Run '{folder.id}' is a {kind} run; tokenizers and generators are measured.")
        report = api.evaluate(models.checked(root, run_id, kind).path, root)
        weights = "EMA" if folder.config().protocol.ema else "raw"
        facts = f"N = {report.protocol['n']}, protocol {report.hash}, {weights} weights"
        return f"**{folder.id}**: measured; {facts}, {report.seconds:.0f} s", report.as_json()["metrics"]

    def pick_row(event: gr.SelectData):
        row = event.row_value
        return text(row[0]) if isinstance(row, list) and row else gr.skip()

    numbers = gr.JSON(visible=False)
    inputs = [which, phases, metric, x, y, picked]
    outputs = [which, board, note, curves, x, y, cloud, cloud_note, picked, beside, *panel]
    quiet = {"api_visibility": "private", "concurrency_id": "tables", "show_progress": "hidden"}
    again.click(read_leaderboard, inputs, outputs, api_name="leaderboard", concurrency_id="tables")
    for control in (which, phases, metric, x, y):
        control.input(read_leaderboard, inputs, outputs, **quiet)
    board.select(pick_row, None, picked, **LIGHT)
    clicked.input(text, clicked, picked, **LIGHT)
    for chosen in (picked, beside):
        chosen.change(show, [picked, beside], [gallery, config, status], **LIGHT)
    measured = measure.click(evaluate, picked, [status, numbers], api_name="evaluate", **COMPUTE)
    measured.then(read_leaderboard, inputs, outputs, **quiet)
    fields = {"which": which, "phases": phases, "metric": metric, "x": x, "y": y, "run": picked}
    tab = share.Tab("compare", fields, free=("which", "x", "y", "run"))
    return tab, (read_leaderboard, inputs, outputs)


def _cell(column: str, row: dict[str, Any]) -> str:
    cell = str(row.get(column, "–"))
    dot = f'<span style="color: {primitives.colour(cell)}">&#9679;</span> '
    return dot + escape(cell) if column == "method" else cell


def _cloud(results: list[dict[str, Any]], x: str, y: str, known: list[str]) -> tuple[Any, str]:
    clouds = leaderboard.cloud(results, x, y) if x in known and y in known else []
    if not clouds:
        return None, f"No run here has both {x} and {y} yet."
    points = clouds[0]
    counts = ", ".join(f"{a} / {b}" for a, b in sorted({(p.x.n or 0, p.y.n or 0) for p in points}))
    others, protocols = sum(len(c) for c in clouds[1:]), f"{points[0].x.protocol} / {points[0].y.protocol}"
    about = f"{len(points)} run{'s' * (len(points) > 1)}; N = {counts}, protocols {protocols}"
    about += f"; {others} runs measured under other protocols are left out" if others else ""
    return themed(leaderboard.scatter(points, x, y)), about
