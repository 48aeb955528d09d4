"""RAEv2's network: reference values, its two read-outs in training and in guidance, auto-guidance, refusals, a tiny run."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from golden_values import close
from safetensors.torch import load_file, save_file
from tiny import awake

from vfmlab import api, presets
from vfmlab.config import Guidance, Sampler, override
from vfmlab.diffusion import path, sampling
from vfmlab.diffusion.dit import LightningDiT
from vfmlab.diffusion.guidance import Guided, Steered, internal
from vfmlab.diffusion.objective import Flow
from vfmlab.diffusion.raev2 import RAEv2
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.standardise import Standardise
from vfmlab.seeding import SampleRandom, StepRandom
from vfmlab.studies import reuse
from vfmlab.tokenizers.rae import RAE
from vfmlab.weights import import_state_dict, statistics, table

SHAPE = (6, 4, 4)
SIZES = {"width": 16, "depth": 3, "heads": 2, "head_width": 32, "head_depth": 1, "head_heads": 2, "time_tokens": 2, "class_tokens": 3}


@pytest.fixture(scope="module")
def stored(golden):
    folder = golden / "continuous"
    return load_file(folder / "raev2_ddt_ig.safetensors"), json.loads((folder / "raev2_ddt_ig.json").read_text())


@pytest.fixture(scope="module")
def released(stored):
    state = {key.removeprefix("sd."): value for key, value in stored[0].items() if key.startswith("sd.")}
    return import_state_dict("raev2-ddt", state, stored[1]["config"])


def make(**options):
    torch.manual_seed(0)
    return RAEv2(RAEv2.Config(**{**SIZES, "base_depth": 2, **options}), SHAPE, 3)


# -- reference values --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_both_read_outs_and_guidance(stored, released):
    g, c = stored
    x, t, y = g["x"], g["t"], g["y"]
    found = released.predict(x, t, y)
    close(found.v, g["full"])
    close(found.base, g["base"])
    divisor = t.clamp_min(c["t_eps"]).view(-1, 1, 1, 1)
    close((x - released(x, t, y) * divisor), g["full"])
    steered = Steered(internal(released), c["ig_scale"], c["ig_interval"])
    close(x - steered(x, t, y) * divisor, g["ig"])
    for i in range(2):  # the first time lies outside the interval, the second label is the null one
        for net, name in ((released, "cfg"), (steered, "ig_cfg")):
            field = Guided(net, y[i : i + 1], Guidance(scale=c["cfg_scale"], interval=c["cfg_interval"]), c["null_label"])
            v = field(x[i : i + 1], t[i].item())
            close(x[i : i + 1] - v * divisor[i], g[name][i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_16_bits(stored, released, dtype):
    """Their rotary tables are rounded as they are; those of another grid are refused still."""
    state = {key.removeprefix("sd."): value.to(dtype) for key, value in stored[0].items() if key.startswith("sd.")}
    half = import_state_dict("raev2-ddt", state, stored[1]["config"])
    assert all(value.dtype == torch.float32 for value in half.state_dict().values())
    with pytest.raises(CheckpointError, match="is not the rotary table of this config"):
        import_state_dict("raev2-ddt", state | {"enc_rope.freqs_cos": state["enc_rope.freqs_cos"] + 0.02}, stored[1]["config"])


@torch.no_grad()
def test_loss(stored, released):
    g, c = stored
    point = path.as_seen(path.interpolate(g["loss.data"], g["loss.noise"], g["t"]), c["t_eps"])
    out = released(point.x, g["t"], g["y"], readouts=True)
    base, full = ((v - point.v).square() for v in (out.base, out.v))
    torch.testing.assert_close(base, g["loss.elementwise_base"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full + base, g["loss.elementwise_total"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(base.mean(), g["loss.mean_base"], rtol=1e-4, atol=0)
    torch.testing.assert_close((full + base).mean(), g["loss.mean_total"], rtol=1e-4, atol=0)


@torch.no_grad()
def test_samples(stored, released):
    g, c = stored
    grid = path.time_grid(c["steps"], c["shift"])
    close(torch.tensor(grid), g["sample.t_grid"], 1e-6)
    for field, name in ((released, "plain"), (Steered(internal(released), c["ig_scale"], c["ig_interval"]), "ig")):
        x = g["x"]
        for t, s in pairwise(grid):
            x = path.LINE.step(x, field(x, torch.full((2,), t), g["y"]), s - t)
        close(x, g[f"sample.{name}"], 5e-5)


@torch.no_grad()
def test_layers(golden):
    g = load_file(golden / "continuous" / "raev2_layers.safetensors")
    layers = [g[f"layer{k}"].transpose(1, 2).unflatten(2, (3, 3)) for k in range(5)]
    for k in (1, 2, 3, 5):
        for name, pooled in (("v2", False), ("v3", True)):
            close(RAE.fuse(layers[-k:], pooled).flatten(2).transpose(1, 2), g[f"{name}.K{k}"], 1e-6)


@torch.no_grad()
def test_an_import_standardises_latents_as_released(golden, tmp_path):
    """(z - mean) / sqrt(var + 1e-5) by place, from a file of mean and variance."""
    g = load_file(golden / "continuous" / "raev2_layers.safetensors")
    save_file({"mean": g["stat.mean"], "var": g["stat.var"]}, tmp_path / "stat.safetensors")
    mean, std = statistics.read(tmp_path / "stat.safetensors", table.get("rae-decoder").statistics.eps)
    layer = Standardise(14, (3, 3))
    layer.load_state_dict({"mean": mean, "std": std})
    close(layer(g["stat.z"]), g["stat.out"], 1e-6)


# -- the network -------------------------------------------------------------------------------------------------------


def test_starts_at_the_clean_latent_zero_and_trains_everywhere():
    network = make()
    x, t, y = torch.randn(2, *SHAPE), torch.tensor([0.3, 0.01]), torch.tensor([0, 3])
    close(network(x, t, y), x / t.clamp_min(0.05).view(-1, 1, 1, 1))
    out = awake(network)(x, t, y, readouts=True)
    (out.v.square().mean() + out.base.square().mean()).backward()
    assert not [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    v, kept = network(x, t, y, features_at=(0, 3, 4))
    assert [kept[k].shape for k in (0, 3, 4)] == [(2, 16, 16), (2, 16, 16), (2, 16, 32)]
    close(v, network.head(x, t, network.encode(x, t, y)[-1])[0])
    assert not torch.allclose(network(x, t, y.flip(0)), v)
    assert not torch.allclose(network(x.flip(-2), t, y).flip(-2), v)


def test_velocities_in_place_of_clean_latents():
    network, x, t, y = awake(make(least_time=None)), torch.randn(2, *SHAPE), torch.tensor([0.3, 0.01]), torch.tensor([0, 3])
    twin = make()  # of the same weights, which are read as clean latents
    twin.load_state_dict(network.state_dict())
    out = network(x, t, y, readouts=True)
    for v, read in zip(out, twin.predict(x, t, y), strict=True):
        close(v, read)
    for estimate, v in zip(network.predict(x, t, y), out, strict=True):
        close(estimate, x - t.view(-1, 1, 1, 1) * v)
    flow, z = Flow(presets.get("tiny_multi_layer_rae_raev2").diffusion), torch.randn(2, *SHAPE)
    terms = flow.terms(network, z, y, StepRandom(0, 0, 2))
    noise = (terms.point.x - (1 - terms.t.view(-1, 1, 1, 1)) * z) / terms.t.view(-1, 1, 1, 1)
    close(terms.point.v, noise - z, 1e-3)  # the target is the velocity itself, at early times too


def test_training_weighs_both_read_outs():
    network, config = awake(make(base_weight=0.5)), presets.get("tiny_multi_layer_rae_raev2").diffusion
    flow, z, y = Flow(config), torch.randn(4, *SHAPE), torch.zeros(4, dtype=torch.long)
    terms = flow.terms(network, z, y, StepRandom(0, 0, 4))
    loss, parts = flow.loss(terms, flow.weigh(terms))
    torch.testing.assert_close(loss, terms.velocity.mean() + terms.base.mean())
    whole = flow.terms(awake(make(base_weight=1.0)), z, y, StepRandom(0, 0, 4))
    torch.testing.assert_close(2 * terms.base, whole.base)
    assert parts["base"] > 0
    single = flow.terms(make(base_depth=None), z, y, StepRandom(0, 0, 4))
    assert single.base is None


def test_guidance_by_itself_and_by_a_weaker_model():
    network, labels, random = awake(make()), torch.tensor([0, 1]), SampleRandom(0, range(2))
    sampler = Sampler(steps=3)

    def draw(**guidance):
        return sampling.sample(network, labels, SampleRandom(0, range(2)), sampler, Guidance(**guidance))

    plain = sampling.sample(network, labels, random, sampler)
    close(draw(kind="internal", scale=1.0), plain, 1e-5)
    assert not torch.allclose(draw(kind="internal", scale=2.0), plain)
    with pytest.raises(ConfigError, match="the weaker model is not loaded"):
        draw(kind="auto", weaker="x", scale=2.0)
    network.weaker = (network,)
    close(draw(kind="auto", weaker="x", scale=3.0), plain, 1e-4)
    network.weaker = (awake(make(depth=1, base_depth=1)),)
    assert not torch.allclose(draw(kind="auto", weaker="x", scale=2.0), plain)
    assert not any(name.startswith("weaker") for name in network.state_dict())


def test_refusals(stored):
    state = {key.removeprefix("sd."): value for key, value in stored[0].items() if key.startswith("sd.")}
    with pytest.raises(ConfigError, match="raev2-ddt: unknown argument 'hiden_size'"):
        import_state_dict("raev2-ddt", state, {**stored[1]["config"], "hiden_size": 1})
    with pytest.raises(CheckpointError, match="1 missing: blocks.1.attn.qkv.weight; 2 unexpected: blocks.1.attn.q.weight"):
        import_state_dict("raev2-ddt", {k: v for k, v in state.items() if k != "blocks.1.attn.k.weight"}, stored[1]["config"])
    lone = LightningDiT(LightningDiT.Config(width=16, depth=1, heads=2), SHAPE, 3)
    with pytest.raises(ConfigError, match="guidance.kind 'internal': network 'lightningdit' has no second read-out"):
        sampling.sample(lone, torch.tensor([0]), SampleRandom(0, [0]), guidance=Guidance(kind="internal", scale=2.0))
    with pytest.raises(ConfigError, match="protocol.guidance.kind 'internal': network 'lightningdit' has no second read-out"):
        override(presets.get("tiny_rae@tiny_plain_vae"), {"protocol.guidance.kind": "internal"})
    with pytest.raises(ValueError, match="auto-guidance needs the run of a weaker model"):
        Guidance(kind="auto")
    with pytest.raises(ValueError, match="base_depth 4: the stack has blocks 1 to 3"):
        RAEv2.Config(**SIZES, base_depth=4)
    with pytest.raises(ConfigError, match="network 'raev2' predicts the clean latent of the straight path"):
        override(presets.get("tiny_multi_layer_rae_raev2"), {"tokenizer.radius": 2.0, "diffusion.path": "sphere"})


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_and_a_weaker_one(tmp_path):
    short = {"data.train": 48, "data.val": 16, "protocol.n": 16, "diffusion.train.samples": 16, "train.samples": 16,
             "diffusion.train.evaluate_at": [16]}  # fmt: skip
    run = override(presets.get("tiny_multi_layer_rae_raev2"), short)
    assert (run.diffusion.network.kind, run.protocol.guidance.kind) == ("raev2", "internal")
    list(api.train(run, tmp_path))
    *_, last = api.sample(run.id, [0, 1], root=tmp_path, previews=0)
    assert last.images.shape == (2, 3, 16, 16)
    *_, auto = api.sample(run.id, [0, 1], root=tmp_path, previews=0, guidance={"kind": "auto", "weaker": run.id, "scale": 2.0})
    *_, plain = api.sample(run.id, [0, 1], root=tmp_path, previews=0, guidance={"kind": None, "scale": 1.0})
    torch.testing.assert_close(auto.images, plain.images, atol=1e-3, rtol=0)
    every, half, *_ = reuse.records(run.id, tmp_path, every=(2,), n=4, batch=2, repeats=1)
    assert (every["encoder"], half["encoder"]) == ("every step", "every 2 steps")
    assert every["encodings"] == every["head"] == half["head"] == run.protocol.sampler.steps, "drawn unguided: once a step"
    assert half["encodings"] < every["encodings"]
