"""The convolutional VAE: reference values, any factor and width, any decoder, clear errors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from vfmlab import config
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn import conv_blocks
from vfmlab.nn.conv_blocks import levels
from vfmlab.registry import TOKENIZERS
from vfmlab.weights import import_state_dict, io

NARROW = {"width": 8, "blocks": 1, "attention": ()}


def make(method="plain_vae", size=32, **fields):
    fields = {"method": method, "channels": 4, "decoder": {"kind": "conv", **NARROW}, **NARROW, **fields}
    part = TOKENIZERS.get(method)
    return part(part.Config.model_validate(fields), size)


@pytest.fixture(scope="module")
def release(golden):
    tensors = load_file(golden / "ldm_vae_small.safetensors")
    options = json.loads((golden / "ldm_vae_small_config.json").read_text())
    return {key[3:]: value for key, value in tensors.items() if key.startswith("sd.")}, options, tensors


def test_matches_the_release(release):
    state, options, io = release
    tokenizer = import_state_dict("va-vae", state, options)
    assert not tokenizer.training
    with torch.no_grad():
        q = tokenizer.posterior(io["io.x"])
        images = tokenizer.decode_raw(io["io.mean"])
    torch.testing.assert_close(q.mean, io["io.mean"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(q.logvar, io["io.logvar"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(images[0], io["io.image"], rtol=2e-5, atol=2e-5)
    assert len(images) == 1


def test_importer_reads_the_nested_config_and_ignores_what_only_training_had(release):
    state, options, io = release
    usual = {**options, "z_channels": 8, "double_z": True, "out_ch": 3}
    nested = {"embed_dim": options["embed_dim"], "ddconfig": usual}
    tokenizer = import_state_dict("va-vae", {**state, "loss.logvar": torch.zeros(())}, nested)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.posterior(io["io.x"]).mean, io["io.mean"], rtol=2e-5, atol=2e-5)


def test_importer_names_what_does_not_fit(release):
    state, options, _ = release
    broken = {**state, "encoder.extra": torch.zeros(1), "quant_conv.bias": torch.zeros(3)}
    del broken["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError) as error:
        import_state_dict("va-vae", broken, options)
    message = str(error.value)
    assert "\n" not in message
    assert "1 missing: decoder.net.conv_in.bias" in message
    assert "1 unexpected: encoder.extra" in message
    assert "quant.bias [3] instead of [16]" in message
    with pytest.raises(ConfigError, match="ch_mult"):
        import_state_dict("va-vae", state, {key: value for key, value in options.items() if key != "ch_mult"})
    with pytest.raises(ConfigError, match="in_channels"):
        import_state_dict("va-vae", state, {**options, "in_channels": 1})
    with pytest.raises(CheckpointError, match="none of its tensors is there"):
        import_state_dict("va-vae", {"loss.x": torch.zeros(1)}, options)


def test_strict_load_refuses_values_that_are_not_finite_and_changes_nothing():
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    with pytest.raises(CheckpointError, match="1 not finite: bias"):
        io.load(layer, {"weight": torch.zeros(2, 2), "bias": torch.tensor([1.0, float("nan")])}, "test weights")
    assert torch.equal(layer.weight, before)


SIZES = [(32, 1), (32, 2), (32, 4), (32, 8), (32, 16), (64, 64), (28, 14), (24, 3), (30, 6)]


@pytest.mark.parametrize(("size", "factor"), SIZES)
def test_any_factor(size, factor):
    tokenizer = make(size=size, factor=factor)
    x = torch.randn(2, 3, size, size)
    q = tokenizer.posterior(x)
    assert q.mean.shape == q.logvar.shape == (2, *tokenizer.latent_shape) == (2, 4, size // factor, size // factor)
    assert tokenizer.decode_raw(q.sample())[0].shape == x.shape


@pytest.mark.parametrize("patch", [2, 4])
def test_patch_keeps_the_shapes(patch):
    fields = {**NARROW, "patch": patch}
    tokenizer = make(factor=4, patch=patch, decoder={"kind": "conv", **fields})
    x = torch.randn(1, 3, 32, 32)
    assert tokenizer.posterior(x).mean.shape == (1, 4, 8, 8)
    assert tokenizer.decode_raw(torch.randn(1, 4, 8, 8))[0].shape == x.shape


def test_other_image_sizes_pass_through():
    tokenizer = make(factor=4, attention=(16,))
    assert tokenizer.posterior(torch.randn(1, 3, 24, 24)).mean.shape == (1, 4, 6, 6)
    assert tokenizer.decode_raw(torch.randn(1, 4, 3, 3))[0].shape == (1, 3, 12, 12)


def test_attention_sits_at_the_named_sides_only():
    tokenizer = make(factor=4, attention=(16,), middle_attention=False)
    kinds = [type(stage.attentions[0]).__name__ for stage in tokenizer.encoder.stages]
    assert kinds == ["Identity", "Attention", "Identity"]
    decoder = make(factor=4, decoder={"kind": "conv", **NARROW, "attention": (8, 32)}).decoder
    assert [type(s.attentions[0]).__name__ for s in decoder.net.stages] == ["Attention", "Identity", "Attention"]


def test_every_parameter_gets_a_gradient():
    tokenizer = make(factor=4, attention=(8,), linear_start=True)
    tokenizer.decode_raw(tokenizer.posterior(torch.randn(2, 3, 32, 32)).sample())[0].square().mean().backward()
    dead = [name for name, p in tokenizer.named_parameters() if p.grad is None]
    assert dead == []


def test_groups_follow_the_width():
    assert [conv_blocks.group_norm(c).num_groups for c in (8, 32, 48, 96, 100, 512)] == [8, 32, 16, 32, 4, 32]


def test_published_size():
    """SD-VAE's autoencoder (f8d4) has 83,653,863 parameters."""
    fields = {"channels": 4, "factor": 8, "attention": (), "decoder": {"kind": "conv", "attention": ()}}
    part = TOKENIZERS.get("plain_vae")
    with torch.device("meta"):
        tokenizer = part(part.Config.model_validate({"method": "plain_vae", **fields}), 256)
    assert sum(p.numel() for p in tokenizer.parameters()) == 83_653_863


