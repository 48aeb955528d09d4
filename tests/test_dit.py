"""LightningDiT: sizes, shapes, initialisation, precision, hidden states; every option trains."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tiny import awake

from vfmlab.config import NetworkConfig
from vfmlab.diffusion.dit import LightningDiT
from vfmlab.errors import ConfigError
from vfmlab.registry import NETWORKS
from vfmlab.seeding import generator

SHAPE = (6, 8, 4)  # not square: rows and columns must not be mixed up
TINY = {"width": 32, "depth": 2, "heads": 2, "patch": 2}
OPTIONS = [
    {},
    {"patch": 1},
    {"qk_norm": False, "rope": False},
    {"swiglu": False, "rmsnorm": False},
    {"shift_free": True, "pos_embed": False},
    {"learn_sigma": True, "rmsnorm": False},
]


def build(shape=SHAPE, classes=5, **options):
    torch.manual_seed(0)
    return LightningDiT(LightningDiT.Config(**{**TINY, **options}), shape, classes)


def inputs(shape=SHAPE, batch=3):
    g = generator("dit inputs")
    return torch.randn(batch, *shape, generator=g), torch.rand(batch, generator=g), torch.tensor([0, 4, 5])[:batch]


@pytest.mark.parametrize(
    ("size", "qk_norm", "count"),
    [("XL", True, 675_260_768), ("XL", False, 675_256_736), ("B", True, 130_557_728), ("B", False, 130_556_192)],
)
def test_published_parameter_counts(size, qk_norm, count):
    with torch.device("meta"):
        network = LightningDiT(LightningDiT.Config(size=size, qk_norm=qk_norm), (32, 16, 16), 1000)
    assert sum(p.numel() for p in network.parameters()) == count
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == count - network.pos_embed.numel()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_gives_velocities_and_gradients_everywhere(options):
    network = awake(build(**options))
    v = network(*inputs())
    assert v.shape == (3, *SHAPE)
    v.square().mean().backward()
    dead = [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not dead


@pytest.mark.parametrize("kind", NETWORKS.names())
def test_registered_networks_keep_the_contract(kind):
    part = NETWORKS.get(kind)
    assert issubclass(part.Config, NetworkConfig)
    assert part.Config.model_fields["kind"].default == kind


def test_starts_at_zero_velocity():
    assert not build()(*inputs()).any()


def test_position_and_label_and_time_matter():
    network = awake(build())
    x, t, y = inputs()
    v = network(x, t, y)
    assert not torch.allclose(network(x, t, y.roll(1)), v)
    assert not torch.allclose(network(x, t.roll(1), y), v)
    turned = network(x.flip(-2), t, y).flip(-2)
    assert not torch.allclose(turned, v)
    blind = awake(build(pos_embed=False, rope=False))  # without positions only the patches' own content counts
    shifted = blind(x.roll(2, -2), t, y).roll(-2, -2)
    torch.testing.assert_close(shifted, blind(x, t, y), atol=1e-5, rtol=1e-5)


def test_patches_keep_their_place():
    network = awake(build(rope=False, pos_embed=False))
    x, t, y = inputs()
    h = network.patch_embed(x).flatten(2).transpose(1, 2)
    _, kept = network(x, t, y, features_at=(0,))
    assert torch.equal(kept[0], h)
    # with attention and MLP switched off, an output patch depends on the input patch at its own place only
    with torch.no_grad():
        for block in network.blocks:
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()
    changed = x.clone()
    changed[:, :, 2:4, 0:2] += 1
    difference = (network(changed, t, y) - network(x, t, y)).abs().sum((0, 1)) > 1e-6
    expected = torch.zeros(8, 4, dtype=torch.bool)
    expected[2:4, 0:2] = True
    assert torch.equal(difference, expected)


def test_hidden_states():
    network = awake(build())
    x, t, y = inputs()
    v, kept = network(x, t, y, features_at=(0, 1, -1))
    torch.testing.assert_close(v, network(x, t, y))
    assert set(kept) == {0, 1, -1}
    assert all(h.shape == (3, 8, 32) for h in kept.values())
    assert not torch.equal(kept[1], kept[-1])
    torch.testing.assert_close(network(x, t, y, features_at=(2,))[1][2], kept[-1])
    with pytest.raises(ConfigError, match="features_at 3"):
        network(x, t, y, features_at=(3,))


def test_autocast_keeps_the_residual_stream_in_fp32_and_stays_close():
    network = awake(build(depth=4))
    x, t, y = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        v, kept = network(x, t, y, features_at=(0, -1))
    assert kept[-1].dtype == torch.float32
    exact = network(x, t, y)
    assert (v.float() - exact).norm() / exact.norm() < 0.02


def test_compiles_in_one_graph():
    network = awake(build())
    torch.testing.assert_close(torch.compile(network, backend="eager", fullgraph=True)(*inputs()), network(*inputs()))


def test_sizes_may_be_named_given_or_mixed():
    config = LightningDiT.Config(size="B", depth=2)
    assert config.sizes == (768, 2, 12)
    with pytest.raises(ValidationError, match="either size"):
        LightningDiT.Config(width=32)
    with pytest.raises(ValidationError, match="multiple of 4 x heads"):
        LightningDiT.Config(width=30, depth=1, heads=2)
    with pytest.raises(ConfigError, match=r"patch 3 does not divide the latent of 8 x 4"):
        build(patch=3)
