"""Shares of a network: what is cut, what is refused. Training with them: test_distributed.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from vfmlab.errors import ConfigError
from vfmlab.training import sharded, step
from vfmlab.training.average import Average
from vfmlab.training.task import select

WORLD = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def launched(monkeypatch):
    """As in the first of four processes of `accelerate launch --use_fsdp`."""
    monkeypatch.setenv(sharded.SWITCH, "true")
    monkeypatch.setattr(sharded, "PartialState", lambda: SimpleNamespace(num_processes=WORLD, is_main_process=True))


def test_every_process_holds_its_share_of_parameters_average_and_moments(root, launched):
    """Without a second process: torch's fake group answers for the other three."""
    task = tiny.make_task(tiny.tiny_run("diffusion"), root)
    whole = {name: p.detach().clone() for name, p in task.weights.named_parameters()}
    average = Average(task.weights, task.train)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    try:
        plain = sharded.start(task, average, torch.device("cpu"))
        optimizer = torch.optim.AdamW(select(task))
        saved = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(optimizer.param_groups[0]["params"][0].shape)}},
                 "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(sharded.cut(saved, optimizer))
        for module in (task.weights, average.module):
            parts = dict(module.named_parameters())
            assert parts.keys() == whole.keys()
            for name, p in parts.items():
                first = whole[name].chunk(WORLD)[0]
                assert torch.equal(p.to_local(), first), name
        moment = optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"]
        assert moment.to_local().numel() <= -(-moment.numel() // WORLD)
    finally:
        distributed.destroy_process_group()
    assert all(torch.equal(p, whole[name]) for name, p in plain.named_parameters())


def test_tokenizers_and_one_process_train_as_without(root, launched, monkeypatch):
    generator, tokenizer = (tiny.make_task(tiny.tiny_run(kind), root) for kind in ("diffusion", "game"))
    assert sharded.asked(generator)
    assert not sharded.asked(tokenizer)
    monkeypatch.setenv(sharded.SWITCH, "false")
    assert not sharded.asked(generator)
    monkeypatch.setenv(sharded.SWITCH, "true")
    monkeypatch.setattr(sharded, "PartialState", lambda: SimpleNamespace(num_processes=1))
    assert not sharded.asked(generator)


@pytest.mark.parametrize(("variable", "update", "line"), [
    ("FSDP_OFFLOAD_PARAMS", {}, "FSDP_OFFLOAD_PARAMS=true is not supported; use more processes"),
    ("FSDP_ACTIVATION_CHECKPOINTING", {}, "set diffusion.train.recompute=true"),
    ("UNUSED", {"compile": True}, "diffusion.train.compile is not supported; set it to false"),
    ("UNUSED", {"precision": "fp16"}, "use bf16, fp32 or auto"),
])
def test_what_cannot_be_sharded_is_refused_in_a_line(root, launched, monkeypatch, variable, update, line):
    task = tiny.make_task(tiny.tiny_run("diffusion"), root)
    task.train = task.train.model_copy(update=update)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match="^FSDP with ") as error:
        sharded.asked(task)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_accelerate_itself_shards_nothing(root, launched):
    """Its own switch is off while it is made, and on again afterwards."""
    accelerator = step.make_accelerator(tiny.make_task(tiny.tiny_run("diffusion"), root), device="cpu")
    assert not accelerator.is_fsdp2
    assert getattr(accelerator.state, "fsdp_plugin", None) is None
    assert sharded.parse_flag_from_env(sharded.SWITCH)


@pytest.mark.parametrize(("there", "device", "cpu"), [(False, None, True), (True, None, False), (True, "cpu", True)])
def test_processes_without_a_gpu_find_each_other(monkeypatch, there, device, cpu):
    """accelerate looks for a launcher's other processes only where it is said to compute on the CPU, or finds a GPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    monkeypatch.setattr(step, "PartialState", lambda **options: options)
    assert step.open_processes(device) == {"cpu": cpu, "timeout": step.WAIT}
