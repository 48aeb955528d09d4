"""Adversarial losses, feature matching and preservation against reference values and closed forms; one step of both."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from vfmlab.errors import ConfigError
from vfmlab.losses.adversarial import Discriminated, discriminator_losses, generator_loss, ramp
from vfmlab.losses.base import LossContext, Reconstruction
from vfmlab.losses.discriminators.training import DiscriminatorObjective, Pairs, discriminate, gradient_penalty
from vfmlab.losses.feature_matching import feature_matching
from vfmlab.losses.preservation import preservation
from vfmlab.registry import DISCRIMINATORS, LOSSES
from vfmlab.seeding import StepRandom
from vfmlab.tokenizers.base import Posterior
from vfmlab.weights import import_state_dict

CONTEXT = LossContext(size=16, channels=4, latent_side=4)


@dataclass(frozen=True)
class Full(Reconstruction):
    """A reconstruction with all that these terms read."""

    discriminated: dict[str, Discriminated] = field(default_factory=dict)
    reference: dict[str, Tensor] = field(default_factory=dict)
    encoded: Tensor | None = None


def full(**parts) -> Full:
    z = parts.pop("z", torch.zeros(2, 4, 4, 4))
    image = torch.zeros(2, 3, 16, 16)
    return Full(image, [image], Posterior(z), z, **parts)


def loss(name: str, **options):
    kind = LOSSES.get(name)
    return kind(kind.Config(**options), CONTEXT)


@pytest.fixture(scope="module")
def values(golden: Path) -> dict:
    return json.loads((golden / "discriminator_losses.json").read_text())


@pytest.fixture(scope="module")
def multi(golden: Path):
    """Logits and maps of the reference's three-scale PatchGAN on real and generated images."""
    g = load_file(golden / "discriminators.safetensors")
    sd = {key.removeprefix("multi.sd."): value for key, value in g.items() if key.startswith("multi.sd.")}
    net = import_state_dict("patchgan", sd, {})
    with torch.no_grad():
        return net(g["nlayer.x"], features=True), net(g["multi.x_fake"], features=True), g


@pytest.mark.parametrize(("kind", "name"), [("hinge", "hinge"), ("lsgan", "mse"), ("nonsaturating", "bce")])
def test_losses_equal_the_reference(values: dict, multi, kind: str, name: str):
    (real, _), (fake, _), _ = multi
    on_real, on_fake = discriminator_losses(real, fake, kind)
    assert float(on_real) == pytest.approx(values[f"patchgan_disc_real_{name}"], rel=1e-5)
    assert float(on_fake) == pytest.approx(values[f"patchgan_disc_fake_{name}"], rel=1e-5)
    assert float(generator_loss(fake, kind)) == pytest.approx(values[f"patchgan_gen_{name}"], rel=1e-5)


def test_projected_losses_equal_the_reference(values: dict, multi):
    """The reference concatenates the heads' logits; cut into the five heads they must give the same."""
    real, fake = (multi[2][key].chunk(5, 1) for key in ("logits_real", "logits_fake"))
    on_real, on_fake = discriminator_losses(real, fake, "hinge")
    assert float(on_real) == pytest.approx(values["stylegan_t_real_hinge"], rel=1e-5)
    assert float(on_fake) == pytest.approx(values["stylegan_t_fake_hinge"], rel=1e-5)
    assert float(generator_loss(fake, "hinge")) == pytest.approx(values["stylegan_t_gen"], rel=1e-5)


def test_feature_matching_equals_the_reference(values: dict, multi):
    (_, real), (_, fake), g = multi
    assert float(feature_matching(fake, real)) == pytest.approx(values["feature_matching"], rel=1e-5)
    for scale in range(3):
        for layer in range(4):
            found = (fake[scale][layer] - real[scale][layer]).abs().mean()
            assert float(found) == pytest.approx(float(g[f"multi.l1.{scale}.{layer}"]), rel=1e-5)


@pytest.mark.parametrize(("kind", "sides"), [("hinge", "hinge_d hinge_g"), ("nonsaturating", "vanilla_d softplus_g"),
                                            ("softplus_hinge", "hinge_d softplus_g")])
