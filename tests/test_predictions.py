"""Predictions are evaluated after the measurement, with their numbers and spread."""

from __future__ import annotations

import pytest

from vfmlab.errors import ConfigError
from vfmlab.evaluation.number import Number
from vfmlab.studies import predictions
from vfmlab.studies.predictions import close, expect, less, verdicts


@pytest.fixture(autouse=True)
def _none_made():
    predictions.forget()
    yield
    predictions.forget()


def test_a_prediction_is_made_before_it_can_be_known():
    gfd = {}
    expect("the first is ahead", lambda: less(gfd["a"], gfd["b"]))
    expect("they are equal", lambda: close(gfd["a"], gfd["b"], within=0.5))
    expect("there are two", lambda: len(gfd) == 2)
    assert [row["verdict"] for row in verdicts().records] == ["not measured", "not measured", "wrong"]
    gfd |= {"a": 1.0, "b": 2.0}
    assert [row["verdict"] for row in verdicts().records] == ["right", "wrong", "right"]
    assert verdicts().records[0]["numbers"] == "1 < 2"


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 2.0], [2.5, 3.0], "right"), ([2.5, 3.0], [1.0, 2.0], "wrong"), ([1.0, 2.6], [2.5, 3.0], "undecided"),
        (Number(1.0, spread=0.2), Number(2.0, spread=0.1), "right"), (Number(1.0, spread=0.6), Number(2.0, spread=0.6), "undecided"),
        (Number(26.9, n=1000, spread=1.5, facts={"over": "images"}), Number(28.7, n=1000, spread=1.5, facts={"over": "images"}), "right"),
        (Number(26.9, n=1000, spread=1.5, facts={"over": "images"}), Number(27.0, n=1000, spread=1.5, facts={"over": "images"}), "undecided"),
        (Number(None, reason="too few images"), 1.0, "not measured"), (2.0, 1.0, "wrong"),
    ],
)  # fmt: skip
def test_spread_decides_what_is_decided(a, b, verdict):
    expect("less", lambda: less(a, b))
    assert verdicts().records[0]["verdict"] == verdict


def test_shown_as_text_and_as_html():
    expect("pigs < birds", lambda: less([1.0, 2.0], 3))
    assert "| pigs < birds | right | 1.5 (1 to 2) < 3 |" in repr(verdicts())
    assert "<td>right</td><td>1.5 (1 to 2) &lt; 3</td>" in verdicts()._repr_html_()
    predictions.forget()
    assert "none was made" in repr(verdicts())


def test_a_comparison_in_place_of_a_function_is_refused():
    with pytest.raises(ConfigError, match="Comparison is no function.*write lambda: in front of it"):
        expect("known already", less(1, 2))


def test_a_number_that_was_not_measured_is_no_traceback():
    expect("the first is ahead", lambda: less(None, 3.0))
    expect("the second too", lambda: close([1.0, None], 3.0, within=1.0))
    assert [row["verdict"] for row in verdicts().records] == ["not measured", "not measured"]
