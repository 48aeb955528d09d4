"""The command line: `vfmlab train|stop|eval|sample|reconstruct|import|export|runs|plan|presets|doctor|compare|correlate|app|demo`.

Thin over `vfmlab.api`. Everything heavy is imported inside the commands, so that help and mistakes are quick. What the
library raises on bad input becomes one line on stderr and exit code 2; anything else keeps its traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vfmlab.cli.arguments import Assignments, Json, PresetArg, Progress, Root, RunArg, assignments, root_flag
from vfmlab.cli.studies import compare, correlate, stop
from vfmlab.cli.sweep import sweep
from vfmlab.cli.weights import export, import_
from vfmlab.errors import ConfigError, DataError, Stopped, VfmlabError, nearest

arg = tyro.conf.arg
ImageArgs = Annotated[tuple[Path, ...], tyro.conf.Positional, arg(metavar="IMAGE ...")]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C with something to say: the message tells what is kept and how to go on."""


# -- training -------------------------------------------------------------------------------------------------------


def train(
    preset: PresetArg,
    /,
    sets: Assignments = (),
    root: Root = Path("runs"),
    until: str | None = None,
    progress: Progress = "auto",
) -> int:
    """Train a preset, phase by phase; started again, it goes on where it stopped.

    Args:
        until: stop after this phase: a stage's name, or "tokenizer" for all of its stages.
        progress: auto takes a bar on a terminal and a line every few seconds elsewhere.
    """
    from vfmlab import api
    from vfmlab.training.progress import watch

    run = api.resolve(preset, assignments(sets))
    if os.environ.get("RANK", "0") != "0":
        progress = "none"  # one of several processes speaks
    last = ""
    events = api.train(run, root, until=until)
    try:
        with contextlib.closing(events):
            for event in watch(events, progress):
                last = event.run_id
                if "remark" in event.data:
                    print(f"{last}: {event.data['remark']}")
    except (KeyboardInterrupt, Stopped):
        again = shlex.join(["vfmlab", *sys.argv[1:]]) if sys.argv[1:2] == ["train"] else f"vfmlab train {preset}"
        saved = f"run '{last}' is saved" if last else "nothing was trained yet"
        raise Interrupted(f"interrupted; {saved}. To go on: {again}") from None
    if progress != "none":
        print(f"trained {last} in {root}\nnext: {shlex.join(['vfmlab', 'eval', last, *root_flag(root)])}")
    return 0


def evaluate(
    run: RunArg,
    /,
    sets: Assignments = (),
    root: Root = Path("runs"),
    again: bool = False,
    as_json: Json = False,
) -> int:
    """Measure a run under its protocol; numbers that were measured before are read from its report.

    Args:
        sets: changes to the protocol, e.g. n=500 guidance.scale=2.
        again: measure anew.
    """
    from vfmlab import api

    report = api.evaluate(run, root, protocol=assignments(sets), again=again)
    if as_json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{report['run']}  protocol {report['hash']}")
    for name, entry in report["metrics"].items():
        value = entry.get("value") if isinstance(entry, dict) else entry
        print(f"  {name:<28} {value:.4f}" if isinstance(value, float) else f"  {name:<28} {value}")
    return 0


def sample(
    run: RunArg,
    /,
    labels: tuple[str, ...] = (),
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    solver: Literal["euler", "heun", "dopri5", "sde"] | None = None,
    out: Path | None = None,
    root: Root = Path("runs"),
    raw: bool = False,
    decoder: str | None = None,
) -> int:
    """Draw images from a diffusion run.

    Args:
        labels: class numbers or names, one image each; none: one image of every class.
        seed: image i depends on (seed, i) only.
        steps: sampling steps; like guidance and solver, the run's protocol decides when it is not given.
        guidance: classifier-free guidance scale, 1 is off.
        solver: how the trajectory is integrated.
        out: folder for grid.png and one file per image; none: samples/ in the run's directory.
        raw: weights as trained instead of their average.
        decoder: tokenizer run whose decoder makes the images, where a stage was trained after the diffusion model.
    """
    from vfmlab import api

    model = api.load_diffusion(run, root, ema=not raw, decoder=decoder)
    chosen = [_label(text, model.class_names) for text in labels] or list(range(model.num_classes))
    extra = {"solver": solver} if solver else None
    previews = api.sample(model, chosen, seed=seed, guidance=guidance, steps=steps, sampler=extra, previews=0)
    images = list(previews)[-1].images
    folder = out or model.folder.path / "samples"
    names = [f"{i:04d}_{_safe(model.class_names[label])}" for i, label in enumerate(chosen)]
    _save(folder, images, names)
    print(f"{len(images)} images of seed {seed}: {folder / 'grid.png'}")
    return 0


