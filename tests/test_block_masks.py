"""Masks of block-wise generation: reference values, and what attention under them is."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file

from vfmlab.errors import ConfigError
from vfmlab.nn.attention import attend
from vfmlab.nn.block_masks import decoder_mask, encoder_mask, joint_mask

MASKS = {"enc": encoder_mask, "dec": decoder_mask, "bd3lm": joint_mask}


def test_reference_values(golden):
    g = load_file(golden / "continuous" / "e2d2_masks.safetensors")
    for name, expected in g.items():
        kind, length, block = re.fullmatch(r"(\w+)\.L(\d+)\.b(\d+)", name).groups()
        assert torch.equal(MASKS[kind](int(length), int(block)), expected.bool().squeeze()), name


@pytest.mark.parametrize(("length", "block"), [(7, 3), (6, 1), (5, 9)])
def test_each_noisy_block_attends_as_if_it_stood_alone_behind_the_finished_ones(length, block):
    """Attention under the decoder's mask, for all blocks at once, is that of each block by itself."""
    torch.manual_seed(0)
    q, (ck, cv, nk, nv) = torch.randn(1, 2, length, 4), (torch.randn(1, 2, length, 4) for _ in range(4))
    k, v = torch.cat([ck, nk], 2), torch.cat([cv, nv], 2)
    found = attend(q, k, v, decoder_mask(length, block))
    for start in range(0, length, block):
        own = slice(start, min(start + block, length))
        keys = torch.cat([ck[:, :, :start], nk[:, :, own]], 2)
        values = torch.cat([cv[:, :, :start], nv[:, :, own]], 2)
        torch.testing.assert_close(found[:, :, own], attend(q[:, :, own], keys, values))
    joint = attend(torch.cat([q, q], 2), k, v, joint_mask(length, block))
    torch.testing.assert_close(joint[:, :, length:], found)
    torch.testing.assert_close(joint[:, :, :length], attend(q, ck, cv, encoder_mask(length, block)))
    with pytest.raises(ConfigError, match="7 tokens in blocks of 0: both must be at least 1"):
        decoder_mask(7, 0)
