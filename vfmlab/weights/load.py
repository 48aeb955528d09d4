"""Trained models from run directories: tokenizers, and generators with theirs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from vfmlab import config, runs, vfm
from vfmlab.ar.llamagen import CodeShape
from vfmlab.diffusion import path as flow
from vfmlab.diffusion import prompts
from vfmlab.errors import CheckpointError, ConfigError, RunError
from vfmlab.nn import parts
from vfmlab.registry import NETWORKS, TOKEN_NETWORKS, TOKENIZERS
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.weights import io

SAME = 1e-3  # of a latent's std: tokenizers that differ by less have the same latents


def device() -> torch.device:
    """CUDA, MPS or another accelerator where there is one, else the CPU."""
    return (torch.accelerator.current_accelerator() if torch.accelerator.is_available()
            else torch.device("cpu"))


def tokenizer_run(ref: str | Path, root: str | Path = "runs") -> runs.RunDir:
    """The run directory of the tokenizer that `ref` is, has tuned, or was trained on."""
    folder = runs.open_run(ref, root, kind="tokenizer")
    phase = folder.config()
    if phase.tokenizer_phase is None:
        raise RunError(f"run '{folder.id}' is a {phase.kind} run and has no tokenizer; give a tokenizer or "
                       "generator run")
    return folder if phase.tuned or phase.tokenizer_phase is phase else _parent(folder)


def _parent(folder: runs.RunDir) -> runs.RunDir:
    """The run whose tokenizer a generator is built on: beside it."""
    parent, beside = folder.config().parent, folder.path.parent
    if not (beside / parent).is_dir():
        raise RunError(f"run '{folder.id}' needs its tokenizer's run '{parent}', which is not in '{beside}'; "
                       "copy that directory there, too")
    return runs.open_run(parent, beside)


def build_tokenizer(run: config.Recipe | config.Phase) -> Tokenizer:
    """The tokenizer of a config, not trained, on the CPU."""
    if run.tokenizer is None:
        raise ConfigError(f"run '{run.name}' has no 'tokenizer' section")
    model = vfm.build(run.vfm, run.data.size) if run.vfm is not None else None
    tokenizer = TOKENIZERS.get(run.tokenizer.method)(run.tokenizer, run.data.size, model)
    recipe = run.recipe if isinstance(run, config.Phase) else run
    parts.replace(tokenizer, recipe.parts, "tokenizer", recipe.seed)
    return tokenizer


def load_tokenizer(ref: str | Path, root: str | Path = "runs", ema: bool = True,
                   on: str | torch.device | None = None) -> Tokenizer:
    """A trained tokenizer in eval mode, with its latent statistics.

    Args:
        ref: a tokenizer run, or a diffusion run (its tokenizer is loaded, as tuned by it where it was). ema:
            averaged weights. on: device.

    Raises:
        RunError: no such run. CheckpointError: its weights are missing, damaged, of another shape, or were
            trained on other VFM weights than those found now.
    """
    asked = runs.open_run(ref, root, kind="tokenizer")
    if asked.config().tuned:
        return load_diffusion(asked.path, root, ema, on).tokenizer
    folder = tokenizer_run(ref, root)
    way = "give the old weights with vfm.weights=FILE or train again"
    return tokenizer_from(folder.config(), weights_file(folder, ema), f"run '{folder.id}'", way, on)


def tokenizer_from(run: config.Recipe | config.Phase, path: Path, what: str, way: str,
                   on: str | torch.device | None = None) -> Tokenizer:
    """The tokenizer of a config with the weights of a file, in eval mode. what, way: for messages."""
    tokenizer = build_tokenizer(run)
    meta = io.load_file(tokenizer, path)
    tokenizer.fingerprint = meta.get("fingerprint", "")
    if tokenizer.vfm is not None and meta.get("vfm_fingerprint") not in (None, "", tokenizer.vfm.fingerprint):
        raise CheckpointError(f"{what} was trained on VFM weights {meta['vfm_fingerprint']}, but "
                              f"'{run.vfm.name}' now has {tokenizer.vfm.fingerprint}; {way}")
    _ = tokenizer.statistics  # a tokenizer without them is refused here, not in the middle of a job
    return tokenizer.to(on or device()).eval()


def weights_file(folder: runs.RunDir, ema: bool) -> Path:
    """The weights' file, or CheckpointError: weights as trained do not stand in for averages."""
    path = folder.ema if ema else folder.model
    if path.exists():
        return path
    if not (folder.ema.exists() or folder.model.exists()):
        if (state := folder.status().state) == "finished":
            raise CheckpointError(f"run '{folder.id}' is finished, but '{folder.checkpoints}' holds no "
                                  "weights; put them back, or remove the run's directory and train it again")
        raise CheckpointError(f"run '{folder.id}' has no weights yet (state: {state}); train it first: "
                              "vfmlab train")
    way = ("to use the weights as trained, ask for them: --raw, or --set ema=false for vfmlab eval" if ema
           else "leave out --raw")
    raise CheckpointError(f"run '{folder.id}' lacks checkpoints/{path.name}; put a copy back, or, {way}")


