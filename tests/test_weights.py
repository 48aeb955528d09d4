"""Released weights: reading files safely, the table, and importing reference checkpoints into run directories."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vfmlab import api, config, runs
from vfmlab.errors import CheckpointError, ConfigError, RunError
from vfmlab.registry import IMPORTERS
from vfmlab.training import checkpoint
from vfmlab.vfm import TABLE as VFMS
from vfmlab.weights import fetch, import_state_dict, landing, release_config, statistics, table
from vfmlab.weights.into_run import draft, import_run, open_release

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
    same(fetch.unwrap(fetch.read(tmp_path / "x.pt")))


def test_safetensors_and_a_prefix_that_not_all_have(tmp_path):
    save_file({**STATE, "module.c": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert set(fetch.unwrap(fetch.read(tmp_path / "x.safetensors"))) == {*STATE, "module.c"}


class Malice:
    def __reduce__(self):
        return Path.touch, (Path(Malice.target),)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(save, tmp_path):
    Malice.target = str(tmp_path / "ran")
    save({"ema": STATE, "args": Malice()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="could run code") as error:
        fetch.read(tmp_path / "x.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_files_that_cannot_be_read(tmp_path):
    torch.save(STATE, tmp_path / "x.pt")
    save_file(STATE, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match=r"truncated.*again"):
            fetch.read(tmp_path / f"cut.{name}")
    with pytest.raises(CheckpointError, match="no file"):
        fetch.read(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="holds lr, steps"):
        fetch.unwrap({"lr": 1, "steps": [2]}, "x.pt")
    with pytest.raises(CheckpointError, match="mixes tensors with other entries under 'ema', e.g. 'lr'"):
        fetch.unwrap({"ema": {**STATE, "lr": 0.1}}, "x.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        fetch.unwrap([1], "x.pt")


def test_another_file_than_expected(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    found = fetch.check_sha256(tmp_path / "x.safetensors", None)
    assert fetch.check_sha256(tmp_path / "x.safetensors", found) == found
    with pytest.raises(CheckpointError, match=f"has SHA-256 {found}, but 0000"):
        fetch.check_sha256(tmp_path / "x.safetensors", "0" * 64)


def test_without_a_network_the_file_to_pass_is_named(monkeypatch, tmp_path):
    def no_network(*args, **more):
        raise socket.gaierror("no such host")

    monkeypatch.setattr(fetch, "getproxies", dict)
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
    for content, complaint in (
        ({"std": std}, "must hold 'mean'"),
        ({"mean": mean}, "missing"),
        ({"mean": mean[0], "std": std[0]}, "neither"),
        ({"mean": mean, "std": -std}, "positive"),
    ):
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError, match=complaint):
            statistics.read(tmp_path / "bad.pt")


# -- the table ------------------------------------------------------------------------------------------------------


def test_rows_are_whole():
    for name in table.names():
        row = table.get(name)
        assert row.family in IMPORTERS
        assert row.config
        assert row.file
        assert row.repo or row.note
        assert row.sha256 is None or len(row.sha256) == 64
        assert row.vfm is None or row.vfm["name"] in VFMS
        if row.kind == "diffusion":
            assert table.get(row.tokenizer).kind == "tokenizer"
        config.override(config.Run(name="x", data={}, tokenizer={"method": "plain_vae"}, imported={"name": name}), {
            f"protocol.{key}": value for key, value in row.protocol.items()
        })  # fmt: skip
    assert set(landing.VFMS.values()) <= set(VFMS)


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
        sections = landing.landing("vfm-vae").sections(module, table.get("vfm_vae_f16d32").config)
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
    found = release_config.arguments("lightningdit", fetch.read_config(tmp_path / "x.yaml"))
    assert found == table.get("lightningdit_xl_800ep").config
    row = table.get("va_vae_f16d32")
    ldm = {"ckpt_path": "x", "model": {"target": "ldm", "params": {**row.config, "lossconfig": {"disc_start": 1}}}}
    assert release_config.arguments("va-vae", ldm) == {"embed_dim": 32, **row.config["ddconfig"]}
    rae = {"stage_1": {"params": {}}, "stage_2": {"target": "x", "params": table.get("dit_dh_xl").config}}
    assert release_config.arguments("dit-dh", rae) == table.get("dit_dh_xl").config
    assert release_config.arguments("sit", {"model": "SiT-B/2"}) == {
        "hidden_size": 768, "depth": 12, "num_heads": 12, "patch_size": 2,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="SiT-Q/2"):
        release_config.arguments("sit", {"model": "SiT-Q/2"})
    with pytest.raises(ConfigError, match="'embed_dim' and 'ddconfig'"):
        release_config.arguments("va-vae", tree)
    with pytest.raises(ConfigError, match="'z_dimension'"):
        release_config.arguments("vfm-vae", tree)


def test_config_files_that_are_none(tmp_path):
    (tmp_path / "x.yaml").write_text("!!python/object/apply:os.system ['true']")
    (tmp_path / "y.yaml").write_text("- 1")
    for name, complaint in (("x.yaml", "not YAML"), ("y.yaml", "a list"), ("z.yaml", "cannot be read")):
        with pytest.raises(ConfigError, match=complaint):
            fetch.read_config(tmp_path / name)


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
    io = part(ldm[0], "io.")
    for ema in (True, False):
        tokenizer = api.load_tokenizer(run.id, folder, ema=ema, on="cpu")
        posterior = tokenizer.posterior(io["x"])
        close(posterior.mean, io["mean"], 2e-5)
        close(posterior.logvar, io["logvar"], 2e-5)
        close(tokenizer.decode_raw(io["mean"])[0], io["image"], 2e-5)
    close(tokenizer.encode(io["x"]).mean, (io["mean"] - 0.25) / 2, 2e-5)
    assert tokenizer.latent_shape == (8, 8, 8)
    facts = checkpoint.metadata(runs.open_run(run.id, folder).ema)
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
    with pytest.raises(CheckpointError, match="have 5 channels, the latents 8"):
        list(import_run(run, tmp_path, release=release, statistics_from=tmp_path / "five.pt"))
    assert [event.kind for event in import_run(run, tmp_path, release=release, statistics_from="measured")][-1] == "finish"
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
