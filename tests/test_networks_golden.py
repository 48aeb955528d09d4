"""Released SiT with REG and RAE's DiT-DH: importers give the stored outputs, losses and gradients."""

from __future__ import annotations

import json

import pytest
import torch
from golden_values import close, part
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab.config import Guidance
from vfmlab.diffusion import path
from vfmlab.diffusion.ddt import DDT
from vfmlab.diffusion.guidance import Guided
from vfmlab.diffusion.sit import RegSiT
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.weights import import_state_dict


@pytest.fixture(scope="module")
def rae(golden):
    return load_file(golden / "rae_small.safetensors"), json.loads((golden / "rae_small_config.json").read_text())


@pytest.fixture(scope="module")
def reg(golden):
    return load_file(golden / "sit_reg_small.safetensors"), json.loads((golden / "sit_reg_small_config.json").read_text())


# -- DiT-DH ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ddt(rae):
    return import_state_dict("dit-dh", part(rae[0], "sd.ddt."), rae[1]["ddt"])


@torch.no_grad()
def test_ddt_forward_and_its_two_halves(ddt, rae):
    x, t, y = (rae[0][f"io.in.{name}"] for name in "xty")
    close(ddt(x, t, y), rae[0]["io.out.forward"])
    tokens = ddt.encode(x, t, y)[-1]
    assert tokens.shape == (3, 16, 64)
    close(ddt.head(x, t, tokens)[0], rae[0]["io.out.forward"])
    _, kept = ddt(x, t, y, features_at=(2, -1))
    assert torch.equal(kept[2], tokens)
    assert kept[-1].shape == (3, 16, 96)


@torch.no_grad()
def test_ddt_guidance(ddt, rae):
    # Made with scale 3: the time 0.6 lies inside the interval, 0.1 does not; the second half of the batch is the null one.
    x, t, y, out = (rae[0][f"io.cfg.{name}"] for name in ("x", "t", "y", "out"))
    for i in range(2):
        field = Guided(ddt, y[i : i + 1], Guidance(scale=3.0, interval=(0.3, 0.9)), null=ddt.num_classes)
        close(field(x[i : i + 1], t[i].item()), out[i : i + 1])


def test_ddt_size_as_published():
    with torch.device("meta"):
        assert round(sum(p.numel() for p in DDT(DDT.Config(size="XL"), (768, 16, 16), 1000).parameters()) / 1e6) == 839


def test_ddt_starts_at_zero_and_trains_everywhere():
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 1, "heads": 2, "head_width": 32, "head_depth": 1, "head_heads": 2, "patch": 2}
    network = DDT(DDT.Config(**sizes, qk_norm=True), (4, 8, 4), 3)
    inputs = torch.randn(2, 4, 8, 4), torch.rand(2), torch.tensor([0, 3])
    assert not network(*inputs).any()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    network(*inputs).square().mean().backward()
    assert not [n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def test_ddt_refusals(rae):
    state = part(rae[0], "sd.ddt.")
    with pytest.raises(ValidationError, match="head_width 30 is not a multiple"):
        DDT.Config(size="S", head_width=30)
    with pytest.raises(ConfigError, match="must be the same for encoder and head"):
        import_state_dict("dit-dh", state, {**rae[1]["ddt"], "patch_size": [1, 2]})
    with pytest.raises(CheckpointError, match="of another shape"):
        import_state_dict("dit-dh", state, {**rae[1]["ddt"], "num_classes": 5})


# -- SiT with REG ------------------------------------------------------------------------------------------------------


def load_reg(reg, variant):
    return import_state_dict("sit-reg", part(reg[0], f"{variant}.sd."), {**reg[1]["config"], "qk_norm": variant == "qknorm"})


@torch.no_grad()
@pytest.mark.parametrize("variant", ["qknorm", "noqknorm"])
def test_reg_forward(reg, variant):
    x, t, y, cls = (reg[0][f"in.{name}"] for name in ("x", "t", "y", "cls"))
    out = load_reg(reg, variant)(x, t, y, cls)
    close(out.v, reg[0][f"{variant}.out.x"])
    close(out.v_class, reg[0][f"{variant}.out.cls"])
    close(out.aligned[0], reg[0][f"{variant}.out.zs0"])


@pytest.mark.parametrize("variant", ["qknorm", "noqknorm"])
def test_reg_losses_and_gradients(reg, variant):
    tensors, network = reg[0], load_reg(reg, variant)
    t, y = tensors["loss.t"].flatten(), tensors["in.y"]
    point = path.interpolate(tensors["loss.images"], tensors["loss.noise"], t)
    token = path.interpolate(tensors["loss.cls"], tensors["loss.noise_cls"], t)
    out = network(point.x, t, y, token.x)
    denoise, denoise_cls = path.velocity_loss(out.v, point.v), path.velocity_loss(out.v_class, token.v)
    projection = -F.cosine_similarity(out.aligned[0], tensors["loss.zs0"], dim=-1).mean()
    for got, name in ((denoise, "denoise"), (denoise_cls, "denoise_cls"), (projection, "proj")):
        torch.testing.assert_close(got, tensors[f"{variant}.linear.{name}"], rtol=1e-5, atol=1e-6)
    (denoise.mean() + 0.5 * projection + 0.03 * denoise_cls.mean()).backward()
    ours = {
        "blocks.0.attn.qkv.weight": "blocks.0.attn.qkv.weight",
        "cls_projectors2.weight": "class_embed.weight",
        "final_layer.linear_cls.weight": "class_final.weight",
        "projectors.0.4.weight": "projectors.0.4.weight",
        "x_embedder.proj.weight": "patch_embed.weight",
    }
    stored = part(tensors, f"{variant}.linear.grad.")
    assert set(stored) == set(ours)
    for name, gradient in stored.items():
        got = network.get_parameter(ours[name]).grad
        torch.testing.assert_close(got, gradient, atol=1e-3 * gradient.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("qk_norm", "count"), [(True, 685_062_304), (False, 685_054_240)])
def test_reg_size_as_published(qk_norm, count):
    with torch.device("meta"):
        network = RegSiT(RegSiT.Config(size="XL", qk_norm=qk_norm), (32, 16, 16), 1000)
    assert sum(p.numel() for p in network.parameters()) == count
    assert sum(p.numel() for p in network.projectors.parameters()) == 8_131_328
    assert network.pos_embed.numel() == 296_064


def test_reg_refusals(reg):
    with pytest.raises(ConfigError, match="decoder_hidden_size 32 must be hidden_size 64"):
        import_state_dict("sit-reg", part(reg[0], "qknorm.sd."), {**reg[1]["config"], "decoder_hidden_size": 32})
    with pytest.raises(ConfigError, match="path_type 'cosine'"):
        import_state_dict("sit-reg", part(reg[0], "qknorm.sd."), {**reg[1]["config"], "path_type": "cosine"})
