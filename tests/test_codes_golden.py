"""Released discrete tokenizers: importers give the stored codes, images, losses and gradients."""

from __future__ import annotations

import json

import pytest
import torch
from golden_values import close, part
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab import config
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.losses import adversarial
from vfmlab.nn.deformable_attention import DeformableAttention
from vfmlab.vfm import build
from vfmlab.weights import import_state_dict


def load(golden, name):
    folder = golden / "discrete"
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


def scalar(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def grads_near(found, io):
    for name, grad in found.items():
        reference = io[f"grad.{name}"]
        assert (grad - reference).abs().max() <= 1e-3 * reference.abs().max(), name


# -- deformable attention ----------------------------------------------------------------------------------------------


def test_deformable_attention(golden):
    io, facts = load(golden, "deformable_attention")
    attention = DeformableAttention(facts["d_model"], facts["heads"], len(facts["levels_hw"]), facts["points"])
    close(attention.offsets.bias.detach(), io["init.sampling_offsets_bias"], 1e-6)
    ours = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value", "output_proj": "out"}
    attention.load_state_dict({f"{ours[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in part(io, "sd.").items()})
    query, values = io["in.query"].requires_grad_(), io["in.values"].requires_grad_()
    sizes = [tuple(size) for size in io["in.spatial_shapes"].tolist()]
    maps = [tokens.transpose(1, 2).unflatten(2, size)
            for tokens, size in zip(values.split([h * w for h, w in sizes], dim=1), sizes, strict=True)]
    close(attention.places(query, io["in.reference_points"], maps).detach(), io["mid.locations"])
    close(attention.shares(query).detach(), io["mid.attention"])
    out = attention(query, io["in.reference_points"], maps)
    close(out.detach(), io["out"])
    (out * io["in.upstream"]).sum().backward()
    found = {f"{theirs}.{which}": getattr(getattr(attention, mine), which).grad for theirs, mine in ours.items()
             for which in ("weight", "bias") if f"grad.{theirs}.{which}" in io}
    grads_near({"query": query.grad, "values": values.grad, **found}, io)


# -- LlamaGen ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamagen(golden):
    io, facts = load(golden, "llamagen_vq")
    return import_state_dict("llamagen-vq", part(io, "sd."), facts), io, facts


def test_llamagen_codes_and_images(llamagen):
    tokenizer, io, facts = llamagen
    assert sum(p.numel() for p in tokenizer.parameters()) == facts["parameters"]
    codes = tokenizer.codes(io["in.image"])
    assert torch.equal(codes, io["out.indices"].flatten(1))
    with torch.no_grad():
        close(tokenizer.encoder(io["in.image"]), io["mid.encoder"])
        close(tokenizer.quant(tokenizer.encoder(io["in.image"])), io["mid.quant_conv"])
        posterior = tokenizer.posterior(io["in.image"])
        close(posterior.mode(), io["out.quant"])
        close(tokenizer.decode_raw(posterior.mode())[0], io["out.image"])
    close(tokenizer.decode_codes(codes), io["out.image_from_indices"].clamp(-1, 1))


def test_llamagen_losses_and_gradients(llamagen):
    tokenizer, io, facts = llamagen
    tokenizer.train().zero_grad()
    posterior = tokenizer.posterior(io["in.image"])
    image = tokenizer.decode_raw(posterior.mean)[0]
    mse, codes = F.mse_loss(image, io["in.image"]), posterior.codes
    scalar(mse, io["loss.mse"])
    scalar(codes.loss, io["loss.vq"] + io["loss.commit"])
    scalar(facts["entropy_loss_ratio"] * codes.entropy, io["loss.entropy"])
    (mse + codes.loss + facts["entropy_loss_ratio"] * codes.entropy).backward()
    d, e = tokenizer.decoder, tokenizer.encoder
    grads_near({
        "decoder.conv_out.weight": d.net.conv_out.weight.grad, "decoder.mid.1.q.weight": d.net.middle.attention.q.weight.grad,
        "encoder.conv_in.weight": e.conv_in.weight.grad, "encoder.conv_out.bias": e.conv_out.bias.grad,
        "post_quant_conv.weight": d.post_quant.weight.grad, "quant_conv.weight": tokenizer.quant.weight.grad,
        "quantize.embedding.weight": tokenizer.quantizer.weight.grad,
    }, io)  # fmt: skip
    tokenizer.eval()


# -- VFMTok ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vfmtok(golden):
    io, facts = load(golden, "vfmtok")
    return import_state_dict("vfmtok", part(io, "sd."), facts), io, facts


def levels(io):
    return [io[f"in.features.{k}"] for k in range(4)]


@torch.no_grad()
def test_vfmtok_chain(vfmtok):
    tokenizer, io, facts = vfmtok
    assert sum(p.numel() for p in tokenizer.parameters()) == facts["parameters"]
    side, encoder = facts["feature_grid"], tokenizer.encoder
    maps = [tokens.transpose(1, 2).unflatten(2, (side, side)) for tokens in levels(io)]
    projected = [project(m) for project, m in zip(encoder.projectors, maps, strict=True)]
    for k, m in enumerate(projected):
        close(m.flatten(2).transpose(1, 2), io[f"mid.level.{k}"])
    x = encoder.norm(encoder.queries).expand(2, -1, -1)
    close(x, io["mid.queries_start"])
    close(encoder.layers[0].attention(x, encoder.position, encoder.reference, projected), io["mid.layer0_deformable"])
    close(encoder.layers[0](x, encoder.position, encoder.reference, projected), io["mid.after_layer0"])
    tokens = encoder(maps)
    close(tokens, io["out.region_tokens"])
    close(tokenizer.quant(tokens), io["mid.pre_quant"])
    record = tokenizer.encode_features(levels(io))
    assert torch.equal(record.indices, io["out.indices"])
    close(record.latents, io["out.quant"])
    decoder, memory = tokenizer.decoder, tokenizer.memory(record.mode())
    close(decoder.positions(facts["pixel_grid"]), io["mid.position_interpolated"])
    close(decoder.sequence(memory, "pixels"), io["mid.decoder_sequence"])
    close(decoder.pixels(memory), io["mid.decoder_grid"])
    image = tokenizer.decode_raw(record.mode())[0]
    close(image, io["out.image"])
    close(tokenizer.decode_codes(record.indices), io["out.image_from_indices"].clamp(-1, 1))
    close(tokenizer.rebuild(record.mode())[-1].flatten(2).transpose(1, 2), io["out.features"])


def test_vfmtok_losses_and_gradients(vfmtok):
    tokenizer, io, facts = vfmtok
    tokenizer.train().zero_grad()
    record = tokenizer.encode_features(levels(io))
    image = tokenizer.decode_raw(record.mean)[0]
    rebuilt = tokenizer.rebuild(record.mean)[-1].flatten(2).transpose(1, 2)
    pixels = 2 * F.mse_loss(image, io["in.image"])
    scalar(pixels, io["loss.pixel_twice_mse"])
    feature = (1 - F.cosine_similarity(rebuilt, io["in.features.3"], dim=-1, eps=1e-6)).mean()
    scalar(feature, io["loss.feature"])
    scalar(record.codes.loss, io["loss.vq"] + io["loss.commit"])
    entropy = facts["entropy_loss_ratio"] * record.codes.entropy
    scalar(entropy, io["loss.entropy"])
    weight = io["stand_in.discriminator_weight"]

    def judge(x):
        return [(x * weight.view(1, 3, 1, 1)).mean(dim=(1, 2, 3))]

    perceptual = 0.3 * (io["in.image"] - image).abs().mean()
    before = pixels + perceptual + record.codes.loss + entropy + feature
    scalar(before, io["loss.generator_before_start"])
    whole = before + 0.5 * adversarial.generator_loss(judge(image), "softplus_hinge")
    scalar(whole, io["loss.generator_after_start"])
    real, fake = adversarial.discriminator_losses(judge(io["in.image"]), judge(image.detach()), "softplus_hinge")
    scalar(0.5 * (real + fake) / 2, io["loss.discriminator_after_start"])
    whole.backward()
    d, e = tokenizer.decoder, tokenizer.encoder
    grads_near({
        "decode_transformer.cls_token": d.class_token.grad, "decode_transformer.mask_dino": d.feature_mask.grad,
        "decode_transformer.mask_embedding": d.pixel_mask.grad, "decode_transformer.norm_post1.weight": d.norm_pixels.weight.grad,
        "decode_transformer.norm_post2.weight": d.norm_features.weight.grad,
        "decode_transformer.position_embedding": d.position.grad, "decode_transformer.proj.weight": d.head.weight.grad,
        "decode_transformer.register_tokens": d.registers.grad,  # zero: they come last and nothing sees them
        "decoder.conv_out.weight": tokenizer.pixels.conv_out.weight.grad,
        "encode_transformer.carrier_tokens": e.queries.grad, "encode_transformer.slots_pos": e.position.grad,
        "encode_transformer.projectors.0.mlp.0.weight": e.projectors[0].mlp[0].weight.grad,
        "encode_transformer.transformer.layers.0.cross_attn.sampling_offsets.weight": e.layers[0].look.offsets.weight.grad,
        "encode_transformer.transformer.layers.1.cross_attn.value_proj.weight": e.layers[1].look.value.weight.grad,
        "post_slots_quant.weight": tokenizer.post_quant.weight.grad, "pre_slots_quant.weight": tokenizer.quant.weight.grad,
        "slot_quantize.embedding.weight": tokenizer.quantizer.weight.grad,
    }, io)  # fmt: skip
    tokenizer.eval()


def test_vfmtok_is_attached_to_a_vfm_that_fits(vfmtok):
    tokenizer, *_ = vfmtok
    pocket = build(config.VFM(name="pocket", layers=(1, 2, 3, -1)), 16)
    with pytest.raises(ConfigError, match="6"):
        tokenizer.attach(pocket)


# -- strict, and of the released sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name", "count"),
    [("llamagen-vq", "llamagen_vq16", 71_883_403), ("vfmtok", "vfmtok_tokenizer", 73_286_831)],
)  # fmt: skip
def test_released_keys_fit(golden, family, name, count):
    keys = json.loads((golden / "discrete" / "released_keys.json").read_text())[name]
    with torch.device("meta"):
        tokenizer = import_state_dict(family, {k: torch.empty(shape) for k, shape in keys.items()}, {})
    assert sum(p.numel() for p in tokenizer.parameters()) == count
    assert tokenizer.latent_shape == (256,)


@pytest.mark.parametrize("which", ["llamagen", "vfmtok"])
def test_strict(which, request, golden):
    _, io, facts = request.getfixturevalue(which)
    family, state = {"llamagen": "llamagen-vq", "vfmtok": "vfmtok"}[which], part(io, "sd.")
    with pytest.raises(CheckpointError, match="1 missing"):
        import_state_dict(family, {k: v for k, v in state.items() if k != "decoder.conv_out.bias"}, facts)
    with pytest.raises(CheckpointError, match="unexpected"):
        import_state_dict(family, {**state, "decoder.extra.weight": torch.zeros(1)}, facts)
    with pytest.raises(ConfigError, match="unknown argument 'codebok_size'"):
        import_state_dict(family, state, {**facts, "codebok_size": 3})
