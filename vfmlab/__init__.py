"""vfmlab: visual tokenizers from vision foundation models, and generators on their latents.

The few doors (see `vfmlab.api`): :func:`train`, :func:`evaluate`, :func:`sample`, :func:`reconstruct`,
:func:`load_tokenizer`, :func:`load_generator`, :func:`load_diffusion`, and :func:`open_step` for one training
step in pieces. They are imported on first use, so `import vfmlab` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["evaluate", "load_diffusion", "load_generator", "load_tokenizer", "open_step", "reconstruct",
           "resolve", "sample", "train"]
ELSEWHERE = {"open_step": "vfmlab.training.open_step"}  # not in the API's own file

if TYPE_CHECKING:
    from vfmlab.api import (
        evaluate,
        load_diffusion,
        load_generator,
        load_tokenizer,
        reconstruct,
        resolve,
        sample,
        train,
    )
    from vfmlab.training.open_step import open_step


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(ELSEWHERE.get(name, "vfmlab.api")), name)
    try:
        return importlib.import_module(f"vfmlab.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"vfmlab.{name}":
            raise
        raise AttributeError(f"module 'vfmlab' has no attribute '{name}'") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
