"""AlignTok: a trainable encoder, a deterministic latent, and three stages that train what they say."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from vfmlab import api, config, presets, runs, vfm
from vfmlab.data import to_float
from vfmlab.errors import ConfigError
from vfmlab.registry import TOKENIZERS
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers import linear_start
from vfmlab.tokenizers.shapes import EncoderMaps
from vfmlab.training.average import Average
from vfmlab.training.tokenizer import TokenizerTask

CONV = {"kind": "conv", "width": 8, "blocks": 1, "attention": (), "middle_attention": False}


def frozen(name="pocket", size=16, **fields):
    return vfm.build(config.VFM(name=name, weights="random", **fields), size)


def make(size=16, model=None, **fields):
    part = TOKENIZERS.get("aligntok")
    options = {"channels": 4, "factor": 4, "adapter_width": 16, "decoder": CONV, **fields}
    torch.manual_seed(0)
    return part(part.Config.model_validate(options), size, model or frozen(size=size))


def images(n=2, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_encodes_and_decodes():
    tokenizer = make().eval()
    q = tokenizer.posterior(images())
    assert q.mean.shape == (2, 4, 4, 4)
    assert q.logvar is None
    assert torch.equal(q.sample(), q.mean), "no KL, no noise"
    assert [x.shape for x in tokenizer.decode_raw(q.mean)] == [(2, 3, 16, 16)]
    assert tokenizer.layers == (), "nobody has to compute maps of the frozen VFM for it"


def test_encoder_is_the_tokenizers_own():
    model = frozen()
    tokenizer = make(model=model)
    assert {name.split(".")[0] for name, _ in tokenizer.named_parameters()} == {"encoder", "adapter", "decoder"}
    with torch.no_grad():
        for parameter in tokenizer.encoder.parameters():
            parameter.add_(0.1)
    x = images()
    assert not torch.allclose(tokenizer.own_features(x)[-1], model.features(x, (-1,)).maps[-1])
    other = make()
    other.load_state_dict(tokenizer.state_dict())
    torch.testing.assert_close(other.posterior(x).mean, tokenizer.posterior(x).mean)


def test_gradients_reach_encoder_and_adapter_through_the_maps_that_are_passed():
    tokenizer = make().train()
    x = images()
    maps = tokenizer.own_features(x)
    assert isinstance(maps, EncoderMaps)
    assert list(maps) == [-1]
    tokenizer.decode_raw(tokenizer.posterior(x, maps).mean)[0].square().mean().backward()
    silent = [name for name, p in tokenizer.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent, "a parameter without gradient stops training on several processes"
    assert tokenizer.encoder.net.early[0].weight.grad.abs().sum() > 0


def test_maps_of_the_frozen_vfm_are_not_mistaken_for_its_own():
    model = frozen()
    tokenizer = make(model=model)
    with torch.no_grad():
        tokenizer.encoder.net.norm.weight.mul_(3)
        x = images()
        alone = tokenizer.posterior(x).mean
        torch.testing.assert_close(tokenizer.posterior(x, model.features(x, (0, -1)).maps).mean, alone)
        torch.testing.assert_close(tokenizer.posterior(x, tokenizer.own_features(x)).mean, alone)


def test_frozen_encoder_costs_no_gradients():
    tokenizer = make()
    tokenizer.encoder.requires_grad_(False)
    x = images()
    assert not tokenizer.own_features(x)[-1].requires_grad
    assert tokenizer.posterior(x).mean.requires_grad, "the adapter still trains"


def test_encoder_stays_in_eval_mode_and_is_averaged():
    tokenizer = make().train()
    assert not any(module.training for module in tokenizer.encoder.modules())
    average = Average(tokenizer, config.Train(samples=8, batch=8, ema_halflife=8))
    weight = tokenizer.encoder.net.norm.weight
    average.update()
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    average.update()
    after = average.module.encoder.net.norm.weight
    assert after.data_ptr() != weight.data_ptr()
    assert ((before < after) & (after < weight)).all()
    assert average.module.vfm is tokenizer.vfm, "the frozen one is shared, not copied"
    assert not average.module.own_features(images())[-1].requires_grad


def test_several_layers_on_finer_grids():
    tokenizer = make(read=(0, -1))
    assert tokenizer.ratios == {0: 2, -1: 1}
    assert list(tokenizer.own_features(images())) == [0, -1]
    assert tokenizer.posterior(images(size=16)).mean.shape == (2, 4, 4, 4)
    assert tokenizer.posterior(images(size=8)).mean.shape == (2, 4, 2, 2)


def test_linear_start_reads_the_encoders_maps():
    tokenizer = make(linear_start=True, size=32).eval()
    found = linear_start.fit(tokenizer, [images(64, 32)])
    x = images(8, 32)
    maps = tokenizer.own_features(x)
    code = tokenizer.posterior(x).mean
    assert found > 5
    assert 0.3 < float(code.detach().std()) < 3
    torch.testing.assert_close(code, tokenizer.start.gain_encode * tokenizer.adapter(maps[-1]) + tokenizer.start.read(maps[-1]))
    assert not tokenizer.start.logvar.requires_grad


def test_what_does_not_fit():
    part = TOKENIZERS.get("aligntok")
    with pytest.raises(ConfigError, match="no 'vfm' section"):
        part(part.Config(channels=4, factor=4), 16, None)
    with pytest.raises(ConfigError, match=r"tokenizer.read: layer -1 has a 4 x 4 grid, no multiple of the latent's 8"):
        make(factor=2)
    with pytest.raises(ConfigError, match="has 4 blocks"):
        make(read=(9,))


# -- the stages ---------------------------------------------------------------------------------------------------------


def weights(folder, ema=True):
    return load_file(folder.ema if ema else folder.model)


def part(tensors, prefix):
    return {key: value for key, value in tensors.items() if key.startswith(prefix)}


def same(a, b):
    assert a.keys() == b.keys()
    assert a
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All three stages of tiny_aligntok, by name."""
    root = tmp_path_factory.mktemp("aligntok")
    small = {"data.train": 48, "data.val": 16, "protocol.n": 16, "diffusion": None, "train.batch": 8, "stages.perceptual.losses.preservation.weight": 5.0}
    recipe = api.resolve("tiny_aligntok", small)
    kinds = [event.kind for event in api.train(recipe, root=root)]
    assert kinds.count("finish") >= 3
    return recipe, root, {run.stage: runs.open_run(run.id, root) for run in recipe.phases()}


