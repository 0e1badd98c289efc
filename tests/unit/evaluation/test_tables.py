from typing import Any

import pytest

from locvlm.errors import DataError
from locvlm.evaluation.metrics import Difference, Figure
from locvlm.evaluation.tables import LABELS, TITLES, paper_numbers, task_table, verdict
from locvlm.evaluation.tasks import TASKS

HORIZONTAL = ["accuracy", "accuracy_left", "accuracy_right"]


def metrics(right: list[bool], floor: float = 0.5) -> dict[str, Any]:
    """One question an image."""
    value = sum(right) / len(right)
    figure = Figure(value, len(right), max(0, value - 0.1), min(1, value + 0.1), floor, "always 'left'")
    return {
        "task": "coco-spatial",
        "primary": "accuracy",
        "dataset": "scenes",
        "n": len(right),
        "n_images": len(right),
        "n_failures": 0,
        "figures": {"accuracy": figure.to_dict()},
        "items": {str(i): {"image": str(i), "sums": {"accuracy": [float(v), 1.0]}} for i, v in enumerate(right)},
    }


def test_every_task_has_a_title() -> None:
    assert set(TITLES) == set(TASKS)
    assert "accuracy" in LABELS


@pytest.mark.parametrize(
    ("task", "figure", "figures", "baseline", "ours"),
    [
        ("coco-spatial", "accuracy", HORIZONTAL, 0.551, 0.695),
        ("coco-spatial", "accuracy_right", HORIZONTAL, 0.365, 0.592),
        ("coco-spatial-icl", "accuracy", HORIZONTAL, 0.551, 0.765),
        ("coco-spatial", "accuracy", ["accuracy", "accuracy_above", "accuracy_below"], 0.589, 0.654),
        ("presence", "accuracy", ["accuracy"], 0.619, 0.883),
    ],
)
def test_the_papers_cells_are_found(task: str, figure: str, figures: list[str], baseline: float, ours: float) -> None:
    found = paper_numbers(task, figure, figures, "scenes")
    assert (found.baseline, found.ours) == (pytest.approx(baseline), pytest.approx(ours))


def test_popes_split_is_told_by_the_data() -> None:
    found = paper_numbers("pope", "f1", ["f1"], "coco_pope_popular")
    assert (found.baseline, found.ours) == (pytest.approx(0.664), pytest.approx(0.863))
    assert paper_numbers("pope", "f1", ["f1"], "mine").ours is None


def test_cells_that_the_paper_lacks_say_why() -> None:
    both_axes = [*HORIZONTAL, "accuracy_above"]
    for task, figure, figures in (
        ("coco-spatial", "strict", HORIZONTAL),
        ("coco-spatial", "accuracy", both_axes),
        ("localization", "mean_iou", ["mean_iou"]),
        ("region-description", "accuracy", ["accuracy"]),
        ("presence", "f1", ["f1"]),
    ):
        found = paper_numbers(task, figure, figures, "scenes")
        assert found.ours is None
        assert found.note


@pytest.mark.parametrize(
    ("interval", "low", "n_images", "word"),
    [
        ((0.1, 0.3), 0.6, 100, "shown"),
        ((-0.1, 0.3), 0.6, 100, "not shown"),
        ((-0.3, -0.1), 0.6, 100, "contrary"),
        ((0.1, 0.3), 0.45, 100, "not shown"),  # not above the floor
        ((0.1, 0.3), 0.6, 5, "not shown"),  # five images
    ],
)
def test_verdicts(interval: tuple[float, float], low: float, n_images: int, word: str) -> None:
    first = Figure(0.7, n_images, low, 0.8, 0.5, "always 'left'")
    difference = Difference(sum(interval) / 2, *interval)
    assert verdict(difference, "accuracy", first, n_images)[0] == word


def test_fewer_parse_failures_are_better_and_a_yes_ratio_has_no_better() -> None:
    first = Figure(0.1, 100, 0.05, 0.2)
    less = Difference(-0.3, -0.4, -0.2)
    assert verdict(less, "parse_failure_rate", first, 100)[0] == "shown"
    assert verdict(Difference(0.3, 0.2, 0.4), "parse_failure_rate", first, 100)[0] == "contrary"
    assert verdict(less, "yes_ratio", first, 100)[0] == ""


def test_arms_stand_side_by_side() -> None:
    good, poor = metrics([True] * 80 + [False] * 20), metrics([True] * 40 + [False] * 60)
    table = task_table("coco-spatial", ["locvlm", "baseline"], [good, poor])
    (row,) = table.rows
    assert [cell.figure.value for cell in row.cells if cell.figure] == [0.8, 0.4]
    (comparison,) = row.comparisons
    assert comparison.against == "baseline"
    assert comparison.difference is not None
    assert comparison.difference.difference == pytest.approx(0.4)
    assert comparison.verdict == "shown"
    assert (table.n, table.n_images) == (100, 100)


def test_an_arm_that_was_not_run_says_so() -> None:
    table = task_table("coco-spatial", ["locvlm", "baseline"], [metrics([True] * 9), "not run (no file)"])
    cell = table.rows[0].cells[1]
    assert (cell.figure, cell.reason, cell.short) == (None, "not run (no file)", "not run")
    assert table.rows[0].comparisons[0].difference is None
    assert "baseline: not run (no file)" in table.notes


def test_an_arm_below_its_floor_is_pointed_out() -> None:
    table = task_table("coco-spatial", ["locvlm", "baseline"], [metrics([True] * 20), metrics([False] * 20)])
    assert any(note.startswith("baseline lies below the floor") for note in table.notes)
    assert not any(note.startswith("locvlm lies") for note in table.notes)


def test_figures_of_different_judges_never_share_a_table() -> None:
    first, second = ({**metrics([True] * 9), "judge": name} for name in ("exact", "lexical"))
    with pytest.raises(DataError, match=r"msvd-qa side by side.*different judges \(exact, lexical\)"):
        task_table("msvd-qa", ["locvlm", "baseline"], [first, second])
    assert task_table("msvd-qa", ["locvlm", "baseline"], [first, first]).rows


def test_short_answers_and_regions_have_the_papers_numbers() -> None:
    for task, dataset, figure, baseline, ours in (
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions", "accuracy", 0.498, 0.503),
        ("gqa", "testdev_balanced_questions", "accuracy", 0.447, 0.473),
        ("region-description", "refcocog-test", "meteor", 0.103, 0.207),
        ("region-description", "refcoco+-testB", "meteor", 0.0726, 0.111),
    ):
        found = paper_numbers(task, figure, [figure], dataset)
        assert (found.baseline, found.ours) == (pytest.approx(baseline), pytest.approx(ours))
    for task, dataset, figure in (
        ("vqav2", "x", "accuracy_always_normalised"),
        ("region-description", "refcoco-testA", "meteor"),
        ("activitynet-qa", "test_q", "accuracy"),
    ):
        found = paper_numbers(task, figure, [figure], dataset)
        assert (found.ours, bool(found.note)) == (None, True)
