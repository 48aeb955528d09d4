"""Released weights: reading files safely, the table, and importing reference checkpoints into run directories."""

from __future__ import annotations

import json
import pickle
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vfmlab import api, config, runs, vfm
from vfmlab.cli import main
from vfmlab.config.files import read_mapping
from vfmlab.errors import CheckpointError, ConfigError, RunError
from vfmlab.registry import IMPORTERS, TOKENIZERS
from vfmlab.tokenizers import sd_vae
from vfmlab.vfm import TABLE as VFMS
from vfmlab.vfm import Features
from vfmlab.weights import export, import_state_dict, io, statistics, table
from vfmlab.weights.families import vfm_vae
from vfmlab.weights.import_release import Release, draft, import_run, open_release

SCENES = {"data.source": "scenes:easy", "data.train": 48, "data.val": 16}


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def brought_in(release, root, overrides=None, tokenizer=None, **more):
    """The run of a release, imported, and what was told."""
    run = draft(release, overrides, root, tokenizer)
    events = list(import_run(run, root, release=release, **more))
    assert [events[0].kind, events[-1].kind] == ["start", "finish"]
    assert runs.open_run(run.id, root).status().state == "finished"
    return run, [event.data["message"] for event in events if event.kind == "warning"]


# -- files ----------------------------------------------------------------------------------------------------------

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}


def same(found, wanted=STATE):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": {"b": torch.zeros(1)}, "ema": s, "opt": {"lr": 0.1}, "steps": torch.tensor(5)},
        lambda s: {"ema": {"module." + key: value for key, value in s.items()}},
        lambda s: {"model": {"state_dict": {"module._orig_mod." + key: value for key, value in s.items()}}},
        lambda s: {"G": {"b": torch.zeros(1)}, "D": {"b": torch.zeros(1)}, "G_ema": s},
    ],
)
def test_wrapped_checkpoints_are_opened(wrap, tmp_path):
    torch.save(wrap(STATE), tmp_path / "x.pt")
    same(io.unwrap(io.read_released(tmp_path / "x.pt")))


@pytest.mark.parametrize("prefix", ["first_stage_model.", "_orig_mod.module.", "module._orig_mod.first_stage_model."])
def test_known_prefixes_are_dropped_in_any_order(prefix, tmp_path):
    torch.save({"state_dict": {prefix + key: value for key, value in STATE.items()}}, tmp_path / "x.pt")
    same(io.unwrap(io.read_released(tmp_path / "x.pt")))


def test_the_autoencoder_of_a_whole_latent_diffusion_model():
    whole = {f"first_stage_model.{key}": value for key, value in STATE.items()} | {"model.diffusion_model.x": torch.ones(1)}
    same(io.unprefixed(whole))


def test_safetensors_and_a_prefix_that_not_all_have(tmp_path):
    save_file({**STATE, "module.c": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert set(io.unwrap(io.read_released(tmp_path / "x.safetensors"))) == {*STATE, "module.c"}


class Malice:
    def __reduce__(self):
        return Path.touch, (Path(Malice.target),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(save, tmp_path):
    Malice.target = str(tmp_path / "ran")
    save({"ema": STATE, "args": Malice()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="could run code") as error:
        io.read_released(tmp_path / "x.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


# -- strict loading ---------------------------------------------------------------------------------------------------


def module():
    net = torch.nn.Module()
    net.a, net.standardise = torch.nn.BatchNorm1d(2), torch.nn.Module()
    net.register_buffer("stat_std", torch.ones(2))
    net.standardise.register_buffer("std", torch.ones(2))
    return net


NAN = torch.tensor([1.0, float("nan")])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"a.weight": NAN}, "1 not finite: a.weight; these weights are damaged"),
        ({"a.weight": -NAN, "a.bias": torch.tensor([0, float("inf")])}, "2 not finite"),
        ({"stat_std": torch.tensor([1.0, 0.0])}, "1 not positive: stat_std"),
        ({"stat_std": torch.tensor([1.0, -1.0])}, "1 not positive: stat_std"),
        ({"stat_std": NAN}, "1 not finite: stat_std"),
        ({"standardise.std": torch.zeros(2)}, "1 not positive: standardise.std"),
        ({"a.weight": torch.ones(2, dtype=torch.complex64)}, "1 of another type: a.weight complex64 instead of float32"),
        ({"a.weight": torch.ones(2, dtype=torch.int8)}, "a.weight int8 instead of float32"),
        ({"a.weight": torch.ones(2, dtype=torch.bool)}, "a.weight bool instead of float32"),
        ({"a.weight": torch.ones(2).to(torch.float8_e4m3fn)}, "a.weight float8_e4m3fn instead of float32"),
        ({"a.weight": torch.ones(2).to_sparse()}, r"a.weight float32 \(sparse\) instead of float32"),
        ({"a.num_batches_tracked": torch.tensor(1.5)}, "a.num_batches_tracked float32 instead of int64"),
        ({"a.weight": torch.ones(3)}, r"1 of another shape: a.weight \[3\] instead of \[2\]; give the configuration"),
        ({"a.weight": None, "b": torch.ones(1)}, "1 missing: a.weight; 1 unexpected: b; give the configuration"),
    ],
)
def test_what_cannot_take_the_place_of_the_weights_is_one_line_and_changes_nothing(change, line, tmp_path):
    net = module()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {key: value for key, value in {**before, **change}.items() if value is not None}
    for attempt in (lambda: io.load(net, state, "test"), lambda: io.load_file(net, tmp_path / "x.safetensors")):
        if not any(value.is_sparse for value in state.values()):
            save_file(state, tmp_path / "x.safetensors")
            with pytest.raises(CheckpointError, match=line) as error:
                attempt()
            assert "\n" not in str(error.value)
    same(net.state_dict(), before)


def test_half_precision_and_short_integers_are_converted():
    net = module()
    state = {key: value.half() if value.is_floating_point() else value.int() for key, value in net.state_dict().items()}
    io.load(net, {**state, "a.weight": torch.tensor([2.0, 3.0]).bfloat16()}, "test")
    assert net.a.weight.tolist() == [2, 3]


@pytest.mark.parametrize("family", ["va-vae", "sd-vae", "vfm-vae", "rae-decoder", "lightningdit", "dit-dh", "sit", "repa", "sit-reg", "patchgan"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.uint8, torch.bool, torch.float8_e5m2])
def test_no_importer_computes_with_what_no_weights_are(family, dtype):
    with pytest.raises(CheckpointError, match=f"{family} checkpoint: 1 of another type than weights are: final.weight {str(dtype)[6:]}"):
        import_state_dict(family, {"final.weight": torch.ones(2, 2).to(dtype), "b": torch.ones(1)}, {})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ch": None}, "TypeError"), ({"ch_mult": None}, "TypeError"), ({"resolution": "x"}, "ValueError"), ({"resolution": 0}, "ZeroDivision"),
        ({"weights": torch.zeros(())}, "of another shape"), ({"weights": [1.0]}, "AttributeError"),
    ],
)  # fmt: skip
def test_importers_compute_with_no_nulls_and_words(change, line, golden):
    options = json.loads((golden / "ldm_vae_small_config.json").read_text())
    options = {"embed_dim": 8} | {k: options[k] for k in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution")}
    state = part(load_file(golden / "ldm_vae_small.safetensors"), "sd.")
    state |= {"quant_conv.weight": change["weights"]} if "weights" in change else {}
    with pytest.raises((ConfigError, CheckpointError), match=rf"va-vae.*{line}") as error:
        import_state_dict("va-vae", state, options | change if "weights" not in change else options)
    assert "\n" not in str(error.value)


def test_a_prefix_that_is_not_known_is_named():
    with pytest.raises(CheckpointError, match="all names begin with 'wrapped.': save the state dict of that part alone"):
        io.load(module(), {f"wrapped.{key}": value for key, value in module().state_dict().items()}, "test")


# -- weights in several files, folders --------------------------------------------------------------------------------


def in_parts(folder, state=STATE, name="model"):
    """`state` as one tensor a file, with an index, as the hub's libraries write large weights."""
    names = {key: f"{name}-{i + 1:05d}-of-{len(state):05d}.safetensors" for i, key in enumerate(state)}
    for key, file in names.items():
        save_file({key: state[key].contiguous()}, folder / file)
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder / f"{name}.safetensors.index.json"


def test_weights_in_several_files(tmp_path):
    index = in_parts(tmp_path)
    same(io.unwrap(io.read_released(index)))
    before = io.sha256(index)
    with pytest.raises(CheckpointError, match="one part of several; give 'model.safetensors.index.json'"):
        io.read(tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    assert io.sha256(index) != before
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="names 'model-00002-of-00002.safetensors', which is not beside it"):
        io.read(index)
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="index.json' (is no index|does not name files beside it)"):
            io.read(index)


