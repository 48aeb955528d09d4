"""Instruments on every kind of subject, and the door: what is kept, what is refused, what must not change a number."""

from __future__ import annotations

import json
import math

import pytest
import torch
from evaluation_toys import CFG, Lossless, Toy
from torch import nn

from vfmlab import api, config, data, runs
from vfmlab.errors import ConfigError, DataError, RunError, VfmlabError
from vfmlab.evaluation import subject
from vfmlab.evaluation.instruments import base as bench
from vfmlab.evaluation.instruments import blocks, recovery, sensitivity, spaces
from vfmlab.evaluation.number import LATENT, quantities
from vfmlab.evaluation.perturbations import CLEAN, MOVED, NOISY
from vfmlab.evaluation.reference import Reference
from vfmlab.evaluation.representation import pool
from vfmlab.plots import figures as drawing
from vfmlab.plots import latents as figures
from vfmlab.registry import INSTRUMENTS, NETWORKS
from vfmlab.studies import measure, show

PROTOCOL = config.Protocol(n=60, batch=25)


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path_factory.mktemp("cache")))


class Echo(Toy):
    """A reference that sees what the lossless tokenizer sees: token means of its latents."""

    name, dimension = "echo", 12

    def __init__(self):
        super().__init__()
        self.tokenizer = Lossless()

    def forward(self, images):
        from vfmlab.evaluation.features import Seen

        return Seen(pool(self.tokenizer.encode(images).mode()), None)


def lossless(protocol=PROTOCOL, space=None, cfg=CFG, tokenizer=None, **more) -> subject.Subject:
    return subject.of_tokenizer(tokenizer or Lossless(), cfg, protocol, Reference(space or Toy()), **more)


