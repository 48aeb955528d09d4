"""VQGAN and what every quantised tokenizer offers: codes and images from codes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vfmlab import presets
from vfmlab.config import override
from vfmlab.data import to_uint8
from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation import evaluate
from vfmlab.evaluation.instruments.base import Part
from vfmlab.evaluation.instruments.codebook import CodebookUse
from vfmlab.evaluation.number import Draft
from vfmlab.evaluation.protocol import Resolved
from vfmlab.registry import TOKENIZERS
from vfmlab.studies import interpolate
from vfmlab.tokenizers.base import measure
from vfmlab.training.check import check
from vfmlab.training.tokenizer import TokenizerTask


def build(**changes):
    torch.manual_seed(0)
    run = override(presets.get("tiny_vqgan"), {f"tokenizer.{key}": value for key, value in changes.items()})
    return TOKENIZERS.get("vqgan")(run.tokenizer, run.data.size).eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("quantizer", [{"kind": "cosine", "size": 32}, {"kind": "multi", "size": 32, "codebooks": 2}])
def test_images_from_codes_are_those_of_the_forward_pass(images, quantizer):
    tokenizer = build(quantizer=quantizer)
    codes = tokenizer.codes(images)
    parts = quantizer.get("codebooks", 1)
    assert codes.shape == (3, 16 * parts)
    assert codes.dtype == torch.long
    assert tokenizer.quantised
    assert tokenizer.latent_shape == (16 * parts,)
    assert tokenizer.code_grid == ((4, 4) if parts == 1 else None)
    assert tokenizer.codebook_size == 32
    assert tokenizer.codebook().shape == (32, 4 // parts)
    whole = tokenizer.decode_raw(tokenizer.posterior(images).mode())[0].clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode_codes(codes), whole, atol=1e-6, rtol=0)  # with gradients other kernels
    assert torch.equal(tokenizer.codes(images), codes)


def test_a_codebook_of_one_used_entry_has_statistics(images):
    """Collapse is a warning, not the end of the run."""
    tokenizer = build()
    tokenizer.quantizer.weight.data[:] = torch.tensor([1.0, 0, 0, 0])
    tokenizer.set_statistics(measure(tokenizer, [images], "three images"))
    assert torch.isfinite(tokenizer.encode(images).mode()).all()


def test_codes_of_another_tokenizer_are_one_line(images):
    tokenizer, multi = build(), build(quantizer={"kind": "multi", "size": 32, "codebooks": 2})
    codes = tokenizer.codes(images)
    with pytest.raises(DataError, match="the codebook has entries 0 to 31"):
        tokenizer.decode_codes(codes + 32)
    with pytest.raises(DataError, match=r"codes of shape \(3, 15\).*has a long tensor B x 16"):
        tokenizer.decode_codes(codes[:, :15])
    with pytest.raises(DataError, match="codes are integers"):
        tokenizer.decode_codes(codes.float())
    assert torch.equal(tokenizer.decode_codes(codes.to(torch.uint8)), tokenizer.decode_codes(codes))
    with pytest.raises(DataError, match="a long tensor B x 16, not this list"):
        tokenizer.decode_codes(codes.tolist())
    with pytest.raises(DataError, match="each token has 2 codes"):
        multi.decode_codes(multi.codes(images).flip(1))
    assert torch.equal(multi.decode_codes(multi.codes(images).to(torch.uint8)), multi.decode_codes(multi.codes(images)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x[..., ::2, ::2], r"\(3, 3, 8, 8\).*takes images B x 3 x 16 x 16"),
        (lambda x: x.repeat(1, 1, 1, 2), r"\(3, 3, 16, 32\)"),
        (lambda x: x[:, :1], r"\(3, 1, 16, 16\)"),
        (lambda x: x[0], r"\(3, 16, 16\)"),
        (lambda x: x.numpy(), "ndarray"),
        (to_uint8, "images of torch.uint8.*to_float"),
        (lambda x: (x + 1) * 127.5, "float32 from .* to 25"),
        (lambda x: x * float("nan"), "nan"),
    ],
    ids=["small", "wide", "grey", "one", "numpy", "8 bits", "0 to 255", "nan"],
)
def test_what_is_no_image_has_no_codes(images, change, words):
    with pytest.raises(DataError, match=words):
        build().codes(change(images))


def test_a_continuous_tokenizer_has_no_codes(images):
    run = presets.get("tiny_plain_vae")
    tokenizer = TOKENIZERS.get("plain_vae")(run.tokenizer, 16)
    assert not tokenizer.quantised
    assert tokenizer.latent_shape == tokenizer.map_shape == (4, 4, 4)
    for ask in (lambda: tokenizer.codes(images), tokenizer.codebook, lambda: tokenizer.codebook_size):
        with pytest.raises(ConfigError, match="'plain_vae' has a continuous latent and no codes"):
            ask()


def test_diffusion_refuses_codes():
    with pytest.raises(ConfigError, match="'vqgan' is codes.*'ar' section") as caught:
        presets.get("tiny_vqgan@tiny_plain_vae")
    assert "\n" not in str(caught.value)


VQ_8 = {"factor": 8, "multipliers": [1, 2, 2, 4], "attention": [32], "decoder.multipliers": [1, 2, 2, 4], "decoder.attention": [32]}


@pytest.mark.parametrize(("changes", "count", "codes"), [({}, 71_883_403, 256), (VQ_8, 70_109_835, 1024)], ids=["f16", "f8"])
def test_paper_sizes(changes, count, codes):
    """LlamaGen's, as counted on the releases."""
    run = override(presets.get("paper_vqgan"), {f"tokenizer.{key}": value for key, value in changes.items()})
    with torch.device("meta"):
        tokenizer = TOKENIZERS.get("vqgan")(run.tokenizer, 256)
    assert sum(p.numel() for p in tokenizer.parameters()) == count
    assert tokenizer.latent_shape == (codes,)