def reconstruct(
    run: RunArg,
    images: ImageArgs,
    /,
    out: Path | None = None,
    root: Root = Path("runs"),
) -> int:
    """Send images through a tokenizer and back, original and reconstruction side by side.

    Args:
        images: image files.
        out: folder for the pictures; none: reconstructions/ in the run's directory.
    """
    import torch

    from vfmlab import api

    if not images:
        raise DataError("no image given; name at least one file: vfmlab reconstruct RUN IMAGE...")
    tokenizer = api.load_tokenizer(run, root)
    originals, restored, psnr = api.reconstruct(tokenizer, images)
    folder = out or api.tokenizer_run(run, root).path / "reconstructions"
    names = [f"{i:04d}_{_safe(path.stem)}" for i, path in enumerate(images)]
    _save(folder, torch.cat([originals, restored], dim=3), names)
    for path, value in zip(images, psnr.tolist(), strict=True):
        print(f"{path}  PSNR {value:.2f} dB")
    print(f"pictures: {folder}")
    return 0


# -- looking around -------------------------------------------------------------------------------------------------


def runs(root: Root = Path("runs"), as_json: Json = False) -> int:
    """List the runs under a folder, oldest first."""
    from vfmlab import runs as run_dirs

    rows = []
    for run in run_dirs.scan(root):
        status = run.status()
        metrics = (run.report() or {}).get("metrics", {})
        rows.append(
            {
                "id": run.id,
                "kind": run.kind,
                "state": status.state,
                "samples": status.samples,
                "total": status.total,
                "seconds": status.seconds,
                "message": status.message,
                "metrics": {k: v.get("value") if isinstance(v, dict) else v for k, v in metrics.items()},
                "path": str(run.path),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    if not rows:
        print(f"no runs in '{root}'; begin with: vfmlab train tiny_vfm_vae")
        return 0
    width = max(len(row["id"]) for row in rows)
    print(f"{'run':<{width}}  {'kind':<9}  {'state':<11}  {'images':>17}  metrics")
    for row in rows:
        numbers = {k: v for k, v in row["metrics"].items() if isinstance(v, int | float)}
        shown = "  ".join(f"{k} {v:.4g}" for k, v in list(numbers.items())[:5])
        images = f"{row['samples']:,}/{row['total']:,}"
        print(f"{row['id']:<{width}}  {row['kind']:<9}  {row['state']:<11}  {images:>17}  {shown}".rstrip())
    return 0


def presets(name: Annotated[str, tyro.conf.Positional, arg(metavar="[PRESET]")] = "") -> int:
    """List presets and variants with what they are for; of one preset all that is known before it is started.

    A preset is named alone, with variants (PRESET+VARIANT), or with another's diffusion model (PRESET@PRESET).
    """
    from vfmlab import presets as table

    rows = {row.name: row.about for row in map(table.row, table.names())}
    rows |= {f"+{name}": variant.about for name, variant in table.VARIANTS.items()}
    if name:
        rows = {name: table.summary(name)} | {f"  {fact}": text for fact, text in table.row(name).facts.items()}
    width = max(map(len, rows))
    for what, text in rows.items():
        print(f"{what:<{width}}  {text}")
    return 0


def plan(
    preset: PresetArg,
    /,
    sets: Assignments = (),
    measure: bool = False,
    as_json: Json = False,
) -> int:
    """What a preset would cost: parameters, latent shape, FLOPs, memory.

    Args:
        measure: also run the most expensive step on this machine and report its time and peak memory.
    """
    from vfmlab import api
    from vfmlab.training import plan as planning

    found = planning.plan(api.resolve(preset, assignments(sets)), measure=measure)
    print(json.dumps(found, indent=2) if as_json else planning.table(found))
    return 0


def doctor(root: Root = Path("runs"), as_json: Json = False) -> int:
    """Check this machine and this installation; exit code 1 when something must be mended."""
    from vfmlab.cli import doctor as doctoring

    found = list(doctoring.checks(root))
    print(doctoring.as_json(found) if as_json else doctoring.table(found))
    return int(any(check.state == "fail" for check in found))


def app(
    runs: Root = Path("runs"),
    port: int = 7860,
    host: str = "127.0.0.1",
    auth: str | None = None,
    mcp: bool = False,
) -> int:
    """Serve the app, to this machine only unless another host is named.

    Args:
        port: where to listen.
        host: the address to listen on; 0.0.0.0 is everybody who can reach this machine, so ask for a login then.
        auth: USER:PASSWORD to ask for; other users of this machine see command lines, VFMLAB_APP_AUTH in the environment they do not.
        mcp: offer the app's endpoints as tools of the Model Context Protocol too.
    """
    login = auth if auth is not None else os.environ.get("VFMLAB_APP_AUTH")
    user, colon, password = (login or "").partition(":")
    if login is not None and not (user and colon and password):
        raise ConfigError("--auth (or VFMLAB_APP_AUTH) is of the form USER:PASSWORD, neither of them empty")
    try:
        from apps import app as application
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("gradio", "apps"):
            raise
        missing = "gradio" if error.name != "apps" else "the folder apps/ of the repository"
        way = "in a clone, uv pip install -c constraints.txt -e '.[app]'"
        raise ConfigError(f"the app needs {missing}: {way}") from None
    if login is None and host not in ("127.0.0.1", "localhost", "::1"):
        print(f"vfmlab: anybody who can reach {host}:{port} can use this app; ask for a login with VFMLAB_APP_AUTH=USER:PASSWORD", file=sys.stderr)
    application.launch(runs, host=host, port=port, auth=(user, password) if login is not None else None, mcp=mcp)
    return 0


def demo(data: str | None = None, preset: str | None = None, root: Path | None = None) -> int:
    """Train, sample, measure and write a report, by the notebooks; the same as make demo.

    Args:
        data: another source of images, e.g. folder:PATH or parquet:PATH.
        preset: another preset than the pocket VFM tokenizer.
        root: folder of the run directories.
    """
    from vfmlab.studies import demo as demonstration

    given = {"--data": data, "--preset": preset, "--root": root}
    pairs = [(flag, str(value)) for flag, value in given.items() if value is not None]
    return demonstration.main([part for pair in pairs for part in pair])


# -- helpers --------------------------------------------------------------------------------------------------------


def _label(text: str, names: list[str]) -> int:
    """A class number from a number or a name; numbers are checked where they are used."""
    if text.lstrip("-").isdigit():
        return int(text)
    if text in names:
        return names.index(text)
    raise ConfigError(f"--labels: unknown class '{text}'{nearest(text, names)}")


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60] or "image"


def _save(folder: Path, images: Any, names: Sequence[str]) -> None:
    """Write `images` (N 3 H W in [-1, 1]) as NAME.png and together as grid.png."""
    from torchvision.utils import save_image

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for image, name in zip(images, names, strict=True):
            save_image(image, folder / f"{name}.png", normalize=True, value_range=(-1, 1))
        columns = max(1, round(len(images) ** 0.5))
        save_image(images, folder / "grid.png", nrow=columns, normalize=True, value_range=(-1, 1))
    except OSError as error:
        raise DataError(f"--out: cannot write to '{folder}': {error.strerror or error}; choose another one") from None


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "stop": stop,
    "eval": evaluate,
    "sample": sample,
    "reconstruct": reconstruct,
    "import": import_,
    "export": export,
    "runs": runs,
    "presets": presets,
    "plan": plan,
    "doctor": doctor,
    "compare": compare,
    "sweep": sweep,
    "correlate": correlate,
    "app": app,
    "demo": demo,
}


