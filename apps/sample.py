"""Tab: samples as they form; two diffusion runs from the same noise; a table of one setting by another."""

from __future__ import annotations

import random
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from apps import cards, models, share
from apps.common import COMPUTE, LIGHT, SEED, checked, problem, text
from apps.page import stopped, until_stopped
from vfmlab import api
from vfmlab.plots import primitives
from vfmlab.studies import interpolate
from vfmlab.studies.rows import listed
from vfmlab.weights import bundled

MOST = 64  # images of one job and run, and cells of a table
EVERY = "every class"
NONE = "none"
AXES = {"guidance": "scale", "steps": "steps", "seed": "seed", "time shift": "shift", "class": "label",
        "run": "run"}
FIELDS = tuple("run beside label count seed steps solver scale low high shift ema".split())  # noqa: SIM905


def build(root: Path) -> share.Tab:
    """Lay the tab out. root: folder of runs."""
    with share.columns("sample") as tab:
        run = models.dropdown(root, models.GENERATORS, "diffusion or ar run")
        beside = models.dropdown(root, models.GENERATORS, "beside it, from the same noise", NONE)
        classes = [EVERY, *models.class_names(root, run.value)]
        what = "class; of a run that reads text: a prompt, chosen or typed"
        label = gr.Dropdown(classes, value=EVERY, label=what, allow_custom_value=True)
        count = gr.Slider(1, 16, 2, step=1, label="samples per class")
        with gr.Row():
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=SEED, min_width=70)
            dice = gr.Button("random seed", size="sm", min_width=70)
        with gr.Row():
            steps = gr.Slider(1, 250, 20, step=1, label="steps", min_width=130)
            scale = gr.Slider(0, 8, 1.5, step=0.1, label="guidance (1: off)", min_width=130)
        with gr.Accordion("Sampler, interval of guidance, time shift, weights", open=False):
            solver = gr.Radio(["euler", "heun", "sde"], value="euler", label="sampler")
            low = gr.Slider(0, 1, 0.0, step=0.05, label="guided from t (0: data)")
            high = gr.Slider(0, 1, 1.0, step=0.05, label="to t (1: noise)")
            shift = gr.Slider(0.1, 10, 1.0, step=0.1, label="time shift (above 1: more steps at noise)")
            ema = gr.Checkbox(True, label="EMA weights")
        with gr.Accordion("A table: one setting against another", open=False):
            with gr.Row():
                across = gr.Dropdown(list(AXES), value="guidance", label="across", min_width=100)
                look = {"max_length": 300, "min_width": 100}
                columns = gr.Textbox("1, 1.5, 3", label="values", **look)
            with gr.Row():
                down = gr.Dropdown(list(AXES), value="steps", label="down", min_width=100)
                rows = gr.Textbox("5, 20", label="values (runs: empty for all)", **look)
            table = gr.Button("sample the table")
        with gr.Group(visible=run.value is None) as nothing:
            gr.Markdown("There is no diffusion run here yet. A small one takes one to two minutes.")
            make = gr.Button("train a small diffusion run now")
            progress = gr.Markdown()
    with tab.right:
        with gr.Accordion("The last calls of this page", open=False):
            before = gr.HTML()
        history = gr.State([])

    def sample(run: str, beside: str, label: str, count: int, seed: int, steps: int, solver: str,
               scale: float, low: float, high: float, shift: float, ema: bool,
               history: list[str] | None = None):
        """Samples of a run, streamed as they form (codes as they are drawn); the last message has all.

        run, beside: ids of diffusion runs ("none": only one). label: a class's name or number, or a prompt.
        count: images per class. Guidance acts for t in [low, high], t = 0 data, t = 1 noise. Returns HTML, a
        PNG grid, a link, Python lines, the state as JSON, the last calls.
        """
        values = (run, beside, label, count, seed, steps, solver, scale, low, high, shift, ema)
        call = dict(zip(FIELDS, values, strict=True))
        ids = [run] if beside in (None, "", NONE) else [run, beside]
        if run == beside:
            raise problem("Both sides show the same run; choose another one beside it, or none.")
        began, classes, streams, loaded, hows = time.monotonic(), {}, {}, {}, {}
        for run_id in ids:
            loaded[run_id], classes[run_id], hows[run_id] = _call(root, call | {"run": run_id})
            streams[run_id] = api.sample(loaded[run_id].model, classes[run_id], previews=16, **hows[run_id])
        newest: dict[str, api.Preview] = {}
        with closing(interpolate.together(streams)) as stream:  # a job that ends early closes the samplers
            for newest in until_stopped(stream):
                html = _cards(newest, loaded, classes, ema, time.monotonic() - began)
                yield {tab.shown: html}
        done = all(preview.final for preview in newest.values())
        state = _state(call)
        pictures = [primitives.tile(preview.images, columns=8, scale=1) for preview in newest.values()]
        html = _cards(newest, loaded, classes, ema, time.monotonic() - began, not done)
        calls = [_past(loaded[run], state, pictures[0], done), *(history or [])][:8]
        code = ["import vfmlab", "", *(_line(i, classes[i], hows[i], ema, root) for i in ids)]
        shared = share.outputs("sample", state, code, cards.stack(pictures))
        yield html, *shared, calls, cards.cards(calls)

    def sample_table(run: str, beside: str, label: str, count: int, seed: int, steps: int, solver: str,
                     scale: float, low: float, high: float, shift: float, ema: bool, across: str,
                     columns: str, down: str, rows: str):
        """One picture per pair of settings, `across` by `down`: guidance, steps, seed, shift, class, run.

        columns, rows: their values with commas between; empty runs: all. The rest as in sample. Returns
        HTML, a PNG, a link, Python lines, the state as JSON.
        """
        values = (run, NONE, label, 1, seed, steps, solver, scale, low, high, shift, ema)
        call = dict(zip(FIELDS, values, strict=True))
        xs, ys = _values(root, across, columns, settings), _values(root, down, rows, settings)
        if across == down or len(xs) * len(ys) > MOST:
            size = f"{len(xs)} x {len(ys)} of {across}, {down}"
            raise problem(f"A table has two different settings and at most {MOST} cells, not {size}.")
        began, images, calls, cells = time.monotonic(), [], [], [["" for _ in xs] for _ in ys]
        for row, (_, y) in enumerate(ys):
            for column, (_, x) in enumerate(xs):
                if stopped():
                    break
                one, labels, how = _call(root, call | {AXES[across]: x, AXES[down]: y})
                if one.model.run.ar is not None and (only := {across, down} & {"steps", "time shift"}):
                    raise problem(f"'{one.name}' draws codes one after the other and has no {min(only)}; "
                                  "choose another setting for the table.")
                *_, last = api.sample(one.model, labels[:1], previews=0, **how)
                images.append(primitives.tile(last.images, scale=1))
                calls.append((one.model.folder.id, labels[:1], how))
                caption = "; ".join(filter(None, (one.model.class_names[labels[0]], last.note)))
                cells[row][column] = cards.figure(last.images, caption)
                yield {tab.shown: _table(xs, ys, cells, across, down, time.monotonic() - began)}
        total = len(xs) * len(ys)
        early = f"stopped at cell {len(images)} of {total}; " if len(images) < total else ""
        html = _table(xs, ys, cells, across, down, time.monotonic() - began, early)
        lines = ["import vfmlab", "", "calls = [", *(f"    {call!r}," for call in calls), "]"]
        given = f"run, labels, ema={ema}, root={str(root)!r}, **how"
        lines += ["for run, labels, how in calls:", f"    *_, last = vfmlab.sample({given})  # last.images"]
        state = _state(call) | {"across": across, "columns": columns, "down": down, "rows": rows}
        yield html, *share.outputs("sample", state, lines, cards.stack(images))

    def train():
        for event, line, images in until_stopped(bundled.make(root)):
            change = {progress: line, nothing: gr.update(visible=event != "finish")}
            if images is not None:
                picture = cards.figure(primitives.tile(images, columns=8), "samples while it trains")
                card = cards.card("a small diffusion run", None, [picture], facts=line)
                change[tab.shown] = cards.cards([card])
            yield change
        new = models.choices(root, *models.GENERATORS)
        value = {"value": new[0][1]} if new else {}
        line = "" if new else f"stopped: {line}; press again to go on"
        yield {progress: line, run: gr.update(choices=new, **value),
               beside: gr.update(choices=beside.fresh()), nothing: gr.update(visible=not new)}

    def names_of(run_id: Any, chosen: Any):
        names = [EVERY, *models.class_names(root, run_id)]
        return gr.update(choices=names, value=chosen if models.fits(root, run_id, chosen, names) else EVERY)

    run.change(names_of, [run, label], label, **LIGHT)
    dice.click(lambda: random.randint(0, SEED), None, seed, **LIGHT)
    fields = run, beside, label, count, seed, steps, solver, scale, low, high, shift, ema
    settings = dict(zip(FIELDS, fields, strict=True))
    inputs = [*fields, across, columns, down, rows]
    table.click(sample_table, inputs, [tab.shown, *tab.panel], api_name="sample_table", **COMPUTE)
    make.click(train, None, [progress, tab.shown, run, beside, nothing], api_visibility="private", **COMPUTE)

    outputs = [tab.shown, *tab.panel, history, before]
    one = share.connect("sample", sample, tab, [*fields, history], outputs, ("label", "columns", "rows"))
    axes = {"across": across, "columns": columns, "down": down, "rows": rows}
    return replace(one, fields={**one.fields, **axes})


