"""The ar generator's network, drawing and training forward: one token at a time as at once, any order, no batch effects."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import awake
from torch.nn import functional as F

from vfmlab.ar.llamagen import CodeShape, LlamaGen
from vfmlab.ar.objective import ARObjective, image_bits
from vfmlab.ar.rar import RAR
from vfmlab.ar.sampling import guidance_at, sample, trajectory
from vfmlab.config import AR, Guidance, TokenSampler
from vfmlab.errors import ConfigError
from vfmlab.nn.rope import rotary_line, rotate
from vfmlab.registry import TOKEN_NETWORKS
from vfmlab.seeding import SampleRandom, StepRandom, generator

SMALL = {"width": 16, "depth": 2, "heads": 2, "multiple": 8, "dropout": 0.0}
GRID, LINE = CodeShape(11, 6, (2, 3)), CodeShape(11, 6, None)
CLASSES = 3


def build(codes=GRID, **options):
    torch.manual_seed(0)
    return awake(LlamaGen(LlamaGen.Config(**SMALL | options), codes, CLASSES)).eval()


def inputs(batch=4):
    g = generator("ar inputs")
    return torch.arange(batch) % (CLASSES + 1), torch.randint(11, (batch, 6), generator=g)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("codes", [GRID, LINE], ids=["grid", "line"])
@pytest.mark.parametrize("options", [{}, {"class_rope": "identity"}, {"target_places": True}], ids=str)
def test_one_token_at_a_time_is_all_at_once(codes, options):
    network, (labels, drawn) = build(codes, **options), inputs()
    cache = network.cache(len(labels) + 1)  # room for more than there are
    steps = [network.first(labels, cache), *(network.next(code, cache) for code in drawn.T[:-1])]
    whole = network.logits(labels, drawn)
    close(torch.stack(steps, 1), whole)
    steps = [network.first(labels, cache), network.next(drawn[:, 0], cache)]  # a cache begins anew
    close(torch.stack(steps, 1), whole[:, :2])


@torch.no_grad()
def test_a_code_depends_on_those_before_and_the_class():
    network, (labels, codes) = build(), inputs()
    logits = network.logits(labels, codes)
    later = codes.clone()
    later[:, 3:] = (later[:, 3:] + 1) % 11
    changed = (network.logits(labels, later) - logits).abs().amax((0, 2))
    assert torch.equal(changed[:4], torch.zeros(4))
    assert (changed[4:] > 1e-4).all()
    assert (network.logits(labels.flip(0), codes) - logits).abs().amax() > 1e-4


@torch.no_grad()
def test_an_order_is_the_same_sum_in_other_steps():
    network, (labels, codes) = build(target_places=True), inputs()
    raster = torch.arange(6).expand(4, 6)
    close(network(labels, codes, raster), network(labels, codes))
    order = torch.stack([torch.randperm(6, generator=generator("order", i)) for i in range(4)])
    logits = network(labels, codes, order)
    one = network(labels[1:2], codes[1:2], order[1:2])
    close(one, logits[1:2])
    same_start = order.clone()
    same_start[:, 4:] = order[:, 4:].flip(1)  # the last two places in the other order
    close(network(labels, codes, same_start)[:, :4], logits[:, :4])


def test_places_in_a_row_turn_by_their_distance():
    table, x = rotary_line(9, 8), torch.randn(1, 1, 1, 8, generator=generator("row"))
    turned = rotate(x.expand(1, 1, 9, 8).contiguous(), table)
    products = torch.einsum("bhnd,bhmd->nm", turned, turned)
    close(products.diagonal(2), products[0, 2].expand(7))
    assert (products[0, 1:] < products[0, 0]).all()


def test_the_first_loss_is_the_logarithm_of_the_codebook_and_training_lowers_it():
    torch.manual_seed(1)
    network = LlamaGen(LlamaGen.Config(**SMALL | {"target_places": True}), GRID, CLASSES)
    for permuted in (None, {"until": 8, "raster": 16}):
        config = AR.model_validate({"network": network.config.model_dump(), "train": {"samples": 8}, "permuted": permuted})
        objective, (labels, codes) = ARObjective(network, config), inputs()
        loss, metrics = objective((codes, labels), StepRandom(0, 0, 4), 0)
        if permuted is None:
            assert loss.item() == pytest.approx(math.log(11), rel=1e-6)
        assert metrics["bits_per_image"].item() == pytest.approx(loss.item() * 6 / math.log(2), rel=1e-5)
        optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
        for step in range(25):
            optimizer.zero_grad()
            objective((codes, labels), StepRandom(0, step, 4), step)[0].backward()
            optimizer.step()
        assert objective((codes, labels), StepRandom(0, 0, 4), 100)[0] < 0.6 * loss


def test_orders_become_raster_order():
    permuted = AR.model_validate({"network": {"kind": "llamagen", **SMALL, "target_places": True}, "train": {"samples": 1},
                                  "permuted": {"until": 10, "raster": 30}}).permuted
    assert [permuted.chance(n) for n in (0, 9, 10, 20, 30, 99)] == [1, 1, 1, 0.5, 0, 0]


@torch.no_grad()
def test_bits_of_an_image():
    network, (labels, codes) = build(), inputs()
    p = network.logits(labels, codes).softmax(2).gather(2, codes[:, :, None])[..., 0]
    close(image_bits(network, labels, codes), -p.double().log2().sum(1))


def test_an_image_depends_on_its_seed_and_number_alone():
    network, labels = build(), torch.tensor([0, 1, 2, 3])
    for guidance in (None, Guidance(scale=2.5)):
        sampler = TokenSampler(top_k=7, top_p=0.95, guided=4)
        whole = sample(network, labels, SampleRandom(5, range(4)), sampler, guidance)
        parts = [sample(network, labels[i : i + 1], SampleRandom(5, [i]), sampler, guidance) for i in range(4)]
        assert torch.equal(whole, torch.cat(parts))
        assert not torch.equal(whole, sample(network, labels, SampleRandom(6, range(4)), sampler, guidance))
    steps = list(trajectory(network, labels, SampleRandom(5, range(4)), sampler, guidance))
    assert [(s.number, s.total, tuple(s.codes.shape)) for s in steps] == [(k, 6, (4, k)) for k in range(1, 7)]
    assert torch.equal(steps[-1].codes, whole)
    assert torch.equal(steps[2].codes, whole[:, :3])


@torch.no_grad()
def test_codes_are_drawn_as_often_as_they_are_probable():
    network = build(CodeShape(11, 1, (1, 1)))
    p = network.first(torch.tensor([1]), network.cache(1)).softmax(1)[0]
    found = sample(network, torch.ones(4000, dtype=torch.long), SampleRandom(0, range(4000)))[:, 0].bincount(minlength=11)
    assert ((found / 4000 - p).abs() < 4 * (p * (1 - p) / 4000).sqrt() + 1e-9).all()


@torch.no_grad()
def test_guidance_of_one_or_less_is_none():
    network, labels = build(), torch.tensor([0, 1, 2])
    plain = sample(network, labels, SampleRandom(0, range(3)))
    for scale in (1.0, 0.5, 0.0):
        assert torch.equal(sample(network, labels, SampleRandom(0, range(3)), guidance=Guidance(scale=scale)), plain)
    strong = sample(network, labels, SampleRandom(0, range(3)), guidance=Guidance(scale=30))
    assert not torch.equal(strong, plain)
    assert [guidance_at(k, 4, 3.0, TokenSampler(guided=2)) for k in range(4)] == [3, 3, 1, 1]
    rising = [guidance_at(k, 4, 3.0, TokenSampler(guidance_power=1)) for k in range(4)]
    assert rising[0] == 1
    assert rising == sorted(rising)
    assert rising[2] == pytest.approx(2)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.7}, {"temperature": 0}], ids=str)
def test_a_code_is_drawn_from_the_codebook_of_its_place(options):
    """Wherever the network would rather have one: top-k and top-p are taken among the codebook's own entries."""
    network, labels = build(CodeShape(12, 6, None, 3)), torch.arange(3).repeat(20)
    network.head.weight[4:] = 0
    network.head.weight[:4] *= 30  # by far the strongest logits, of either sign, are those of the first codebook
    for guidance in (None, Guidance(scale=3)):
        codes = sample(network, labels, SampleRandom(0, range(60)), TokenSampler(**options), guidance)
        assert torch.equal(codes // 4, torch.tensor([0, 1, 2, 0, 1, 2]).expand(60, 6))


@torch.no_grad()
def test_rar_knows_every_order():
    torch.manual_seed(0)
    shape = {"kind": "rar", "width": 16, "depth": 2, "heads": 2, "dropout": 0.0}
    network, (labels, codes) = awake(RAR(RAR.Config(**shape), GRID, CLASSES)).eval(), inputs()
    raster = torch.arange(6).expand(4, 6)
    close(network(labels, codes, raster), network(labels, codes))
    order = torch.stack([torch.randperm(6, generator=generator("order", i)) for i in range(4)])
    logits = network(labels, codes, order)
    close(network(labels[1:2], codes[1:2], order[1:2]), logits[1:2])
    later = order.clone()
    later[:, 4:] = order[:, 4:].flip(1)  # the last two places in the other order: step 4 has another target
    assert torch.equal(network(labels, codes, later)[:, :4], logits[:, :4])
    assert ((network(labels, codes, later)[:, 4] - logits[:, 4]).abs().amax(1) > 1e-5).all()
    fresh = RAR(RAR.Config(**shape), GRID, CLASSES)
    config = AR.model_validate({"network": shape, "train": {"samples": 8}, "permuted": {"until": 8, "raster": 16}})
    loss, _ = ARObjective(fresh, config)((codes, labels), StepRandom(0, 0, 4), 0)
    assert loss.item() == pytest.approx(math.log(11), rel=1e-6)


def test_rar_has_the_published_sizes():
    for size, millions in (("B", 261), ("L", 461), ("XL", 955), ("XXL", 1499)):
        with torch.device("meta"):
            network = RAR(RAR.Config(size=size), CodeShape(1024, 256, (16, 16)), 1000)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01), size


