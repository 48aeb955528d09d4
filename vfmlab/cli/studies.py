"""Commands that train or measure many settings: `vfmlab compare`, `correlate`, `claims`, `reuse`, `guide`,
`sweep`, `demo`; and `stop`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from vfmlab.cli.arguments import Assignments, Root, RunArg, assignments
from vfmlab.config.files import parse_json
from vfmlab.errors import ConfigError, Interrupted, RunError
from vfmlab.studies.command import command, shown_source

ROW = "[LABEL=]PRESET[+VARIANT...][@PRESET][:field=value,...]"
NOTEBOOK = "an .ipynb or py:percent file with a cell tagged 'parameters'"
WORKERS = "worker processes on this machine, by default one per GPU or core; or jobs of the queue"
ADDRESS = "a dask scheduler (tcp://HOST:PORT), or a YAML file for dask-jobqueue"
Rows = Annotated[tuple[str, ...], tyro.conf.Positional, arg(metavar="ROW ...", help=ROW)]
RunArgs = Annotated[tuple[str, ...], tyro.conf.Positional,
                    arg(metavar="RUN ...", help="ids, unique prefixes of ids, or directories")]
NotebookArg = Annotated[Path, tyro.conf.Positional, arg(metavar="NOTEBOOK", help=NOTEBOOK)]
LedgerArg = Annotated[str, tyro.conf.Positional, arg(metavar="LEDGER")]
Files = Annotated[tuple[str, ...] | None, arg(name="from", metavar="FILE ...")]
Goal = Annotated[tuple[str, ...], arg(metavar="FILE ...")]
Out = Annotated[Path, arg(help="where to write; .md, .json and .html are added")]
Jobs = Annotated[int | None, arg(help=WORKERS)]
Cluster = Annotated[str | None, arg(metavar="ADDRESS|FILE", help=ADDRESS)]
Retry = Annotated[bool, arg(help="try again what failed before")]


def compare(rows: Rows = (), /, sets: Assignments = (), seeds: tuple[int, ...] | None = None,
            root: Root = Path("runs"), out: Out = Path("comparison"), jobs: Jobs = None,
            cluster: Cluster = None, retry: Retry = False, title: str = "Comparison",
            until: Literal["first_stage", "tokenizer"] | None = None, files: Files = None) -> int:
    """Train several settings with several seeds under one protocol and write tables and curves.

    Exit code 1: some rows failed.

    Args:
        sets: dotted fields that hold for all rows, e.g. train.samples=50000 tokenizer.channels=8.
        seeds: every row is trained with each; left out: 0 1.
        title: heading of the page.
        until: leave diffusion out, or all but the first stage of each recipe.
        files: one page of results that vfmlab compare, correlate or claims wrote before; nothing is trained.
    """
    from vfmlab.studies import compare as comparing

    _named(files, rows)
    if files:
        _as_they_are({"--seeds": seeds is not None, "--set": sets, "--jobs": jobs, "--cluster": cluster,
                      "--retry": retry, "--until": until})
        made_by = command("compare", (), {"--from": files, "--title": [title]})
        print(f"written: {comparing.from_files(files, out, title, made_by)}")
        return 0
    seeds = (0, 1) if seeds is None else seeds
    if not rows:
        raise ConfigError("no rows; name at least one preset, and before --set, which takes every NAME=VALUE "
                          "behind it: vfmlab compare plain=pocket_plain_vae pocket_vfm_vae --set ...")
    page = comparing.run(rows, seeds, root, out, jobs, assignments(sets), title, until, cluster, retry)
    return _written(page)


def correlate(rows: Rows = (), /, sets: Assignments = (), seeds: tuple[int, ...] | None = None,
              root: Root = Path("runs"), out: Out = Path("correlation"), jobs: Jobs = None,
              cluster: Cluster = None, retry: Retry = False, target: str = "gfd",
              names: Annotated[tuple[str, ...], arg(name="instruments")] = (),
              compared_with: str | None = None, files: Files = None, goal: Goal = ()) -> int:
    """Which numbers of a tokenizer go along with how well diffusion trains on it: rank correlations, figures.

    Args:
        sets: dotted fields that hold for all rows, e.g. train.samples=50000 tokenizer.channels=8.
        seeds: every row is trained with each; left out: 0 1.
        files: take the results that vfmlab compare wrote before, in place of rows; nothing is trained.
        target: gfd, gfd_own or class_accuracy.
        names: what to measure beside the report; docs/instruments.md lists them.
        compared_with: reference model of all rows in place of each row's default.
        goal: results whose target counts: with --from, of longer trainings of the same rows; with rows, of
            the same labels, whose tokenizers alone are then trained and measured.
    """
    from vfmlab.studies import compare as comparing

    _named(files, rows)
    if files:
        _as_they_are({"--seeds": seeds is not None, "--set": sets, "--jobs": jobs, "--cluster": cluster,
                      "--retry": retry, "--instruments": names, "--compared-with": compared_with})
        made_by = command("correlate", (), {"--from": files, "--goal": goal, "--target": [target]})
        print(f"written: {comparing.correlate_files(files, out, target, made_by, goal)}")
        return 0
    if len(rows) < comparing.correlation.LEAST:
        raise ConfigError(f"{len(rows)} rows; rank correlations need at least {comparing.correlation.LEAST} "
                          "settings")
    more = {"names": names} if names else {}
    more |= {"compared_with": compared_with, "cluster": cluster, "retry": retry, "goal": goal}
    seeds = (0, 1) if seeds is None else seeds
    page = comparing.correlate(rows, seeds, root, out, jobs, assignments(sets), target, **more)
    return _written(page)


def _named(files: tuple[str, ...] | None, rows: tuple[str, ...] = ()) -> None:
    """ConfigError for --from without a file: nobody who writes it wants a training; and for rows beside
    it."""
    if files and rows:
        raise ConfigError("rows and --from: name rows to train, or files with results, not both")
    if files == ():
        raise ConfigError("--from names no file; give the .json that vfmlab compare wrote, or leave it out")


def _written(page: Path, rounds: Sequence[str] = ("results",)) -> int:
    """Says where the page is, and how many of its rows failed: the exit code is then 1."""
    from vfmlab.studies.results import read

    print(f"written: {page}")
    failed = [result for key in rounds for result in read(page.with_suffix(".json"), key) if result.failed]
    if failed:
        print(f"{len(failed)} rows failed; the first, {failed[0].label}, seed {failed[0].seed}: "
              f"{failed[0].failed}")
    return 1 if failed else 0


def _as_they_are(options: Mapping[str, object]) -> None:
    """ConfigError for an option that --from would ignore. options: name -> whether it is given."""
    if given := [name for name, value in options.items() if value]:
        raise ConfigError(f"{given[0]} with --from: results are taken as the files have them, and nothing is "
                          f"trained; leave out {' and '.join(given)}")


def choose(sets: Assignments = (),
           data: Annotated[str, arg(metavar="SOURCE")] = "",
           vfm: Annotated[tuple[str, ...], arg(metavar="VFM ...")] = (),
           methods: tuple[str, ...] = ("vfm_vae", "va_vae"), tier: str = "photo",
           seeds: tuple[int, ...] = (0, 1, 2), finalists: int = 3, tokenizer_images: int = 7680,
           generator_images: int = 25_600, screening_images: int = 12_800, root: Root = Path("runs"),
           out: Path = Path("choice"), jobs: Jobs = None, cluster: Cluster = None,
           retry: Retry = False) -> int:
    """Which VFM and which tokenizer for your images? Short trainings, a ranking with intervals, a recipe.

    Args:
        data: your images: folder:PATH, parquet:PATH, hf:NAME.
        vfm: vision models: rows of the VFM table, timm:NAME.
        sets: changes that hold for all rows, e.g. data.size=32.
        methods: tokenizers that are tried on every VFM; the plain VAE is compared anyway.
        tier: of the presets: pocket or photo.
        finalists: rows of the second round, besides the plain VAE.
        tokenizer_images: images seen by each tokenizer.
        generator_images: images seen by each finalist's generator.
        screening_images: images seen by each generator of the first round, which has the first seed alone.
        out: where to write; .md, .json, .html and .recipe.json are added.
    """
    from vfmlab.studies import choose as choosing

    if not data:
        raise ConfigError("--data names no images; for example --data folder:PATH")
    budget = choosing.Budget(tokenizer_images, generator_images, screening_images)
    flags = {"--data": [shown_source(data)], "--vfm": vfm, "--methods": methods, "--tier": [tier],
             "--seeds": seeds, "--finalists": [finalists], "--tokenizer-images": [budget.tokenizer],
             "--generator-images": [budget.generator], "--screening-images": [budget.screening],
             "--set": sets}
    page = choosing.run(data, vfm, root, out, command("choose", (), flags), methods, tier, seeds, finalists,
                        budget, assignments(sets), jobs, cluster, retry)
    return _written(page, ("first", "results"))


def claims(ledger: LedgerArg = "a", /, sets: Assignments = (), domain: str | None = None,
           seeds: tuple[int, ...] | None = None, only: tuple[str, ...] = (), budget: str = "",
           dry: bool = False, files: Files = None, root: Root = Path("runs"), out: Out = Path("claims"),
           jobs: Jobs = None, cluster: Cluster = None, retry: Retry = False) -> int:
    """Decide what papers claim: train the rows of a ledger with several seeds, and write a verdict per claim.

    Args:
        sets: dotted fields that hold for all rows, e.g. train.samples=50000 tokenizer.channels=8.
        domain: scenes, or photo (then --set data.source=parquet:PATH); left out: scenes.
        seeds: every row is trained with each; left out: 0 1 2.
        only: ids of claims; all without.
        budget: of one core, such as 90m or 2h; claims beyond it are listed as not run.
        dry: only show what each claim costs.
        files: decide by results that vfmlab compare or correlate wrote before; nothing is trained.
    """
    from vfmlab.studies import claims_study

    _named(files)
    if files:
        _as_they_are({"--seeds": seeds is not None, "--set": sets, "--budget": budget, "--domain": domain,
                      "--dry": dry, "--jobs": jobs, "--cluster": cluster, "--retry": retry})
    domain, seeds = domain or "scenes", (0, 1, 2) if seeds is None else seeds
    flags = {"--from": files} if files else {"--domain": [domain], "--seeds": seeds}
    flags |= {"--only": only, "--budget": [budget] if budget else (), "--set": sets}
    made_by = command("claims", [ledger], flags)
    changes, most = assignments(sets), seconds(budget) if budget else None
    if dry:
        prices = claims_study.listed(ledger, domain, root, seeds, only, changes)
        for claim, spent in prices:
            print(f"{claim.id:12s} {spent / 60:7.1f} min  {claim.statement}")
        total = sum(spent for _, spent in prices) / 60
        print(f"{'together':12s} {total:7.1f} min of one core; shared phases once, finished ones nothing")
    elif files:
        print(f"written: {claims_study.from_files(ledger, files, only, out, made_by)}")
    else:
        how = (seeds, only, most, changes, jobs, cluster, retry)
        return _written(claims_study.run(ledger, domain, root, out, made_by, *how))
    return 0


def seconds(text: str) -> float:
    """"90m", "2h" or "45s" as seconds. ConfigError for anything else."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        value = float(text[:-1])
    except ValueError:
        value = -1.0
    if unit is None or not value > 0:
        raise ConfigError(f"--budget '{text}': write a number with s, m or h, for example 90m")
    return value * unit


