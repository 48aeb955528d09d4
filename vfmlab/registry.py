"""Name -> class, one table per kind of part. A new part is one new file that registers itself.

A registry knows the package its parts live in and imports that package's modules on the first look-up, so
that adding a file is enough to add a part, and `import vfmlab` stays cheap. Files elsewhere are named in the
variable VFMLAB_PLUGINS (separated as in PATH) and imported then, too, in every process that inherits it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vfmlab.errors import ConfigError, VfmlabError, nearest

T = TypeVar("T")


class Registry:
    """A table of named parts.

    Args:
        what: what an entry is called in messages, for example `"tokenizer"`.
        package: dotted name of the package (or module) whose import fills the table.
    """

    def __init__(self, what: str, package: str):
        self.what, self.package = what, package
        self._table: dict[str, Any] = {}
        self._filled = False

    def register(self, name: str) -> Callable[[T], T]:
        """Class or function decorator: file the object under `name` and tell it its own name."""

        def keep(thing: T) -> T:
            old = self._table.get(name)
            if old is not None and getattr(old, "__qualname__", None) != getattr(thing, "__qualname__", None):
                raise ConfigError(f"{self.what} '{name}' is registered twice: {old!r} and {thing!r}; rename "
                                  "one of them")
            self._table[name] = thing
            thing.registered_name = name
            return thing

        return keep

    def get(self, name: str) -> Any:
        """The entry called `name`; :class:`ConfigError` with the nearest known name otherwise."""
        self._fill()
        try:
            return self._table[name]
        except (KeyError, TypeError):
            raise ConfigError(f"unknown {self.what} {name!r}{nearest(name, self._table)}") from None

    def names(self) -> list[str]:
        self._fill()
        return sorted(self._table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._table

    def _fill(self) -> None:
        if self._filled:
            return
        self._filled = (
            True  # first, so that a part may look another one up while the package is being imported
        )
        try:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                importlib.import_module(f"{self.package}.{module.name}")
            for file in plugins():
                _import(file)
        except BaseException:
            self._filled = False  # half a table would hide why the other half is missing
            raise


def plugins() -> list[Path]:
    """The files that VFMLAB_PLUGINS names."""
    names = os.environ.get("VFMLAB_PLUGINS", "").split(os.pathsep)
    return [Path(name).expanduser().absolute() for name in names if name]


def digests() -> dict[str, str]:
    """The name and hash of each of these files: its source decides what a run trains."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:8] for file in plugins()}


def _import(file: Path) -> None:
    """Import `file` as the module of its name, once a process."""
    if getattr(sys.modules.get(file.stem), "__file__", None) == str(file):
        return
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or file.stem in sys.modules or not file.is_file():
        why = "there is no such file" if not file.is_file() else "give a .py file with a name of its own"
        raise ConfigError(f"VFMLAB_PLUGINS: '{file}': {why}")
    sys.modules[file.stem] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[file.stem]
        if not isinstance(error, Exception) or isinstance(error, VfmlabError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"VFMLAB_PLUGINS: '{file}' cannot be imported: {reason}") from error


TOKENIZERS = Registry("tokenizer", "vfmlab.tokenizers")
DECODERS = Registry("decoder", "vfmlab.decoders")
QUANTIZERS = Registry("quantiser", "vfmlab.nn.quantizers")
LOSSES = Registry("loss", "vfmlab.losses")
DISCRIMINATORS = Registry("discriminator", "vfmlab.losses.discriminators")
NETWORKS = Registry("diffusion network", "vfmlab.diffusion")
PATHS = Registry("path", "vfmlab.diffusion")
TOKEN_NETWORKS = Registry("token network", "vfmlab.ar")
TEXT_ENCODERS = Registry("text encoder", "vfmlab.vfm.text")
FEATURE_SPACES = Registry("feature space", "vfmlab.evaluation")
INSTRUMENTS = Registry("instrument", "vfmlab.evaluation.instruments")
IMPORTERS = Registry("released checkpoint family", "vfmlab.weights.families")
LEDGERS = Registry("ledger of claims", "vfmlab.studies.ledgers")