def test_unbounded_log_variance_is_clamped():
    tokenizer = make(factor=4)
    torch.nn.init.constant_(tokenizer.quant.bias, 1e4)
    q = tokenizer.posterior(torch.zeros(1, 3, 32, 32))
    assert q.logvar.max().item() == 20.0
    assert torch.isfinite(q.kl()).all()


def test_clear_errors():
    with pytest.raises(ConfigError, match=r"tokenizer.multipliers \[1, 2, 2, 4\] has 4 entries.*has 3 resolutions"):
        make(factor=4, multipliers=(1, 2, 2, 4))
    assert levels(8, (1, 3), 4, "tokenizer") == [8, 24, 24]
    with pytest.raises(ConfigError, match=r"tokenizer.patch 3 does not divide tokenizer.factor 4"):
        make(factor=4, patch=3)
    with pytest.raises(ConfigError, match=r"data.size 30 is not divisible by tokenizer.factor 4"):
        make(size=30, factor=4)
    with pytest.raises(ConfigError, match=r"decoder.patch 3"):
        make(factor=4, decoder={"kind": "conv", **NARROW, "patch": 3})


def test_config_round_trips_through_a_run():
    run = config.parse(
        {
            "name": "x",
            "tokenizer": {"method": "va_vae", "channels": 4, "decoder": {"kind": "conv", "width": 16}},
            "losses": {"l1": 1.0, "kl": 1e-6, "vf": {"weight": 0.1, "cos_margin": 0.5, "distance_margin": 0.25}},
            "train": {"samples": 10},
        }
    )
    again = config.parse(run.model_dump(mode="json"))
    assert again.id == run.id
    assert again.tokenizer.decoder.width == 16
    assert again.losses["vf"].cos_margin == 0.5
    with pytest.raises(ConfigError, match="did you mean"):
        config.override(run, {"tokenizer.decoder.widht": 8})
