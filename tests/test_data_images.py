"""Decoding of every kind of image file, and the one crop."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vfmlab.data import centre_crop
from vfmlab.data.decode import TooSmall, Unreadable, decode

RNG = np.random.default_rng(0)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, data):
    """A piece of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def noise(width, height):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


@settings(max_examples=60)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(8, 64))
def test_crop_is_square_and_keeps_a_flat_colour(width, height, size):
    out = centre_crop(Image.new("RGB", (width, height), (7, 100, 250)), size)
    assert out.size == (size, size)
    assert (np.asarray(out) == (7, 100, 250)).all()


@settings(max_examples=20)
@given(size=st.integers(8, 64))
def test_crop_leaves_an_image_of_the_right_size_alone(size):
    image = noise(size, size)
    assert (np.asarray(centre_crop(image, size)) == np.asarray(image)).all()


@settings(max_examples=30)
@given(size=st.integers(8, 40), extra=st.integers(0, 60), wide=st.booleans())
def test_crop_takes_the_middle(size, extra, wide):
    """With the short side at `size` nothing is resampled: the crop is a window of the original."""
    shape = (size + extra, size) if wide else (size, size + extra)
    image = noise(*shape)
    start = extra // 2
    window = np.s_[:, start : start + size] if wide else np.s_[start : start + size]
    assert (np.asarray(centre_crop(image, size)) == np.asarray(image)[window]).all()


def test_crop_halves_with_a_box_before_bicubic():
    """64 -> 16 is two box halvings and nothing else: the mean of 4 x 4 pixels, rounded four times."""
    image = noise(64, 64)
    pixels = np.asarray(image).astype(np.float64)
    mean = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(centre_crop(image, 16)) - mean).max() <= 2.0
    # just under twice the size there is no halving: plain bicubic
    image = noise(31, 31)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    assert (np.asarray(centre_crop(image, 16)) == expected).all()


@pytest.mark.parametrize("flipped", [False, True])
def test_crop_is_centred(flipped):
    """A centred dot stays in the middle whichever side it is looked at from."""
    pixels = np.zeros((100, 160, 3), np.uint8)
    pixels[46:54, 76:84] = 255
    image = Image.fromarray(pixels[:, ::-1] if flipped else pixels)
    out = np.asarray(centre_crop(image, 16)).astype(float)[..., 0]
    axis = np.arange(16) - 7.5
    assert abs((out.sum(0) * axis).sum() / out.sum()) < 0.05
    assert abs((out.sum(1) * axis).sum() / out.sum()) < 0.05


GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)


