"""Verdicts over seeds: intervals by hand, and what counts as shown."""

import pytest

from locvlm.errors import DataError
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


def test_both_arms_need_the_same_seeds() -> None:
    with pytest.raises(DataError, match="one has 2 and the other 1"):
        contrast([0.1, 0.2], [0.1])


def test_a_claim_of_several_figures() -> None:
    assert overall(["shown", "shown"]) == "shown"
    assert overall(["shown", "not shown"]) == "shown in part"
    assert overall(["not shown", "not run"]) == "not shown"
    assert overall(["shown", "contrary"]) == "contrary"
    assert overall(["not run", "shown"]) == "shown in part"
    assert overall([]) == "not run"
    assert overall(["not run"]) == "not run"
