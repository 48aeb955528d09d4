"""The progressive decoder's parts against closed forms and stored outputs, and every switch of its config."""

from __future__ import annotations

import pytest
import torch
from benchmarks import grouped_modulated_conv
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab.decoders.progressive import ProgressiveConfig, ProgressiveDecoder
from vfmlab.errors import ConfigError
from vfmlab.nn.convnext import ModulatedConvNeXt
from vfmlab.nn.fusion import LatentFusion
from vfmlab.nn.modulation import EqualLinear, Mapping, modulated_conv
from vfmlab.nn.norms import group_norm
from vfmlab.nn.null_attention import AttentionBlock
from vfmlab.nn.resample import BinomialBlur, NearestUpsample, ShuffleUpsample
from vfmlab.registry import DECODERS
from vfmlab.weights.families import vfm_vae
from vfmlab.weights.family import headed

SMALL = {
    "decompress_factor": 2, "blocks": 3, "channel_base": 4096, "channel_max": 24, "num_res_blocks": 1,
    "fusion_blocks": (0, 1, 2), "fusion_widths": (16, 12, 8), "style_width": 16, "attention_blocks": (0,),
    "attention_depths": (1,), "heads": 4,
}  # fmt: skip


def build(channels=4, side=8, size=32, **changes) -> ProgressiveDecoder:
    torch.manual_seed(0)
    return ProgressiveDecoder(ProgressiveConfig(**{**SMALL, **changes}), channels, side, size)


def renamed(io, head, table):
    """A stored state dict under our names, each tensor in our shape."""
    return {headed(k.removeprefix(head), table): v for k, v in io.items() if k.startswith(head)}


def load(module, state):
    own = module.state_dict()
    module.load_state_dict({k: v.reshape(own[k].shape) for k, v in state.items()})
    return module


# -- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_modulation_equals_the_grouped_convolution(demodulate, kernel):
    x, weight, style = torch.randn(3, 12, 5, 7), torch.randn(20, 12, kernel, kernel), torch.randn(3, 12)
    ours = modulated_conv(x, weight, style, demodulate)
    torch.testing.assert_close(ours, grouped_modulated_conv(x, weight, style, demodulate), atol=1e-5, rtol=1e-5)


def test_demodulated_outputs_have_unit_variance():
    """For independent unit inputs that is what the division by the weights' norm is for."""
    x, style = torch.randn(2, 64, 64, 64), torch.rand(2, 64) * 5
    y = modulated_conv(x, torch.randn(8, 64, 1, 1) * 3, style)
    torch.testing.assert_close(y.var(dim=(2, 3)), torch.ones(2, 8), atol=0.1, rtol=0)


def test_equalised_linear_starts_at_unit_variance():
    for multiplier in (1.0, 0.01):
        layer = EqualLinear(512, 512, lr_multiplier=multiplier)
        assert layer(torch.randn(64, 512)).std().item() == pytest.approx(1, rel=0.05)
        assert layer.weight.std().item() == pytest.approx(1 / multiplier, rel=0.02)


def test_mapping_sees_the_direction_of_the_pooled_latent():
    mapping = Mapping(6, 8, pooled=2)
    z = torch.randn(2, 6, 8, 8)
    torch.testing.assert_close(mapping(z), mapping(3 * z), atol=1e-5, rtol=1e-5)
    assert mapping.layers[0].weight.shape == (8, 24)


def test_blur_keeps_constants_and_sums():
    x = torch.rand(2, 3, 8, 8)
    for taps in (3, 5):
        blur = BinomialBlur(taps)
        torch.testing.assert_close(blur(torch.ones_like(x)), torch.ones_like(x))
        point = torch.zeros(1, 1, 9, 9)
        point[..., 4, 4] = 1
        row = torch.tensor({3: [1.0, 2, 1], 5: [1.0, 4, 6, 4, 1]}[taps])
        r = taps // 2
        kernel = torch.outer(row, row) / row.sum() ** 2
        torch.testing.assert_close(blur(point)[0, 0, 4 - r : 5 + r, 4 - r : 5 + r], kernel)
        assert not blur.state_dict()


