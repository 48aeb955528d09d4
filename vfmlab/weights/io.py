"""The one place that reads, fetches, checks, hashes and writes weights.

Own files are safetensors. Released files may also be pickles that hold nothing but tensors and plain
containers: `torch.load(weights_only=True)` is the only way in which a pickle is read.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vfmlab import runs
from vfmlab.errors import CheckpointError

ASSETS = Path(__file__).parents[1] / "assets"
METADATA = "vfmlab"  # metadata entry of networks trained here: JSON with architecture and provenance
INDEX = ".safetensors.index.json"  # of weights in several files
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
# How torch.save (zip) and bare pickles begin.
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# Where checkpoints hold their state dict: the first name counts, so averaged weights come first.
WRAPPERS = (
    "ema", "ema_state_dict", "model_ema", "G_ema", "state_dict", "model_state_dict", "model", "module", "G",
)  # fmt: skip
PREFIXES = ("module.", "_orig_mod.", "first_stage_model.")  # distributed, compiled, latent diffusion
Weights = Mapping[str, Tensor]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# -- reading and writing -----------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    """A safetensors file; :class:`CheckpointError` in one line for anything else."""
    if not path.is_file():
        raise CheckpointError(f"{what}: no file '{path}'; give the path of a .safetensors file")
    if is_pickle(path):
        raise CheckpointError(f"{what}: '{path}' is a pickle, which can run code when it is read; convert it "
                              "to safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(f"{what}: '{path}' ({size} bytes) is truncated or not safetensors ({error}); "
                              "copy it again") from None


def is_pickle(path: Path) -> bool:
    """Safetensors begin with a length of eight bytes, which may be any, and a brace."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start.startswith(PICKLES) and start[8:9] != b"{"


def read(path: str | Path, what: str = "weights") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and metadata of a safetensors file, or of the several files that an index names.

    Args:
        path: `.safetensors`, or `.safetensors.index.json` with its parts beside it. what: for messages.

    Raises:
        CheckpointError: not there, a pickle, truncated, or one part of several; one line.
    """
    path = Path(path).expanduser()
    if path.suffix == ".json":
        tensors: dict[str, Tensor] = {}
        for part in parts(path, what):
            with _opened(part, what) as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, {}
    if (shard := SHARD.fullmatch(path.name)) and path.with_name(shard[1] + INDEX).is_file():
        raise CheckpointError(f"{what}: '{path}' is one part of several; give '{shard[1] + INDEX}' beside it")
    with _opened(path, what) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def parts(index: Path, what: str = "weights") -> list[Path]:
    """The files that an index names; :class:`CheckpointError` where it names none or one is missing."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{what}: '{index}' is no index (no 'weight_map'); fetch it again") from None
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{what}: '{index}' does not name files beside it; fetch it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f"{what}: '{index}' names '{missing[0]}', which is not beside it; copy it, too")
    return [index.parent / name for name in names]


def metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, without its tensors."""
    with _opened(Path(path), "weights") as file:
        return dict(file.metadata() or {})


def cached(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """As :func:`read`; None where there is no file or a damaged one, which the caller writes anew."""
    try:
        return read(path) if Path(path).is_file() else None
    except CheckpointError:
        return None


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors as safetensors (contiguous, on the CPU) with `metadata` as text; beside, then renamed."""
    if compiled := [key for key in tensors if "_orig_mod" in key]:
        raise CheckpointError(f"weights have a compiler's prefix ('{compiled[0]}'); save the module itself")
    cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    seen: set[int] = set()
    for key, value in cpu.items():  # a file holds tied weights twice; nothing else is copied
        place = value.untyped_storage().data_ptr()
        cpu[key] = value.clone() if place in seen else value
        seen.add(place)
    with runs.beside(Path(path)) as temporary:
        save_file(cpu, temporary, {key: str(value) for key, value in (metadata or {}).items()})


