"""Reading weights files: safetensors only, and one clear line for whatever is wrong with them."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vfmlab.errors import CheckpointError

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save (zip) and bare pickles


def is_pickle(start: bytes) -> bool:
    """Whether a file that begins with these nine bytes is one. safetensors begin with a length of eight bytes, which may be any,
    and a brace."""
    return start.startswith(_PICKLES) and start[8:9] != b"{"


METADATA = "vfmlab"  # safetensors metadata entry of networks trained here: JSON with architecture and provenance


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(net: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names and values of all weights, for models that come from no file."""
    digest = hashlib.sha256()
    for key, value in sorted(net.state_dict().items()):
        digest.update(key.encode())
        if not value.is_meta:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fetch(repo: str, name: str) -> Path:
    """File `name` of a repository on the Hugging Face hub, from the local cache or downloaded into it.

    Raises:
        Exception: whatever the hub's client or the network raises; the caller says what to put where.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, name)
    if isinstance(cached, str):
        return Path(cached)
    if not getproxies():  # without a network the hub's client would try again for half a minute
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    return Path(hf_hub_download(repo, name))


def read(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. what: how messages call it, for example "vfm.weights".

    Raises:
        CheckpointError: not there, a pickle, or not a whole safetensors file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{what}: no file '{path}'; give the path of a .safetensors file")
    with open(path, "rb") as file:
        start = file.read(9)
    if is_pickle(start):
        raise CheckpointError(
            f"{what}: '{path}' is a pickle (torch.save), which can run code when it is read; "
            "convert it to safetensors first"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{what}: '{path}' is truncated or not a safetensors file ({error}); fetch or export it again"
        ) from None


@torch.no_grad()
def load(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Copy `tensors` into `module`, converting to its dtype: all of them or :class:`CheckpointError` in one line."""
    own = module.state_dict()
    shaped = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in tensors.items()
        if key in own and own[key].shape != value.shape
    ]
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    faults = (
        ("missing", [key for key in own if key not in tensors]),
        ("unexpected", [key for key in tensors if key not in own]),
        ("of another shape", shaped),
        ("not finite", broken),
    )
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in faults
        if keys
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit {type(module).__name__}: tensors {'; '.join(problems)}")
    module.load_state_dict(tensors)
