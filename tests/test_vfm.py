"""Frozen timm models: every row of the table, layers, sizes, weights files, and what goes wrong."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vfmlab import config, vfm
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.vfm.describe import describe
from vfmlab.vfm.pocket import PocketModel
from vfmlab.vfm.table import TABLE, Facts
from vfmlab.vfm.vit import TimmModel

ROWS = [row for row in TABLE.values() if row.hub]
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}
TINY = "vit_tiny_patch16_224.augreg_in21k"


def small(row: Facts, size: int, weights: str = "random", seed: int = 0, **options) -> TimmModel:
    """The row's architecture with 3 narrow blocks: every special token, norm and position embedding is kept."""
    layers = options.pop("layers", (0, 2, -1))
    return TimmModel(row, size, layers, weights=weights, seed=seed, **SMALL, **options)


FAMILIES = ("siglip2_b16_256", "dinov2_s14", "dinov2_s14_reg", "dinov3_s16", "eva_clip_b16", "mae_b16", "clip_b16")
families = pytest.mark.parametrize("row", [TABLE[name] for name in FAMILIES], ids=lambda row: row.name)


def images(size: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_say_what_timm_says(row: Facts):
    record = timm.get_pretrained_cfg(row.timm, allow_unregistered=False)
    assert row.timm in timm.list_pretrained(f"{row.timm.split('.')[0]}.*")
    assert (row.hub, row.size, row.interpolation) == (record.hf_hub_id, record.input_size[-1], record.interpolation)
    assert row.licence == record.license


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_gives_its_layers(row: Facts):
    """Full architectures without memory: shapes alone."""
    size = 3 * row.patch
    with torch.device("meta"):
        model = TimmModel(row, size, weights="random")
    maps, pooled = model.features(torch.empty(2, 3, size, size, device="meta"))
    assert model.net.patch_embed.patch_size == (row.patch, row.patch)
    assert row.layers == (0, model.depth // 2, -1)
    assert {layer: m.shape for layer, m in maps.items()} == {k: (2, model.width(k), 3, 3) for k in row.layers}
    assert pooled is not None
    assert pooled.shape == (2, model.width(-1))


def test_a_random_copy_is_the_random_model_of_the_same_architecture():
    """Its layers, size and options too, whatever weights it is made from."""
    twins = [(small(TABLE["dinov2_s14_reg"], 56, seed=seed, layers=(1, -1)), 56) for seed in (5, 0)]
    twins += [(vfm.build(config.VFM(name="timm:resnet10t", weights="random", seed=seed, upscale=2.0, stride=16), 32), 32) for seed in (5, 0)]
    trained = PocketModel(TABLE["pocket"], 32, weights="random", seed=5, width=32, heads=2)
    twins += [(trained, 32), (PocketModel(TABLE["pocket"], 32, weights="random", width=32, heads=2), 32)]
    for (one, size), (zero, _) in zip(twins[::2], twins[1::2], strict=True):
        copy = one.random_copy()
        assert copy.fingerprint == zero.fingerprint != one.fingerprint
        assert copy.layers == one.layers
        x = images(size)
        ours, theirs = (model.features(x).maps for model in (copy, zero))
        assert all(torch.equal(ours[layer], theirs[layer]) for layer in one.layers)


@families
def test_layers_are_the_sequences_between_blocks(row: Facts):
    model = small(row, 4 * row.patch, layers=(0, 1, 3, -1, -2))
    x = images(4 * row.patch)
    seen: list[torch.Tensor] = []
    for block in model.net.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.net.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    maps, _ = model.features(x)
    prefix = model.prefix_tokens
    assert prefix == {"siglip2_b16_256": 0, "dinov2_s14_reg": 5, "dinov3_s16": 5}.get(row.name, 1)
    final = model.net.forward_features(model.prepare(x))
    for layer, sequence in {0: seen[0], 1: seen[1], 3: seen[3], -2: seen[3], -1: final}.items():
        torch.testing.assert_close(maps[layer].flatten(2).transpose(1, 2), sequence[:, prefix:])
    assert not torch.allclose(maps[-1], maps[-2])


@families
def test_global_token(row: Facts):
    model = small(row, 2 * row.patch)
    x = images(2 * row.patch)
    _, pooled = model.features(x)
    final = model.net.forward_features(model.prepare(x))
    expected = model.net.attn_pool(final) if row.name.startswith("siglip") else final[:, 0]
    torch.testing.assert_close(pooled, expected)
    assert model.features(x, (0, 1)).pooled is None, "the global token comes with the last layer only"


@families
def test_any_size(row: Facts):
    model = small(row, 4 * row.patch)
    assert model.grid(0) == (4, 4)
    maps, _ = model.features(images(6 * row.patch))
    assert all(m.shape[-2:] == (6, 6) for m in maps.values())
    with pytest.raises(ConfigError, match=r"vfm.upscale .* multiple of its patch"):
        model.features(images(4 * row.patch + 1))


def test_an_upscale_that_leaves_nothing_is_one_line():
    with pytest.raises(ConfigError, match=r"upscale 0.001: images of 0 px enter 'pocket'.*use vfm.upscale=0.125 \(4 px\)"):
        vfm.build(config.VFM(upscale=0.001), 32)


def test_preparation_matches_timms_own():
    row = TABLE["clip_b16"]
    model = small(row, 32)
    data = timm.data.resolve_model_data_config(model.net)
    x = images(32)
    mean, std = (torch.tensor(data[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(model.prepare(x), ((x + 1) / 2 - mean) / std)
    doubled = small(row, 32, upscale=2.0)
    assert doubled.grid(-1) == (4, 4)
    expected = nn.functional.interpolate(x, (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(doubled.prepare(x) * std + mean, (expected + 1) / 2)
    assert doubled.features(x).maps[0].shape[-2:] == (4, 4)


@families
def test_frozen(row: Facts):
    model = small(row, 2 * row.patch)
    holder = nn.Sequential(model).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    x = images(2 * row.patch)
    assert not model.features(x).maps[-1].requires_grad
    x.requires_grad_(True)
    model.features(x).maps[-1].square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@families
def test_trainable_copy(row: Facts):
    """Everything that the layers read depends on takes gradients; heads, mask tokens and later blocks stay frozen."""
    model = small(row, 2 * row.patch)
    twin = model.trainable_copy((2,))
    x = images(2 * row.patch)
    torch.testing.assert_close(twin.features(x).maps[2], model.features(x, (2,)).maps[2])
    assert list(twin.features(x).maps) == [2]
    twin.features(x).maps[2].square().sum().backward()
    named = dict(twin.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == {name for name, p in named.items() if p.grad is not None}
    assert named["net.blocks.1.attn.proj.weight"].grad.abs().sum() > 0
    assert not any(p.requires_grad for name, p in named.items() if name.startswith(("net.blocks.2.", "net.norm.", "net.attn_pool")))
    assert not twin.train().training
    assert not any(p.requires_grad for p in model.parameters()), "the original stays frozen"
    with torch.no_grad():
        named["net.patch_embed.proj.weight"].mul_(2.0)
    assert not torch.allclose(twin.features(x).maps[2], model.features(x, (2,)).maps[2])
    assert not twin.requires_grad_(False).features(x).maps[2].requires_grad
    assert twin.state_dict().keys() == model.state_dict().keys()


@families
def test_autocast_is_close(row: Facts):
    model = small(row, 4 * row.patch)
    x = images(4 * row.patch)
    exact = model.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.features(x)
    for layer, value in exact.maps.items():
        assert rough.maps[layer].dtype == torch.float32
        assert (rough.maps[layer] - value).norm() < 0.05 * value.norm()


@families
def test_random_weights_are_a_function_of_the_seed(row: Facts):
    a, b, c = (small(row, 2 * row.patch, seed=seed) for seed in (0, 0, 1))
    assert a.fingerprint == b.fingerprint != c.fingerprint
    torch.testing.assert_close(a.features(images(2 * row.patch)).maps[-1], b.features(images(2 * row.patch)).maps[-1])
    state = torch.get_rng_state()
    small(row, 2 * row.patch)
    assert torch.equal(state, torch.get_rng_state()), "building a model must not move the caller's random numbers"


@families
def test_local_file(row: Facts, tmp_path):
    source = small(row, 4 * row.patch, seed=3)
    path = tmp_path / "model.safetensors"
    save_file({**source.net.state_dict(), "head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}, path)
    model = small(row, 4 * row.patch, weights=str(path))
    x = images(4 * row.patch)
    torch.testing.assert_close(model.features(x).maps[-1], source.features(x).maps[-1])
    assert len(model.fingerprint) == 16
    assert model.fingerprint != source.fingerprint
    larger = small(row, 8 * row.patch, weights=str(path))  # position embeddings are interpolated to the run's size
    big = images(8 * row.patch)
    torch.testing.assert_close(larger.features(big).maps[-1], source.features(big).maps[-1], rtol=1e-3, atol=1e-4)


def test_weights_that_do_not_fit(tmp_path):
    row = TABLE["dinov2_s14"]
    good = small(row, 28).net.state_dict()
    lost = "blocks.1.attn.qkv.weight"
    cases = {
        "missing": ({k: v for k, v in good.items() if k != lost}, f"1 missing: {lost}"),
        "unexpected": ({**good, "blocks.9.x": torch.zeros(2)}, r"1 unexpected: blocks.9.x"),
        "shape": ({**good, "norm.weight": torch.ones(7)}, r"norm.weight \[7\] instead of \[32\]"),
        "nan": ({**good, "norm.weight": torch.full((32,), float("nan"))}, "not finite"),
    }
    for name, (tensors, message) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            small(row, 28, weights=str(path))
        assert "\n" not in str(caught.value)


def test_files_that_are_not_weights(tmp_path):
    row = TABLE["dinov2_s14"]
    whole = tmp_path / "whole.safetensors"
    save_file(small(row, 28).net.state_dict(), whole)
    truncated, pickled, empty = (tmp_path / name for name in ("cut.safetensors", "model.pt", "empty.safetensors"))
    truncated.write_bytes(whole.read_bytes()[:-100])
    torch.save({"a": torch.zeros(1)}, pickled)
    empty.write_bytes(b"")
    for path, message in (
        (truncated, "truncated"), (pickled, "pickle"), (empty, "truncated"), (tmp_path / "none.safetensors", "no file"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message) as caught:
            small(row, 28, weights=str(path))
        assert "\n" not in str(caught.value)


def test_no_network_and_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        vfm.build(config.VFM(name="dinov2_s14"), 28)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors", "vfm.weights=PATH", str(tmp_path)):
        assert part in message


def test_cached_weights_are_found(tmp_path, monkeypatch):
    row = describe(TINY)
    repo = tmp_path / f"models--timm--{TINY}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "snapshots" / ("a" * 40)).mkdir(parents=True)
    source = vfm.build(config.VFM(name=f"timm:{TINY}", weights="random", seed=5), 32)
    save_file(source.net.state_dict(), repo / "snapshots" / ("a" * 40) / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = vfm.build(config.VFM(name=f"timm:{TINY}"), 32)
    assert row.hub == f"timm/{TINY}"
    torch.testing.assert_close(model.features(images(32)).maps[-1], source.features(images(32)).maps[-1])


def test_any_timm_vit_by_name():
    row = describe("deit3_small_patch16_224.fb_in1k")
    assert (row.layers, row.size, row.patch, row.licence) == ((0, 6, -1), 224, 16, "apache-2.0")
    assert describe("vit_tiny_patch16_224").timm.startswith("vit_tiny_patch16_224.")
    model = vfm.build(config.VFM(name=f"timm:{TINY}", weights="random", layers=(5, -2)), 48)
    assert {k: m.shape for k, m in model.features(images(48)).maps.items()} == {5: (2, 192, 3, 3), -2: (2, 192, 3, 3)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dinov2_b15", "did you mean 'dinov2_b14"),
        ("timm:vit_tiny_patch16_225", "timm knows no such model .*vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.nonsense", "timm knows no such model"),
    ],
)
def test_unknown_or_unfit_names(name: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        vfm.build(config.VFM(name=name, weights="random"), 224)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [(0, 13), (-3,), (1, 1), ()])
def test_layers_that_do_not_exist(layers):
    with pytest.raises(ConfigError, match=r"vfm.layers .* has 3 blocks"):
        small(TABLE["dinov2_s14"], 28, layers=layers)


def test_size_that_the_patch_does_not_divide():
    with pytest.raises(ConfigError, match=r"multiple of its patch of 14; use vfm.upscale=0.984375 \(252 px\)"):
        small(TABLE["dinov2_s14"], 256)
    assert small(TABLE["dinov2_s14"], 256, upscale=0.875).grid(0) == (16, 16)
