"""A run's report: every number its kind of run has, with their protocols, stored beside the run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vfmlab import config, data, runs
from vfmlab.errors import RunError
from vfmlab.evaluation import number, prompts, samples
from vfmlab.evaluation.features import OWN, open_space
from vfmlab.evaluation.frechet import few_samples_warning
from vfmlab.evaluation.generation import evaluate_generation
from vfmlab.evaluation.instruments.base import LATENTS, Metrics
from vfmlab.evaluation.number import Report
from vfmlab.evaluation.precision import tf32
from vfmlab.evaluation.protocol import Setup, dump, open_compared, open_setup
from vfmlab.evaluation.ranks import ALONE, Ranks
from vfmlab.evaluation.reconstruction import Progress, measure
from vfmlab.evaluation.reference import related
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.weights import io
from vfmlab.weights.load import with_weaker

OWN_NOISE = "noise of its own for each image"  # earlier reports decoded all from that of seed 0
ON_SPHERE = "every latent decoded from the sphere"  # earlier reports decoded raw ones, or some as they were
FEW_CODES = 0.03  # of a codebook's entries
ALONE_CODE = 0.01  # perplexity over 1 of a codebook of which one entry is as good as alone


def tokenizer_report(tokenizer: Tokenizer, cfg: config.Data, protocol: config.Protocol,
                     setup: Setup | None = None, progress: Progress | None = None) -> Report:
    """Reconstruction numbers, probes of the latents, and their alignment with the protocol's feature space.

    `hash` is that of the whole protocol; each number carries the hash of the part it depends on.
    """
    started = time.perf_counter()
    setup = setup or open_setup(cfg, protocol, device=tokenizer.stat_mean.device)
    gathered = measure(tokenizer, cfg, protocol, setup, progress)
    with tf32(False):
        report = gathered.report.joined(Metrics(LATENTS, gathered).write().report())
    return _closed(report, setup, started, tokenizer)


def generator_report(network: Any, tokenizer: Tokenizer, cfg: config.Data, protocol: config.Protocol,
                     num_classes: int, setup: Setup | None = None,
                     progress: Progress | None = None, seed: int = 0) -> Report:
    """Generation numbers with the tokenizer's own beside them; see :func:`tokenizer_report`."""
    started = time.perf_counter()
    setup = setup or open_setup(cfg, protocol, device=tokenizer.stat_mean.device)
    baseline = measure(tokenizer, cfg, protocol, setup)
    given = (network, tokenizer, cfg, protocol, num_classes, progress, setup, baseline, seed)
    report = evaluate_generation(*given)
    return _closed(report.replace(curves=baseline.report.curves), setup, started, tokenizer)


def _closed(report: Report, setup: Setup, started: float, tokenizer: Tokenizer) -> Report:
    """The report with what a reader must be warned of."""
    wanted, there, bad = setup.protocol.n, len(setup.source), setup.source.bad
    model = None if tokenizer.vfm is None else tokenizer.vfm.facts.name
    few = few_samples_warning(report.protocol["images"]["n"])
    warnings = [few, related(model, setup.protocol.features)]
    used = report.value("codebook_used")
    # one entry of 32 is more than that share
    if used is not None and (used < FEW_CODES or (
            report.value("codebook_perplexity") < tokenizer.quantizer.parts + ALONE_CODE)):
        warnings.append(f"the quantiser collapsed: {used:.2%} of the codebook's entries are used; fewer "
                        "entries, a narrower latent, or a quantiser that moves all entries (simvq, "
                        "fsq) may help")
    if wanted > there:
        warnings.append(f"protocol.n {wanted} is more than the {there} held-out images; all of them were "
                        "used")
    if bad:
        warnings.append(f"{len(bad)} images could not be read and were replaced, e.g. {bad[0]}")
    lines = tuple(line for line in warnings if line)
    return report.replace(warnings=lines, seconds=round(time.perf_counter() - started, 2))


# -- reports on disk ---------------------------------------------------------------------------------------


