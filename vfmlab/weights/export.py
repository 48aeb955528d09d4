"""Tokenizers in the form of the Hugging Face hub, and back: config.json, model.safetensors, a model card.

    save_pretrained("pocket_vfm_vae_tokenizer", "exported")      # a run -> a folder
    tokenizer = from_pretrained("exported")                      # a folder or a hub repository -> a tokenizer
    push_to_hub("pocket_vfm_vae_tokenizer", "user/repository")

Paths of this machine are not exported. A frozen VFM is named, not included; its fingerprint is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vfmlab import api, config, runs
from vfmlab.config.files import read_json
from vfmlab.config.protocol import CAPTIONS
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.evaluation.features import OWN
from vfmlab.tokenizers.base import Tokenizer
from vfmlab.training import checkpoint
from vfmlab.weights import io, load
from vfmlab.weights.card import UNSTATED, card

CONFIG, WEIGHTS, CARD, LIBRARY = "config.json", "model.safetensors", "README.md", "vfmlab"


def save_pretrained(ref: str | Path, folder: str | Path | None = None, root: str | Path = "runs",
                    ema: bool = True, licence: str | None = None, overwrite: bool = False,
                    data_licence: str | None = None) -> Path:
    """Write the tokenizer of run `ref` (of a diffusion run: its own, as tuned by it where it was) to
    `folder`; returns that.

    Args:
        folder: new, empty, or an earlier export; None: `exported` in the run's directory. ema: averaged
            weights.
        overwrite: take a folder with other files in it, too. licence: under which these weights are passed
            on, e.g. "mit"; by default that of the release they come from, where the run is imported.
            data_licence: of the training images, for the card.

    Raises:
        RunError, CheckpointError: no such run, or no trained weights.
        ConfigError: a folder inside a run or with other files in it, or one that cannot be written.
    """
    run_dir = api.tokenizer_run(ref, root)
    run, (tensors, facts) = run_dir.config(), io.read(load.weights_file(run_dir, ema))
    if run.tuned:  # the network lies beside it
        tensors = {key.removeprefix("tokenizer."): value for key, value in tensors.items()
                   if key.startswith("tokenizer.")}
    if int(tensors["stat_count"]) == 0:
        raise CheckpointError(f"run '{run_dir.id}' has no latent statistics yet (state: "
                              f"{run_dir.status().state}); finish its training")
    run = public(run.tokenizer_phase)
    folder = target(folder, run_dir, "exported", _made_here, overwrite)
    images = "  # images: B 3 H W in [-1, 1]"
    usage = ["from vfmlab.weights.export import from_pretrained", "",
             'tokenizer = from_pretrained("PATH OR REPOSITORY")']
    usage += ([f"codes = tokenizer.codes(images){images}", "restored = tokenizer.decode_codes(codes)"]
              if run.tokenizer.quantised else
              [f"z = tokenizer.encode(images).mode(){images}", "restored = tokenizer.decode(z)"])
    count = sum(value.numel() for key, value in tensors.items() if not key.startswith("stat_"))
    readme = card(run, [run_dir], count, facts, usage, LIBRARY, of_release(licence, facts), data_licence)
    content = {"library": LIBRARY, "format": checkpoint.FORMAT, "run_id": run_dir.id,
               "run": run.recipe.model_dump(mode="json")}
    runs.write_json(folder / CONFIG, content)
    io.write(folder / WEIGHTS, tensors, facts)
    runs.write_atomic(folder / CARD, readme)
    return folder


def target(folder: str | Path | None, run_dir: runs.RunDir, name: str, made: Callable[[Path], bool],
           overwrite: bool) -> Path:
    """`folder`, by default `name` in the run's directory, for an export; as :func:`runs.output_folder`."""
    if folder is None:
        return runs.output_folder(run_dir.path / name, made, True, run_dir.path)
    return runs.output_folder(folder, made, overwrite)


def of_release(licence: str | None, facts: Mapping[str, str]) -> str | None:
    """The licence as given, else that of the release the weights come from, where it states one."""
    return facts.get("licence") if licence is None and facts.get("licence") != UNSTATED else licence


def _made_here(folder: Path) -> bool:
    """Whether `folder` is an export of this project's, with nothing else in it."""
    try:
        content = read_json(folder / CONFIG)
    except ConfigError:
        return False
    ours = content.get("library") == LIBRARY and "run" in content
    return ours and {path.name for path in folder.iterdir()} <= {CONFIG, WEIGHTS, CARD}


