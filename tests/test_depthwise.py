"""The depthwise convolution: torch's numbers, its gradients by other products."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vfmlab.nn import depthwise
from vfmlab.nn.depthwise import DepthwiseConv


@pytest.mark.parametrize(("batch", "channels", "height", "width", "kernel"), [(2, 3, 8, 8, 5), (1, 4, 5, 13, 7), (3, 2, 16, 9, 5), (2, 1, 1, 1, 5)])
def test_gradients_are_torchs(batch, channels, height, width, kernel, monkeypatch):
    monkeypatch.setattr(depthwise, "AT_ONCE", 2 * channels * height * width)  # one image at a time
    torch.manual_seed(0)
    layer = DepthwiseConv(channels, kernel).double()
    x = torch.randn(batch, channels, height, width, dtype=torch.float64, requires_grad=True)
    wanted = F.conv2d(x, layer.weight, layer.bias, padding=kernel // 2, groups=channels)
    target = torch.randn_like(wanted)
    parameters = [x, layer.weight, layer.bias]
    theirs = torch.autograd.grad(((wanted - target) ** 2).sum(), parameters)
    found = layer(x)
    assert "_Depthwise" in type(found.grad_fn).__name__, "or nothing is tested"
    assert torch.equal(found, wanted)
    for one, other in zip(torch.autograd.grad(((found - target) ** 2).sum(), parameters), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_of_gradients():
    layer = DepthwiseConv(2, 5).double()
    x = torch.randn(2, 2, 4, 9, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, (x,))
    assert gradgradcheck(depthwise._Depthwise.apply, (x, layer.weight, layer.bias))


def test_blocks_that_are_computed_again():
    layer, x = DepthwiseConv(2, 5), torch.randn(2, 2, 8, 8, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
    found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, layer.weight])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_it_is_torchs_own_where_that_is_faster_or_no_kernel_is_trained():
    layer, x = DepthwiseConv(2, 5), torch.randn(1, 2, 8, 8, requires_grad=True)
    assert "Depthwise" not in type(DepthwiseConv(2, 3)(x).grad_fn).__name__
    assert "Depthwise" not in type(layer(x.to(memory_format=torch.channels_last)).grad_fn).__name__
    with torch.no_grad():
        assert layer(x).grad_fn is None
    assert "Depthwise" in type(layer(x).grad_fn).__name__
    assert "Depthwise" not in type(layer.requires_grad_(False)(x).grad_fn).__name__


def test_under_autocast_products_are_fp32_and_the_result_is_not():
    layer, x = DepthwiseConv(4, 5), torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), rtol=1e-2, atol=1e-2)
    found.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
