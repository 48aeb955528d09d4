"""Discriminators against reference outputs, in other shapes than the reference's, and on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vfmlab import config
from vfmlab.decoders.diffusion import State
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.losses.discriminators.augment import POLICIES
from vfmlab.losses.discriminators.heads import Head, VirtualBatchNorm
from vfmlab.losses.discriminators.projected import random_window
from vfmlab.registry import DISCRIMINATORS
from vfmlab.seeding import StepRandom
from vfmlab.vfm import build
from vfmlab.vfm.table import Facts
from vfmlab.vfm.vit import TimmModel
from vfmlab.weights import import_state_dict, io
from vfmlab.weights.families.discriminators import rename_head

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def reference(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "discriminators.safetensors")


def group(reference: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in reference.items() if key.startswith(f"{name}.")}


def make(kind: str, size: int = 32, vfm: nn.Module | None = None, **options):
    kind = DISCRIMINATORS.get(kind)
    return kind(kind.Config(kind=kind.registered_name, **options), size, vfm)


def tiny_vit(size: int = 32, patch: int = 8, width: int = 24, depth: int = 4, name: str = "vit_small_patch16_224.dino"):
    facts = Facts("tiny", name, (0, -1), size, patch, "bilinear", "none")
    shape = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": 2}
    return TimmModel(facts, size, weights="random", **shape)


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dischead_uncond", "dischead_cond"])
def test_head_equals_the_reference(reference: dict[str, Tensor], name: str):
    g, sd = group(reference, name), group(reference, f"{name}.sd")
    head = Head(g["x"].shape[1], condition=g["c"].shape[1] if "cmapper.weight" in sd else 0)
    io.load(head, {rename_head(key): value for key, value in sd.items()}, "head")
    head.eval()
    with torch.no_grad():
        torch.testing.assert_close(head(g["x"], g["c"])[0], g["out_eval"][:, 0], **CLOSE)
        torch.testing.assert_close(head(g["x"][:4], g["c"][:4])[0], g["out_eval_b4"][:, 0], **CLOSE)
        head.train()
        torch.testing.assert_close(head(g["x"], g["c"])[0], g["out_train_first"][:, 0], **CLOSE)
    for key, value in group(reference, f"{name}.after_train").items():
        torch.testing.assert_close(head.state_dict()[rename_head(key)], value, **CLOSE)


def test_head_has_the_published_size(golden: Path):
    counts = json.loads((golden / "discriminator_losses.json").read_text())["param_counts"]
    assert sum(p.numel() for p in Head(384).parameters()) == counts["DiscHead_384_uncond"]
    net = make("patchgan", width=64, layers=3, scales=3, norm="batch")
    assert sum(p.numel() for p in net.parameters()) == counts["MultiscaleDiscriminator_ndf64_nlayers3_numD3"]


def test_training_makes_the_spectral_norm_one():
    torch.manual_seed(0)
    head = Head(12, kernel=3, batch=4, condition=5, mapped=7)
    for _ in range(60):
        head(torch.randn(4, 12, 9), torch.randn(4, 5))
    for conv in (head.first.conv, head.second.conv, head.out):
        exact = torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2)
        assert float(conv.u @ conv.weight.detach().flatten(1) @ conv.v) == pytest.approx(float(exact), rel=1e-3)


def test_two_forward_passes_before_one_backward():
    head = Head(8, kernel=3).train()
    (head(torch.randn(4, 8, 6))[0].mean() - head(torch.randn(4, 8, 6))[0].mean()).backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("count", [1, 3, 8, 9, 11, 16, 17])
def test_virtual_batches_of_every_size(count: int):
    norm = VirtualBatchNorm(5, batch=8)
    x = torch.randn(count, 5, 7) * 3 + 2
    y = norm(x)
    parts = y.tensor_split(-(-count // 8))
    assert max(map(len, parts)) <= 8
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for part in parts:
        torch.testing.assert_close(part.mean((0, 2)), torch.zeros(5), atol=1e-5, rtol=0)
        torch.testing.assert_close(part.var((0, 2), correction=0), torch.ones(5), atol=1e-3, rtol=0)


# -- PatchGAN ------------------------------------------------------------------------------------------------------


def test_single_patchgan_equals_the_reference(reference: dict[str, Tensor]):
    g = group(reference, "nlayer")
    net = import_state_dict("patchgan", group(g, "sd"), {"ndf": 8, "n_layers": 3})
    assert len(net.scales) == 1
    with torch.no_grad():
        torch.testing.assert_close(net(g["x"])[0], g["out"], **CLOSE)


def test_three_scales_equal_the_reference(reference: dict[str, Tensor]):
    g = group(reference, "multi")
    net = import_state_dict("patchgan", group(g, "sd"), {"ndf": 8, "n_layers": 3, "num_D": 3})
    for which, x in (("fake", g["x_fake"]), ("real", reference["nlayer.x"])):
        with torch.no_grad():
            logits, features = net(x, features=True)
        for k in range(3):
            torch.testing.assert_close(logits[k], g[f"{which}.{k}.4"], **CLOSE)
            for layer, value in enumerate([*features[k], logits[k]]):
                found = torch.stack([value.mean(), value.std()])
                torch.testing.assert_close(found, g[f"{which}_meanstd.{k}.{layer}"], **CLOSE)
        torch.testing.assert_close(features[2][1], g[f"{which}.2.1"], **CLOSE)
        torch.testing.assert_close(features[2][3], g[f"{which}.2.3"], **CLOSE)


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("scales", [1, 2])
@pytest.mark.parametrize("norm", ["batch", "virtual_batch", "instance", "none"])
def test_patchgans_of_other_shapes(layers: int, scales: int, norm: str):
    net = make("patchgan", size=16, width=6, layers=layers, scales=scales, norm=norm)
    x = images(3, 16)
    logits, features = net(x, features=True)
    assert [out.shape[:2] for out in logits] == [(3, 1)] * scales
    assert [len(maps) for maps in features] == [layers + 1] * scales
    assert features[0][-1].shape[1] == min(6 * 2**layers, 512)
    sum(out.mean() for out in logits).backward()
    assert all(p.grad is not None for p in net.parameters())
    if "batch" not in norm:  # rows are independent: what DDP and accumulation rely on
        torch.testing.assert_close(net(x[:1])[0], logits[0][:1], atol=1e-5, rtol=1e-4)


def test_patchgan_never_widens_beyond_512():
    net = make("patchgan", width=256, layers=3, scales=1)
    assert [layer.conv.out_channels for layer in net.scales[0].layers] == [256, 512, 512, 512]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sd: sd.pop("scale1_layer2.0.weight"), "first layer|missing|'scaleI_layerJ|no tensors"),
        (lambda sd: sd.update({"scale0_layer9.0.bias": torch.zeros(1)}), "unexpected"),
        (lambda sd: sd.update({"scale0_layer1.0.bias": torch.zeros(3)}), "another shape"),
        (lambda sd: sd.update({"scale0_layer1.0.bias": torch.full((16,), torch.nan)}), "not finite"),
        (lambda sd: sd.clear(), "no tensors"),
    ],
)
def test_patchgan_import_is_strict(reference: dict[str, Tensor], change, message: str):
    sd = group(reference, "multi.sd")
    change(sd)
    with pytest.raises(CheckpointError, match=message):
        import_state_dict("patchgan", sd, {})


def test_patchgan_import_refuses_another_configuration(reference: dict[str, Tensor]):
    with pytest.raises(ConfigError, match="num_D = 2, but the checkpoint has 3"):
        import_state_dict("patchgan", group(reference, "multi.sd"), {"num_D": 2})
    with pytest.raises(ConfigError, match="unknown argument 'scales'"):
        import_state_dict("patchgan", group(reference, "multi.sd"), {"scales": 3})


# -- projected -----------------------------------------------------------------------------------------------------


def test_projected_equals_the_reference(reference: dict[str, Tensor]):
    g = group(reference, "proj")
    net = import_state_dict("projected-discriminator", group(g, "sd"), {"img_size": 64, "num_heads": 3})
    from vfmlab.losses.discriminators.tokens import read_tokens

    with torch.no_grad():
        for name, x in (("out_96", g["x_96"]), ("out_32", g["x_96"][..., :32, :32])):
            # Reference logits run to 300, hence a relative tolerance.
            torch.testing.assert_close(torch.cat(net(x), 1), g[name], atol=1e-4, rtol=1e-5)
        small = nn.functional.interpolate(g["x_96"], 64, mode="bilinear", antialias=True)
        tokens = read_tokens(net.hidden["backbone"], small, net.layers, True)
    for k, found in enumerate(tokens):
        torch.testing.assert_close(found, g[f"feat_96.{k}"], atol=1e-5, rtol=1e-5)


def test_projected_import_is_strict(reference: dict[str, Tensor]):
    options = {"img_size": 64, "num_heads": 3}
    sd = group(reference, "proj.sd")
    for key in ("heads.2.cls.bias", "dino.model.model.blocks.4.mlp.fc1.bias"):
        with pytest.raises(CheckpointError, match="1 missing"):
            import_state_dict("projected-discriminator", {k: v for k, v in sd.items() if k != key}, options)
    with pytest.raises(CheckpointError, match="unexpected: neck"):
        import_state_dict("projected-discriminator", {**sd, "neck.weight": torch.zeros(1)}, options)
    with pytest.raises(ConfigError, match="unknown argument 'heads'"):
        import_state_dict("projected-discriminator", sd, {**options, "heads": 3})


@pytest.mark.parametrize("size", [16, 32, 48])
def test_projected_on_any_vit(size: int):
    vit = tiny_vit()
    net = make("projected", size, vit, backbone=None, kernel=5, virtual_batch=3)
    assert net.layers == (1, 2, 3, 4, 0)
    x = images(4, size).requires_grad_()
    logits, features = net(x, features=True)
    assert [out.shape for out in logits] == [(4, 16)] * 5
    assert [m.shape for maps in features for m in maps] == [(4, 24, 16)] * 10
    sum(out.mean() for out in logits).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in vit.parameters())


def test_projected_trains_and_saves_its_heads_only():
    net = make("projected", vfm=tiny_vit(), backbone=None)
    assert all(key.startswith("heads.") for key in net.state_dict())
    assert all(key.startswith("heads.") for key, _ in net.named_parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not net.train().hidden["backbone"].training
    assert net.double().hidden["backbone"].net.pos_embed.dtype == torch.float64
    net.hidden["backbone"].float()


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2.lvd142m", "vit_base_patch16_siglip_256.v2_webli"])
def test_projected_on_vits_with_registers_or_without_class_token(name: str):
    vit = tiny_vit(name=name)
    logits = make("projected", vfm=vit, backbone=None, layers=(0, 2, -2, -1))(images(2, 32))
    assert [out.shape for out in logits] == [(2, 16)] * 4


def test_class_token_is_added_only_when_asked_for():
    vit, x = tiny_vit(), images(2, 32)
    both = []
    for add_class in (True, False):
        torch.manual_seed(0)
        both.append(make("projected", vfm=vit, backbone=None, add_class=add_class).eval()(x))
    assert not torch.allclose(both[0][0], both[1][0])


def test_projected_on_maps_of_different_grids():
    """The pocket model's layer 0 is finer and narrower than the others."""
    backbone = config.VFM(name="pocket_random", weights="random")
    net = make("projected", vfm=None, backbone=backbone)
    logits = net(images(3, 32))
    assert len({out.shape[1] for out in logits}) == 2
    assert all(torch.isfinite(out).all() for out in logits)


