"""Whole releases of PAE, HAE and RJF: stored values, what a run makes of them, strictness, licences that are asked for."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from golden_values import close, part
from safetensors.torch import load_file, save_file

from vfmlab import api, config, presets, runs, vfm
from vfmlab.cli.main import main
from vfmlab.decoders.dc_ae import DCDecoder
from vfmlab.decoders.vit import ViTDecoder
from vfmlab.diffusion.dit import LightningDiT
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.nn.dc_blocks import ConvStem
from vfmlab.registry import IMPORTERS, TOKENIZERS
from vfmlab.tokenizers.gae import GAE
from vfmlab.weights import import_release, import_state_dict, table
from vfmlab.weights.families import hae as hae_family
from vfmlab.weights.families import pae as pae_family
from vfmlab.weights.families import vfmtok
from vfmlab.weights.families.hae import HAEParts
from vfmlab.weights.families.pae import PAEParts

DC = {"kind": "dc_ae", "widths": [16, 16, 32], "depths": [1, 1, 1], "blocks": ["residual", "residual", "vit"], "in_shortcut": False}
VIT = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "hidden": 16}


def awake(module):
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


@pytest.fixture(scope="module")
def model():
    return vfm.build(config.VFM(name="pocket", weights="random"), 16)


@pytest.fixture(scope="module")
def pae(golden):
    g = load_file(golden / "continuous" / "pae_parts.safetensors")
    small, c = load_file(golden / "rae_small.safetensors"), json.loads((golden / "rae_small_config.json").read_text())["decoder"]
    prefix = next(k.removesuffix("decoder_embed.weight") for k in small if k.endswith("decoder_embed.weight"))
    state = {k: v for k, v in g.items() if k.startswith(("delta.sft.sd.", "compressor.sd.", "decompressor.sd."))}
    state = {k.replace("delta.sft.sd.", "delta.sd."): v for k, v in state.items()}
    state |= {f"decoder.{k}": v for k, v in part(small, prefix).items() if k.startswith("decoder_") or k.startswith("trainable")}
    facts = json.loads((golden / "continuous" / "pae_parts.json").read_text())
    settings = {k: facts[k] for k in ("img", "patch", "dim", "depth", "heads", "latent")} | {"decoder": c}
    return g, state, settings


@torch.no_grad()
def test_pae_equals_the_stored_values(pae):
    g, state, settings = pae
    module = import_state_dict("pae", state, settings)
    close(module.encode(g["x"], g["u"]), g["z_token"])
    hidden = module.decompressor(g["z_token"])
    close(hidden.flatten(2).transpose(1, 2), g["hidden_out"])
    decoder = import_state_dict("rae-decoder", part(state, "decoder."), settings["decoder"])
    close(module.decode(g["z_token"]), decoder(g["hidden_out"]), 1e-4)
    made = IMPORTERS.get("pae").sections(module, settings)
    assert (made["size"], made["tokenizer"]["factor"], made["tokenizer"]["channels"]) == (32, 8, 8)
    for change, message in (({"delta.sd.final_ln.weight": None}, "1 missing"), ({"neck.weight": torch.zeros(1)}, "unexpected: neck")):
        wrong = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(CheckpointError, match=message):
            import_state_dict("pae", wrong, settings)
    with pytest.raises(ConfigError, match="pae config has no field 'latent'"):
        import_state_dict("pae", state, {k: v for k, v in settings.items() if k != "latent"})


@torch.no_grad()
def test_a_run_of_pae_has_pixels(model):
    torch.manual_seed(0)
    patch = model.input_size // 4
    module = PAEParts(4, patch, 128, 1, 4, 4, "sft")
    module.decoder = ViTDecoder(ViTDecoder.Config.model_validate(VIT), 128, 4, 16)
    awake(module)
    family = IMPORTERS.get("pae")
    options = family.sections(module, {})["tokenizer"]
    kind = TOKENIZERS.get("pae")
    tokenizer = kind(kind.Config.model_validate(options), 16, model).eval()
    assert family.put(tokenizer, module, None, list) is None
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    u = model.features(x, (-1,)).maps[-1].flatten(2).transpose(1, 2)
    z = tokenizer.posterior(x).mean
    close(z, module.encode(model.prepare(x), u))
    mean, std = (value.view(3, 1, 1) for value in (model.mean, model.std))
    close(tokenizer.decode_raw(z)[0], 2 * (module.decode(z) * std + mean) - 1, 1e-4)
    module.patch += 1
    with pytest.raises(CheckpointError, match="the run's VFM sees"):
        family.put(tokenizer, module, None, list)


@torch.no_grad()
def test_hae_equals_the_stored_values(golden):
    folder = golden / "continuous"
    stem, dec = load_file(folder / "dino_sae_stem.safetensors"), part(load_file(folder / "dino_sae_decoder.safetensors"), "decA.")
    c = json.loads((folder / "dino_sae_decoder.json").read_text())["decoders"]["A"]
    state = {f"encoder.embeddings.{k}": v for k, v in part(stem, "stem.sd.").items()}
    state |= {f"decoder.{k}": v for k, v in part(dec, "sd.").items()} | {"encoder.layer.0.norm1.weight": torch.ones(40)}
    settings = {"embed_dim": 40, "image": 16 * dec["z"].shape[-1], "decoder": c}
    module = import_state_dict("hae", state, settings)
    close(module.stem(stem["stem.x"]).permute(0, 2, 3, 1), stem["stem.out"])
    close(module.decoder(dec["z"])[0], dec["out"], 5e-5)
    with pytest.raises(ConfigError, match="embed_dim 40 is not decoder.latent_channels 32"):
        IMPORTERS.get("hae").sections(module, settings)
    with pytest.raises(CheckpointError, match="unexpected 'head.weight'"):
        import_state_dict("hae", {**state, "head.weight": torch.zeros(1)}, settings)
    with pytest.raises(CheckpointError, match="0 tensors look like the stem's first one"):
        import_state_dict("hae", {k: v for k, v in state.items() if "cnn.0" not in k}, settings)
    with pytest.raises(CheckpointError, match="missing"):
        import_state_dict("hae", {k: v for k, v in state.items() if "cnn.1.norm" not in k}, settings)
    with pytest.raises(ConfigError, match="embed_dim 41, but the stem makes 40"):
        import_state_dict("hae", state, {**settings, "embed_dim": 41})


@torch.no_grad()
def test_a_run_of_hae(model):
    torch.manual_seed(0)
    module = HAEParts(ConvStem(128, (16,)), DCDecoder(DCDecoder.Config.model_validate(DC), 128, 4, 16))
    family, kind = IMPORTERS.get("hae"), TOKENIZERS.get("dino_sae")
    made = family.sections(module, {"decoder": {"latent_channels": 128}, "image": 16})
    tokenizer = kind(kind.Config.model_validate(made["tokenizer"]), 16, model)
    family.put(tokenizer, module, None, list)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z = tokenizer.posterior(x).mean
    close(z, model.features_from(x, module.stem(x), (-1,)).maps[-1])
    close(tokenizer.decode_raw(z)[0], module.decoder(z)[0])


@torch.no_grad()
def test_rjf_is_the_same_field_on_a_longer_sphere(golden):
    """v(sqrt(C) x) = sqrt(C) times the release's; its time is ours, LightningDiT's is the other way round."""
    state = load_file(golden / "lightningdit_small_weights.safetensors")
    settings = json.loads((golden / "lightningdit_small_config.json").read_text())["config"]
    ours, other = import_state_dict("rjf", state, settings), import_state_dict("lightningdit", state, settings)
    x, t, y = torch.randn(3, *ours.latent_shape), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])
    close(ours(x, t, y), -settings["in_channels"] ** 0.5 * other(x, 1 - t, y), 1e-4)
    with pytest.raises(CheckpointError, match="missing"):
        import_state_dict("rjf", {k: v for k, v in state.items() if "final_layer.linear.bias" not in k}, settings)


def release_names(network):
    """A LightningDiT's tensors under the release's names."""
    pairs = {"patch_embed.": "x_embedder.proj.", "time_embed.": "t_embedder.", "label_embed.": "y_embedder.embedding_table.",
             "final.modulation.": "final_layer.adaLN_modulation.1.", "final.norm.": "final_layer.norm_final.", "final.linear.": "final_layer.linear."}
    inside = {".modulation.": ".adaLN_modulation.1.", ".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
    out = {}
    for key, value in network.state_dict().items():
        ours = next((p for p in pairs if key.startswith(p)), "")
        key = pairs.get(ours, "") + key.removeprefix(ours)
        for mine, theirs in inside.items() if key.startswith("blocks.") else ():
            key = key.replace(mine, theirs)
        out[key] = value.contiguous()
    return out


def test_commands(tmp_path, capsys):
    """A released GAE becomes a tokenizer's run on a sphere, a network of RJF a generator on it."""
    torch.manual_seed(0)
    gae = GAE(GAE.Config.model_validate({"channels": 4, "factor": 4, "width": 16, "depth": 1, "heads": 2, "features": 16,
                                         "decoder": {"kind": "plain_vit", "width": 16, "depth": 1, "heads": 2}}), 16)
    save_file({k: v.contiguous() for k, v in gae.state_dict().items() if not k.startswith("stat_")}, tmp_path / "gae.safetensors")
    tree = {"model": {"encoder": {"img": 16, "patch": 4, "dim": 16, "layers": 1, "heads": 2, "enc_out": 16}, "latent": 4, "decoder": {"layers": 1}}}
    (tmp_path / "gae.yaml").write_text(yaml.safe_dump(tree))
    place = ["--root", str(tmp_path), "--progress", "none"]
    scenes = ["data.source=scenes:easy", "data.train=32", "data.val=16", "protocol.features=judge"]
    given = ["--file", str(tmp_path / "gae.safetensors"), "--config", str(tmp_path / "gae.yaml")]
    plain = [*place, "--set", *scenes]
    assert main(["import", "gae", *given, *place, "--set", *scenes, "tokenizer.radius=2"]) == 0
    (folder,) = runs.scan(tmp_path)
    tokenizer = api.load_tokenizer(folder.id, tmp_path, on="cpu")
    assert tokenizer.normalisation == "sphere(2)"
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        close(tokenizer.posterior(x).mean, gae.eval().posterior(x).mean, 1e-5)

    network = awake(LightningDiT(LightningDiT.Config(width=32, depth=1, heads=2, patch=2), (4, 4, 4), 10))
    save_file(release_names(network), tmp_path / "rjf.safetensors")
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 10,
             "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "use_qknorm": network.config.qk_norm}
    (tmp_path / "rjf.json").write_text(json.dumps(sizes))
    given = ["--file", str(tmp_path / "rjf.safetensors"), "--config", str(tmp_path / "rjf.json"), "--tokenizer", folder.id]
    assert main(["import", "rjf", *given, *place]) == 0
    made = next(run for run in runs.scan(tmp_path) if run.id != folder.id)
    assert made.config().diffusion.path.kind == "sphere"
    *_, last = api.sample(made.id, [0, 1], root=tmp_path, steps=2)
    assert last.images.shape == (2, 3, 16, 16)

    capsys.readouterr()
    given = ["--file", str(tmp_path / "gae.safetensors"), "--config", str(tmp_path / "gae.yaml")]
    assert main(["import", "gae", *given, *plain, "name=flat"]) == 0
    flat = next(run for run in runs.scan(tmp_path) if run.id.startswith("flat"))
    given = ["--file", str(tmp_path / "rjf.safetensors"), "--config", str(tmp_path / "rjf.json"), "--tokenizer", flat.id]
    assert main(["import", "rjf", *given, *place]) == 2
    assert "works on tokens of length sqrt(C) = 2, tokenizer run" in capsys.readouterr().err