def test_folders_of_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        io.in_folder(tmp_path)
    with pytest.raises(CheckpointError, match="no folder '.*nowhere'; give one"):
        io.in_folder(tmp_path / "nowhere")
    index = in_parts(tmp_path)
    assert io.in_folder(tmp_path) == (index, None)
    vae = tmp_path / "pipeline" / "vae"
    vae.mkdir(parents=True)
    (vae.parent / "model_index.json").write_text("{}")
    save_file(STATE, vae / "diffusion_pytorch_model.safetensors")
    (vae / "config.json").write_text("{}")
    assert io.in_folder(vae.parent) == (vae / "diffusion_pytorch_model.safetensors", vae / "config.json")
    save_file(STATE, vae / "other.safetensors")
    with pytest.raises(CheckpointError, match="holds several weights"):
        io.in_folder(vae)


def test_files_that_cannot_be_read(tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    save_file(STATE, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=r"truncated.*again"):
            io.read_released(tmp_path / f"cut.{name}")
    with pytest.raises(CheckpointError, match="no file"):
        io.read_released(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="holds lr, steps"):
        io.unwrap({"lr": 1, "steps": [2]}, "x.pt")
    with pytest.raises(CheckpointError, match="mixes tensors with other entries under 'ema', e.g. 'lr'"):
        io.unwrap({"ema": {**STATE, "lr": 0.1}}, "x.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        io.unwrap([1], "x.pt")


def test_no_length_of_its_header_makes_safetensors_a_pickle(tmp_path):
    """The first bytes of a safetensors file are that length: 0x80.. is how pickles begin, too."""
    seen = set()
    for n in range(0, 512, 8):
        save_file(STATE, tmp_path / "x.safetensors", {"padding": "x" * n})
        seen.add((tmp_path / "x.safetensors").read_bytes()[:2])
        same(io.read_released(tmp_path / "x.safetensors"))
        same(io.read(tmp_path / "x.safetensors")[0])
    assert any(start in seen for start in (b"\x80\x02", b"\x80\x01"))


def test_another_file_than_expected(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    found = io.sha256(tmp_path / "x.safetensors")
    assert io.sha256(tmp_path / "x.safetensors", found) == found
    with pytest.raises(CheckpointError, match=f"has SHA-256 {found}, but 0000"):
        io.sha256(tmp_path / "x.safetensors", "0" * 64)


def test_without_a_network_the_file_to_pass_is_named(monkeypatch, tmp_path):
    def no_network(*args, **more):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(io, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    row = table.get("va_vae_f16d32")
    with pytest.raises(CheckpointError) as error:
        open_release(row.name)
    line = str(error.value)
    assert row.file in line
    assert row.repo in line
    assert line.endswith("--file PATH")
    with pytest.raises(CheckpointError, match="'repa_xl_2' is not on the hub.*'last.pt'.*--file PATH"):
        open_release("repa_xl_2")


def test_statistics_files(tmp_path):
    mean, std = torch.randn(3, 4, 4), torch.rand(3, 4, 4) + 0.5
    torch.save({"mean": mean.mean((1, 2)).view(1, 3, 1, 1), "std": std.mean((1, 2)).view(1, 3, 1, 1)}, tmp_path / "c.pt")
    found = statistics.read(tmp_path / "c.pt")
    close(found[0].float(), mean.mean((1, 2)), 1e-6)
    assert found[1].shape == (3,)
    save_file({"mean": mean, "var": std.square()}, tmp_path / "p.safetensors")
    per_place = statistics.read(tmp_path / "p.safetensors", eps=1e-5)
    close(per_place[1].float(), (std.square() + 1e-5).sqrt(), 1e-6)
    pooled = statistics.per_channel(*per_place)
    draws = mean + std * torch.randn(20_000, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    close(pooled[0].float(), draws.mean((0, 2, 3)), 0.02)
    close(pooled[1].float(), draws.std((0, 2, 3)), 0.02)


C = ([0.5, -1.0, 2.0], [1.0, 2.0, 4.0])  # mean and std of three channels


def shaped(form):
    return tuple(form(torch.tensor(value)) for value in C)


@pytest.mark.parametrize("names", [("mean", "std"), ("latents_mean", "latents_std"), ("latent_mean", "latent_std"), ("mean", "var")])
@pytest.mark.parametrize(
    "form", [lambda v: v, lambda v: v[None], lambda v: v.view(1, 3, 1, 1), lambda v: v.view(3, 1, 1), lambda v: v.double(), lambda v: v.tolist()]
)
@pytest.mark.parametrize("kind", ["pt", "safetensors", "npz", "json"])
def test_statistics_in_every_form(names, form, kind, tmp_path):
    mean, std = shaped(lambda v: v)
    entries = dict(zip(names, (form(mean), form(std.square() if names[1] == "var" else std)), strict=True))
    path = tmp_path / f"x.{kind}"
    if kind == "pt":
        torch.save(entries, path)
    elif kind == "safetensors":
        save_file({key: torch.as_tensor(value).contiguous() for key, value in entries.items()}, path)
    elif kind == "npz":
        np.savez(path, **{key: np.asarray(value) for key, value in entries.items()})
    else:
        path.write_text(json.dumps({key: torch.as_tensor(value).tolist() for key, value in entries.items()}))
    assert [value.tolist() for value in statistics.read(path)] == [list(values) for values in C]


@pytest.mark.parametrize(
    ("content", "mean", "std"),
    [
        ({"scaling_factor": 0.5}, [0], [2]),
        ({"scaling_factor": 0.5, "shift_factor": 0.25, "latents_mean": None}, [0.25], [2]),
        ({"latents_mean": [1, 2], "latents_std": [3, 4]}, [1, 2], [3, 4]),
        ({"latents_mean": [1, 2], "latents_std": [3, 4], "scaling_factor": 0.5, "shift_factor": None}, [1, 2], [6, 8]),
        ({"act_fn": "silu"}, None, None),
    ],
)
def test_statistics_of_diffusers_configs(content, mean, std, tmp_path):
    found = statistics.of_config(content, "config")
    assert (found and [value.tolist() for value in found]) == (mean and [mean, std])
    if found:
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert [value.tolist() for value in statistics.read(tmp_path / "config.json")] == [mean, std]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"std": [1.0]}, "hold std, but not a mean"),
        ({"mean": [1.0]}, "hold mean, but not a std or variance"),
        ({}, "hold nothing, but not a mean"),
        ({"mean": [[1.0, 2], [3, 4]], "std": [[1.0, 2], [3, 4]]}, r"'mean' has shape \[2, 2\], neither per channel"),
        ({"mean": [1.0, 2], "std": [1.0]}, r"std has shape \[1\], the mean \[2\]"),
        ({"mean": [0.0], "std": [-1.0]}, "std must be positive"),
        ({"mean": [0.0], "std": [0.0]}, "std must be positive"),
        ({"mean": [0.0], "std": [float("nan")]}, "std must be positive and all values finite"),
        ({"mean": [float("inf")], "std": [1.0]}, "all values finite"),
        ({"mean": [0.0], "var": [-1.0]}, "std must be positive"),
        ({"mean": "0", "std": "1"}, "'mean' is no list, array or tensor of real numbers"),
        ({"mean": [True], "std": [1.0]}, "'mean' is no list"),
        ({"mean": [[1.0], [1.0, 2]], "std": [1.0]}, "'mean' is no list"),
        ({"mean": [], "std": []}, "'mean' is no list"),
        ({"scaling_factor": 0.0}, "std must be positive"),
        ({"scaling_factor": None, "shift_factor": None}, "not a mean"),
        ({"scaling_factor": -1.0}, "std must be positive"),
        ({"scaling_factor": "x"}, "'scaling_factor' is no list"),
        ([1.0], "hold a list"),
    ],
)
def test_what_are_no_statistics_is_one_line(content, line, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    (tmp_path / "x.json").write_text(json.dumps(content))
    for name in ("x.pt", "x.json"):
        with pytest.raises(CheckpointError, match=line) as error:
            statistics.read(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.json", b"{"), ("x.json", b"[" * 100_000), ("x.json", b"\xff\xfe"), ("x.json", None), ("x.npz", b"PK"), ("x.npz", b"x"), ("x.npz", None),
     ("x.npz", b"PK\x03\x04" + bytes(60))],
)
def test_statistics_files_that_cannot_be_read(name, content, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"cannot be read as {name[2:]}") as error:
        statistics.read(tmp_path / name)
    assert "\n" not in str(error.value)


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    Malice.target = str(tmp_path / "ran")
    np.savez(tmp_path / "x.npz", mean=np.array([Malice()], dtype=object), std=np.ones(1))
    with pytest.raises(CheckpointError, match="cannot be read as npz"):
        statistics.read(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()


# -- the table ------------------------------------------------------------------------------------------------------


def test_rows_are_whole():
    for name in table.names():
        row = table.get(name)
        assert row.family in IMPORTERS
        assert row.config
        assert row.file
        assert row.repo or row.note
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256)
        assert row.revision is None or re.fullmatch("[0-9a-f]{40}", row.revision)
        assert row.vfm is None or row.vfm["name"] in VFMS
        if row.kind == "diffusion":
            assert table.get(row.tokenizer).kind == "tokenizer"
        config.override(config.Recipe(name="x", data={}, tokenizer={"method": "plain_vae"}, imported={"name": name}), {
            f"protocol.{key}": value for key, value in row.protocol.items()
        })  # fmt: skip
    assert set(vfm_vae.VFMS.values()) <= set(VFMS)


def test_sizes_are_those_of_the_networks():
    """A safetensors file is its tensors in fp32 and a header of less than 100 kB."""
    pytest.importorskip("diffusers")
    for name in ("sd_vae_mse", "sd_vae_ema"):
        row = table.get(name)
        with torch.device("meta"):
            net = TOKENIZERS.get("sd_vae")(TOKENIZERS.get("sd_vae").Config(), 256)
        assert 0 < row.size - 4 * sum(p.numel() for p in net.parameters()) < 100_000


def test_the_manual_names_every_release_with_its_file():
    text = (Path(__file__).parents[1] / "docs" / "released_weights.md").read_text(encoding="utf-8")
    for name in table.names():
        row = table.get(name)
        [line] = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert row.licence in line
        for fact in (row.file, row.repo, row.revision and row.revision[:8], row.sha256 and row.sha256[:8], row.size and f"{row.size:,}"):
            assert fact is None or fact in line, f"{name}: '{fact}' is not in its row"


def test_unknown_names():
    with pytest.raises(ConfigError, match="did you mean 'va_vae_f16d32'"):
        table.get("va_vae_f16d23")
    with pytest.raises(ConfigError, match="makes no run; from Python"):
        table.get("patchgan")
    assert table.get("sd-vae").file == table.get("sd_vae_ema").file


def test_published_sizes(golden):
    """Configs of the table on the meta device: shapes and parameters as the releases have them."""
    released = json.loads((golden / "vfmvae_full_param_counts.json").read_text())["legacy_true"]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in released["state_dict"].items()}
        module = import_state_dict("vfm-vae", state, table.get("vfm_vae_f16d32").config)
        assert module.latent_shape == (32, 16, 16)
        assert sum(p.numel() for p in module.parameters()) == 139_770_680
        sections = IMPORTERS.get("vfm-vae").sections(module, table.get("vfm_vae_f16d32").config)
    assert sections["vfm"] == {"name": "siglip2_l16_512", "layers": [0, 12, -1], "upscale": 2.0}


# -- config files of releases ---------------------------------------------------------------------------------------


def test_config_files(tmp_path):
    tree = {
        "data": {"image_size": 256, "num_classes": 1000}, "vae": {"downsample_ratio": 16},
        "model": {"model_type": "LightningDiT-XL/1", "use_qknorm": False, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True,
                  "wo_shift": False, "in_chans": 32},
        "sample": {"cfg_scale": 6.7},
    }  # fmt: skip
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    found = IMPORTERS.get("lightningdit").arguments(read_mapping(tmp_path / "x.yaml", "--config"))
    assert found == table.get("lightningdit_xl_800ep").config
    row = table.get("va_vae_f16d32")
    ldm = {"ckpt_path": "x", "model": {"target": "ldm", "params": {**row.config, "lossconfig": {"disc_start": 1}}}}
    assert IMPORTERS.get("va-vae").arguments(ldm) == {"embed_dim": 32, **row.config["ddconfig"]}
    rae = {"stage_1": {"params": {}}, "stage_2": {"target": "x", "params": table.get("dit_dh_xl").config}}
    assert IMPORTERS.get("dit-dh").arguments(rae) == table.get("dit_dh_xl").config
    assert IMPORTERS.get("sit").arguments({"model": "SiT-B/2"}) == {
        "hidden_size": 768, "depth": 12, "num_heads": 12, "patch_size": 2,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="SiT-Q/2"):
        IMPORTERS.get("sit").arguments({"model": "SiT-Q/2"})
    with pytest.raises(ConfigError, match="'embed_dim' and 'ddconfig'"):
        IMPORTERS.get("va-vae").arguments(tree)
    with pytest.raises(ConfigError, match="'z_dimension'"):
        IMPORTERS.get("vfm-vae").arguments(tree)


def test_aliases_of_yaml_do_not_hang():
    circle: dict = {"a": {}}
    circle["a"]["b"] = circle
    laughs: list = ["ha"]
    for _ in range(64):
        laughs = [laughs, laughs]
    for tree in (circle, {"a": laughs}):
        with pytest.raises(ConfigError, match="'embed_dim'"):
            IMPORTERS.get("va-vae").arguments(tree)


def test_config_files_with_empty_sections(tmp_path, golden):
    (tmp_path / "x.yaml").write_text("model: {model_type: LightningDiT-XL/1}\ndata:\nvae:\n")
    with pytest.raises(ConfigError, match="lightningdit: the config .*TypeError"):
        open_release("lightningdit", golden / "lightningdit_small_weights.safetensors", tmp_path / "x.yaml")


def test_config_files_that_are_none(tmp_path):
    (tmp_path / "x.yaml").write_text("!!python/object/apply:os.system ['true']")
    (tmp_path / "y.yaml").write_text("- 1")
    for name, complaint in (("x.yaml", "used as YAML"), ("y.yaml", "a list"), ("z.yaml", "cannot be read")):
        with pytest.raises(ConfigError, match=complaint):
            read_mapping(tmp_path / name, "--config")


# -- tokenizers into run directories ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ldm(golden):
    return load_file(golden / "ldm_vae_small.safetensors"), json.loads((golden / "ldm_vae_small_config.json").read_text())


@pytest.fixture(scope="module")
def va_vae(ldm, tmp_path_factory):
    """(folder, release, run) of the reference autoencoder, imported from a wrapped pickle with a statistics file."""
    folder = tmp_path_factory.mktemp("va_vae")
    torch.save({"state_dict": part(ldm[0], "sd."), "global_step": 7}, folder / "release.ckpt")
    settings = {key: ldm[1][key] for key in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "resolution")}
    (folder / "release.yaml").write_text(yaml.safe_dump({"model": {"params": {"embed_dim": 8, "ddconfig": settings}}}))
    torch.save({"mean": torch.full((1, 8, 1, 1), 0.25), "std": torch.full((1, 8, 1, 1), 2.0)}, folder / "latents_stats.pt")
    release = open_release("va-vae", folder / "release.ckpt", folder / "release.yaml")
    run, warnings = brought_in(release, folder, SCENES, statistics_from=folder / "latents_stats.pt")
    assert not warnings
    return folder, release, run


@torch.no_grad()
def test_va_vae_gives_the_stored_outputs(va_vae, ldm):
    folder, release, run = va_vae
    stored = part(ldm[0], "io.")
    for ema in (True, False):
        tokenizer = api.load_tokenizer(run.id, folder, ema=ema, on="cpu")
        posterior = tokenizer.posterior(stored["x"])
        close(posterior.mean, stored["mean"], 2e-5)
        close(posterior.logvar, stored["logvar"], 2e-5)
        close(tokenizer.decode_raw(stored["mean"])[0], stored["image"], 2e-5)
    close(tokenizer.encode(stored["x"]).mean, (stored["mean"] - 0.25) / 2, 2e-5)
    assert tokenizer.latent_shape == (8, 8, 8)
    facts = io.metadata(runs.open_run(run.id, folder).ema)
    assert facts["imported_sha256"] == release.sha256
    assert facts["statistics"] == "latents_stats.pt"


def test_an_imported_run_is_like_any_other(va_vae):
    folder, release, run = va_vae
    opened = runs.open_run(run.id, folder)
    assert opened.config() == run
    assert load_file(opened.latent_stats)["std"].tolist() == [2.0] * 8
    assert [event.kind for event in import_run(run, folder, release=release)] == ["skip"]
    assert [event.kind for event in api.train(run, folder)] == ["skip"]
    originals, restored, _ = api.reconstruct(run.id, torch.zeros(1, 3, 32, 32), folder)
    assert originals.shape == restored.shape


def test_missing_statistics_are_measured_on_the_runs_data(va_vae):
    folder, release, _ = va_vae
    run, warnings = brought_in(release, folder, {**SCENES, "name": "measured_imported"})
    assert len(warnings) == 1
    assert "measured on scenes:easy" in warnings[0]
    tokenizer = api.load_tokenizer(run.id, folder, on="cpu")
    with torch.no_grad():
        images = api.data.to_float(api.data.open_source(run.data, "train").batch(torch.arange(48)).images)
        z = tokenizer.encode(images).mean
    close(z.mean((0, 2, 3)), torch.zeros(8), 1e-3)
    close(z.std((0, 2, 3), correction=0), torch.ones(8), 1e-3)
    assert int(tokenizer.stat_count) == 48


def test_another_file_needs_another_name(va_vae, tmp_path):
    folder, release, run = va_vae
    torch.save({"state_dict": release.module.state_dict()}, tmp_path / "other.pt")
    other = type(release)(release.row, tmp_path / "other.pt", "f" * 64, release.settings, release.module)
    with pytest.raises(RunError, match="another file.*--set name=NAME"):
        list(import_run(run, folder, release=other))


def test_other_statistics_need_another_name(va_vae, tmp_path):
    """The run that is there is not changed, so the command must not sound as if it were."""
    folder, release, run = va_vae

    def again(statistics_from):
        return [event.kind for event in import_run(run, folder, release=release, statistics_from=statistics_from)]

    assert again(None) == again(folder / "latents_stats.pt") == ["skip"]
    for name in ("other.pt", "latents_stats.pt"):  # the second: the same name, corrected
        torch.save({"mean": torch.zeros(8), "std": torch.ones(8)}, tmp_path / name)
        with pytest.raises(RunError, match=r"other latent statistics \(latents_stats.pt\).*--set name=NAME"):
            again(tmp_path / name)
    with pytest.raises(RunError, match="other latent statistics"):
        again("measured")


def test_an_import_that_is_stopped_did_not_fail(va_vae, tmp_path):
    _, release, run = va_vae
    events = import_run(run, tmp_path, release=release)
    assert next(events).kind == "start"
    events.close()
    status = runs.open_run(run.id, tmp_path).status()
    assert (status.state, status.message) == ("interrupted", "stopped by hand; start it again to import it")


def test_what_does_not_fit_is_one_line_and_leaves_a_failed_run(va_vae, ldm, tmp_path):
    folder, release, run = va_vae
    state = part(ldm[0], "sd.")
    save_file({**state, "quant_conv.weight": torch.zeros(16, 16, 3, 3)}, tmp_path / "shape.safetensors")
    save_file({key: value for key, value in state.items() if key != "quant_conv.weight"}, tmp_path / "lack.safetensors")
    for name, complaint in (("shape", "of another shape: quant.weight"), ("lack", "1 missing: quant.weight")):
        with pytest.raises(CheckpointError, match=complaint) as error:
            open_release("va-vae", tmp_path / f"{name}.safetensors", folder / "release.yaml")
        assert "\n" not in str(error.value)
    changed = config.override(run, {"name": "wider_imported", "tokenizer.attention": []})
    with pytest.raises(ConfigError, match=r"tokenizer.attention = \[\].*were made with \[8\]"):
        list(import_run(changed, tmp_path, release=release, statistics_from="measured"))
    assert runs.open_run(changed.id, tmp_path).status().state == "failed"
    torch.save({"mean": torch.zeros(5), "std": torch.ones(5)}, tmp_path / "five.pt")
    with pytest.raises(CheckpointError, match=r"are for latents of \(5,\), the run has \(8, "):
        list(import_run(run, tmp_path, release=release, statistics_from=tmp_path / "five.pt"))
    again = import_run(run, tmp_path, release=release, statistics_from=folder / "latents_stats.pt")
    assert [event.kind for event in again][-1] == "finish"
    with pytest.raises(ConfigError, match="no imported weights"):
        list(import_run(api.resolve("tiny_plain_vae").phases()[0], tmp_path))


@torch.no_grad()
def test_vfm_vae_gives_the_stored_outputs(golden, tmp_path):
    """The reference has features of width 192 on an 8 x 8 grid: those of a ViT-tiny at twice 64 px."""
    io = load_file(golden / "vfmvae_small_io.safetensors")
    settings = json.loads((golden / "vfmvae_small_config.json").read_text())["config"]
    settings["vfm_name"] = "timm:vit_tiny_patch16_224.augreg_in21k"
    generator = {key: value for key, value in settings.items() if key != "img_resolution"}
    (tmp_path / "release.yaml").write_text(yaml.safe_dump({"G_kwargs": generator, "data": {"img_resolution": 64}}))
    torch.save({"G": {"x": torch.zeros(1)}, "G_ema": load_file(golden / "vfmvae_small_weights.safetensors")}, tmp_path / "release.pth")
    release = open_release("vfm-vae", tmp_path / "release.pth", tmp_path / "release.yaml")
    run, _ = brought_in(release, tmp_path, {**SCENES, "vfm.weights": "random"})
    tokenizer = api.load_tokenizer(run.id, tmp_path, on="cpu")
    posterior = tokenizer.encode_features([io[f"in.features.{i}"] for i in range(3)])
    close(posterior.mean, io["out.mean"], 1e-4)
    close(posterior.logvar, io["out.logvar"], 1e-4)
    image, *lower = tokenizer.decode_raw(io["out.mean"])
    close(image, io["out.img"], 1e-4)
    for i, output in enumerate(lower):
        close(output, io[f"out.multiscale.{i}"], 1e-4)
    images = torch.zeros(1, 3, 64, 64)
    assert tokenizer.decode(tokenizer.encode(images).mean).shape == images.shape


class Patches(torch.nn.Module):
    """A VFM of width 48 whose tokens are the pixels of 8 x 8 patches, cut and repeated."""

    layers, depth, fingerprint, upscale = (-2,), 2, "patches", 1.0

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))

    def width(self, layer):
        return 48

    def grid(self, layer):
        return 4, 4

    def features(self, images, layers):
        maps = torch.nn.functional.pixel_unshuffle(images, 8)[:, ::4]
        return Features(dict.fromkeys(layers, maps), None)


