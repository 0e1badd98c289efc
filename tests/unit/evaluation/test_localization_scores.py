import pytest

from locvlm.config import CoordinateConfig, GeometryConfig
from locvlm.errors import DataError
from locvlm.evaluation.localization import LocalizationScorer, question
from locvlm.evaluation.metrics import Item, summarise
from locvlm.evaluation.questions import Question, QuestionSet

# images of 200 x 100 pixels; with 100 bins a bin is 2 x 1 pixels
PRESENT = {"objective": "loc_pred", "category": "dog", "width": 200, "height": 100, "image": "a.png", "prompt": "?"}


def ask(key: str, box: list[float] | None) -> Question:
    row = {**PRESENT, "id": key, "box": box}
    return question(row if box else {**row, "objective": "neg_pred"})


def rules_for(questions: list[Question], **coordinates: object) -> LocalizationScorer:
    config = CoordinateConfig.model_validate({"n_bins": 100, **coordinates})
    return LocalizationScorer(QuestionSet("set", tuple(questions), coordinates=config, geometry=GeometryConfig()))


QUESTIONS = [
    ask("0", [0, 0, 100, 100]),
    ask("1", [0, 0, 100, 100]),
    ask("2", [0, 0, 100, 100]),
    ask("3", [0, 0, 100, 100]),
    ask("4", None),
    ask("5", None),
]
ANSWERS = [
    "It is located at (0,0,50,100)",  # the very box
    "(25,0,75,100)",  # half of it: IoU 1/3, the centre (100, 50) on its border
    "I see a dog",  # unreadable
    "There is no such object in the image",  # wrongly refused
    "There is no such object in the image.",
    "It is located at (0,0,5,5)",
]


def figures(rules: LocalizationScorer, questions: list[Question], answers: list[str | None]) -> dict[str, float]:
    entries = [Item(q.id, q.id, rules.sums(a, q)) for a, q in zip(answers, questions, strict=True)]
    return {name: figure.value for name, figure in summarise(entries, rules.figures, rules.floors()).items()}


def test_scores_worked_by_hand() -> None:
    found = figures(rules_for(QUESTIONS), QUESTIONS, list(ANSWERS))
    assert found == pytest.approx(
        {
            "mean_iou": (1 + 1 / 3) / 4,
            "accuracy_iou50": 1 / 4,
            "centre_in_box": 2 / 4,
            "parse_failure_rate": 2 / 4,
            "refusal_rate": 1 / 4,
            "neg_precision": 1 / 2,
            "neg_recall": 1 / 2,
            "neg_f1": 1 / 2,
        }
    )


def test_every_figure_tells_how_many_questions_count() -> None:
    rules = rules_for(QUESTIONS)
    entries = [Item(q.id, q.id, rules.sums(a, q)) for a, q in zip(ANSWERS, QUESTIONS, strict=True)]
    n = {name: figure.n for name, figure in summarise(entries, rules.figures, {}).items()}
    assert n["mean_iou"] == n["parse_failure_rate"] == 4
    assert n["neg_precision"] == n["neg_recall"] == 2


def test_answers_are_read_in_pixels_of_the_image() -> None:
    rules = rules_for(QUESTIONS)
    assert rules.parse("(25,0,75,100)", QUESTIONS[0]) == [50, 0, 150, 100]
    assert rules.parse("There is no dog here", QUESTIONS[0]) == "absent"
    assert rules.parse("There is a dog; no such luck elsewhere (1,2,3,4)", QUESTIONS[0]) == [2, 2, 6, 4]
    assert rules.parse("there is a dog", QUESTIONS[0]) is None


def test_points_have_no_iou() -> None:
    rules = rules_for(QUESTIONS[:2], location="point")
    assert "mean_iou" not in rules.figures
    found = figures(rules, QUESTIONS[:2], ["It is located at (25,50)", "(90,50)"])
    assert found["centre_in_box"] == 0.5
    assert found["parse_failure_rate"] == 0


def test_failures_count_as_unreadable_and_as_not_refused() -> None:
    found = figures(rules_for(QUESTIONS), QUESTIONS, [None] * 6)
    assert found["mean_iou"] == found["neg_recall"] == found["neg_precision"] == 0
    assert found["parse_failure_rate"] == 1
    assert found["refusal_rate"] == 0


def test_the_floor_is_the_mean_box_of_the_references() -> None:
    questions = [ask("0", [0, 0, 100, 100]), ask("1", [100, 0, 200, 100]), ask("2", None)]
    floors = rules_for(questions).floors()
    # mean box (50, 0, 150, 100): IoU 1/3 with each, its centre (100, 50) on the border of both
    assert floors["mean_iou"].value == pytest.approx(1 / 3)
    assert floors["accuracy_iou50"].value == 0
    assert floors["centre_in_box"].value == 1
    assert floors["neg_precision"].value == pytest.approx(1 / 3)
    assert floors["neg_f1"].value == pytest.approx(0.5)


def test_without_a_coordinate_form_nothing_is_guessed() -> None:
    with pytest.raises(DataError, match=r"manifest\.json.*--config"):
        LocalizationScorer(QuestionSet("set", tuple(QUESTIONS)))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"objective": "rev_loc"}, "rev_loc"),
        ({"box": [5, 5, 1, 1]}, r"not \[x1, y1, x2, y2\]"),
        ({"box": [0, 0, 1]}, r"not \[x1, y1, x2, y2\]"),
    ],
)
def test_faulty_rows_are_named(change: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        question({**PRESENT, "id": "0", "box": [0, 0, 1, 1], **change})
