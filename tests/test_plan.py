"""The plan: counts held against real modules and published figures, FLOPs against closed forms, nothing allocated."""

from __future__ import annotations

import json
import resource
import sys

import pytest
import torch
from torch import nn

from vfmlab import api, config
from vfmlab.cli import main
from vfmlab.errors import ConfigError
from vfmlab.registry import NETWORKS
from vfmlab.training import plan, price
from vfmlab.training.meter import Meter, shapes_only

TINY = ["tiny_plain_vae", "tiny_vfm_vae"]
# FLOPs and stored bytes of a step with one image, as torch's fake tensors and counter give them.
COUNTED = {
    "tiny_plain_vae": [(10_506_752, 262_416), (748_032, 18_956)],
    "tiny_vfm_vae": [(69_558_272, 373_618), (748_032, 18_956)],
    "paper_vfm_vae": [(2_774_439_398_400, 2_521_070_078), (2_774_250_654_720, 2_520_939_134),
                      (2_105_374_919_922, 2_475_435_478), (1_943_185_785_856, 2_087_551_388),
                      (715_965_235_200, 495_682_820)],
}  # fmt: skip


def counted(found: dict) -> list[tuple[int, int]]:
    return [(phase["flops"]["step_per_image"], phase["activations_per_image"]) for phase in found["phases"]]


@pytest.fixture(scope="module", params=TINY)
def planned(request) -> tuple[config.Recipe, dict]:
    run = api.resolve(request.param)
    return run, plan.plan(run)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_those_of_the_real_parts(planned):
    run, found = planned
    tokenizer_phase, diffusion_phase = found["phases"]
    random = run.vfm and run.vfm.model_copy(update={"weights": "random"})
    tokenizer = api.build_tokenizer(run.model_copy(update={"vfm": random}))
    assert sum(tokenizer_phase["parameters"].values()) == count(tokenizer)
    assert tokenizer_phase["vfm_parameters"] == (count(tokenizer.vfm) if tokenizer.vfm is not None else 0)
    assert tuple(tokenizer_phase["latent_shape"]) == tokenizer.latent_shape
    cfg = run.diffusion.network
    network = NETWORKS.get(cfg.kind)(cfg, tokenizer.latent_shape, diffusion_phase["num_classes"])
    assert sum(diffusion_phase["parameters"].values()) == count(network)
    assert diffusion_phase["trained"] == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert diffusion_phase["notes"] == [], "the classes of scenes are known, not assumed"


def test_figures_are_those_of_torchs_counter(planned):
    run, found = planned
    assert counted(found) == COUNTED[run.name]


def test_memory_adds_up(planned):
    for phase in planned[1]["phases"]:
        memory = phase["memory"]
        assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
        assert memory["weights"] == 4 * phase["trained"]
        assert memory["optimiser"] == 2 * memory["weights"]
        assert memory["activations"] > 0
        assert phase["flops"]["step_per_image"] == sum(v for k, v in phase["flops"].items() if k != "step_per_image")
        assert phase["total_flops"] > 0


def test_budget(planned):
    run, found = planned
    for phase, train in zip(found["phases"], (run.train, run.diffusion.train), strict=True):
        assert phase["batch"] == train.batch
        assert phase["steps"] * train.batch >= train.samples > (phase["steps"] - 1) * train.batch


def test_frozen_parts_are_not_counted_as_trained():
    run = api.resolve("tiny_plain_vae", {"trains": ["decoder.*"]})
    phase = plan.plan(run)["phases"][0]
    extra = sum(phase["loss_parameters"].values())
    assert phase["trained"] == phase["parameters"]["decoder"] + extra
    assert phase["memory"]["frozen"] >= 4 * phase["parameters"]["encoder"]


