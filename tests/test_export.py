"""Tokenizers out to the hub's format and back: equal to the bit, without paths of this machine, with a card that tells what is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from vfmlab import api, presets, runs
from vfmlab.config import override
from vfmlab.errors import CheckpointError, ConfigError, RunError
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers.base import measure
from vfmlab.weights import export, table
from vfmlab.weights.import_release import Release, write

SCENES = {"data.source": "scenes:easy", "data.train": 16, "data.val": 16}


def smallest(method):
    """The first phase of the smallest preset with this tokenizer."""
    for name in presets.names():
        run = presets.get(name)
        if run.tier in ("tiny", "pocket") and run.tokenizer is not None and run.tokenizer.method == method and run.imported is None:
            return override(run, SCENES).phases()[0]
    pytest.fail(f"no tiny or pocket preset has the tokenizer '{method}'")


def images(run, n=4):
    return api.data.to_float(api.data.open_source(run.data, "train").batch(torch.arange(n)).images)


@torch.no_grad()
def untrained(run, root, release=None, **facts):
    """The directory of `run` with weights that no training has touched, none of them zero, and measured statistics."""
    torch.manual_seed(0)
    tokenizer = api.build_tokenizer(run)
    tokenizer.begin([images(run, 16)])
    for parameter in tokenizer.parameters():
        if parameter.is_floating_point() and not parameter.any():
            parameter.normal_(std=0.05)
    tokenizer.eval()
    tokenizer.set_statistics(measure(tokenizer, [images(run, 8)], "eight scenes"))
    folder = runs.create(run, root)
    known = {"fingerprint": "eight scenes", **facts}
    if tokenizer.vfm is not None:
        known["vfm_fingerprint"] = tokenizer.vfm.fingerprint
    write(folder, tokenizer.state_dict(), release, known)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(root, run directory, exported folder) of the smallest VFM-VAE, with a report."""
    root = tmp_path_factory.mktemp("export")
    folder = untrained(smallest("vfm_vae"), root, samples="64")
    report = {
        "hash": "aaaaaaaa", "metrics": {
            "psnr": {"value": 21.5, "spread": 0.5, "protocol": "bbbbbbbb", "n": 32},
            "lpips": {"value": None, "reason": "put weights into /somewhere/local"},
        },
        "protocols": {"bbbbbbbb": {"n": 32, "images": {"source": "folder:/data/x", "size": 16}}, "cccccccc": {"n": 1}},
    }  # fmt: skip
    folder.save_report(report)
    return root, folder, export.save_pretrained(folder.id, root / "out", root)


# -- out and back -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("method", TOKENIZERS.names())
def test_reconstructions_are_equal_to_the_bit(method, tmp_path):
    if method == "sd_vae":
        pytest.importorskip("diffusers")
    run = smallest(method)
    folder = untrained(run, tmp_path)
    before = api.load_tokenizer(folder.id, tmp_path, on="cpu")
    after = export.from_pretrained(export.save_pretrained(folder.id, tmp_path / "out", tmp_path), on="cpu")
    x = images(run, 2)
    z = before.encode(x)
    assert torch.equal(after.encode(x).mean, z.mean)
    assert torch.equal(after.decode(z.mean), before.decode(z.mean))
    assert before.decode(z.mean).std() > 0
    assert not after.training
    assert after.statistics.fingerprint == "eight scenes"


def test_raw_weights_and_diffusion_runs(exported, tmp_path):
    root, folder, _ = exported
    tensors = load_file(folder.model)
    save_file({key: value + 1 if key == "stat_mean" else value for key, value in tensors.items()}, folder.model, {"fingerprint": "raw"})
    raw = export.save_pretrained(folder.id, tmp_path / "raw", root, ema=False)
    assert torch.equal(load_file(raw / "model.safetensors")["stat_mean"], tensors["stat_mean"] + 1)
    whole = override(presets.get("tiny_vfm_vae"), SCENES)
    if whole.last.parent == folder.id:
        diffusion = runs.create(whole.last, root)
        again = export.save_pretrained(diffusion.id, tmp_path / "again", root)
        assert json.loads((again / "config.json").read_text())["run_id"] == folder.id


# -- the card ---------------------------------------------------------------------------------------------------------


def front(text):
    return yaml.safe_load(text.split("---")[1])


