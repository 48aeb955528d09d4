"""Every quantiser: one contract; closed forms; values and gradients of the stored ones."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from golden_values import close
from safetensors.torch import load_file
from torch.nn import functional as F

from vfmlab.errors import ConfigError, DataError
from vfmlab.evaluation.instruments.base import Part
from vfmlab.evaluation.instruments.codebook import CodebookUse, perplexity
from vfmlab.evaluation.number import Draft
from vfmlab.evaluation.protocol import Resolved
from vfmlab.losses import adversarial
from vfmlab.nn.quantizers.base import counting, nearest
from vfmlab.nn.quantizers.simvq import rotated
from vfmlab.registry import QUANTIZERS

CHANNELS = {"fsq": 3, "lfq": 5}
OPTIONS = {"fsq": {"levels": (4, 3, 5)}, "lfq": {}, "multi": {"size": 32, "codebooks": 2}}


def build(kind, channels=None, **options):
    entry = QUANTIZERS.get(kind)
    options = options or OPTIONS.get(kind, {"size": 32})
    return entry(entry.Config(**options), channels or CHANNELS.get(kind, 4))


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- one contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_indices_give_the_latent_to_the_bit(kind):
    torch.manual_seed(0)
    quantizer = build(kind).eval()
    x = tokens(2, 7, quantizer.channels)
    out = quantizer(x)
    assert out.latent.shape == x.shape
    assert out.indices.shape == (2, 7 * quantizer.parts)
    assert out.indices.dtype == torch.long
    assert torch.equal(quantizer.look_up(quantizer.check(out.indices)), out.latent)
    assert quantizer.entries().shape == (quantizer.size, quantizer.channels // quantizer.parts)
    assert out.loss.shape == out.entropy.shape == ()
    assert torch.equal(quantizer.snap(out.latent), out.latent)


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_the_input_gets_a_gradient_and_autocast_does_not_reach_the_look_up(kind):
    torch.manual_seed(0)
    quantizer = build(kind).eval()
    x = tokens(2, 7, quantizer.channels).requires_grad_()
    out = quantizer(x)
    (out.latent * tokens(*x.shape, seed=1)).sum().backward()
    assert x.grad.abs().sum() > 0
    entries, near = quantizer.entries(), quantizer.snap(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = quantizer(x)
        assert half.entropy.dtype == half.loss.dtype == half.latent.dtype == torch.float32
        for ours, plain in ((quantizer.look_up(half.indices), out.latent), (quantizer.entries(), entries),
                            (quantizer.snap(x), near)):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, plain)
    assert torch.equal(half.indices, out.indices)
    assert torch.equal(half.latent, out.latent)


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_use_is_counted_in_training(kind):
    torch.manual_seed(0)
    quantizer = build(kind).train()
    out = quantizer(tokens(1, 1, quantizer.channels).expand(1, 9, -1))
    for book in counting(quantizer):
        assert book.effective() == pytest.approx(1 / book.size)
    assert out.usage == pytest.approx(100 / counting(quantizer)[0].size, rel=1e-5)


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_codes_of_another_codebook_are_refused(kind):
    quantizer = build(kind)
    for wrong in (-1, quantizer.size):
        with pytest.raises(DataError, match=f"0 to {quantizer.size - 1}"):
            quantizer.check(torch.full((1, quantizer.parts), wrong))


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_a_codebook_of_known_points():
    quantizer = build("vq", 2, size=4)
    quantizer.weight.data = torch.tensor([[0.0, 0], [4, 0], [0, 4], [4, 4]])
    out = quantizer(torch.tensor([[[1.0, 0.5], [3, 0], [0.5, 3], [2.5, 2.5]]]))
    assert out.indices.tolist() == [[0, 1, 2, 3]]
    squared = (1 + 0.25 + 1 + 0.25 + 1 + 2.25 + 2.25) / 8
    assert out.loss.item() == pytest.approx(1.25 * squared)
    legacy = build("vq", 2, size=4, legacy=True)
    legacy.weight.data = quantizer.weight.data.clone()
    x = torch.tensor([[[1.0, 0.5]]], requires_grad=True)
    legacy(x).loss.backward()
    torch.testing.assert_close(x.grad, x.detach())  # 2 (x - e) / 2: the commitment has weight 1
    torch.testing.assert_close(legacy.weight.grad[0], -0.25 * x.detach()[0, 0])


def test_near_ties_far_from_the_origin():
    """|x|^2 + |e|^2 - 2 x.e in 16 bits, or with |x|^2 inside, would take the wrong of two near entries."""
    entries = torch.zeros(2, 1536)
    entries[:, 0], entries[1, 1] = 3.0, 0.02
    x = tokens(1, 64, 1536) * 0 + entries[1] * torch.tensor([1.0, 0.6] + [0.0] * 1534)
    x[..., 2] = 40.0
    assert nearest(x, entries).eq(1).all()


def test_straight_through_hands_the_gradient_over():
    quantizer = build("vq").eval()
    x, upstream = tokens(2, 5, 4).requires_grad_(), tokens(2, 5, 4, seed=1)
    (quantizer(x).latent * upstream).sum().backward()
    assert torch.equal(x.grad, upstream)


def test_rotation_turns_the_gradient_with_the_token():
    """From (2, 0) onto (0, 3): a turn by 90 degrees and a stretch by 1.5; gradients are turned back."""
    x = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
    chosen = torch.tensor([[[0.0, 3.0]]])
    out = rotated(x, chosen)
    torch.testing.assert_close(out, chosen)
    (grad,) = torch.autograd.grad((out * torch.tensor([1.0, 0.0])).sum(), x)
    torch.testing.assert_close(grad, torch.tensor([[[0.0, -1.5]]]))


def test_simvq_trains_the_map_alone_and_moves_every_entry():
    quantizer = build("simvq")
    assert [name for name, _ in quantizer.named_parameters()] == ["map.weight"]
    before = quantizer.entries().detach().clone()
    quantizer(tokens(1, 1, 4)).loss.backward()
    with torch.no_grad():
        quantizer.map.weight -= 0.1 * quantizer.map.weight.grad
    assert (quantizer.entries() != before).any(dim=1).all()
    assert build("simvq", size=32, frozen=False).vectors.requires_grad
    assert quantizer.vectors.std().item() == pytest.approx(4**-0.5, rel=0.2)


def test_fsq_counts_with_the_first_channel_fastest():
    quantizer = build("fsq", 2, levels=(4, 3))
    expected = [[a / 2, b / 1] for b in (-1, 0, 1) for a in (-2, -1, 0, 1)]
    assert quantizer.entries().tolist() == expected
    assert quantizer(torch.full((1, 1, 2), -50.0)).indices.item() == 0
    assert quantizer(torch.full((1, 1, 2), 50.0)).indices.item() == 11


@pytest.mark.parametrize(("levels", "entries"), [((8, 6, 5), 240), ((8, 5, 5, 5), 1000), ((7, 5, 5, 5, 5), 4375),
                                                 ((8, 8, 8, 6, 5), 15360), ((8, 8, 8, 5, 5, 5), 64000)])  # fmt: skip
def test_fsq_reaches_every_level(levels, entries):
    quantizer = build("fsq", len(levels), levels=levels)
    assert quantizer.size == entries
    grid = torch.linspace(-6, 6, 201)[:, None].expand(-1, len(levels))
    digits = quantizer(grid[None]).latent[0] * (torch.tensor(levels) // 2) + torch.tensor(levels) // 2
    assert [sorted(set(column.tolist())) for column in digits.T] == [list(range(n)) for n in levels]


def test_lfq_writes_signs_with_the_first_channel_first():
    quantizer = build("lfq", 3)
    out = quantizer(torch.tensor([[[0.3, -1.0, 2.0], [0.0, 0.0, 0.0]]]))
    assert out.indices.tolist() == [[5, 0]]  # 101, and zero is no positive sign
    assert out.latent[0, 0].tolist() == [1, -1, 1]


def test_lfq_entropy_of_certain_and_even_tokens():
    quantizer = build("lfq", 2)
    even = quantizer(quantizer.entries()[None]).entropy.item()
    assert even == pytest.approx(-math.log(4), abs=1e-4)
    assert quantizer(torch.ones(1, 4, 2)).entropy.item() == pytest.approx(0, abs=1e-4)


def test_an_ema_codebook_moves_by_itself_and_only_where_used():
    quantizer = build("ema", 2, size=2, decay=0.5)
    quantizer.weight.copy_(torch.eye(2))
    quantizer.train()
    out = quantizer(torch.tensor([[[0.8, 0.6], [1.0, 0.0]]]))
    assert torch.equal(out.latent, torch.tensor([[[1.0, 0], [1, 0]]]))
    mean = F.normalize(torch.tensor([1.8, 0.6]), dim=0)
    torch.testing.assert_close(quantizer.weight[0], F.normalize(torch.tensor([1.0, 0]) + mean, dim=0))
    assert quantizer.weight[1].tolist() == [0, 1]
    assert not list(quantizer.parameters())
    quantizer.eval()
    before = quantizer.weight.clone()
    quantizer(torch.tensor([[[0.8, 0.6]]]))
    assert torch.equal(quantizer.weight, before)


@pytest.mark.parametrize(
    ("kind", "channels", "options", "words"),
    [("fsq", 4, {"levels": (4, 3)}, "set tokenizer.channels=2"), ("lfq", 21, {}, "at most 20"),
     ("multi", 9, {"size": 32, "codebooks": 2}, "codebooks 2 must divide")],
)  # fmt: skip
def test_widths_that_do_not_fit(kind, channels, options, words):
    entry = QUANTIZERS.get(kind)
    with pytest.raises(ConfigError, match=words):
        entry(entry.Config(**options), channels)


# -- stored values -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(golden):
    folder = golden / "discrete"
    return load_file(folder / "quantizers.safetensors"), json.loads((folder / "quantizers.json").read_text())


def rows(x):  # B C H W -> B HW C
    return x.flatten(2).transpose(1, 2)


def scalar(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def grads_near(a, b):
    assert (a - b).abs().max() < 1e-3 * b.abs().max()


def check(quantizer, io, name, z, upstream, entropy=0.0, **weights):
    """Values, loss and gradients of sum(zq x upstream) + all losses; weights: name in the file -> parameter."""
    z = z.clone().requires_grad_()
    out = quantizer(z)
    close(out.latent, rows(io[f"{name}.zq"]))
    assert torch.equal(out.indices, io[f"{name}.indices"].flatten(1))
    if f"{name}.loss" in io:
        scalar(out.loss, io[f"{name}.loss"])
    loss = (out.latent * upstream).sum() + out.loss + (entropy * out.entropy if entropy else 0)
    found = torch.autograd.grad(loss, [z, *weights.values()])
    for key, grad in zip(["z", *weights], found, strict=True):
        reference = io[f"{name}.grad.{key}"]
        grads_near(grad, rows(reference) if key == "z" else reference)
    return out


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [("llamagen_l2", "cosine", {}), ("llamagen_plain", "vq", {}), ("taming_legacy_false", "vq", {}),
     ("taming_legacy_true", "vq", {"legacy": True})],
)  # fmt: skip
def test_stored_learned_codebooks(stored, name, kind, options):
    io, facts = stored
    quantizer = build(kind, 6, size=40, beta=facts["beta"], **options)
    quantizer.weight.data.copy_(io["in.codebook"])
    entropy = facts["entropy_loss_ratio"] if f"{name}.entropy_loss" in io else 0.0
    out = check(quantizer, io, name, rows(io["in.z"]), rows(io["in.upstream"]), entropy, codebook=quantizer.weight)
    assert torch.equal(quantizer.look_up(out.indices), out.latent.detach())
    if entropy:
        scalar(entropy * out.entropy, io[f"{name}.entropy_loss"])
        scalar(out.loss, io[f"{name}.vq_loss"] + io[f"{name}.commit_loss"])
        close(quantizer.look_up(out.indices), rows(io[f"{name}.entry"]))


@pytest.mark.parametrize(("name", "kind"), [("llamagen_l2", "cosine"), ("llamagen_plain", "vq")])
def test_stored_usage(stored, name, kind):
    """Of the running use and of the exact counts; the release counts entry 0 as used from the start."""
    io, facts = stored
    quantizer = build(kind, 6, size=40, beta=facts["beta"]).train()
    quantizer.weight.data.copy_(io["in.codebook"])
    exact = CodebookUse(SimpleNamespace(tokenizer=SimpleNamespace(codebook_size=40), resolved=Resolved({"images": {"n": 4}})))
    for number, z in enumerate((io["in.z"], io["in.z_second_batch"]), start=1):
        out, draft = quantizer(rows(z)), Draft()
        exact.update(Part(None, None, None, None, None, codes=out.indices))
        exact.write(draft)
        by_default = int(exact.counts[0] == 0) / 40
        expected = pytest.approx(io[f"{name}.usage_after_{number}"].item() - by_default)
        assert draft.numbers["codebook_used"].value == expected
        assert out.usage.item() / 100 == expected


def test_stored_first_version_of_the_plain_codebook(stored):
    io, facts = stored
    quantizer = build("vq", 6, size=40, beta=facts["beta"], legacy=True)
    quantizer.weight.data.copy_(io["in.codebook"])
    out = quantizer(rows(io["in.z"]))
    close(out.latent, rows(io["taming_v1.zq"]))
    scalar(out.loss, io["taming_v1.loss"])
    assert perplexity(out.indices.flatten().bincount(minlength=40)) == pytest.approx(io["taming_v1.perplexity"].item(), rel=1e-5)


def test_stored_adversarial_losses(stored):
    io, _ = stored
    real, fake = [io["in.gan.real"]], [io["in.gan.fake"]]
    for kind, of_generator, of_discriminator in (("hinge", "hinge_g", "hinge_d"), ("nonsaturating", "softplus_g", "vanilla_d")):
        scalar(adversarial.generator_loss(fake, kind), io[f"gan.{of_generator}"])
        scalar(sum(adversarial.discriminator_losses(real, fake, kind)) / 2, io[f"gan.{of_discriminator}"])


@pytest.mark.parametrize(
    ("name", "options"),
    [("simvq", {"bias": True}), ("simvq_legacy", {"bias": True, "legacy": True}), ("simvq_nobias_ste", {}),
     ("simvq_nobias_rotation", {"estimator": "rotation"})],
)  # fmt: skip
def test_stored_simvq(stored, name, options):
    io, facts = stored
    quantizer = build("simvq", 6, size=40, beta=facts["beta"], **options)
    quantizer.vectors.copy_(io["in.simvq.frozen"])
    quantizer.map.weight.data.copy_(io["in.simvq.weight"])
    weights = {"weight": quantizer.map.weight}
    if options.get("bias"):
        quantizer.map.bias.data.copy_(io["in.simvq.bias"])
        weights["bias"] = quantizer.map.bias
        close(quantizer.entries(), io["simvq.effective_codebook"])
    out = check(quantizer, io, name, rows(io["in.simvq.z"]), rows(io["in.upstream"]), **weights)
    close(quantizer.look_up(out.indices), rows(io[f"{name}.zq"]))
    if name == "simvq":  # the release looks up without the map
        assert (quantizer.look_up(out.indices) - rows(io["simvq.released_entry_bug"])).abs().max() > 0.1


@pytest.mark.parametrize("k", range(3))
def test_stored_fsq(stored, k):
    io, facts = stored
    levels = facts["fsq_levels"][k]
    quantizer = build("fsq", len(levels), levels=levels)
    x = io[f"fsq{k}.in"].clone().requires_grad_()
    out = quantizer(x)
    close(out.latent, io[f"fsq{k}.out"])
    assert torch.equal(out.indices, io[f"fsq{k}.indices"].long())
    close(quantizer.entries(), io[f"fsq{k}.codebook"])
    (grad,) = torch.autograd.grad((out.latent * io[f"fsq{k}.upstream"]).sum(), x)
    grads_near(grad, io[f"fsq{k}.grad"])


def test_stored_lfq(stored):
    io, facts = stored
    options = facts["lfq"]
    quantizer = build("lfq", 6, commitment=options["commitment_loss_weight"], gamma=options["diversity_gamma"],
                      inverse_temperature=options["inv_temperature"])  # fmt: skip
    x = io["lfq.in"].clone().requires_grad_()
    out = quantizer(x)
    close(out.latent, io["lfq.out"])
    assert torch.equal(out.indices, io["lfq.indices"])
    close(quantizer.entries(), io["lfq.codebook"])
    scalar(out.loss, options["commitment_loss_weight"] * io["lfq.commitment"])
    scalar(out.entropy, io["lfq.per_sample_entropy"] - options["diversity_gamma"] * io["lfq.batch_entropy"])
    total = out.loss + options["entropy_loss_weight"] * out.entropy
    scalar(total, io["lfq.aux_loss"])
    (grad,) = torch.autograd.grad((out.latent * io["lfq.upstream"]).sum() + total, x)
    grads_near(grad, io["lfq.grad"])


def test_stored_ema(stored):
    io, facts = stored
    quantizer = build("ema", 6, size=40, beta=facts["beta"], decay=facts["ema_decay"]).train()
    quantizer.weight.copy_(F.normalize(io["in.codebook"], dim=-1))
    out = quantizer(rows(io["in.z"]))
    close(out.latent, io["ema.zq"])
    assert torch.equal(out.indices, io["ema.indices"])
    scalar(out.loss, io["ema.loss"])
    close(quantizer.weight, io["ema.weight_after_1"])
    quantizer(rows(io["in.z_second_batch"]))
    close(quantizer.weight, io["ema.weight_after_2"])