def network(depth: int = 3) -> nn.Module:
    kind = NETWORKS.get("lightningdit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = kind(kind.Config(width=16, depth=depth, heads=2, patch=2), (12, 8, 8), 10)
        for p in net.parameters():  # as initialised, every block is the identity
            nn.init.normal_(p, std=0.05)
    return net.eval()


# -- subjects ---------------------------------------------------------------------------------------------------------


def test_a_representation_that_is_the_reference_agrees_wholly():
    found = bench.measure(lossless(space=Echo()), ["alignment", "se_cknna"])
    value = {k: v.value for k, v in found.items()}
    assert value["alignment_cknna"] == pytest.approx(1, abs=1e-5)
    assert value["alignment_mutual_knn"] == 1
    assert value["se_cknna_clean"] == pytest.approx(1, abs=1e-5)
    assert value["se_cknna_noise"] == pytest.approx(1, abs=1e-5)
    sets = found.curves["se_cknna_sets"]
    assert sets.facts["sets"] == ["clean", *(v.name for v in (*NOISY, MOVED))]
    # ours: the mean of four noise sets and one of turns and scales, the undisturbed one apart
    assert value["se_cknna"] == pytest.approx(sum(sets.value[1:]) / 5)
    assert value["se_cknna"] == pytest.approx((4 * value["se_cknna_noise"] + value["se_cknna_moved"]) / 5)
    assert value["se_cknna_change"] == pytest.approx(value["se_cknna"] / value["se_cknna_clean"] - 1)
    assert value["se_cknna_reference_clean"] == pytest.approx(sum(sets.facts["reference_clean"][1:]) / 5)
    assert sets.facts["reference_clean"][1] < sets.value[1]  # the reference that stays put agrees less


def test_tokenizers_that_read_scaled_images_differently_compare_under_noise():
    one, other = lossless(), lossless()
    other.__dict__["scales"] = not one.scales
    one, other = (bench.measure(subject, ["se_cknna"]) for subject in (one, other))
    assert one["se_cknna_noise"].protocol == other["se_cknna_noise"].protocol
    assert one["se_cknna_noise"].value == other["se_cknna_noise"].value
    for name in ("se_cknna", "se_cknna_moved"):
        assert one[name].protocol != other[name].protocol


def test_as_released_the_reference_reads_small_images_at_their_size(monkeypatch):
    echo, sides = Echo(), {"se_cknna": set(), "se_cknna_release": set()}
    read = echo.forward
    for name, seen in sides.items():
        monkeypatch.setattr(echo, "forward", lambda images, seen=seen: seen.add(images.shape[-1]) or read(images))
        found = bench.measure(lossless(space=echo), [name])
        assert 0 < found[name].value < 1 + 1e-6
    assert sides == {"se_cknna": {16}, "se_cknna_release": {4, 8, 12, 16}}
    # both read the same images at the same size: they agree wholly, as in no other way
    assert found["se_cknna_release"].value == pytest.approx(1, abs=1e-5)
    assert found["se_cknna_release_change"].value == pytest.approx(0, abs=1e-5)


def test_what_disturbance_costs_is_counted_beyond_chance(monkeypatch):
    """Of .5 undisturbed and .4 disturbed, both with a chance value of 10 / 59."""
    def cost(clean: float, disturbed: float):
        values = iter([clean, *[disturbed] * 5])
        monkeypatch.setattr(sensitivity, "cknna", lambda *_: next(values))
        return bench.measure(lossless(), ["se_cknna_release"])

    both, chance = cost(0.5, 0.4), 10 / 59
    assert both["se_cknna_release_change"].value == pytest.approx(-0.2)
    assert both["se_cknna_release_change_corrected"].value == pytest.approx((0.4 - chance) / (0.5 - chance) - 1)
    assert cost(0.5, chance)["se_cknna_release_change_corrected"].value == pytest.approx(-1), "nothing is left"
    assert "needs a positive one" in cost(0.1, 0.05)["se_cknna_release_change_corrected"].reason


def test_neither_batch_size_nor_kept_files_change_features(tmp_path):
    for make in (lossless, lambda protocol, **more: diffusion(protocol, **more)):
        whole = make(PROTOCOL)
        for view in (CLEAN, NOISY[3], MOVED):
            few = make(PROTOCOL.model_copy(update={"batch": 7}), store=tmp_path)
            torch.testing.assert_close(few.pooled(view), whole.pooled(view), atol=1e-5, rtol=1e-5)
            again = make(PROTOCOL, store=tmp_path)
            again.reads = None  # would fail if anything were computed
            again.__dict__["scales"] = whole.scales
            torch.testing.assert_close(again.pooled(view), whole.pooled(view), atol=1e-5, rtol=1e-5)
    assert len(list(tmp_path.glob("*.safetensors"))) == 6


def diffusion(protocol=PROTOCOL, space=None, **more) -> subject.Subject:
    return subject.of_diffusion(network(), Lossless(), CFG, protocol, Reference(space or Toy()), 10, **more)


def test_a_subject_reads_posterior_modes_in_the_units_of_diffusion():
    s = lossless()
    images = data.to_float(s.source.batch(torch.arange(60)).images)
    torch.testing.assert_close(s.held_out.maps, s.tokenizer.encode(images).mode())
    torch.testing.assert_close(s.pooled(), pool(s.held_out.maps))
    torch.testing.assert_close(s.held_out.images(3), images[:3])
    assert s.scales  # convolutional: smaller images are read as they are
    assert s.training.maps.shape == (200, 12, 8, 8)
    raw = lossless(tokenizer=Lossless(statistics=False))
    assert raw.facts["latent"] == "raw"
    torch.testing.assert_close(raw.held_out.maps, raw.tokenizer.posterior(images).mode())


def test_a_network_of_one_size_gets_scaled_images_at_full_size():
    s = diffusion()
    assert not s.scales
    assert s.pooled(MOVED).shape == (60, 16)
    found = bench.measure(s, ["se_cknna"])
    facts = found.protocols[found["se_cknna"].protocol]["instrument"]
    assert facts["scaled images"] == "brought back to full size"


def test_wide_features_keep_fewer_maps_and_say_so(monkeypatch):
    monkeypatch.setattr(subject, "MAP_BYTES", 1)
    monkeypatch.setattr(subject, "FEWEST_MAPS", 30)
    s = lossless()
    assert (len(s.held_out), len(s.pooled()), s.n) == (30, 60, 60)
    assert bench.measure(s, ["lds"])["lds"].n == 30


def test_tokens_of_a_block_are_those_of_the_network():
    net, z = network(), torch.randn(5, 12, 8, 8)
    noise = subject.noise_of(z, [4, 2, 9, 1, 7], seed=3)
    torch.testing.assert_close(subject.noise_of(z[1:3], [2, 9], seed=3), noise[1:3])
    _, found = net(0.7 * z + 0.3 * noise, torch.full((5,), 0.3), torch.full((5,), 10), features_at=(2,))
    maps = subject.tokens_at(net, z, 0.3, noise, (2,))[2]
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), found[2])
    by_block = blocks.block_features(net, z, [4, 2, 9, 1, 7], 0.3, seed=3)
    torch.testing.assert_close(by_block[2], pool(maps))
    assert sorted(by_block) == [1, 2, 3]


