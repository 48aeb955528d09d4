"""HAE / DINO-SAE: reference values of stem, decoders and losses; a stem in the place of a VFM's patch embedding; refusals; a tiny run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from golden_values import close, part
from safetensors.torch import load_file

from vfmlab import api, config, presets, vfm
from vfmlab.config import override
from vfmlab.decoders.dc_ae import DCDecoder
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.losses.preservation import preservation
from vfmlab.nn.dc_blocks import ConvStem, EfficientViTBlock, RMSNorm2d
from vfmlab.nn.sphere import lengths
from vfmlab.registry import TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.dino_sae import DinoSAE
from vfmlab.weights import import_state_dict
from vfmlab.weights.families.dc_ae_decoder import rename

DECODER = {"kind": "dc_ae", "widths": [16, 16, 32], "depths": [1, 1, 1], "blocks": ["residual", "residual", "vit"], "in_shortcut": False}


@pytest.fixture(scope="module")
def model():
    return vfm.build(config.VFM(name="pocket"), 16)


def make(model, **fields):
    torch.manual_seed(0)
    method = TOKENIZERS.get("dino_sae")
    return method(method.Config.model_validate({"channels": 128, "factor": 4, "stem": [16], "decoder": DECODER, **fields}), 16, model)


# -- reference values --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stem(golden):
    g = load_file(golden / "continuous" / "dino_sae_stem.safetensors")
    norm = RMSNorm2d(12)
    norm.load_state_dict(part(g, "rms2d.sd."))
    close(norm(g["rms2d.x"]), g["rms2d.out"], 2e-5)
    stem = ConvStem(40)
    state = {".".join((f"{k.split('.')[2]}s", k.split(".")[1], "weight")): v for k, v in part(g, "stem.sd.").items()}
    stem.load_state_dict(state)
    close(stem(g["stem.x"]).permute(0, 2, 3, 1), g["stem.out"], 2e-5)
    torch.testing.assert_close(preservation(g["align.zs"].mT, g["align.zt"].mT, "cosine"), g["align.loss"], rtol=1e-5, atol=0)
    c = json.loads((golden / "continuous" / "dino_sae_stem.json").read_text())
    drawn = SimpleNamespace(samples=0, number=lambda: float(g["smooth.u"]), randn=lambda *shape: g["smooth.eps"])
    smooth = SimpleNamespace(stem=torch.nn.Identity(), tau=lambda samples: c["smooth_tau"])
    close(DinoSAE.perturb(smooth, g["align.zs"], drawn), g["smooth.out"], 2e-5)


@torch.no_grad()
@pytest.mark.parametrize("which", ["A", "B"])
def test_decoders(golden, which):
    g = part(load_file(golden / "continuous" / "dino_sae_decoder.safetensors"), f"dec{which}.")
    c = json.loads((golden / "continuous" / "dino_sae_decoder.json").read_text())["decoders"][which]
    decoder = import_state_dict("dc-ae-decoder", part(g, "sd."), {**c, "latent_side": g["z"].shape[-1]})
    assert sum(p.numel() for p in decoder.parameters()) == c["params"]
    x = decoder.project_in(g["z"])
    close(x, g["tap.project_in"], 5e-5)
    for k, stage in enumerate(decoder.stages):
        x = stage(x)
        close(x.mean((2, 3)), g[f"tap.stage{k}_mean_hw"], 5e-5)
    close(decoder(g["z"])[0], g["out"], 5e-5)


@torch.no_grad()
def test_linear_attention(golden):
    g = part(load_file(golden / "continuous" / "dino_sae_decoder.safetensors"), "evit.")
    block = EfficientViTBlock(64)
    block.load_state_dict({rename(k): v for k, v in part(g, "sd.").items()})
    for branch in ("linear", "quadratic"):
        x = g[f"{branch}.x"]
        close(block(x), g[f"{branch}.out"], 5e-5)


@torch.no_grad()
def test_linear_attention_sums_in_fp32_under_autocast():
    attention, x = EfficientViTBlock(64).context, 8 * torch.randn(2, 64, 16, 16)
    seen = []
    attention.qkv.register_forward_hook(lambda _, args, out: seen.append(out))
    attention.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        attention(x)
    assert seen[0].dtype == torch.bfloat16
    q, k, v = seen[0].double().flatten(2).unflatten(1, (-1, 96)).chunk(3, dim=2)
    q, k = q.relu(), k.relu()
    exact = (v @ k.mT) @ q / (k.sum(3, keepdim=True).mT @ q + 1e-15)
    close(seen[1].double(), exact.flatten(1, 2).unflatten(2, (16, 16)), 1e-4 * exact.abs().max())


def test_sizes_as_published():
    with torch.device("meta"):
        stem, decoder = ConvStem(1024), DCDecoder(DCDecoder.Config(), 1024, 16, 256)
    assert sum(p.numel() for p in stem.parameters()) == 2_737_792
    assert sum(p.numel() for p in decoder.parameters()) == pytest.approx(172.0e6, rel=2e-3)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_a_stem_in_the_place_of_the_patch_embedding(model):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    found: list = []
    hook = model.embedding.register_forward_hook(lambda _m, _a, out: found.append(out))
    usual = model.features(x, (2, -1)).maps
    hook.remove()
    same = model.features_from(x, found[0], (2, -1)).maps
    assert all(torch.equal(same[k], usual[k]) for k in usual)
    other = model.features_from(x, found[0] + 1, (-1,)).maps
    assert not torch.allclose(other[-1], usual[-1])
    with pytest.raises(ConfigError, match="do not fit the patch embedding of 'pocket'"):
        model.features_from(x, found[0][:, :5], (-1,))
    assert torch.equal(model.features(x, (-1,)).maps[-1], usual[-1]), "nothing stays behind"


def test_stem_and_decoder_train_and_the_vfm_does_not(model):
    tokenizer, x = make(model), torch.rand(2, 3, 16, 16) * 2 - 1
    z = tokenizer.posterior(x).mean
    assert z.shape == (2, 128, 4, 4)
    (tokenizer.decode_raw(z)[0].square().mean() + preservation(z, model.features(x, (-1,)).maps[-1], "cosine")).backward()
    assert not [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(p.grad is None for p in model.parameters())
    assert preservation(z, 3 * z, "cosine") < 1e-6, "length is free"


def test_noise_has_one_scale_a_batch_and_rises(model):
    tokenizer = make(model, noise=0.8, noise_end=1.2, noise_rise=1000)
    z = torch.zeros(6, 128, 4, 4)
    assert torch.equal(tokenizer.perturb(z, StepRandom(0, 0, 6)), z), "the stem trains"
    tokenizer.stem.requires_grad_(False)
    spread = tokenizer.perturb(z, StepRandom(0, 1, 6)).flatten(1).std(1)
    assert spread.max() / spread.min() < 1.15
    assert [tokenizer.tau(samples) for samples in (0, 500, 1000, 5000)] == pytest.approx([0.8, 1.0, 1.2, 1.2])
    half = tokenizer.perturb(z[3:], StepRandom(0, 1, 6, slice(3, 6)))
    torch.testing.assert_close(half, tokenizer.perturb(z, StepRandom(0, 1, 6))[3:])


def test_refusals(model, golden):
    for fields, line in (
        ({"channels": 64}, "does not compress.*set tokenizer.channels=128"),
        ({"stem": [16, 16]}, "3 convolutions of stride 2 give f8, tokenizer.factor is 4"),
        ({"decoder": {**DECODER, "widths": [16, 32], "depths": [1, 1], "blocks": ["residual", "vit"]}}, "2 stages decode f2, but the latent is f4"),
        ({"decoder": {**DECODER, "in_shortcut": True}}, "32, the deepest width, is no multiple of the latent's 128 channels"),
    ):
        with pytest.raises(ConfigError, match=line):
            make(model, **fields)
    with pytest.raises(ConfigError, match="no 'vfm' section"):
        make(None)
    with pytest.raises(ValueError, match="no multiple of 32"):
        DCDecoder.Config(widths=(16, 24), depths=(1, 1), blocks=("residual", "vit"))
    with pytest.raises(CheckpointError):
        import_state_dict("dc-ae-decoder", {"x": torch.zeros(1)}, {"latent_channels": 32, "width_list": [16, 32], "depth_list": [1, 1],
                                                                   "block_type": "ResBlock", "latent_side": 4})


def test_a_run_on_a_sphere(tmp_path):
    run = override(presets.get("tiny_dino_sae"), {"data.train": 48, "data.val": 16, "train.samples": 16, "tokenizer.decode_length": 7.0})
    for phase in run.phases()[:2]:
        list(api.train(phase, tmp_path))
    tokenizer = api.load_tokenizer(run.last.parent, tmp_path)
    z = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1).mode()
    close(lengths(z), torch.full((2, 1, 4, 4), tokenizer.config.radius), 1e-4)
    close(lengths(tokenizer.denormalise(z)), torch.full((2, 1, 4, 4), 7.0), 1e-4)
