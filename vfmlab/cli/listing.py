"""Commands that look around: `vfmlab runs`, `presets`, `plan` and `doctor`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from vfmlab.cli.arguments import Assignments, Json, Root, arg, assignments, root_flag
from vfmlab.errors import ConfigError
from vfmlab.studies.command import command

NAMES = "presets, PRESET+VARIANT, PRESET@PRESET or config files (.json); a tier stands for all of its presets"


def runs(root: Root = Path("runs"), as_json: Json = False) -> int:
    """List the runs under a folder, oldest first, with what differs between those of one name.

    Damaged files are named on stderr, and left out.
    """
    from vfmlab import runs as run_dirs

    folders, broken = run_dirs.listing(root)
    contrast = run_dirs.contrast(folders)
    rows, lines = [], list(broken.values())
    for run in folders:
        status = run.status()
        metrics = (run.report() or {}).get("metrics", {})
        lines += run.faults()
        rows.append({"id": run.id, "kind": run.kind, "state": status.state, "samples": status.samples,
                     "total": status.total, "seconds": status.seconds, "message": status.message,
                     "differs": contrast[run.id], "data": status.data,
                     "metrics": {k: v.get("value") if isinstance(v, dict) else v for k, v in metrics.items()},
                     "path": str(run.path)})
    for line in lines:
        print(f"vfmlab: damaged: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        begin = ["vfmlab", "train", "tiny_vfm_vae", *root_flag(root)]
        print(f"no runs in '{root}'; begin with: {shlex.join(begin)}")
        return 0
    width = max(len(row["id"]) for row in rows)
    print(f"{'run':<{width}}  {'kind':<9}  {'state':<11}  {'images':>17}  metrics")
    for row in rows:
        numbers = {k: v for k, v in row["metrics"].items() if isinstance(v, int | float)}
        shown = "  ".join(f"{k} {v:.4g}" for k, v in list(numbers.items())[:5])
        images = f"{row['samples']:,}/{row['total']:,}"
        print(f"{row['id']:<{width}}  {row['kind']:<9}  {row['state']:<11}  {images:>17}  {shown}".rstrip())
        images = "" if row["data"].startswith("scenes:") else row["data"]  # drawn ones are as the preset says
        for line in filter(None, (row["differs"], images)):
            print(f"{'':<{width}}  {line}")
    return 0


def presets(name: Annotated[str, tyro.conf.Positional, arg(metavar="[PRESET]")] = "",
            published: bool = False, as_json: Json = False) -> int:
    """List presets and variants with what they are for; of one preset all that is known before it is started,
    or with --json its config: every field with its value, as a file that `vfmlab train` takes.

    A preset is named alone, with variants (PRESET+VARIANT), or with another's diffusion model
    (PRESET@PRESET).

    Args:
        published: the paper presets beside what papers and releases say: the page docs/paper_presets.md.
    """
    from vfmlab import presets as table

    if published:
        from vfmlab.studies.page import published_page

        print(published_page())
        return 0
    if as_json:
        if not name:
            raise ConfigError("--json prints one preset's config; name it: vfmlab presets PRESET --json")
        print(json.dumps(table.get(name, {}).model_dump(mode="json"), indent=2))
        return 0

    rows = {row.name: row.about for row in map(table.row, table.names())}
    rows |= {f"+{name}": variant.about for name, variant in table.VARIANTS.items()}
    if name:
        facts = table.about(name) | {"fields": f"vfmlab presets {name} --json"}
        rows = {name: facts.pop("about")} | {f"  {fact}": text for fact, text in facts.items()}
    width = max(map(len, rows))
    for what, text in rows.items():
        print(f"{what:<{width}}  {text}")
    return 0


def plan(names: Annotated[tuple[str, ...], tyro.conf.Positional, arg(metavar="PRESET ...", help=NAMES)], /,
         sets: Assignments = (), measure: bool = False, gpus: int = 8, mfu: float = 0.35, page: bool = False,
         as_json: Json = False) -> int:
    """What presets would cost: parameters, latent shape, FLOPs, memory, hours on named GPUs.

    Args:
        sets: dotted fields, e.g. train.samples=50000 tokenizer.channels=8.
        measure: also run the most expensive step on this machine and report its time and peak memory.
        gpus: how many GPUs the hours are for.
        mfu: share of their peak that is reached, an assumption.
        page: tables of all of them in Markdown: of the tier paper, the page docs/throughput.md.
    """
    from vfmlab import api
    from vfmlab import presets as known
    from vfmlab.training import plan as planning
    from vfmlab.training import price

    if not names:
        raise ConfigError("no preset; name one, for example: vfmlab plan pocket_vfm_vae")
    price.check(gpus, mfu)  # before minutes of planning
    tiers = {tier: [name for name in known.names() if known.row(name).tier == tier] for tier in known.TIERS}
    recipes = [api.resolve(each, assignments(sets)) for name in names for each in tiers.get(name, [name])]
    plans = [(recipe, planning.plan(recipe, measure=measure)) for recipe in recipes]
    for recipe, costs in plans:
        images = recipe.data.train or price.IMAGENET
        costs["price"] = price.price(costs, recipe.protocol.n, images, gpus, mfu)
    if page:
        from vfmlab.studies import throughput

        made_by = command("plan", names, {"--set": sets, "--gpus": [gpus], "--mfu": [mfu, "--page"]})
        print(throughput.page(plans, gpus, mfu, made_by).markdown())
    elif as_json:
        priced = [costs for _, costs in plans]
        print(json.dumps(priced if len(priced) > 1 else priced[0], indent=2))
    else:
        print("\n\n".join(f"{planning.table(costs)}\n\n{price.table(costs['price'])}" for _, costs in plans))
    return 0


def doctor(root: Root = Path("runs"), as_json: Json = False) -> int:
    """Check this machine and this installation; exit code 1 when something must be mended."""
    from vfmlab.cli import doctor as doctoring

    checks = list(doctoring.checks(root))
    print(doctoring.as_json(checks) if as_json else doctoring.table(checks))
    return int(any(check.state == "fail" for check in checks))
