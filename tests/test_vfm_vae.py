"""VFM-VAE against the stored outputs of the release, its parameter counts, and the ways a config can fail to fit."""

from __future__ import annotations

import json
import math
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab.decoders.progressive import ProgressiveConfig
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.attention_projection import head_count, projection
from vfmlab.registry import DECODERS, TOKENIZERS
from vfmlab.tokenizers.vfm_vae import VFMVAE, LayerShape
from vfmlab.weights import import_state_dict
from vfmlab.weights.families import vfm_vae

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}

POCKET = ProgressiveConfig(
    decompress_factor=4, gelu="erf", blocks=2, channel_base=8192, channel_max=32, num_res_blocks=1, res_layers=(1,),
    kernels=(5,), expansion=2, fusion_blocks=(0, 1), fusion_widths=(32, 16), style_width=32, attention_blocks=(0,),
    attention_depths=(1,), heads=4,
)  # fmt: skip


class FakeVFM(torch.nn.Module):
    """Three layers with grids and widths of their own, computed from the image so that the encoder sees content."""

    shapes = MappingProxyType({0: (8, 16), 2: (24, 8), -1: (24, 8)})
    layers = (0, 2, -1)

    def width(self, layer):
        return self.shapes[layer][0]

    def grid(self, layer):
        return (self.shapes[layer][1],) * 2

    def features(self, images, layers):
        maps = {}
        for layer in layers:
            width, side = self.shapes[layer]
            pooled = F.adaptive_avg_pool2d(images, side * images.shape[-1] // 32)
            maps[layer] = torch.cat([pooled.roll(k, 1) for k in range(math.ceil(width / 3))], 1)[:, :width]
        return type("Features", (), {"maps": maps})


def count(module):
    return sum(p.numel() for p in module.parameters())


def pocket(**changes) -> VFMVAE:
    fields = {"channels": 8, "factor": 4, "widths": (16,), "decoder": POCKET, **changes}
    torch.manual_seed(0)
    return VFMVAE(VFMVAE.Config(**fields), 32, FakeVFM())


@pytest.fixture(scope="module")
def small(golden):
    """Imported weights, stored inputs and outputs, the release's config."""
    config = json.loads((golden / "vfmvae_small_config.json").read_text())
    weights = load_file(golden / "vfmvae_small_weights.safetensors")
    io = load_file(golden / "vfmvae_small_io.safetensors")
    return import_state_dict("vfm-vae", weights, config["config"]), io, config, weights


def features(io):
    return [io[f"in.features.{i}"] for i in range(3)]


def test_moments_and_sample(small):
    tokenizer, io, *_ = small
    with torch.no_grad():
        q = tokenizer.encode_features(features(io))
    torch.testing.assert_close(torch.cat([q.mean, q.logvar], 1), io["out.moments"], **TOLERANCE)
    torch.testing.assert_close(q.sample(noise=io["out.eps"]), io["out.z_sample"], **TOLERANCE)
    torch.testing.assert_close(q.kl(), io["out.kl_per_sample"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("latent", "image"),
    [("out.mean", "out.img"), ("out.z_sample", "out.forward.img")]
    + [(f"out.eq.z_{how}", f"out.eq.img_{how}") for how in ("rot90", "half_rot90")],
)
def test_decoded_image(small, latent, image):
    """`half`: a latent of half the side gives an image of half the side, as the equivariance path needs."""
    tokenizer, io, *_ = small
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode_raw(io[latent])[0], io[image], **TOLERANCE)


def test_multiscale_images_come_largest_first(small):
    tokenizer, io, config, _ = small
    with torch.no_grad():
        images = tokenizer.decode_raw(io["out.mean"])
    assert [list(x.shape) for x in images[1:]] == config["multiscale_shapes"]
    for k, image in enumerate(images[1:]):
        torch.testing.assert_close(image, io[f"out.multiscale.{k}"], **TOLERANCE)


def test_parts_of_the_decoder(small):
    tokenizer, io, *_ = small
    decoder = tokenizer.decoder
    with torch.no_grad():
        wide = decoder.decompress(io["out.mean"])
        torch.testing.assert_close(wide, io["out.z_decompressed"], **TOLERANCE)
        w = decoder.mapping(wide)
        torch.testing.assert_close(w, io["out.ws"], **TOLERANCE)
        x = total = None
        for k, block in enumerate(decoder.blocks):
            parts = [] if x is None else [x]
            if str(k) in decoder.fusion:
                parts.append(decoder.fusion[str(k)](wide))
                torch.testing.assert_close(parts[-1], io[f"out.tap.z_conv.{k}"], **TOLERANCE)
            x, total, image = block(torch.cat(parts, 1), total, w, None, None)
            torch.testing.assert_close(x, io[f"out.tap.block.{k}.x"], **TOLERANCE)
            torch.testing.assert_close(image, io[f"out.tap.block.{k}.img"], **TOLERANCE)


def test_gradients(small):
    """Gradients of the images' and KL terms, where the VF loss (which has a projection of its own) does not reach."""
    tokenizer, io, config, _ = small
    tokenizer.zero_grad()
    q = tokenizer.encode_features(features(io))
    images = tokenizer.decode_raw(q.sample(noise=io["out.eps"]))
    assert config["train_loss_definition"].startswith("mean(img^2)+sum_i mean(ms_i^2)")
    sum(x.square().mean() for x in images).backward()
    decoder = tokenizer.decoder
    ours = {
        "mapping.mlp.fc0.weight": decoder.mapping.layers[0].weight,
        "synthesis.blocks.0.convs1.0.pwconv1.weight": decoder.blocks[0].layers[1].expand_weight,
        "synthesis.blocks.1.self_attns.0.attn.null_kv": decoder.blocks[1].attention[0].attention.null,
        "synthesis.blocks.2.last_upsample_conv.pointwise.weight": decoder.blocks[2].sum_upsample.pointwise.weight,
        "synthesis.blocks.4.torgb.weight": decoder.blocks[4].to_rgb.weight,
        "synthesis.z_convs.0.1.0.weight": decoder.fusion["0"].depthwise.weight,
    }
    for name, parameter in ours.items():
        reference = io[f"out.train.grad.{name}"]
        error = (parameter.grad - reference).abs().max() / reference.abs().max()
        assert error < 1e-3, f"{name}: {error:.2e} of the largest"
    tokenizer.zero_grad(set_to_none=True)


def test_parameter_counts_of_the_paper(golden):
    counts = json.loads((golden / "vfmvae_full_param_counts.json").read_text())
    layers = dict.fromkeys((0, 12, -1), LayerShape(1024, 32))
    for legacy, key in ((False, "legacy_false"), (True, "legacy_true")):
        config = VFMVAE.Config(alignment_width=1024, decoder=ProgressiveConfig(legacy_noise=legacy))
        with torch.device("meta"):
            tokenizer = VFMVAE(config, 256, shapes=layers)
        reference = counts[key]
        decoder = tokenizer.decoder  # the release counts its decompressing projection as the adapter's
        parts = {"mapping": count(decoder.mapping), "synthesis": count(decoder.fusion) + count(decoder.blocks)}
        assert parts == {name: reference[name] for name in parts}
        assert count(tokenizer) - sum(parts.values()) == reference["ldm_adapter"]
        assert count(tokenizer) == reference["total"] == 139_770_642 + 38 * legacy
        blocks = [sum(p.numel() for p in block.parameters()) for block in tokenizer.decoder.blocks]
        assert blocks == list(reference["synthesis.blocks"].values())
    assert list(tokenizer.latent_shape) == counts["latent_shape"][1:]


def test_every_key_of_the_full_release_has_one_place(golden):
    """All 783 names and shapes of the 256 px release, without its weights."""
    release = json.loads((golden / "vfmvae_full_param_counts.json").read_text())["legacy_true"]["state_dict"]
    config = VFMVAE.Config(alignment_width=1024, decoder=ProgressiveConfig(legacy_noise=True))
    with torch.device("meta"):
        tokenizer = VFMVAE(config, 256, shapes=dict.fromkeys((0, 12, -1), LayerShape(1024, 32)))
    state = {key: torch.empty(shape, device="meta") for key, shape in release.items()}
    fusion = vfm_vae._fusion_places(state, tokenizer.decoder)
    found = {vfm_vae._renamed(key, fusion): key for key in state if not vfm_vae.IGNORED.fullmatch(key)}
    own = {key: value for key, value in tokenizer.state_dict().items() if not key.startswith("stat_")}
    assert set(found) == set(own)
    for key, value in own.items():
        assert [n for n in value.shape if n != 1] == [n for n in release[found[key]] if n != 1], key


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapter(golden, which):
    """The stored adapter: its state dict in the release's names, and a tokenizer around it (decoder of no interest)."""
    io = load_file(golden / "vfmvae_components.safetensors")
    head = f"adapter.{which}.sd."
    state = {"ldm_adapter." + key.removeprefix(head): value for key, value in io.items() if key.startswith(head)}
    return io, state


@pytest.mark.parametrize(
    ("which", "fields"),
    [
        ("conv_cont", {"projection": "conv", "channels": 8}),
        ("attn2_cont", {"projection_layers": 2, "channels": 8}),
        ("attn_disc", {"projection_layers": 2, "channels": 32, "discrete": True, "codebooks": 4, "vocabulary": 256}),
    ],
)
def test_adapters(golden, which, fields):
    io, state = adapter(golden, which)
    decoder = ProgressiveConfig(
        decompress=fields.get("projection", "attention"), decompress_layers=fields.get("projection_layers", 1),
        decompress_factor=4, blocks=1, channel_base=512, num_res_blocks=0, fusion_blocks=(0,), fusion_widths=(8,),
        style_width=8, attention_blocks=(), attention_depths=(),
    )  # fmt: skip
    config = VFMVAE.Config(widths=(8,), factor=4, alignment_width=32, decoder=decoder, **fields)
    tokenizer = VFMVAE(config, 16, shapes={0: LayerShape(32, 8), -1: LayerShape(32, 8)}).eval()
    renamed = {vfm_vae._renamed(key, {}): value for key, value in state.items() if not vfm_vae.IGNORED.fullmatch(key)}
    result = tokenizer.load_state_dict(renamed, strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith(("stat_", "decoder.m", "decoder.f", "decoder.b")) or key.endswith(".batches")
               for key in result.missing_keys)  # fmt: skip
    with torch.no_grad():
        q = tokenizer.encode_features([io["adapter.in.0"], io["adapter.in.1"]])
        if tokenizer.quantizer is None:
            pre = torch.cat([q.mean, q.logvar], 1)
            torch.testing.assert_close(pre, io[f"adapter.{which}.pre"], **TOLERANCE)
            z = q.mean
        else:
            z = io[f"adapter.{which}.z"]
            torch.testing.assert_close(q.mean, z, **TOLERANCE)
            torch.testing.assert_close(q.codes.loss, io[f"adapter.{which}.vq_loss"], rtol=1e-5, atol=0)
            torch.testing.assert_close(q.codes.entropy, io[f"adapter.{which}.entropy_loss"], rtol=1e-5, atol=0)
            torch.testing.assert_close(q.codes.usage, io[f"adapter.{which}.usage"], rtol=1e-5, atol=0)
        decoded = tokenizer.decoder.decompress(z)
    # The decoder of the stored run may have been given a sample; its input is then not stored, and the mean must do.
    torch.testing.assert_close(decoded, io[f"adapter.{which}.decoded"], **TOLERANCE)


@pytest.mark.parametrize(("wide", "narrow", "heads"), [(1024, 64, 16), (96, 96, 1), (100, 30, 2), (7, 2, 1)])
def test_head_count_divides(wide, narrow, heads):
    assert head_count(wide, narrow) == heads
    assert wide % heads == 0


@pytest.mark.parametrize("inputs", [12, 30, 32, 64])
@pytest.mark.parametrize("outputs", [12, 30, 32, 64])
@pytest.mark.parametrize("how", ["attention", "conv"])
def test_projection_of_any_widths(how, inputs, outputs):
    net = projection(how, inputs, outputs, layers=2, kind="erf")
    assert net(torch.randn(2, inputs, 3, 4)).shape == (2, outputs, 3, 4)


# -- the tokenizer in a run -------------------------------------------------------------------------------------------


def test_layers_of_different_grids_and_widths():
    tokenizer = pocket()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    q = tokenizer.posterior(x)
    assert tokenizer.layers == (0, 2, -1)
    assert tokenizer.ratios == {0: 2, 2: 1, -1: 1}
    assert q.mean.shape == q.logvar.shape == (2, 8, 8, 8)
    images = tokenizer.decode_raw(q.mode())
    assert [x.shape[-1] for x in images] == [32, 16]
    given = tokenizer.posterior(torch.zeros_like(x), FakeVFM().features(x, tokenizer.layers).maps)
    torch.testing.assert_close(given.mean, q.mean)


def test_other_image_sizes():
    """Smaller images, as the prior path of the equivariance regularisation makes them."""
    tokenizer = pocket()
    q = tokenizer.posterior(torch.rand(2, 3, 16, 16))
    assert q.mean.shape == (2, 8, 4, 4)
    assert tokenizer.decode_raw(q.mean)[0].shape == (2, 3, 16, 16)


def test_every_parameter_takes_part():
    """A gradient reaches every trained parameter once the branches that begin at zero have left it."""
    tokenizer = pocket()
    for p in tokenizer.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    q = tokenizer.posterior(torch.rand(2, 3, 32, 32))
    loss = sum(x.square().mean() for x in tokenizer.decode_raw(q.sample(torch.Generator().manual_seed(0))))
    (loss + q.kl().mean()).backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_bf16_autocast_keeps_the_numbers():
    tokenizer = pocket()
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        q = tokenizer.posterior(x)
        image = tokenizer.decode_raw(q.mean)[0]
        with torch.autocast("cpu", torch.bfloat16):
            half = tokenizer.posterior(x)
            half_image = tokenizer.decode_raw(q.mean)[0]
    assert half.mean.dtype == half.logvar.dtype == half_image.dtype == torch.float32
    assert (half.mean - q.mean).norm() < 0.03 * q.mean.norm()
    assert (half_image - image).norm() < 0.05 * image.norm()


@pytest.mark.parametrize("fields", [{"kl": False}, {"discrete": True, "codebooks": 2, "vocabulary": 32}])
def test_latents_without_variance(fields):
    tokenizer = pocket(**fields)
    q = tokenizer.posterior(torch.rand(2, 3, 32, 32))
    assert q.logvar is None
    assert tokenizer.final_projection.layers[-1].linear.out_features == 8
    assert torch.equal(q.sample(), q.mean)
    torch.autograd.grad(q.mean.square().sum() + q.mean.sum(), tokenizer.last_encoder_layer())


def test_any_decoder():
    other = DECODERS.get("conv").Config(width=8, multipliers=(1, 1, 1), blocks=1, attention=())
    tokenizer = pocket(decoder=other)
    assert [x.shape for x in tokenizer.decode_raw(torch.randn(1, 8, 8, 8))] == [(1, 3, 32, 32)]


def test_linear_start_is_part_of_it():
    tokenizer = pocket(linear_start=True)
    q = tokenizer.posterior(torch.rand(2, 3, 32, 32))
    assert tokenizer.decode_raw(q.mean)[1].shape == (2, 3, 16, 16)
    assert tokenizer.start.read.in_channels == 8 * 4 + 24 + 24


def test_registered():
    assert TOKENIZERS.get("vfm_vae") is VFMVAE


def test_clear_errors():
    with pytest.raises(ConfigError, match=r"layer 0 has a 16 x 16 grid.*latent's 32"):
        pocket(factor=1)
    with pytest.raises(ConfigError, match=r"tokenizer.widths \[8, 8\].*\[0, 2, -1\]"):
        pocket(widths=(8, 8))
    with pytest.raises(ConfigError, match="no 'vfm' section"):
        VFMVAE(VFMVAE.Config(channels=8, factor=4, decoder=POCKET), 32)
    imported = VFMVAE(VFMVAE.Config(channels=8, factor=4, decoder=POCKET), 32, shapes={0: LayerShape(8, 8)})
    with pytest.raises(ConfigError, match="width 8 and grid 16"):
        imported.attach(FakeVFM())
    with pytest.raises(ConfigError, match="7 tokens"):
        imported.encode_features([torch.zeros(1, 7, 8)])
    with pytest.raises(ConfigError, match="codebooks 3"):
        pocket(discrete=True, codebooks=3, vocabulary=300)


# -- importer ---------------------------------------------------------------------------------------------------------


def broken(small, change):
    """The error line of an import whose weights and config `change(weights, config)` has spoilt."""
    weights, config = dict(small[3]), dict(small[2]["config"])
    change(weights, config)
    with pytest.raises((CheckpointError, ConfigError)) as error:
        import_state_dict("vfm-vae", weights, config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_importer_is_strict(small):
    key = "synthesis.blocks.1.conv0.dwconv.weight"
    assert "decoder.blocks.1.layers.0.depthwise.weight" in broken(small, lambda w, c: w.pop(key))
    assert "synthesis.extra" in broken(small, lambda w, c: w.update({"synthesis.extra": torch.zeros(1)}))
    smaller = broken(small, lambda w, c: w.update({key: w[key][..., 1:4, 1:4]}))
    assert "[64, 1, 3, 3] instead of [64, 1, 5, 5]" in smaller
    assert "num_blocks" in broken(small, lambda w, c: c.pop("num_blocks"))
    assert "conditional = True" in broken(small, lambda w, c: c.update(conditional=True))
    assert "patch_out_dimensions" in broken(small, lambda w, c: c.update(patch_out_dimensions=[16, 16, 24]))
    assert "attention_blocks [0, 9]" in broken(small, lambda w, c: c.update(attn_block_indices=[0, 9]))
    assert "z_dimension" in broken(small, lambda w, c: (c.update(G_kwargs=dict(c)), c["G_kwargs"].pop("z_dimension")))
    blur = "synthesis.blocks.4.last_upsample_conv.blur_weight"
    assert blur in broken(small, lambda w, c: w.update({blur: w[blur] * 2}))


def test_imported_tokenizer_with_only_the_final_image(small):
    _, io, config, weights = small
    other = import_state_dict("vfm-vae", weights, {**config["config"], "use_multiscale_output": False})
    with torch.no_grad():
        images = other.decode_raw(io["out.mean"])
    assert len(images) == 1
    torch.testing.assert_close(images[0], io["out.img"], **TOLERANCE)


def test_imported_tokenizer_with_its_vfm(small):
    """`attach`, then images go all the way."""

    _, io, config, weights = small

    class Stub(torch.nn.Module):
        def width(self, layer):
            return 192

        def grid(self, layer):
            return 8, 8

        def features(self, images, layers):
            maps = {k: io[f"in.features.{i}"].transpose(1, 2).unflatten(2, (8, 8)) for i, k in enumerate((0, 6, -1))}
            return type("Features", (), {"maps": maps})

    other = import_state_dict("vfm-vae", weights, config["config"])
    with pytest.raises(ConfigError, match="no 'vfm' section"):
        other.posterior(torch.zeros(2, 3, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(other.attach(Stub()).posterior(torch.zeros(2, 3, 64, 64)).mean, io["out.mean"])
