"""The prompts under which samples of a generator that reads text are measured, as `protocol.prompts` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from vfmlab import config
from vfmlab.config.files import expand, read_bytes
from vfmlab.diffusion import prompts as conditions
from vfmlab.errors import DataError

if TYPE_CHECKING:
    from vfmlab.data import ImageSource


def texts(protocol: config.Protocol, source: ImageSource) -> list[str]:
    """The prompts of a protocol, sample after sample: captions of the held-out images, or lines of a file.

    Raises:
        DataError: images without captions; a file that is not there, not text, or empty.
    """
    if protocol.prompts == config.CAPTIONS:
        return conditions.captions(source)
    try:
        lines = read_bytes(expand(protocol.prompts)).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"protocol.prompts '{protocol.prompts}': {reason}; give a text file with one prompt "
                        f"a line, or '{config.CAPTIONS}'") from None
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise DataError(f"protocol.prompts '{protocol.prompts}': the file has no line; write one prompt a "
                        "line")
    return prompts


def mark(protocol: config.Protocol, source: ImageSource) -> str:
    """Digest of the prompts."""
    return config.digest(texts(protocol, source))


def prompted(network: nn.Module, protocol: config.Protocol, source: ImageSource) -> nn.Module:
    """`network` under the prompts of the protocol: condition i is the i-th; as it is, where it reads no text.

    Raises:
        DataError: as :func:`texts`. ConfigError: a prompt that the encoder does not take.
    """
    own = getattr(network, "prompts", None)
    if own is None:
        return network
    return conditions.prompted(network, conditions.of(texts(protocol, source), own.encoder))


def classes(protocol: config.Protocol, source: ImageSource, labels: Tensor) -> Tensor | None:
    """Classes of samples by their labels, the numbers of their prompts where they were drawn for these (long
    B); None: prompts of a file have no classes."""
    if protocol.prompts is None:
        return labels
    return source.labels[labels] if protocol.prompts == config.CAPTIONS else None
