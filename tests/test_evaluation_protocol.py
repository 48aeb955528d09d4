"""Protocols, their hashes, cached references and rankings."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_toys import CFG, Lossless, Toy, setup

from vfmlab import config, data
from vfmlab.errors import CheckpointError, ConfigError, DataError
from vfmlab.evaluation import cache, number
from vfmlab.evaluation import protocol as p
from vfmlab.evaluation.features import open_space
from vfmlab.evaluation.frechet import frechet_distance
from vfmlab.evaluation.reconstruction import evaluate_reconstruction
from vfmlab.evaluation.roundtrip import as_saved
from vfmlab.registry import FEATURE_SPACES

BASE = config.Protocol(n=40, batch=16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VFMLAB_CACHE", str(tmp_path / "cache"))


def hash_of(**changes) -> str:
    return setup(BASE.model_copy(update=changes)).resolved(sampling=True).hash


def test_hash_changes_with_what_changes_numbers_and_with_nothing_else():
    whole = hash_of()
    assert hash_of(batch=7) == whole
    assert hash_of() == whole
    different = {
        hash_of(n=50), hash_of(seed=1), hash_of(ema=False), hash_of(version=2),
        hash_of(sampler=config.Sampler(steps=9)), hash_of(guidance=config.Guidance(scale=2.0)),
    }  # fmt: skip
    assert len(different | {whole}) == 7
    other = CFG.model_copy(update={"seed": 5})
    assert setup(BASE, other).resolved(True).hash != whole


def test_hash_of_a_part_ignores_the_rest():
    def images(**changes):
        return setup(BASE.model_copy(update=changes)).resolved(True).of("images").hash

    assert images(guidance=config.Guidance(scale=2.0)) == images()
    assert images(n=50) != images()
    toy = Toy()
    toy.version = "2"
    assert setup(BASE, space=toy).resolved().hash != setup(BASE).resolved().hash
    assert setup(BASE, space=toy).resolved().of("images").hash == images()


def test_protocol_is_json_and_says_how_many_images_there_were():
    resolved = setup(BASE.model_copy(update={"n": 500})).resolved(sampling=True)
    told = json.loads(json.dumps(resolved.as_dict()))
    assert told["n"] == 500
    assert told["n_real"] == 60 == told["images"]["n"]
    assert told["features"]["name"] == "toy"


def test_chosen_images_are_seeded_and_not_a_prefix():
    s = setup(BASE)
    which = p.selection(s.resolved(), s.source)
    assert len(which.unique()) == 40
    assert which.tolist() == p.selection(s.resolved(), s.source).tolist() != list(range(40))
    everything = setup(BASE.model_copy(update={"n": 60}))
    assert p.selection(everything.resolved(), everything.source).tolist() == list(range(60))


def test_real_features_are_computed_once_and_a_damaged_file_is_replaced():
    s = setup(BASE)
    first = p.real_features(s)
    assert s.space.seen == 40
    again = p.real_features(s)
    assert s.space.seen == 40
    torch.testing.assert_close(again.features(), first.features())
    assert frechet_distance(again, first) == pytest.approx(0, abs=1e-12)
    (path,) = (cache.folder() / "real_features").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    torch.testing.assert_close(p.real_features(s).features(), first.features())
    assert s.space.seen == 80
    p.real_features(setup(BASE.model_copy(update={"seed": 3}), space=s.space))
    assert s.space.seen == 120


def test_images_are_seen_as_saved():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.001, 1.0, 3.0]).view(1, 1, 1, 6).expand(2, 3, 1, 6)
    seen = as_saved(x)
    assert seen.min() == -1
    assert seen.max() == 1
    torch.testing.assert_close((seen + 1) * 127.5, ((seen + 1) * 127.5).round())
    with pytest.raises(DataError, match="1 of 2 images are not finite"):
        as_saved(torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)]))


# -- ranking -----------------------------------------------------------------------------------------------------------


def numbers(error: float, **changes):
    protocol = BASE.model_copy(update=changes)
    return evaluate_reconstruction(Lossless(error), CFG, protocol, setup(protocol))


def test_rank_orders_by_what_is_better():
    reports = {"coarse": numbers(0.2), "fine": numbers(0.02), "exact": numbers(0.0)}
    assert [name for name, _ in number.rank(reports, "psnr")] == ["exact", "fine", "coarse"]
    assert [name for name, _ in number.rank(reports, "rfd")] == ["exact", "fine", "coarse"]


def test_rank_refuses_different_protocols_and_names_the_difference():
    one, two = setup(BASE), setup(BASE.model_copy(update={"n": 30}))
    reports = {}
    for name, s in {"a": one, "b": two}.items():
        draft = number.Draft()
        draft.add("rfd", 1.0, s.resolved(), 30)
        reports[name] = draft.report()
    with pytest.raises(ConfigError, match=r"'rfd' of 'a' .* and 'b' .* cannot be ranked: images.n 40 / 30") as error:
        number.rank(reports, "rfd")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="cannot be ranked"):
        number.rank({name: r.numbers for name, r in reports.items()}, "rfd")


def test_rank_of_a_metric_that_does_not_depend_on_the_difference():
    guided = setup(BASE.model_copy(update={"guidance": config.Guidance(scale=3.0)}))
    report = number.Draft()
    report.add("psnr", 20.0, guided.resolved(True).of("images"), 40)
    ranked = number.rank({"a": numbers(0.0), "b": report.numbers}, "psnr")
    assert [name for name, _ in ranked] == ["a", "b"]


def test_rank_leaves_out_what_was_not_measured():
    report = number.Draft()
    report.absent("lpips", "no weights")
    with pytest.raises(DataError, match="none of the 1 reports"):
        number.rank({"a": report.numbers}, "lpips")
    with pytest.raises(ConfigError, match="did you mean 'psnr'"):
        number.rank({}, "psrn")


# -- feature spaces ----------------------------------------------------------------------------------------------------


def test_unknown_space_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'judge'"):
        open_space("jugde", 32)
    with pytest.raises(ConfigError, match="dinov2_s14"):
        open_space("dinov2_s15", 32)
    assert {"judge", "timm", "vfm", "inception"} <= set(FEATURE_SPACES.names())


def save_judge(path, names=("a", "b")):
    from safetensors.torch import save_file

    from vfmlab.evaluation.judge import Judge
    from vfmlab.weights import io

    torch.manual_seed(0)
    judge = Judge(list(names), 4)
    save_file(judge.state_dict(), path, metadata={io.METADATA: json.dumps({"judge": judge.spec})})


def test_judge_from_a_file_or_a_run_directory(tmp_path):
    path = tmp_path / "run" / "judge.safetensors"
    path.parent.mkdir()
    save_judge(path)
    by_file = open_space(f"judge:{path}", 32)
    by_folder = open_space(str(tmp_path / "run"), 32)
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    seen = by_file(x)
    assert seen.features.shape == (3, by_file.dimension)
    assert seen.logits.shape == (3, 2)
    torch.testing.assert_close(by_folder(x).features, seen.features)
    assert by_file.facts() == by_folder.facts() | {"name": "judge"}
    assert not any(q.requires_grad for q in by_file.parameters())
    assert not by_file.train().training
    assert str(tmp_path) not in json.dumps(by_file.facts())  # where a judge lies does not change a number


def test_missing_judge_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="judge") as error:
        open_space(f"judge:{tmp_path}", 32)
    assert "\n" not in str(error.value)


def test_vision_model_space():
    space = open_space("pocket_random", 32)
    seen = space(torch.rand(2, 3, 32, 32) * 2 - 1)
    assert seen.features.shape == (2, space.dimension)
    assert seen.logits is None
    assert space.facts()["version"]


def test_inception_without_weights_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=r"put https://.*weights-inception") as error:
        open_space("inception", 32)
    assert "\n" not in str(error.value)


def test_inception_weights_with_code_in_them_are_refused(tmp_path, monkeypatch):
    source = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / source.URL_INCEPTION_V3.rpartition("/")[2]
    path.parent.mkdir()
    torch.save({"x": CFG}, path)  # an object of ours: unpickling it would run code
    with pytest.raises(CheckpointError, match="does not hold its weights"):
        open_space("inception", 32)


def test_unknown_classes_say_why():
    assert "knows no classes" in setup(BASE).unknown_classes
    names = data.open_source(CFG, "val").class_names
    assert setup(BASE, space=Toy(names)).unknown_classes is None
    assert f"has not learnt class '{names[-1]}'" in setup(BASE, space=Toy(names[:-1])).unknown_classes


def test_classes_are_matched_by_name():
    """A space may know more classes, in another order: its choice is among the classes of the data."""
    names = data.open_source(CFG, "val").class_names
    s = setup(BASE, space=Toy(["another", *names[::-1]]))
    assert s.unknown_classes is None
    logits = torch.zeros(3, len(names) + 1)
    logits[0, len(names)] = logits[1, 1] = logits[2, len(names) - 2] = 1  # first, last and third class of the data
    logits[2, 0] = 2  # the class that the data does not have
    assert s.classify(logits).tolist() == [0, len(names) - 1, 2]
