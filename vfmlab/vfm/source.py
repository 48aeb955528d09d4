"""Where a VFM's weights come from and how they load: a file, an installed package, the hub or its cache."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from torch import nn

from vfmlab.errors import CheckpointError
from vfmlab.vfm.shipped import Shipped, renamed
from vfmlab.vfm.table import Facts
from vfmlab.weights import io

FILE = "model.safetensors"


def find(shipped: Shipped) -> Path:
    """A package's file, where it is installed.

    Raises:
        CheckpointError: no such package, or another file; one line with the command that installs it.
    """
    try:
        path = Path(str(metadata.distribution(shipped.package).locate_file(shipped.file)))
    except metadata.PackageNotFoundError:
        raise CheckpointError(f"the package '{shipped.package}' is not installed; run: "
                              f"{shipped.command}") from None
    again = shipped.command.replace("install", "install --force-reinstall")
    if not path.is_file():
        raise CheckpointError(f"the package '{shipped.package}' has no file '{shipped.file}'; run: {again}")
    if (digest := io.sha256(path)) != shipped.sha256:
        raise CheckpointError(f"'{path}' has SHA-256 {digest[:12]}..., not {shipped.sha256[:12]}...: another "
                              f"file, or a damaged one; run: {again}")
    return path


def locate(facts: Facts, weights: str) -> Path:
    """The weights' file: `weights` itself, in an installed package, in the hub's cache, or fetched there."""
    if weights != "pretrained":
        return Path(weights).expanduser()
    if facts.shipped is not None:
        try:
            return find(facts.shipped)
        except CheckpointError as error:
            raise CheckpointError(f"vfm.name '{facts.name}': {error}") from None
    return io.fetch(facts.hub, FILE, way=f"copy that file here, for '{facts.name}': vfm.weights=PATH/{FILE}")


def load_into(net: nn.Module, path: Path, facts: Facts) -> str:
    """Load a file into a timm model, strictly. Returns the fingerprint.

    timm's own checkpoint filter of the model's family renames publishers' keys and interpolates position
    embeddings; what it leaves must fit exactly, apart from a classifier that a feature extractor does not
    have. A package's file is renamed here.
    """
    what = f"vfm.weights of '{facts.name}'"
    shipped = facts.shipped
    if shipped is not None and path.name == Path(shipped.file).name:
        tensors = renamed(io.unwrap(io.read_released(path), path), net, shipped.keys)
    else:
        tensors, _ = io.read(path, what)
        convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            try:
                tensors = convert(tensors, net)
            except Exception as error:  # timm indexes and reshapes without checks: the file does not fit
                raise CheckpointError(f"{what}: '{path}' does not fit {type(net).__name__} "
                                      f"({type(error).__name__}: {error})") from None
    own = net.state_dict()
    classifier = getattr(net, "pretrained_cfg", {}).get("classifier") or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    heads = ("head.", "head_dist.", "fc_norm.", "mask_token", "lm_head.")
    heads += tuple(f"{name}." for name in classifier)
    tensors = {key: value for key, value in tensors.items() if key in own or not key.startswith(heads)}
    io.load(net, tensors, f"{what}: '{path}'")
    return io.sha256(path)[:16]
