"""Predictions of a notebook: written down before the measurement, and set beside the numbers at its end.

    expect("VFM-VAE is ahead", lambda: less(gfd["vfm_vae"], gfd["plain"]))   # nothing is evaluated yet
    ...                                                                       # the measurement
    verdicts()                                                                # right, wrong or undecided
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from vfmlab.errors import ConfigError, VfmlabError
from vfmlab.evaluation.number import Number
from vfmlab.plots import primitives

Values = float | Number | Sequence[float]
OF_THIS_RUN = "of the runs above: where a side is one value, nothing is known of its spread over seeds"
_made: dict[str, Callable[[], bool | Comparison]] = {}  # of this notebook, in order


@dataclass(frozen=True)
class Comparison:
    """holds: None where the spreads overlap. numbers: both sides, as text."""

    holds: bool | None
    numbers: str


def expect(statement: str, holds: Callable[[], bool | Comparison]) -> None:
    """Write a prediction down, before what it is about is measured.

    holds: a function without arguments, called by :func:`verdicts`; it gives a bool, or a comparison with its
    numbers (:func:`less`, :func:`close`). The same statement again takes the place of the earlier one.
    """
    if not callable(holds):
        raise ConfigError(f"expect: {type(holds).__name__} is no function, and a prediction is not evaluated "
                          "yet; write lambda: in front of it")
    _made[statement] = holds


def less(a: Values, b: Values) -> Comparison:
    """Whether a lies below b: by their means, and undecided where their ranges overlap: over seeds, or +- one
    spread; of a mean over images, +- two standard errors."""
    (low, high), (low_, high_) = _range(a), _range(b)
    spreads = high > low or high_ > low_
    holds = None if spreads and high >= low_ and high_ >= low else mean(_all(a)) < mean(_all(b))
    return Comparison(holds, f"{_text(a)} < {_text(b)}")


def close(a: Values, b: Values, within: float) -> Comparison:
    """Whether the means differ by at most `within`."""
    holds = abs(mean(_all(a)) - mean(_all(b))) <= within
    return Comparison(holds, f"{_text(a)} and {_text(b)}, within {within:g}?")


def verdicts() -> primitives.Table:
    """Every prediction of this notebook with its verdict and its numbers.

    A verdict is of the runs of this notebook: single values have no spread, and another seed may differ.
    """
    rows = []
    for statement, holds in _made.items():
        try:
            result = holds()
            result = result if isinstance(result, Comparison) else Comparison(bool(result), "")
            verdict = "undecided" if result.holds is None else "right" if result.holds else "wrong"
            numbers = result.numbers
        except (LookupError, NameError, VfmlabError) as error:
            verdict, numbers = "not measured", f"{type(error).__name__}: {error}"
        rows.append({"prediction": statement, "verdict": verdict, "numbers": numbers})
    none = [{"prediction": "none was made", "verdict": "", "numbers": ""}]
    return primitives.table(rows or none, OF_THIS_RUN if rows else "")


def forget() -> None:
    """At the start of a notebook."""
    _made.clear()


def _all(values: Values) -> list[float]:
    if isinstance(values, Number):
        if values.absent:
            raise LookupError(f"{values.label or 'a number'} could not be had: {values.reason}")
        return [float(values.value)]
    every = values if isinstance(values, Sequence) else [values]
    if None in every:
        raise LookupError("a number was not measured")
    numbers = [float(v) for v in every]
    if not numbers:
        raise LookupError("there is no value")
    return numbers


def _range(values: Values) -> tuple[float, float]:
    numbers, spread = _all(values), 0.0
    if isinstance(values, Number):
        spread = values.spread or 0.0
        if values.facts.get("over") == "images" and values.n:
            spread *= 2 / values.n**0.5
    return min(numbers) - spread, max(numbers) + spread


def _text(values: Values) -> str:
    low, high = _range(values)
    middle = primitives.number(mean(_all(values)))
    return middle if low == high else f"{middle} ({primitives.number(low)} to {primitives.number(high)})"