def test_licences_that_are_asked_for(capsys, tmp_path):
    for name in ("raev2-ddt", "vfm_vae_f16d32"):
        assert main(["import", name, "--file", str(tmp_path / "absent.pt")]) == 2
        assert "If it allows your use, say so: --accept-licence" in capsys.readouterr().err
        assert main(["import", name, "--file", str(tmp_path / "absent.pt"), "--accept-licence"]) == 2
        assert "no file" in capsys.readouterr().err
    assert {table.get(name).licence for name in ("hae", "gae")} == {"mit", "apache-2.0 (by its README)"}
    assert [table.get(name).kind for name in ("gae", "hae", "pae", "raev2-ddt", "rjf")] == ["tokenizer"] * 3 + ["diffusion"] * 2
    with pytest.raises(ConfigError, match="'hae' has no config of its own; give the release's: --config FILE"):
        import_release.open_release("hae", __file__)


@pytest.mark.parametrize(
    ("default", "preset"),
    [(hae_family.VFM, "paper_dino_sae"), (pae_family.VFM, "paper_pae"), ({"name": vfmtok.DEFAULTS["vfm"]}, "paper_vfmtok")],
    ids=["hae", "pae", "vfmtok"],
)
def test_an_import_takes_the_vfm_of_the_papers_preset(default, preset):
    """Weights do not say which VFM they were trained on, so nothing else would notice another one."""
    own, theirs = config.VFM(**default), presets.get(preset).vfm
    assert (own.name, own.upscale) == (theirs.name, theirs.upscale)