@torch.no_grad()
def test_rae_gives_the_stored_outputs(golden, tmp_path, monkeypatch):
    tensors = load_file(golden / "rae_small.safetensors")
    monkeypatch.setattr(vfm, "build", lambda cfg, size: Patches())
    (tmp_path / "config.json").write_text(json.dumps(json.loads((golden / "rae_small_config.json").read_text())["decoder"]))
    torch.save(part(tensors, "sd.decoder."), tmp_path / "model.pt")
    mean, var = torch.randn(48, 4, 4), torch.rand(48, 4, 4) + 0.5
    torch.save({"mean": mean, "var": var}, tmp_path / "stat.pt")
    release = open_release("rae-decoder", tmp_path / "model.pt", tmp_path / "config.json")
    run, warnings = brought_in(release, tmp_path, {**SCENES, "vfm.name": "pocket"}, statistics_from=tmp_path / "stat.pt")
    assert not warnings
    tokenizer = api.load_tokenizer(run.id, tmp_path, on="cpu")
    center, spread = statistics.per_channel(mean, var.sqrt())
    tokens = tensors["io.dec.in"].transpose(1, 2).unflatten(2, (4, 4))
    z = (tokens - center.view(1, -1, 1, 1)) / spread.view(1, -1, 1, 1)
    pixels = tensors["io.dec.image"] * tokenizer.vfm.std + tokenizer.vfm.mean
    close(tokenizer.decode_raw(z)[0], 2 * pixels - 1, 2e-5)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = (tokenizer.tokens(images) - mean) / var.sqrt()  # as the release normalises: for every place
    close(tokenizer.encode(images).mean, expected, 1e-5)
    z = (tokens - mean) / var.sqrt()
    close(tokenizer.decode(z), (2 * pixels - 1).clamp(-1, 1), 2e-5)
    back = export.from_pretrained(export.save_pretrained(run.id, tmp_path / "out", tmp_path), on="cpu")
    assert torch.equal(back.encode(images).mean, tokenizer.encode(images).mean)
    torch.save({"mean": mean[:, :2, :2], "var": var[:, :2, :2]}, tmp_path / "small.pt")
    with pytest.raises(CheckpointError, match=r"for latents of \(48, 2, 2\), the run has \(48, 4, 4\)"):
        brought_in(release, tmp_path, {**SCENES, "vfm.name": "pocket", "seed": 1}, statistics_from=tmp_path / "small.pt")
    measured, warnings = brought_in(release, tmp_path, {**SCENES, "vfm.name": "pocket", "name": "m_imported"}, statistics_from="measured")
    assert "measured on" in warnings[0]
    assert api.load_tokenizer(measured.id, tmp_path, on="cpu").standardise.std.min() > 1e-5


