from typing import Any

import numpy as np
import pytest

from locvlm.errors import DataError
from locvlm.evaluation.comparison import compare_runs, exact_sign_p, spread_of
from locvlm.evaluation.metrics import paired_difference


def run(right: list[float], first: int = 0, task: str = "coco-spatial") -> dict[str, Any]:
    """One question an image, numbered from `first`."""
    items = {
        str(i): {"image": f"{i}.png", "sums": {"accuracy": [value, 1.0], "f1": [2 * value, 1.0 + value]}}
        for i, value in enumerate(right, first)
    }
    return {"task": task, "figures": {"accuracy": {}, "f1": {}}, "items": items}


def test_the_exact_p_of_a_split_is_that_of_fair_coins() -> None:
    assert exact_sign_p(10, 2) == pytest.approx(158 / 4096)
    assert exact_sign_p(2, 10) == exact_sign_p(10, 2)
    assert exact_sign_p(0, 0) == 1.0
    assert exact_sign_p(5, 5) == 1.0
    assert exact_sign_p(0, 6) == pytest.approx(2 / 64)
    assert 0 < exact_sign_p(2046, 1546) < 1e-15


def test_runs_are_compared_in_pairs() -> None:
    first, second = run([1.0] * 90 + [0.0] * 10), run([1.0] * 60 + [0.0] * 40)
    found = compare_runs(first, second, "accuracy")
    assert found.difference == paired_difference(first, second, "accuracy")
    assert found.difference.difference == pytest.approx(0.3)
    assert found.p == pytest.approx(1 / 1001)
    assert found.mcnemar is not None
    assert (found.mcnemar.only_first, found.mcnemar.only_second) == (30, 0)
    assert found.mcnemar.p == pytest.approx(2 * 0.5**30)
    assert (found.n, found.left_out) == (100, 0)


def test_few_images_are_swapped_in_every_way() -> None:
    # all five one way: two of the 32 ways are as uneven; and the bootstrap, which cannot see that, would say 0.002
    found = compare_runs(run([1.0] * 5 + [1.0]), run([0.0] * 5 + [1.0]), "accuracy")
    assert found.p == 2 / 32
    assert found.mcnemar is not None
    assert found.mcnemar.p == pytest.approx(2 / 32)
    assert compare_runs(run([1.0]), run([0.0]), "accuracy").p == 1.0


def test_the_permutation_test_errs_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    ps = []
    for _ in range(200):
        first, second = generator.integers(0, 2, (2, 30)).astype(float).tolist()
        ps.append(compare_runs(run(first), run(second), "f1").p)
    assert 0.01 <= sum(p <= 0.05 for p in ps) / len(ps) <= 0.09


def test_equal_runs_show_nothing() -> None:
    one = run([1.0, 0.0] * 20)
    found = compare_runs(one, one, "accuracy")
    assert (found.difference.difference, found.p) == (0.0, 1.0)
    assert found.mcnemar is not None
    assert found.mcnemar.p == 1.0


def test_only_shared_questions_count_and_the_others_are_told() -> None:
    found = compare_runs(run([1.0] * 30), run([0.0] * 30, first=10), "accuracy")
    assert (found.n, found.left_out, found.difference.difference) == (20, 20, 1.0)
    with pytest.raises(DataError, match="no question in common"):
        compare_runs(run([1.0] * 3), run([1.0] * 3, first=50), "accuracy")


def test_mcnemar_needs_answers_that_are_right_or_wrong() -> None:
    graded, whole = run([0.3] * 20), run([1.0] * 20)
    assert compare_runs(whole, graded, "accuracy").mcnemar is None
    assert compare_runs(whole, whole, "f1").mcnemar is None


def test_other_tasks_judges_and_figures_are_refused() -> None:
    one = run([1.0] * 9)
    with pytest.raises(DataError, match="score both on the same data"):
        compare_runs(one, run([1.0] * 9, task="pope"), "accuracy")
    with pytest.raises(DataError, match="different judges"):
        compare_runs({**one, "judge": "exact"}, {**one, "judge": "lexical"}, "accuracy")
    with pytest.raises(DataError, match="no figure 'meteor'"):
        compare_runs(one, one, "meteor")


def test_the_spread_over_seeds_is_that_of_a_sample() -> None:
    found = spread_of([0.5, 0.6, 0.7])
    assert (found.n, found.low, found.high) == (3, 0.5, 0.7)
    assert found.mean == pytest.approx(0.6)
    assert found.deviation == pytest.approx(0.1)
    assert spread_of([0.5]).deviation is None
    with pytest.raises(DataError, match="no run with this figure"):
        spread_of([])