def test_what_does_not_fit_is_one_line():
    network, (labels, codes) = build(), inputs()
    cache = network.cache(2)
    random = SampleRandom(0, range(4))
    cases = [
        (lambda: network.logits(labels, codes[:, :5]), "one row of 6 codes"),
        (lambda: network.logits(labels + 1, codes), "labels from 1 to 4 are outside 0 to 3"),
        (lambda: network.logits(labels, codes - 1), "codes from -1"),
        (lambda: network.logits(labels, codes + 10), "another codebook"),
        (lambda: network.logits(labels[:, None], codes), "labels of shape (4, 1)"),
        (lambda: network.logits(labels.float(), codes), "as long integers"),
        (lambda: network.logits(labels, codes.float()), "as long integers"),
        (lambda: network.logits(labels[:0], codes[:0]), "give at least one"),
        (lambda: network.next(codes[:2, 0], network.cache(2)), "2 codes for 0 sequences that have begun"),
        (lambda: [network.first(labels[:1], cache), network.next(codes[:2, 0], cache)], "2 codes for 1 sequences"),
        (lambda: network.first(labels, cache), "room for 2"),
        (lambda: [network.first(labels[:2], cache), network.next(codes[:2, 0] + 11, cache)], "another codebook"),
        (lambda: [network.first(labels[:2], cache), network.next(codes[:2, 0] - 11, cache)], "codes from -"),
        (lambda: [network.first(labels[:2], cache), network.next(codes[:2, 0].float(), cache)], "as long integers"),
        (lambda: [network.first(labels[:2], cache), network.next(codes[:2, 0] > 0, cache)], "as long integers"),
        (lambda: [network.first(labels[:2], cache), *(network.next(c, cache) for c in codes[:2].T)], "all 6 codes"),
        (lambda: sample(network, labels + 1, random), "outside 0 to 3"),
        (lambda: sample(network, labels[:0], random), "at least one"),
        (lambda: sample(network, labels[:3], random), "4 random streams for 3 labels"),
        (lambda: LlamaGen(network.config, CodeShape(11, 7, (2, 3)), 2), "a grid of 2 x 3 does not hold 7"),
        (lambda: LlamaGen(network.config, CodeShape(12, 7, None, 2), 2), "2 codebooks do not divide 12 entries and 7 tokens"),
    ]
    for call, words in cases:
        with pytest.raises(ConfigError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@torch.no_grad()
def test_what_is_refused_leaves_the_cache_as_it_was():
    network, (labels, codes) = build(), inputs()
    empty, begun = network.cache(2), network.cache(2)
    whole = network.logits(labels[:2], codes[:2])
    network.first(labels[:2], begun)
    for cache in (empty, begun):
        with pytest.raises(ConfigError, match="room for 2"):
            network.first(labels, cache)
    with pytest.raises(ConfigError, match="2 codes for 0 sequences that have begun"):
        network.next(codes[:2, 0], empty)
    with pytest.raises(ConfigError, match="another codebook"):
        network.next(codes[:2, 0] + 11, begun)
    close(network.next(codes[:2, 0], begun), whole[:, 1])


@pytest.mark.parametrize("kind", TOKEN_NETWORKS.names())
def test_registered_networks_keep_the_contract(kind):
    part = TOKEN_NETWORKS.get(kind)
    options = {name: value for name, value in SMALL.items() if name in part.Config.model_fields}
    network = awake(part(part.Config(**options), GRID, CLASSES)).train()
    labels, codes = inputs()
    logits = network(labels, codes)
    assert logits.shape == (4, 6, 11)
    with torch.no_grad():  # one token at a time is all at once, and a cache begins anew
        cache = network.cache(5)
        for _ in range(2):
            steps = [network.first(labels, cache), *(network.next(code, cache) for code in codes.T[:-1])]
        close(torch.stack(steps, 1), network.logits(labels, codes))
        later = codes.clone()
        later[:, 3:] = (later[:, 3:] + 1) % 11
        changed = (network.logits(labels, later) - logits).abs().amax((0, 2))
        assert torch.equal(changed[:4], torch.zeros(4))
        assert (changed[4:] > 1e-5).all()
    F.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead
    assert network.codes == GRID
    assert network.num_classes == CLASSES
