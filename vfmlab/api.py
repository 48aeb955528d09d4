"""The one door to the bench for notebooks, the command line and the app: train, evaluate, sample,
reconstruct, load.

A *reference* to a run is its id, a unique prefix of it, or its directory. A *preset* is a name from
`vfmlab.presets`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vfmlab import config, data, presets, runs
from vfmlab.config import files
from vfmlab.errors import CheckpointError, ConfigError, DataError
from vfmlab.nn import parts as given
from vfmlab.seeding import SampleRandom
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.tokenizers.shapes import check_images
from vfmlab.training.events import Event
from vfmlab.training.task import Task
from vfmlab.weights.load import (
    LoadedDiffusion,
    build_tokenizer,
    device,
    load_diffusion,
    load_generator,
    load_tokenizer,
    tokenizer_run,
    weights_file,
    with_weaker,
)

__all__ = [
    "LoadedDiffusion", "Preview", "build_tokenizer", "device", "evaluate", "load_diffusion", "load_generator", "load_tokenizer", "open_task",
    "read_images", "reconstruct", "resolve", "sample", "sample_npz", "sampling_protocol", "tokenizer_run", "train",
]  # fmt: skip

if TYPE_CHECKING:
    from vfmlab.evaluation.number import Report
    from vfmlab.evaluation.ranks import Ranks

CHUNK = 256  # images drawn at a time
STRONGEST = 1000.0  # scale of guidance


Described = config.Recipe | config.Phase | dict[str, Any] | str | Path


def resolve(run: Described, overrides: dict[str, Any] | str | None = None, seed: int | None = None,
            parts: Mapping[str, Any] | None = None) -> config.Recipe:
    """A recipe, from one as JSON (a dict), a phase, or a name, with dotted `overrides` applied.

    A name is `PRESET[+VARIANT...][@PRESET]`, see `vfmlab.presets.table`; a config file (.json) may stand for
    a preset.

    `seed` stands for the field of that name. Where `overrides` name it too, a `seed` that only repeats the
    preset's own (the default of a notebook's parameter) gives way. parts: functions and classes from a
    notebook's cell, by the place where they go; see :mod:`vfmlab.nn.parts`.

    Raises:
        ConfigError: an unknown preset or field, a value that cannot be, `seed` and overrides that contradict
        each other.
    """
    if isinstance(run, dict):
        run = config.parse(run)
    described = run.recipe if isinstance(run, config.Phase) else run

    def with_(values: dict[str, Any]) -> config.Recipe:
        if isinstance(described, config.Recipe):
            return config.override(described, values)
        return presets.get(str(described), values)

    values = config.located(config.parse_overrides(overrides))
    if seed is not None and seed != values.setdefault("seed", seed) and seed != with_({}).seed:
        raise ConfigError(f"seed = {seed}, and overrides say seed = {values['seed']}; give one of them")
    recipe = with_(values)
    return recipe if not parts else recipe.model_copy(update={"parts": given.take(parts)})


def train(run: Described, root: str | Path = "runs", overrides: dict[str, Any] | str | None = None,
          until: str | None = None, parts: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Train all phases of `run` that are not finished yet, and tell what happens.

    Args:
        run: a preset's name, a recipe (as JSON, a dict or a file), or a phase.
        overrides: dotted names, e.g. `{"train.samples": 5000}`.
        root: folder of the run directories. until: stop after this phase: a stage's name, or "tokenizer" (all
        stages). parts: a loss, a module or a callback given from a notebook's cell, as in
        :mod:`vfmlab.nn.parts`; the run's id carries the hash of their source, which is saved in its `parts/`.

    Closing the generator (or Ctrl-C) saves the state; calling again with the same config goes on from there.
    """
    whole = resolve(run, overrides, parts=parts)
    phases = whole.phases()
    ends = [i for i, phase in enumerate(phases) if until in (phase.stage, phase.kind)]
    if until is not None and not ends:
        named = dict.fromkeys([*(phase.stage for phase in phases), *(phase.kind for phase in phases)])
        raise ConfigError(f"until = '{until}': this run's phases are {', '.join(named)}")
    files.sweep(runs.root_folder(root) / ".latents")
    phases = phases if until is None else phases[: ends[-1] + 1]
    begun = [phase for phase in phases if phase.imported is None and not runs.settled(phase, root)]
    if begun:
        from vfmlab.training import check, dryrun

        with dryrun.exhaustion(begun[0].kind, begun[0].train):  # of parts that are too large to be built
            check.check(phases, root)
    for phase in phases:
        with runs.starting(phase, root) as folder:
            if folder.status().state == "finished":
                weights_file(folder, folder.ema.exists())
                for line in data.account.revisit(folder.path, phase.data):
                    yield Event("warning", phase.id, phase.kind, phase.budget, phase.budget,
                                data={"message": line})
                yield Event("skip", phase.id, phase.kind, phase.budget, phase.budget)
            elif phase.imported is not None:
                from vfmlab.weights.import_release import import_run

                yield from import_run(phase, root)
            else:
                from vfmlab.training import dryrun, loop

                with dryrun.exhaustion(phase.kind, phase.train):
                    task = open_task(phase, root)
                given.save(phase.recipe.parts, folder.path / "parts")
                yield from loop.fit(task, folder)
                del task  # its memory is free when the next one is built


