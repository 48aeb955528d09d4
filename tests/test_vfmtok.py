"""VFMTok and VQRAE: codes on a vision foundation model, ablations as options, what does not fit."""

from __future__ import annotations

import pytest
import torch

from vfmlab import api, presets, runs
from vfmlab.api import load_tokenizer
from vfmlab.config import override
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.regions import RegionDecoder, causal
from vfmlab.registry import TOKENIZERS
from vfmlab.training import plan
from vfmlab.training.loop import fit
from vfmlab.training.tokenizer import TokenizerTask
from vfmlab.weights import io

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
RANDOM = {"tokenizer.encoder": "random"}


def build(name="tiny_vfmtok", **changes):
    torch.manual_seed(0)
    return api.build_tokenizer(override(presets.get(name), changes).phases()[0]).eval()


@pytest.fixture(scope="module")
def vfmtok():
    return build()


@pytest.fixture(scope="module")
def vqrae():
    return build("tiny_vqrae")


@pytest.mark.parametrize("which", ["vfmtok", "vqrae"])
@torch.no_grad()
def test_images_from_codes_are_those_of_the_forward_pass(which, request):
    tokenizer = request.getfixturevalue(which)
    codes = tokenizer.codes(IMAGES)
    assert codes.shape == (2, 16)
    assert tokenizer.latent_shape == (16,)
    assert tokenizer.code_grid == (4, 4)
    whole = tokenizer.decode_raw(tokenizer.posterior(IMAGES).mode())[0].clamp(-1, 1)
    assert torch.equal(tokenizer.decode_codes(codes), whole)
    assert torch.equal(tokenizer.codes(IMAGES[1:]), codes[1:])


@torch.no_grad()
def test_features_in_place_of_images(vfmtok):
    """Levels of unequal grids; the last of them is what the feature branch rebuilds."""
    maps = vfmtok.vfm.features(IMAGES, vfmtok.layers).maps
    record = vfmtok.encode_features([m.flatten(2).transpose(1, 2) for m in maps.values()])
    assert torch.equal(record.indices, vfmtok.codes(IMAGES))
    assert record.latents.shape == (2, 16, 4)
    rebuilt = vfmtok.rebuild(record.mode())
    assert {k: m.shape for k, m in rebuilt.items()} == {-1: maps[-1].shape}
    with pytest.raises(ConfigError, match=r"2 tensors for the layers \[0, 2, -1\]"):
        vfmtok.encode_features([torch.zeros(1, 16, 4)] * 2)
    with pytest.raises(ConfigError, match="15 tokens, no square grid"):
        vfmtok.encode_features([torch.zeros(1, 15, 4)] * 3)
    tokens = [m.flatten(2).transpose(1, 2) for m in maps.values()]
    for wrong, words in (
        ([t[:, :4] for t in tokens], "layer 0 has width 32 and grid 2, the tokenizer was made for width 32 and grid 8"),
        ([t[..., :-1] for t in tokens], "layer 0 has width 31"),
        ([tokens[0], *(t[:1] for t in tokens[1:])], "as many images as the first, 2"),
        (list(maps.values()), "give B N D"),
        (maps, "not a dict"),
    ):
        with pytest.raises(ConfigError, match=words):
            vfmtok.encode_features(wrong)


@torch.no_grad()
def test_the_encoder_reads_some_levels_and_the_last_is_rebuilt():
    one = build(**{"vfm.layers": [0, -1], "tokenizer.levels": [0]})
    maps = one.vfm.features(IMAGES, one.layers).maps
    codes = one.codes(IMAGES)
    assert torch.equal(one.posterior(IMAGES, {0: maps[0]}).indices, codes)
    assert torch.equal(one.encode_features([maps[0].flatten(2).mT, torch.zeros_like(maps[-1]).flatten(2).mT]).indices, codes)
    assert {k: m.shape for k, m in one.rebuild(one.posterior(IMAGES).mode()).items()} == {-1: maps[-1].shape}
    with pytest.raises(ConfigError, match=r"tokenizer.levels \[1\] must be of vfm.layers \[0, 2, -1\]"):
        build(**{"tokenizer.levels": [1]})


