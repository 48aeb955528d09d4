"""What came out of the rows of a comparison, as plain records: numbers with their protocols, curves, costs, sizes."""

from __future__ import annotations

import fnmatch
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vfmlab import api, runs
from vfmlab.errors import VfmlabError
from vfmlab.evaluation.protocol import BETTER, HIGHER, rank
from vfmlab.runs import finished
from vfmlab.studies.rows import Row
from vfmlab.training import plan

METRICS = {  # report metric -> column; reconstruction first, because it bounds what follows
    "psnr": "PSNR (dB)", "psnr_mask": "PSNR in mask", "ssim": "SSIM", "lpips": "LPIPS", "feature_distance": "feature distance", "rfd": "rFD",
    "probe_linear": "linear probe", "probe_knn": "kNN", "gfd": "gFD", "gfd_own": "gFD to own rec.", "class_accuracy": "class accuracy",
}  # fmt: skip
CURVES = ("gfd", "gfd_own", "class_accuracy")
Result = dict[str, Any]


def collect(rows: Sequence[Row], root: str | Path, failed: Mapping[str, str] | None = None) -> list[Result]:
    """One record per row: {"label", "seed", "run", "metrics", "stages", "curve", "seconds", "parameters", "latent", ...}.

    metrics: {name: {"value", "protocol", "n"}} of the last stage of the tokenizer and of the diffusion model; what could
    not be measured stands in "absent" with the reason. stages: the same for every trained phase. "failed": why a row, or
    its later phases, could not be had, else None; what it has is there.
    """
    built: dict[str, dict[str, Any]] = {}  # seeds of a row have one size
    return [_row(row, Path(root), dict(failed or {}), built) for row in rows]


def _row(row: Row, root: Path, failed: dict[str, str], built: dict[str, dict[str, Any]]) -> Result:
    last = row.phases[-1]
    result: Result = {
        "label": row.label, "seed": row.seed, "run": last.id, "data": f"{_bare(row.run.data.source)}, {row.run.data.size} px", "hash": None, "protocol": None,
        "metrics": {}, "absent": {}, "stages": [], "curve": [], "seconds": {}, "parameters": None, "latent": None, "failed": failed.get(last.id),
    }  # fmt: skip
    try:
        built[row.label] = built.get(row.label) or sizes(row)
        result |= built[row.label]
    except VfmlabError as error:
        result["failed"] = result["failed"] or str(error)  # the reason of the training first: it comes from the same config
    for phase in row.phases:
        folder = runs.RunDir(root / phase.id)
        if not finished(phase, root):
            if not result["failed"]:
                state = folder.status() if (root / phase.id).is_dir() else None
                result["failed"] = f"run '{phase.id}' is not finished ({f'{state.state}: {state.message}'.strip(': ') if state else 'not begun'})"
            break
        try:
            report = api.evaluate(phase.id, root)
        except Exception as error:  # whatever it is: the other rows must come out
            result["failed"] = result["failed"] or f"evaluation of run '{phase.id}': {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            break
        metrics = {k: {"value": v["value"], "protocol": v["protocol"], "n": v["n"]} for k, v in report["metrics"].items() if v.get("value") is not None}
        spent = folder.status().seconds
        result["seconds"][phase.kind] = round(result["seconds"].get(phase.kind, 0.0) + spent, 1)
        result["stages"].append({"stage": phase.stage, "kind": phase.kind, "run": phase.id, "seconds": round(spent, 1), "metrics": metrics})
        if phase.diffusion is None:
            result["metrics"], result["absent"] = {}, {}
        result["metrics"] |= metrics
        result["absent"] |= {k: _brief(v.get("reason", "")) for k, v in report["metrics"].items() if v.get("value") is None}
        images = report["protocol"]["images"]
        result["hash"], result["protocol"] = report["hash"], report["protocol"] | {"images": images | {"source": _bare(images["source"])}}
        if phase.diffusion is not None:
            curve = [{k: v.get("value") if isinstance(v, dict) else v for k, v in r.items()} for r in folder.metrics("evaluation")]
            result["curve"] = [{k: r.get(k) for k in ("samples", *CURVES)} for r in curve]
    result["failed"] = result["failed"] and result["failed"].replace(f"{root}/", "")
    return result


def _bare(source: str) -> str:
    """A data source without the folders of this machine: a page is read elsewhere."""
    kind, colon, rest = source.partition(":")
    return f"{kind}{colon}{Path(rest).name if kind in ('folder', 'parquet', 'wds') else rest}"


def _brief(reason: str) -> str:
    """What is missing, without what to do about it on this machine."""
    return reason.partition(";")[0].partition(" (")[0]


