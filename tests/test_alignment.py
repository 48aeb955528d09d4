"""REPA, REG and encoder reuse: closed forms, the release's losses, who gets gradients, sampling with a token, one-line refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny import awake

from vfmlab.config import VFM, Alignment, Diffusion, Guidance, Sampler
from vfmlab.diffusion import targets
from vfmlab.diffusion.alignment import Projection, cosine_distance, regrid, spatial_norm
from vfmlab.diffusion.ddt import DDT
from vfmlab.diffusion.dit import LightningDiT
from vfmlab.diffusion.objective import DiffusionObjective
from vfmlab.diffusion.reuse import Reused, similarity_over_time
from vfmlab.diffusion.sampling import sample, trajectory
from vfmlab.diffusion.sit import SiT
from vfmlab.errors import ConfigError
from vfmlab.seeding import SampleRandom, StepRandom, generator
from vfmlab.weights import import_state_dict

SHAPE, CLASSES = (4, 8, 8), 3
TINY = {"width": 32, "depth": 3, "heads": 2, "patch": 2}


def dit(kind=LightningDiT, **more):
    torch.manual_seed(0)
    return awake(kind(kind.Config(**{**TINY, **more}), SHAPE, CLASSES)).eval()


def ddt():
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2, "head_width": 32, "head_depth": 1, "head_heads": 2, "patch": 2}
    return awake(DDT(DDT.Config(**sizes), SHAPE, CLASSES)).eval()


def inputs(batch=3):
    g = generator("inputs")
    return torch.randn(batch, *SHAPE, generator=g), torch.rand(batch, generator=g), torch.tensor([0, 2, 3])[:batch]


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_distance_of_tokens():
    a = torch.randn(2, 5, 8)
    torch.testing.assert_close(cosine_distance(a, 3 * a), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(cosine_distance(a, -a), torch.full((2,), 2.0))
    right = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(cosine_distance(right, torch.tensor([[[0.0, 2.0], [0.0, 5.0]]])), torch.tensor([0.5]))


def test_spatial_norm_and_grids():
    x = 3 + 2 * torch.randn(2, 4, 6, 6)
    full = spatial_norm(x)
    torch.testing.assert_close(full.mean((2, 3)), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(full.std((2, 3), correction=0), torch.ones(2, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(spatial_norm(x, 0.0), x / (x.std((2, 3), keepdim=True, correction=0) + 1e-6))
    torch.testing.assert_close(spatial_norm(5 * x + 7), full, atol=1e-4, rtol=1e-4)  # brightness and contrast of a channel do not matter
    assert regrid(x, (6, 6)) is x
    half = regrid(x, (3, 3))
    torch.testing.assert_close(regrid(torch.full((1, 2, 6, 6), 4.0), (3, 3)), torch.full((1, 2, 3, 3), 4.0))
    assert half.std() < x.std()  # it averages


@pytest.mark.parametrize("projector", ["mlp", "conv"])
@pytest.mark.parametrize("network", [dit, lambda: dit(SiT), ddt, lambda: dit(token=6)], ids=["lightningdit", "sit", "ddt", "token"])
def test_gradients_reach_the_blocks_before_and_the_read_out_only(network, projector):
    network = network()
    project = Projection(Alignment(block=2, hidden=16, projector=projector), network, 10)
    more = {"token": torch.randn(3, 6)} if getattr(network.config, "token", None) else {}
    _, kept = network(*inputs(), features_at=(2,), **more)
    loss = project(kept[2], torch.randn(3, 10, 4, 4))
    assert loss.shape == (3,)
    assert ((loss >= 0) & (loss <= 2)).all()
    loss.mean().backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(name.startswith("blocks.1.") for name in reached)
    assert not [name for name in reached if name.startswith(("blocks.2.", "final", "class_final", "head"))]
    assert all(p.grad is not None and p.grad.any() for p in project.parameters())


def test_tokens_that_are_the_target_cost_nothing():
    network = dit()
    project = Projection(Alignment(block=1, projector="conv"), network, 32)
    with torch.no_grad():
        project.read.weight.zero_()
        project.read.bias.zero_()
        project.read.weight[:, :, 1, 1] = torch.eye(32)
        _, kept = network(*inputs(), features_at=(1,))
        target = 2 * kept[1].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(project(kept[1], target), torch.zeros(3), atol=1e-5, rtol=0)
        assert project(kept[1], target.flip(-1)).min() > 1e-3  # places are not mixed up


class Given:
    """Numbers that were drawn before, in place of a step's."""

    def __init__(self, normal, uniform):
        self.normal, self.uniform = list(normal), list(uniform)

    def randn(self, *shape):
        value = self.normal.pop(0)
        assert value.shape[1:] == shape
        return value

    def rand(self, *shape):
        return self.uniform.pop(0)


