"""Bytes of an image file -> square 8-bit RGB: the one decoder of data sets and uploads, with the one crop."""

from __future__ import annotations

import contextlib
import io
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vfmlab.config.files import expand, read_bytes
from vfmlab.errors import DataError

MAX_PIXELS = 2**26
"""Larger images (8192 x 8192) are refused before they are decoded: decompression bombs."""
MAX_BYTES = 2**28
"""Larger files, tar members and table cells are not read."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of Pillow that are read, whatever a file is called. Never EPS: it starts another program."""


class Unreadable(Exception):
    """An image cannot be read; the message is the reason without the name."""


class TooSmall(Unreadable):
    """An image is smaller than the data section asks for: no fault, it is left out."""


@cache
def suffixes() -> dict[str, str]:
    """File suffix -> format, of all that this Pillow reads of `FORMATS`: {".jfif": "JPEG", ...}."""
    known = Image.registered_extensions()  # loads Pillow's plugins
    return {suffix: name for suffix, name in known.items() if name in FORMATS and name in Image.OPEN}


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: box-halve while the short side is >= 2 `size`, bicubic to `size`, cut the middle.

    Source: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", arXiv 2105.05233 (released
    data loader). An image of `size` x `size` comes back unchanged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Cut(NamedTuple):
    """A random square: `share` of the short side, at `left` and `top`, shares of the room that is left."""

    share: float
    left: float
    top: float

    def of(self, image: Image.Image, size: int) -> Image.Image:
        """The square, at least a pixel, resized to `size` (Lanczos)."""
        side = max(1, round(self.share * min(image.size)))
        left, top = (int(place * (full - side + 1)) for place, full in zip(self[1:], image.size, strict=True))
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.LANCZOS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB. Transparency lies on white; grey of 9 to 16 bits is scaled by the file's depth.

    EXIF orientation is applied where it can be read; broken camera data never costs an image its pixels.

    Raises:
        Unreadable: floating-point or 32-bit pixels, whose range no file states.
    """
    image.load()
    with contextlib.suppress(Exception):  # Pillow raises nearly every type on damaged camera data
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floating-point" if image.mode == "F" else "32-bit or signed"
        raise Unreadable(f"{kind} pixels without a known range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # BitsPerSample of a TIFF: 12 is stored in 16
        grey = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def decode(data: bytes, size: int, cut: Cut | None = None, least: int | None = None) -> np.ndarray:
    """An encoded image -> uint8 H W 3 with H = W = `size`.

    cut: a random square in place of the centre crop. least: shortest side in pixels.

    Raises:
        TooSmall: a side shorter than `least`.
        Unreadable: empty, truncated, not an image of `FORMATS`, or too large.
    """
    if not data:
        raise Unreadable("zero bytes")
    try:
        return _decode(data, size, cut, least)
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly every type on damaged files
        try:
            return _decode(_pixels_only(data), size, cut, least)
        except (TooSmall, MemoryError):
            raise
        except Exception:
            reason = re.sub(r"\s*<\S+ object at \w+>", "", " ".join(str(error).split()))
            raise Unreadable(reason or type(error).__name__) from None


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=sorted(set(suffixes().values())))


def _decode(data: bytes, size: int, cut: Cut | None, least: int | None) -> np.ndarray:
    with _open(data) as image:
        width, height = image.size
        if least is not None and min(width, height) < least:
            raise TooSmall(f"{width} x {height} pixels, the short side is below {least}")
        enlarged = width * height * max(1.0, size / min(width, height)) ** 2
        if max(width * height, enlarged) > MAX_PIXELS:
            raise Unreadable(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
        whole = to_rgb(image)
        return np.asarray(centre_crop(whole, size) if cut is None else cut.of(whole, size))


def _pixels_only(data: bytes) -> bytes:
    """A PNG or JPEG without text, colour profile and camera data, which may be damaged or too large."""
    parts, at = [], 0
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        parts, at = [data[:8]], 8
        while at + 8 <= len(data):
            end = at + 12 + int.from_bytes(data[at : at + 4], "big")
            kind = data[at + 4 : at + 8]
            if not kind[0] & 0x20 or kind == b"tRNS":  # critical chunks begin with a capital letter
                parts.append(data[at:end])
            at = end
    elif data.startswith(b"\xff\xd8"):
        parts, at = [data[:2]], 2
        while data[at : at + 1] == b"\xff" and data[at + 1] not in (0xDA, 0xFF):  # start of scan: the pixels
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if data[at + 1] not in (*range(0xE1, 0xEE), 0xEF, 0xFE):  # 0xEE holds colours
                parts.append(data[at:end])
            at = end
    return b"".join([*parts, data[at:]])


def dimensions(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as stored, from the header alone; may raise :class:`Unreadable`."""
    try:
        with _open(data) as image:
            return image.size
    except Exception as error:
        raise Unreadable(" ".join(str(error).split())) from None


def read_image(path: str | Path, size: int) -> Tensor:
    """One image file -> uint8 3 `size` `size`, by the same rules as a data set's images.

    Raises:
        DataError: names the file and the reason.
    """
    try:
        pixels = decode(read_bytes(expand(path), MAX_BYTES), size)
    except OSError as error:
        raise DataError(f"image '{path}' cannot be read: {error.strerror}; give the path of an image "
                        "file") from None
    except Unreadable as error:
        raise DataError(f"image '{path}' cannot be decoded: {error}; convert it to PNG or JPEG") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