@pytest.mark.parametrize(("up", "down", "side"), [(1, 1, 8), (2, 1, 16), (4, 1, 32), (1, 2, 4), (1, 4, 2)])
def test_fusion_reaches_any_side(up, down, side):
    assert LatentFusion(4, 6, up, down)(torch.randn(2, 4, 8, 8)).shape == (2, 6, side, side)


@pytest.mark.parametrize("kind", [ShuffleUpsample, NearestUpsample])
def test_upsampling_doubles(kind):
    assert kind(6, 10, taps=3)(torch.randn(2, 6, 5, 7)).shape == (2, 10, 10, 14)


def test_convnext_with_legacy_noise(golden):
    """Stored outputs, at the noise's own size and at twice that size, where it is interpolated."""
    io = load_file(golden / "vfmvae_components.safetensors")
    layer = ModulatedConvNeXt(16, 24, kernel=5, legacy_noise=8)
    load(layer, renamed(io, "convnext_legacy.sd.", vfm_vae.LAYER))
    x, w = io["convnext_legacy.x"], io["convnext_legacy.w"]
    with torch.no_grad():
        torch.testing.assert_close(layer(x, w), io["convnext_legacy.out"], atol=1e-4, rtol=1e-4)
        twice = F.interpolate(x, scale_factor=2)
        torch.testing.assert_close(layer(twice, w), io["convnext_legacy.out_16"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention(golden, masked):
    io = load_file(golden / "vfmvae_components.safetensors")
    block = load(AttentionBlock(32, 8, context=24), renamed(io, "cross.sd.", vfm_vae.ATTENTION))
    mask = io["cross.mask"].bool() if masked else None
    with torch.no_grad():
        out = block(io["cross.x"], io["cross.ctx"], mask)
    torch.testing.assert_close(out, io["cross.out_mask" if masked else "cross.out_nomask"], atol=1e-4, rtol=1e-4)


def test_attention_starts_as_identity():
    x = torch.randn(2, 12, 4, 4)
    assert torch.equal(AttentionBlock(12, 8)(x), x)


# -- switches ---------------------------------------------------------------------------------------------------------

PLAIN = {
    "fusion": False, "style": False, "attention": False, "running_sum": False, "multiscale": False, "blur": False,
    "layer": "conv", "upsample": "nearest",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"fusion": False}, ("fusion.1", "fusion.2")),
        ({"style": False}, ("mapping", "style")),
        ({"attention": False}, ("blocks.0.attention",)),
        ({"running_sum": False}, ("sum_upsample",)),
        ({"multiscale": False}, ("blocks.0.to_rgb", "blocks.1.to_rgb")),
        ({"layer": "conv"}, (".scale", "expand_weight")),
        ({"upsample": "nearest"}, ("upsample.pointwise",)),
        (PLAIN, ("mapping", "style", "blocks.0.attention", "sum_upsample", "fusion.1", "blocks.0.to_rgb")),
        ({**PLAIN, "fusion": True}, ("mapping", "style", "blocks.0.attention")),
        ({"blur": False}, ()),
        ({"decompress": "conv"}, ("decompress.layers",)),
        ({"decompress_layers": 2}, ()),
        ({"cross_attention": True}, ()),
        ({"cross_attention": True, "attention": False}, ("blocks.0.attention",)),
        ({"layer": "conv", "style": False}, ("style",)),
        ({"style_pool": 2}, ()),
        ({"num_res_blocks": 0}, ("layers.1.scale",)),
    ],
)
def test_switch(changes, gone):
    """Each switch removes its parameters, and what is left trains as a whole."""
    decoder = build(**changes)
    names = [name for name, _ in decoder.named_parameters()]
    assert not [name for name in names for part in gone if part in name]
    for parameter in decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    images = decoder(torch.randn(2, 4, 8, 8))
    assert [x.shape[-1] for x in images] == ([32, 16, 8] if changes.get("multiscale", True) else [32])
    sum(x.square().mean() for x in images).backward()
    # The last block's features need no successor when nothing sums them, so only unused parameters may lack gradients.
    assert not [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]


