"""Released checkpoints: one file per family turns the release's state dict into a module of this project.

An importer takes the release's own key names and configuration as they are, and either loads every tensor or
raises; nothing is skipped silently. Adding a family is adding a file that registers itself in `IMPORTERS`.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from vfmlab.errors import ConfigError
from vfmlab.registry import IMPORTERS


def import_state_dict(name: str, state_dict: dict[str, Tensor], config: dict[str, Any]) -> nn.Module:
    """The module of released checkpoint family `name`, built from the release's `config`, in eval mode.

    Args:
        name: an entry of `IMPORTERS`, for example "va-vae".
        state_dict: tensors under the release's own key names, with or without the prefixes of distributed,
            compiled and latent diffusion models. config: the release's own configuration names.

    Raises:
        ConfigError: unknown family, or a config that does not describe it. CheckpointError: missing,
        unexpected or mis-shaped tensors, or not of real numbers.
    """
    from vfmlab.config.override import explain
    from vfmlab.weights import io

    build = IMPORTERS.get(name)
    if not isinstance(config, dict):
        raise ConfigError(f"{name}: the config is a {type(config).__name__}; give a dict of the release's "
                          "fields")
    io.check_types(state_dict, f"{name} checkpoint")
    try:
        return build(io.unprefixed(state_dict), config).eval()
    except ValidationError as error:
        raise ConfigError(f"{name}: the release's config cannot be: {explain(error, {})}") from None
