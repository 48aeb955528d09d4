"""The holder of parts that a module uses and does not own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vfmlab.nn.frozen import Frozen


class Owner(nn.Module):
    def __init__(self, part: nn.Module | None):
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.frozen = Frozen(part=part)


@pytest.fixture
def part() -> nn.Module:
    return nn.BatchNorm1d(2).eval()


def test_the_owner_leaves_its_parts_as_they_are(part):
    owner = Owner(part)
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert len(list(owner.parameters())) == 2
    assert not list(owner.buffers())
    owner.train().requires_grad_(False)
    assert not part.training
    assert part.weight.requires_grad
    owner.zero_grad(), owner.load_state_dict(owner.state_dict())


def test_parts_move_with_their_owner(part):
    Owner(part).to(torch.float64)
    assert part.weight.dtype == torch.float64
    assert Owner(part).to("meta").frozen["part"].running_mean.is_meta


def test_a_deep_copy_shares_the_parts(part):
    owner = Owner(part)
    twin = copy.deepcopy(owner)
    assert twin.frozen["part"] is part
    assert twin.own.weight is not owner.own.weight
    twin.frozen["other"] = nn.Identity()
    assert owner.frozen.get("other") is None
    assert len(twin.frozen) == 2


def test_a_part_that_is_not_there():
    owner = Owner(None)
    assert owner.frozen.get("part") is None
    assert not owner.frozen
    with pytest.raises(KeyError):
        owner.frozen["part"]