def test_losses_of_discrete_tokenizers_equal_the_reference(golden: Path, kind: str, sides: str):
    """The last is VFMTok's: the decoder's loss and the discriminator's are of two kinds."""
    io = load_file(golden / "discrete" / "quantizers.safetensors")
    real, fake = [io["in.gan.real"]], [io["in.gan.fake"]]
    ours = (sum(discriminator_losses(real, fake, kind)) / 2, generator_loss(fake, kind))
    for value, name in zip(ours, sides.split(), strict=True):
        torch.testing.assert_close(value, io[f"gan.{name}"], rtol=1e-5, atol=1e-8)


def test_feature_matching_does_not_depend_on_the_number_of_layers():
    """Two maps that differ by 1 everywhere weigh as four do (pix2pixHD's 4 / layers), and nothing flows into `real`."""
    real = [[torch.zeros(2, 3, 4, 4, requires_grad=True) for _ in range(2)]]
    fake = [[torch.ones(2, 3, 4, 4, requires_grad=True) for _ in range(2)]]
    value = feature_matching(fake, real)
    assert value.item() == 4.0
    value.backward()
    assert real[0][0].grad is None
    assert fake[0][0].grad is not None


@pytest.mark.parametrize("kind", ["hinge", "lsgan", "nonsaturating", "softplus_hinge"])
def test_gradients_push_the_right_way(kind: str):
    """The discriminator raises real and lowers generated logits, the generator raises its own."""
    real, fake = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    sum(discriminator_losses([real], [fake], kind)).backward()
    assert (real.grad < 0).all()
    assert (kind == "lsgan") == bool((fake.grad == 0).all())  # LSGAN's target for generated images is 0 itself
    own = torch.zeros(3, requires_grad=True)
    generator_loss([own], kind).backward()
    assert (own.grad < 0).all()


def test_scales_of_different_size_weigh_the_same():
    assert float(generator_loss([torch.ones(2, 100), -torch.ones(2, 1)], "hinge")) == 0


@pytest.mark.parametrize(
    ("samples", "factor"), [(0, 0.0), (99, 0.0), (100, 0.0), (125, 0.25), (200, 1.0), (10_000, 1.0)]
)
def test_ramp(samples: int, factor: float):
    assert ramp(samples, 100, 100) == factor


def test_ramp_without_warmup_is_a_step():
    assert [ramp(s, 100, 0) for s in (0, 99, 100, 101)] == [0.0, 0.0, 1.0, 1.0]
    assert ramp(0, 0, 0) == 1.0


# -- terms of a recipe -----------------------------------------------------------------------------------------------


def test_adversarial_term_names_its_discriminator():
    kind = LOSSES.get("adversarial").Config
    term = kind.model_validate({"weight": 0.5, "discriminator": {"kind": "patchgan", "width": 8}, "start": 100})
    assert term.discriminator.width == 8
    assert kind.model_validate(term.model_dump(mode="json")) == term
    assert kind().discriminator == DISCRIMINATORS.get("patchgan").Config(kind="patchgan")
    assert kind.model_validate({"discriminator": "projected"}).discriminator.virtual_batch == 8
    with pytest.raises(ValidationError, match="needs the field 'kind' .choose from: patchgan, projected, rae_dino"):
        kind.model_validate({"discriminator": {"width": 8}})
    with pytest.raises(ValidationError, match="widht"):
        kind.model_validate({"discriminator": {"kind": "patchgan", "widht": 8}})
    with pytest.raises(ConfigError, match="unknown discriminator 'patch'"):
        kind.model_validate({"discriminator": "patch"})


def test_default_discriminator_never_sees_a_vfm():
    term = LOSSES.get("adversarial").Config()
    net = DISCRIMINATORS.get(term.discriminator.kind)(term.discriminator, 32, None)
    assert not net.hidden


def test_discriminator_may_start_before_the_term():
    term = LOSSES.get("adversarial").Config(start=100, warmup=50, discriminator_start=40, until=300)
    assert [term.trains_discriminator(s) for s in (39, 40, 299, 300)] == [False, True, True, False]
    assert [term.factor(s) for s in (40, 100, 125, 150)] == [0, 0, 0.5, 1]
    assert not LOSSES.get("adversarial").Config(start=100).trains_discriminator(99)


