"""The model card of an export: where weights come from, whose they are, and what was measured under which
protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from huggingface_hub import ModelCardData

from vfmlab import config, runs, vfm
from vfmlab.evaluation.number import Report, of_run

HUB_LICENCES = ("mit", "apache-2.0", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
                "cc-by-nc-sa-4.0", "openrail")
UNSTATED = "not stated"
DRAWN = "drawn by vfmlab's own code, without rights of others"


def card(run: config.Phase, folders: Sequence[runs.RunDir], count: int, facts: Mapping[str, str],
         usage: Sequence[str], library: str, licence: str | None, data_licence: str | None) -> str:
    """README.md of an export.

    Args:
        run: as exported. folders: the run's directory, and its tokenizer's where it is a generator.
        count: numbers in the weights. facts: their metadata. usage: lines of Python that load and use them.
        library: the hub's name of what loads them. licence, data_licence: of weights and images, as stated.
    """
    t, generator = run.tokenizer, run.generator
    latent = t.latent_text(run.data.size)
    kind = "image-tokenizer" if generator is None else "image-generation"
    what = f"A visual tokenizer made with vfmlab: images of {run.data.size} x {run.data.size} px to "
    if generator is not None:
        what = f"A latent generator made with vfmlab, with its tokenizer: images of {run.data.size} px from "
    head = ModelCardData(library_name=library, **_licence(licence), tags=["vfmlab", kind, t.method])
    lines = ["---", head.to_yaml(), "---", "", f"# {folders[0].id}", "",
             f"{what}latents of {latent.partition(' (')[0]}{' and back' if generator is None else ''}.",
             "", "```python", *usage, "```", "", "| | |", "|---|---|"]
    rows = {"method": t.method, "latent": latent, "numbers in the weights": f"{count:,}"}
    if generator is not None:
        rows["network"] = generator.network.kind
    rows |= _vfm_rows(run, facts)
    rows |= _origin_rows(run, facts)
    rows["images of the latent statistics"] = facts.get("fingerprint") or "unknown"
    drawn = run.data.source.partition(":")[0] == "scenes"
    rows["licence of the training images"] = (
        data_licence or (DRAWN if drawn else f"{UNSTATED} by who exported these weights"))
    rows["licence of these weights"] = licence or f"{UNSTATED} by who exported them"
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    for folder in folders:
        title = "Evaluation" if folder is folders[0] else f"Evaluation of the tokenizer, {folder.id}"
        lines += ["", *_numbers(of_run(folder), title)]
    return "\n".join([*lines, ""])


def _licence(licence: str | None) -> dict[str, str]:
    if not licence or licence == UNSTATED:
        return {}
    return ({"license": licence} if licence in HUB_LICENCES
            else {"license": "other", "license_name": licence.lower().replace(" ", "-")})


def _vfm_rows(run: config.Phase, facts: Mapping[str, str]) -> dict[str, str]:
    if run.vfm is None:
        return {"vision foundation model": "none"}
    row = vfm.facts(run.vfm.name)
    hub = f", `{row.hub}`" if row.hub else ", bundled with vfmlab"
    if row.shipped is not None:
        hub = f", shipped by the package `{row.shipped.package}`; {row.shipped.origin}"
    weights = ("random weights" if run.vfm.weights == "random"
               else f"fingerprint {facts.get('vfm_fingerprint', 'unknown')}")
    return {"vision foundation model": f"{run.vfm.name}{hub} ({weights})",
            "licence of that model": row.licence}


def _origin_rows(run: config.Phase, facts: Mapping[str, str]) -> dict[str, str]:
    rows = {}
    if facts.get("imported"):
        where = (f": `{facts['imported_file']}` of `{facts['imported_repo']}`" if facts.get("imported_repo")
                 else ", from a file given by hand")
        rows["imported"] = f"{facts['imported']}{where} (SHA-256 {facts['imported_sha256']})"
        rows["licence of that release"] = facts.get("licence", UNSTATED)
    if facts.get("tokenizer") and run.generator is None:
        rows["tuned"] = f"together with a generator (REPA-E), from {facts['tokenizer']}"
    if run.recipe.stages:
        rows["stages"] = ", ".join(stage.name for stage in run.recipe.stages)
    if run.imported is None:
        rows["trained on"] = f"{run.data.source}, {int(facts.get('samples', 0)):,} images seen"
    if run.imported is None and run.generator is None:
        rows["losses"] = ", ".join(f"{name} {term.weight:g}" for name, term in run.losses.items())
    return rows


def _numbers(report: Report | None, title: str) -> list[str]:
    if report is None:
        return [f"## {title}", "", "Not measured."]
    lines = [f"## {title}", "",
             "Numbers of one protocol hash can be compared with each other, others cannot. Whole protocol: "
             f"`{report.hash}`.",
             "", "| metric | value | spread | better | images | protocol |", "|---|---|---|---|---|---|"]
    for name, one in report.measured.items():
        spread = "" if one.spread is None else f"{one.spread:.4g}"
        cells = (name, f"{one.value:.4g}", spread, one.better or "", one.n or "", f"`{one.protocol or ''}`")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    used = {one.protocol for one in report.measured.values()} | {report.hash}
    lines += ["", "| protocol | what it means |", "|---|---|"]
    for digest, protocol in report.protocols.items():
        if digest in used:
            shown = {**protocol,
                     "images": {k: v for k, v in protocol.get("images", {}).items() if k != "source"}}
            lines.append(f"| `{digest}` | `{json.dumps(shown, separators=(', ', ': '))}` |")
    return lines