def read_released(path: str | Path) -> Any:
    """A dict of tensors (safetensors), or whatever tensors and containers a pickle holds.

    Raises:
        CheckpointError: not there, truncated, or a pickle with more than tensors in it; one line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no file '{path}'; give the path of a .safetensors, .pt, .pth or .ckpt file")
    if not is_pickle(path):
        return read(path)[0]
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: UnpicklingError, RuntimeError, EOFError, ...
        text = " ".join(str(error).split())
        if "Unsupported" in text or "GLOBAL" in text or "not an allowed global" in text:
            words = text.replace(",", " ").split()
            name = next((f" ({word})" for word in words if "." in word and "torch" not in word), "")
            raise CheckpointError(f"'{path}' holds Python objects besides tensors{name}, which could run "
                                  "code when read, so it is refused; where you trust it, save its state dict "
                                  "as safetensors and pass that") from None
        size = path.stat().st_size
        raise CheckpointError(f"'{path}' ({size} bytes) is truncated or damaged "
                              f"({text[:100] or type(error).__name__}); download it again") from None


def in_folder(folder: str | Path) -> tuple[Path, Path | None]:
    """The weights (or their index) and the config.json in a folder as diffusers and transformers write it.

    Of a whole pipeline (`model_index.json`) the autoencoder's folder `vae` counts.

    Raises:
        CheckpointError: no such folder, no weights, or several.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"no folder '{folder}'; give one with a .safetensors file")
    if (folder / "model_index.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    for endings in ((INDEX,), (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")):
        files = sorted(path for path in folder.iterdir() if path.name.endswith(endings) and path.is_file())
        if len(files) > 1:
            names = ", ".join(path.name for path in files[:4])
            raise CheckpointError(f"folder '{folder}' holds several weights ({names}); give one of them")
        if files:
            config = folder / "config.json"
            return files[0], config if config.is_file() else None
    raise CheckpointError(f"folder '{folder}' holds no weights; give one with a .safetensors file")


def unwrap(content: Any, path: str | Path = "the file") -> dict[str, Tensor]:
    """The state dict in a checkpoint: wrappers opened, averaged weights preferred, prefixes dropped.

    Opened are the entries `WRAPPERS`, in that order, as often as needed; dropped are `PREFIXES` that all keys
    carry, in any order. Of a whole latent diffusion model the part under `first_stage_model.`, its
    autoencoder, is taken.

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
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise CheckpointError(f"'{path}' holds a {kind}, not a state dict; save the module's state_dict()")
    if not any(isinstance(value, Tensor) for value in content.values()):
        names = ", ".join(map(str, list(content)[:6])) or "nothing"
        known = ", ".join(WRAPPERS)
        raise CheckpointError(f"'{path}' has no state dict: it holds {names}; known wrappers are {known}")
    if other := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        where = f" under '{'.'.join(opened)}'" if opened else ""
        raise CheckpointError(f"'{path}' mixes tensors with other entries{where}, e.g. '{other[0]}'; save "
                              "the state dict alone")
    return unprefixed({str(key): value for key, value in content.items()})


def unprefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without `PREFIXES` that all its keys carry; see :func:`unwrap`."""
    state = dict(state)
    while True:
        autoencoder = {key: value for key, value in state.items() if key.startswith("first_stage_model.")}
        state = autoencoder or state
        prefix = next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None)
        if prefix is None:
            return state
        state = {key.removeprefix(prefix): value for key, value in state.items()}


# -- the hub -----------------------------------------------------------------------------------------------


def fetch(repo: str, name: str, revision: str | None = None, way: str = "pass a copy: --file PATH") -> Path:
    """File `name` of a repository on the Hugging Face hub, from the local cache or downloaded into it.

    Raises:
        CheckpointError: no name of a repository, or not to be had; one line that ends with `way`, what to do
        with a copy.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(repo, name, revision=revision)
    except HFValidationError:
        raise CheckpointError(f"'{repo}' is neither a folder that is there nor the name of a hub repository "
                              f"(user/name); for '{name}' of one, {way}") from None
    if isinstance(cached, str):
        return Path(cached)
    try:
        if not getproxies():  # without a network the hub's client would try again for half a minute
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        return Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # offline, no such repository, gated, disk full: the way out is the same
        raise CheckpointError(f"no '{name}' of the hub repository '{repo}' in {constants.HF_HUB_CACHE} and "
                              f"no download ({type(error).__name__}); elsewhere run `hf download {repo} "
                              f"{name}`, copy the cache, or {way}") from None


# -- hashes ------------------------------------------------------------------------------------------------


def sha256(path: str | Path, expected: str | None = None) -> str:
    """SHA-256 of a file's bytes, 64 hex digits; of an index, over its own and its parts'.

    Raises:
        CheckpointError: another one is `expected`.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if str(path).endswith(INDEX):
        digest = hashlib.sha256("".join([digest, *map(sha256, parts(Path(path)))]).encode()).hexdigest()
    if expected not in (None, digest):
        raise CheckpointError(f"'{path}' has SHA-256 {digest}, but {expected} is expected: another file, or "
                              "a damaged one; download it again")
    return digest


