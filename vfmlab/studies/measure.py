"""The door to the instruments: what they say about a run or a vision model, measured once, stored beside it.

    report = measure("pocket_vfm_vae_tokenizer")  # all that fit, in <run>/instruments/
    report["se_cknna"].value, report.curves["rate"].value
    measure("vfm:pocket", data=run.data)          # a vision model's last layer; vfm:NAME@LAYER
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vfmlab import api, config, runs, vfm
from vfmlab.data import open_source
from vfmlab.errors import ConfigError, RunError
from vfmlab.evaluation import cache, evaluate, number, reference, subject
from vfmlab.evaluation.features import OWN, open_space
from vfmlab.evaluation.instruments import base
from vfmlab.evaluation.number import Report
from vfmlab.registry import INSTRUMENTS


def measure(ref: str | Path, names: Sequence[str] | str | None = None, root: str | Path = "runs",
            protocol: Mapping[str, Any] | None = None, data: config.Data | Mapping[str, Any] | None = None,
            compared_with: str | None = None, of: str | None = None, again: bool = False) -> Report:
    """What the instruments say about a run; what was measured before under the protocol is read.

    Args:
        ref: a tokenizer, diffusion or pretraining run (id, prefix, directory), or `vfm:NAME[@LAYER]`. names:
        instruments; None: all
            that fit. protocol: dotted changes to the run's protocol, e.g. {"n": 500}. data: other images than
            the run's; `vfm:` needs it. compared_with: feature space of the reference model; None: one of
            another family (see `vfmlab.evaluation.reference`). of: "tokenizer" measures the tokenizer of a
            diffusion run (as that run tuned it, where it did) in place of its network. again: measure anew.

    Raises:
        ConfigError: unknown instrument, or one for another kind of run. RunError: no such run.
    """
    names = [names] if isinstance(names, str) else names
    if names is not None and not len(names):
        raise ConfigError("instruments: none is named; leave names out for all that fit")
    kind, run, folder, layer = _what(str(ref), root)
    if of is not None and (of != "tokenizer" or kind not in ("tokenizer", "diffusion", "ar")):
        raise ConfigError(f"of = '{of}': only 'tokenizer' can be asked for, of a tokenizer or diffusion run; "
                          f"'{ref}' is a {kind}")
    kind = of or kind
    if kind == "ar":
        raise ConfigError(f"run '{ref}' is an ar run, which no instrument measures; ask for its tokenizer: "
                          "of='tokenizer'")
    if run is None and data is None:
        raise ConfigError(f"'{ref}' has no images of its own: give data=..., for example data=run.data")
    given = data.model_dump(mode="json") if isinstance(data, config.Data) else data or {}
    changes = {f"protocol.{key}": value for key, value in (protocol or {}).items()}
    changes |= {f"data.{key}": value for key, value in given.items()}
    empty = {"name": "vfm", "pretrain": {}, "train": {"samples": 1}}  # to hold what is given for a `vfm:`
    changed = config.override(run or config.parse(empty), changes)
    images, settings = changed.data, changed.protocol
    wanted = base.choose(names, kind, str(ref))
    built_on = run.vfm.name if run is not None and run.vfm is not None else None
    if kind == "vfm":
        built_on = "pocket" if run is not None else str(ref).removeprefix("vfm:").partition("@")[0]
    theirs = compared_with or reference.default(built_on, settings.features)
    drawn = set() if kind == "diffusion" else {"sampler", "guidance", "decoder"}  # of samples alone
    protocol = settings.model_dump(mode="json", exclude_none=True,
                                   exclude={"batch", "token_sampler", *drawn})
    spaces = [theirs, *([settings.features] if kind == "diffusion" and settings.features != theirs else [])]
    own = [space for space in spaces if reference.family(space) in OWN]  # a new one makes old reports stale
    version = "".join(open_space(space, images.size, root).version for space in own)
    state = (str(ref) if folder is None
             else evaluate.weights(folder, settings.model_copy(update={"decoder": None})))
    shown = [images.model_dump(mode="json", exclude_none=True), open_source(images, "val").fingerprint]
    if not images.source.startswith("scenes:"):
        shown.append(open_source(images, "train").fingerprint)
    if run is not None and run.tokenizer is not None and run.tokenizer.radius is not None:
        shown.append(evaluate.ON_SPHERE)
    key = config.digest([base.VERSION, kind, protocol, shown, theirs, state, version, layer])
    where = folder.path if folder is not None else cache.folder()
    path = where / "instruments" / f"{key}.json"
    report = number.read(path)
    # an instrument writes all its numbers, so one that lacks some was measured before it had them
    missing = [name for name in wanted if again or report is None or name not in report.instruments
               or not {q.name for q in INSTRUMENTS.get(name).quantities} <= {*report, *report.curves}]
    if missing:
        space = reference.Reference(open_space(theirs, images.size, root).to(api.device()))
        opened = _open(kind, str(ref), folder, layer, root, images, settings, space, where / "features")
        run_id = folder.id if folder is not None else str(ref)
        new = base.measure(opened, missing).replace(run=run_id)
        report = number.save(path, new if report is None else report.joined(new))
    parts = [INSTRUMENTS.get(name) for name in wanted]
    chosen = report.only([q.name for part in parts for q in part.quantities])
    return chosen.replace(instruments={name: report.instruments[name] for name in wanted})


def _what(ref: str, root: str | Path) -> tuple[str, config.Phase | None, runs.RunDir | None, int]:
    """kind of subject, config and directory of the run (none for `vfm:`), layer."""
    if ref.startswith("vfm:"):
        name, _, layer = ref.removeprefix("vfm:").partition("@")
        if layer and not re.fullmatch(r"-?[0-9]+", layer):
            raise ConfigError(f"'{ref}': the layer after '@' is a number: 0 (patch embedding), k (after "
                              "block k), -1 (after the final norm)")
        vfm.facts(name)
        return "vfm", None, None, int(layer or -1)
    folder = runs.open_run(ref, root)
    run = folder.config()
    if run.pretrain is None:
        return run.kind, run, folder, -1
    if not (folder.path / "pocket.safetensors").is_file():
        raise RunError(f"run '{folder.id}' holds no vision model (a judge, or not finished); give a "
                       "tokenizer, diffusion or VFM run")
    return "vfm", run, folder, -1


def _open(kind: str, ref: str, folder: runs.RunDir | None, layer: int, root: str | Path, images: config.Data,
          settings: config.Protocol, theirs: reference.Reference, store: Path) -> subject.Subject:
    more = {"folder": folder, "store": store}
    if kind == "tokenizer":
        tokenizer = api.load_tokenizer(folder.path, root, ema=settings.ema)
        return subject.of_tokenizer(tokenizer, images, settings, theirs, folder.id, **more)
    if kind == "diffusion":
        loaded = api.load_diffusion(folder.path, root, ema=settings.ema)
        return subject.of_diffusion(loaded.network, loaded.tokenizer, images, settings, theirs,
                                    loaded.num_classes, folder.id, **more)
    name = ref.removeprefix("vfm:").partition("@")[0]
    section = (config.VFM(name="pocket", weights=str(folder.path)) if folder is not None
               else config.VFM(name=name, upscale=vfm.facts(name).side / images.size))
    with torch.no_grad():
        model = vfm.build(section, images.size).to(api.device())
    return subject.of_vision_model(model, images, settings, theirs, layer, **more)
