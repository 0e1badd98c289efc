"""Two runs on the questions that both answered, and one run repeated with several seeds.

A difference has an interval (bootstrap over whole images) and two tests. The permutation test swaps the two runs at
random, image by image, and holds for every figure; McNemar's test looks only at the questions that one run has right
and the other wrong, takes them as independent, and holds for figures that are a share of right answers. Where several
questions ask about one image, trust the first.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locvlm.errors import DataError
from locvlm.evaluation.metrics import Difference, paired_difference, swapped_p


@dataclass(frozen=True, slots=True)
class McNemar:
    """Questions that only the first or only the second run has right, and the exact two-sided p of such a split."""

    only_first: int
    only_second: int
    p: float


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A figure of two runs on the `n` questions that both answered; `left_out` questions belong to one run only.

    `p`: of the permutation test (`metrics.swapped_p`). `mcnemar`: None where answers are not simply right or wrong.
    """

    figure: str
    difference: Difference
    p: float
    mcnemar: McNemar | None
    n: int
    left_out: int


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over runs that differ in their seed alone; `deviation`: of the sample (n - 1), None for one run."""

    n: int
    mean: float
    deviation: float | None
    low: float
    high: float


def compare_runs(first: Mapping[str, Any], second: Mapping[str, Any], figure: str) -> PairedTest:
    """Two contents of metrics.json on the questions that are in both. Raises DataError when they share none, are of
    different tasks or judges, or lack the figure."""
    shared = first["items"].keys() & second["items"].keys()
    if not shared:
        raise DataError(f"comparing two runs on {figure}: they have no question in common; score both on the same data")
    left_out = len(first["items"].keys() ^ second["items"].keys())
    one, two = (_only(metrics, shared) for metrics in (first, second))
    difference, p = paired_difference(one, two, figure), swapped_p(one, two, figure)
    return PairedTest(figure, difference, p, _mcnemar(one, two, figure), len(shared), left_out)


def exact_sign_p(first: int, second: int) -> float:
    """The two-sided p of a split of `first` + `second` fair coin flips that is at least as uneven; 1 for none."""
    n, least = first + second, min(first, second)
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(least + 1)]
    return min(1.0, 2 * math.fsum(math.exp(value - n * math.log(2)) for value in logs))


def spread_of(values: Sequence[float]) -> Spread:
    """Mean and spread of one figure over seeds. Raises DataError for no value."""
    if not values:
        raise DataError("averaging over seeds: there is no run with this figure; score the runs of all seeds")
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    return Spread(len(values), mean, deviation, min(values), max(values))


def _only(metrics: Mapping[str, Any], ids: set[str]) -> dict[str, Any]:
    return {**metrics, "items": {key: item for key, item in metrics["items"].items() if key in ids}}


def _mcnemar(first: Mapping[str, Any], second: Mapping[str, Any], figure: str) -> McNemar | None:
    """None unless every question adds 0 or 1 of 1 to the figure, the same ones in both runs."""
    sides = [
        {key: tuple(item["sums"][figure]) for key, item in metrics["items"].items() if figure in item["sums"]}
        for metrics in (first, second)
    ]
    whole = all(sums in ((0.0, 1.0), (1.0, 1.0)) for side in sides for sums in side.values())
    if not whole or not sides[0] or sides[0].keys() != sides[1].keys():
        return None
    only_first = sum(sides[0][key] > sides[1][key] for key in sides[0])
    only_second = sum(sides[0][key] < sides[1][key] for key in sides[0])
    return McNemar(only_first, only_second, exact_sign_p(only_first, only_second))