def test_blur_switch_changes_images_only():
    """It has no weights: same state dict, other images."""
    with_blur, without = build(), build(blur=False)
    without.load_state_dict(with_blur.state_dict())
    z = torch.randn(1, 4, 8, 8)
    assert not torch.allclose(with_blur(z)[0], without(z)[0], atol=1e-3)


def test_context_of_another_width():
    decoder = build(cross_attention=True, context_width=20)
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 20)
    for parameter in decoder.blocks[0].cross_attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    image = decoder(z, context, mask)[0]
    other = context.clone()
    other[0, 3:] = 9.0  # masked out: cannot matter
    torch.testing.assert_close(decoder(z, other, mask)[0], image)
    other[0, 0] = 9.0
    assert not torch.allclose(decoder(z, other, mask)[0][0], image[0])
    with pytest.raises(ConfigError, match="context_width 20"):
        decoder(z)


def test_latents_of_other_sizes():
    decoder = build()
    assert decoder.latent_multiple == 2
    assert decoder(torch.randn(1, 4, 4, 6))[0].shape == (1, 3, 16, 24)
    with pytest.raises(ConfigError, match="latents of 3 x 3 do not divide by 2"):
        decoder(torch.randn(1, 4, 3, 3))


def test_widths_follow_resolution_and_image_size():
    """channels = min(base / (px * 256 / size), max): the paper's at 256 px, and the same network's at 512."""
    for size in (256, 512):
        with torch.device("meta"):
            decoder = ProgressiveDecoder(ProgressiveConfig(), 32, size // 16, size)
        assert [block.to_rgb.weight.shape[1] for block in decoder.blocks] == [512, 512, 512, 512, 256, 128]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"fusion_blocks": (0, 1)}, "fusion_blocks [0, 1] with the values [16, 12, 8]"),
        ({"fusion_blocks": (1, 2, 0), "blocks": 2}, "the blocks are 0 to 1"),
        ({"fusion_blocks": (1,), "fusion_widths": (8,)}, "block 0 has no input but z"),
        ({"kernels": (4,)}, "odd numbers"),
        ({"heads": 0}, "greater than or equal to 1"),
        ({"attention_depth": 1}, "Extra inputs"),
    ],
)
def test_configs_that_contradict_themselves(changes, line):
    with pytest.raises(ValidationError) as error:
        ProgressiveConfig(**{**SMALL, **changes})
    assert line in str(error.value)


def test_sizes_that_do_not_fit():
    with pytest.raises(ConfigError, match="images of 36 px cannot be halved 3 times"):
        build(size=36, side=9)
    with pytest.raises(ConfigError, match=r"block 0 takes the latent at 6 px.*multiple or divisor of its 8"):
        build(size=48, side=8)


def test_registered_with_the_papers_defaults():
    assert DECODERS.get("progressive") is ProgressiveDecoder
    with torch.device("meta"):
        decoder = ProgressiveDecoder(ProgressiveConfig(), 32, 16, 256)
    assert sum(p.numel() for p in decoder.parameters()) == 128_144_914


def test_group_norm_trains_on_a_frozen_input():
    """Channels last and no gradient to the input: torch 2.11's own backward ends the process on the CPU."""
    norm, x = group_norm(16), torch.randn(2, 16, 8, 8)
    grads = [torch.autograd.grad(norm(y).square().sum(), [norm.weight, norm.bias])
             for y in (x, x.to(memory_format=torch.channels_last))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
