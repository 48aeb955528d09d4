"""Bytes of an image file -> square 8-bit RGB: the one crop, and the one rule per kind of pixel."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vfmlab.errors import DataError

MAX_PIXELS = 2**26
"""Larger images (8192 x 8192) are refused before they are decoded: decompression bombs."""


FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's readers that may see a file, by content and not by name. Never EPS, which would start Ghostscript."""


class Unreadable(Exception):
    """An image cannot be decoded; the message is the reason without the name."""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: box-halve while the short side is >= 2 `size`, bicubic to `size`, cut the middle.

    Source: Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", arXiv 2105.05233 (released data loader).
    An image of `size` x `size` comes back unchanged.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB. Transparency lies on white; 16-bit grey is divided by 257; EXIF orientation is applied.

    Raises:
        Unreadable: floating-point pixels, whose range nothing tells.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise Unreadable("floating-point pixels without a known range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def decode(data: bytes, size: int) -> np.ndarray:
    """An encoded image -> uint8 H W 3 with H = W = `size`.

    Raises:
        Unreadable: empty, truncated, not an image, or too large.
    """
    if not data:
        raise Unreadable("zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            enlarged = width * height * max(1.0, size / min(width, height)) ** 2
            if max(width * height, enlarged) > MAX_PIXELS:
                raise Unreadable(f"{width} x {height} pixels, more than the limit of {MAX_PIXELS}")
            return np.asarray(centre_crop(to_rgb(image), size))
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly every type on damaged files
        reason = re.sub(r"\s*<\S+ object at \w+>", "", " ".join(str(error).split()))
        raise Unreadable(reason or type(error).__name__) from None


def read_image(path: str | Path, size: int) -> Tensor:
    """One image file -> uint8 3 `size` `size`, by the same rules as a data set's images.

    Raises:
        DataError: names the file and the reason.
    """
    try:
        pixels = decode(Path(path).expanduser().read_bytes(), size)
    except OSError as error:
        raise DataError(f"image '{path}' cannot be read: {error.strerror or error}; give the path of an image file") from None
    except Unreadable as error:
        raise DataError(f"image '{path}' cannot be decoded: {error}; convert it to PNG or JPEG") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