def open_task(phase: config.Phase, root: str | Path = "runs") -> Task:
    """What trains `phase`, on the runs under `root` that it builds on.

    Raises:
        ConfigError: parts that do not fit. RunError, CheckpointError: what it builds on is missing or
        damaged.
    """
    from vfmlab.training import ar, diffusion, pretrain, tokenizer

    before = None if phase.parent is None else load_tokenizer(phase.parent, root)
    folder = None if phase.parent is None else runs.open_run(phase.parent, root)
    latents = runs.root_folder(root) / ".latents"
    tuned = folder if phase.tuned else None  # what the tokenizer's losses learned goes on too
    tasks = {"pretrain": lambda: pretrain.PretrainTask(phase),
             "tokenizer": lambda: tokenizer.TokenizerTask(phase, before, folder),
             "diffusion": lambda: diffusion.DiffusionTask(phase, before, latents, tuned),
             "ar": lambda: ar.ARTask(phase, before, latents)}
    return tasks[phase.kind]()


def evaluate(ref: str | Path, root: str | Path = "runs",
             protocol: dict[str, Any] | config.Protocol | None = None, again: bool = False,
             progress: Callable[[int, int], object] | None = None) -> Report:
    """All numbers of a run under a protocol; written to the run's report.json, and read from there the next
    time. All processes of an `accelerate launch` take part.

    Args:
        protocol: dotted changes to the run's protocol, e.g. `{"n": 500, "guidance.scale": 2}`, with or
        without a recipe's "protocol." in front, or another one. again: measure anew. progress: called with
        (images or samples done, in all), on the first process.

    Returns:
        a mapping of :class:`~vfmlab.evaluation.number.Number`: `report["psnr"].value`.
    """
    from vfmlab.evaluation import evaluate as measure

    folder, run, ranks = _under(ref, root, protocol)
    load = functools.partial(load_tokenizer, folder.path, root)
    if run.generator is not None:
        load = functools.partial(load_generator, folder.path, root, decoder=run.protocol.decoder)
    return measure.cached(run, folder, load, again=again, progress=progress, ranks=ranks)


def _under(ref: str | Path, root: str | Path, protocol: dict[str, Any] | config.Protocol | None
           ) -> tuple[runs.RunDir, config.Phase, Ranks]:
    """A run's directory, its config with the changed protocol, and the processes that work together."""
    from vfmlab.evaluation.ranks import launched

    folder = runs.open_run(ref, root)
    run = folder.config()
    if isinstance(protocol, config.Protocol):
        run = config.override(run, {"protocol": protocol.model_dump(mode="json")})
    elif protocol:
        run = config.override(run, {f"protocol.{key.removeprefix('protocol.')}": value
                                    for key, value in config.parse_overrides(protocol).items()})
    run.check_guidance(run.protocol.guidance)
    return folder, run, launched()