def test_card_tells_numbers_with_their_protocol(exported):
    _, folder, out = exported
    text = (out / "README.md").read_text()
    assert front(text) == {"library_name": "vfmlab", "tags": ["vfmlab", "image-tokenizer", "vfm_vae"]}
    assert "| psnr | 21.5 | 0.5 | higher | 32 | `bbbbbbbb` |" in text
    assert "`aaaaaaaa`" in text
    assert "cccccccc" not in text  # no number of the card was measured under it
    assert "lpips" not in text
    assert "| vision foundation model | pocket, bundled with vfmlab (fingerprint " in text
    assert "| licence of that model | mit |" in text
    assert "| licence of these weights | not stated by who exported them |" in text
    assert "64 images seen" in text
    assert folder.id in text


def test_card_without_a_report_and_with_a_licence(exported, tmp_path):
    root, folder, _ = exported
    (folder.path / "report.json").rename(folder.path / "aside.json")
    try:
        texts = [(export.save_pretrained(folder.id, tmp_path, root, licence=licence) / "README.md").read_text()
                 for licence in ("mit", "Ours: [ask]")]
    finally:
        (folder.path / "aside.json").rename(folder.path / "report.json")
    assert "Not measured." in texts[0]
    assert front(texts[0])["license"] == "mit"
    assert front(texts[1])["license_name"] == "ours:-[ask]", "what YAML would read otherwise is quoted"


def test_card_of_imported_weights(tmp_path):
    run = override(smallest("plain_vae"), {"train": None, "losses": {}, "imported.name": "vfm_vae_f16d32"})
    row = table.get("vfm_vae_f16d32")
    folder = untrained(run, tmp_path, Release(row, tmp_path, "e" * 64, {}, None))
    text = (export.save_pretrained(folder.id, tmp_path / "out", tmp_path) / "README.md").read_text()
    assert front(text)["license"] == "other"
    assert front(text)["license_name"] == "nvidia-non-commercial"
    assert f"`{row.file}` of `{row.repo}` (SHA-256 {'e' * 64})" in text
    assert "images seen" not in text


def test_nothing_of_this_machine_is_exported(exported):
    root, folder, out = exported
    run = folder.config()
    local = {"data.source": f"folder:{root}/secret/imagenet", "vfm.weights": f"{root}/secret/vfm.safetensors",
             "protocol.features": f"judge:{root}/secret", "protocol.reference": f"{root}/secret.npz",
             "protocol.decoder": f"{root}/secret"}  # fmt: skip
    found = export.public(override(run, local))
    assert found.protocol.reference is found.protocol.decoder is None
    assert found.data.source == "folder:imagenet"
    assert (found.vfm.weights, found.protocol.features) == ("pretrained", "judge")
    assert export.public(run) == run
    images = {"data.source": f"hf:{root}/secret"}  # a folder that `datasets` reads, not a name of the hub
    assert export.public(override(run, images)).data.source == "hf:secret"
    backbone = {"name": "pocket", "weights": f"{root}/secret/vfm.safetensors"}
    losses = {"losses.perceptual": {"weight": 1.0, "model": backbone}}
    assert str(root) not in json.dumps(export.public(override(run, losses)).recipe.model_dump(mode="json"))
    for name in ("config.json", "README.md"):
        assert str(root) not in (out / name).read_text()
        assert "/somewhere" not in (out / name).read_text()
        assert "/data/x" not in (out / name).read_text()


# -- what is refused --------------------------------------------------------------------------------------------------


def test_runs_that_cannot_be_exported(tmp_path):
    folder = runs.create(smallest("plain_vae"), tmp_path)
    with pytest.raises(CheckpointError, match="no weights yet"):
        export.save_pretrained(folder.id, tmp_path / "out", tmp_path)
    write(folder, api.build_tokenizer(folder.config()).state_dict(), None, {})
    with pytest.raises(CheckpointError, match="no latent statistics yet"):
        export.save_pretrained(folder.id, tmp_path / "out", tmp_path)
    untrained(folder.config(), tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="choose another one"):
        export.save_pretrained(folder.id, tmp_path / "taken", tmp_path)