def test_a_class_token_in_front_is_left_out():
    class WithToken(nn.Module):
        num_classes, grid, depth = 3, (2, 2), 1

        def forward(self, x, t, y, features_at=()):
            tokens = x.flatten(2).transpose(1, 2)
            return x, {k: torch.cat([torch.full_like(tokens[:, :1], 99), tokens], 1) for k in features_at}

    z = torch.randn(2, 5, 2, 2)
    assert torch.equal(subject.tokens_at(WithToken(), z, 0.0, torch.zeros_like(z), (1,))[1], z)


def test_every_instrument_measures_every_kind_it_names():
    subjects = {"tokenizer": lossless(tokenizer=Lossless(error=0.1)), "diffusion": diffusion(), "vfm": vision()}
    for kind, s in subjects.items():
        found = bench.measure(s)
        json.dumps(found.as_json(), allow_nan=False)
        assert list(found.instruments) == bench.names(kind)
        assert set(found) | set(found.curves) == {q.name for name in bench.names(kind) for q in INSTRUMENTS.get(name).quantities}
        for key, entry in {**found, **found.curves}.items():
            if entry.absent:
                assert key.startswith(("gfd", "rfd", "bpp", "probe_1bpp", "probe_class_token", "lpc")), (kind, key, entry.reason)
            else:
                assert entry.protocol in found.protocols, key
        assert all(math.isfinite(v.value) for v in found.measured.values())
    assert {k for k, q in quantities().items() if q.better is None} >= {"effective_rank", "uniformity"}


def vision() -> subject.Subject:
    from vfmlab import vfm

    model = vfm.build(config.VFM(name="pocket_random", upscale=2), 16)
    return subject.of_vision_model(model, CFG, PROTOCOL, Reference(Toy()))


def test_a_linear_lossless_tokenizer_has_straight_paths_and_no_error():
    value = {k: v.value for k, v in bench.measure(lossless(), ["interpolation", "frequency", "robustness", "rate"]).items()}
    assert value["path_length"] == pytest.approx(1, abs=1e-4)
    assert value["path_roughness"] == pytest.approx(0, abs=1e-4)
    assert value["mse_low"] + value["mse_high"] < 1e-9
    off = bench.measure(lossless(tokenizer=Lossless(error=0.1)), ["frequency"])
    # a shift of all pixels, but where it was clipped: low frequencies, at most (0.1 / 2)^2
    assert 0.0005 < off["mse_low"].value + off["mse_high"].value <= 0.0026
    assert off["error_high_share"].value < 0.3


