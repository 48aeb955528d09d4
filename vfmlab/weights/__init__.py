"""Released checkpoints: one file per family turns the release's state dict into a module of this project.

An importer takes the release's own key names and configuration as they are, and either loads every tensor or
raises; nothing is skipped silently. Adding a family is adding a file that registers itself in `IMPORTERS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from vfmlab.errors import ConfigError, of_the_machine
from vfmlab.registry import IMPORTERS


@contextmanager
def as_released(name: str) -> Iterator[None]:
    """Inside, a config or tensors that are not of family `name` (a null, a text for a number, another shape)
    are one :class:`ConfigError`: importers compute with them before the strict loader sees them."""
    from vfmlab.config.override import explain

    try:
        yield
    except ValidationError as error:
        raise ConfigError(f"{name}: the release's config cannot be: {explain(error, {})}") from None
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        if of_the_machine(error):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ConfigError(f"{name}: the config or the weights are not those of such a release ({reason}); "
                          "give its own") from None


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
    from vfmlab.weights import io

    build = IMPORTERS.get(name)
    if not isinstance(config, dict):
        raise ConfigError(f"{name}: the config is a {type(config).__name__}; give a dict of the release's "
                          "fields")
    with as_released(name):
        io.check_types(state_dict, f"{name} checkpoint")
        return build(io.unprefixed(state_dict), config).eval()