def digest(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of all weights, 64 hex digits: the same on every device."""
    state = hashlib.sha256()
    for key, value in sorted((weights.state_dict() if isinstance(weights, nn.Module) else weights).items()):
        state.update(key.encode())
        if not value.is_meta:
            state.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


# -- strict loading ----------------------------------------------------------------------------------------


def check(own: Weights, tensors: Weights, what: str, keep: Iterable[str] = ()) -> None:
    """:class:`CheckpointError`, in one line, unless `tensors` can take the place of `own`, all of them.

    Names, shapes and kinds of numbers are equal, floating-point values finite, standard deviations positive.
    """
    keep = set(keep)
    both = {key: (own[key], value) for key, value in tensors.items() if key in own}
    whole = {key: pair for key, pair in both.items() if pair[0].shape == pair[1].shape}
    values = {key: value for key, (_, value) in whole.items() if value.dtype in FLOATS and not value.is_meta}
    names = {"missing": [key for key in own if key not in tensors and key not in keep],
             "unexpected": [key for key in tensors if key not in own],
             "of another shape": [f"{key} {list(value.shape)} instead of {list(mine.shape)}"
                                  for key, (mine, value) in both.items() if key not in whole]}
    faults = {"of another type": [f"{key} {_kind(v)} instead of {_kind(m)}" for key, (m, v) in whole.items()
                                  if not _alike(m, v)],
              "not finite": [key for key, value in values.items() if not torch.isfinite(value).all()],
              "not positive": [key for key, value in values.items() if _is_std(key)
                               and not (value > 0).all()]}
    problems = [f"{len(keys)} {kind}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
                for kind, keys in (names | faults).items() if keys]
    if problems:
        damaged = "these weights are damaged or quantised: take another file or checkpoint"
        way = _way(own, tensors) if any(names.values()) else damaged
        raise CheckpointError(f"{what}: {'; '.join(problems)}; {way}")


def check_types(tensors: Mapping[str, Tensor], what: str) -> None:
    """:class:`CheckpointError` for tensors that an importer cannot compute with: complex, bool, int8, ..."""
    types = (*FLOATS, torch.int32, torch.int64)
    dense = torch.strided
    odd = [f"{k} {_kind(v)}" for k, v in tensors.items() if v.dtype not in types or v.layout is not dense]
    if odd:
        more = ", ".join(odd[:4]) + (", ..." if len(odd) > 4 else "")
        raise CheckpointError(f"{what}: {len(odd)} of another type than weights are: {more}; take floats")


def _way(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
    if not tensors:
        return "none of its tensors is there: give its state dict, not a wrapper"
    heads = {key.split(".")[0] for key in tensors}
    if len(heads) == 1 and not any(key.startswith(f"{min(heads)}.") for key in own):
        return f"all names begin with '{min(heads)}.': save the state dict of that part alone"
    return "give the configuration they were trained with"


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.") + ("" if value.layout is torch.strided else " (sparse)")


def _alike(mine: Tensor, theirs: Tensor) -> bool:
    """Whether the numbers of one can be copied into the other without being changed in kind."""
    kinds = {mine.dtype, theirs.dtype}
    alike = len(kinds) == 1 or kinds <= set(FLOATS) or kinds <= {torch.int32, torch.int64}
    return theirs.layout is torch.strided and alike


def _is_std(key: str) -> bool:
    return key.rpartition(".")[2] == "stat_std" or key.endswith("standardise.std")


@torch.no_grad()
def load(module: nn.Module, tensors: Mapping[str, Tensor], what: str, keep: Iterable[str] = ()) -> nn.Module:
    """Copy `tensors` into `module`, converting dtype and device: all of them or none. Returns `module`.

    Args:
        what: what the weights are, for messages. keep: keys that may be absent and then stay as they are.

    Raises:
        CheckpointError: see :func:`check`.
    """
    if hasattr(module, "adapt"):  # tokenizers, whose statistics have two forms
        module.adapt(tensors)
    own = module.state_dict()
    check(own, tensors, f"{what} does not fit {type(module).__name__}", keep)
    for key, value in tensors.items():
        own[key].copy_(value)  # state_dict() shares storage with parameters and buffers
    return module


def load_file(module: nn.Module, path: str | Path) -> dict[str, str]:
    """Load a safetensors file into `module`, strictly; returns the file's metadata."""
    tensors, facts = read(path)
    load(module, tensors, f"weights: '{path}'")
    return facts


def network(path: str | Path, kind: str, make: Callable[..., nn.Module], what: str) -> tuple[nn.Module, str]:
    """A network trained here and its fingerprint (16 hex digits of the file's SHA-256).

    Args:
        path: a safetensors file whose metadata hold the arguments of `make` under `kind`, or the directory of
            the run that wrote it. what: how messages call it.

    Raises:
        CheckpointError: no such file, not safetensors, or another kind of network.
    """
    path = Path(path).expanduser()
    path = path / f"{kind}.safetensors" if path.is_dir() else path
    tensors, facts = read(path, what)
    try:
        net = make(**json.loads(facts[METADATA])[kind])
    except (KeyError, ValueError, TypeError):
        raise CheckpointError(f"{what}: '{path}' is not a {kind} (no architecture in its metadata); give "
                              "what pretraining wrote") from None
    return load(net, tensors, f"{what}: '{path}'"), sha256(path)[:16]
