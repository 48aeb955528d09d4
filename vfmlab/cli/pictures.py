"""Commands that write pictures: `vfmlab sample` and `vfmlab reconstruct`.

A folder holds the pictures of one call and a manifest that says which call that was; those of the call before
are moved to `earlier/N` in it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vfmlab.cli.arguments import Assignments, Root, RunArg, arg, assignments, counting
from vfmlab.errors import ConfigError, DataError, VfmlabError

ImageArgs = Annotated[
    tuple[Path, ...], tyro.conf.Positional, arg(metavar="IMAGE ...", help="image files, or folders of them")
]
CHUNK = 64  # images at a time
SHOWN = 256  # images in grid.png
MANIFEST, FORMAT = "manifest.json", "vfmlab/pictures-1"


def sample(run: RunArg, /, labels: tuple[str, ...] | None = None, seed: int | None = None,
           steps: int | None = None, guidance: float | None = None,
           solver: Literal["euler", "heun", "dopri5", "sde"] | None = None,
           out: Path | None = None, root: Root = Path("runs"), raw: bool = False,
           decoder: str | None = None, npz: int | None = None, sets: Assignments = (),
           prompt: tuple[str, ...] | None = None) -> int:
    """Draw images from a diffusion run.

    Args:
        labels: class names or numbers, one image each; a name wins where both fit. Left out: one image of
            every class.
        seed: image i depends on (seed, i) only; left out: 0, with --npz the protocol's.
        steps: sampling steps; like guidance and solver, the run's protocol decides when it is not given.
        guidance: classifier-free guidance scale, 1 is off.
        solver: how the trajectory is integrated.
        out: folder for grid.png, manifest.json and one file per image; none: samples/ in the run's directory.
        raw: weights as trained instead of their average.
        decoder: tokenizer run whose decoder makes the images, where a stage was trained after the diffusion
            model.
        npz: draw so many samples under the run's protocol into one npz file for ADM's evaluator instead;
            --out names it. Goes on where it was broken off, also under accelerate launch.
        sets: changes to the protocol; without --npz those of guidance and of the sampler, e.g.
            token_sampler.top_k=100; with it any, e.g. labels=random precision=bf16 batch=64.
        prompt: texts, one image each, of a run that reads text: --prompt "a striped red disc" "two blue
            rings". Left out: a few captions of its training images.
    """
    from vfmlab import api, data

    if prompt is not None and (labels is not None or npz is not None):
        other = "--labels: an image has a class or a prompt" if labels is not None else (
            "--npz: its prompts are the protocol's; give --set prompts=FILE")
        raise ConfigError(f"--prompt with {other}")
    if npz is not None:
        flags = {"seed": seed, "sampler.steps": steps, "sampler.solver": solver, "guidance.scale": guidance,
                 "decoder": decoder, "ema": False if raw else None}
        changes = _changes(sets, flags | {"n": npz})
        return _npz(run, changes.pop("n"), labels, out, root, changes)
    seed = 0 if seed is None else seed
    if labels == ():
        raise ConfigError("--labels: no class given; name some, or leave it out for one image of every class")
    model = api.load_generator(run, root, ema=not raw, decoder=decoder)
    if prompt is not None:
        model = model.prompted(prompt)
    classes = model.class_names
    chosen = range(len(classes)) if labels is None else [data.class_number(text, classes) for text in labels]
    how = {"seed": seed, "steps": steps, **_drawn(sets, model.run.ar is not None, guidance, solver)}
    protocol = api.sampling_protocol(model, chosen, **how)
    names = [f"{i:04d}_{_safe(model.class_names[label])}" for i, label in enumerate(chosen)]
    facts = {
        "command": "sample", "run": model.folder.id, "seed": seed, "raw": raw, "decoder": decoder,
        "sampler": (protocol.token_sampler or protocol.sampler).model_dump(mode="json"), "guidance": protocol.guidance.model_dump(mode="json"),
        "labels": list(chosen), "classes": [model.class_names[label] for label in chosen],
    }  # fmt: skip
    folder = _begin(out, model.folder.path, "samples", facts, names)
    first = []
    for part in _chunks(len(names)):
        previews = api.sample(model, chosen[part], previews=0, first=part.start, **how)
        *_, last = previews
        images = last.images
        _save(folder, images, names[part])
        first += images[: SHOWN - len(first)]
    remark = f" ({last.note})" if last.note else ""
    print(f"{len(names)} images of seed {seed}: {_grid(folder, first)}{remark}")
    return 0


def reconstruct(run: RunArg, images: ImageArgs, /, out: Path | None = None, root: Root = Path("runs")) -> int:
    """Send images through a tokenizer and back, original and reconstruction side by side.

    Images that cannot be read are named and left out.

    Args:
        out: folder for the pictures, grid.png and manifest.json; none: reconstructions/ in the run's
            directory.
    """
    import torch

    from vfmlab import api

    paths = _image_files(images)
    tokenizer = api.load_tokenizer(run, root)
    run_dir = api.tokenizer_run(run, root)
    names = [f"{i:04d}_{_safe(path.stem)}" for i, path in enumerate(paths)]
    facts = {"command": "reconstruct", "run": run_dir.id, "size": tokenizer.size,
             "images": [str(path) for path in paths]}
    folder = _begin(out, run_dir.path, "reconstructions", facts, names)
    first, values, failed = [], {}, {}
    for part in _chunks(len(paths)):
        there = []
        for place in range(part.start, part.stop):
            try:
                there.append((place, api.read_images([paths[place]], tokenizer.size)))
            except DataError as error:
                failed[place] = str(error)
        if not there:
            continue
        places = [place for place, _ in there]
        originals, restored, psnr = api.reconstruct(tokenizer, torch.cat([image for _, image in there]))
        pairs = torch.cat([originals, restored], dim=3)
        _save(folder, pairs, [names[place] for place in places])
        first += pairs[: SHOWN - len(first)]
        for place, value in zip(places, psnr.tolist(), strict=True):
            values[place] = value
            print(f"{paths[place]}  PSNR {value:.2f} dB")
    if not values:
        raise DataError(f"none of {len(paths)} images can be read; the first: {failed[0]}")
    _write_manifest(folder,
                    {**facts, "psnr": [values.get(i) for i in range(len(paths))],
                     "left_out": list(failed.values())},
                    names)
    for line in failed.values():
        print(f"vfmlab: left out: {line}", file=sys.stderr)
    mean = sum(values.values()) / len(values)
    left = f", {len(failed)} left out" if failed else ""
    print(f"{len(values)} images at {tokenizer.size} px, mean PSNR {mean:.2f} dB{left}: "
          f"{_grid(folder, first)}")
    return 0


def _changes(sets: Assignments, flags: dict[str, Any]) -> dict[str, Any]:
    """The protocol's fields of --set and of the flags that are given (not None), without "protocol."."""
    flags = {field: value for field, value in flags.items() if value is not None}
    changes = {field.removeprefix("protocol."): value for field, value in assignments(sets).items()}
    if twice := next(iter(changes.keys() & flags), None):
        raise ConfigError(f"--set {twice}={changes[twice]}: the call gives it by a flag of its own too; "
                          "give one of them")
    return changes | flags