def test_rate_curve_grows_with_bits():
    report = bench.measure(lossless(), ["rate"])
    found = report.curves["rate"]
    assert report["probe_1bpp"].reason == "its least is 2 bits per pixel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "FINE", 1)  # then few channels cost few bits
        coarse = bench.measure(lossless(), ["rate"])
    cheap = [p for p in coarse.curves["rate"].value if p["bpp"] <= 1]
    assert 0 < len(cheap) < len(coarse.curves["rate"].value)
    assert coarse["probe_1bpp"].value == max(p["probe"] for p in cheap)
    points = [p for p in found.value if p["channels"] == 12]
    assert [p["psnr"] for p in points] == sorted(p["psnr"] for p in points)
    assert points[0]["bpp"] == 12 * 1 / 4  # channels x bits at one token for 2 x 2 pixels
    assert all(p["bpp_entropy"] <= p["bpp"] + 1e-9 for p in found.value)
    assert found.facts["unrounded"]["psnr"] >= max(p["psnr"] for p in points)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_says_why():
    few = lossless(PROTOCOL.model_copy(update={"n": 8}))
    found = bench.measure(few, ["alignment", "se_cknna"])
    assert all("lower k or use more samples" in reason for reason in found.missing.values())
    assert not found.measured
    s = lossless(tokenizer=Lossless(error=0.1))
    s.source.masks = lambda indices: None
    s.source.factors = lambda indices: None
    s.source.class_names = ["all"]
    s._maps["train"] = subject.Maps(s.training.maps, s.training.labels, s.training.indices, s.source)
    found = bench.measure(s, ["segmentation", "factors", "probes", "rate"])
    assert "no masks; scenes have them" in found["segmentation_5"].reason
    assert "no known factors" in found["factor_r2"].reason
    assert found["probe_mean_linear"].reason == found["bpp_probe"].reason == found["probe_1bpp"].reason == "the data has no classes"
    assert found["bpp_psnr"].value > 0  # the part that needs no classes is there
    constant = lossless()
    constant.reads = lambda images, ids: torch.ones(len(images), 4, 8, 8)
    found = bench.measure(constant, ["alignment", "geometry", "factors"])
    assert all("constant" in v.reason for v in found.values())
    broken = lossless()
    broken.reads = lambda images, ids: torch.full((len(images), 4, 8, 8), math.nan)
    with pytest.raises(DataError, match="not finite"):
        _ = broken.held_out
    assert all("\n" not in row["reason"] for row in figures.missing({"a": found}))


def test_unfit_and_unknown_instruments_are_refused():
    with pytest.raises(ConfigError, match="unknown instrument 'se_cknn'.*se_cknna"):
        bench.measure(lossless(), ["se_cknn"])
    with pytest.raises(ConfigError, match="'blocks' measures diffusion runs; 'tokenizer' is a tokenizer"):
        bench.measure(lossless(), ["blocks"])
    with pytest.raises(ConfigError, match="decodes nothing"):
        diffusion().decode(torch.zeros(1, 12, 8, 8))


# -- the door ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tiny plain VAE with its diffusion model, evaluated twice on the way."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = {"data.val": 64, "protocol.n": 64, "diffusion.train.log_every": 64}
    list(api.train("tiny_plain_vae", folder, overrides))
    return folder


def test_few_steps_end_at_the_reports_own_number(root):
    """And differ from it before; a sampler that has few steps itself is told so."""
    found = measure.measure("tiny_plain_vae", "few_steps", root, {"sampler.steps": 6})
    curve, report = found.curves["gfd_over_steps"], api.evaluate("tiny_plain_vae", root, protocol={"sampler.steps": 6})
    assert curve.facts["steps"] == [2, 4, 6]
    assert curve.value[-1] == pytest.approx(report["gfd"].value, rel=1e-6)
    assert len(set(curve.value)) == 3
    assert found["gfd_few"].value == pytest.approx(curve.value[1] - curve.value[2])
    assert found["gfd_few"].protocol != report["gfd"].protocol
    (line,) = figures.few_steps({"one": found}).data
    assert (list(line.x), list(line.y)) == (curve.facts["steps"], curve.value)
    absent = measure.measure("tiny_plain_vae", "few_steps", root, {"sampler.steps": 4})["gfd_few"]
    assert "euler in 4 steps" in absent.reason


def test_distances_in_the_protocols_own_space_are_the_reports(root, monkeypatch):
    """The others stand beside under their own hashes; a space whose weights are not here is absent with the reason."""
    monkeypatch.setattr(spaces, "SPACES", {"judge": "judge", "factors": "factors", "groups": "groups", "mobilenetv2": "judge:nowhere"})
    for ref, name, short in (("tiny_plain_vae_tokenizer", "reconstruction_spaces", "rfd"), ("tiny_plain_vae", "sample_spaces", "gfd")):
        found, report = measure.measure(ref, name, root), api.evaluate(ref, root)
        assert found[f"{short}_judge"].value == pytest.approx(report[short].value, rel=1e-4)
        assert found[f"{short}_judge"].protocol == report[short].protocol
        assert found[f"{short}_factors"].value > 0
        assert found[f"{short}_factors"].value != pytest.approx(found[f"{short}_judge"].value, rel=0.01)
        section = found.protocols[found[f"{short}_factors"].protocol]
        assert section["features"]["name"] == found[f"{short}_factors"].facts["space"] == "factors"
        assert "nowhere" in found[f"{short}_mobilenetv2"].reason
        assert found[f"{short}_groups"].reason == "'groups' has seen scenes:groups only"


