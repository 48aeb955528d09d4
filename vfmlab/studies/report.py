"""One HTML page about a set of finished runs: figures, numbers with their protocol, configs. Needs no network to be read."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path

import plotly.graph_objects as go

from vfmlab import api, config, runs, vfm
from vfmlab.plots import figures, primitives

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1b1f23; background: #fff; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.note { color: #57606a; font-size: .9rem; } .figure { overflow-x: auto; }
details { margin: .4rem 0; } pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


def write(chosen: Mapping[str, config.Recipe], root: str | Path, target: Path, seed: int = 0, title: str = "vfmlab report") -> Path:
    """Write the page for `chosen` (name -> run whose phases are all trained) and return its path."""
    sections: list[tuple[str, str, go.Figure]] = []
    folders = {name: runs.open_run(run.id, root) for name, run in chosen.items()}
    tokenizers = {name: api.load_tokenizer(run.id, root) for name, run in chosen.items()}
    reports = {name: api.evaluate(run.id, root) for name, run in chosen.items()}
    latent_reports = {name: api.evaluate(run.tokenizer_phase.id, root) for name, run in chosen.items()}
    first = next(iter(chosen.values()))
    images, _, _ = figures.examples(first.data, 8, seed)

    with_vfm = next((run for run in chosen.values() if run.vfm is not None), None)
    if with_vfm is not None:
        model = vfm.build(with_vfm.vfm, with_vfm.data.size)
        sections.append(("What the frozen VFM sees", "Principal components of the features, early to late layers.", figures.feature_maps(model, images)))
    sections.append(("Reconstructions", "The same held-out images through each tokenizer; errors four times enlarged.", figures.reconstructions(tokenizers, images)))
    sections.append(("Reconstruction in numbers", _protocol_note(latent_reports), primitives.table(figures.report_rows(latent_reports))))
    sections.append(("Decoding of disturbed latents", "PSNR when noise is added to the normalised latent.", figures.robustness(latent_reports)))
    diffusion = {name: folder for name, folder in folders.items() if folder.config().diffusion is not None}
    if diffusion:
        sections.append(("Samples, one per class, same noise in every row", _sampler_note(first), primitives.rows(
            {f"{name}{word}": figures.class_samples(folder.path, root, seed=seed, **how)
             for word, how in (("", {}), (", guidance 2.5", {"guidance": 2.5})) for name, folder in diffusion.items()})))
        sections.append(("Quality over training", "Measured on EMA weights during training.", figures.convergence(list(diffusion.values()))))
        sections.append(("Generation in numbers", _protocol_note(reports), primitives.table(figures.report_rows(reports))))
        sections.append(("Reconstruction against generation", "Each point is a run.", figures.trade_off(reports)))
    phases = [phase for run in chosen.values() for phase in run.phases() if phase.imported is None]
    for kind in ("tokenizer", "diffusion"):
        part = [runs.open_run(phase.id, root) for phase in phases if phase.kind == kind]
        if part:
            sections.append((f"Training curves: {kind}", "One panel per metric, one line per run (of a recipe in stages: per stage).", figures.training_curves(part)))

    body = [f"<h1>{html.escape(title)}</h1>", f"<p>Images: <code>{html.escape(first.data.source)}</code> at {first.data.size} px. "
            f"Runs: {', '.join(f'<code>{html.escape(f.id)}</code>' for f in folders.values())}.</p>"]
    for i, (heading, note, figure) in enumerate(sections):
        body.append(f'<h2>{html.escape(heading)}</h2><p class="note">{html.escape(note)}</p><div class="figure">{primitives.fragment(figure, first=i == 0)}</div>')
    body.append("<h2>Configs and protocols</h2>")
    for name, run in chosen.items():
        body.append(f"<details><summary>{html.escape(name)}: config of <code>{run.id}</code></summary><pre>{html.escape(run.model_dump_json(indent=1))}</pre></details>")
    for name, report in {**{f"{k} (tokenizer)": v for k, v in latent_reports.items()}, **reports}.items():
        body.append(f"<details><summary>{html.escape(name)}: protocol <code>{report['hash']}</code></summary>"
                    f"<pre>{html.escape(json.dumps(report['protocol'], indent=1))}</pre></details>")
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>")
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomic(target, page)
    return target


def _protocol_note(reports: Mapping[str, Mapping]) -> str:
    parts = [f"{name}: protocol {report['hash']}" for name, report in reports.items()]
    return "Numbers are comparable within one protocol hash. " + "; ".join(parts) + "."


def _sampler_note(run: config.Recipe) -> str:
    p = run.protocol
    return f"{p.sampler.solver}, {p.sampler.steps} steps, guidance {p.guidance.scale:g}, EMA weights."