def from_pretrained(source: str | Path, revision: str | None = None, vfm_weights: str | None = None,
                    on: str | torch.device | None = None) -> Tokenizer:
    """A tokenizer in eval mode from an exported folder, or from a hub repository ("user/name").

    Args:
        revision: of the repository. vfm_weights: a file in place of the VFM's published weights. on: device.

    Raises:
        CheckpointError: files are missing, damaged, of another format, or made with other VFM weights.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
            raise CheckpointError(f"'{source}' lacks {missing[0]}; give a folder that vfmlab has exported")
        paths = [folder / name for name in (CONFIG, WEIGHTS)]
    elif str(source).count("/") == 1:
        way = f"put it into a folder with {' and '.join((CONFIG, WEIGHTS))}, and give that folder"
        paths = [io.fetch(str(source), name, revision, way) for name in (CONFIG, WEIGHTS)]
    else:
        raise CheckpointError(f"'{source}' is neither a folder nor a hub repository of the form user/name")
    content = read_json(paths[0], CheckpointError, "config")
    if content.get("format") != checkpoint.FORMAT or "run" not in content:
        raise CheckpointError(f"'{paths[0]}' is not of the format {checkpoint.FORMAT}; give what vfmlab has "
                              "exported")
    run = config.parse(content["run"], str(paths[0]))
    if vfm_weights is not None:
        run = config.override(run, {"vfm.weights": vfm_weights})
    way = "give the old ones: from_pretrained(..., vfm_weights=FILE)"
    return load.tokenizer_from(run, paths[1], f"'{source}'", way, on)


def push_to_hub(ref: str | Path, repo: str, root: str | Path = "runs", private: bool = False,
                licence: str | None = None, hub: Any = None,
                save: Callable[..., Path] = save_pretrained, data_licence: str | None = None) -> str:
    """Export run `ref` to the hub repository `repo`, which is made if need be; returns its address.

    Args:
        hub: what does the upload; by default huggingface_hub's HfApi with the token of this machine's login.
        save: what exports, in the form wanted.
    """
    if repo.count("/") != 1:
        raise ConfigError(f"hub repository '{repo}' is not of the form user/name")
    from huggingface_hub import HfApi, constants

    hub = hub or HfApi()
    with tempfile.TemporaryDirectory() as temporary:
        folder = save(ref, temporary, root, licence=licence, data_licence=data_licence)
        try:
            hub.create_repo(repo_id=repo, repo_type="model", private=private, exist_ok=True)
            hub.upload_folder(repo_id=repo, repo_type="model", folder_path=str(folder),
                              commit_message="Upload from vfmlab")
        except Exception as error:  # no network, no token, no rights, ...: the hub's client raises many kinds
            reason = " ".join(str(error).split())[:120]
            raise CheckpointError(f"cannot push to the hub repository '{repo}' ({type(error).__name__}: "
                                  f"{reason}); log in with `hf auth login`, or export to a folder and upload "
                                  "it yourself") from None
    return f"{constants.ENDPOINT}/{repo}"


def public(run: config.Phase) -> config.Phase:
    """`run` without paths of this machine: of a path to images the last part, else the published name."""
    tree = _public(run.recipe.model_dump(mode="json"))
    protocol = tree["protocol"]
    kind = protocol["features"].partition(":")[0]
    protocol |= {"reference": None, "decoder": None}  # files and runs of this machine
    protocol["features"] = kind if kind in OWN else protocol["features"]  # of a run's directory
    protocol["prompts"] = protocol["prompts"] and CAPTIONS
    return config.parse(tree).last


def _public(value: Any, field: str = "") -> Any:
    """Fields of a config with what is left of their paths; `value` is what `field` holds."""
    if isinstance(value, dict):
        return {key: _public(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner, field) for inner in value]
    if not isinstance(value, str):
        return value
    if field == "weights":
        return value if value == "random" else "pretrained"
    if field == "pretrained":
        return None if Path(value).expanduser().is_dir() else value
    kind, colon, where = value.partition(":") if field in ("source", "encoder") else ("", "", value)
    local = Path(where).is_absolute() or (field == "source" and "/" in where and kind != "hf")
    return f"{kind}{colon}{Path(where).name}" if local else value