def test_own_vfm_must_be_asked_for():
    own = config.VFM(name="pocket_random", weights="random")
    vfm = build(own, 32)
    with pytest.raises(ConfigError, match="the tokenizer's own VFM.*discriminator.backbone=null"):
        make("projected", vfm=vfm, backbone=own)
    assert make("projected", vfm=vfm, backbone=None).hidden["backbone"] is vfm
    make("projected", vfm=vfm, backbone=own.model_copy(update={"seed": 1}))


def test_conditional_heads_hear_the_label():
    torch.manual_seed(0)
    net = make("projected", vfm=tiny_vit(), backbone=None, classes=3, mapped=8).eval()
    x = images(4, 32)
    a, b = net(x, torch.tensor([0, 1, 2, 0])), net(x, torch.tensor([1, 1, 2, 0]))
    assert not torch.allclose(a[0][0], b[0][0])
    torch.testing.assert_close(a[0][1:], b[0][1:])
    with pytest.raises(ConfigError, match="it needs labels"):
        net(x)
    with pytest.raises(ConfigError, match="labels run from 0 to 3"):
        net(x, torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": None}, "no 'vfm' section"),
        ({"backbone": {"name": "dino_s17"}}, "unknown VFM 'dino_s17' .did you mean 'dino_s1"),
    ],
)
def test_missing_backbone_is_one_line(options: dict, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        make("projected", **options)
    assert "\n" not in str(error.value)


def test_unreachable_backbone_weights_are_one_line(monkeypatch, tmp_path: Path):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    with pytest.raises(CheckpointError, match="dino_s16.*discriminator.kind=patchgan") as error:
        make("projected", 256)
    assert "discriminator.backbone.weights" in str(error.value)
    assert "\n" not in str(error.value)


def test_impossible_layers_and_kernels_are_refused():
    with pytest.raises(ConfigError, match="has 4 blocks"):
        make("projected", vfm=tiny_vit(), backbone=None, layers=(2, 5))
    with pytest.raises(ConfigError, match="too wide for the 4 tokens .* at most 9"):
        make("projected", vfm=tiny_vit(size=16), backbone=None, kernel=11)
    with pytest.raises(ValueError, match="must be odd; use 7 or 9"):
        make("projected", vfm=tiny_vit(), backbone=None, kernel=8)


def test_rae_variant():
    net = make("rae_dino", vfm=tiny_vit(depth=12), backbone=None, resolution=32)
    assert net.layers == (-2, 3, 6, 9, 12)
    x = images(3, 48)
    logits = net.eval()(x)
    assert [out.shape for out in logits] == [(3, 16)] * 5
    torch.testing.assert_close(net(x[:1])[0], logits[0][:1], atol=1e-4, rtol=1e-4)  # statistics per image


# -- trajectory ----------------------------------------------------------------------------------------------------


def test_a_trajectory_is_judged_by_image_state_and_time():
    torch.manual_seed(0)
    net = make("trajectory", width=8, layers=2)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    x, state = images(4, 32), State(images(4, 32, 1), torch.linspace(0.1, 0.9, 4))
    logits, maps = net(x, features=True, state=state)
    assert ([out.shape for out in logits], len(maps[0])) == ([(4, 1, 8, 8)], 2)
    for other in (State(state.x.flip(0), state.t), State(state.x, state.t.flip(0))):
        assert not torch.allclose(net(x, state=other)[0], logits[0], atol=1e-3)
    part = net(x[1:2], state=State(state.x[1:2], state.t[1:2]))  # rows are independent
    torch.testing.assert_close(part[0], logits[0][1:2], atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="decoder has none; use tokenizer.method=epsilon_vae") as error:
        net(x)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="judged as it is; leave augment empty"):
        make("trajectory", augment=("colour",))


