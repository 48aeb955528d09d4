"""GAE: reference values of encoder, decoder, teacher and losses; one noise scale an image; refusals; a tiny run in two stages."""

from __future__ import annotations

import json

import pytest
import torch
from golden_values import close, part
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab import api, config, presets, vfm
from vfmlab.config import override
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.losses.preservation import preservation
from vfmlab.losses.semantic import semantic
from vfmlab.losses.vf import alignment
from vfmlab.nn.plain_vit import hidden_width
from vfmlab.nn.sphere import lengths
from vfmlab.nn.teacher import Teacher
from vfmlab.registry import TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.weights import import_state_dict


@pytest.fixture(scope="module")
def stored(golden):
    folder = golden / "continuous"
    return load_file(folder / "gae_autoencoder.safetensors"), json.loads((folder / "gae_autoencoder.json").read_text())


@pytest.fixture(scope="module")
def taught(golden):
    folder = golden / "continuous"
    return load_file(folder / "gae_teacher.safetensors"), json.loads((folder / "gae_teacher.json").read_text())


def release(tensors, enc="encoder.", adapter="adapter.", dec="decoder."):
    return {**{enc + k: v for k, v in part(tensors, "enc.sd.").items()}, **{adapter + k: v for k, v in part(tensors, "adapter.sd.").items()},
            **{dec + k: v for k, v in part(tensors, "dec.sd.").items()}}  # fmt: skip


def make(model=None, **fields):
    torch.manual_seed(0)
    gae = TOKENIZERS.get("gae")
    small = {"channels": 4, "factor": 4, "width": 16, "depth": 1, "heads": 2, "features": 12,
             "decoder": {"kind": "plain_vit", "width": 16, "depth": 1, "heads": 2}}  # fmt: skip
    return gae(gae.Config.model_validate({**small, **fields}), 16, model)


# -- reference values --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("names", [{}, {"enc": "enc.sd.", "adapter": "adapter.sd.", "dec": "dec.sd."}, {"enc": "enc.", "dec": "dec."}], ids=str)
def test_autoencoder(stored, names):
    g, c = stored
    tokenizer = import_state_dict("gae", release(g, **names), c)
    close(tokenizer.encoder(g["x"]), g["enc.out"])
    close(tokenizer.posterior(g["x"]).mean, g["mu"])
    z = g["noise.z"]
    close(g["mu"] + c["sigma_std"] / 0.8 * g["noise.scalar"].view(-1, 1, 1, 1) * g["noise.eps"], z)
    images = [tokenizer.decode_raw(latent)[0] for latent in (z, g["mu"])]
    assert min((image - g["dec.out"]).abs().max() for image in images) < 3e-5
    close(lengths(tokenizer.posterior(g["x"]).mean), torch.full((2, 1, 4, 4), 8**0.5), 1e-4)
    assert tokenizer.config.noise == c["sigma_std"]


@torch.no_grad()
@pytest.mark.parametrize("case", ["w1", "win"])
def test_teacher(taught, case):
    g, c = part(taught[0], f"{case}."), taught[1]["cases"][case]
    teacher = Teacher(c["vfm_dim"], c["latent"], c["side"], c["window"], c["decoder_layers"], c["heads"])
    state = {k.replace("projector_block.attn.", "projector."): v for k, v in part(g, "sd.").items()}
    teacher.load_state_dict(state)
    out = teacher(g["feat"])
    close(out.target, g["target"])
    neck, code = teacher.encode(out.target)
    close(neck, g["neck"])
    close(code, g["latent"])
    close(out.code.flatten(2).transpose(1, 2), g["latent"])
    close(out.rebuilt, g["recon"])
    torch.testing.assert_close(preservation(out.rebuilt, out.target, "l2"), g["mse"], rtol=1e-5, atol=0)
    close(1 - preservation(out.rebuilt, out.target, "cosine"), g["cos"], 1e-5)


