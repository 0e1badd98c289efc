"""Whether a claim of the paper holds here: the same figure of two arms, seed by seed, on the same questions.

A training seed is the unit that is repeated: questions of one model are not independent evidence about another one. So
the interval is Student's, over the differences of the seeds. All seeds are asked the same questions, so what those few
questions leave open is the same for all: a difference has to exceed that too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.stats import t as student

from locvlm.errors import DataError
from locvlm.evaluation.comparison import Spread, spread_of
from locvlm.evaluation.metrics import CONFIDENCE, Difference

Verdict = Literal["shown", "shown in part", "not shown", "contrary", "not run"]


@dataclass(frozen=True, slots=True)
class Contrast:
    """A figure of the arm that is claimed to be better minus that of the other. `difference`, `low`, `high`: mean over
    the seeds and its 95 % interval (None with fewer than two seeds); `floor`: what needs no image, None where no such
    answer is known; `by_questions`: the 95 % interval that the questions leave, None where it was not computed."""

    better: Spread
    other: Spread
    difference: float
    low: float | None
    high: float | None
    floor: float | None
    by_questions: tuple[float, float] | None = None

    @property
    def verdict(self) -> Verdict:
        """Shown: the intervals lie above 0 and the better arm above the floor. Contrary: they lie below 0, and the
        other arm above the floor (two arms that both guess say nothing). Else, and with one seed, not shown."""
        if self.low is None or self.high is None:
            return "not shown"
        low, high = self.by_questions or (self.low, self.high)
        if min(low, self.low) > 0 and self.better.mean > (self.floor or 0):
            return "shown"
        if max(high, self.high) < 0 and self.other.mean > (self.floor or 0):
            return "contrary"
        return "not shown"


def contrast(
    better: Sequence[float],
    other: Sequence[float],
    floor: float | None = None,
    asked: Sequence[Difference] = (),
) -> Contrast:
    """Two arms by their figures, one a seed in the same order. `asked`: of each seed the difference on its questions
    (`metrics.paired_difference`); the mean of their ends is the interval that the questions leave, for more seeds do
    not make it narrower. Raises DataError for unequal numbers of seeds."""
    if len({len(better), len(other), len(asked) or len(better)}) > 1:
        raise DataError(
            f"comparing two arms over seeds: one has {len(better)} and the other {len(other)}"
            f"{f', with {len(asked)} differences' if asked else ''}; run both with all seeds"
        )
    spread = spread_of([one - two for one, two in zip(better, other, strict=True)])
    low = high = None
    if spread.deviation is not None:
        reach = float(student.ppf((1 + CONFIDENCE) / 2, spread.n - 1)) * spread.deviation / math.sqrt(spread.n)
        low, high = spread.mean - reach, spread.mean + reach
    left = None
    if asked:
        left = math.fsum(one.low for one in asked) / len(asked), math.fsum(one.high for one in asked) / len(asked)
    return Contrast(spread_of(better), spread_of(other), spread.mean, low, high, floor, left)


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim with several figures: contrary if any is, shown if all are, in part if some are, else not shown."""
    run = [verdict for verdict in verdicts if verdict != "not run"]
    if not run:
        return "not run"
    if "contrary" in run:
        return "contrary"
    if "shown" not in run:
        return "not shown"
    return "shown" if all(verdict == "shown" for verdict in verdicts) else "shown in part"