def sizes(row: Row) -> dict[str, Any]:
    """{"latent": [C, h, w], "parameters": {"trained", "tokenizer", "decoder", "vfm"}} of the tokenizer, built without storage.

    trained: parameters that any stage trains; tokenizer: all of them, without the VFM it reads, which stands apart.
    """
    tokenizer = plan.empty_tokenizer(row.run)
    stages = [phase for phase in row.tokenizers if phase.imported is None]  # that one is not trained
    globs = {glob for phase in stages for glob in phase.trains}
    counts = {name: p.numel() for name, p in tokenizer.named_parameters()}
    free = {name for name, p in tokenizer.named_parameters() if p.requires_grad}
    trained = sum(n for name, n in counts.items() if name in free and any(fnmatch.fnmatchcase(name, glob) for glob in globs))
    vfm = 0 if tokenizer.vfm is None else sum(p.numel() for p in tokenizer.vfm.parameters())
    decoder = sum(n for name, n in counts.items() if name.startswith("decoder."))
    return {"latent": list(tokenizer.latent_shape), "parameters": {"trained": trained, "tokenizer": sum(counts.values()), "decoder": decoder, "vfm": vfm}}


def means(results: Sequence[Result], metric: str) -> dict[str, list[float]]:
    """label -> the values of its seeds, in the order of the seeds; labels without the number are left out."""
    values: dict[str, list[float]] = {}
    for r in sorted(results, key=lambda r: r["seed"]):
        if metric in r["metrics"]:
            values.setdefault(r["label"], []).append(float(r["metrics"][metric]["value"]))
    return {label: values[label] for label in dict.fromkeys(r["label"] for r in results) if label in values}


def best(results: Sequence[Result], metric: str) -> str | None:
    """The label with the best mean; None with fewer than two labels. Raises ConfigError across protocols."""
    values = means(results, metric)
    if len(values) < 2:
        return None
    hashes = {r["label"]: r["metrics"][metric]["protocol"] for r in results if metric in r["metrics"]}
    return rank({k: {metric: {"value": statistics.fmean(v), "protocol": hashes[k]}} for k, v in values.items()}, metric)[0][0]


def spread(values: Sequence[float]) -> str:
    """Mean and, in brackets, every value; from four values on mean ± standard deviation."""
    text = f"{statistics.fmean(values):.3g}"
    if len(values) == 1:
        return text
    return f"{text} ± {statistics.stdev(values):.2g}" if len(values) > 3 else f"{text} ({', '.join(f'{v:.3g}' for v in values)})"


def records(results: Sequence[Result], mark: str = "{}") -> list[dict[str, str]]:
    """One table row per label: all metrics there are (mean and spread), seconds, parameters, latent shape.

    mark: how the best of a column is written, for example "**{}**". All results must belong to one of :func:`groups`.
    """
    used = [k for k in METRICS if any(k in r["metrics"] for r in results)]
    columns = {k: (means(results, k), best(results, k)) for k in used}
    table = []
    for label in dict.fromkeys(r["label"] for r in results):
        mine = [r for r in results if r["label"] == label]
        row = {"row": label}
        for k, (values, top) in columns.items():
            text = spread(values[label]) if label in values else "–"
            row[METRICS[k]] = mark.format(text) if label == top else text
        seconds = [r["seconds"]["tokenizer"] for r in mine if "tokenizer" in r["seconds"]]
        row["tokenizer seconds"] = f"{statistics.fmean(seconds):,.0f}" if seconds else "–"
        parameters, latent = mine[0]["parameters"], mine[0]["latent"]
        row["parameters trained / all"] = f"{parameters['trained']:,} / {parameters['tokenizer']:,}" if parameters else "–"
        row["VFM"] = f"{parameters['vfm']:,}" if parameters and parameters["vfm"] else "–"
        row["latent"] = " x ".join(map(str, latent)) if latent else "–"
        table.append(row)
    return table


def stage_records(results: Sequence[Result]) -> list[dict[str, str]]:
    """One table row per stage of every recipe that has more than one: what each stage bought."""
    table = []
    for label in dict.fromkeys(r["label"] for r in results):
        mine = [[s for s in r["stages"] if s["kind"] == "tokenizer"] for r in sorted(results, key=lambda r: r["seed"]) if r["label"] == label]
        names = list(dict.fromkeys(s["stage"] for stages in mine for s in stages))
        if len(names) < 2:
            continue
        for name in names:
            at = [s for stages in mine for s in stages if s["stage"] == name]
            row = {"row": label, "after stage": name}
            for k in METRICS:
                values = [s["metrics"][k]["value"] for s in at if k in s["metrics"]]
                if values:
                    row[METRICS[k]] = spread(values)
            table.append(row | {"seconds": f"{statistics.fmean(s['seconds'] for s in at):,.0f}"})
    return table


def curve_records(results: Sequence[Result], key: str) -> list[dict[str, str]]:
    """One table row per label: a metric over training, one column per number of images seen by the diffusion model."""
    points = sorted({p["samples"] for r in results for p in r["curve"] if p.get(key) is not None})
    table = []
    for label in dict.fromkeys(r["label"] for r in results) if points else ():
        row = {"row": label}
        for point in points:
            values = [p[key] for r in results if r["label"] == label for p in r["curve"] if p["samples"] == point and p.get(key) is not None]
            row[f"{point:,}"] = spread(values) if values else "–"
        table.append(row)
    return table


def arrow(metric: str) -> str:
    """Which end of a metric is good, for a column's head."""
    return "↑" if BETTER[metric] == HIGHER else "↓"