def test_reg_and_repa_as_released(golden):
    stored = load_file(golden / "sit_reg_small.safetensors")
    settings = json.loads((golden / "sit_reg_small_config.json").read_text())["config"]
    release = import_state_dict("sit-reg", {k.removeprefix("qknorm.sd."): v for k, v in stored.items() if k.startswith("qknorm.sd.")}, {**settings, "qk_norm": True})
    options = {k: v for k, v in release.config.model_dump().items() if k in SiT.Config.model_fields and k != "kind"}
    network = SiT(SiT.Config(**options), release.latent_shape, release.num_classes)
    network.load_state_dict({k: v for k, v in release.state_dict().items() if not k.startswith("projectors.")})
    config = Diffusion.model_validate({
        "network": {"kind": "sit", **options}, "train": {"samples": 1}, "time": {"kind": "uniform"}, "class_dropout": 0.0,
        "alignment": {"block": release.config.align_after, "hidden": release.config.projector}, "class_token": {"normalise": False},
    })  # fmt: skip
    project = Projection(config.alignment, network, release.config.aligned[0], whole=True)
    project.read.load_state_dict(release.projectors[0].state_dict())
    objective = DiffusionObjective(network, config, project)
    tokens, n = stored["loss.zs0"], len(stored["loss.images"])
    target = tokens[:, 1:].transpose(1, 2).unflatten(2, network.grid)
    batch = targets.AlignedBatch(stored["loss.images"], stored["in.y"], torch.arange(n), target, stored["loss.cls"])
    rng = Given([stored["loss.noise"], stored["loss.noise_cls"]], [stored["loss.t"].flatten(), torch.ones(n)])
    # the release aligns the class token with the first of `zs`; the stored one is not the stored class token
    found = objective.flow.terms(network, batch.z, batch.labels, rng, project, target, tokens[:, 0], batch.token)
    loss, parts = objective.flow.loss(found, objective.flow.weigh(found))
    for key, name in (("velocity", "denoise"), ("token_velocity", "denoise_cls")):
        torch.testing.assert_close(parts[key], stored[f"qknorm.linear.{name}"].mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts["alignment"], -stored["qknorm.linear.proj"], rtol=1e-5, atol=1e-6)
    whole = parts["velocity"] + 0.03 * parts["token_velocity"] + 0.5 * (1 - parts["alignment"])
    torch.testing.assert_close(loss, whole)
    loss.backward()
    gradient = stored["qknorm.linear.grad.blocks.0.attn.qkv.weight"]
    torch.testing.assert_close(network.blocks[0].attn.qkv.weight.grad, gradient, atol=1e-3 * gradient.abs().max().item(), rtol=0)


def test_alignment_ends_when_told():
    network = dit()
    config = Diffusion.model_validate({"network": {"kind": "lightningdit", **TINY}, "train": {"samples": 8}, "alignment": {"block": 1, "hidden": 8, "until": 64}})
    objective = DiffusionObjective(network, config, Projection(config.alignment, network, 5))
    x, _, y = inputs()
    batch = targets.AlignedBatch(x, y, torch.arange(3), torch.randn(3, 5, 4, 4))
    on, off = (objective(batch, StepRandom(0, 0, 3), samples) for samples in (63, 64))
    assert "alignment" in on[1]
    assert "alignment" not in off[1]
    torch.testing.assert_close(on[0], off[0] + 0.5 * (1 - on[1]["alignment"]))


# -- a class token beside the latents ----------------------------------------------------------------------------------


