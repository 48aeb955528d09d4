"""Released checkpoints: one file per family turns the release's state dict into a module of this project.

An importer takes the release's own key names and configuration as they are, and either loads every tensor or raises;
nothing is skipped silently. Adding a family is adding a file that registers itself in `IMPORTERS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vfmlab.errors import CheckpointError
from vfmlab.registry import IMPORTERS


def import_state_dict(name: str, state_dict: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    """The module of released checkpoint family `name`, built from the release's `config`, in eval mode.

    Args:
        name: an entry of `IMPORTERS`, for example "va-vae".
        state_dict: tensors under the release's own key names. config: the release's own configuration names.

    Raises:
        ConfigError: unknown family, or a config that does not describe it.
        CheckpointError: missing, unexpected or mis-shaped tensors, in one line.
    """
    return IMPORTERS.get(name)(state_dict, config).eval()


@torch.no_grad()
def load_renamed(module: nn.Module, state_dict: dict[str, Tensor], what: str, keep: Iterable[str] = ()) -> nn.Module:
    """Copy `state_dict`, whose keys are already `module`'s own, into `module`: all of it or nothing. Returns `module`.

    Args:
        what: what the weights are, for the message, for example "va-vae checkpoint".
        keep: keys of the module that the release does not have and that keep their present value (for example the
            latent statistics `stat_mean`, `stat_std`, `stat_count` of a tokenizer).

    Raises:
        CheckpointError: one line that counts and names missing, unexpected and mis-shaped keys.
    """
    own = module.state_dict()
    keep = set(keep)
    missing = [key for key in own if key not in state_dict and key not in keep]
    unexpected = [key for key in state_dict if key not in own]
    shaped = [
        f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in state_dict.items()
        if key in own and own[key].shape != value.shape
    ]
    floats = {key: value for key, value in state_dict.items() if value.is_floating_point() and not value.is_meta}
    broken = [key for key, value in floats.items() if not torch.isfinite(value).all()]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": shaped, "not finite": broken}
    problems = [
        f"{len(keys)} {kind}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for kind, keys in found.items()
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{what} does not fit {type(module).__name__}: {'; '.join(problems)}; "
            "give the configuration it was trained with"
        )
    for key, value in state_dict.items():
        own[key].copy_(value)  # state_dict() shares storage with the parameters; copy_ converts dtype and device
    return module