def _call(root: Path, call: dict[str, Any]) -> tuple[models.Shown, list[int], dict[str, Any]]:
    """The run, labels and arguments of `api.sample` for a call's fields, all checked."""
    low, high, count = call["low"], call["high"], call["count"]
    if low >= high:
        raise problem(f"The guidance interval is empty: it begins at t = {low:g} and ends at t = {high:g}.")
    one = models.opened(root, call["run"], *models.GENERATORS, ema=call["ema"])
    how: dict[str, Any] = {"seed": call["seed"], "guidance": {"scale": call["scale"]}}
    if one.model.run.ar is None:  # a generator of tokens takes one step a token, guided by scale alone
        how["steps"], how["guidance"]["interval"] = call["steps"], [low, high]
        how["sampler"] = {"solver": call["solver"], "shift": call["shift"]}
    if call["label"] in (None, EVERY):
        classes = min(one.model.num_classes, MOST)
        return one, [i for i in range(classes) for _ in range(min(count, MOST // classes))], how
    if one.model.run.protocol.prompts is not None:
        how["prompts"] = [text(call["label"])]
        return replace(one, model=one.model.prompted(how["prompts"])), [0] * count, how
    return one, [models.class_index(one.model, call["label"])] * count, how


def _line(run: str, labels: list[int], how: dict[str, Any], ema: bool, root: Path) -> str:
    """The Python that draws what one side shows."""
    given = ", ".join(f"{k}={v!r}" for k, v in {**how, "ema": ema, "root": str(root)}.items())
    return f"*_, last = vfmlab.sample({run!r}, {labels}, {given})  # last.images"


def _state(call: dict[str, Any]) -> dict[str, Any]:
    return call | {"beside": call["beside"] or NONE, "label": str(call["label"] or EVERY)}


def _values(root: Path, axis: Any, values: Any, fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """(heading, value) of the values of one side of a table."""
    if axis not in AXES:
        raise problem(f"There is no setting '{str(axis)[:60]}'; choose one of {', '.join(AXES)}.")
    parts = listed(text(values))
    if axis == "run":
        known = dict(models.choices(root, *models.GENERATORS))
        ids = [known.get(part, part) for part in parts] or list(known.values())
        return [(models.shown(root, i).name, i) for i in models.several(root, ids, *models.GENERATORS)]
    if not parts:
        raise problem(f"Give values of {axis}, with commas between.")
    taken = [checked(fields[AXES[axis]], part) for part in parts]  # a whole number, where the setting is one
    return [(f"{axis} {f'{one:g}' if isinstance(one, float) else one}", one) for one in taken]


def _cards(newest, loaded, labels, ema, seconds: float, early: bool = False) -> str:
    """A card per run with its newest images, each under the name of its class."""
    parts = []
    for run_id, preview in newest.items():
        state = cards.state(preview, early)
        state += "" if preview.final or early else f", t = {preview.t:.2f}"
        state += f"; {preview.note}" if preview.note else ""
        titles = [loaded[run_id].model.class_names[label] for label in labels[run_id]]
        figures = [cards.figure(preview.images[i : i + 1], title) for i, title in enumerate(titles)]
        n, _, px, _ = preview.images.shape
        weights = f"{'EMA' if ema else 'raw'} weights, {seconds:.1f} s"
        others = [one.model for one in loaded.values()]
        alike = len(others) == 1 or (all(model.run.ar is None for model in others)
                                     and len({model.tokenizer.latent_shape for model in others}) == 1)
        classes = loaded[run_id].model.num_classes
        cut = f"; the first {MOST} of {classes} classes" * (len(set(labels[run_id])) == MOST < classes)
        same = "; the same place, the same noise" * alike
        facts = f"{state}; N = {n}, {px} px, {weights}{cut}{same}"
        parts.append(loaded[run_id].card(figures, facts, many=True))
    return cards.cards(parts)


def _table(xs, ys, cells, across: str, down: str, seconds: float, state: str = "") -> str:
    rows = [(name, row) for (name, _), row in zip(ys, cells, strict=True)]
    grid = f'<figure class="wide">{cards.table([name for name, _ in xs], rows)}</figure>'
    facts = f"{state}N = 1 a cell, {seconds:.1f} s; one seed is one noise"
    return cards.cards([cards.card(f"{across} across, {down} down", None, [grid], (), facts, full=True)])


def _past(one: models.Shown, state: dict[str, Any], picture: Any, done: bool) -> str:
    """A card of the history: a small picture, the settings, and the link back to them."""
    solver = "" if one.model.run.ar is not None else f"{state['steps']} steps, {state['solver']}, "
    steps = f"{solver}guidance {state['scale']:g}"
    line = f"{state['label']}, seed {state['seed']}, {steps}" + ("" if done else ", stopped")
    link = f'<figcaption><a href="{share.href("sample", state)}">these settings</a></figcaption>'
    return one.card([cards.figure(picture, line), link], "")
