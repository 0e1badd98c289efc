"""Verdicts over seeds: intervals by hand, and what counts as shown."""

import pytest

from locvlm.errors import DataError
from locvlm.evaluation.metrics import Difference
from locvlm.evaluation.verdicts import contrast, overall


def test_the_interval_is_students_over_the_seeds() -> None:
    """Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t(2) = 4.3027, so 0.2 -+ 4.3027 * 0.1 / sqrt(3)."""
    found = contrast([0.6, 0.7, 0.8], [0.5, 0.5, 0.5])
    assert found.difference == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.2 - 0.24841, abs=1e-4), pytest.approx(0.2 + 0.24841, abs=1e-4))
    assert found.verdict == "not shown"


@pytest.mark.parametrize(
    ("better", "other", "floor", "verdict"),
    [
        ([0.80, 0.81, 0.82], [0.50, 0.51, 0.50], 0.5, "shown"),
        ([0.40, 0.41, 0.42], [0.10, 0.11, 0.10], 0.5, "not shown"),  # better, and yet below what needs no image
        ([0.50, 0.51, 0.50], [0.80, 0.81, 0.82], 0.5, "contrary"),
        ([0.10, 0.11, 0.10], [0.40, 0.41, 0.42], 0.5, "not shown"),
        ([0.80, 0.81, 0.82], [0.50, 0.51, 0.50], None, "shown"),
        ([0.9], [0.1], 0.5, "not shown"),  # one seed has no interval
    ],
)
def test_verdicts(better: list[float], other: list[float], floor: float | None, verdict: str) -> None:
    assert contrast(better, other, floor).verdict == verdict


@pytest.mark.parametrize(
    ("lows", "verdict"),
    [([0.1, 0.2, 0.3], "shown"), ([0.1, -0.2, 0.4], "shown"), ([0.1, -0.2, 0.0], "not shown")],
)
def test_a_difference_has_to_exceed_what_the_questions_leave_open(lows: list[float], verdict: str) -> None:
    """The mean of the seeds' ends: more seeds on the same questions do not make it narrower."""
    better, other = [0.80, 0.81, 0.82], [0.50, 0.51, 0.50]
    asked = [Difference(0.3, low, 0.6) for low in lows]
    found = contrast(better, other, 0.5, asked)
    assert found.by_questions == (pytest.approx(sum(lows) / 3), pytest.approx(0.6))
    assert found.verdict == verdict
    turned = [Difference(-0.3, -0.6, -low) for low in lows]
    assert contrast(other, better, 0.5, turned).verdict == verdict.replace("shown", "contrary", verdict == "shown")


def test_both_arms_need_the_same_seeds() -> None:
    with pytest.raises(DataError, match="one has 2 and the other 1"):
        contrast([0.1, 0.2], [0.1])
    with pytest.raises(DataError, match="with 1 differences"):
        contrast([0.1, 0.2], [0.1, 0.2], None, [Difference(0.0, 0.0, 0.0)])


def test_a_claim_of_several_figures() -> None:
    assert overall(["shown", "shown"]) == "shown"
    assert overall(["shown", "not shown"]) == "shown in part"
    assert overall(["not shown", "not run"]) == "not shown"
    assert overall(["shown", "contrary"]) == "contrary"
    assert overall(["not run", "shown"]) == "shown in part"
    assert overall([]) == "not run"
    assert overall(["not run"]) == "not run"