FOREIGN = {
    "somebody's model": {"README.md": "mine", "config.json": '{"model_type": "vit"}', "model.safetensors": "mine"},
    "an export with more": {"README.md": "", "config.json": '{"library": "vfmlab", "run": {}}', "notes.txt": "mine"},
    "nested JSON": {"config.json": "[" * 100_000},
    "any file": {"photo.jpg": "mine"},
    "a hidden one": {".git": "mine"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_no_folder_with_other_files_is_written_to(exported, tmp_path, files):
    root, run, _ = exported
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="holds other files"):
        export.save_pretrained(run.id, tmp_path, root)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files
    export.save_pretrained(run.id, tmp_path, root, overwrite=True)
    assert export.from_pretrained(tmp_path, on="cpu").statistics.fingerprint == "eight scenes"
    with pytest.raises(RunError, match=r"is an export and no run; vfmlab\.weights\.export\.from_pretrained reads it"):
        api.load_tokenizer(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_no_run_is_written_into(exported, tmp_path, overwrite):
    """Neither its folder nor one inside it, by whatever path; an export stands beside the runs, or in `exported`."""
    root, run, _ = exported
    (tmp_path / "link").symlink_to(run.path)
    before = (run.path / "config.json").read_bytes()
    for folder in (run.path, run.path / "checkpoints", run.path / "new" / "deep", tmp_path / "link", run.path / "x" / ".."):
        with pytest.raises(ConfigError, match="inside run"):
            export.save_pretrained(run.id, folder, root, overwrite=overwrite)
    assert (run.path / "config.json").read_bytes() == before
    assert export.save_pretrained(run.id, None, root) == run.path / "exported"


def test_an_earlier_export_and_an_empty_folder_are_written_to(exported, tmp_path, monkeypatch):
    root, run, _ = exported
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        assert export.save_pretrained(run.id, "~/out", root) == tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert export.save_pretrained(run.id, tmp_path / "empty", root).is_dir()


def test_folders_that_cannot_be_loaded(exported, tmp_path):
    _, _, out = exported
    config, weights = (out / "config.json").read_text(), (out / "model.safetensors").read_bytes()

    def folder(name, content=config, tensors=weights):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
        if tensors is not None:
            (tmp_path / name / "model.safetensors").write_bytes(tensors)
        return tmp_path / name

    tree = json.loads(config)
    other_vfm = {**tree["run"], "vfm": {**tree["run"]["vfm"], "weights": "random", "seed": 3}}
    for source, complaint in (
        (folder("lacks", tensors=None), "lacks model.safetensors"),
        (folder("text", content="{"), "not JSON"),
        (folder("old", content=json.dumps({**tree, "format": "other"})), "not of the format vfmlab/1"),
        (folder("cut", tensors=weights[:1000]), "truncated"),
        (folder("vfm", content=json.dumps({**tree, "run": other_vfm})), "trained on VFM weights .*vfm_weights=FILE"),
        (tmp_path / "absent", "neither a folder nor a hub repository"),
    ):
        with pytest.raises(CheckpointError, match=complaint):
            export.from_pretrained(source)
    with pytest.raises(ConfigError, match="unknown field"):
        export.from_pretrained(folder("newer", content=json.dumps({**tree, "run": {**tree["run"], "later": 1}})))


# -- the hub, with a stand-in -----------------------------------------------------------------------------------------


class Hub:
    def __init__(self, error=None):
        self.calls, self.files, self.error = [], {}, error

    def create_repo(self, **options):
        if self.error:
            raise self.error
        self.calls.append(SimpleNamespace(**options))

    def upload_folder(self, folder_path, **options):
        self.calls.append(SimpleNamespace(**options))
        self.files = {path.name: path.read_bytes() for path in export.Path(folder_path).iterdir()}


def test_push(exported):
    root, folder, out = exported
    hub = Hub()
    address = export.push_to_hub(folder.id, "someone/tokenizer", root, private=True, hub=hub)
    assert address.endswith("/someone/tokenizer")
    assert [call.repo_id for call in hub.calls] == ["someone/tokenizer"] * 2
    assert hub.calls[0].private
    assert set(hub.files) == {"config.json", "model.safetensors", "README.md"}
    assert hub.files["config.json"] == (out / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"PermissionError: no token here.*hf auth login"):
        export.push_to_hub(folder.id, "someone/tokenizer", root, hub=Hub(PermissionError("no token\nhere")))
    with pytest.raises(ConfigError, match="user/name"):
        export.push_to_hub(folder.id, "tokenizer", root, hub=hub)