def test_a_network_with_a_token_read_without_one():
    network = dit(token=6)
    x, t, y = inputs()
    v, kept = network(x, t, y, features_at=(1,))
    joint, both = network(x, t, y, features_at=(1,), token=torch.zeros(3, 6))
    torch.testing.assert_close(v, joint.v)
    torch.testing.assert_close(kept[1], both[1][:, 1:])
    assert (joint.v_class.shape, both[1].shape) == ((3, 6), (3, 17, 32))
    other = network(x, t, y, token=torch.ones(3, 6))
    assert not torch.allclose(other.v, joint.v)
    with pytest.raises(ConfigError, match="no class token to denoise"):
        dit()(x, t, y, token=torch.zeros(3, 6))


@pytest.mark.parametrize("solver", ["euler", "heun", "sde", "dopri5"])
def test_sampling_with_a_token_does_not_depend_on_the_batch(solver):
    network = dit(token=6)
    labels, ids = torch.tensor([0, 1, 2]), [7, 3, 11]
    more = {"sampler": Sampler(solver=solver, steps=3), "guidance": Guidance(scale=2.0, token=1.5, interval=(0.2, 0.9))}
    if solver == "dopri5":
        labels, ids = labels[:2], ids[:2]
    *_, together = trajectory(network, labels, SampleRandom(1, ids), **more)
    assert (together.x.shape[1:], together.token.shape[1:]) == (SHAPE, (6,))
    for i, (label, number) in enumerate(zip(labels, ids, strict=True)):
        *_, alone = trajectory(network, label[None], SampleRandom(1, [number]), **more)
        torch.testing.assert_close(together.x[i : i + 1], alone.x, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(together.token[i : i + 1], alone.token, atol=2e-5, rtol=2e-5)
    noise = SampleRandom(1, ids).randn(*SHAPE)
    first = next(iter(trajectory(network, labels, SampleRandom(1, ids), Sampler(steps=1000))))
    torch.testing.assert_close(first.x, noise, atol=0.05, rtol=0)  # the latents' noise is what it is without a token


class Joint:
    """Velocities equal to the label: (v, v of the token)."""

    config = SimpleNamespace(token=2)
    latent_shape, num_classes = (3, 2, 2), 5

    def __call__(self, x, t, y, token):
        level = y.float()
        return SimpleNamespace(v=level.view(-1, 1, 1, 1).expand_as(x), v_class=level.view(-1, 1).expand_as(token))


@pytest.mark.parametrize(("guidance", "latent", "rest", "token"), [
    (Guidance(), 1.0, 1.0, 1.0),
    (Guidance(scale=2.0), -3.0, -3.0, -3.0),  # null 5 + 2 (1 - 5)
    (Guidance(scale=2.0, token=1.0), -3.0, -3.0, 1.0),
    (Guidance(scale=1.0, token=3.0), 1.0, 1.0, -7.0),
    (Guidance(scale=2.0, channels=2), -3.0, 1.0, -3.0),
    (Guidance(scale=2.0, token=3.0, interval=(0.0, 0.5)), 1.0, 1.0, 1.0),
])  # fmt: skip
def test_latents_and_token_have_guidance_of_their_own(guidance, latent, rest, token):
    labels = torch.tensor([1, 1])
    random = SampleRandom(0, [0, 1])
    noise, noise_token = random.randn(3, 2, 2), random.randn(2)
    *_, step = trajectory(Joint(), labels, SampleRandom(0, [0, 1]), Sampler(steps=1), guidance)
    torch.testing.assert_close(noise - step.x[:, :3], torch.tensor([latent, latent, rest]).view(1, 3, 1, 1).expand(2, 3, 2, 2))
    torch.testing.assert_close(noise_token - step.token, torch.full((2, 2), token))


# -- the encoder's output reused ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_reuse_of_one_step_is_the_plain_sampler_and_more_is_not():
    network, labels = ddt(), torch.tensor([0, 1])

    def draw(reuse, **more):
        return sample(network, labels, SampleRandom(0, [0, 1]), Sampler(steps=6, reuse=reuse, **more), Guidance(scale=1.5, interval=(0.0, 0.9)))

    plain = draw(None)
    assert torch.equal(draw(1), plain)
    assert torch.equal(draw(1, solver="heun"), draw(None, solver="heun"))
    assert not torch.equal(draw(2), plain)
    far = [(draw(n) - plain).square().mean().item() for n in (2, 6)]
    assert 0 < far[0] < far[1]
    alone = sample(network, labels[:1], SampleRandom(0, [0]), Sampler(steps=6, reuse=2), Guidance(scale=1.5, interval=(0.0, 0.9)))
    torch.testing.assert_close(draw(2)[:1], alone, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_reuse_counts_evaluations():
    network = ddt()
    x, t, y = inputs(2)
    reused = Reused(network, 3)
    for k in range(7):
        v = reused(x, t - 0.01 * k, y)
    assert (reused.encodings, reused.evaluations) == (3, 7)
    torch.testing.assert_close(v, network(x, t - 0.06, y))  # the seventh encodes anew
    old = network.encode(x, t - 0.06, y)[-1]
    torch.testing.assert_close(reused(x + 1, t, y), network.head(x + 1, t, old)[0])
    reused(torch.cat([x, x]), t.repeat(2), y.repeat(2))
    assert reused.encodings == 4  # another batch


def test_similarity_over_time():
    network, labels = ddt(), torch.tensor([0, 1])
    times, found = similarity_over_time(network, lambda seen: sample(seen, labels, SampleRandom(0, [0, 1]), Sampler(steps=5)))
    assert times == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert sorted(found) == [1, 2, 3]
    for matrix in found.values():
        torch.testing.assert_close(matrix.diagonal(), torch.ones(5))
        torch.testing.assert_close(matrix, matrix.T)
        assert matrix[0, 1] > matrix[0, 4]  # near times are more alike than far ones


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_refusals_take_one_line():
    labels, random = torch.tensor([0]), SampleRandom(0, [0])
    reads = [
        (lambda: Projection(Alignment(block=9), dit(), 8), r"alignment.block 9: the network has blocks 1 to 3"),
        (lambda: Projection(Alignment(block=1), torch.nn.Linear(2, 2), 8), "'Linear' does not tell what its blocks put out"),
        (lambda: targets.Teacher(VFM(), 32, -1, (4, 4), resample=False), r"8 x 8 places, the network 4 x 4; change"),
        (lambda: targets.Teacher(VFM(), 32, -1, (8, 4)), "8 x 8 places, the network 8 x 4"),
        (lambda: targets.Teacher(VFM(), 32, 7, (4, 4)), r"vfm.layers \[7\]"),
        (lambda: sample(dit(), labels, random, Sampler(reuse=2)), "network 'lightningdit' is not split into encoder and head"),
        (lambda: sample(ddt(), labels, random, Sampler(reuse=2, solver="dopri5")), "chooses its own steps"),
        (lambda: sample(dit(), labels, random, guidance=Guidance(token=2.0)), "guidance.token 2: this network has no class token"),
        (lambda: sample(dit(token=6), labels, None, noise=torch.zeros(1, *SHAPE)), "denoises a class token too"),
        (lambda: targets.plan(diffusion(token=7, class_token={}), (4, 4), 32, 7), "has 128 channels, network.token is 7; set diffusion.network.token=128"),
    ]  # fmt: skip
    for read, message in reads:
        with pytest.raises(ConfigError, match=message) as refused:
            read()
        assert "\n" not in str(refused.value)


def diffusion(kind="lightningdit", token=None, **more):
    head = {"head_width": 32, "head_depth": 1, "head_heads": 2} if kind == "ddt" else {}
    network = {"kind": kind, **TINY, **head} | ({} if token is None else {"token": token})
    return Diffusion.model_validate({"network": network, "train": {"samples": 8}, **more})


@pytest.mark.parametrize(("more", "message"), [
    ({"class_token": {}}, "network.token is null; set it to the width"),
    ({"kind": "ddt", "class_token": {}}, "network 'ddt' has no class token; use lightningdit or sit"),
    ({"token": 128}, "nothing trains it; add 'class_token'"),
    ({"tune": {}}, "tuned through the alignment loss, which is off"),
])  # fmt: skip
def test_sections_that_do_not_fit_are_refused(more, message):
    with pytest.raises(ValidationError, match=message):
        diffusion(**more)
