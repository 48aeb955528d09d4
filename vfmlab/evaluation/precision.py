"""The arithmetic of an evaluation: encoding, sampling and decoding as the protocol says, all else in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vfmlab.errors import ConfigError


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Inside, CUDA's matrix products and convolutions take TF32, or do not; torch's default mixes both."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, conv.allow_tf32
    matmul.allow_tf32 = conv.allow_tf32 = on
    try:
        yield
    finally:
        matmul.allow_tf32, conv.allow_tf32 = before


@contextmanager
def precise(precision: str, device: torch.device) -> Iterator[None]:
    """Inside, networks on `device` run in a protocol's `precision`: "fp32", "tf32" or "bf16".

    Raises:
        ConfigError: TF32 on a device that has none.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"protocol.precision 'tf32': the device '{device.type}' has no TF32; use fp32 or "
                          "bf16")
    with tf32(precision == "tf32"), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        yield