@torch.no_grad()
def test_sd_vae_is_diffusers_network(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16),
        norm_num_groups=4, latent_channels=4, layers_per_block=1, sample_size=16, scaling_factor=0.2,
    ).eval()  # fmt: skip
    net.save_pretrained(tmp_path / "new")
    file = "diffusion_pytorch_model.safetensors"
    old = {}
    for key, value in load_file(tmp_path / "new" / file).items():  # the names of files of 2022
        for theirs, ours in sd_vae.OLD_ATTENTION.items():
            key = key.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        old[key] = value
    assert any("proj_attn" in key for key in old)
    save_file(old, tmp_path / "old.safetensors")
    save_file({"mean": torch.zeros(4), "std": torch.ones(4)}, tmp_path / "unit.safetensors")
    x = torch.randn(2, 3, 16, 16)
    for i, path in enumerate((tmp_path / "new" / file, tmp_path / "old.safetensors")):
        release = open_release("sd-vae", path, tmp_path / "new" / "config.json")
        run, _ = brought_in(release, tmp_path / str(i), SCENES, statistics_from=tmp_path / "unit.safetensors")
        tokenizer = api.load_tokenizer(run.id, tmp_path / str(i), on="cpu")
        assert torch.equal(tokenizer.posterior(x).mean, net.encode(x).latent_dist.mean)
        z = torch.randn(2, 4, 8, 8)
        assert torch.equal(tokenizer.decode_raw(z)[0], net.decode(z).sample)
    net.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*-of-*.safetensors"))) > 1
    for folder in ("new", "parts"):  # a folder as diffusers writes it: its config.json counts, scaling factor and all
        release = open_release("sd-vae", tmp_path / folder)
        run, warnings = brought_in(release, tmp_path / f"{folder}_runs", SCENES)
        assert not warnings
        tokenizer = api.load_tokenizer(run.id, tmp_path / f"{folder}_runs", on="cpu")
        close(tokenizer.encode(x).mean, net.encode(x).latent_dist.mean * net.config.scaling_factor, 1e-5)
    with pytest.raises(ConfigError, match="act_fn = 'gelu'"):
        import_state_dict("sd-vae", old, {"act_fn": "gelu"})
    row = table.get("sd_vae_ema")
    mean, std, origin = statistics.released(row, row.config)
    assert (mean.item(), round(1 / std.item(), 5), origin) == (0, 0.18215, "scaling factor in the config of sd_vae_ema")
    row = table.get("sd-vae")
    assert statistics.released(row, row.config) is None


