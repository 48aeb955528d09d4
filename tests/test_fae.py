"""FAE: the paper's sizes, what reads what, the loss on rebuilt features, its two stages, refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vfmlab import api, config, presets, vfm
from vfmlab.config import override
from vfmlab.errors import ConfigError
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.losses.feature_reconstruction import FeatureReconstruction
from vfmlab.registry import TOKENIZERS
from vfmlab.tokenizers.base import Posterior
from vfmlab.tokenizers.fae import FeatureDecoder, OneAttention

VIT = {"kind": "vit", "width": 16, "depth": 1, "heads": 2, "hidden": 16}


@pytest.fixture(scope="module")
def model():
    return vfm.build(config.VFM(name="pocket"), 16)


def make(model, **fields):
    torch.manual_seed(0)
    part = TOKENIZERS.get("fae")
    small = {"channels": 6, "factor": 4, "heads": 2, "head_width": 8, "feature_depth": 1, "decoder": VIT}
    return part(part.Config.model_validate(small | fields), 16, model)


def images(n=8):
    small = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return F.interpolate(small, (16, 16), mode="bicubic").clamp(-1, 1)


def test_published_sizes():
    """Encoder and feature decoder on DINOv2-g/14 (1536 x 16 x 16): 38.17 M (64 outputs) and 170.43 M parameters."""
    with torch.device("meta"):
        encoder, decoder = OneAttention(1536, 64, 24, 256), FeatureDecoder(32, 1536, 16, 6, 24, 4.0)
    assert [round(sum(p.numel() for p in part.parameters()) / 1e6, 2) for part in (encoder, decoder)] == [38.17, 170.43]


def test_shapes_and_other_sizes(model):
    tokenizer, x = make(model), images()
    q = tokenizer.posterior(x)
    assert q.mean.shape == q.logvar.shape == (8, 6, 4, 4)
    rebuilt = tokenizer.rebuild(q.mean)
    assert {layer: m.shape for layer, m in rebuilt.items()} == {-1: (8, 128, 4, 4)}
    assert tokenizer.decode_raw(q.mean)[0].shape == x.shape
    assert tokenizer.posterior(x[..., :8, :8]).mean.shape == (8, 6, 2, 2)
    assert tokenizer.decode_raw(q.mean[..., :2, :2])[0].shape == (8, 3, 8, 8)
    given = model.features(x, (-1,)).maps
    torch.testing.assert_close(tokenizer.posterior(torch.zeros_like(x), given).mean, q.mean)
    assert set(make(model, layer=2).rebuild(q.mean)) == {2}


def test_pixels_are_painted_from_rebuilt_features(model):
    tokenizer, z = make(model), torch.randn(2, 6, 4, 4)
    tokenizer.begin([images()])
    rebuilt = tokenizer.rebuild(z)[-1]
    expected = tokenizer.decoder(tokenizer.standardise(rebuilt))[0]
    torch.testing.assert_close(tokenizer.decode_raw(z)[0], expected, atol=1e-5, rtol=1e-4)
    straight = make(model, decode_from="latent")
    torch.testing.assert_close(straight.decode_raw(z)[0], straight.decoder(z)[0])


def test_attention_takes_part():
    """What a token becomes depends on the others."""
    encoder = OneAttention(12, 4, 2, 8)
    x = torch.randn(1, 5, 12)
    other = x.clone()
    other[:, 0] = torch.randn(12)
    assert ((encoder(x) - encoder(other)).abs().amax((0, 2)) > 1e-6).all()


def test_every_parameter_takes_part(model):
    tokenizer = make(model, linear_start=True)
    tokenizer.begin([images(16)])
    q = tokenizer.posterior(images())
    z = q.sample(torch.Generator().manual_seed(0))
    (tokenizer.decode_raw(z)[0].square().mean() + q.kl().mean()).backward()
    assert not [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()]
    torch.autograd.grad(tokenizer.posterior(images()).mean.square().sum(), tokenizer.last_encoder_layer())


def test_begin_measures_the_map(model):
    tokenizer = make(model)
    tokenizer.begin(list(images(24).split(8)))
    maps = model.features(images(24), (-1,)).maps[-1]
    torch.testing.assert_close(tokenizer.standardise.mean, maps.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)


def test_clear_errors(model):
    with pytest.raises(ConfigError, match=r"layer 0 has a 8 x 8 grid, but tokenizer.factor 4 asks for 4 x 4"):
        make(model, layer=0)
    with pytest.raises(ConfigError, match=r"tokenizer.feature_heads 3: .*128 must be a multiple of 4 x heads"):
        make(model, feature_heads=3)
    with pytest.raises(ConfigError, match="no 'vfm' section"):
        make(None)


# -- the loss ----------------------------------------------------------------------------------------------------------


def reconstruction(rebuilt, features=None):
    x, z = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 2, 2)
    return Reconstruction(x, [x], Posterior(z), z, features or {}, rebuilt=rebuilt)


def test_loss_values(model):
    context = LossContext(16, 4, 4, model)

    def value(rebuilt, features, **fields):
        return float(FeatureReconstruction(FeatureReconstruction.Config(**fields), context)(reconstruction(rebuilt, features)))

    theirs = {-1: torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(2, 2, 2, 2)}
    ours = {-1: torch.tensor([4.0, 3.0]).view(1, 2, 1, 1).expand(2, 2, 2, 2)}
    assert value(theirs, theirs, cosine=1.0) == pytest.approx(0, abs=1e-6)
    assert value(ours, theirs) == pytest.approx(1.0)
    assert value(ours, theirs, l2=0, cosine=1) == pytest.approx(1 - 24 / 25)
    assert value(ours, theirs, l2=2, cosine=10) == pytest.approx(2.4)
    assert value(ours | {2: ours[-1]}, theirs | {2: ours[-1]}) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="rebuilds no features; use tokenizer.method=fae"):
        value(None, theirs)
    with pytest.raises(ConfigError, match="both 0"):
        FeatureReconstruction(FeatureReconstruction.Config(l2=0), context)
    with pytest.raises(ConfigError, match="no 'vfm' section"):
        FeatureReconstruction(FeatureReconstruction.Config(), LossContext(16, 4, 4))


# -- runs --------------------------------------------------------------------------------------------------------------


def test_two_stages(tmp_path):
    """The first learns to rebuild features and leaves the pixel decoder alone; the second is the other way round."""
    run = override(presets.get("tiny_fae"), {"data.train": 48, "data.val": 16})
    first, second, _ = run.phases()
    assert (first.name, second.name) == ("tiny_fae_features", "tiny_fae_pixels")
    assert "feature_reconstruction" not in second.losses
    steps = [event.data for event in api.train(second, root=tmp_path) if "feature_reconstruction" in event.data]
    assert steps[-1]["feature_reconstruction"] < steps[0]["feature_reconstruction"]
    before, after = (dict(api.load_tokenizer(part.id, root=tmp_path).state_dict()) for part in (first, second))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"stat_mean", "stat_std", "stat_count"} == {"decoder"}
    assert api.load_tokenizer(second.id, root=tmp_path).statistics.std.min() > 0
