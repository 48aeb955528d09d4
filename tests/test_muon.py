"""Muon: orthogonal updates, torch's own as reference, which parameters it trains, and runs with it."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import make_task, train_tiny
from torch import nn
from toy import outcome

from vfmlab import presets
from vfmlab.config import override
from vfmlab.errors import ConfigError
from vfmlab.seeding import generator
from vfmlab.training.muon import Muon, matrices, orthogonal
from vfmlab.training.step import make_optimizers
from vfmlab.training.task import select


def randn(*shape):
    return torch.randn(*shape, generator=generator("muon", *shape))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 6, 20), (2, 20, 6)])
def test_updates_are_nearly_orthogonal_and_have_the_gradients_directions(shape):
    x = randn(*shape)
    u, s, vh = torch.linalg.svd(orthogonal(1e-3 * x), full_matrices=False)
    assert (s - 1).abs().max() < 0.35
    reference, _, other = torch.linalg.svd(x, full_matrices=False)
    assert torch.linalg.matrix_norm(u @ vh - reference @ other).max() < 1e-2


def test_a_batch_is_the_same_as_one_matrix_at_a_time():
    x = randn(5, 12, 30)
    torch.testing.assert_close(orthogonal(x), torch.cat([orthogonal(each[None]) for each in x]), rtol=0, atol=1e-4)
    assert not orthogonal(torch.zeros(2, 4, 4)).any(), "no gradient, no step"


def stack():
    return nn.ParameterList([randn(16, 16), randn(32, 16), randn(16, 32), randn(16, 16), randn(8, 2, 3, 3)])


def steps(optimizer, parameters, n=3):
    for k in range(n):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(p.shape, generator=generator("gradient", k, i))
        optimizer.step()


def test_equals_torchs_muon():
    ours, theirs = stack(), stack()[:4]
    steps(Muon([{"params": list(ours), "lr": 0.02, "weight_decay": 0.1, "matrices": True}], torch.bfloat16), ours)
    steps(torch.optim.Muon(list(theirs), lr=0.02, weight_decay=0.1, momentum=0.95), theirs)
    start = stack()
    for own, other, first in zip(ours, theirs, start, strict=False):
        moved = (other - first).norm()
        assert (own - other).norm() < 0.02 * moved, "bf16 rounds in another order"
    assert not torch.equal(ours[4], start[4]), "a convolution is a matrix"


def test_the_rest_is_adamws_and_both_states_load():
    def make():
        parameters = stack()
        groups = [{"params": list(parameters[:3]), "matrices": True, "lr": 0.02},
                  {"params": list(parameters[3:]), "matrices": False, "lr": 1e-2}]
        return parameters, Muon(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    (whole, optimizer), (part, first), plain = make(), make(), stack()[3:]
    steps(optimizer, whole, 4)
    steps(first, part, 2)
    again = make()[1]
    again.load_state_dict(first.state_dict())
    for group, of in zip(again.param_groups, (part[:3], part[3:]), strict=True):
        for p, own in zip(group["params"], of, strict=True):
            p.data.copy_(own)
    for k in range(2, 4):
        for i, p in enumerate([*again.param_groups[0]["params"], *again.param_groups[1]["params"]]):
            p.grad = torch.randn(p.shape, generator=generator("gradient", k, i))
        again.step()
    for group, of in zip(again.param_groups, (whole[:3], whole[3:]), strict=True):
        assert all(torch.equal(p, own) for p, own in zip(group["params"], of, strict=True))
    adamw = torch.optim.AdamW(plain, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for k in range(4):
        for i, p in enumerate(plain, 3):
            p.grad = torch.randn(p.shape, generator=generator("gradient", k, i))
        adamw.step()
    for p, own in zip(plain, whole[3:], strict=True):
        torch.testing.assert_close(p, own)


MUON = {"train.optimizer": "muon", "diffusion.train.optimizer": "muon", "train.precision": "fp32",
        "diffusion.train.precision": "fp32", "diffusion.train.evaluate_at": []}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    root = tmp_path_factory.mktemp("muon")
    return {kind: make_task(tiny.tiny_run(kind, **MUON), root) for kind in ("game", "vfm_vae", "diffusion")}


def test_matrices_inside_blocks(tasks):
    inside = {kind: {name for name, p in task.weights.named_parameters() if id(p) in matrices(task.weights)}
              for kind, task in tasks.items()}
    dit = [f"blocks.{k}.{name}.weight" for k in range(2)
           for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "modulation")]
    assert inside["diffusion"] == set(dit)
    assert "decoder.blocks.0.layers.0.expand_weight" in inside["vfm_vae"]
    assert "encoder.stages.0.blocks.0.conv1.weight" in inside["game"]
    for names in inside.values():
        assert not [name for name in names if name.endswith((".depthwise.weight", ".bias", ".gain", ".scale"))]
        assert not names & {"encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.mapping.layers.0.weight"}


def test_rates_of_groups(tasks):
    task = make_task(tiny.tiny_run("game", **MUON, **{"train.matrix_lr": 0.01, "train.lr_for": {"decoder.*": 0.5}}), None)
    optimizer, other = make_optimizers(task, select(task), torch.device("cpu"))
    assert (type(optimizer), type(other)) == (Muon, torch.optim.AdamW)
    assert {(g["lr"], g["matrices"]) for g in optimizer.param_groups} == {(0.01, True), (0.005, True), (2e-3, False), (1e-3, False)}
    of = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(of) == sorted(id(p) for p in select(task)), "each parameter once"


def test_a_rate_that_nothing_reads_is_one_line():
    with pytest.raises(ConfigError, match="matrix_lr is read by optimizer=muon only, not adamw; use lr"):
        override(presets.get("tiny_vfm_vae"), {"train.matrix_lr": 0.1})


@pytest.mark.parametrize("kind", ["game", "diffusion"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, kind):
    train_tiny(kind, tmp_path / "parts", until=32, **MUON)
    again, events = train_tiny(kind, tmp_path / "parts", **MUON)
    assert 32 in [event.data.get("resumed") for event in events]
    whole, _ = train_tiny(kind, tmp_path / "whole", **MUON)
    assert outcome(again) == outcome(whole)