# -- diffusion models into run directories ----------------------------------------------------------------------------


def tokenizer_for(shape, root, name="stand_in", measured=False):
    """An imported tokenizer run with random weights whose latents have `shape`."""
    channels, side, _ = shape
    method = TOKENIZERS.get("va_vae")
    torch.manual_seed(0)
    conv = {"width": 32, "multipliers": (1, 1), "blocks": 1, "attention": (), "middle": False}
    module = method(method.Config(channels=channels, factor=2, **conv, decoder={"kind": "conv", **conv}), 2 * side)
    release = Release(table.unlisted("va-vae"), root / "none", "0" * 64, {}, module.eval())
    save_file({"mean": torch.zeros(channels), "std": torch.ones(channels)}, root / "unit.safetensors")
    how = "measured" if measured else root / "unit.safetensors"
    return brought_in(release, root, {**SCENES, "name": f"{name}_imported"}, statistics_from=how)[0]


@torch.no_grad()
@pytest.mark.parametrize("family", ["lightningdit", "dit-dh"])
def test_diffusion_releases_give_the_stored_outputs(family, golden, tmp_path):
    if family == "lightningdit":
        state = load_file(golden / "lightningdit_small_weights.safetensors")
        settings = json.loads((golden / "lightningdit_small_config.json").read_text())["config"]
        io = load_file(golden / "lightningdit_small_io.safetensors")
        x, t, y, v = io["in.x"], 1 - io["in.t"], io["in.y"], -io["out.forward"]  # our time and sign
    else:
        tensors = load_file(golden / "rae_small.safetensors")
        state = part(tensors, "sd.ddt.")
        settings = json.loads((golden / "rae_small_config.json").read_text())["ddt"]
        x, t, y, v = (tensors[f"io.{name}"] for name in ("in.x", "in.t", "in.y", "out.forward"))
    torch.save({"model": {"b": torch.zeros(1)}, "ema": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "x.pt")
    (tmp_path / "x.json").write_text(json.dumps(settings))
    release = open_release(family, tmp_path / "x.pt", tmp_path / "x.json")
    parent = tokenizer_for(x.shape[1:], tmp_path)
    run, warnings = brought_in(release, tmp_path, {"protocol.sampler.steps": 2}, tokenizer=parent.id)
    assert not warnings
    assert run.parent == parent.id
    model = api.load_diffusion(run.id, tmp_path, on="cpu")
    close(model.network(x, t, y), v, 2e-5)
    assert model.num_classes == 10
    previews = list(api.sample(model, [0, 3], previews=0))
    assert previews[-1].images.shape == (2, 3, 2 * x.shape[-1], 2 * x.shape[-1])
    assert [event.kind for event in api.train(run, tmp_path)] == ["skip", "skip"]


def test_a_diffusion_release_needs_its_tokenizer(golden, tmp_path):
    settings = json.loads((golden / "lightningdit_small_config.json").read_text())["config"]
    (tmp_path / "x.json").write_text(json.dumps(settings))
    release = open_release("lightningdit", golden / "lightningdit_small_weights.safetensors", tmp_path / "x.json")
    with pytest.raises(ConfigError, match="give --tokenizer RUN"):
        draft(release, root=tmp_path)
    named = Release(table.get("lightningdit_xl_64ep"), release.path, release.sha256, settings, release.module)
    with pytest.raises(RunError, match="first: vfmlab import va_vae_f16d32"):
        draft(named, root=tmp_path)
    small = tokenizer_for((8, 8, 8), tmp_path, "small")
    with pytest.raises(ConfigError, match=r"latents .*\(16, 8, 8\).*has \(8, 8, 8\); name another run"):
        draft(release, root=tmp_path, tokenizer=small.id)
    parent = tokenizer_for((16, 8, 8), tmp_path, "measured", measured=True)
    run = draft(release, root=tmp_path, tokenizer=parent.id)
    events = list(import_run(run, tmp_path, release=release))
    assert any("not the release's" in event.data.get("message", "") for event in events)
    with pytest.raises(ConfigError, match="--statistics belongs to a tokenizer"):
        list(import_run(config.override(run, {"tier": "tiny"}), tmp_path, release=release, statistics_from="measured"))


# -- SiT and REPA, of which no reference is stored --------------------------------------------------------------------

SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 5}