@torch.no_grad()
def test_region_tokens_see_those_before_them(vfmtok):
    """A change of the last query changes the last token alone."""
    encoder = vfmtok.encoder
    maps = list(vfmtok.vfm.features(IMAGES, vfmtok.layers).maps.values())
    before = encoder(maps)
    old = encoder.queries.data[:, -1].clone()
    encoder.queries.data[:, -1] += torch.randn(16)
    after = encoder(maps)
    encoder.queries.data[:, -1] = old
    assert torch.equal(after[:, :-1], before[:, :-1])
    assert not torch.equal(after[:, -1], before[:, -1])
    assert causal(3, torch.device("cpu")).tolist() == [[True, False, False], [True, True, False], [True] * 3]


@pytest.mark.parametrize("first", [True, False])
def test_registers_matter_only_in_front(first):
    torch.manual_seed(0)
    decoder = RegionDecoder(4, 16, 2, 2, 24, 3, 2, 8, registers=2, registers_first=first)
    decoder.pixels(torch.randn(1, 4, 16)).square().sum().backward()
    assert (decoder.registers.grad.abs().max() > 0) == first


@pytest.mark.parametrize("changes", [
    {"tokenizer.attends": "cross"}, {"tokenizer.shared": False}, {"tokenizer.masks": True}, {"tokenizer.registers": 0},
    {"tokenizer.tokens": 9}, {"vfm.layers": [-1]}, {"vfm.layers": [1, -1], "tokenizer.levels": [1]}, {"vfm.weights": "random"},
    {"tokenizer.registers_first": False}, {"tokenizer.encoder": "random"},
])  # fmt: skip
def test_ablations_train(changes):
    tokenizer = build(**changes).train()
    posterior = tokenizer.posterior(IMAGES)
    tokens = changes.get("tokenizer.tokens", 16)
    assert posterior.indices.shape == (2, tokens)
    rebuilt = tokenizer.rebuild(posterior.mean)[-1]
    loss = tokenizer.decode_raw(posterior.mean)[0].square().mean() + posterior.codes.loss + rebuilt.square().mean()
    loss.backward()
    still = {name for name, p in tokenizer.named_parameters() if p.grad is None}
    assert not still
    assert tokenizer.last_encoder_layer().grad.abs().sum() > 0


@torch.no_grad()
def test_a_random_encoder_reads_other_features_and_rebuilds_the_vfms_last(vfmtok):
    one = build(**RANDOM)
    random, vfm = one.frozen["random"], one.vfm
    assert vfm.fingerprint == vfmtok.vfm.fingerprint
    assert random.fingerprint == build(**{"vfm.weights": "random"}).vfm.fingerprint
    own, theirs = (model.features(IMAGES, one.levels).maps for model in (random, vfm))
    assert one.levels == (0, 2, -1)
    for level in one.levels:
        assert own[level].shape == theirs[level].shape
        assert not torch.allclose(own[level], theirs[level], atol=0.1)
    codes = one.codes(IMAGES)
    assert torch.equal(one.encode_features([m.flatten(2).mT for m in own.values()]).indices, codes)
    assert torch.equal(one.posterior(IMAGES, theirs).indices, codes), "the VFM's maps are the loss's, not the encoder's"
    assert one.layers == (-1,), "what is asked of the VFM, and cached"
    assert list(one.rebuild(one.posterior(IMAGES).mode())) == [-1]
    assert not [name for name, _ in one.named_parameters() if name.startswith("frozen")]


