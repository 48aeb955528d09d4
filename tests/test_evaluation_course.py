"""Curves over training: every point has the hash it was logged with, and points of other protocols stand in no curve."""

from __future__ import annotations

import pytest

from vfmlab import runs
from vfmlab.errors import ConfigError, RunError
from vfmlab.evaluation import course
from vfmlab.evaluation.instruments import blocks
from vfmlab.evaluation.number import Number
from vfmlab.plots import figures
from vfmlab.studies import compare_page, leaderboard, results
from vfmlab.studies.results import Result


def run(path, *points, name="gfd"):
    """A run that logged (samples, value, hash or None) as evaluations."""
    folder = runs.RunDir(path)
    folder.path.mkdir(parents=True)
    for samples, value, mark in points:
        entry = value if mark is None else {"value": value, "protocol": mark, "n": 9}
        folder.log({"kind": "evaluation", "step": samples // 8, "samples": samples, name: entry})
    return folder


def result(folder, mark="a", label=None):
    numbers = {"gfd": Number(1.0, mark, 9)} if mark else {}
    protocol = {"n": 9, "images": {"ema": True}, "features": {"name": "judge"}}
    return Result(label or folder.id, folder.id, data="scenes", size=32, hash=mark, protocol=protocol, numbers=numbers, logged=course.logged(folder),
                  latent=(4, 2, 2), method="rae", name=folder.id)  # fmt: skip


@pytest.fixture
def mixed(tmp_path):
    """Evaluated under a, then under b, and once by a version that kept no hash."""
    return run(tmp_path / "mixed", (8, 9.0, None), (16, 8.0, "a"), (24, 7.0, "a"), (32, 99.0, "b"))


def test_a_curve_has_one_protocol(mixed):
    assert [(s, n.protocol) for s, n in course.logged(mixed)["gfd"]] == [(8, None), (16, "a"), (24, "a"), (32, "b")]
    one = course.over_training(mixed, "gfd", "a")
    assert (one.samples, one.values, one.left_out) == ((16, 24), (8.0, 7.0), 2)
    assert course.over_training(mixed, "gfd").protocol == "b"  # of its last evaluation
    assert course.over_training(mixed, "psnr").samples == ()


def test_points_without_a_hash_stand_in_no_curve(tmp_path):
    old = run(tmp_path / "old", (8, 3.0, None), (16, 2.0, None))
    one = course.over_training(old, "gfd")
    assert (one.samples, one.left_out) == ((), 2)
    assert "2 of `old`" in course.left_out([one])


def test_a_resumed_run_that_logged_twice_counts_the_later_point(tmp_path):
    one = course.over_training(run(tmp_path / "twice", (8, 3.0, "a"), (8, 2.0, "a")), "gfd")
    assert one.values == (2.0,)


def test_every_page_leaves_out_points_of_other_protocols(mixed, tmp_path):
    """Tables, the HTML page, the leaderboard and the notebooks' figures, each with runs of two protocols."""
    other = run(tmp_path / "other", (16, 5.0, "a"), (24, 4.0, "a"))
    found = [result(mixed), result(other)]
    level = {"images until 7": "24"}, {"images until 7": "16"}  # the worst last value; before the first evaluation nothing is known
    assert results.curve_records(found, "gfd") == [{"row": "mixed", "16": "8", "24": "7"} | level[0], {"row": "other", "16": "5", "24": "4"} | level[1]]
    text = compare_page.build(found, "vfmlab compare", "Title").markdown()
    assert "99" not in text
    assert "Left out: points that were logged under another protocol, or by a version that logged no hash (2 of `mixed`)" in text
    third = run(tmp_path / "third", (16, 1.0, "a"))
    drawn = [*compare_page.over_training(found), leaderboard.convergence(found, "gfd"), figures.convergence([other, mixed, third])]
    for figure in drawn:
        values = [v for trace in figure.data for v in trace.y]
        assert 99.0 not in values
        assert values
    assert "2 points of other protocols" in leaderboard.convergence(found, "gfd").layout.title.text


def test_rows_of_two_protocols_have_their_own_curves(mixed, tmp_path):
    """The published page that this came from: two rows of one table's curve were of another judge."""
    later = run(tmp_path / "later", (16, 3.0, "b"), (32, 2.0, "b"))
    text = compare_page.build([result(mixed, "a"), result(later, "b")], "", "T").markdown()
    first, second = text.split("## Protocol b")
    assert "| mixed | 8 | 7 |" in first
    assert "later" not in first
    assert "| later | 3 | 2 |" in second


def test_blocks_and_levels_are_read_under_one_protocol(tmp_path):
    folder = run(tmp_path / "blocks", (8, 0.1, None), (16, 0.2, "a"), (24, 0.3, "b"), name="cknna_block_1")
    assert blocks.over_training(folder) == {"samples": [24], "block": [1], "value": [[0.3]]}
    with pytest.raises(RunError, match="with a protocol"):
        blocks.over_training(run(tmp_path / "none", (8, 0.1, None), name="cknna_block_1"))


def test_only_numbers_that_are_followed_have_curves(mixed):
    with pytest.raises(ConfigError, match="'psnr' is not measured during training"):
        leaderboard.convergence([result(mixed)], "psnr")
