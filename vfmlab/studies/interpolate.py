"""What lies between two images, two noises, two classes; and two models from the same noise.

Frames in order, both ends included; images N 3 S S in [-1, 1], latents normalised, on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import plotly.graph_objects as go
import torch
from torch import Tensor, nn

from vfmlab import api
from vfmlab.diffusion import prompts
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation.lines import between, path_shape
from vfmlab.plots import primitives
from vfmlab.seeding import SampleRandom
from vfmlab.studies import explore
from vfmlab.tokenizers.base import Tokenizer

Kind = Literal["linear", "spherical"]
MOST = 64  # frames of one walk


def walk(a: Tensor, b: Tensor, frames: int = 9, kind: Kind = "linear") -> Tensor:
    """Points from a to b (same shape, any), ends included: [frames, *shape].

    linear: a straight line. spherical: along the arc between their directions, with lengths in between
    (Shoemake, 1985). In many dimensions a straight line between two noises passes through points shorter than
    any noise; the arc does not.

    Raises:
        ConfigError: shapes that differ, an unknown kind, frames outside 2 .. 64, or an arc from or to zero.
    """
    if a.shape != b.shape:
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ConfigError(f"ends have shapes {shapes}; a walk needs two points of one space")
    if kind not in get_args(Kind):
        raise ConfigError(f"kind = '{kind}': a walk is {' or '.join(get_args(Kind))}")
    if not 2 <= frames <= MOST:
        raise ConfigError(f"frames = {frames}: a walk has 2 to {MOST} frames")
    if kind == "linear":
        return between(a[None], b[None], frames - 1)[0]
    ends = torch.stack([a, b]).flatten(1).double()
    lengths = ends.norm(dim=1, keepdim=True)
    if lengths.min() == 0:
        raise ConfigError("an end of a spherical walk is zero and has no direction; take the linear one")
    x, y = ends / lengths
    angle = torch.arccos((x @ y).clamp(-1, 1))
    share = torch.linspace(0, 1, frames, dtype=torch.float64)[:, None]
    if torch.sin(angle) < 1e-6:  # the same direction (or opposite ones, between which no arc is the shortest)
        if angle > 1:
            raise ConfigError("the ends of a spherical walk lie opposite each other; take the linear one")
        points = x.expand(frames, -1)
    else:
        points = (torch.sin((1 - share) * angle) * x + torch.sin(share * angle) * y) / torch.sin(angle)
    points = points * torch.lerp(lengths[0], lengths[1], share)
    points[[0, -1]] = ends
    return points.to(a).view(-1, *a.shape)


@dataclass(frozen=True)
class Walk:
    """frames: F 3 S S. length: of the images' path over the distance of its ends, 1 for a straight one.

    roughness: 0 for an even straight one. Both are None where the ends are the same image, or for two frames.
    """

    frames: Tensor
    length: float | None
    roughness: float | None


def _walk(frames: Tensor) -> Walk:
    try:
        return Walk(frames, *map(float, path_shape(frames[None])))
    except DataError:
        return Walk(frames, None, None)


def images(tokenizer: Tokenizer, first: explore.Images, second: explore.Images, frames: int = 9,
           kind: Kind = "linear") -> Walk:
    """Between two images through a tokenizer's latent space; first, second: 1 3 S S, or a list of a file.

    Between codes there is nothing: of quantised tokenizers every frame is decoded from the nearest entries of
    the codebook.
    """
    z = torch.cat([explore.encode(tokenizer, first), explore.encode(tokenizer, second)])
    line = walk(z[0], z[1], frames, kind)
    if tokenizer.quantised:
        line = tokenizer.on_codebook(line.to(tokenizer.stat_mean.device)).cpu()
    # one noise along the line, which then shows the latent alone
    same = torch.zeros(len(line), dtype=torch.long)
    return _walk(explore.decode(tokenizer, line, same))


def pixels(first: Tensor, second: Tensor, frames: int = 9) -> Walk:
    """The same between the pixels themselves (1 3 S S each): what a latent space has to beat."""
    return _walk(walk(first[0], second[0], frames))


def figure(tokenizers: Mapping[str, Tokenizer], pictures: Tensor, first: int = 0, second: int = 1,
           frames: int = 9, kind: Kind = "linear") -> go.Figure:
    """From one of the images N 3 S S to another: between pixels, and through each tokenizer's latents."""
    a, b = pictures[first : first + 1], pictures[second : second + 1]
    rows = {"pixels": pixels(a, b, frames).frames}
    for name, tokenizer in tokenizers.items():
        line = images(tokenizer, a, b, frames, kind)
        rows[name if line.length is None else f"{name}  path {line.length:.2f}"] = line.frames
    return primitives.rows(rows, title="path: length of the images' way over their distance")