def _drawn(sets: Assignments, tokens: bool, guidance: float | None, solver: str | None
           ) -> dict[str, dict[str, Any]]:
    """`guidance` and `sampler` as `api.sample` takes them, from --set and the flags beside it."""
    name = "token_sampler" if tokens else "sampler"
    sections: dict[str, dict[str, Any]] = {"guidance": {}, name: {}}
    for field, value in _changes(sets, {"guidance.scale": guidance, f"{name}.solver": solver}).items():
        section, _, own = field.partition(".")
        if section not in sections or not own:
            raise ConfigError(f"--set {field}={value}: without --npz N only fields of guidance and {name} "
                              "can be set, such as guidance.scale=2; give N too")
        sections[section][own] = value
    return {"guidance": sections["guidance"], "sampler": sections[name]}


def _npz(run: str, n: int, labels: tuple[str, ...] | None, out: Path | None, root: Path,
         changes: dict[str, Any]) -> int:
    from vfmlab import api
    from vfmlab.cli.training import check_environment

    check_environment()
    if labels is not None:
        raise ConfigError("--labels with --npz: its classes are the protocol's; give --set labels=balanced "
                          "or labels=random")
    if n < 1:
        raise ConfigError(f"--npz {n}: give the number of samples, for example 50000")
    path = api.sample_npz(run, n, out, root, changes, progress=counting("samples"))
    if os.environ.get("RANK", "0") == "0":
        print(f"{n} samples: {path}")
    return 0