def test_each_stage_trains_what_it_says(trained):
    recipe, _, folders = trained
    assert list(folders) == ["latent", "perceptual", "refine"]
    initial = api.build_tokenizer(recipe).state_dict()
    latent, perceptual, refine = (weights(folder) for folder in folders.values())
    assert same(part(latent, "encoder."), part(initial, "encoder.")), "stage 1 leaves the encoder alone"
    assert not same(part(latent, "adapter."), part(initial, "adapter."))
    for prefix in ("encoder.", "adapter.", "decoder."):
        assert not same(part(perceptual, prefix), part(latent, prefix))
    for prefix in ("encoder.", "adapter."):
        assert same(part(refine, prefix), part(perceptual, prefix)), "stage 3 starts from its parent's average and keeps it, bit for bit"
        assert same(part(weights(folders["refine"], ema=False), prefix), part(perceptual, prefix))
    assert not same(part(refine, "decoder."), part(perceptual, "decoder."))
    assert same(part(refine, "stat_"), part(perceptual, "stat_")), "the same encoder, so the same statistics"


def test_preservation_measures_the_distance_to_the_stage_before(trained):
    *_, folders = trained
    records = {name: folder.metrics("step") for name, folder in folders.items()}
    assert not any("preservation" in record for name in ("latent", "refine") for record in records[name])
    found = [record["preservation"] for record in records["perceptual"]]
    assert found[0] == 0.0, "the first step starts from the very weights that it is compared with"
    assert found[-1] > 0


@pytest.mark.parametrize("anchor", ["after", "before"])
@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_preservation_reads_the_frozen_parent(trained, anchor, distance):
    recipe, root, folders = trained
    how = {"stages.perceptual.losses.preservation": {"anchor": anchor, "distance": distance, "weight": 1.0}}
    run = config.override(recipe, how).phases()[1]
    parent = api.load_tokenizer(folders["latent"].id, root, on="cpu")
    task = TokenizerTask(run, parent, folders["latent"])
    with torch.no_grad():
        for parameter in task.weights.encoder.parameters():
            parameter.mul_(1.1)
    batch = task.source.batch(torch.arange(4))
    _, metrics, _ = task.objective(batch, StepRandom(0, 0, 4), 0)
    x = to_float(batch.images)

    def read(tokenizer):
        return tokenizer.posterior(x).mode() if anchor == "after" else tokenizer.own_features(x)[-1]

    with torch.no_grad():
        new, old = read(task.weights), read(parent)
    far = (new - old).square().mean() if distance == "l2" else (1 - torch.cosine_similarity(new, old, dim=1)).mean()
    assert far > 1e-4
    torch.testing.assert_close(metrics["preservation"], far, rtol=1e-3, atol=1e-6)
    assert same(part(parent.state_dict(), "encoder."), part(weights(folders["latent"]), "encoder."))


def test_checkpoint_brings_the_encoder(trained):
    _, root, folders = trained
    tokenizer = api.load_tokenizer(folders["refine"].id, root, on="cpu")
    saved = weights(folders["refine"])
    assert same(part(tokenizer.state_dict(), "encoder."), part(saved, "encoder."))
    x = images()
    frozen_maps = tokenizer.vfm.features(x, (-1,)).maps[-1]
    assert not torch.equal(tokenizer.own_features(x)[-1], frozen_maps)
    z = tokenizer.encode(x).mode()
    assert tokenizer.decode(z).shape == x.shape


@pytest.mark.parametrize("name", [name for name in presets.names() if "aligntok" in name])
def test_presets_follow_the_paper(name):
    recipe = presets.get(name)
    latent, perceptual, refine = recipe.phases()[:3]
    assert not any(glob.startswith("encoder") or glob == "*" for glob in latent.trains)
    assert perceptual.trains == ("*",)
    assert perceptual.train.lr_for == {"encoder.*": 0.1}
    assert all(glob.startswith(("decoder", "start.write", "start.gain_decode")) for glob in refine.trains)
    assert [("preservation" in run.losses) for run in (latent, perceptual, refine)] == [False, True, False]
    term = perceptual.losses["preservation"]
    assert (term.weight, term.distance, term.anchor) == (1.0, "l2", "after")
    assert "kl" not in refine.losses
    assert recipe.tokenizer.read == (-1,)
    if recipe.tier in ("small", "paper"):
        assert refine.losses["adversarial"].weight == 0.5
        assert refine.losses["adversarial"].start == 0
    if recipe.tier == "pocket":
        assert sum(run.budget for run in recipe.phases()[:3]) == presets.get("pocket_vfm_vae").train.samples
