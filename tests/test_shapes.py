"""Operators on shapes: the same sizes, types, storages and FLOPs as torch's fake tensors and counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vfmlab.training.shapes import Shape, Shapes


class Net(nn.Module):
    """A convolution, a norm, attention, an in-place step and views."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = F.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(tokens).mul_(2).mean(1)


def run() -> tuple[tuple, int]:
    """Result's form, and the bytes stored for the backward pass, each storage once."""
    net, stored = Net(), {}
    own = {id(p.untyped_storage()) for p in net.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        stored.setdefault(id(tensor.untyped_storage()), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(torch.empty(2, 3, 16, 16))
        y.sum().backward()
    form = [(p.grad.shape, p.grad.stride(), p.grad.dtype) for p in net.parameters()]
    return (y.shape, y.dtype, form), sum(t.untyped_storage().nbytes() for key, t in stored.items() if key not in own)


def test_as_torchs_own():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        expected = run()
    with Shapes() as shapes:
        assert run() == expected
    assert shapes.flops == counter.get_total_flops() > 0


def test_an_answer_is_asked_for_once():
    with Shapes() as first:
        run()
    known = len(Shapes.answers)
    with Shapes() as second:
        run()
    assert len(Shapes.answers) == known
    assert first.flops == second.flops


def test_kinds_of_numbers_and_storages():
    with Shapes():
        whole = torch.ones(4, 4, dtype=torch.long)
        assert (whole * 2).dtype == torch.long
        assert (whole * 2.0).dtype == torch.float32
        assert (whole * True).dtype == torch.long
        view = whole[1:].t()
        assert isinstance(view, Shape)
        assert view.stride() == (1, 4)
        assert view.untyped_storage() is whole.untyped_storage()
        assert (whole + 1).untyped_storage() is not whole.untyped_storage()
        assert whole.add_(1) is whole


def test_values_are_refused():
    with Shapes():
        x = torch.ones(3)
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises(RuntimeError):
            x[x > 0]
    with pytest.raises(RuntimeError, match="without values"):
        x + 1
