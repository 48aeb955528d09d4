"""PAE, SVG, PS-VAE and TriKD's attention: reference values, priors, statistics that do not depend on the batch, tiny runs."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from golden_values import close, part
from safetensors.torch import load_file

from vfmlab import api, config, presets, vfm
from vfmlab.config import override
from vfmlab.diffusion import path
from vfmlab.errors import ConfigError
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.losses.cascade import turned
from vfmlab.losses.gram import gram
from vfmlab.nn.delta import Compressor, Decompressor, DeltaEncoder
from vfmlab.nn.frequency_attention import FrequencyAttention, filtered
from vfmlab.nn.residual_branch import ResidualBranch, matched, spread
from vfmlab.nn.sphere import lengths, rms_over_channels, rms_over_image
from vfmlab.registry import LOSSES, TOKENIZERS
from vfmlab.seeding import StepRandom, generator
from vfmlab.tokenizers.base import Posterior
from vfmlab.training.check import check
from vfmlab.training.tokenizer import TokenizerTask

VIT = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "hidden": 16}
SIZES = {
    "pae": {"channels": 4, "factor": 4, "depth": 1, "heads": 4, "teacher": {"heads": 4}, "decoder": VIT},
    "svg": {"channels": 132, "factor": 4, "extra": 4, "width": 16, "depth": 1, "heads": 2, "hidden": 16, "decoder": VIT},
    "ps_vae": {"channels": 6, "factor": 4, "depth": 1, "heads": 4, "decoder": VIT},
}
SHORT = {"data.train": 48, "data.val": 16, "protocol.n": 16, "train.samples": 16}


@pytest.fixture(scope="module")
def model():
    return vfm.build(config.VFM(name="pocket"), 16)


def make(model, method, **fields):
    torch.manual_seed(0)
    kind = TOKENIZERS.get(method)
    return kind(kind.Config.model_validate({**SIZES[method], **fields}), 16, model)


def images(n=4):
    return torch.rand(n, 3, 16, 16, generator=generator("pae images")) * 2 - 1


@pytest.mark.parametrize("method", SIZES)
@torch.no_grad()
def test_images_of_another_size(model, method):
    """Smaller ones, as equivariance's prior path makes them, and wide ones: positions are interpolated."""
    tokenizer = make(model, method).eval()
    for height, width in ((8, 8), (16, 32)):
        z = tokenizer.posterior(torch.rand(2, 3, height, width) * 2 - 1).mean
        assert z.shape[-2:] == (height // 4, width // 4)
        assert tokenizer.decode_raw(z)[0].shape == (2, 3, height, width)


# -- reference values --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parts_of_pae(golden):
    g = load_file(golden / "continuous" / "pae_parts.safetensors")
    for mode in ("sft", "add"):
        encoder = DeltaEncoder(4, 7, 48, 2, 4, mode)
        state = part(g, f"delta.{mode}.sd.")
        encoder.load_state_dict({k.replace("patch_embed.proj", "patch_embed").replace(".mlp.", "."): v for k, v in state.items()})
        close(encoder(g["x"], g["u"]), g[f"delta.{mode}.out"], 2e-5)
    compressor, decompressor = Compressor(48, 8, 4), Decompressor(8, 48, 4)
    compressor.load_state_dict({k.replace("0.", "attn.", 1) if k[0] == "0" else f"conv.{k[2:]}": v for k, v in part(g, "compressor.sd.").items()})
    decompressor.load_state_dict({("conv." if k[0] == "0" else "attn.") + k[2:]: v for k, v in part(g, "decompressor.sd.").items()})
    close(compressor(g["delta.sft.out"], (4, 4)), g["z_pre"], 2e-5)
    z = rms_over_channels(g["z_pre"])
    close(z, g["z_token"], 2e-5)
    close(rms_over_image(g["z_pre"]), g["z_sample"], 2e-5)
    close(rms_over_image(g["z_pre"], centred=True), g["sphere_zero_mean"], 2e-5)
    close(decompressor(z).flatten(2).transpose(1, 2), g["hidden_out"], 2e-5)


@torch.no_grad()
def test_branch_of_svg(golden):
    g = load_file(golden / "continuous" / "svg_branch.safetensors")
    names = [("^conv_proj", "patch_embed"), (r"^encoder\.pos_embedding", "position"), (r"^encoder\.layers\.encoder_layer_(\d+)", r"blocks.\1"),
             ("ln_1", "norm1"), ("ln_2", "norm2"), (r"self_attention\.in_proj_", "qkv."), (r"self_attention\.out_proj", "proj"),
             (r"mlp\.0", "expand"), (r"mlp\.3", "contract"), (r"^encoder\.ln\.", "norm."), ("^heads", "head")]  # fmt: skip

    def ours(key):
        for theirs, name in names:
            key = re.sub(theirs, name, key)
        return key

    branch = ResidualBranch(64, 16, 32, 2, 4, 64, 8)
    branch.load_state_dict({ours(k): v for k, v in part(g, "sd.").items()})
    out, maps = branch(g["x"]), g["vfm"].unflatten(2, (4, 4))
    close(out.flatten(2), g["branch"], 1e-5)
    close(matched(out, spread(out), spread(maps)).flatten(2), g["aligned"], 1e-5)
    alone = matched(out[:1], spread(out[:1]), spread(maps[:1]))
    close(alone.flatten(2), g["aligned_first_alone"], 1e-5)
    masked = torch.where(g["mask_flags"].bool(), g["mask_token"], g["branch"])
    assert torch.equal(masked, g["masked"])
    masked = masked.unflatten(2, (4, 4))
    close(matched(masked, spread(masked), spread(maps)).flatten(2), g["masked_aligned"], 1e-5)


class Tokens(torch.nn.Module):
    """A VFM of 24 channels on a 4 x 4 grid, whose maps are given."""

    upscale = 1.0

    def width(self, layer):
        return 24

    def grid(self, layer):
        return (4, 4)


def test_svg_matches_by_the_batch_as_released(golden, monkeypatch):
    """The branch is masked before it is matched, so the token counts in the masked batch's mean and std."""
    g = load_file(golden / "continuous" / "svg_branch.safetensors")
    kind = TOKENIZERS.get("svg")
    tokenizer = kind(kind.Config.model_validate({**SIZES["svg"], "channels": 32, "factor": 16, "extra": 8, "match": "batch"}), 64, Tokens())
    wanted = torch.cat([g["vfm"], g["masked_aligned"]], dim=1).unflatten(2, (4, 4))
    branch = g["branch"].unflatten(2, (4, 4)).clone().requires_grad_()
    monkeypatch.setattr(tokenizer.branch, "forward", lambda images: branch[: len(images)])
    tokenizer.mask_token.data.copy_(g["mask_token"].unsqueeze(-1))

    def latent(n=3):
        return tokenizer.posterior(g["x"][:n], {-1: g["vfm"][:n].unflatten(2, (4, 4))}).mean

    close(tokenizer.eval().posterior(g["x"], {-1: g["vfm"].unflatten(2, (4, 4))}).mean, g["latent"], 1e-5)
    tokenizer.train()
    draws = SimpleNamespace(rand=lambda *shape: 1 - g["mask_flags"].view(3, *shape))
    z = tokenizer.perturb(latent(), draws)
    close(z.detach(), wanted, 1e-5)
    weight = torch.randn(z.shape, generator=generator("svg"))
    (z * weight).sum().backward()
    masked = torch.where(g["mask_flags"].bool().unsqueeze(-1), tokenizer.mask_token, branch)
    there = matched(masked, spread(masked), spread(g["vfm"].unflatten(2, (4, 4))))
    close(branch.grad, torch.autograd.grad((there * weight[:, 24:]).sum(), branch)[0], 1e-5)
    close(latent(1)[:, 24:].flatten(2).detach(), g["aligned_first_alone"], 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("band", ["low", "high"])
def test_frequency_attention(golden, band):
    g = load_file(golden / "continuous" / "trikd_frequency.safetensors")
    layer = FrequencyAttention(10, 6, band)
    layer.load_state_dict({k.replace("conv_atten", "attention"): v for k, v in part(g, f"{band}.sd.").items()})
    for i in (0, 1):
        close(filtered(g[f"x{i}"], band), g[f"{band}.filtered{i}"], 1e-5)
        close(layer(g[f"x{i}"]), g[f"{band}.out{i}"], 1e-5)


def test_the_wide_field_of_a_small_one(golden):
    """PS-VAE's toy: v_8(x) = Q v_2(Q^T x) + (x - Q Q^T x) / t."""
    g = load_file(golden / "continuous" / "formulas.safetensors")
    q, x = g["psvae.Q"], g["psvae.x"]
    for k, t in enumerate((0.3, 0.7, 0.95)):
        inside = x @ q @ q.T
        empty = path.velocity_from_clean(x - inside, torch.zeros_like(x), t)
        close(g[f"psvae.v_z.t{k}"] @ q.T + empty, g[f"psvae.v_x.t{k}"], 1e-8)


# -- tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SIZES)
def test_gradients_everywhere(model, method):
    tokenizer, x = make(model, method), images()
    q = tokenizer.posterior(x)
    z = q.mean
    assert z.shape[1:] == tokenizer.latent_shape
    loss = tokenizer.decode_raw(z)[0].square().mean() + gram(z).square().mean()
    if method == "pae":
        taught = tokenizer.teach(model.features(x, (-1,)).maps)
        loss = loss + taught.rebuilt.square().mean() + (z - taught.code).square().mean()
    if method == "svg":
        loss = loss + tokenizer.mask_token.sum()
    if method == "ps_vae":
        loss = loss + tokenizer.rebuild(z)[-1].square().mean() + q.logvar.square().mean()
    loss.backward()
    named = [(n, p) for n, p in tokenizer.named_parameters() if p.requires_grad]
    # PAE's modulation begins at zero, so that what lies before it learns from the second step on.
    dead = {n.split(".")[0] for n, p in named if p.grad is None or not p.grad.any()}
    assert dead <= ({"encoder"} if method == "pae" else set())


def test_pae_starts_as_the_norm_of_the_tokens_and_lies_on_a_sphere(model):
    tokenizer, x = make(model, "pae"), images()
    close(lengths(tokenizer.posterior(x).mean), torch.full((4, 1, 4, 4), 2.0), 2e-3)  # eps of the norm
    u = model.features(x, (-1,)).maps[-1].flatten(2).transpose(1, 2)
    close(tokenizer.encoder(x, u), tokenizer.encoder.final_ln(u), 1e-5)


def test_turned_tokens_have_their_length_and_angle():
    g = generator("turned")
    z, noise = torch.randn(2, 5, 3, 3, generator=g), torch.randn(2, 5, 3, 3, generator=g)
    for degrees in (42.5, 85.0):
        moved = turned(z, noise, degrees)
        close(lengths(moved), lengths(z), 1e-5)
        cosine = torch.nn.functional.cosine_similarity(moved, z, dim=1)
        close(cosine, torch.full_like(cosine, torch.tensor(degrees).deg2rad().cos().item()), 1e-5)


def test_the_cascade_moves_the_more_perturbed_of_two_neighbours():
    """Images 0, 1, 3: neighbours lie 1 and 2 apart; the last two learn towards those before them, which stay."""
    shown = [torch.full((2, 3, 4, 4), value, requires_grad=True) for value in (0.0, 1.0, 3.0)]
    r = Reconstruction(shown[0].detach(), shown[:1], Posterior(torch.zeros(2, 4, 1, 1)), torch.zeros(2, 4, 1, 1), perturbed=shown[1:])
    cascade = LOSSES.get("cascade")
    value = cascade(cascade.Config(), LossContext(4, 4, 4, None))(r)
    assert value.item() == pytest.approx(1.5)
    value.backward()
    assert shown[0].grad is None
    for image in shown[1:]:
        close(image.grad, torch.full_like(image, 1 / (2 * image.numel())), 1e-9)


def test_one_set_of_perturbed_images_has_one_set_of_angles():
    changes = {"losses.cascade": 0.1, "losses.cascade:far": {"weight": 0.1, "degrees": [80.0]}}
    with pytest.raises(ConfigError, match=r"cascade.*\[\(42\.5, 85\.0\), \(80\.0,\)\].*the same degrees"):
        TokenizerTask(override(presets.get("tiny_plain_vae"), changes).phases()[0])


def test_svg_gives_the_same_in_any_batch(model):
    x, fixed, batch = images(), make(model, "svg").eval(), make(model, "svg", match="batch").eval()
    fixed.begin([x])
    z = fixed.posterior(x).mean
    close(fixed.posterior(x[:1]).mean, z[:1], 1e-5)
    maps, branch = z.split((128, 4), dim=1)
    assert spread(branch).std.item() == pytest.approx(spread(maps).std.item(), rel=1e-3)
    assert (batch.posterior(x[:1]).mean - batch.posterior(x).mean[:1]).abs().max() > 1e-3
    gone = fixed.perturb(z, StepRandom(0, 0, 4))
    assert torch.equal(gone[:, :128], maps)
    assert torch.equal(make(model, "svg", mask=0.0).perturb(z, StepRandom(0, 0, 4)), z)
    every = make(model, "svg", mask=1.0).perturb(z, StepRandom(0, 0, 4))
    assert every[:, 128:].std() == 0


def test_svgs_statistics_follow_a_branch_that_grows(model):
    x, tokenizer = images(), make(model, "svg")
    tokenizer.begin([x])
    with torch.no_grad():
        tokenizer.branch.head[-1].weight.mul_(7.0)
        tokenizer.branch.head[-1].bias.add_(1.0)
    for _ in range(100):
        maps, branch = tokenizer.posterior(x).mean.split((128, 4), dim=1)
        assert spread(branch).std.item() == pytest.approx(spread(maps).std.item(), rel=1e-3)
    tokenizer.eval()
    before = tokenizer.own_spread.clone()
    close(tokenizer.posterior(x).mean[:, 128:], branch, 1e-3)
    assert torch.equal(tokenizer.own_spread, before)


def test_pixels_shape_ps_vaes_latent_only_where_the_vfm_trains(model):
    tokenizer, x = make(model, "ps_vae"), images()
    tokenizer.backbone.requires_grad_(False)
    z = tokenizer.posterior(x).mean
    tokenizer.decode_raw(z)[0].square().mean().backward()
    assert tokenizer.moments.weight.grad is None
    twin = make(model, "ps_vae")
    twin.decode_raw(twin.posterior(x).mean)[0].square().mean().backward()
    assert twin.moments.weight.grad.any()
    assert any(p.grad is not None and p.grad.any() for p in twin.backbone.parameters())


@pytest.mark.parametrize("method", SIZES)
def test_refusals(model, method):
    with pytest.raises(ConfigError, match="no 'vfm' section; add vfm.name=pocket"):
        make(None, method)
    with pytest.raises(ConfigError, match="tokenizer.heads 5"):
        make(model, method, heads=5)
    if method == "svg":
        with pytest.raises(ConfigError, match="set tokenizer.channels=132"):
            make(model, method, channels=130)


@pytest.mark.parametrize("method", SIZES)
def test_tiny_tokenizers_train(method, tmp_path):
    run = override(presets.get(f"tiny_{method}"), SHORT)
    for phase in run.phases()[:-1]:
        list(api.train(phase, tmp_path))
    tokenizer = api.load_tokenizer(run.last.parent, tmp_path)
    x = images(2)
    assert tokenizer.decode(tokenizer.encode(x).mode()).shape == (2, 3, 16, 16)


def test_statistics_of_a_batch_are_those_of_all_of_its_images():
    """In parts each part would be matched by its own, and the running ones move once a part."""
    divided = override(presets.get("tiny_svg"), {"train.accumulation": 2})
    with pytest.raises(ConfigError, match=r"train\.accumulation = 2: 'svg' takes mean and spread of a batch"):
        check(divided.phases())
    check(override(divided, {"train.accumulation": 1}).phases())
