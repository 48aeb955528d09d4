"""Hierarchical timm models behind the one door: several families, small and random, without any download."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from vfmlab import config, vfm
from vfmlab.diffusion.targets import Teacher
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.losses.base import LossContext
from vfmlab.registry import DISCRIMINATORS, LOSSES, TOKENIZERS
from vfmlab.studies import probing
from vfmlab.tokenizers import linear_start
from vfmlab.vfm.describe import describe
from vfmlab.vfm.hierarchical import HierarchicalModel

FAMILIES = {  # name in timm -> what makes it small
    "tf_efficientnet_lite0": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "resnet10t": {"channels": (8, 16, 24, 32)},
    "regnetx_002": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "pvt_v2_b0": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
}
SIZE, UPSCALE = 32, 2.0  # 64 px enter: the last map is 2 x 2
families = pytest.mark.parametrize("name", FAMILIES)
CONV = {"kind": "conv", "width": 8, "blocks": 1, "attention": (), "middle_attention": False}
VIT = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "hidden": 16}


def build(name: str, seed: int = 0, **more) -> HierarchicalModel:
    options = {"weights": "random", "upscale": UPSCALE} | FAMILIES[name] | more
    return HierarchicalModel(describe(name), SIZE, seed=seed, **options)


class Built(dict):
    def __missing__(self, name: str) -> HierarchicalModel:
        return self.setdefault(name, build(name))


@pytest.fixture(scope="module")
def models():
    """Each family's model, built when it is first asked for."""
    return Built()


@pytest.fixture(scope="module")
def convnext(models):
    return models["convnext_atto"]