def reuse(run: RunArg, /, root: Root = Path("runs"), out: Path = Path("reuse"),
          every: tuple[int, ...] = (2, 3, 4), n: int = 500, batch: int = 64) -> int:
    """What reuse of a split network's encoder saves: gFD against evaluations and seconds, at equal quality.

    Args:
        out: where to write; .md, .json and .html are added.
        every: the encoder at every so many-th step; key steps and fewer steps come beside.
        n: samples of each way, at most as many as the run's protocol has.
        batch: of the timing.
    """
    from vfmlab.studies import reuse as study

    made_by = command("reuse", [run], {"--n": [n], "--every": every, "--batch": [batch]})
    print(f"written: {study.page(run, root, out, made_by, every, n, batch)}")
    return 0


def guide(runs: RunArgs, /, root: Root = Path("runs"), out: Out = Path("guidance"),
          scales: tuple[float, ...] = (1.25, 1.5, 2.0, 3.0), weaker: tuple[str, ...] = (),
          n: int | None = None, whole: bool = False) -> int:
    """How much guidance, and away from what: gFD over the scale of each kind, and which kind is ahead.

    The first run chooses each kind's scale, the others decide: runs of one recipe that differ in their seed.

    Args:
        scales: of guidance, above 1.
        weaker: runs of a weaker model, for auto-guidance; one for all runs, or one for each.
        n: samples; left out: as the runs' protocol says.
        whole: draw every run at every scale, and test what the scale does to gFD, precision and recall.
    """
    from vfmlab.studies import guide as study

    all_scales = [*scales, *(["--whole"] if whole else [])]
    made_by = command("guide", runs, {"--scales": all_scales, "--weaker": weaker, "--n": [n] if n else []})
    print(f"written: {study.page(runs, root, out, made_by, scales, weaker, n, whole)}")
    return 0