def test_adversarial_term_reads_what_was_discriminated():
    logits = [torch.randn(2, 1, 3, 3, requires_grad=True)]
    r = full(discriminated={"adversarial": Discriminated(logits)})
    term = loss("adversarial", loss="lsgan", adaptive=True)
    assert term.adaptive
    value = term(r)
    torch.testing.assert_close(value, (logits[0] - 1).square().mean())
    value.backward()
    assert logits[0].grad is not None


def test_feature_matching_term():
    maps = [[torch.ones(2, 3, 4, 4)]]
    r = full(discriminated={"adversarial": Discriminated([torch.zeros(2)], maps, [[torch.zeros(2, 3, 4, 4)]])})
    assert float(loss("feature_matching")(r)) == 4
    with pytest.raises(ConfigError, match="losses.patch, which is off"):
        loss("feature_matching", of="patch")(r)
    with pytest.raises(ConfigError, match="the discriminator of losses.adversarial returned no maps"):
        loss("feature_matching")(full(discriminated={"adversarial": Discriminated([torch.zeros(2)])}))
    with pytest.raises(ConfigError, match="losses.adversarial, which is off; add losses.adversarial"):
        loss("feature_matching")(full())
    with pytest.raises(ConfigError, match="its discriminator has not run on this batch"):
        loss("adversarial")(full())


@pytest.mark.parametrize("name", ["adversarial", "feature_matching", "preservation"])
def test_terms_are_means_over_the_batch_and_fp32(name: str):
    """A term of the whole batch is the mean of its halves', so several processes add up to one."""
    draw = torch.Generator().manual_seed(0)
    logits, ours, theirs = (torch.randn(4, 1, 5, 5, generator=draw) for _ in range(3))
    z, old = torch.randn(2, 4, 4, 4, 4, generator=draw)

    def part(rows: slice) -> Tensor:
        outputs = Discriminated([logits[rows]], [[ours[rows]]], [[theirs[rows]]])
        with torch.autocast("cpu", torch.bfloat16):
            return loss(name)(full(z=z[rows], reference={"after": old[rows]}, discriminated={"adversarial": outputs}))

    whole = part(slice(None))
    assert whole.dtype == torch.float32
    torch.testing.assert_close(whole, (part(slice(0, 2)) + part(slice(2, 4))) / 2)


# -- preservation ----------------------------------------------------------------------------------------------------


def test_preservation_closed_forms():
    new, old = torch.randn(3, 5, 4, 4), torch.randn(3, 5, 4, 4)
    torch.testing.assert_close(preservation(new, old, "l2"), (new - old).square().mean())
    assert float(preservation(new, 3 * new, "cosine")) == pytest.approx(0, abs=1e-6)
    assert float(preservation(new, -new, "cosine")) == pytest.approx(2, abs=1e-6)
    assert float(preservation(new, 3 * new, "l2")) > 1


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("anchor", ["after", "before"])
def test_preservation_pulls_the_new_encoding_only(distance: str, anchor: str):
    new = torch.randn(2, 4, 4, 4, requires_grad=True)
    old = torch.randn(2, 4, 4, 4, requires_grad=True)
    parts = {"z": new} if anchor == "after" else {"encoded": new}
    value = loss("preservation", distance=distance, anchor=anchor)(full(reference={anchor: old}, **parts))
    value.backward()
    assert old.grad is None
    with torch.no_grad():
        assert preservation(new - 0.1 * new.grad, old, distance) < value


def test_preservation_ignores_sampling_noise():
    """It compares means: a tokenizer with a variance is not pulled by its own noise."""
    old = torch.randn(2, 4, 4, 4)
    r = full(z=old, reference={"after": old})
    noisy = Full(r.target, r.images, Posterior(old, torch.zeros_like(old)), old + 1, reference=r.reference)
    assert float(loss("preservation")(noisy)) == 0


def test_preservation_says_what_is_missing():
    with pytest.raises(ConfigError, match="needs a stage before this one; remove"):
        loss("preservation")(full())
    with pytest.raises(ConfigError, match="and a tokenizer with an adapter"):
        loss("preservation", anchor="before")(full(reference={"before": torch.zeros(2, 9, 4, 4)}))
    with pytest.raises(ConfigError, match=r"encodes to \[8, 4, 4\], this one to \[4, 4, 4\]"):
        loss("preservation")(full(reference={"after": torch.zeros(2, 8, 4, 4)}))


