"""npz files as ADM's evaluator reads and writes them (arXiv 2105.05233): images, and statistics of a set.

`arr_0` holds images, uint8 N H W 3. `mu`, `sigma` are mean and covariance of Inception's pool features;
`mu_s`, `sigma_s` those of its spatial features. A file of samples has `arr_0` alone; a reference may lack
any of them. Images are read and written piece by piece: fifty thousand of 256 px take ten gigabytes.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from vfmlab.config.files import beside
from vfmlab.errors import DataError
from vfmlab.evaluation.frechet import ROWS, Moments
from vfmlab.weights import io

IMAGES = "arr_0"
STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of a space's output -> keys


@dataclass(frozen=True)
class Reference:
    """A checked npz file. n, side: of its images; n = 0: it holds none. keys: what it holds."""

    path: Path
    keys: frozenset[str]
    n: int = 0
    side: int = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return io.sha256(self.path)

    def facts(self) -> dict[str, Any]:
        """What enters a protocol's hash; the path (`source`) is shown only."""
        return {"source": str(self.path), **self.key}

    @property
    def key(self) -> dict[str, Any]:
        """What its images' features are stored under; of many images, rows all over the file are held: files
        may be sorted by class."""
        return {"sha256": self.digest} | ({"rows": "spread"} if self.n > ROWS else {})

    def moments(self, of: str) -> Moments | None:
        """The statistics that it gives of a space's `features` or `spatial` output; None where it has none.

        Raises:
            DataError: no mean of D and covariance of D x D finite numbers.
        """
        keys = STATISTICS[of]
        if keys[0] not in self.keys:
            return None
        with _open(self.path) as file:
            mean, covariance = (_small(file, self.path, key) for key in keys)
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise DataError(f"'{self.path}': {keys[0]} has shape {mean.shape} and {keys[1]} "
                            f"{covariance.shape}; D and D D are expected")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DataError(f"'{self.path}': {keys[0]} or {keys[1]} holds numbers that are not finite; "
                            "take another copy of the file")
        return Moments.given(*(torch.as_tensor(x, dtype=torch.float64) for x in (mean, covariance)))

    def images(self, batch: int) -> Iterator[Tensor]:
        """Its images in order, uint8 B 3 H W, at most `batch` at a time."""
        row = 3 * self.side**2
        with _open(self.path) as file, _array(file, self.path, IMAGES) as stream:
            _header(stream, self.path)
            for start in range(0, self.n, batch):
                count = min(batch, self.n - start)
                data = _exactly(stream, count * row, self.path)
                pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                yield pixels.view(count, self.side, self.side, 3).permute(0, 3, 1, 2)


def open_reference(path: str | Path, size: int | None = None) -> Reference:
    """The npz file at `path`; size: side in pixels that its images must have.

    Raises:
        DataError: no such file, no npz, nothing in it that can serve, or images of another shape.
    """
    path = Path(path).expanduser()
    with _open(path) as file:
        keys = frozenset(name.removesuffix(".npy") for name in file.namelist())
        for mean, covariance in STATISTICS.values():
            if (mean in keys) != (covariance in keys):
                raise DataError(f"'{path}' holds one of {mean} and {covariance}; a reference has both or "
                                "neither")
        if IMAGES not in keys:
            if "mu" not in keys:
                present = ", ".join(sorted(keys)[:6]) or "nothing"
                raise DataError(f"'{path}' holds neither arr_0 (uint8 N H W 3) nor mu and sigma, but "
                                f"{present}; give a file of ADM's evaluator")
            return Reference(path, keys)
        with _array(file, path, IMAGES) as stream:
            n, side = _header(stream, path)
    if size is not None and side != size:
        raise DataError(f"'{path}' holds images of {side} px, this run's have {size} px; give the reference "
                        f"of {size} px")
    return Reference(path, keys, n, side)


def write(path: Path, parts: Sequence[Path], side: int) -> None:
    """An npz file whose arr_0 is the arrays (.npy, uint8 n side side 3) in `parts`, one after the other.

    Raises:
        DataError: a part of another shape.
    """
    total = sum(rows(part, side) for part in parts)
    header = {"descr": "|u1", "fortran_order": False, "shape": (total, side, side, 3)}
    with (beside(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file,
          file.open(f"{IMAGES}.npy", "w", force_zip64=True) as out):
        npy.write_array_header_1_0(out, header)
        for part in parts:
            out.write(np.load(part, mmap_mode="r", allow_pickle=False).tobytes())


def rows(part: Path, side: int) -> int:
    """Images in a part of samples.

    Raises:
        DataError: damaged, or of another shape.
    """
    try:
        array = np.load(part, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"'{part}' is damaged ({error}); delete it, it is then drawn anew") from None
    if array.dtype != np.uint8 or array.shape[1:] != (side, side, 3):
        raise DataError(f"'{part}' holds {array.dtype} {array.shape}, uint8 N {side} {side} 3 is expected; "
                        "delete it, it is then drawn anew")
    return len(array)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"'{path}' does not exist; set protocol.reference to an npz file of ADM's "
                        "evaluator") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"'{path}' is no npz file ({error}); give one of ADM's evaluator") from None


@contextmanager
def _array(file: zipfile.ZipFile, path: Path, key: str) -> Iterator[Any]:
    """The bytes of an array; :class:`DataError` in one line for whatever is wrong with them."""
    try:
        with file.open(f"{key}.npy") as stream:
            yield stream
    except (ValueError, EOFError, TypeError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"'{path}': {key} cannot be read ({error}); take another copy of the file") from None


def _header(stream: Any, path: Path) -> tuple[int, int]:
    """(N, side) of arr_0, which is then read from behind its header."""
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3 and shape[0] > 0 and shape[1] > 0
    if dtype != np.uint8 or fortran or not square:
        raise DataError(f"'{path}': arr_0 is {dtype} {shape}; images are uint8 N H W 3 with H = W")
    return shape[0], shape[1]


def _small(file: zipfile.ZipFile, path: Path, key: str) -> np.ndarray:
    with _array(file, path, key) as stream:
        return np.asarray(npy.read_array(stream, allow_pickle=False), dtype=np.float64)


def _exactly(stream: BinaryIO, count: int, path: Path) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise DataError(f"'{path}': arr_0 is damaged or ends early; take another copy of the file")
    return data