def sweep(notebook: NotebookArg, /, grid: Path, out: Path | None = None, jobs: Jobs = None,
          cluster: Cluster = None, retry: Retry = False) -> int:
    """Run a notebook at every point of a grid, or where Optuna chooses, and make one table and page.

    Points that are done are skipped; started again, a sweep goes on. Exit code 1: some points failed.

    Args:
        grid: YAML or JSON: notebook parameters, config fields, or a search; see docs/sweeps.md.
        out: folder of the sweep; by default sweeps/<notebook>-<grid>.
    """
    from vfmlab.studies import sweep as sweeps

    again = ["vfmlab", "sweep", str(notebook), "--grid", str(grid), *(["--out", str(out)] if out else [])]
    again = shlex.join([*again, *(["--cluster", cluster] if cluster else [])])
    try:
        result = sweeps.run(notebook, grid, out, jobs, retry, cluster)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; what was done is saved. To go on: {again}") from None
    failed = result.count("failed")
    more = f", {failed} failed; to run them again: {again} --retry" if failed else ""
    print(f"{result.count('finished')} of {len(result.records)} points finished{more}")
    print(f"table: {result.table}\npage:  {result.page}")
    return int(failed > 0)


def demo(preset: str = "", baseline: str = "", data: str = "", overrides: str = "{}",
         root: Path = Path("demo"), seed: int | None = None, jobs: Jobs = None,
         cluster: Cluster = None) -> int:
    """The whole pipeline on a VFM beside a plain one, by notebooks, into one HTML report, as make demo.

    Args:
        preset: the pipeline on a VFM; by default of the tier pocket, with --data of the tier photo.
        baseline: the pipeline that it is compared with.
        data: photographs: folder:PATH, parquet:PATH, hf:NAME, wds:PATTERN.
        overrides: JSON with dotted names, applied to both.
        root: folder for runs, executed notebooks and the report.
        seed: of both pipelines.
    """
    print(f"vfmlab demo: {preset or 'a tokenizer on a VFM'} beside {baseline or 'a plain one'}", flush=True)
    changes = _object(overrides, "--overrides")
    from vfmlab.studies import demo as demonstration

    try:
        report = demonstration.run(preset, baseline, data, changes, root, seed, jobs, cluster)
    except KeyboardInterrupt:
        raise Interrupted("stopped; what was trained is saved: the same command goes on from there") from None
    print(f"report: {report}   executed notebooks: {report.parent / 'notebooks'}")
    print(f"look at the runs in the app: vfmlab app --root {report.parent / 'runs'}")
    return 0