# -- randomness ----------------------------------------------------------------------------------------------------


def test_augmentation_depends_on_seed_and_step_only():
    net = make("projected", 48, tiny_vit(), backbone=None).eval()
    x = images(6, 48)
    torch.manual_seed(1)
    a = net(x, None, StepRandom(0, 5, 6))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    b = net(x, None, StepRandom(0, 5, 6))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not torch.equal(a[0], net(x, None, StepRandom(0, 6, 6))[0])
    assert not torch.equal(a[0], net(x)[0])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_policies_cut_to_rows_are_those_of_the_whole_batch(policy: str):
    """Two processes with half the batch each see what one process sees."""
    x = images(6, 16)
    whole = POLICIES[policy](x, StepRandom(0, 1, 6))
    half = POLICIES[policy](x[3:], StepRandom(0, 1, 6, slice(3, 6)))
    assert torch.equal(whole[3:], half)


def test_translation_moves_whole_pixels_and_fills_with_grey():
    x = torch.arange(1.0, 257.0).view(1, 1, 16, 16).expand(64, 3, 16, 16)
    y = POLICIES["translation"](x, StepRandom(0, 0, 64))
    moves = set()
    for image in y[:, 0]:
        rows, cols = torch.nonzero(image, as_tuple=True)
        top, left = int(rows.min()), int(cols.min())
        source = int(image[top, left]) - 1
        dy, dx = top - source // 16, left - source % 16
        moves |= {dy, dx}
        expect = torch.zeros(16, 16)
        expect[max(dy, 0) : 16 + min(dy, 0), max(dx, 0) : 16 + min(dx, 0)] = x[
            0, 0, max(-dy, 0) : 16 - max(dy, 0), max(-dx, 0) : 16 - max(dx, 0)
        ]
        assert torch.equal(image, expect)
    assert moves == {-2, -1, 0, 1, 2}