def dit_state(outputs=4, seed=0):
    """A state dict in the names of DiT, SiT and REPA, with values that leave no part without effect."""
    torch.manual_seed(seed)
    shapes = {
        "pos_embed": (1, 16, 32), "x_embedder.proj.weight": (32, 4, 2, 2), "x_embedder.proj.bias": (32,),
        "t_embedder.mlp.0.weight": (32, 256), "t_embedder.mlp.0.bias": (32,), "t_embedder.mlp.2.weight": (32, 32),
        "t_embedder.mlp.2.bias": (32,), "y_embedder.embedding_table.weight": (6, 32),
        "final_layer.linear.weight": (4 * outputs, 32), "final_layer.linear.bias": (4 * outputs,),
        "final_layer.adaLN_modulation.1.weight": (64, 32), "final_layer.adaLN_modulation.1.bias": (64,),
    }  # fmt: skip
    for i in range(3):
        parts = {"attn.qkv": (96, 32), "attn.proj": (32, 32), "mlp.fc1": (128, 32), "mlp.fc2": (32, 128), "adaLN_modulation.1": (192, 32)}
        for name, shape in parts.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return {key: 0.2 * torch.randn(shape) for key, shape in shapes.items()}


def diffusers_dit(state):
    """diffusers' DiT with these weights: an implementation that shares nothing with ours."""
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8, patch_size=2,
        num_embeds_ada_norm=5, dropout=0.0,
    ).eval()  # fmt: skip
    own = net.state_dict()
    mine = {"pos_embed.proj.weight": state["x_embedder.proj.weight"], "pos_embed.proj.bias": state["x_embedder.proj.bias"],
            "pos_embed.pos_embed": state["pos_embed"], "proj_out_1.weight": state["final_layer.adaLN_modulation.1.weight"],
            "proj_out_1.bias": state["final_layer.adaLN_modulation.1.bias"], "proj_out_2.weight": state["final_layer.linear.weight"],
            "proj_out_2.bias": state["final_layer.linear.bias"]}  # fmt: skip
    for i in range(3):
        block, to = f"blocks.{i}.", f"transformer_blocks.{i}."
        for what in ("weight", "bias"):
            q, k, v = state[f"{block}attn.qkv.{what}"].chunk(3)
            mine |= {f"{to}attn1.to_{name}.{what}": value for name, value in (("q", q), ("k", k), ("v", v))}
            mine[f"{to}attn1.to_out.0.{what}"] = state[f"{block}attn.proj.{what}"]
            mine[f"{to}ff.net.0.proj.{what}"] = state[f"{block}mlp.fc1.{what}"]
            mine[f"{to}ff.net.2.{what}"] = state[f"{block}mlp.fc2.{what}"]
            mine[f"{to}norm1.linear.{what}"] = state[f"{block}adaLN_modulation.1.{what}"]
            for ours, theirs in (("0", "1"), ("2", "2")):
                key = f"{to}norm1.emb.timestep_embedder.linear_{theirs}.{what}"
                mine[key] = state[f"t_embedder.mlp.{ours}.{what}"]
        mine[f"{to}norm1.emb.class_embedder.embedding_table.weight"] = state["y_embedder.embedding_table.weight"]
    assert own.keys() - mine.keys() <= {"pos_embed.pos_embed"}
    net.load_state_dict(mine, strict=False)
    net.pos_embed.pos_embed = state["pos_embed"]
    for block in net.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's own frequencies
    return net


