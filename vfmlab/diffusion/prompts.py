"""Texts as the conditions of a diffusion network.

A network that reads text is conditioned by numbers, as others are by classes: condition i is the i-th text of
its :class:`Prompts`, and the one after the last is the empty text, which guidance leads away from. So nothing
between here and the network has to know of text. What the texts are is set from outside: the captions of the
training images (:mod:`vfmlab.diffusion.captions`), those of a protocol, or what a user types.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vfmlab.config import Diffusion
from vfmlab.errors import ConfigError, DataError
from vfmlab.vfm.text import TextEncoder, open_encoder

if TYPE_CHECKING:
    from vfmlab.data import ImageSource

EXAMPLES = 16  # captions that a run remembers, to sample when nothing else is asked for


class Prompts:
    """Texts with their tokens. Called with conditions (long B), gives fp32 B L D on their device.

    Args:
        texts: in order; the empty text, condition len(texts), is not among them. rows: conditions on the CPU
        -> tokens. encoder: for other texts of the same network.
    """

    def __init__(self, texts: Sequence[str], rows: Callable[[Tensor], Tensor],
                 encoder: TextEncoder | None = None):
        self.texts, self.rows, self.encoder = list(texts), rows, encoder

    def __len__(self) -> int:
        return len(self.texts)

    def __call__(self, conditions: Tensor) -> Tensor:
        return self.rows(conditions.cpu()).to(conditions.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Prompts:
        return self  # the average of a network reads the same ones


def of(texts: Sequence[str], encoder: TextEncoder) -> Prompts:
    """Prompts that are encoded now; errors as :class:`~vfmlab.vfm.text.TextEncoder`."""
    tokens = torch.cat([encoder(part) for part in _split([*texts, ""])]).cpu().half().float()  # as cached
    return Prompts(texts, lambda conditions: tokens[conditions], encoder)


def _split(texts: list[str], size: int = 256) -> Iterator[list[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


def blank(shape: tuple[int, int]) -> Prompts:
    """Tokens of zeros for a network that is measured, not used. shape: (L, D)."""
    return Prompts((), lambda conditions: torch.zeros(len(conditions), *shape))


def encoder_of(cfg: Diffusion) -> TextEncoder:
    """The text encoder of a run.

    Raises:
        ConfigError: its tokens are of another width than the network's `text`.
    """
    length, width = cfg.network.text
    encoder = open_encoder(cfg.text.encoder, length)
    if encoder.width != width:
        raise ConfigError(f"diffusion.network.text [{length}, {width}]: tokens of '{encoder.name}' have "
                          f"width {encoder.width}; set diffusion.network.text=[{length},{encoder.width}]")
    return encoder


def set_prompts(network: nn.Module, prompts: Prompts) -> None:
    """From now on these are the conditions of `network`."""
    network.prompts, network.num_classes = prompts, len(prompts)


def prompted(network: nn.Module, prompts: Prompts) -> nn.Module:
    """`network` under other conditions: another module with the same weights."""
    other = copy.copy(network)
    set_prompts(other, prompts)
    return other


def captions(source: ImageSource, indices: Tensor | None = None) -> list[str]:
    """The captions of a source's images, of all of them or of some (long B).

    Raises:
        DataError: it has none.
    """
    texts = source.captions(torch.arange(len(source)) if indices is None else indices)
    if texts is None:
        raise DataError(f"diffusion.text: the images of '{source.what}' have no captions; write each into a "
                        ".txt beside its image, name a column of the table in data.caption_column, or draw "
                        "scenes:groups")
    return texts
