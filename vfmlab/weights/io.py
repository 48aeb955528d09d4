"""Released files: from the hub's cache, the hub, or a path; safetensors, or pickles that hold nothing but tensors.

`torch.load(weights_only=True)` is the only way in which a pickle is read. What it refuses is refused here too.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor

from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.vfm import files

# Where checkpoints keep their state dict: the first name that is there counts, so averaged weights come first.
WRAPPERS = ("ema", "ema_state_dict", "model_ema", "G_ema", "state_dict", "model_state_dict", "model", "module", "G")
PREFIXES = ("module.", "_orig_mod.")  # of distributed and of compiled modules


def locate(repo: str, name: str, revision: str | None = None, way: str = "pass it: --file PATH") -> Path:
    """File `name` of hub repository `repo`, from the local cache or downloaded into it.

    Raises:
        CheckpointError: not to be had; one line that says which file of which repository is wanted. way: what to do with
            a copy of it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        if not getproxies():  # without a network the hub's client would try again for half a minute
            from huggingface_hub import constants

            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # offline, no such repository, gated, disk full: the way out is the same
        raise CheckpointError(
            f"cannot fetch '{name}' of the hub repository '{repo}' ({type(error).__name__}) and it is not in the cache; "
            f"download that file elsewhere and {way}"
        ) from None


def check_sha256(path: Path, expected: str | None) -> str:
    """SHA-256 of the file; :class:`CheckpointError` when another one is `expected`."""
    found = files.sha256(path)
    if expected is not None and found != expected:
        raise CheckpointError(
            f"'{path}' has SHA-256 {found}, but {expected} is expected: it is another file, or was changed on its way; "
            "download it again"
        )
    return found


def read(path: str | Path) -> Any:
    """What a weights file holds: a dict of tensors (safetensors), or whatever tensors and containers a pickle holds.

    Raises:
        CheckpointError: not there, truncated, or a pickle with more than tensors in it; one line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no file '{path}'; give the path of a .safetensors, .pt, .pth or .ckpt file")
    with open(path, "rb") as file:
        start = file.read(9)
    if not files.is_pickle(start):
        return files.read(path, "weights")[0]
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: UnpicklingError, RuntimeError, EOFError, ...
        text = " ".join(str(error).split())
        if "Unsupported" in text or "GLOBAL" in text or "not an allowed global" in text:
            what = next((word for word in text.replace(",", " ").split() if word.count(".") and "torch" not in word), "")
            raise CheckpointError(
                f"'{path}' holds Python objects besides tensors{f' ({what})' if what else ''}, which could run code when "
                "they are read, so it is refused; where you trust it, save its state dict as safetensors and pass that"
            ) from None
        size = path.stat().st_size
        raise CheckpointError(
            f"'{path}' ({size} bytes) is truncated or damaged ({text[:100] or type(error).__name__}); download it again"
        ) from None


def unwrap(content: Any, path: str | Path = "the file") -> dict[str, Tensor]:
    """The state dict inside what a checkpoint holds: wrappers opened, averaged weights preferred, prefixes dropped.

    Opened are the entries `WRAPPERS`, in that order, as often as needed; dropped are `PREFIXES` that all keys carry.

    Raises:
        CheckpointError: no state dict in there, or entries that are not tensors.
    """
    opened = []
    while isinstance(content, Mapping):
        name = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if name is None:
            break
        opened.append(name)
        content = content[name]
    if isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        found = ", ".join(map(str, list(content)[:6])) or "nothing"
        raise CheckpointError(f"'{path}' has no state dict: it holds {found}; known wrappers are {', '.join(WRAPPERS)}")
    if not isinstance(content, Mapping):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}, not a state dict; save the module's state_dict()")
    other = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if other:
        where = f" under '{'.'.join(opened)}'" if opened else ""
        raise CheckpointError(f"'{path}' mixes tensors with other entries{where}, e.g. '{other[0]}'; save the state dict alone")
    state = {str(key): value for key, value in content.items()}
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def read_config(path: str | Path) -> dict[str, Any]:
    """A config file (.yaml, .yml, .json) as plain data; nothing in it is run. :class:`ConfigError` for anything else."""
    import yaml

    path = Path(path).expanduser()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"--config: '{path}' cannot be read: {reason}; give the release's YAML or JSON") from None
    try:
        tree = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: '{path}' is not YAML or JSON ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: '{path}' holds a {type(tree).__name__}; it must hold fields")
    return tree
