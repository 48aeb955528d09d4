"""SD-VAE: diffusers' AutoencoderKL as it is, behind the tokenizer's contract, and its weights from safetensors only."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from vfmlab import api, presets
from vfmlab.config import parse
from vfmlab.errors import CheckpointError, ConfigError
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers import linear_start, sd_vae
from vfmlab.weights import import_release

AutoencoderKL = pytest.importorskip("diffusers").AutoencoderKL
SMALL = {"channels": 4, "factor": 4, "block_out_channels": (8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def make(size=16, **fields):
    part = TOKENIZERS.get("sd_vae")
    return part(part.Config.model_validate({**SMALL, **fields}), size)


def images(n=2, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A folder as diffusers writes it, and its network."""
    torch.manual_seed(1)
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 16), norm_num_groups=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("release")
    net.save_pretrained(folder)
    return folder, net.eval()


def test_pretrained_weights_give_diffusers_own_outputs(release):
    folder, net = release
    tokenizer = make(pretrained=str(folder)).eval()
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    tokenizer.begin([images()])
    assert not torch.equal(before["encoder.conv_in.weight"], tokenizer.encoder.conv_in.weight)
    x = images()
    with torch.no_grad():
        ours, theirs = tokenizer.posterior(x), net.encode(x).latent_dist
        torch.testing.assert_close(ours.mean, theirs.mean)
        torch.testing.assert_close(ours.logvar, theirs.logvar)
        decoded = tokenizer.decode_raw(ours.mean)
        torch.testing.assert_close(decoded[0], net.decode(theirs.mean).sample)
    assert len(decoded) == 1
    assert ours.mean.shape == (2, *tokenizer.latent_shape)


def test_names_of_older_releases_are_read(release, tmp_path):
    """The published weights call the attention's layers query, key, value and proj_attn."""
    _, net = release
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(key):
        for new, name in old.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        return key

    tensors = {rename(key): value for key, value in net.state_dict().items()}
    assert "decoder.mid_block.attentions.0.query.weight" in tensors
    save_file(tensors, tmp_path / sd_vae.FILE, {"format": "pt"})
    tokenizer = make().load_pretrained(tmp_path)
    for key, value in net.state_dict().items():
        assert torch.equal(tokenizer.state_dict()[key], value)


def test_a_folder_in_several_files_without_convolutions_around_the_latent(tmp_path):
    """As SD3 and FLUX have their autoencoders, and as diffusers splits what is large."""
    torch.manual_seed(2)
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), norm_num_groups=4,
        latent_channels=6, use_quant_conv=False, use_post_quant_conv=False, sample_size=16, shift_factor=0.1,
    ).eval()  # fmt: skip
    net.save_pretrained(tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tokenizer = import_release.open_release("sd-vae", tmp_path).module.eval()
    with torch.no_grad():
        mean = net.encode(images()).latent_dist.mean
        torch.testing.assert_close(tokenizer.posterior(images()).mean, mean)
        torch.testing.assert_close(tokenizer.decode_raw(mean)[0], net.decode(mean).sample)
    assert tokenizer.config.quant_conv is False
    assert tokenizer.last_encoder_layer() is tokenizer.encoder.conv_out.weight
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_quant_conv": True}))
    with pytest.raises(ConfigError, match="differ"):
        import_release.open_release("sd-vae", tmp_path)


def test_only_training_and_importing_read_the_pretrained_weights():
    tokenizer = make(pretrained="nobody/nothing")  # built to take a checkpoint's weights: nothing is looked for
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        tokenizer.begin([])
    with pytest.raises(ConfigError, match="tokenizer.pretrained is not set"):
        make().load_pretrained()


def test_without_network_the_message_says_which_files_go_where(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        make().load_pretrained("stabilityai/sd-vae-ft-ema")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("hf download stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors", "tokenizer.pretrained=FOLDER", str(tmp_path)):
        assert part in message


def test_weights_that_do_not_fit(release, tmp_path):
    folder, _ = release
    weights = folder / sd_vae.FILE
    tensors = load_file(weights)
    cases = {
        "nothing": ({}, "holds no weights"),
        "pickle": ({"diffusion_pytorch_model.bin": b"PK\x03\x04"}, "is a pickle"),
        "pickled": ({weights.name: b"PK\x03\x04"}, "is a pickle"),
        "cut": ({weights.name: weights.read_bytes()[:-99]}, "truncated"),
        "two": ({weights.name: weights.read_bytes(), "other.safetensors": b""}, "holds several weights"),
    }
    for name, (contents, message) in cases.items():
        place = tmp_path / name
        place.mkdir()
        for file, data in contents.items():
            (place / file).write_bytes(data)
        with pytest.raises(CheckpointError, match=message) as caught:
            make().load_pretrained(place)
        assert "\n" not in str(caught.value)
    place = tmp_path / "incomplete"
    place.mkdir()
    save_file({key: value for key, value in tensors.items() if key != "quant_conv.bias"}, place / weights.name, {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing: quant_conv.bias"):
        make().load_pretrained(place)
    with pytest.raises(CheckpointError, match="of another shape"):
        make(block_out_channels=(8, 16, 16)).load_pretrained(folder)


def test_linear_start():
    tokenizer = make(linear_start=True, channels=8, size=32)
    x = images(64, 32)
    assert linear_start.fit(tokenizer, [x]) > 5
    assert tokenizer.last_encoder_layer() is tokenizer.start.read.weight
    tokenizer.decode_raw(tokenizer.posterior(x[:2]).mean)[0].square().mean().backward()
    assert tokenizer.last_decoder_layer().grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 8}, "3 block_out_channels make a factor of 4"),
        ({"norm_num_groups": 3}, "norm_num_groups 3 does not divide"),
        ({"pretrained": "a/b", "linear_start": True}, "linear_start is for networks that begin as noise"),
    ],
)
def test_options_that_do_not_fit(fields, message):
    with pytest.raises(ConfigError, match=message):
        make(**fields)


def test_defaults_are_the_released_architecture():
    """83,653,863 parameters, the count of the published f8d4 weights."""
    with torch.device("meta"):
        tokenizer = TOKENIZERS.get("sd_vae")(TOKENIZERS.get("sd_vae").Config(), 256)
    assert sum(p.numel() for p in tokenizer.parameters()) == 83_653_863
    assert tokenizer.latent_shape == (4, 32, 32)


def test_trains(tmp_path):
    run = api.resolve("tiny_sd_vae", {"diffusion": None, "data.train": 16, "data.val": 8, "train.samples": 16})
    *_, last = api.train(run, root=tmp_path)
    assert last.kind == "finish"
    tokenizer = api.load_tokenizer(run.id, tmp_path, on="cpu")
    assert tokenizer.decode(tokenizer.encode(images()).mode()).shape == (2, 3, 16, 16)


def test_presets():
    for tier in ("tiny", "pocket"):
        assert presets.get(f"{tier}_sd_vae").imported is None
    for tier in ("small", "paper"):
        run = presets.get(f"{tier}_sd_vae")
        assert run.imported.name == "sd-vae"
        assert (run.tokenizer.channels, run.tokenizer.factor) == (4, 8)
        assert [phase.stage for phase in run.phases()] == ["imported", "diffusion"]
        assert parse(run.model_dump(mode="json")) == run
