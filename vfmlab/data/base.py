"""What every source of images has in common, and the one conversion between 8-bit pixels and model range."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vfmlab.errors import ConfigError, DataError

CACHE_BYTES = 2**30
"""A set whose cropped 8-bit images take no more than this is kept in memory once drawn or decoded."""

UNLABELLED = ("all",)
"""Class names of a source without labels: one class that holds every image."""


class Batch(NamedTuple):
    """Images as they are stored, with what they are and where they came from.

    images: uint8 B 3 S S. labels: long B in [0, num_classes). indices: long B, positions in the source that
    were read; where an unreadable image was replaced, the position of its replacement.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def to(self, device: str | torch.device) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def to_float(images: Tensor) -> Tensor:
    """8-bit images -> float32 in [-1, 1]: 0 -> -1, 255 -> 1. Any shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] -> 8 bits, rounded; values outside are clipped. Inverse of :func:`to_float`."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


class ImageSource:
    """Random access to one split of a data set, all images of one size.

    A subclass implements :meth:`read`; this class caches small sets in memory. What an index holds never
    changes, so that the order of data is a function of the indices alone.

    Args:
        size: side S of the images. labels: long N. class_names: one per class.
        fingerprint: digest of everything that decides the pixels and labels of this split.

    Attributes:
        least: shortest side of the images that are read, in pixels; None: any.
        bad: a line for each image that could not be read. what: the source string. sizes: images to train on,
        how many of them there are without a cap, and images held out. dropped: reason -> [count, names] of
        files that are not used. notes: sentences that a user should see. texts: digest of the captions, where
        a run reads them, which the fingerprint knows nothing of.
    """

    def __init__(self, size: int, labels: Tensor, class_names: list[str], fingerprint: str):
        self.size, self.labels = size, labels
        self.class_names, self.fingerprint = list(class_names), fingerprint
        self.least: int | None = None
        self.bad: list[str] = []
        self.what, self.texts, self.sizes = "", "", (len(labels), len(labels), 0)
        self.dropped: dict[str, list] = {}
        self.notes: list[str] = []
        self._cache: Tensor | None = None
        self._used: Tensor | None = None
        if len(labels) * 3 * size * size <= CACHE_BYTES:
            # pages are taken as they fill
            self._cache = torch.empty(len(labels), 3, size, size, dtype=torch.uint8)
            self._used = torch.full((len(labels),), -1, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def describe(self) -> str:
        """One line: "folder:pets, 12 classes, 90 images, 10 held out (3 unreadable, 17 .heic not read)"."""
        classes = "no classes" if tuple(self.class_names) == UNLABELLED else f"{self.num_classes} classes"
        lost = {reason: count for reason, (count, _) in self.dropped.items()}
        lost = {"unreadable": len(self.bad), **lost} if self.bad else lost
        besides = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
        train, there, held = self.sizes
        sizes = f"{train:,}{f' of {there:,}' * (train < there)} images, {held:,} held out"
        return f"{self.what}, {classes}, {sizes}" + (f" ({besides})" if besides else "")

    def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Draw or decode: indices long B -> images uint8 B 3 S S and the indices really used, long B."""
        raise NotImplementedError

    def batch(self, indices: Tensor) -> Batch:
        """Images, labels and indices at `indices` (long B, any order, repeats allowed)."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise DataError(f"image indices {int(indices.min())} to {int(indices.max())} are outside this "
                            f"split of {len(self)} images")
        if self._cache is None or self._used is None:
            images, used = self.read(indices)
            return Batch(images, self.labels[used], used)
        missing = indices[self._used[indices] < 0].unique()
        if len(missing):
            images, used = self.read(missing)
            self._cache[missing] = images
            self._used[missing] = used  # last: a reader in another thread sees a slot only once it is full
        used = self._used[indices]
        return Batch(self._cache[indices], self.labels[used], used)

    def at_least(self, side: int | None) -> ImageSource:
        """This source, from now on without the images that have a shorter side in pixels; None: with all."""
        return self

    def cropped(self, indices: Tensor, draws: Tensor) -> Batch:
        """As :meth:`batch`, each image cut to a random square; draws: B 3, its share of the short side and
        its place (left, top), in [0, 1).

        Raises:
            ConfigError: images that are made at their size.
        """
        raise ConfigError(f"data.crop: the images of '{self.what}' have no larger original; set it to null")

    def masks(self, indices: Tensor) -> Tensor | None:
        """Segmentation of the object, bool B 1 S S; None where the source knows none."""
        return None

    def factors(self, indices: Tensor) -> dict[str, Tensor] | None:
        """True values of what varies in the images, by name, B ...; None where the source knows none."""
        return None

    def captions(self, indices: Tensor) -> list[str] | None:
        """What the images at `indices` (long B) show, in words; None where the source has no captions.

        Raises:
            DataError: an image without one, in a source whose others have one.
        """
        return None

    def share(self) -> None:
        """Move the cache to shared memory, so that loader processes fill one cache together."""
        if self._cache is not None and self._used is not None:
            self._cache.share_memory_()
            self._used.share_memory_()