@torch.no_grad()
def test_sit_is_dit_with_time_reversed_and_repa_is_not():
    state = dit_state(outputs=8)
    reference = diffusers_dit(state)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 5])
    theirs = reference(x, timestep=t, class_labels=y).sample[:, :4]
    ours = import_state_dict("sit", state, SIZES)
    close(-ours(x, 1 - t, y), theirs, 2e-5)
    half = {**state, **{f"final_layer.linear.{key}": dit_first_half(state[f"final_layer.linear.{key}"]) for key in ("weight", "bias")}}
    projectors = {f"projectors.0.{i}.{key}": torch.ones(2) for i in (0, 2, 4) for key in ("weight", "bias")}
    repa = import_state_dict("repa", half | projectors, SIZES)
    close(repa(x, t, y), theirs, 2e-5)
    first = {re.sub(r"^blocks\.2\.", "decoder_blocks.0.", key): value for key, value in half.items()}
    legacy = import_state_dict("repa", first, {**SIZES, "encoder_depth": 2})
    assert torch.equal(legacy(x, t, y), repa(x, t, y))


def dit_first_half(value):
    """The rows of an output layer (p p 2C) that make the first C channels."""
    return value.unflatten(0, (4, 8))[:, :4].flatten(0, 1)


def test_sit_and_repa_refusals():
    state = dit_state()
    assert not import_state_dict("sit", state, SIZES).config.learn_sigma
    with pytest.raises(CheckpointError, match="of another shape"):
        import_state_dict("sit", state, {**SIZES, "learn_sigma": True})
    with pytest.raises(ConfigError, match="unknown argument 'hiden_size'.*did you mean 'hidden_size'"):
        import_state_dict("sit", state, {"hiden_size": 3})
    with pytest.raises(ConfigError, match="path_type 'cosine'"):
        import_state_dict("repa", state, {**SIZES, "path_type": "cosine"})
    with pytest.raises(CheckpointError, match="no 'final_layer.linear.weight'"):
        import_state_dict("sit", {}, SIZES)