def gather(argv: Sequence[str]) -> list[str]:
    """Move the values of all `--set` flags behind one last `--set`: the flag may be repeated and stand anywhere."""
    rest: list[str] = []
    values: list[str] = []
    inside = False
    for token in argv:
        if token == "--set":
            inside = True
        elif token.startswith("--set="):
            values.append(token.removeprefix("--set="))
            inside = False
        elif inside and "=" in token and not token.startswith("--"):
            values.append(token)
        else:
            inside = False
            rest.append(token)
    return [*rest, "--set", *values] if values else list(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 doctor found faults, 2 bad input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        argv = ["--help"]
    try:
        if not argv[0].startswith("-") and argv[0] not in COMMANDS:
            raise ConfigError(f"unknown command '{argv[0]}'{nearest(argv[0], COMMANDS)}")
        description = "Visual tokenizers from vision foundation models, and latent diffusion on them."
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="vfmlab", description=description, args=gather(argv), config=(tyro.conf.OmitArgPrefixes,)
        )
    except VfmlabError as error:
        print(f"vfmlab: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        from vfmlab.cli.doctor import EXTRAS

        package = (error.name or "").split(".")[0]
        extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        print(f"vfmlab: error: '{argv[0]}' needs {package}, which is not installed: uv pip install -c constraints.txt -e '.[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\nvfmlab: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
