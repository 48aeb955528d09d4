"""What instruments measure: one representation of the held-out images, whichever network makes it.

A subject is a tokenizer (its normalised latent, posterior mode), a diffusion model (tokens after one block,
at one t, under the null label) or a vision model (one layer). Its features of held-out and of training images
are computed once per subject and, with a folder for them, once per weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab import config, data
from vfmlab.diffusion import path as flow
from vfmlab.errors import ConfigError, DataError, VfmlabError
from vfmlab.evaluation import cache, perturbations
from vfmlab.evaluation.perturbations import CLEAN, Perturbation, sides_of
from vfmlab.evaluation.probes import training_images
from vfmlab.evaluation.protocol import Resolved, exact, resolve, selection
from vfmlab.evaluation.reference import Reference
from vfmlab.evaluation.representation import pool
from vfmlab.evaluation.roundtrip import CPU_PART, evaluating
from vfmlab.nn.transforms import resize
from vfmlab.runs import RunDir
from vfmlab.seeding import SampleRandom, derive
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.weights import io

# of maps in memory; wide representations keep fewer images, and their numbers say how many
MAP_BYTES = 2**28
FEWEST_MAPS = 128
T, NULL = 0.5, "null"  # where a diffusion model is read, as in VFM-VAE's evaluation
Reads = Callable[[Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Maps:
    """Feature maps N C h w with their images' labels, indices (long N) and source."""

    maps: Tensor
    labels: Tensor
    indices: Tensor
    source: data.ImageSource

    def __len__(self) -> int:
        return len(self.maps)

    def images(self, n: int | None = None) -> Tensor:
        """The first n images (all: None) in [-1, 1], N 3 S S."""
        return data.to_float(self.source.batch(self.indices[:n]).images)


