"""Contrasts of rows over seeds: closed forms, promised coverage, the rule, Holm."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vfmlab.errors import ConfigError
from vfmlab.evaluation.contrasts import Block, Interval, decide, holm, seeds_to_decide

ROWS, SEEDS = 6, 3


def block(values) -> Block:
    values = np.asarray(values, dtype=float)
    return Block(tuple("abcdefgh"[: len(values)]), tuple(range(values.shape[1])), values)


def test_two_rows_are_the_paired_t_test():
    a, b = np.array([3.0, 4.5, 4.0, 6.0]), np.array([2.0, 4.0, 2.5, 4.5])
    interval = block([a, b]).contrast({"a": 1, "b": -1})
    test = stats.ttest_rel(a, b)
    assert interval.estimate == pytest.approx((a - b).mean())
    assert interval.p_beyond(0) == pytest.approx(test.pvalue)
    assert (interval.low, interval.high) == pytest.approx(tuple(test.confidence_interval(0.95)))


def test_what_a_seed_does_to_all_rows_cancels():
    rng = np.random.default_rng(0)
    y, moved = rng.normal(size=(ROWS, SEEDS)), rng.normal(size=SEEDS) * 100
    before, after = (block(values).contrast({"a": 1, "b": -0.5, "c": -0.5}) for values in (y, y + moved))
    assert after.estimate == pytest.approx(before.estimate)
    assert after.high == pytest.approx(before.high)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, weights, hits, draws = np.random.default_rng(1), {"a": 1, "b": -1}, 0, 3000
    truth = np.arange(ROWS)[:, None] * 2.0
    for _ in range(draws):
        y = truth + rng.normal(size=(1, SEEDS)) * 3 + rng.normal(size=(ROWS, SEEDS))
        one = block(y).contrast(weights)
        hits += one.low <= -2.0 <= one.high
    assert 0.93 <= hits / draws <= 0.97


def test_a_row_that_spreads_more_is_not_pooled():
    rng = np.random.default_rng(4)
    y = rng.normal(size=(ROWS, SEEDS))
    y[0] = [0.0, 30.0, -30.0]
    with_it, without = block(y).contrast({"a": 1, "b": -1}), block(y).contrast({"b": 1, "c": -1})
    test = stats.ttest_rel(y[0], y[1])
    assert with_it.odd == "a"
    assert with_it.freedom == SEEDS - 1
    assert with_it.p_beyond(0) == pytest.approx(test.pvalue)
    assert with_it.each == pytest.approx(tuple(y[0] - y[1]))
    assert without.odd is None
    assert without == block(y[1:]).contrast({"a": 1, "b": -1}), "as if the row were not there"
    alone = Block(tuple("abcdef"), (0, 1, 2), y, ("x", *["y"] * 5)).contrast({"a": 1, "b": -1})
    assert (alone.odd, alone.freedom) == ("a", SEEDS - 1), "the only row of its group"
    assert block(y[:2]).uneven is None, "of two rows none can be told to spread more"
    assert block(np.ones((ROWS, SEEDS))).uneven is None


def test_groups_have_spreads_of_their_own():
    """Welch's test is the case of two groups of rows, whatever the seeds: variances add, freedom by Satterthwaite."""
    rng = np.random.default_rng(7)
    y = rng.normal(size=(8, SEEDS)) * np.repeat([1.0, 6.0], 4)[:, None]
    one = Block(tuple("abcdefgh"), (0, 1, 2), y, tuple("xxxxyyyy"))
    within, over = one.contrast({"a": 1, "b": -1}), one.contrast({"a": 1, "e": -1})
    assert within == block(y[:4]).contrast({"a": 1, "b": -1})
    spreads = [block(y[:4]).spread, block(y[4:]).spread]
    assert over.deviation == pytest.approx(np.hypot(*spreads))
    assert over.freedom == pytest.approx((spreads[0] ** 2 + spreads[1] ** 2) ** 2 / sum(s**4 / 6 for s in spreads))
    assert over.odd is None


def test_a_contrast_over_groups_covers_the_truth():
    rng, hits = np.random.default_rng(8), 0
    for _ in range(1500):
        y = rng.normal(size=(1, SEEDS)) + rng.normal(size=(9, SEEDS)) * np.repeat([1.0, 5.0], [5, 4])[:, None]
        interval = Block(tuple("abcdefghi"), (0, 1, 2), y, tuple("xxxxxyyyy")).contrast({"a": 1, "f": -1})
        hits += interval.low <= 0 <= interval.high
    assert 0.93 <= hits / 1500 <= 0.97


@pytest.mark.parametrize("rows", [4, 6, 13])
def test_rows_of_one_spread_are_seldom_told_apart(rows):
    rng = np.random.default_rng(5)
    odd = [Block(tuple(map(str, range(rows))), tuple(range(SEEDS)), rng.normal(size=(rows, SEEDS))).uneven is not None for _ in range(2000)]
    assert 0.03 <= np.mean(odd) <= 0.07