def test_a_walk_stays_in_the_codebook(images):
    tokenizer = build()
    tokenizer.set_statistics(measure(tokenizer, [images], "three images"))
    walk = interpolate.images(tokenizer, images[:1], images[1:2], 5)
    codes = tokenizer.codes(images)
    torch.testing.assert_close(walk.frames[[0, -1]], tokenizer.decode(codes[:2]), atol=1e-4, rtol=0)
    z = tokenizer.on_codebook(torch.randn(1, 4, 4, 4))
    tokens = tokenizer.denormalise(z).flatten(2).transpose(1, 2)
    assert torch.cdist(tokens, tokenizer.codebook()[None]).amin(-1).max() < 1e-3


def test_use_is_counted_over_a_whole_set(images):
    """Integer counts over batches; entries that no image uses are named."""
    tokenizer = build(quantizer={"kind": "vq", "size": 8}, channels=2)
    metric = CodebookUse(SimpleNamespace(tokenizer=tokenizer, resolved=Resolved({"images": {"n": 4}})))
    for codes in ([[0, 1], [1, 1]], [[5, 1], [0, 5]]):
        metric.update(Part(None, None, None, None, None, codes=torch.tensor(codes)))
    draft = Draft()
    metric.write(draft)
    numbers = draft.numbers
    assert metric.counts.tolist() == [2, 4, 0, 0, 0, 2, 0, 0]
    assert numbers["codebook_used"].value == 3 / 8
    assert numbers["codebook_dead"].value == 5
    assert numbers["codebook_dead"].facts["dead"] == [2, 3, 4, 6, 7]
    assert numbers["codebook_perplexity"].value == pytest.approx(2**1.5)
    assert numbers["codebook_used"].n == 4


def test_a_codebook_of_32_of_which_one_entry_is_used_collapsed(images):
    """It is more than the share below which a large codebook is said to have collapsed."""
    run = presets.get("tiny_vqgan")
    tokenizer = build(quantizer={"kind": "vq", "size": 32})
    tokenizer.quantizer.weight.data.zero_()  # the first of equal entries is the nearest
    tokenizer.set_statistics(measure(tokenizer, [images], "test"))
    report = evaluate.tokenizer_report(tokenizer, run.data, run.protocol)
    assert report["codebook_used"].value == 1 / 32
    assert any("the quantiser collapsed: 3.12% of" in line for line in report.warnings)
    tokenizer.train().posterior(images)
    assert "the quantiser collapsed" in TokenizerTask.remark(SimpleNamespace(weights=tokenizer))


@pytest.mark.parametrize("kind", ["vq", "cosine", "simvq", "fsq", "lfq", "ema"])
def test_every_quantiser_is_a_variant_that_trains(images, kind):
    run = presets.get(f"tiny_vqgan+{kind}")
    assert run.name == f"tiny_vqgan_{kind}"
    tokenizer = TOKENIZERS.get("vqgan")(run.tokenizer, run.data.size).train()
    assert tokenizer.codebook_size == 32
    posterior = tokenizer.posterior(images)
    tokenizer.decode_raw(posterior.mean)[0].square().mean().backward()
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert ("codebook" in run.losses) == (kind != "fsq")


def test_a_codebook_that_moves_once_a_batch_sees_it_undivided():
    """In parts it would move once a part, and `train.accumulation`, which is about memory, would change the result."""
    change = {"train.accumulation": 2, "train.evaluate_at": []}
    check(override(presets.get("tiny_vqgan+cosine"), change).phases())
    moves = override(presets.get("tiny_vqgan+ema"), change)
    with pytest.raises(ConfigError, match=r"train\.accumulation = 2: .*kind=ema moves once a batch.*accumulation=1") as caught:
        check(moves.phases())
    assert "\n" not in str(caught.value)
    check(override(moves, {"train.accumulation": 1}).phases())


@pytest.mark.parametrize(("chain", "size"), [("vq", 32), ("fsq+vq", 32), ("lfq+simvq", 32), ("ema+cosine", 32)])
def test_a_variant_has_about_as_many_entries(chain, size):
    recipe = presets.get(f"tiny_vqgan+{chain}")
    assert recipe.tokenizer.quantizer.size == size
    assert recipe.losses["codebook"].weight == 1, "also after fsq, which has no loss"


def test_a_codebook_does_not_train_without_its_loss():
    off = override(presets.get("tiny_vqgan+simvq"), {"losses.codebook": 0})
    with pytest.raises(ConfigError, match="losses.codebook: it is off.*'simvq'.*losses.codebook=1"):
        check(off.phases())
    check(override(off, {"trains": ["decoder.*"]}).phases())
    for kind in ("fsq", "ema"):  # nothing to learn; moved by averages
        check(override(presets.get(f"tiny_vqgan+{kind}"), {"losses.codebook": 0}).phases())


def test_a_variant_of_the_quantiser_needs_one():
    with pytest.raises(ConfigError, match="variant 'simvq' of 'tiny_plain_vae'.*pocket_vqgan"):
        presets.get("tiny_plain_vae+simvq")


def test_a_generator_of_codes_takes_any_of_them():
    for name in ("tiny_vfmtok@tiny_ar", "tiny_vqrae@tiny_ar", "tiny_vqgan+fsq@tiny_ar"):
        assert presets.get(name).ar is not None
