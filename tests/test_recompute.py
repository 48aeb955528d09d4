"""Gradient checkpointing: the same numbers, names and files; less is stored."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from vfmlab import api, config
from vfmlab.errors import ConfigError
from vfmlab.training import plan, recompute
from vfmlab.weights import io

FIELDS = {"vfm_vae": "train", "game": "train", "diffusion": "diffusion.train", "ar": "ar.train"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 4)) for _ in range(3))
        self.counted = nn.ModuleList([nn.BatchNorm1d(4)])
        self.frozen = nn.ModuleList([nn.Linear(4, 4).requires_grad_(False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in [*self.blocks, *self.counted, *self.frozen]:
            x = x + block(x)
        return x


def gradients(net: nn.Module) -> list[torch.Tensor]:
    net.zero_grad()
    torch.manual_seed(1)
    net(torch.linspace(-1, 1, 24).view(6, 4)).square().sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_blocks_that_train_and_count_nothing_are_wrapped_and_unwrapped():
    torch.manual_seed(0)
    net = Net()
    twin, names, kinds = copy.deepcopy(net), list(net.state_dict()), [type(module) for module in net.modules()]
    wrapped = recompute.start(net)
    assert wrapped == list(net.blocks)
    assert list(net.state_dict()) == names
    for mine, theirs in zip(gradients(net), gradients(twin), strict=True):  # dropout included
        assert torch.equal(mine, theirs)
    assert torch.equal(net.counted[0].running_mean, twin.counted[0].running_mean)
    average = copy.deepcopy(net)
    with torch.no_grad():
        average.blocks[0][0].weight.zero_()
    x = torch.ones(2, 4)
    assert not torch.equal(average.eval()(x), net.eval()(x)), "a copy has its own weights"
    recompute.stop(wrapped)
    assert [type(module) for module in net.modules()] == kinds


@pytest.mark.parametrize("kind", FIELDS)
def test_training_is_the_same(kind, tmp_path):
    """Losses and gradients of the first step; then weights, within what Adam makes of gradients that are rounding."""
    found = []
    for name, value in (("without", None), ("with", True)):
        fields = {"recompute": value, "samples": 16, "log_every": 8, "evaluate_at": []}
        run_dir, _ = tiny.train_tiny(kind, tmp_path / name, **{f"{FIELDS[kind]}.{key}": of for key, of in fields.items()})
        found.append((io.read(run_dir.model)[0], run_dir.metrics("step")[0]))
    (without, one), (with_, other) = found
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert without.keys() == with_.keys()
    for key, value in without.items():
        torch.testing.assert_close(with_[key], value, rtol=0, atol=1e-2)


def test_the_plan_knows_what_it_saves():
    plain = plan.plan(api.resolve("tiny_vfm_vae"))["phases"]
    fields = {"train.recompute": True, "diffusion.train.recompute": True, "diffusion.network.depth": 6}
    less = plan.plan(api.resolve("tiny_vfm_vae", fields))["phases"]
    deep = plan.plan(api.resolve("tiny_vfm_vae", {"diffusion.network.depth": 6}))["phases"]
    assert less[0]["activations_per_image"] < plain[0]["activations_per_image"]
    assert less[1]["activations_per_image"] < 0.5 * deep[1]["activations_per_image"]
    assert less[1]["flops"]["network"] == deep[1]["flops"]["network"]
    assert less[1]["flops"]["backward"] > 1.3 * deep[1]["flops"]["backward"]
    assert "6 blocks are computed again" in less[1]["notes"][-1]
    assert api.resolve("tiny_vfm_vae", {"train.recompute": None}).id == api.resolve("tiny_vfm_vae").id


def test_not_with_compile():
    with pytest.raises(ConfigError, match="do not go together"):
        config.override(api.resolve("tiny_plain_vae"), {"train.recompute": True, "train.compile": True})