@dataclass(frozen=True)
class LoadedDiffusion:
    """A trained generator (diffusion or ar) with the tokenizer whose latents or codes it makes.

    Of one that reads text, classes are prompts: first a few of its training images' captions.
    """

    network: nn.Module
    tokenizer: Tokenizer
    run: config.Phase
    num_classes: int
    class_names: list[str]
    folder: runs.RunDir | None = None  # None: of an export

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def prompted(self, texts: Sequence[str]) -> LoadedDiffusion:
        """This generator with `texts` in place of classes.

        Raises:
            ConfigError: it reads no text, or the encoder does not take one of them.
        """
        own = getattr(self.network, "prompts", None)
        if own is None:
            raise ConfigError(f"run '{self.run.id}' draws classes and reads no text; leave prompts out, "
                              "or train one with diffusion.text (presets with t2i in their names)")
        network = prompts.prompted(self.network, prompts.of(texts, own.encoder))
        return replace(self, network=network, num_classes=len(texts), class_names=list(texts))


def build_network(run: config.Phase, shape: tuple[int, ...] | CodeShape, names: Sequence[str]) -> nn.Module:
    """The network of a generator's phase, not trained, for latents (C, h, w) or codes and these classes."""
    section, registry = (run.diffusion, NETWORKS) if run.ar is None else (run.ar, TOKEN_NETWORKS)
    network = registry.get(section.network.kind)(section.network, shape, len(names))
    network = parts.replace(network, run.recipe.parts, "network", run.seed)
    if run.diffusion is not None:
        network.path = flow.of_run(run.diffusion, run.tokenizer)
        if run.diffusion.text is not None:
            prompts.set_prompts(network, prompts.of(names, prompts.encoder_of(run.diffusion)))
    return network


def load_generator(ref: str | Path, root: str | Path = "runs", ema: bool = True,
                   on: str | torch.device | None = None,
                   decoder: str | Path | None = None) -> LoadedDiffusion:
    """A trained generator, diffusion or ar: network (in eval mode), its tokenizer and class names.

    Args:
        decoder: another tokenizer run whose decoder makes the images, for decoders refined after the
            diffusion model was trained (AlignTok's third stage). It must have the same latents.

    Raises:
        RunError: a run of another kind. ConfigError: `decoder` has other latents.
    """
    folder = runs.open_run(ref, root, kind=("diffusion", "ar"))
    run = folder.config()
    if run.generator is None:
        raise RunError(f"run '{folder.id}' is a {run.kind} run; sampling needs a diffusion or an ar run")
    path = weights_file(folder, ema)
    tokenizer = load_tokenizer(_parent(folder).path, on=on)
    names = json.loads(io.metadata(path).get("class_names", "[]"))
    network = build_network(run, tokenizer.latent_shape if run.ar is None else CodeShape.of(tokenizer), names)
    io.load_file(nn.ModuleDict({"network": network, "tokenizer": tokenizer}) if run.tuned else network, path)
    if decoder is not None:
        tokenizer = _refined(tokenizer, load_tokenizer(decoder, root, on=on), run.parent, str(decoder))
    return LoadedDiffusion(network.to(on or device()).eval(), tokenizer, run, len(names), names, folder)