# -- a step --------------------------------------------------------------------------------------------------------


def small_patchgan(**options):
    kind = DISCRIMINATORS.get("patchgan")
    return kind(kind.Config(kind="patchgan", width=8, layers=2, scales=2, **options), 16)


def test_judging_leaves_the_discriminator_alone():
    net = small_patchgan()
    fake, real = torch.rand(3, 3, 16, 16, requires_grad=True), torch.rand(3, 3, 16, 16)
    outputs = discriminate(net, Pairs(fake, real), features=True)
    (generator_loss(outputs.fake, "hinge") + feature_matching(outputs.fake_features, outputs.real_features)).backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not discriminate(net, Pairs(fake, real)).fake_features


def test_feature_matching_of_equal_images_is_zero_under_augmentation():
    net = small_patchgan(augment=("colour", "translation", "cutout"))
    same = torch.rand(4, 3, 16, 16) * 2 - 1
    outputs = discriminate(net, Pairs(same, same), rng=StepRandom(0, 0, 4), features=True)
    assert float(feature_matching(outputs.fake_features, outputs.real_features)) == 0


def test_own_step_sends_nothing_to_the_decoder():
    fake = torch.rand(3, 3, 16, 16, requires_grad=True)
    net = small_patchgan()
    value, metrics = DiscriminatorObjective(net, "hinge")(Pairs(fake, torch.rand(3, 3, 16, 16)))
    value.backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in net.parameters())
    assert set(metrics) == {"real", "fake", "accuracy"}


def test_r1_is_the_squared_gradient_of_the_mean_logit():
    """D(x) = sum of a x^2 / 2 over 4 pixels, as one logit: the gradient is a x, so R1 = mean of a^2 |x|^2."""
    a, x = torch.tensor(3.0, requires_grad=True), torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]])
    images = x.clone().requires_grad_()
    penalty = gradient_penalty(images, [(a * images.square() / 2).sum(1, keepdim=True)])
    assert penalty.item() == pytest.approx(9 * (5 + 4) / 2)
    penalty.backward()
    assert a.grad.item() == pytest.approx(2 * 3 * 9 / 2)
    net, pairs = small_patchgan(), Pairs(torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16))
    plain, _ = DiscriminatorObjective(net, "nonsaturating")(pairs)
    punished, metrics = DiscriminatorObjective(net, "nonsaturating", r1=10.0)(pairs)
    assert punished.item() == pytest.approx(plain.item() + 5 * metrics["r1"].item(), rel=1e-5)
    assert metrics["r1"] > 0
    with pytest.raises(ValidationError, match="r1 1 takes second derivatives"):
        loss("adversarial", discriminator="rae_dino", r1=1.0)


@pytest.mark.parametrize("kind", ["hinge", "lsgan", "nonsaturating"])
def test_a_game_brings_images_closer(kind: str):
    """Free pixels against a discriminator: it tells them apart first, then they take on the real images' stripes."""
    torch.manual_seed(0)
    net = small_patchgan(augment=("translation",), norm="none")
    fake = torch.nn.Parameter(torch.zeros(16, 3, 16, 16))
    own = torch.optim.Adam(net.parameters(), 2e-3, betas=(0.0, 0.99))
    decoder = torch.optim.Adam([fake], 2e-2, betas=(0.0, 0.99))
    objective = DiscriminatorObjective(net, kind)
    stripes = (torch.arange(16) % 4 < 2).float().mul(1.6).sub(0.8).expand(16, 3, 16, 16)
    accuracies = []
    for step in range(80):
        rng = StepRandom(0, step, 16)
        if step >= 25:
            decoder.zero_grad()
            generator_loss(discriminate(net, Pairs(fake, stripes), rng).fake, kind).backward()
            decoder.step()
        own.zero_grad()
        value, metrics = objective(Pairs(fake, stripes), rng)
        value.backward()
        own.step()
        accuracies.append(float(metrics["accuracy"]))
    assert max(accuracies[:25]) > 0.9
    assert accuracies[-1] < 0.8  # with the decoder's sign turned round it stays above 0.97
    columns, rows = (fake.detach().mean((0, 1)).mean(axis).std() for axis in (0, 1))
    assert columns > 5 * rows