def test_spaces_judge_images_of_the_kind_that_they_have_seen():
    fitting = {source: [space for space in spaces.SPACES.values() if not spaces._foreign(space, source)]
               for source in ("scenes:hard", "scenes:groups", "folder:pets")}
    assert fitting == {"scenes:hard": ["judge", "factors"], "scenes:groups": ["judge", "factors", "groups"],
                       "folder:pets": ["mobilenetv2@128", "efficientnet_lite2@128"]}


def test_the_door_measures_once_and_keeps_it(root, monkeypatch):
    first = measure.measure("tiny_plain_vae_tokenizer", ["lds", "geometry"], root)
    assert first.kind == "tokenizer"
    assert first.about["reference"] == "judge"
    assert set(first.instruments) == {"lds", "geometry"}
    folder = runs.open_run("tiny_plain_vae_tokenizer", root)
    assert first.run == folder.id
    assert len(list((folder.path / "instruments").glob("*.json"))) == 1
    assert list((folder.path / "features").glob("*.safetensors"))
    more = measure.measure(folder.id, ["lds", "interpolation"], root)
    assert set(more) == {"lds", "path_length", "path_roughness"}
    monkeypatch.setattr(api, "load_tokenizer", None)  # would fail if anything were measured again
    whole = measure.measure(folder.path, ["lds", "geometry", "interpolation"], root)
    assert whole["lds"] == first["lds"]
    assert whole.protocols.keys() == {v.protocol for g in (whole, whole.curves) for v in g.values()}
    assert set(measure.measure(folder.path, ["geometry"], root)) == set(first) - {"lds"}


def test_an_instrument_that_has_a_new_number_is_measured_anew(root):
    """And the others of the same report are not."""
    folder = runs.open_run("tiny_plain_vae_tokenizer", root)
    first = measure.measure(folder.path, ["lds", "neighbours"], root, {"n": 40})
    (path,) = [p for p in (folder.path / "instruments").glob("*.json") if json.loads(p.read_text())["metrics"]["lds"]["n"] == 40]
    stored = json.loads(path.read_text())
    del stored["metrics"]["gsq"]
    stored["metrics"]["lds"]["value"] = 9.0
    path.write_text(json.dumps(stored))
    again = measure.measure(folder.path, ["lds", "neighbours"], root, {"n": 40})
    assert again["gsq"] == first["gsq"]
    assert again["lds"].value == 9.0


def test_other_protocols_have_other_hashes(root):
    one = measure.measure("tiny_plain_vae_tokenizer", ["lds"], root)
    fewer = measure.measure("tiny_plain_vae_tokenizer", ["lds"], root, protocol={"n": 30})
    assert fewer["lds"].n == 30
    assert fewer["lds"].protocol != one["lds"].protocol
    batch = measure.measure("tiny_plain_vae_tokenizer", ["lds"], root, protocol={"batch": 3})
    assert batch["lds"] == one["lds"]
    other = measure.measure("tiny_plain_vae_tokenizer", ["lds", "alignment"], root, compared_with="pocket")
    assert other["lds"].protocol == one["lds"].protocol  # which sees no reference
    assert other.about["reference"] == "pocket"
    assert len(figures.numbers({"a": one, "b": fewer})) == 2
    marks = [row["protocols"] for row in figures.numbers({"a": one, "b": fewer, "c": batch})]
    assert marks[0] == marks[2] != marks[1]


def test_a_diffusion_run_with_its_course(root):
    found = measure.measure("tiny_plain_vae", ["blocks", "time_loss", "convergence", "lds"], root)
    assert found.kind == "diffusion"
    table = found.curves["block_cknna_over_t"]
    if not table.absent:
        assert (len(table.value), len(table.value[0])) == (2, 5)
    course, area = found.curves["gfd_over_samples"], found["gfd_area"]
    assert course.facts["samples"] == [32, 64]
    assert area.value == pytest.approx(sum(course.value) / 2)
    assert 0 < found["velocity_error"].value < 3
    folder = runs.open_run("tiny_plain_vae", root, kind="diffusion")
    assert blocks.over_training(folder)["samples"] == [32, 64]
    with pytest.raises(RunError, match="has logged no agreement of its blocks"):
        blocks.over_training(folder, "cknna_target_block_")
    own = measure.measure(folder.id, ["lds"], root, of="tokenizer")
    assert own.kind == "tokenizer"
    assert own.numbers == measure.measure("tiny_plain_vae_tokenizer", ["lds"], root).numbers