# -- the command line -------------------------------------------------------------------------------------------------


def test_commands(va_vae, tmp_path, capsys):
    folder, _, _ = va_vae
    given = ["--file", str(folder / "release.ckpt"), "--config", str(folder / "release.yaml")]
    place = ["--root", str(tmp_path), "--set", *(f"{key}={value}" for key, value in SCENES.items())]
    assert main.main(["import", "va-vae", *given, "--statistics", str(folder / "latents_stats.pt"), "--progress", "none", *place]) == 0
    out = capsys.readouterr().out
    run_id = re.search(r"imported (va_vae_imported-\w+) in", out)[1]
    assert f"next: vfmlab eval {run_id} --root {tmp_path}" in out
    assert api.load_tokenizer(run_id, tmp_path, on="cpu").stat_std.tolist() == [2.0] * 8
    assert main.main(["export", run_id, "--root", str(tmp_path), "--licence", "mit"]) == 0
    assert (tmp_path / run_id / "exported" / "README.md").exists()
    assert main.main(["import"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in table.names())
    assert main.main(["import", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == table.names()
    wrong = "0" * 64
    for arguments, complaint in (
        (["import", "va_vea_f16d32"], "did you mean 'va_vae_f16d32'"),
        (["import", "va-vae", "--file", str(tmp_path / "absent.pt")], "--file: no file"),
        (["import", "va-vae", *given, "--set", f"imported.sha256={wrong}"], f"but {wrong} is expected"),
        (["import", "va-vae", *given, "--set", "tokenizer.blocks=9", "--root", str(tmp_path)], "tokenizer.blocks = 9, but the imported weights"),
        (["export", run_id, "--root", str(tmp_path), "--push", "a/b", "--to", "c"], "one of the two"),
    ):
        assert main.main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in lines if line.startswith("vfmlab: error: ")]) == 1, lines
        assert complaint in lines[-1]