# -- diffusion ----------------------------------------------------------------------


def noises(model: api.LoadedDiffusion, label: int, seeds: tuple[int, int], frames: int = 9,
           kind: Kind = "spherical", **how: Any) -> Iterator[api.Preview]:
    """Samples of one class from noises between those of two seeds; previews as they form, the frames last.

    frames: how many, both ends included. seeds: the ends are the first sample of each seed, as `api.sample`
    draws it. how: as in `api.sample`. A class token that is denoised too starts in
    all frames from the first seed's noise.
    """
    _need_noise(model)
    ends = [SampleRandom(seed, [0]).randn(*model.tokenizer.latent_shape)[0] for seed in seeds]
    points = walk(ends[0], ends[1], frames, kind)
    yield from _frames(model, [label] * len(points), points, seeds[0], how)


def classes(model: api.LoadedDiffusion, labels: tuple[int, int], seed: int = 0, frames: int = 9,
            kind: Kind = "linear", **how: Any) -> Iterator[api.Preview]:
    """Samples from one noise under conditions between two classes: between the network's vectors for them.

    frames, how: as in :func:`noises`.
    """
    _need_noise(model)
    wrong = [label for label in labels if not 0 <= label < model.num_classes]
    if wrong:
        raise ConfigError(f"label {wrong[0]} is not one of this run's {model.num_classes} classes")
    first, second = (model.class_names[label] for label in labels)
    if api.sampling_protocol(model, [0], seed, how.get("guidance")).guidance.kind == "auto":
        raise ConfigError(f"run '{model.folder.id}' is guided by a weaker model, which has no classes in "
                          "between; interpolate between two noises, or set guidance.kind and weaker to null")
    names = [f"{first} to {second}, frame {i}" for i in range(frames)]
    network = blended(model.network, labels, frames, kind)
    mixed = replace(model, network=network, num_classes=frames, class_names=names)
    noise = SampleRandom(seed, [0]).randn(*model.tokenizer.latent_shape).expand(frames, -1, -1, -1)
    yield from _frames(mixed, list(range(frames)), noise, seed, how)


def _need_noise(model: api.LoadedDiffusion) -> None:
    if model.run.ar is not None:
        raise ConfigError(f"run '{model.folder.id}' draws codes one after the other: there is no noise, "
                          "and nothing lies between two codes; interpolate a diffusion run")


def _frames(model: api.LoadedDiffusion, labels: list[int], noise: Tensor, seed: int,
            how: dict[str, Any]) -> Iterator[api.Preview]:
    if (how.get("sampler") or {}).get("solver", model.run.protocol.sampler.solver) == "sde":
        way = "take euler, heun or dopri5 to interpolate"
        raise ConfigError(f"sampler.solver = 'sde' draws other noise for every frame; {way}")
    with closing(api.sample(model, labels, seed=seed, noise=noise, **how)) as stream:
        yield from stream


def blended(network: nn.Module, labels: tuple[int, int], frames: int, kind: Kind = "linear") -> nn.Module:
    """A view of `network` whose classes are the frames between two of its labels, then the null label.

    It shares all other weights with `network`, which stays as it is.
    """
    if (own := getattr(network, "prompts", None)) is not None:
        ends = own(torch.tensor([*labels, len(own)]))  # two texts, and the empty one
        tokens = torch.cat([walk(ends[0], ends[1], frames, kind), ends[2:]])
        return prompts.prompted(network, prompts.Prompts([""] * frames, lambda frame: tokens[frame]))
    table = network.label_embed.weight.detach()
    steps = walk(table[labels[0]], table[labels[1]], frames, kind)
    mixed = torch.cat([steps, table[network.num_classes][None]])
    view = copy.copy(network)
    view._modules = {**network._modules, "label_embed": nn.Embedding.from_pretrained(mixed)}
    view.num_classes = frames
    return view


def together(streams: Mapping[str, Iterator[api.Preview]]) -> Iterator[dict[str, api.Preview]]:
    """Several samplings step by step beside each other: the newest preview of each, until all are done.

    Closing this closes all. Models with latents of one shape start from the same noise for one seed.
    """
    newest: dict[str, api.Preview] = {}
    with ExitStack() as stack:
        waiting = {name: stack.enter_context(closing(stream)) for name, stream in streams.items()}
        while waiting:
            for name in list(waiting):
                preview = next(waiting[name], None)
                if preview is None:
                    del waiting[name]
                else:
                    newest[name] = preview
            if waiting:
                yield dict(newest)