def test_losses(taught):
    g, margins = taught[0], taught[1]["vf"]
    cosine, distance = alignment(g["vf.h"], g["vf.f"], margins["m_cos"], margins["m_dist"])
    torch.testing.assert_close(cosine, g["vf.cos"], rtol=1e-5, atol=0)
    torch.testing.assert_close(distance, g["vf.dist"], rtol=1e-5, atol=0)
    torch.testing.assert_close(cosine + distance, g["vf.total"], rtol=1e-5, atol=0)
    torch.testing.assert_close(semantic(g["vf.h"], g["vf.f"], "l2"), g["sem.mse"], rtol=1e-5, atol=0)


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def test_widths_and_sizes():
    assert hidden_width(1024) == 2816
    assert hidden_width(64) == 256


def test_noise_has_one_scale_an_image():
    tokenizer, n = make(noise=0.2), 3000
    noise = tokenizer.perturb(torch.zeros(n, 4, 4, 4), StepRandom(0, 0, n))
    spread = noise.square().mean((1, 2, 3)).sqrt()
    assert spread.square().mean().sqrt().item() == pytest.approx(0.25, rel=0.05)
    assert spread.min() < 0.02
    part = tokenizer.perturb(torch.zeros(2, 4, 4, 4), StepRandom(0, 0, n, slice(4, 6)))
    torch.testing.assert_close(part, noise[4:6])


def test_a_kl_latent_in_place_of_norm_and_noise():
    tokenizer, x = make(latent="gaussian"), torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = tokenizer.posterior(x)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 4, 4)
    assert not torch.allclose(posterior.mean.square().mean(1), torch.ones(2, 4, 4))
    torch.testing.assert_close(tokenizer.perturb(posterior.mean, StepRandom(0, 0, 2)), posterior.mean, rtol=0, atol=0)
    (posterior.kl().mean() + tokenizer.decode_raw(posterior.sample())[0].square().mean()).backward()
    halves = tokenizer.adapter.weight.grad.chunk(2)
    assert all(half.abs().sum() > 0 for half in halves)


def test_other_sizes_and_gradients_everywhere():
    tokenizer = make(vfm.build(config.VFM(name="pocket"), 16), teacher={"heads": 2})
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    out = tokenizer.teach(tokenizer.vfm.features(x, (-1,)).maps)
    z = tokenizer.posterior(x).mean
    loss = tokenizer.decode_raw(z)[0].square().mean() + semantic(z, out.code, "cosine") + F.mse_loss(out.rebuilt, out.target)
    loss.backward()
    assert not [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    assert tokenizer.decode_raw(tokenizer.posterior(torch.zeros(1, 3, 8, 24)).mean + 1)[0].shape == (1, 3, 8, 24)


def test_refusals(stored, tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer.teacher learns from a vision foundation model.*add vfm.name=pocket"):
        make(teacher={})
    with pytest.raises(ConfigError, match="losses.semantic: this tokenizer has no teacher; use tokenizer.method=gae"):
        list(api.train(override(presets.get("tiny_plain_vae"), {"losses.semantic": 1.0}).phases()[0], tmp_path))
    with pytest.raises(ConfigError, match="gae config has no field 'layers'"):
        import_state_dict("gae", release(stored[0]), {**stored[1], "decoder": {}})
    with pytest.raises(CheckpointError):
        import_state_dict("gae", {k: v for k, v in release(stored[0]).items() if "adapter" not in k}, stored[1])


def test_a_run_in_two_stages(tmp_path):
    run = override(presets.get("tiny_gae"), {"data.train": 48, "data.val": 16, "protocol.n": 16, "train.samples": 16})
    first, second, _ = run.phases()
    for phase in (first, second):
        list(api.train(phase, tmp_path))
    before, after = (api.load_tokenizer(phase.id, tmp_path).state_dict() for phase in (first, second))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed - {"stat_mean", "stat_std", "stat_count"} == {"encoder", "adapter", "decoder"}