def images(batch: int = 2, size: int = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@families
def test_every_layer_has_a_width_and_a_grid_of_its_own(models, name):
    model = models[name]
    layers = (*range(model.depth + 1), -1, -2)
    maps, pooled = model.features(images(), layers)
    assert {k: m.shape for k, m in maps.items()} == {k: (2, model.width(k), *model.grid(k)) for k in layers}
    infos = [(info["num_chs"], info["reduction"]) for info in model.net.feature_info]
    assert [(model.width(k), 64 // model.grid(k)[0]) for k in range(1, model.depth + 1)] == infos
    assert model.layers == (0, (model.depth + 1) // 2, -1)
    assert pooled.shape[0] == 2
    assert pooled.ndim == 2
    assert len({model.grid(k) for k in layers}) > 3
    assert all(m.std() > 0.01 for m in maps.values()), "batch norms of random weights are settled"
    larger = model.features(images(size=48), (1, -1)).maps
    assert larger[-1].shape[-2:] == (3, 3)


@families
def test_shapes_without_memory(models, name):
    """Plans and checks build every part on the meta device."""
    with torch.device("meta"):
        model = build(name)
    layers = (*range(model.depth + 1), -1, -2)
    assert [(model.width(k), model.grid(k)) for k in layers] == [(models[name].width(k), models[name].grid(k)) for k in layers]


@families
def test_maps_are_timms_own(models, name):
    model, x = models[name], images()
    seen = {}
    for k, info in enumerate(model.net.feature_info, 1):
        hook = model.net.get_submodule(info["module"]).register_forward_hook(lambda _, args, out, k=k: seen.setdefault(k, out))
        with hook:
            final = model.net.forward_features(model.prepare(x).contiguous(memory_format=torch.channels_last))
    maps, pooled = model.features(x, (*range(1, model.depth + 1), -1))
    for k, out in seen.items():
        if isinstance(out, tuple):  # PVT's stages also say their size
            out = out[0]
        out = out if out.shape[1] == model.width(k) else out.permute(0, 3, 1, 2)
        torch.testing.assert_close(maps[k], out, msg=lambda text, k=k: f"layer {k}: {text}")
    final_map = final if final.shape[1] == model.width(-1) else final.permute(0, 3, 1, 2)
    torch.testing.assert_close(maps[-1], final_map)
    torch.testing.assert_close(pooled, model.net.forward_head(final, pre_logits=True))
    assert model.features(x, (1, 2)).pooled is None
    # Layer 0 is linear in the pixels, as a patch embedding is.
    a, b = images(1, seed=1), images(1, seed=2)
    read = [model.features(v, (0,)).maps[0] for v in (a, b, (a + b) / 2)]
    torch.testing.assert_close(read[2], (read[0] + read[1]) / 2, atol=1e-4, rtol=1e-3)


@families
def test_frozen_and_trainable(models, name):
    model, x = models[name], images()
    assert not any(module.training for module in model.train().modules())
    assert not model.features(x).maps[-1].requires_grad
    x.requires_grad_(True)
    model.features(x, (-1,)).maps[-1].square().sum().backward()
    assert x.grad.abs().sum() > 0
    twin = model.trainable_copy((2,))
    torch.testing.assert_close(twin.features(x).maps[2], model.features(x, (2,)).maps[2])
    twin.features(x).maps[2].square().sum().backward()
    for key, parameter in twin.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), key
    deep = dict(twin.net.get_submodule(model.net.feature_info[-1]["module"]).named_parameters())
    assert deep or name in ("resnet10t", "mobilenetv3_small_050")
    assert not any(p.requires_grad for p in deep.values()), "stages that are not read stay frozen"
    assert all(p.requires_grad is False for p in model.parameters())
    with torch.no_grad():
        next(p for p in twin.parameters() if p.requires_grad).mul_(2.0)
    assert not torch.allclose(twin.features(x, (0,)).maps[0], model.features(x, (0,)).maps[0])


@families
def test_random_weights_and_files(models, name, tmp_path):
    state = torch.get_rng_state()
    other = build(name, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "building a model does not move the caller's random numbers"
    assert build(name).fingerprint == models[name].fingerprint != other.fingerprint
    path = tmp_path / "model.safetensors"
    head = {f"{key}.weight": torch.zeros(5, 4) for key in [other.net.pretrained_cfg["classifier"]]}
    save_file({**other.net.state_dict(), **head}, path)
    loaded = build(name, weights=str(path))
    torch.testing.assert_close(loaded.features(images()).maps[-1], other.features(images()).maps[-1])
    lost = dict(other.net.state_dict())
    lost.popitem()
    save_file(lost | head, path)
    with pytest.raises(CheckpointError, match="missing") as caught:
        build(name, weights=str(path))
    assert "\n" not in str(caught.value)


@families
def test_tokenizers_on_layers_of_several_grids(models, name):
    """VFM-VAE and AlignTok fold finer maps and enlarge coarser ones; the linear start and the VF loss read the same."""
    model, x = models[name], images(4)
    layers = (0, 2, 3, -1)
    sizes = {k: model.grid(k)[0] for k in layers}
    assert min(sizes.values()) < 8 <= max(sizes.values())
    model.layers, kept = layers, model.layers
    try:
        for method, fields in (("vfm_vae", {"widths": (4,), "projection": "conv"}), ("aligntok", {"read": layers})):
            part = TOKENIZERS.get(method)
            options = {"channels": 4, "factor": 4, "decoder": CONV, "linear_start": True, **fields}
            tokenizer = part(part.Config.model_validate(options), SIZE, model)
            assert linear_start.fit(tokenizer, [x, images(4, seed=1)]) > 5
            assert tokenizer.posterior(x).mean.shape == (4, 4, 8, 8)
            assert tokenizer.decode_raw(tokenizer.posterior(x).mean)[0].shape == x.shape
            smaller = images(2, size=16)  # as the equivariance loss makes them
            if name.startswith("swin"):
                continue
            assert tokenizer.posterior(smaller).mean.shape == (2, 4, 4, 4)
    finally:
        model.layers = kept
    loss = LOSSES.get("vf")(LOSSES.get("vf").Config(), LossContext(SIZE, 4, 8, model))
    assert loss.project.weight.shape == (model.width(-1), 4)


def test_tokenizers_on_one_layer(convnext):
    """RAE and FAE need a layer on the latent's grid, and say so in one line."""
    x = images(4)
    rae, fae = TOKENIZERS.get("rae"), TOKENIZERS.get("fae")
    tokenizer = rae(rae.Config(channels=32, factor=16, decoder=VIT), SIZE, convnext)
    tokenizer.begin([x])
    assert tokenizer.posterior(x).mean.shape == (4, 32, 2, 2)
    small = {"channels": 6, "heads": 2, "head_width": 8, "feature_depth": 1, "decoder": VIT}
    tokenizer = fae(fae.Config.model_validate(small | {"factor": 4, "layer": 2}), SIZE, convnext)
    tokenizer.begin([x])
    assert tokenizer.rebuild(tokenizer.posterior(x).mean)[2].shape == (4, 16, 8, 8)
    for part, fields in ((rae, {"channels": 32, "decoder": VIT}), (fae, small)):
        with pytest.raises(ConfigError, match="2 x 2 grid, but tokenizer.factor 4 asks for 8 x 8") as caught:
            part(part.Config.model_validate({"factor": 4, **fields}), SIZE, convnext)
        assert "\n" not in str(caught.value)
    several = TOKENIZERS.get("multi_layer_rae")
    with pytest.raises(ConfigError, match="layer 3 has a 4 x 4 grid"):
        several(several.Config(channels=32, factor=16, last=2, decoder=VIT), SIZE, convnext)
    part = TOKENIZERS.get("aligntok")
    with pytest.raises(ConfigError, match=r"tokenizer.read: layer -1 has a 2 x 2 grid, .* no layer is as fine"):
        part(part.Config.model_validate({"channels": 4, "factor": 4, "decoder": CONV}), SIZE, convnext)


def test_preservation_holds_the_latent_of_several_layers(convnext):
    part = TOKENIZERS.get("aligntok")
    tokenizer = part(part.Config.model_validate({"channels": 4, "factor": 4, "read": (2, -1), "decoder": CONV}), SIZE, convnext)
    maps = tokenizer.own_features(images())
    assert [m.shape[1:] for m in maps.values()] == [(16, 8, 8), (32, 2, 2)]
    tokenizer.posterior(images(), maps).mean.square().sum().backward()
    assert not [n for n, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None and not n.startswith("decoder")]


def test_alignment_targets(models, monkeypatch):
    """REPA takes maps of any grid, REG the pooled features of the head."""
    model = models["tf_efficientnet_lite0"]
    monkeypatch.setattr(vfm, "build", lambda cfg, size: model)
    teacher = Teacher(config.VFM(name="efficientnet_lite0"), SIZE, -1, (4, 4), pooled=True)
    found = teacher.read(images())
    assert found["target"].shape == (2, model.width(-1), 4, 4)
    assert found["token"].shape == (2, teacher.token_width) == (2, 1280)


def test_discriminator_reads_stages(convnext):
    part = DISCRIMINATORS.get("projected")
    heads = part(part.Config(kind="projected", backbone=None, layers=(1, 2, 3), kernel=3, augment=()), SIZE, convnext)
    logits = heads.score(images(), None)[0]
    assert [x.shape[-1] for x in logits] == [256, 64, 16]


def test_probes_and_pixels(convnext):
    cfg = config.Data(source="scenes:easy", size=SIZE, train=8, val=60)
    rows = probing.probe_layers({"tiny": convnext}, cfg, 60)
    assert [row["layer"] for row in rows] == [0, 2, -1]
    convnext.layers, kept = (0, 2, -1), convnext.layers
    records = probing.linear_decodability(convnext, cfg, 60)
    convnext.layers = kept
    assert [row["grid"] for row in records] == ["16x16", "8x8", "2x2", "2x2"]


def test_maps_finer_than_the_image_are_folded():
    model = build("mobilenetv2_035", upscale=4.0, layers=(0, 3))
    assert model.grid(0) == (64, 64)
    records = probing.linear_decodability(model, config.Data(source="scenes:easy", size=SIZE, train=8, val=40), 40)
    assert [row["grid"] for row in records] == ["32x32", "16x16", "16x16"]


def test_stride_of_the_last_map():
    """Dilation keeps the weights and gives the deep stages a finer grid."""
    plain, dilated = build("mobilenetv2_035"), build("mobilenetv2_035", stride=16)
    assert plain.grid(-1) == (2, 2)
    assert [dilated.grid(k) for k in (3, 4, 5, -1)] == [(8, 8), (4, 4), (4, 4), (4, 4)]
    assert plain.net.state_dict().keys() == dilated.net.state_dict().keys()
    assert plain.fingerprint != dilated.fingerprint
    with pytest.raises(ConfigError, match=r"leave out vfm.stride 16"):
        build("swin_tiny_patch4_window7_224", stride=16)
    with pytest.raises(ConfigError, match=r"vfm.stride 16: 'pocket' has one grid"):
        vfm.build(config.VFM(name="pocket", stride=16), 32)


def test_null_stride_leaves_ids_alone():
    recipe = {"name": "x", "tokenizer": "plain_vae", "train": {"samples": 1}}
    same = [config.parse({**recipe, "vfm": v}).id for v in ({}, {"stride": None})]
    assert same[0] == same[1] != config.parse({**recipe, "vfm": {"stride": 16}}).id


@pytest.mark.parametrize("layers", [(0, 5), (-3,), (1, 1), ()])
def test_layers_that_do_not_exist(layers):
    with pytest.raises(ConfigError, match=r"vfm.layers .* has 4 stages; .* 0 \(first convolution\)"):
        build("convnext_atto", layers=layers)


def test_any_hierarchical_model_by_name():
    row = describe("convnext_atto")
    assert (row.timm, row.layers, row.size, row.patch, row.hierarchical) == ("convnext_atto.d2_in1k", (0, 2, -1), 224, 32, True)
    assert row.hub == "timm/convnext_atto.d2_in1k"
    assert not describe("vit_tiny_patch16_224").hierarchical
    model = vfm.build(config.VFM(name="timm:mobilenetv3_small_050", weights="random", upscale=2.0), SIZE)
    record = timm.get_pretrained_cfg("mobilenetv3_small_050")
    assert model.mean.flatten().tolist() == pytest.approx(record.mean)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("timm:convnext_atto", {"upscale": 1.1}, r"vfm.upscale .* multiple of its patch of 32"),
        ("timm:efficientformer_l1", {"upscale": 4.0}, "no feature maps at 128 px .* native 224 px"),
        ("timm:hiera_tiny_224", {"upscale": 4.0}, "no feature maps at 128 px"),
        ("dinov2_s14", {"upscale": 0.875, "stride": 16}, "has one grid for all layers"),
    ],
)
def test_what_does_not_fit_is_one_line(name, fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        vfm.build(config.VFM(name=name, weights="random", **fields), SIZE)
    assert "\n" not in str(caught.value)