def test_grey_images_of_8_and_16_bits_are_alike():
    eight = decode(encoded(Image.fromarray(GREY)), 8)
    sixteen = decode(encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), 8)
    tiff = decode(encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"), 8)
    assert (eight == np.repeat(GREY[..., None], 3, 2)).all()
    assert (eight == sixteen).all()
    assert (eight == tiff).all()


def test_sixteen_bit_colour():
    pixels = (np.stack([GREY, GREY[::-1], GREY.T], -1).astype(">u2") * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (decode(png, 8) == pixels // 257).all()


def test_palette_and_one_bit():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 30, 10])
    assert (decode(encoded(image), 8) == (200, 30, 10)).all()
    assert (decode(encoded(Image.new("1", (8, 8), 1)), 8) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    out = decode(encoded(image.convert(mode)), 8)
    assert (out[:, :4] == 0).all()
    assert (out[:, 4:] == 255).all()


def test_a_transparent_colour_without_alpha_channel():
    out = decode(encoded(Image.new("RGB", (8, 8), (9, 9, 9)), transparency=(9, 9, 9)), 8)
    assert (out == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    out = decode(encoded(image, kind), 8).astype(int)
    assert np.abs(out - (255, 0, 0)).max() < 12


def test_exif_orientation_is_applied():
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # upper half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the upper half becomes the right one
    out = decode(encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95), 16)
    assert out[:, 9:].mean() > 240
    assert out[:, :7].mean() < 15


def bomb(width, height):
    """A PNG that promises more pixels than anyone wants, and holds a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


GOOD = encoded(noise(40, 40))
BAD = {
    "empty": (b"", "zero bytes"),
    "text": (b"this is no image" * 9, "cannot identify"),
    "truncated png": (GOOD[: len(GOOD) // 2], "truncated|incomplete|end of"),
    "truncated jpeg": (encoded(noise(64, 64), "JPEG")[:700], "truncated"),
    "header only": (GOOD[:30], "."),
    "bomb": (bomb(9000, 8000), "9000 x 8000 pixels"),
    "huge bomb": (bomb(60000, 60000), "pixels"),
    "needle": (encoded(Image.new("L", (1, 60000))), "more than the limit"),
    "float": (encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "floating-point"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", sorted(BAD))
def test_unreadable_images_say_why_in_one_line(name):
    data, needle = BAD[name]
    with pytest.raises(Unreadable, match=needle) as caught:
        decode(data, 64)
    assert "\n" not in str(caught.value)
    assert "BytesIO" not in str(caught.value)


@settings(max_examples=150)
@given(place=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), end=st.integers(0, len(GOOD)))
def test_damage_never_raises_anything_else(place, value, end):
    damaged = bytearray(GOOD)
    damaged[place] = value
    with contextlib.suppress(Unreadable):
        assert decode(bytes(damaged[:end]), 16).shape == (16, 16, 3)


def test_only_listed_formats_are_opened_whatever_the_name(monkeypatch):
    """A PostScript file would start Ghostscript; every reader outside the list never sees the bytes."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    picture = noise(16, 16)
    for kind in ("EPS", "ICO", "TGA", "PCX", "SGI", "PDF"):
        with pytest.raises(Unreadable, match="cannot identify"):
            decode(encoded(picture, kind), 16)
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        assert decode(encoded(picture, kind), 16).shape == (16, 16, 3)


def tiff(pixels, bits, kind=1):
    """A grey TIFF with `bits` bits a sample, packed; kind: 1 unsigned, 2 signed."""
    if bits % 8:  # samples that are not whole bytes are packed from the highest bit on, whatever the byte order
        text = "".join(format(int(v), f"0{bits}b") for v in pixels.ravel())
        body = int(text, 2).to_bytes(len(text) // 8, "big")
    else:
        body = pixels.astype(f"<u{bits // 8}").tobytes()
    rows, columns = pixels.shape
    tags = {256: columns, 257: rows, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: rows, 279: len(body), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_grey_of_any_depth_is_scaled_by_what_the_file_says(bits):
    out = decode(tiff(GREY.astype(np.uint64) * (2**bits - 1) // 255, bits), 8)
    assert np.abs(out[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(("bits", "kind"), [(32, 1), (32, 2), (16, 2)])
def test_grey_without_a_known_range_is_refused(bits, kind):
    with pytest.raises(Unreadable, match="without a known range; convert it to 8 or 16 bits"):
        decode(tiff(GREY.astype(np.uint64), bits, kind), 8)


def with_chunks(png, *chunks):
    return png[:33] + b"".join(chunks) + png[33:]


def exif_with(value):
    """EXIF with orientation 6 and an XResolution of `value`, a pair of 32-bit numbers."""
    entries = struct.pack(">HHII", 0x0112, 3, 1, 6 << 16) + struct.pack(">HHII", 0x011A, 10, 1, 38)
    return b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 2) + entries + bytes(4) + struct.pack(">ii", *value)


PICTURE = noise(16, 16)
PIXELS = np.asarray(PICTURE)
METADATA = {
    "text of 2 MB": with_chunks(encoded(PICTURE), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21)))),
    "profile of 2 MB": with_chunks(encoded(PICTURE), chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**21)))),
    "text with a wrong sum": with_chunks(encoded(PICTURE), chunk(b"tEXt", b"k\0v")[:-1] + b"?"),
    "exif without header": with_chunks(encoded(PICTURE), chunk(b"eXIf", b"junk")),
    "many texts": with_chunks(encoded(PICTURE), *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 9)))] * 70),
}


@pytest.mark.parametrize("name", sorted(METADATA))
def test_metadata_never_costs_an_image_its_pixels(name):
    assert (decode(METADATA[name], 16) == PIXELS).all()
    with pytest.raises(TooSmall):  # left out, and no unreadable image
        decode(METADATA[name], 16, least=17)


@pytest.mark.parametrize("value", [(-1, 0), (0, 0), (1, -1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied_beside_broken_camera_data(kind, value):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    image = Image.fromarray(pixels)
    data = encoded(image, kind, **({} if kind == "TIFF" else {"exif": b"Exif\0\0" + exif_with(value), "quality": 95}))
    out = decode(data, 16)
    upper, right = out[:7].mean(), out[:, 9:].mean()
    assert upper > 240 if kind == "TIFF" else right > 240


@pytest.mark.parametrize("marker", [*range(0xE1, 0xEE), 0xEF, 0xFE])
@pytest.mark.parametrize("junk", [b"", b"Exif\0\0junk", b"MPF\0junk", b"ICC_PROFILE\0\1", bytes(60000)])
def test_segments_of_a_jpeg_never_cost_its_pixels(marker, junk):
    data = encoded(PICTURE, "JPEG", quality=95)
    expected = decode(data, 16)
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(junk) + 2) + junk
    assert (decode(data[:2] + segment + data[2:], 16) == expected).all()