def test_flops_and_activations_of_a_closed_form():
    """Two linear layers: 2 in out multiply-adds forward; backward twice that, less the gradient of the input."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 16, bias=False))
    meter = Meter()
    with meter.fake(net):
        x = torch.empty(5, 32)
        with meter.part("forward"):
            y = net(x)
        with meter.part("backward"):
            y.sum().backward()
    first, second = 2 * 5 * 32 * 64, 2 * 5 * 64 * 16
    assert meter.flops == {"forward": first + second, "backward": first + 2 * second}
    assert meter.activations == 4 * (5 * 32 + 5 * 64)  # the input of each layer, once


@pytest.mark.parametrize("groups", [1, 16])
def test_flops_of_convolutions(groups):
    """Forward 2 O (I / groups) k k H W; backward twice that, for the gradients of input and weight."""
    with torch.device("meta"):
        net = nn.Conv2d(16, 32, 3, padding=1, groups=groups, bias=False)
    meter = Meter()
    with meter.fake(net):
        x = torch.empty(2, 16, 8, 8, requires_grad=True)
        with meter.part("forward"):
            y = net(x)
        with meter.part("backward"):
            y.sum().backward()
    forward = 2 * 2 * 32 * (16 // groups) * 9 * 8 * 8
    assert meter.flops == {"forward": forward, "backward": 2 * forward}


def test_published_counts_without_allocating():
    """LightningDiT-XL/1 and B/1 at ImageNet's classes; nothing of 2.7 GB is allocated."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size, published in (("XL", 675_260_768), ("B", 130_557_728)):
        diffusion = {"network": {"kind": "lightningdit", "size": size, "patch": 1}, "train": {"samples": 1000}}
        run = api.resolve("tiny_plain_vae", {"diffusion": diffusion, "data.size": 256})
        run = config.override(run, {"tokenizer.channels": 32, "tokenizer.factor": 16, "tokenizer.multipliers": None})
        with shapes_only():
            network = NETWORKS.get(run.diffusion.network.kind)(run.diffusion.network, (32, 16, 16), 1000)
        assert count(network) == published
        assert all(p.is_meta for p in network.parameters())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024 * (1 if sys.platform == "linux" else 1024)


def test_paper_preset_is_the_published_network(golden, monkeypatch):
    """Counts of the release's configuration; no weights are looked for and nothing is downloaded."""
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: pytest.fail("a plan downloaded"))
    published = json.loads((golden / "vfmvae_full_param_counts.json").read_text())
    found = plan.plan(api.resolve("paper_vfm_vae"))
    tokenizer, *_, diffusion = found["phases"]  # all four stages train against the same network
    total = sum(tokenizer["parameters"].values()) + tokenizer["loss_parameters"]["vf"]
    assert total == published["legacy_false"]["total"] == 139_770_642
    assert sum(diffusion["parameters"].values()) == 675_260_768
    assert tokenizer["latent_shape"] == [32, 16, 16]
    assert tokenizer["frozen_in_losses"] > 14_000_000, "LPIPS' backbone is counted"
    assert not any("loss" in note for note in tokenizer["notes"])
    assert counted(found) == COUNTED["paper_vfm_vae"]


def test_gradients_inside_a_forward_pass_are_counted():
    """The adaptive weight of this preset's adversarial term takes gradients at a leaf."""
    phase = plan.plan(api.resolve("tiny_epsilon_vae_gan"))["phases"][0]
    assert phase["flops"]["discriminators"] > 0
    assert phase["flops"]["backward"] > 2 * phase["flops"]["encode"]


def test_data_that_is_not_here_is_said(tmp_path):
    run = api.resolve("tiny_plain_vae", {"data.source": f"folder:{tmp_path / 'missing'}"})
    phase = plan.plan(run)["phases"][1]
    assert phase["num_classes"] == 1000
    assert "assumed" in phase["notes"][0]


def test_sampling_cost_follows_the_protocol():
    base = plan.plan(api.resolve("tiny_plain_vae"))["phases"][1]
    changes = {"protocol.sampler.solver": "heun", "protocol.guidance.scale": 2.0}
    more = plan.plan(api.resolve("tiny_plain_vae", changes))["phases"][1]
    assert more["sampling_flops"] == 4 * base["sampling_flops"]
    adaptive = plan.plan(api.resolve("tiny_plain_vae", {"protocol.sampler.solver": "dopri5"}))["phases"][1]
    assert "sampling_flops" not in adaptive
    internal = api.resolve("tiny_multi_layer_rae_raev2")
    assert internal.protocol.guidance.kind == "internal"
    phase = plan.plan(internal)["phases"][-1]
    assert phase["sampling_flops"] == internal.protocol.sampler.steps * phase["flops"]["network"], "one evaluation a step"