def request(run: config.Phase, folder: runs.RunDir) -> str:
    """Digest of all that decides the numbers: protocol, data, judge, and every weight that is read."""
    protocol = {key: value for key, value in dump(run.protocol).items() if key != "batch"}
    own = run.protocol.features.partition(":")[0] in OWN
    version = open_space(run.protocol.features, run.data.size, folder.path.parent).version if own else ""
    source = data.open_source(run.data, "val")
    facts = [protocol, run.data.model_dump(mode="json"), source.fingerprint, weights(folder, run.protocol),
             version]
    if run.tokenizer.radius is not None:
        facts.append(ON_SPHERE)
    if run.tokenizer.seeded:
        facts.append(OWN_NOISE)
    if run.protocol.prompts is not None:
        facts.append(prompts.mark(run.protocol, source))
    if run.protocol.reference is not None:
        facts.append(open_compared(run.protocol, run.data).digest)
    if not run.data.source.startswith("scenes:"):  # probes and a classifier's head are fitted on them
        facts.append(data.open_source(run.data, "train").fingerprint)
    return config.digest(facts)


def weights(folder: runs.RunDir, protocol: config.Protocol) -> list[str]:
    """Digests of the weights behind a run's numbers: its own, its tokenizer's, another decoder's, and those
    of the model that guidance leads away from. Of the others the averaged ones are read."""
    run, guidance = folder.config(), protocol.guidance
    others = [None if run.generator is None else run.parent, protocol.decoder,
              guidance.weaker if guidance.kind == "auto" else None]
    folders = [runs.open_run(ref, folder.path.parent) for ref in others if ref]
    own = folder.ema if protocol.ema and folder.ema.exists() else folder.model
    paths = [own, *(f.ema if f.ema.exists() else f.model for f in folders)]
    return [io.sha256(path) if path.exists() else "" for path in paths]


def cached(run: config.Phase, folder: runs.RunDir, load: Callable[..., Any], again: bool = False,
           progress: Progress | None = None, ranks: Ranks = ALONE) -> Report:
    """The report of a run under `run.protocol`: read where it was measured before, else measured and written.

    report.json holds the report under the run's own protocol; others lie beside it in reports/, whereto it
    goes itself when a study gives the run another protocol. One that cannot be written (a read-only folder,
    a full disk) is returned with a warning. Where a run's weights were deleted, its own report is what is
    left of it, and is given as it is.

    Args:
        run: config of the run, its protocol perhaps changed. folder: its directory. load: gives the
            tokenizer, or the loaded generator (`.network`, `.tokenizer`, `.num_classes`); called with
            `ema=False` for raw weights. ranks: the processes that measure together.

    Raises:
        ConfigError: processes that disagree.
        RunError: neither a tokenizer nor a generator run.
    """
    if run.tokenizer is None:
        raise RunError(f"run '{folder.id}' is a {run.kind} run; only tokenizer and generator runs have a "
                       "report")
    key = request(run, folder)
    own = run.protocol == folder.config().protocol
    aside = Path(folder.path) / "reports" / f"{key}.json"
    path = Path(folder.path) / "report.json" if own else aside
    before = number.read(path)
    deleted = own and not weights(folder, run.protocol)[0]
    there = before is not None and (before.request == key or deleted)
    earlier = None if again else before if there else number.read(aside)
    ranks.agree("evaluation", f"{key}{'' if earlier is None else ' measured'}")
    if earlier is not None:
        return earlier if there or not ranks.main else _stored(path, earlier, before)
    loaded = load() if run.protocol.ema else load(ema=False)
    device = (loaded if run.generator is None else loaded.tokenizer).stat_mean.device
    setup = open_setup(run.data, run.protocol, folder.path.parent, device, ranks)
    progress = progress if ranks.main else None
    if run.generator is None:
        report = tokenizer_report(loaded, run.data, run.protocol, setup, progress)
    else:
        model, classes = loaded.network, loaded.num_classes
        with_weaker(model, loaded.tokenizer, run.protocol.guidance, folder.path.parent)
        about = samples.facts(run.protocol, setup.source, run=folder.id,
                              weights=weights(folder, run.protocol))
        setup.drawn = samples.earlier(Path(folder.path), run.protocol, run.data.size, about)
        more = (setup, progress, run.seed)
        report = generator_report(model, loaded.tokenizer, run.data, run.protocol, classes, *more)
    report = report.replace(run=folder.id, request=key)
    return _stored(path, report, before) if ranks.main else report


def _stored(path: Path, report: Report, before: Report | None) -> Report:
    """Write a report; the one of another protocol that it replaces goes to reports/."""
    if before is not None and before.request and before.hash != report.hash:
        number.save(path.parent / "reports" / f"{before.request}.json", before)
    return number.save(path, report)
