"""Tab: what the runs of the folder measured: leaderboard, convergence, reconstruction against generation, any number against gFD."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from apps import cards, models, share
from apps.cards import escape
from apps.common import COMPUTE, LIGHT, problem, themed, told
from vfmlab import api, runs
from vfmlab.evaluation.number import CURVE, quantities, quantity
from vfmlab.plots import primitives
from vfmlab.studies import leaderboard

LOGGED = 4  # of the images of a run, the newest
EVERY_PHASE = "show stages and tokenizers of other runs too"
# A click on a point writes the run's id into the list beside the figures, as a person would by keyboard.
CLICKS = """
(() => {
  const attach = () => document.querySelectorAll('#vl-compare .js-plotly-plot').forEach((plot) => {
    if (plot.dataset.vl || !plot.on) return;
    plot.dataset.vl = '1';
    plot.on('plotly_click', (event) => {
      const box = document.querySelector('#vl-picked textarea, #vl-picked input');
      const id = event.points[0].customdata;
      if (!box || !id) return;
      box.value = id;
      box.dispatchEvent(new Event('input', {bubbles: true}));
    });
  });
  setInterval(attach, 500);
})();
"""


def build(root: Path) -> tuple[share.Tab, tuple]:
    """Lay the tab out. root: folder of runs. Beside the tab: what fills it, as (handler, inputs, outputs)."""
    with gr.Column(elem_id="vl-compare"):
        which = gr.Dropdown([], label="table (numbers of one protocol)", allow_custom_value=True)
        with gr.Row():
            phases = gr.Checkbox(False, label=EVERY_PHASE, min_width=240, scale=3)
            again = gr.Button("read the folder again", min_width=180)
        board = gr.Dataframe(
            interactive=False, wrap=False, datatype=["str", "html", *["str"] * 20], label="leaderboard", show_search="filter",
            elem_id="vl-board",
        )  # fmt: skip
        note = gr.Markdown(elem_classes="vl-facts")
        with gr.Row():
            with gr.Column(min_width=300):
                metric = gr.Radio([(q.label, key) for key, q in quantities(CURVE).items()], value="gfd", label="over training")
                curves = gr.Plot(show_label=False)
            with gr.Column(min_width=300):
                with gr.Row():
                    x = gr.Dropdown(["rfd"], value="rfd", label="across", min_width=120, allow_custom_value=True)
                    y = gr.Dropdown(["gfd"], value="gfd", label="up", min_width=120, allow_custom_value=True)
                cloud = gr.Plot(show_label=False)
                cloud_note = gr.Markdown(elem_classes="vl-facts")
        with gr.Row():
            picked = gr.Dropdown([], label="run (or click a row or a point)", allow_custom_value=True, scale=3, min_width=240)
            clicked = gr.Textbox(elem_id="vl-picked", visible="hidden")
            measure = gr.Button("measure this run under its own protocol", min_width=200)
        with gr.Row():
            with gr.Column(min_width=300):
                gallery = gr.HTML(min_height=120)
            with gr.Column(min_width=300):
                config = gr.JSON(label="config", open=False, max_height=340)
        status = gr.Markdown(elem_classes="vl-facts")
        told_as = share.panel()

    @told
    def read_leaderboard(which: str | None, phases: bool, metric: str, x: str, y: str, run: str | None):
        """The leaderboard: rows of one table, notes, figures of convergence and of one number against another, and the names of all tables.

        which: the heading of a table (empty: the one with `run`, or the largest). metric: gfd, gfd_own or class_accuracy. x, y: numbers of the cloud of points.
        run: the one that is shown below (empty: the first of the table).
        """
        results = leaderboard.collect(root, bool(phases))
        tables = {heading: (text, rows) for heading, text, rows in sorted(leaderboard.tables(results), key=lambda t: -len(t[2]))}
        holds = (heading for heading, (_, rows) in tables.items() if run in [row["run"] for row in rows])
        heading = which if which in tables else next(holds, next(iter(tables), None))
        text, rows = tables.get(heading, ("Nothing is measured here yet. Choose a run below and press 'measure', or: `vfmlab eval RUN`.", []))
        columns = list(dict.fromkeys(key for row in rows for key in row)) or ["run"]
        known = leaderboard.metrics(results)
        named = [(quantity(key).label or key, key) for key in known] or [("rFD", "rfd"), ("gFD", "gfd")]
        measurable = _measurable(root)
        run = run if run in measurable else rows[0]["run"] if rows else (measurable or [None])[0]
        state = {"which": heading, "phases": bool(phases), "metric": metric, "x": x, "y": y, "run": run}
        code = (
            f"from vfmlab.studies import leaderboard\n\nresults = leaderboard.collect({root.name!r}, every_phase={bool(phases)})\n"
            "for heading, note, rows in leaderboard.tables(results):\n    print(heading, note, *rows, sep='\\n')\n"
            f"leaderboard.convergence(results, {metric!r})\nleaderboard.scatter(leaderboard.cloud(results, {x!r}, {y!r})[0], {x!r}, {y!r})"
        )
        points, points_note = _cloud(results, x, y, known)
        return (
            gr.update(choices=list(tables), value=heading), gr.update(headers=columns, value=[[_cell(c, row) for c in columns] for row in rows]), text,
            themed(leaderboard.convergence(results, metric)), gr.update(choices=named), gr.update(choices=named), points, points_note,
            gr.update(choices=measurable, value=run), *share.tell("compare", state, code),
        )  # fmt: skip

    @told
    def show(run_id: str | None):
        if not run_id:
            return gr.skip(), gr.skip(), gr.skip()
        folder = _any(root, run_id)
        status = folder.status()
        logged = sorted(folder.images.glob("*.png"))[-LOGGED:]
        figures = [cards.logged(Image.open(path), path.stem) for path in logged]
        method = (folder.raw_config.get("tokenizer") or {}).get("method")
        images = cards.cards([cards.card(folder.id, method, figures, (), "images logged in training, by images seen")])
        line = f"**{folder.id}**: {folder.kind}, {status.state}, {status.samples:,} of {status.total:,} images, {status.seconds:,.0f} s of training"
        return images, json.loads(json.dumps(folder.raw_config)), line

    @told
    def evaluate(run_id: str):
        """Measure a run under its own protocol (or read what was measured before); its report.json as JSON."""
        folder = _any(root, run_id)
        kind = folder.kind
        if kind not in ("tokenizer", "diffusion"):
            raise problem(f"Run '{folder.id}' is a {kind} run; only tokenizer and diffusion runs are measured here.")
        report = api.evaluate(models.checked(root, run_id, kind).path, root)
        text = f"**{folder.id}**: measured; N = {report.protocol['n']}, protocol {report.hash}, EMA weights, {report.seconds:.0f} s"
        return text, report.as_json()["metrics"]

    def pick_row(event: gr.SelectData):
        row = event.row_value or []
        return row[0] if row else gr.skip()

    numbers = gr.JSON(visible=False)
    inputs = [which, phases, metric, x, y, picked]
    outputs = [which, board, note, curves, x, y, cloud, cloud_note, picked, *told_as]
    again.click(read_leaderboard, inputs, outputs, api_name="leaderboard", concurrency_id="tables", show_progress="minimal")
    for control in (which, phases, metric, x, y):
        control.input(read_leaderboard, inputs, outputs, api_visibility="private", concurrency_id="tables", show_progress="hidden")
    board.select(pick_row, None, picked, **LIGHT)
    clicked.input(lambda run_id: run_id, clicked, picked, **LIGHT)
    picked.change(show, picked, [gallery, config, status], **LIGHT)
    measured = measure.click(evaluate, picked, [status, numbers], api_name="evaluate", **COMPUTE)
    measured.then(read_leaderboard, inputs, outputs, api_visibility="private", concurrency_id="tables", show_progress="hidden")
    fields = {"which": which, "phases": phases, "metric": metric, "x": x, "y": y, "run": picked}
    return share.Tab("compare", fields, dict, free=("which", "x", "y", "run")), (read_leaderboard, inputs, outputs)


def _cell(column: str, row: dict[str, Any]) -> str:
    text = str(row.get(column, "–"))
    return f'<span style="color: {primitives.colour(text)}">&#9679;</span> {escape(text)}' if column == "method" else text


def _any(root: Path, run_id: Any) -> runs.RunDir:
    """A run of any kind, by its id alone."""
    found = {run.id: run for run in runs.scan(root)}.get(run_id) if isinstance(run_id, str) else None
    if found is None:
        raise problem(f"There is no run '{str(run_id)[:80]}' here (any more). Press 'read the folder again' and choose another one.")
    return found


def _measurable(root: Path) -> list[str]:
    return [*models.finished(root, "diffusion"), *models.finished(root, "tokenizer")]


def _cloud(results: list[dict[str, Any]], x: str, y: str, known: list[str]) -> tuple[Any, str]:
    if x not in known or y not in known:
        return None, f"No run here has both {x} and {y} yet."
    clouds = leaderboard.cloud(results, x, y)
    if not clouds:
        return None, f"No run here has both {x} and {y} yet."
    points = clouds[0]
    n = sorted({(p.x.n or 0, p.y.n or 0) for p in points})
    others = sum(len(c) for c in clouds[1:])
    sizes, hashes = ", ".join(f"{a} / {b}" for a, b in n), " / ".join(map(str, points[0].protocols))
    text = f"{len(points)} run{'s' * (len(points) > 1)}; N = {sizes}, protocols {hashes}, EMA weights"
    return themed(leaderboard.scatter(points, x, y)), text + (f"; {others} runs measured under other protocols are left out" if others else "")