def test_a_sample_is_priced_by_what_the_sampler_does():
    def evaluations(**changes):
        phase = plan.plan(api.resolve("tiny_plain_vae", {f"protocol.{k}": v for k, v in changes.items()}))["phases"][1]
        return phase["sampling_flops"] / phase["flops"]["network"], phase["notes"]

    sampler = {"sampler.steps": 10, "sampler.shift": 1.0, "guidance.scale": 2.0}
    half, notes = evaluations(**sampler, **{"guidance.interval": (0.45, 1.0)})  # t = 1, .9, ... .5 are guided
    assert half == 10 + 6
    assert not notes
    assert evaluations(**sampler | {"sampler.solver": "sde"})[0] == 20
    assert any("sampler.reuse" in note for note in evaluations(**{"sampler.reuse": 2})[1])


@pytest.mark.parametrize(("preset", "change"), [
    ("tiny_plain_vae_repa_e", {"diffusion.tune.statistics": "batch"}),  # reads its network twice a step
    ("tiny_rae", {"diffusion.stale": {}}),  # calls its halves, one of them several times
])  # fmt: skip
def test_a_sample_costs_the_same_however_the_network_was_trained(preset, change):
    usual, other = (plan.plan(api.resolve(preset, given))["phases"][-1] for given in ({}, change))
    assert other["sampling_flops"] == usual["sampling_flops"] > 0


def test_a_loss_that_looks_at_labels_has_a_plan():
    apart, _, together, _ = plan.plan(api.resolve("tiny_plain_vae_apart"))["phases"]
    assert apart["flops"]["step_per_image"] > 0 < together["flops"]["step_per_image"]


def test_pretraining_runs_have_no_plan():
    run = config.parse({"name": "judge", "pretrain": {"objective": "classify"}, "train": {"samples": 10}})
    with pytest.raises(ConfigError, match="pretraining"):
        plan.plan(run)


def test_command_prints_and_dumps(capsys):
    assert main.main(["plan", "tiny_plain_vae"]) == 0
    text = capsys.readouterr().out
    assert "latent 4 x 4 x 4" in text
    assert "encoder" in text
    assert "memory" in text
    assert main.main(["plan", "tiny_plain_vae", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tier"] == "tiny"


def test_without_a_cache_a_step_encodes_its_images(planned):
    run, cached = planned
    tokenizer, generator = plan.plan(config.override(run, {"diffusion.cache": False}))["phases"]
    encode = tokenizer["flops"].get("vfm", 0) + tokenizer["flops"]["encode"]
    assert generator["flops"] == cached["phases"][1]["flops"] | {"encode": encode, "step_per_image": cached["phases"][1]["flops"]["step_per_image"] + encode}
    assert not [row for row in price.price({"phases": [tokenizer, generator]}, 1, 64)["rows"] if "latents of" in row["what"]]


def test_hours_are_flops_over_peak_and_share(planned):
    _, found = planned
    priced = price.price(found, n=100, images=64, gpus=4, mfu=0.5)
    rows = {row["what"]: row for row in priced["rows"]}
    tokenizer, generator = found["phases"]
    encode = tokenizer["flops"].get("vfm", 0) + tokenizer["flops"]["encode"]
    expected = {
        "tokenizer: training": tokenizer["total_flops"], "diffusion: training": generator["total_flops"],
        "diffusion: latents of 64 images": 64 * encode * generator["views"], "diffusion: 100 samples": 100 * generator["sampling_flops"],
    }  # fmt: skip
    assert {what: row["flops"] for what, row in rows.items() if what != "in all"} == expected
    assert rows["in all"]["flops"] == sum(expected.values())
    for row in rows.values():
        for gpu, peak in price.PEAK.items():
            assert row["hours"][gpu] == pytest.approx(row["flops"] / (4 * 0.5 * peak) / 3600)
    for wrong in ({"gpus": 0}, {"mfu": 0.0}, {"mfu": 1.5}):
        with pytest.raises(ConfigError, match="at least one GPU"):
            price.price(found, 1, 1, **wrong)
    assert "35%" in price.table(price.price(found, 1, 1))


def test_a_wrong_number_of_gpus_is_told_before_anything_is_planned(monkeypatch, capsys):
    monkeypatch.setattr(plan, "plan", None)
    assert main.main(["plan", "tiny_plain_vae", "--gpus", "0"]) == 2
    assert "gpus = 0, mfu = 0.35: give at least one GPU" in capsys.readouterr().err