def test_blocks_over_training_are_read_from_the_log(tmp_path):
    net, z = network(), torch.randn(40, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    logged = blocks.block_alignment(net, z, range(40), pool(z), "aa")
    assert list(logged) == ["cknna_block_1", "cknna_block_2", "cknna_block_3"]
    folder = runs.RunDir(tmp_path)
    for samples in (32, 64):
        folder.log({"kind": "evaluation", "step": samples // 8, "samples": samples, **{k: v.entry() for k, v in logged.items()}})
    course = blocks.over_training(folder)
    assert course["samples"] == [32, 64]
    assert course["block"] == [1, 2, 3]
    assert course["value"][1] == pytest.approx([logged["cknna_block_2"].value] * 2)
    folder.log({"kind": "evaluation", "step": 9, "samples": 72, "cknna_target_block_2": {"value": 0.5, "protocol": "aa"}, "cknna_block_1": 0.1})
    assert blocks.over_training(folder) == course
    assert blocks.over_training(folder, "cknna_target_block_") == {"samples": [72], "block": [2], "value": [[0.5]]}
    assert len(drawing.dynamics_maps({"a": course}, "blocks").data[0].z) == 3


def test_vision_models_and_what_the_door_refuses(root):
    cfg = runs.open_run("tiny_plain_vae_tokenizer", root).config().data
    found = measure.measure("vfm:pocket_random@2", ["lds", "probes"], root, protocol={"n": 40}, data=cfg)
    assert found.kind == "vfm"
    assert found["lds"].n == 40
    assert found.about["representation"] == {"of": "vfm", "layer": 2}
    for call, said in (
        (lambda: measure.measure("vfm:pocket", root=root), "has no images of its own: give data="),
        (lambda: measure.measure("vfm:pocket@last", root=root, data=cfg), "the layer after '@' is a number"),
        (lambda: measure.measure("vfm:pocket@--1", root=root, data=cfg), "the layer after '@' is a number"),
        (lambda: measure.measure("tiny_plain_vae_tokenizer", [], root), "instruments: none is named"),
        (lambda: measure.measure("vfm:pockt", root=root, data=cfg), "unknown VFM 'pockt'"),
        (lambda: measure.measure("tiny_plain_vae_tokenizer", ["blocks"], root), "measures diffusion runs"),
        (lambda: measure.measure("tiny_plain_vae_tokenizer", ["ldss"], root), "unknown instrument 'ldss'"),
        (lambda: measure.measure("tiny_plain_vae_tokenizer", "ldss", root), "unknown instrument 'ldss'"),
        (lambda: measure.measure("no_such_run", root=root), "unknown run"),
        (lambda: measure.measure("tiny_plain_vae_tokenizer", root=root, of="network"), "only 'tokenizer' can be asked for"),
        (lambda: measure.measure("tiny_plain_vae_tokenizer", root=root, protocol={"m": 3}), "protocol.m"),
        (lambda: measure.measure("tiny_plain_vae_tokenizer", root=root, data={"vall": 3}), "data.vall"),
    ):
        with pytest.raises(VfmlabError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


def test_figures_of_all_instruments(root):
    ref = runs.open_run("tiny_plain_vae_tokenizer", root).id
    reports = {"one": measure.measure(ref, root=root)}
    reports["two"] = reports["one"]
    for draw in (figures.spectra, figures.sensitivity, figures.factors, figures.segmentation, figures.rate, figures.robustness):
        assert len(draw(reports).data) >= 1
    assert {q.title for q in quantities(LATENT).values()} < set(figures.numbers(reports)[0])
    tokenizers, images = {"one": api.load_tokenizer(ref, root)}, torch.zeros(2, 3, 16, 16)
    for draw in (show.latent_maps, show.noisy):
        assert draw(tokenizers, images + torch.linspace(-1, 1, 2).view(2, 1, 1, 1)).data