def sample_npz(ref: str | Path, n: int = 50_000, out: str | Path | None = None, root: str | Path = "runs",
               protocol: dict[str, Any] | config.Protocol | None = None,
               progress: Callable[[int, int], object] | None = None) -> Path:
    """Draw n samples of a generator run into one npz file for ADM's evaluator (`arr_0`, uint8 N H W 3).

    They are those that :func:`evaluate` measures under the same protocol, which reads them where they lie in
    the run's directory. Called again, it goes on; all processes of an `accelerate launch` take part.

    Args:
        out: the file; None: npz/ in the run's directory. protocol: as in :func:`evaluate`.
        progress: called with (samples drawn, n), on the first process.

    Raises:
        ConfigError: processes that disagree, a protocol that cannot be. DataError: a file of other samples.
    """
    from vfmlab.evaluation import evaluate as measure
    from vfmlab.evaluation import prompts, samples

    folder, run, ranks = _under(ref, root, protocol)
    if run.generator is None:
        raise ConfigError(f"run '{folder.id}' is a {run.kind} run and draws no samples; give a generator's")
    protocol = config.override(run, {"protocol.n": n}).protocol
    loaded = load_generator(folder.path, root, protocol.ema, decoder=protocol.decoder)
    with_weaker(loaded.network, loaded.tokenizer, protocol.guidance, folder.path.parent)
    source = data.open_source(run.data, "val")
    network = prompts.prompted(loaded.network, protocol, source)
    classes = loaded.num_classes if protocol.prompts is None else network.num_classes
    about = samples.facts(protocol, source, run=folder.id, weights=measure.weights(folder, protocol))
    path = samples.place(folder.path, n, about) if out is None else files.expand(out)
    if path.suffix != ".npz":
        raise ConfigError(f"out = '{path}': the file's name ends in .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    return samples.write(network, loaded.tokenizer, protocol, classes, path, about, run.seed, ranks, progress)


@dataclass(frozen=True)
class Preview:
    """One step of sampling. images: N 3 H W in [-1, 1], decoded from the current estimate of the clean
    latent; t: 1 (noise) .. 0 (data). Of an ar generator: from the codes drawn so far, with grey where the
    others will be; t: the share of these.

    note: what a reader must know of the settings; normally empty.
    """

    step: int
    total: int
    t: float
    images: Tensor
    final: bool = False
    note: str = ""


def sampling_protocol(model: LoadedDiffusion, labels: Sequence[int], seed: int = 0,
                      guidance: float | dict[str, Any] | None = None, steps: int | None = None,
                      sampler: dict[str, Any] | None = None) -> config.Protocol:
    """The run's protocol with what is given here in its place; arguments as in :func:`sample`.

    Raises:
        ConfigError: no label or one that is no class, a seed, scale or number of steps that cannot be,
            guidance away from a null label that was not trained.
    """
    if not len(labels):
        raise ConfigError("labels is empty; name at least one class")
    wrong = [label for label in labels if not 0 <= label < model.num_classes]
    if wrong:
        names = ", ".join(f"{i} {name}" for i, name in enumerate(model.class_names[:12]))
        raise ConfigError(f"label {wrong[0]} is not one of this run's {model.num_classes} classes ({names})")
    if not 0 <= _whole("seed", seed) < 2**63:
        raise ConfigError(f"seed = {seed}: a seed is an integer from 0 to 2**63 - 1")
    scale = guidance if isinstance(guidance, dict) else {} if guidance is None else {"scale": guidance}
    fields = config.parse_overrides(sampler)
    if steps is not None and steps != fields.setdefault("steps", steps):
        raise ConfigError(f"steps = {steps}, and sampler says {fields['steps']}; give one of them")
    if model.run.ar is not None and "steps" in fields:
        raise ConfigError(f"steps = {fields['steps']}: the ar generator takes one step a code, "
                          f"{model.network.codes.tokens} an image; leave steps out")
    sections = {"guidance": scale, "sampler" if model.run.ar is None else "token_sampler": fields}
    changes = {f"protocol.{section}.{key}": value for section, part in sections.items()
               for key, value in part.items()}
    protocol = config.override(model.run, changes).protocol
    model.run.check_guidance(protocol.guidance)
    if not protocol.guidance.scale <= STRONGEST:
        raise ConfigError(f"guidance.scale = {protocol.guidance.scale:g}: images are noise long before; give "
                          f"at most {STRONGEST}")
    return protocol


def _whole(name: str, value: Any) -> int:
    """`value` as an int; :class:`ConfigError` for what is none, such as 1.5."""
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} = {value!r} is no integer") from None