def test_cutout_is_a_square_of_half_the_side():
    y = POLICIES["cutout"](torch.ones(200, 3, 16, 16), StepRandom(0, 0, 200))
    holes = (y == 0).float().mean((1, 2, 3))
    assert holes.max() == 0.25
    assert holes.min() >= 1 / 16 - 1e-6  # a centre in a corner leaves a quarter of the hole
    assert len(holes.unique()) > 5


def test_colour_keeps_gradients_and_stays_near_the_image():
    x = images(32, 8).requires_grad_()
    y = POLICIES["colour"](x, StepRandom(0, 0, 32))
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    shift = (y - x).detach().mean((1, 2, 3))
    assert shift.abs().max() <= 0.5
    assert shift.std() > 0.1


def test_window_is_taken_half_of_the_time_and_only_of_larger_images():
    x = images(2, 20)
    taken = [random_window(x, StepRandom(0, step, 2), 12, 0.5) for step in range(200)]
    share = sum(y.shape[-1] == 12 for y in taken) / 200
    assert 0.38 < share < 0.62
    window = next(y for y in taken if y.shape[-1] == 12)
    assert any(torch.equal(window, x[..., i : i + 12, j : j + 12]) for i in range(9) for j in range(9))
    assert random_window(x, StepRandom(0, 0, 2), 20, 1.0) is x


# -- registry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISCRIMINATORS.names())
def test_every_kind_keeps_its_promise(kind: str):
    on_tokens = "backbone" in DISCRIMINATORS.get(kind).Config.model_fields
    options = {"backbone": None, "layers": (0, 2)} if on_tokens else {}
    net = make(kind, vfm=tiny_vit(), **options).train()
    assert net.registered_name == kind
    x, state = images(5, 32).requires_grad_(), State(images(5, 32, 1), torch.linspace(0, 1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x, rng=StepRandom(0, 0, 5), state=state)
    assert isinstance(logits, list)
    assert all(out.dtype == torch.float32 and len(out) == 5 for out in logits)
    sum(out.mean() for out in logits).backward()
    assert torch.isfinite(x.grad).all()
    again = make(kind, vfm=tiny_vit(), **options)
    again.load_state_dict(net.state_dict())
    with torch.no_grad():
        for a, b in zip(net.eval()(x, state=state), again.eval()(x, state=state), strict=True):
            torch.testing.assert_close(a, b)


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown discriminator 'patch_gan' .did you mean 'patchgan'"):
        DISCRIMINATORS.get("patch_gan")