@pytest.mark.parametrize("rows", [6, 13])
def test_a_noisy_row_costs_the_others_nothing_and_its_own_interval_is_wider_for_it(rows):
    """What the module's text says of a row with five times the spread."""
    rng, labels = np.random.default_rng(6), tuple(map(str, range(rows)))
    hits = {"own": 0, "others": 0}
    for _ in range(1500):
        y = rng.normal(size=(rows, SEEDS))
        y[0] *= 5
        one = Block(labels, tuple(range(SEEDS)), y)
        for name, weights in (("own", {"0": 1, "1": -1}), ("others", {"1": 1, "2": -1})):
            interval = one.contrast(weights)
            hits[name] += interval.low <= 0 <= interval.high
    assert 0.93 <= hits["others"] / 1500 <= 0.97
    assert 0.81 <= hits["own"] / 1500 <= 0.9


@pytest.mark.parametrize(
    ("gap", "kind", "delta", "word", "least", "most"),
    [
        (5.0, "gap", 1.0, "supported", 0.95, 1.0), (-5.0, "gap", 1.0, "refuted", 0.95, 1.0), (0.0, "gap", 0.0, "supported", 0.0, 0.04),
        (0.0, "no gap", 5.0, "supported", 0.95, 1.0), (9.0, "no gap", 5.0, "refuted", 0.8, 1.0), (5.0, "no gap", 5.0, "supported", 0.0, 0.04),
        (0.0, "gap", 5.0, "refuted", 0.9, 1.0), (1.0, "gap", 1.0, "undecided", 0.5, 1.0), (5.0, "no gap", 5.0, "refuted", 0.0, 0.04),
    ],
)  # fmt: skip
def test_planted_truths_come_out_at_the_promised_rates(gap, kind, delta, word, least, most):
    rng, draws = np.random.default_rng(2), 400
    said = 0
    for _ in range(draws):
        y = rng.normal(size=(1, SEEDS)) + rng.normal(size=(ROWS, SEEDS))
        y[0] += gap
        said += decide(block(y).contrast({"a": 1, "b": -1}), kind, delta).verdict == word
    assert least <= said / draws <= most


@given(st.floats(-6, 6), st.floats(0.05, 3), st.sampled_from(["gap", "no gap"]))
@settings(max_examples=100)
def test_a_verdict_says_where_the_interval_lies(estimate: float, deviation: float, kind: str):
    one, delta = Interval(estimate, deviation, SEEDS, ROWS), 1.0
    inside, outside = -delta < one.low and one.high < delta, one.low > delta or one.high < -delta
    holds, fails = (one.low > 0, one.high < 0 or (inside and one.low <= 0)) if kind == "gap" else (inside, outside)
    assert decide(one, kind, delta).verdict == ("supported" if holds else "refuted" if fails else "undecided")


def test_one_seed_decides_nothing():
    one = block(np.arange(4.0)[:, None]).contrast({"d": 1, "a": -1})
    assert one.freedom == 0
    assert decide(one, "gap", 1.0) == decide(one, "no gap", 1.0)
    assert decide(one).verdict == "undecided"
    assert seeds_to_decide(one) is None


def test_holm_of_a_known_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), max_size=12))
@settings(max_examples=60)
def test_holm_keeps_the_order_and_never_helps(p):
    adjusted = holm(p)
    assert all(a >= b for a, b in zip(adjusted, p, strict=True))
    assert all(0 <= a <= 1 for a in adjusted)
    order = sorted(range(len(p)), key=lambda k: p[k])
    assert [adjusted[k] for k in order] == sorted(adjusted)


def test_seeds_that_would_decide():
    one = Interval(1.0, 1.0, 3, 10)
    needed = seeds_to_decide(one)
    assert Interval(1.0, 1.0, needed, 10).half_width() < 1.0 <= Interval(1.0, 1.0, needed - 1, 10).half_width()
    several = seeds_to_decide(one, among=10)
    assert Interval(1.0, 1.0, several, 10).p_beyond(0) * 10 < 0.05 <= Interval(1.0, 1.0, several - 1, 10).p_beyond(0) * 10
    assert several > needed
    assert seeds_to_decide(Interval(0.0, 1.0, 3, 10)) is None
    assert seeds_to_decide(Interval(0.0, 1.0, 3, 10), "gap", 1.0) == seeds_to_decide(Interval(0.0, 1.0, 3, 10), "no gap", 1.0)


def test_bad_input_is_one_line():
    with pytest.raises(ConfigError, match="row 'b' has no value of seed 1"):
        Block.of({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0}})
    with pytest.raises(ConfigError, match="do not add up to 0"):
        block([[1.0, 2.0], [2.0, 3.0]]).contrast({"a": 1.0})
    with pytest.raises(ConfigError, match="no row 'z'"):
        block([[1.0, 2.0], [2.0, 3.0]]).contrast({"a": 1.0, "z": -1.0})
    with pytest.raises(ConfigError, match="above 0"):
        decide(Interval(0.0, 1.0, 3, 4), "no gap", 0.0)
