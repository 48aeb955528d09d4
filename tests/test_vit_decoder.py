"""The ViT decoder and the importer of RAE's: stored outputs, an independent implementation, other sizes, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from vfmlab.decoders.vit import ViTDecoder
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.registry import DECODERS
from vfmlab.tokenizers.rae import RAE, plain_norm
from vfmlab.weights import import_state_dict
from vfmlab.weights.families.rae_decoder import adopt

SMALL = {"width": 32, "depth": 2, "heads": 4, "hidden": 48}


@pytest.fixture(scope="module")
def release(golden):
    """State dict, config, stored inputs and outputs."""
    tensors = load_file(golden / "rae_small.safetensors")
    state = {key.removeprefix("sd.decoder."): value for key, value in tensors.items() if key.startswith("sd.decoder.")}
    return state, json.loads((golden / "rae_small_config.json").read_text())["decoder"], tensors


def make(side=4, size=16, **fields):
    torch.manual_seed(0)
    return DECODERS.get("vit")(ViTDecoder.Config(**SMALL | fields), 12, side, size)


@torch.no_grad()
def test_release(release):
    state, config, io = release
    decoder = import_state_dict("rae-decoder", state, config)
    assert not decoder.training
    tokens = io["io.dec.in"]
    torch.testing.assert_close(decoder(tokens), io["io.dec.image"], atol=2e-5, rtol=2e-5)
    logits = decoder.decoder.logits(tokens.transpose(1, 2).unflatten(2, (4, 4)))
    torch.testing.assert_close(logits, io["io.dec.logits"], atol=2e-5, rtol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False, "hidden_act": "silu"}, {"layer_norm_eps": 1e-2, "patch_size": 2}, {"hidden_act": "relu", "side": 3}]
)
def test_another_implementation_agrees(changes):
    """diffusers' port of the same decoder, under its own key names (its position code differs from the release's below 16 x 16)."""
    module = pytest.importorskip("diffusers.models.autoencoders.autoencoder_rae")
    torch.manual_seed(1)
    side = changes.pop("side", 4)
    config = {
        "hidden_size": 20, "decoder_hidden_size": 48, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3,
        "decoder_intermediate_size": 40, "patch_size": 4, **changes,
    }  # fmt: skip
    config["image_size"] = config["patch_size"] * side
    theirs = module.RAEDecoder(**config, num_patches=side**2).eval()
    torch.nn.init.normal_(theirs.trainable_cls_token)
    for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    state = theirs.state_dict() | {"decoder_pos_embed": theirs.decoder_pos_embed}
    state = {f"decoder.{key}": value for key, value in state.items()} | {"encoder.layernorm.bias": torch.zeros(3)}
    ours = import_state_dict("rae-decoder", state, config)
    for n in (side, side + 1):  # other token grids are resized to the trained one
        tokens = torch.randn(2, n * n, 20)
        torch.testing.assert_close(ours(tokens), theirs.unpatchify(theirs(tokens).logits), atol=2e-5, rtol=2e-5)


def test_importer_names_what_does_not_fit(release):
    state, config, _ = release

    def line(kind=CheckpointError, without=(), **changes):
        kept = {key: value for key, value in state.items() if key not in without}
        with pytest.raises(kind) as error:
            import_state_dict("rae-decoder", kept, config | changes)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "blocks.0.q.weight" in line(without=["decoder_layers.0.attention.attention.key.weight"])
    assert "pred.weight [192, 64] instead of [48, 64]" in line(patch_size=4, image_size=16)
    assert "5 patches a side and the weights have 16 patches" in line(ConfigError, image_size=40)
    assert "did you mean" in line(ConfigError, decoder_hiden_size=3)
    assert "hidden_act = 'mish'" in line(ConfigError, hidden_act="mish")
    assert "heads 5" in line(ConfigError, decoder_num_attention_heads=5)
    assert "wrapper" in line(without=["decoder_embed.weight"])
    unnamed = {key: value for key, value in config.items() if key != "image_size"}
    assert import_state_dict("rae-decoder", state, unnamed | {"mask_ratio": 0.75}).decoder.patch == 8
    without = {key: value for key, value in state.items() if key not in ("decoder_pos_embed", "trainable_cls_token")}
    assert import_state_dict("rae-decoder", without, config).decoder.class_token is None
    with pytest.raises(ConfigError, match="image_size must be given"):
        import_state_dict("rae-decoder", without, unnamed)
    with pytest.raises(ConfigError, match="7 tokens"):
        import_state_dict("rae-decoder", state, config)(torch.zeros(1, 7, 48))


@torch.no_grad()
def test_a_tokenizer_takes_released_weights(release):
    state, config, _ = release
    released = import_state_dict("rae-decoder", state, config)
    vfm = FakeVFM()
    fields = {"width": 64, "depth": 3, "heads": 4, "hidden": 128}
    tokenizer = RAE(RAE.Config(channels=48, factor=8, decoder={"kind": "vit", **fields}), 32, vfm)
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    tokenizer.begin([images])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    adopt(tokenizer, released, mean, std)
    tokens = plain_norm(vfm.features(images, (-2,)).maps[-2]).flatten(2).transpose(1, 2)
    expected = released(tokens) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    decoded = tokenizer.decode_raw(tokenizer.posterior(images).mode())[0]
    torch.testing.assert_close(decoded, 2 * expected - 1, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="kind vit"):
        adopt(RAE(RAE.Config(channels=48, factor=8, linear_start=True, decoder={"kind": "vit", **fields}), 32, vfm), released, mean, std)


class FakeVFM(torch.nn.Module):
    """One layer of width 48 on a grid of 4, which are the images' own patches in another basis."""

    depth, upscale = 2, 1.0

    def width(self, layer):
        return 48

    def grid(self, layer):
        return 4, 4

    def features(self, images, layers):
        patches = torch.nn.functional.pixel_unshuffle(images, 8)
        basis = torch.randn(48, patches.shape[1], generator=torch.Generator().manual_seed(0))
        return type("Features", (), {"maps": {layer: torch.einsum("bchw,dc->bdhw", patches, basis) for layer in layers}})


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_every_parameter_takes_part_and_other_grids_pass():
    decoder = make()
    decoder(torch.randn(2, 12, 4, 4))[0].square().mean().backward()
    assert not [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert decoder.get_parameter(decoder.last) is decoder.pred.weight
    with torch.no_grad():
        assert decoder(torch.randn(1, 12, 2, 2))[0].shape == (1, 3, 8, 8)
        assert make(class_token=False)(torch.randn(1, 12, 4, 4))[0].shape == (1, 3, 16, 16)


def test_patches_lie_where_they_belong():
    """A decoder whose blocks do nothing paints each patch from its own latent."""
    decoder = make(depth=1)
    for layer in (decoder.blocks[0].proj, decoder.blocks[0].contract):
        torch.nn.init.zeros_(layer.weight)
    z = torch.randn(1, 12, 4, 4)
    other = z.clone()
    other[..., 1, 2] += 1
    changed = (decoder(z)[0] != decoder(other)[0]).any(1)[0]
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[4:8, 8:12] = True
    assert torch.equal(changed, expected)


def test_published_size():
    """RAE's ViT-XL on 768 channels, counted from its released configuration: 415,056,640 trained parameters."""
    with torch.device("meta"):
        decoder = ViTDecoder(ViTDecoder.Config(), 768, 16, 256)
    assert sum(p.numel() for p in decoder.parameters()) == 415_056_640


def test_clear_errors():
    with pytest.raises(ConfigError, match="17 px from a 4 px latent"):
        make(size=17)
    with pytest.raises(ValueError, match="width 30 must be a multiple of 4 and of heads 4"):
        ViTDecoder.Config(**SMALL | {"width": 30})