@pytest.mark.parametrize("cache", [None, 1.0])
def test_a_random_encoder_trains_towards_the_true_vfm(tmp_path, cache, monkeypatch):
    """With the stored features of the VFM too: only the random one is asked at the steps."""
    more = {"data.train": 16, "data.val": 16, "protocol.n": 16, "train.samples": 16, "train.vfm_cache": cache, **RANDOM}
    run = override(presets.get("tiny_vfmtok"), more).phases()[0]
    task = TokenizerTask(run)
    targets = []
    value = task.objective.losses["feature_reconstruction"].value
    monkeypatch.setattr(task.objective.losses["feature_reconstruction"], "value",
                        lambda r: targets.append((r.target, r.features)) or value(r))
    events = list(fit(task, runs.create(run, tmp_path), device="cpu"))
    assert [event for event in events if event.kind == "step"]
    images, features = targets[0]
    true, random = (task.weights.frozen[name].features(images, (-1,)).maps[-1] for name in ("vfm", "random"))
    torch.testing.assert_close(features[-1], true, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(features[-1], random, atol=0.1)
    one, other = (load_tokenizer(tmp_path / run.id) for _ in range(2))
    assert one.frozen["random"].fingerprint == other.frozen["random"].fingerprint == task.weights.frozen["random"].fingerprint
    assert torch.equal(one.codes(IMAGES), other.codes(IMAGES))


def test_weights_of_another_random_encoder_are_refused():
    one = build(**RANDOM)
    other = dict(one.state_dict(), encoder_fingerprint=one.encoder_fingerprint + 1)
    for load in (one.load_state_dict, lambda tensors: io.load(one, tensors, "weights")):
        with pytest.raises(CheckpointError, match="another random encoder"):
            load(other)


def test_a_plan_counts_a_random_encoder_among_the_frozen():
    """And its FLOPs: the VFM is asked for the target, the other is a part of encoding."""
    one, other = (plan.plan(presets.get("tiny_vfmtok", more))["phases"][0] for more in ({}, RANDOM))
    assert other["vfm_parameters"] == 2 * one["vfm_parameters"]
    assert other["flops"]["vfm"] == one["flops"]["vfm"] > 0
    assert other["flops"]["encode"] == one["flops"]["encode"] + one["flops"]["vfm"]
    assert other["trained"] == one["trained"]


def test_a_variant_names_the_random_encoder_where_there_is_one():
    run = presets.get("tiny_vfmtok+encoder_random")
    assert (run.tokenizer.encoder, run.vfm.weights) == ("random", "pretrained")
    with pytest.raises(ConfigError, match="encoder of region tokens, which this run does not have"):
        presets.get("tiny_vqgan+encoder_random")


def test_what_does_not_fit(vfmtok):
    with pytest.raises(ConfigError, match="tokens 15: queries lie on a square grid; use 16"):
        build(**{"tokenizer.tokens": 15})
    for more in ({}, RANDOM):
        with pytest.raises(ConfigError, match="no 'vfm' section"):
            build(vfm=None, **more)
    with pytest.raises(ConfigError, match=r"equivariance\.p_latent=0"):
        vfmtok.decode_raw(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ConfigError, match=r"reads images of 16 x 16 px, not of 16 x 32; .* equivariance\.p_prior=0"):
        vfmtok.posterior(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ConfigError, match="grid"):
        build("tiny_vqrae", **{"tokenizer.factor": 8})


def test_vqrae_stages():
    """The encoder is frozen, then tuned and held by its own features before the adapter."""
    first, second = presets.get("tiny_vqrae").phases()
    assert not any(glob in ("*", "encoder.*") for glob in first.trains)
    assert second.trains == ("*",)
    assert second.losses["preservation"].anchor == "before"
    assert "preservation" not in first.losses


def test_paper_sizes():
    """73,286,831 parameters of VFMTok without its VFM, as counted on the release; VQRAE has SimVQ of 16384 x 1536."""
    cfg = TOKENIZERS.get("vfmtok")
    from vfmlab.tokenizers.vfm_vae import LayerShape

    run = presets.get("paper_vfmtok")
    with torch.device("meta"):
        shapes = dict.fromkeys(run.vfm.layers, LayerShape(1024, 24))
        tokenizer = cfg(run.tokenizer, run.data.size, shapes=shapes)
    assert sum(p.numel() for p in tokenizer.parameters()) == 73_286_831
    assert tokenizer.latent_shape == (256,)
    options = presets.get("paper_vqrae").tokenizer
    assert (options.channels, options.quantizer.kind, options.quantizer.size) == (1536, "simvq", 16_384)


@pytest.mark.parametrize("name", ["tiny_vfmtok", "tiny_vqrae", "tiny_vqgan"])
def test_a_plan_counts_the_real_parts(name):
    found = plan.plan(presets.get(name))["phases"][0]
    assert found["latent_shape"] == [16]
    assert sum(found["parameters"].values()) == sum(p.numel() for p in build(name).parameters())
    assert found["flops"]["encode"] > 0


def test_region_tokens_need_not_be_the_decoders_grid():
    """Nine tokens, sixteen places of the decoder: the image is compared with the whole original all the same."""
    assert plan.plan(presets.get("tiny_vfmtok", {"tokenizer.tokens": 9}))["phases"][0]["latent_shape"] == [9]