# -- what comes in -----------------------------------------------------------------------------------------


def _image_files(given: Sequence[Path]) -> list[Path]:
    """Files as given, folders by the image files below them, in order of their names."""
    from vfmlab.data.decode import suffixes

    if not given:
        raise DataError("no image given; name a file or a folder: vfmlab reconstruct RUN IMAGE...")
    paths: list[Path] = []
    for path in given:
        if not path.is_dir():
            paths.append(path)
            continue
        below = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes()
                       and not p.name.startswith("."))
        if not below:
            raise DataError(f"folder '{path}' holds no images (known are {', '.join(sorted(suffixes()))})")
        paths += below
    return paths


def _chunks(count: int) -> Iterator[slice]:
    """Slices of at most CHUNK; where there are several, a line about the images that are done."""
    say = counting("images") if count > CHUNK else lambda done, total: None
    for start in range(0, count, CHUNK):
        end = min(start + CHUNK, count)
        yield slice(start, end)
        say(end, count)


# -- what goes out -----------------------------------------------------------------------------------------


def _begin(out: Path | None, run_path: Path, name: str, facts: dict[str, Any], names: list[str]) -> Path:
    """The folder for this call, with its manifest; the pictures of the call before are moved away."""
    from vfmlab import runs

    folder = runs.output_folder(out or run_path / name, _ours, out is None, within=None if out else run_path)
    old = ([*folder.glob("*.png")] if out is None
           else [folder / f"{each}.png" for each in [*_ours(folder), "grid"]])
    old = [path for path in [*old, folder / MANIFEST] if path.exists()]
    if old:
        earlier = next(path for n in itertools.count(1) if not (path := folder / "earlier" / str(n)).exists())
        earlier.mkdir(parents=True)
        for path in old:
            path.rename(earlier / path.name)
    _write_manifest(folder, facts, names)
    return folder


def _ours(folder: Path) -> list[str]:
    """Names of the pictures that the folder's manifest lists; [] where it has none."""
    from vfmlab.config.files import read_json

    try:
        manifest = read_json(folder / MANIFEST)
    except VfmlabError:
        return []
    names = manifest.get("pictures")
    whole = (manifest.get("format") == FORMAT and isinstance(names, list)
             and all(isinstance(n, str) for n in names))
    return [name for name in names if _safe(name) == name] if whole else []


def _write_manifest(folder: Path, facts: dict[str, Any], names: list[str]) -> None:
    from vfmlab import runs

    runs.write_json(folder / MANIFEST, {"format": FORMAT, **facts, "pictures": names})


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60] or "image"


def _save(folder: Path, images: Any, names: Sequence[str]) -> None:
    """Write `images` (N 3 H W in [-1, 1]) as NAME.png."""
    from torchvision.utils import save_image

    for image, name in zip(images, names, strict=True):
        save_image(image, folder / f"{name}.png", normalize=True, value_range=(-1, 1))


def _grid(folder: Path, images: Sequence[Any]) -> Path:
    """Write grid.png of `images` (each 3 H W in [-1, 1])."""
    from torchvision.utils import save_image

    columns = max(1, round(len(images) ** 0.5))
    save_image(list(images), folder / "grid.png", nrow=columns, normalize=True, value_range=(-1, 1))
    return folder / "grid.png"