@dataclass
class Subject:
    """See the module. Made by :func:`of_tokenizer`, :func:`of_diffusion`, :func:`of_vision_model`.

    Attributes:
        kind: "tokenizer", "diffusion" or "vfm". reads: images B 3 s s in [-1, 1] and their ids -> maps B C h
            w. facts: of the reading; they enter the hash, and are the same for all subjects whose numbers may
            be compared. weights: digest of what computes the features. modules: in eval mode while they
            are read. store: folder for features, or None. folder: of the run, where there is one.
    """

    kind: str
    name: str
    cfg: config.Data
    protocol: config.Protocol
    reads: Reads
    facts: dict[str, Any]
    weights: str
    device: torch.device
    modules: Sequence[nn.Module]
    reference: Reference
    cell: int = 1
    store: Path | None = None
    folder: RunDir | None = None
    tokenizer: Tokenizer | None = None
    network: nn.Module | None = None
    num_classes: int = 0
    _pooled: dict[str, Tensor] = field(default_factory=dict)
    _maps: dict[str, Maps] = field(default_factory=dict)

    @cached_property
    def source(self) -> data.ImageSource:
        return data.open_source(self.cfg, "val")

    @cached_property
    def resolved(self) -> Resolved:
        return resolve(exact(self.protocol), self.cfg, self.source)

    @property
    def n(self) -> int:
        """Held-out images of the protocol."""
        return self.resolved.n

    def section(self, instrument: Mapping[str, Any], reference: bool = False) -> Resolved:
        """The protocol of a number that an instrument with these facts measures here."""
        more = {"reference": self.reference.facts()} if reference else {}
        held = self._maps.get("val")
        if held is not None and len(held) < self.n:  # wide maps of fewer images are held: another protocol
            instrument = {**instrument, "maps": len(held)}
        return Resolved({**self.resolved.sections, "representation": self.facts, **more,
                         "instrument": dict(instrument)})

    # -- features -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, images: Tensor, ids: Sequence[int]) -> Tensor:
        """Images B 3 s s in [-1, 1] -> maps B C h w (fp32, on the CPU), a few at a time."""
        part = CPU_PART if self.device.type == "cpu" else len(images)
        with evaluating(*self.modules):
            maps = []
            for k, x in enumerate(images.split(part)):
                x = x.to(self.device, memory_format=torch.channels_last)
                maps.append(self.reads(x, ids[k * part : k * part + len(x)]).float().cpu())
        return torch.cat(maps)

    @cached_property
    def scales(self) -> bool:
        """Whether smaller images can be read as they are, on grids that shrink with them."""
        if self.kind == "diffusion":
            return False
        size = self.cfg.size
        try:
            grid = self.read(torch.zeros(1, 3, size, size), [0]).shape[-1]
            smaller = set(sides_of(size, self.cell))
            sides = [self.read(torch.zeros(1, 3, s, s), [0]).shape[-1] * size / s for s in smaller]
        except (VfmlabError, RuntimeError, AssertionError, ValueError):
            return False
        return all(side == grid for side in sides)

    @property
    def held_out(self) -> Maps:
        """Maps of the protocol's held-out images, as many as fit into `MAP_BYTES`."""
        return self._read_maps("val", self.source, lambda: selection(self.resolved, self.source))

    @property
    def training(self) -> Maps:
        """Maps of a seeded choice of training images: the one that the probes of a report are fitted on."""
        source = data.open_source(self.cfg, "train")
        return self._read_maps("train", source, lambda: training_images(source, self.protocol.seed))

    def _read_maps(self, split: str, source: data.ImageSource, which: Callable[[], Tensor]) -> Maps:
        if split in self._maps:
            return self._maps[split]
        indices = which()
        path = self._path("maps", split, source.fingerprint, len(indices), self.protocol.seed)

        def read() -> dict[str, Tensor]:
            rows, labels, used, room = [], [], [], len(indices)
            for part in indices.split(self.protocol.batch):
                batch = source.batch(part[: room - sum(map(len, rows))])
                rows.append(self.read(data.to_float(batch.images), part.tolist()[: len(batch.labels)]))
                labels.append(batch.labels)
                used.append(batch.indices)
                room = min(room, max(FEWEST_MAPS, MAP_BYTES // (4 * rows[0][0].numel())))
                if sum(map(len, rows)) >= room:
                    break
            columns = {"maps": rows, "labels": labels, "indices": used}
            tensors = {name: torch.cat(parts)[:room] for name, parts in columns.items()}
            if not torch.isfinite(tensors["maps"]).all():
                raise DataError(f"features of '{self.name}' are not finite; look at the network that made "
                                "them")
            return tensors

        tensors = cache.stored(path, read)
        self._maps[split] = Maps(tensors["maps"], tensors["labels"], tensors["indices"], source)
        return self._maps[split]

    def pooled(self, perturbation: Perturbation = CLEAN) -> Tensor:
        """Token-mean features of all held-out images of the protocol, seen through `perturbation`: N C."""
        if perturbation.name in self._pooled:
            return self._pooled[perturbation.name]
        if perturbation == CLEAN and len(self.held_out) == self.n:
            return pool(self.held_out.maps)
        path = self._path("pooled", perturbation.name, perturbation.facts, self.source.fingerprint, self.n,
                          self.protocol.seed)

        def read(images: Tensor, ids: list[int]) -> Tensor:
            return pool(self.read(images if self.scales else resize(images, self.cfg.size), ids))

        self._pooled[perturbation.name] = perturbations.features(
            path, self.source, selection(self.resolved, self.source), perturbation, self.protocol.seed,
            self.cell, self.protocol.batch, read)
        return self._pooled[perturbation.name]

    def theirs(self, perturbation: Perturbation = CLEAN) -> Tensor:
        """The reference's token-mean features of the same images with the same perturbation: N D."""
        return self.reference.features(self.source, self.resolved, perturbation, self.protocol.batch,
                                       self.device, self.cell)

    def _path(self, *what: Any) -> Path | None:
        key = config.digest([self.weights, self.facts, *what])
        return None if self.store is None else self.store / f"{key}.safetensors"

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents -> images in [-1, 1] on the CPU; tokenizers only.

        A decoder that draws noise gives all of them one noise: what differs between two images then comes
        from their latents.
        """
        if self.tokenizer is None or self.kind != "tokenizer":
            what = f"'{self.name}' is a {self.kind} subject and decodes nothing"
            raise ConfigError(f"{what}; measure its tokenizer's run")
        part = CPU_PART if self.device.type == "cpu" else 256
        with torch.no_grad(), evaluating(self.tokenizer):
            return torch.cat([self.tokenizer.decode(x.to(self.device)).cpu() for x in z.split(part)])


# -- the three kinds ---------------------------------------------------------------------------------------


def of_tokenizer(tokenizer: Tokenizer, cfg: config.Data, protocol: config.Protocol, reference: Reference,
                 name: str = "tokenizer", **more: Any) -> Subject:
    """The normalised latent (posterior mode); raw while the tokenizer has no statistics, and then said so."""
    known = int(tokenizer.stat_count) > 0
    facts = {"of": "tokenizer", "read": "posterior mode", "latent": "normalised" if known else "raw"}

    def reads(images: Tensor, ids: Sequence[int]) -> Tensor:
        return tokenizer.normalise(tokenizer.posterior(images).mode().float())

    vfm = tokenizer.vfm.fingerprint if tokenizer.vfm is not None else ""
    where, cell = tokenizer.stat_mean.device, tokenizer.config.factor
    weights = f"{io.digest(tokenizer)} {vfm}"
    return Subject("tokenizer", name, cfg, protocol, reads, facts, weights, where, [tokenizer], reference,
                   cell, tokenizer=tokenizer, **more)


def of_diffusion(network: nn.Module, tokenizer: Tokenizer, cfg: config.Data, protocol: config.Protocol,
                 reference: Reference, num_classes: int, name: str = "diffusion", block: int | None = None,
                 t: float = T, **more: Any) -> Subject:
    """Tokens after one block (None: the middle one) at time t, null label, noise seeded per image."""
    block = max(1, network.depth // 2) if block is None else block
    facts = {"of": "diffusion", "block": block, "t": t, "label": NULL}
    if getattr(getattr(network, "config", None), "token", None) is not None:
        facts["class token"] = "its mean"  # which says nothing of the image

    def reads(images: Tensor, ids: Sequence[int]) -> Tensor:
        z = tokenizer.encode(images).mode()
        return tokens_at(network, z, t, noise_of(z, ids, protocol.seed), (block,))[block]

    vfm = tokenizer.vfm.fingerprint if tokenizer.vfm is not None else ""
    weights = f"{io.digest(network)} {io.digest(tokenizer)} {vfm}"
    where, cell = tokenizer.stat_mean.device, tokenizer.config.factor
    return Subject("diffusion", name, cfg, protocol, reads, facts, weights, where, [network, tokenizer],
                   reference, cell, tokenizer=tokenizer, network=network, num_classes=num_classes, **more)


def of_vision_model(vfm: nn.Module, cfg: config.Data, protocol: config.Protocol, reference: Reference,
                    layer: int = -1, **more: Any) -> Subject:
    """Maps of one layer of a frozen vision model, at its own resolution."""
    vfm.check_layers((layer,))
    facts, name = {"of": "vfm", "layer": layer}, f"vfm:{vfm.facts.name}@{layer}"

    def reads(images: Tensor, ids: Sequence[int]) -> Tensor:
        return vfm.features(images, (layer,)).maps[layer]

    weights = f"{vfm.facts.name} {vfm.fingerprint} {vfm.upscale}"
    grid = vfm.grid(layer)[0]
    cell = cfg.size // grid if cfg.size % grid == 0 else 1
    return Subject("vfm", name, cfg, protocol, reads, facts, weights, vfm.mean.device, [vfm], reference, cell,
                   **more)


def noise_of(z: Tensor, ids: Sequence[int], seed: int) -> Tensor:
    """The noise under which images are read, the same for an image whatever else is in the batch."""
    return SampleRandom(derive("diffusion features", seed), ids, z.device).randn(*z.shape[1:])


@torch.no_grad()
def tokens_at(network: nn.Module, z: Tensor, t: float, noise: Tensor,
              blocks: tuple[int, ...]) -> dict[int, Tensor]:
    """Maps B D h w after `blocks` of a diffusion network for latents z (B C h w) noised to t, label null.

    A class token in front of the latents' tokens is left out. 0 is the embedded input.
    """
    point = flow.of(network).interpolate(z, noise, torch.full((len(z),), float(t), device=z.device))
    null = torch.full((len(z),), network.num_classes, dtype=torch.long, device=z.device)
    tokens = network(point.x, point.t, null, features_at=blocks)[1]
    h, w = network.grid
    return {k: v[:, v.shape[1] - h * w :].transpose(1, 2).unflatten(2, (h, w)) for k, v in tokens.items()}
