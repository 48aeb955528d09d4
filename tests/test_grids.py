"""Maps of several grids on the latent's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vfmlab.errors import ConfigError
from vfmlab.nn import grids


def test_finer_maps_become_channels_and_coarser_ones_are_resized():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(grids.fold(x, 2.0), F.pixel_unshuffle(x, 2))
    torch.testing.assert_close(grids.fold(x, 1.0), x)
    torch.testing.assert_close(grids.fold(x, 0.5), F.interpolate(x, (16, 16), mode="bilinear"))
    torch.testing.assert_close(grids.fold(x, 4 / 3, (6, 6)), F.interpolate(x, (6, 6), mode="bilinear"))
    torch.testing.assert_close(grids.fold(x[..., :4, :], 2.0), F.pixel_unshuffle(x[..., :4, :], 2))
    assert [grids.steps(r) for r in (0.5, 1.0, 1.5, 4.0)] == [1, 1, 1, 4]


def test_ratios():
    assert grids.ratios({0: 64, 3: 16, -1: 4}, 8, "vfm.layers", "vfm.upscale") == {0: 8.0, 3: 2.0, -1: 0.5}
    with pytest.raises(ConfigError, match=r"vfm.layers: layer 1 has a 12 x 12 grid, no multiple of the latent's 8; set up"):
        grids.ratios({0: 16, 1: 12}, 8, "vfm.layers", "up")
    with pytest.raises(ConfigError, match="layer 1 has a 4 x 4 grid, .* and no layer is as fine as that; set up"):
        grids.ratios({1: 4, 2: 2}, 8, "vfm.layers", "up")


def test_images_whose_grid_does_not_divide():
    assert grids.gathered({0: torch.zeros(1, 1, 4, 6)}, {0: 2.0}, 32).shape == (1, 4, 2, 3)
    with pytest.raises(ConfigError, match=r"layer 0 has a \(4, 5\) grid, which does not divide by 2; use images of 32 px"):
        grids.gathered({0: torch.zeros(1, 1, 4, 5)}, {0: 2.0}, 32)
