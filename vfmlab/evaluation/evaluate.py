"""A run's report: every number its kind of run has, with the protocols they were measured under, as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vfmlab import config, runs
from vfmlab.errors import DataError, RunError
from vfmlab.evaluation import probes
from vfmlab.evaluation.features import open_space
from vfmlab.evaluation.frechet import few_samples_warning
from vfmlab.evaluation.generation import evaluate_generation
from vfmlab.evaluation.protocol import Report, Resolved, Setup, dump, open_setup
from vfmlab.evaluation.reconstruction import Measured, Progress, evaluating, measure
from vfmlab.evaluation.representation import QUANTILE, cknna, prepare
from vfmlab.tokenizers.base import Tokenizer

CURVES = ("noise_psnr",)
ALIGNMENT = {"measure": "cknna", "k": 10, "quantile": QUANTILE, "pool": "token mean"}


def tokenizer_report(
    tokenizer: Tokenizer,
    cfg: config.Data,
    protocol: config.Protocol,
    setup: Setup | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconstruction numbers, probes of the latents, and their alignment with the protocol's feature space.

    Returns:
        {"kind", "protocol", "hash", "metrics": {name: {"value", "protocol", "n", "spread"?, "reason"?}}, "curves",
        "protocols": {hash: protocol}, "warnings": [...], "seconds"}. `hash` is that of the whole protocol; each metric
        carries the hash of the part it depends on.
    """
    started = time.perf_counter()
    setup = setup or open_setup(cfg, protocol, device=tokenizer.stat_mean.device)
    measured = measure(tokenizer, cfg, protocol, setup, progress)
    _latents(measured, tokenizer, setup)
    return _assemble("tokenizer", measured.report, setup.resolved(), setup, started)


def diffusion_report(
    network: Any,
    tokenizer: Tokenizer,
    cfg: config.Data,
    protocol: config.Protocol,
    num_classes: int,
    setup: Setup | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generation numbers with the tokenizer's own beside them; a dict as in :func:`tokenizer_report`."""
    started = time.perf_counter()
    setup = setup or open_setup(cfg, protocol, device=tokenizer.stat_mean.device)
    baseline = measure(tokenizer, cfg, protocol, setup)
    report = baseline.report
    numbers = evaluate_generation(network, tokenizer, cfg, protocol, num_classes, progress, setup, baseline)
    curves = {name: report.numbers[name] for name in CURVES}
    report.numbers = numbers | curves
    resolved = setup.resolved(sampling=True)
    report.protocols[resolved.hash] = resolved.as_dict()
    return _assemble("diffusion", report, resolved, setup, started)


def _latents(measured: Measured, tokenizer: Tokenizer, setup: Setup) -> None:
    """Probes on latents, and CKNNA between token-mean latents and the feature space of the real images."""
    report, z, n = measured.report, measured.latents, len(measured.latents)
    resolved, seed = setup.resolved(), setup.protocol.seed
    if setup.source.num_classes < 2:
        report.absent("probe_linear", "the data has no classes")
        report.absent("probe_knn", "the data has no classes")
    elif int(tokenizer.stat_count) == 0:
        report.absent("probe_linear", "the tokenizer has no latent statistics yet")
        report.absent("probe_knn", "the tokenizer has no latent statistics yet")
    else:
        with evaluating(tokenizer):
            train, labels = probes.training_latents(tokenizer, setup.cfg, seed, setup.protocol.batch)
        scores = probes.probe_split(train, labels, z, measured.labels)
        section = Resolved({**resolved.of("images").sections, "latents": probes.FACTS | {"test_images": n}})
        report.add("probe_linear", scores["linear"], section, n, chance=scores["chance"])
        report.add("probe_knn", scores["knn"], section, n, chance=scores["chance"])
    section = Resolved({**resolved.sections, "latents": ALIGNMENT | {"test_images": n}})
    try:
        report.add("cknna", cknna(prepare(z), prepare(measured.real.features()[:n])), section, n)
    except DataError as error:
        report.absent("cknna", str(error))


def _assemble(kind: str, report: Report, resolved: Resolved, setup: Setup, started: float) -> dict[str, Any]:
    metrics = {name: entry for name, entry in report.numbers.items() if name not in CURVES}
    warnings = [few_samples_warning(resolved.sections["images"]["n"])]
    wanted, there, bad = setup.protocol.n, len(setup.source), setup.source.bad
    if wanted > there:
        warnings.append(f"protocol.n {wanted} is more than the {there} held-out images; all of them were used")
    if bad:
        warnings.append(f"{len(bad)} images could not be read and were replaced, e.g. {bad[0]}")
    return {
        "kind": kind,
        "protocol": resolved.as_dict(),
        "hash": resolved.hash,
        "metrics": metrics,
        "curves": {name: report.numbers[name] for name in CURVES},
        "protocols": report.protocols,
        "warnings": [line for line in warnings if line],
        "seconds": round(time.perf_counter() - started, 2),
    }


# -- reports on disk ---------------------------------------------------------------------------------------------------


def request(run: config.Phase, folder: runs.RunDir) -> str:
    """Digest of what is asked for: protocol, data, judge and the weights' age. Equal requests have equal answers."""
    protocol = {key: value for key, value in dump(run.protocol).items() if key != "batch"}
    judge = run.protocol.features.partition(":")[0] == "judge"  # opened in no time; a new one makes old reports stale
    version = open_space(run.protocol.features, run.data.size, folder.path.parent).version if judge else ""
    return config.digest([protocol, run.data.model_dump(mode="json"), folder.status().samples, version])


def cached(
    run: config.Phase,
    folder: runs.RunDir,
    load: Callable[..., Any],
    again: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The report of a run under `run.protocol`: read where it was measured before, else measured and written.

    report.json holds the report under the run's own protocol; others lie beside it in reports/.

    Args:
        run: config of the run, its protocol perhaps changed. folder: its directory. load: gives the tokenizer, or the
        loaded diffusion model (`.network`, `.tokenizer`, `.num_classes`); called with `ema=False` for raw weights.

    Raises:
        RunError: neither a tokenizer nor a diffusion run.
    """
    if run.tokenizer is None:
        raise RunError(f"run '{folder.id}' is a {run.kind} run; only tokenizer and diffusion runs have a report")
    key = request(run, folder)
    own = run.protocol == folder.config().protocol
    beside = folder.path / "reports" / f"{key}.json"
    if not again:
        kept = folder.report() if own else _read(beside)
        if isinstance(kept, dict) and kept.get("request") == key:
            return kept
    loaded = load() if run.protocol.ema else load(ema=False)
    device = (loaded if run.diffusion is None else loaded.tokenizer).stat_mean.device
    setup = open_setup(run.data, run.protocol, folder.path.parent, device)
    if run.diffusion is None:
        report = tokenizer_report(loaded, run.data, run.protocol, setup, progress)
    else:
        model, classes = loaded.network, loaded.num_classes
        report = diffusion_report(model, loaded.tokenizer, run.data, run.protocol, classes, setup, progress)
    report = {"run": folder.id, "request": key, **report}
    if own:
        folder.save_report(report)
    else:
        beside.parent.mkdir(exist_ok=True)
        runs.write_json(beside, report)
    return report


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
