"""The multi-codebook quantiser against stored values, closed forms and its own inverse."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab.errors import ConfigError
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.nn.quantizers.cosine import CosineQuantizer
from vfmlab.nn.quantizers.multi import MultiCodebookQuantizer
from vfmlab.registry import LOSSES
from vfmlab.tokenizers.base import CodePosterior, Posterior


def multi(channels, entries, codebooks):
    return MultiCodebookQuantizer(MultiCodebookQuantizer.Config(size=entries, codebooks=codebooks), channels)


@pytest.fixture
def stored(golden):
    """The quantiser with stored codebooks (4 of 64 entries of width 8), in training mode, and the stored values."""
    io = load_file(golden / "vfmvae_components.safetensors")
    quantizer = multi(32, 256, 4)
    for k, book in enumerate(quantizer.codebooks):
        book.weight.data.copy_(io[f"vq.sd.codebooks.{k}.codebook.weight"])
        book.usage.copy_(io[f"vq.sd.codebooks.{k}.vocab_usage"])
    return quantizer.train(), io


def test_values(stored):
    quantizer, io = stored
    out = quantizer(io["vq.in"])
    # the codes of a token follow each other, those of the second codebook begin where the first one's end
    apart = out.indices.unflatten(1, (-1, 4)) - torch.arange(4) * 64
    assert torch.equal(apart.transpose(1, 2), io["vq.indices"])
    torch.testing.assert_close(out.latent, io["vq.latent"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(quantizer.look_up(out.indices), io["vq.idx_to_f"], atol=1e-6, rtol=1e-5)
    for ours, name in ((out.loss, "vq_loss"), (out.entropy, "entropy_loss"), (out.usage, "usage")):
        torch.testing.assert_close(ours, io[f"vq.{name}"], rtol=1e-5, atol=0)
    for k, book in enumerate(quantizer.codebooks):
        torch.testing.assert_close(book.usage, io[f"vq.vocab_usage_after.{k}"])


def test_gradients(stored):
    """The stored gradients are those of sum(latent) + loss + 0.1 entropy (found by regression on the three terms)."""
    quantizer, io = stored
    x = io["vq.in"].clone().requires_grad_()
    out = quantizer(x)
    (out.latent.sum() + out.loss + 0.1 * out.entropy).backward()
    found = {"in": x.grad, **{f"codebook.{k}": book.weight.grad for k, book in enumerate(quantizer.codebooks)}}
    for name, grad in found.items():
        reference = io[f"vq.grad_{name}"]
        assert (grad - reference).abs().max() < 1e-3 * reference.abs().max(), name


def test_tokens_at_entries_cost_nothing():
    quantizer = multi(8, 32, 2)
    indices = torch.randint(16, (3, 10)) + torch.tensor([0, 16]).repeat(5)
    out = quantizer(quantizer.look_up(indices) * 7)  # length does not matter
    assert torch.equal(out.indices, indices)
    assert out.loss < 1e-12


def test_straight_through():
    """Values of the codebook; the gradient is that of the normalised input."""
    quantizer = multi(8, 32, 2)
    x = torch.randn(2, 5, 8, requires_grad=True)
    weight = torch.randn(2, 5, 8)
    (grad,) = torch.autograd.grad((quantizer(x).latent * weight).sum(), x)
    plain = x.detach().requires_grad_()
    normal = torch.cat([F.normalize(part, dim=-1) for part in plain.chunk(2, -1)], -1)
    torch.testing.assert_close(grad, torch.autograd.grad((normal * weight).sum(), plain)[0])


def test_entropy_prefers_decided_and_even_use():
    quantizer = multi(2, 4, 1)
    quantizer.codebooks[0].weight.data = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    even = quantizer(quantizer.codebooks[0].weight[None]).entropy.item()
    collapsed = quantizer(torch.tensor([1.0, 0]).expand(1, 4, 2)).entropy.item()
    assert even == pytest.approx(-math.log(4), abs=1e-4)
    assert collapsed == pytest.approx(0, abs=1e-4)


def test_usage_counts_in_training_only():
    quantizer = multi(4, 8, 1).eval()
    x = quantizer.look_up(torch.tensor([[0, 0, 1, 1]]))
    assert quantizer(x).usage == 25
    assert not quantizer.codebooks[0].usage.any()
    quantizer.train()
    quantizer(x)
    assert quantizer.codebooks[0].usage.tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    for _ in range(3):
        quantizer(quantizer.look_up(torch.tensor([[2, 2, 2, 2]])))
    torch.testing.assert_close(quantizer.codebooks[0].usage[:3], torch.tensor([0.3645, 0.3645, 0.271]))


def test_autocast_does_not_reach_it():
    quantizer = multi(8, 32, 2)
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        half = quantizer(x)
    assert half.loss.dtype == torch.float32
    assert torch.equal(half.latent, quantizer(x).latent)


def test_codebook_loss():
    context = LossContext(size=32, channels=8, latent_side=2)
    quantizer = multi(8, 32, 2)
    codes = quantizer(torch.randn(2, 4, 8))
    z = codes.latent.transpose(1, 2).unflatten(2, (2, 2))
    images = torch.zeros(2, 3, 8, 8)
    r = Reconstruction(images, [images], CodePosterior(z, None, codes), z)
    entry = LOSSES.get("codebook")
    torch.testing.assert_close(entry(entry.Config(), context)(r), codes.loss)
    torch.testing.assert_close(entry(entry.Config(entropy=0.5), context)(r), codes.loss + 0.5 * codes.entropy)
    with pytest.raises(ConfigError, match=r"tokenizer\.discrete=true"):
        entry(entry.Config(), context)(Reconstruction(images, [images], Posterior(z), z))


def test_sizes_that_do_not_divide():
    for channels, entries in ((9, 32), (8, 33)):
        with pytest.raises(ConfigError, match="codebooks 2"):
            multi(channels, entries, 2)


def test_effective_share_of_entries():
    """exp(entropy) / entries: all alike 1, one alone 1 / n, two alike 2 / n; nothing seen 0."""
    book = CosineQuantizer(CosineQuantizer.Config(size=8), 2)
    assert book.effective() == 0
    for share, expected in (([1 / 8] * 8, 1.0), ([1.0] + [0.0] * 7, 1 / 8), ([0.5, 0.5] + [0.0] * 6, 2 / 8)):
        book.usage.copy_(torch.tensor(share))
        assert book.effective() == pytest.approx(expected)