def _object(text: str, option: str) -> dict[str, Any]:
    from vfmlab.config.override import brief

    try:
        return parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{option}: {error}; expected a JSON object, got {brief(text)}") from None


def site(out: Path = Path("docs/site"), preset: str = "pocket_vfm_vae", baseline: str = "pocket_plain_vae",
         overrides: str = "{}", root: Root = Path("runs"), seed: int = 0, notebooks: tuple[str, ...] = (),
         parameters: str = "{}") -> int:
    """Pages of the manual, the results, the API and the executed notebooks, to be read without a network.

    Args:
        out: folder of the pages.
        preset: of the notebooks; what it trains is taken from root where it is there.
        baseline: of the notebooks that compare.
        overrides: JSON with dotted names.
        seed: of the notebooks.
        notebooks: numbers such as 02, or none; all by default. The others keep the pages that are there, with
            whatever was set; one whose code has changed since says so.
        parameters: JSON, what is set in one notebook alone: '{"04": {"seeds": 1}}'.
    """
    from vfmlab.studies import site as pages

    given = {"overrides": overrides, "root": str(root.expanduser().resolve()), "seed": seed, "headless": True}
    own = _object(parameters, "--parameters")
    chosen = {} if notebooks == ("none",) else pages.parameters(preset, baseline, given, notebooks, own)
    out = out.expanduser().resolve()
    print(f"site: {pages.build(out, pages.executed(chosen, out / '.executed'))}")
    if left := pages.missing(out):
        print(f"no page with today's code: notebooks {' '.join(left)}")
    return 0


def stop(run: RunArg, /, root: Root = Path("runs")) -> int:
    """Ask a run to save and end, whichever process or machine trains it; started again, it goes on."""
    from vfmlab import runs

    folder = runs.open_run(run, root)
    if (state := folder.status().state) != "running":
        raise RunError(f"run '{folder.id}' is not being trained (state: {state}), so there is nothing to "
                       "stop")
    folder.request_stop()
    print(f"run '{folder.id}' saves and ends after the step it is in")
    return 0