def _classes(labels: Sequence[int | str] | None, names: Sequence[str]) -> list[int]:
    """Classes as :func:`sample` takes them -> their numbers; None: all."""
    if labels is None:
        return list(range(len(names)))
    try:
        given = [labels] if isinstance(labels, str) else list(labels)
    except TypeError:  # one number
        given = [labels]
    return [data.class_number(each, names) if isinstance(each, str) else _whole("label", each)
            for each in given]


def sample(model: LoadedDiffusion | str | Path, labels: Sequence[int | str] | None = None, seed: int = 0,
           guidance: float | dict[str, Any] | None = None, steps: int | None = None,
           sampler: dict[str, Any] | None = None, root: str | Path = "runs", ema: bool = True,
           previews: int = 8, decoder: str | Path | None = None, noise: Tensor | None = None,
           first: int = 0, prompts: Sequence[str] | None = None) -> Iterator[Preview]:
    """Draw images of `labels` (classes by name or number, one each; default: one per class); yields previews
    and ends with the images.

    More than `CHUNK` images are drawn in parts, without previews.

    Args:
        model: a loaded generator or a reference. guidance: scale, or fields of `config.Guidance`.
        steps, sampler: fields of `config.Sampler`, for an ar generator `config.TokenSampler` (no steps);
        what is not given comes from the run's protocol.
        seed, first: image i is drawn from noise seeded by (seed, first + i), whatever else is in the batch.
        previews: at most so many intermediate decodings. decoder: as in :func:`load_generator`, for a
        reference.
        noise: N C h w to start from, one for each label, in place of the seed's; an ar generator has none.
        All else that is drawn (a class token, a decoder's noise) is then that of number `first` for all.
        prompts: texts in place of classes, for a generator that reads text; its labels are their numbers.

    Raises:
        ConfigError: a prompt that cannot be read; as in :func:`sampling_protocol`. CheckpointError: the
        weights give images that are not finite.
    """
    loaded = (model if isinstance(model, LoadedDiffusion)
              else load_generator(model, root, ema, decoder=decoder))
    loaded = loaded if prompts is None else loaded.prompted(prompts)
    labels = _classes(labels, loaded.class_names)
    protocol = sampling_protocol(loaded, labels, seed, guidance, steps, sampler)
    beside = root if loaded.folder is None else loaded.folder.path.parent
    with_weaker(loaded.network, loaded.tokenizer, protocol.guidance, beside)
    previews = previews if len(labels) <= CHUNK else 0
    total = protocol.sampler.steps if loaded.run.ar is None else loaded.network.codes.tokens
    stride, images, step = max(1, -(-total // max(1, previews))), [], None
    if noise is not None and loaded.run.ar is not None:
        raise ConfigError("noise: an ar generator starts from a class alone; give seed in its place")
    if noise is not None and noise.shape != (len(labels), *loaded.tokenizer.latent_shape):
        raise ConfigError(f"noise of shape {tuple(noise.shape)}: {len(labels)} labels need "
                          f"{(len(labels), *loaded.tokenizer.latent_shape)}")
    for part in torch.arange(len(labels)).split(CHUNK):
        y = torch.tensor(labels)[part].to(loaded.device)
        ids, start = first + part, None if noise is None else noise[part]
        shown = ids if noise is None else torch.full_like(ids, first)
        for step in _trajectory(loaded, y, SampleRandom(seed, shown), protocol, start):
            if previews and step.number < step.total and step.number % stride == 0:
                yield Preview(step.number, step.total, step.t, _decode(loaded, step.estimate, seed, shown))
        images.append(_finite(_decode(loaded, step.x, seed, shown), f"run '{loaded.run.id}'"))
    yield Preview(step.total, step.total, step.t, torch.cat(images), final=True, note=_note(protocol))


def _note(protocol: config.Protocol) -> str:
    """That tokens are drawn without guidance, where a setting may be meant to guide them; else ""."""
    scale, tokens = protocol.guidance.scale, protocol.token_sampler
    if tokens is None or scale > 1 or (scale == 1 and tokens.guidance_power is None):
        return ""
    more = ", and token_sampler.guidance_power has nothing to raise" * (tokens.guidance_power is not None)
    return f"guidance.scale {scale:g}: 1 or less means no guidance here{more}"


def _trajectory(loaded: LoadedDiffusion, labels: Tensor, random: Any, protocol: config.Protocol,
                noise: Tensor | None) -> Iterator[Any]:
    """The steps of one batch; `x` and `estimate` of each are latents, or codes drawn so far."""
    if loaded.run.ar is not None:
        from vfmlab.ar import sampling as tokens

        return tokens.trajectory(loaded.network, labels, random, protocol.token_sampler, protocol.guidance)
    from vfmlab.diffusion import sampling

    return sampling.trajectory(loaded.network, labels, random, protocol.sampler, protocol.guidance,
                               loaded.tokenizer.latent_shape, loaded.num_classes, noise)


@torch.no_grad()
def _decode(loaded: LoadedDiffusion, z: Tensor, seed: int, ids: Tensor) -> Tensor:
    """Images on the CPU of latents, or of codes drawn so far; seed, ids: of the samples, as evaluations take
    them for a decoder that draws noise."""
    if loaded.run.ar is not None:
        from vfmlab.ar.sampling import partial_images

        return torch.cat([partial_images(loaded.tokenizer, part).cpu() for part in z.split(64)])
    from vfmlab.evaluation.roundtrip import images_of

    return images_of(loaded.tokenizer, z, seed, ids, part=64)


def _finite(images: Tensor, where: str) -> Tensor:
    bad = ~torch.isfinite(images).flatten(1).all(1)
    if bad.any():
        raise CheckpointError(f"{where}: {int(bad.sum())} of {len(bad)} images are not finite; its weights "
                              "are broken: put a copy back, or train it again")
    return images


def read_images(paths: Sequence[str | Path] | str | Path, size: int) -> Tensor:
    """Image files (a list, or one) -> [N 3 size size] in [-1, 1], with the one crop of the bench.

    Raises:
        DataError: a file that is no image, with its name; what is no path.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    try:
        paths = [Path(path) for path in paths]
    except TypeError:
        raise DataError(f"images: {type(paths).__name__}; give paths of image files, or a Tensor") from None
    if not paths:
        raise DataError("images: an empty list; give paths of image files")
    return torch.stack([data.to_float(data.read_image(path, size)) for path in paths])


def images_for(tokenizer: Tokenizer, images: Tensor | Sequence[str | Path]) -> Tensor:
    """Images as `tokenizer` takes them, N 3 S S in [-1, 1]; files are read with the one crop of the bench.

    Raises:
        DataError: a file that is no image, or too large; tensors of another size, 8 bits or range.
    """
    if not isinstance(images, Tensor):
        return read_images(images, tokenizer.size)
    check_images(images, "images", tokenizer.size)
    if not len(images):
        raise DataError("images: none; give at least one")
    return images.float()


@torch.no_grad()
def reconstruct(model: Tokenizer | str | Path, images: Tensor | Sequence[str | Path],
                root: str | Path = "runs") -> tuple[Tensor, Tensor, Tensor]:
    """Images through a tokenizer and back (posterior mode).

    A decoder that draws noise takes that of seed 0 and the image's place.

    Args:
        model: a loaded tokenizer or a reference to a run. images: [N 3 H W] in [-1, 1], or image files.

    Returns:
        originals as the tokenizer saw them, reconstructions (both [N 3 S S] in [-1, 1], on the CPU), PSNR [N]
        in dB.
    """
    from vfmlab.evaluation.pixels import psnr
    from vfmlab.evaluation.roundtrip import images_of

    tokenizer = model if isinstance(model, Tokenizer) else load_tokenizer(model, root)
    images = images_for(tokenizer, images)
    where = tokenizer.stat_mean.device
    z = torch.cat([tokenizer.encode(part.to(where)).mode() for part in images.split(64)])
    restored = images_of(tokenizer, z, part=64)
    _finite(restored, f"tokenizer '{tokenizer.config.method}'")
    return images.cpu(), restored, psnr(images.cpu(), restored)