def load_diffusion(ref: str | Path, root: str | Path = "runs", ema: bool = True,
                   on: str | torch.device | None = None,
                   decoder: str | Path | None = None) -> LoadedDiffusion:
    """A trained diffusion run; as :func:`load_generator`, and :class:`RunError` for an ar run."""
    loaded = load_generator(ref, root, ema, on, decoder)
    if loaded.run.diffusion is None:
        raise RunError(f"run '{loaded.folder.id}' is an {loaded.run.kind} run, and this needs a diffusion "
                       "run; load_generator opens both")
    return loaded


def with_weaker(network: nn.Module, tokenizer: Tokenizer, guidance: config.Guidance,
                root: str | Path) -> None:
    """Set `network.weaker`, the model that auto-guidance leads away from, where `guidance` names one.

    Args:
        tokenizer: of the network. root: where the weaker run lies.

    Raises:
        RunError: no such run. ConfigError: it makes other latents or other classes, or goes another path.
    """
    if guidance.kind != "auto":
        return
    if getattr(network, "prompts", None) is not None:
        raise ConfigError("guidance.kind 'auto': not of a network that reads text; set guidance.kind=null, "
                          "which leads away from the empty text")
    loaded = load_diffusion(guidance.weaker, root, on=next(network.parameters()).device)
    other = loaded.network
    mine, theirs = ((n.latent_shape, n.num_classes, t.size)
                    for n, t in ((network, tokenizer), (other, loaded.tokenizer)))
    if mine != theirs:
        raise ConfigError(f"guidance.weaker '{guidance.weaker}' has latents, classes and pixels {theirs}, "
                          f"the model itself {mine}; name a run on the same tokenizer and data")
    mine, theirs = ((p.config.kind, p.radius) for p in map(flow.of, (network, other)))
    if mine != theirs:
        raise ConfigError(f"guidance.weaker '{guidance.weaker}' goes the path {theirs}, the model itself "
                          f"{mine}; name a run with the same diffusion.path and tokenizer.radius")
    gap = _gap(tokenizer, loaded.tokenizer)
    if not gap < SAME:
        raise ConfigError(f"guidance.weaker '{guidance.weaker}' has other latents than the model itself "
                          f"(they differ by up to {gap:.3g}); name a run on the same tokenizer and data")
    network.weaker = (other,)  # in a tuple: no part of the network


@torch.no_grad()
def _gap(own: Tokenizer, other: Tokenizer) -> float:
    """The largest difference of two tokenizers' normalised latents of noise images."""
    images = torch.rand(4, 3, own.size, own.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, two = (t.encode(images.to(t.stat_mean.device)).mode().cpu() for t in (own, other))
    return (one - two).abs().max().item()


def _refined(own: Tokenizer, other: Tokenizer, own_name: str, other_name: str) -> Tokenizer:
    """`other` in place of `own`, if both encode noise images alike, to a thousandth of a latent's std."""
    if own.latent_shape != other.latent_shape or own.size != other.size:
        raise ConfigError(f"decoder '{other_name}' has latents {other.latent_shape}, the run's tokenizer "
                          f"'{own_name}' {own.latent_shape}")
    other.set_statistics(own.statistics)
    gap = _gap(own, other)
    if not gap < SAME:
        raise ConfigError(f"decoder '{other_name}' belongs to other latents than '{own_name}' (they differ "
                          f"by up to {gap:.3g}); name a stage that trained nothing but the decoder")
    return other
