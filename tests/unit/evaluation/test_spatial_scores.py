import pytest

from locvlm.evaluation.metrics import Item, summarise
from locvlm.evaluation.questions import Question, QuestionSet
from locvlm.evaluation.spatial import SpatialScorer, direct_question, icl_question


def scorer(*words: str) -> tuple[SpatialScorer, list[Question]]:
    questions = [Question(str(i), f"{i}.png", "?", word) for i, word in enumerate(words)]
    return SpatialScorer(QuestionSet("set", tuple(questions))), questions


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("The dog is located to the LEFT of cat.", "left"),
        ("right", "right"),
        ("left or right", "both"),
        ("a bright, upright leftover", None),
        ("", None),
        ("left.", "left"),
    ],
)
def test_whole_words_are_read_in_any_case(answer: str, read: str | None) -> None:
    rules, (question,) = scorer("left")
    assert rules.parse(answer, question) == read


def test_scores_worked_by_hand() -> None:
    rules, questions = scorer("left", "left", "right", "right")
    answers = ["left", "right", "left or right", "no idea"]
    entries = [Item(q.id, q.image, rules.sums(a, q)) for a, q in zip(answers, questions, strict=True)]
    found = {name: figure.value for name, figure in summarise(entries, rules.figures, rules.floors()).items()}
    assert found == {
        "accuracy": 0.5,  # left, and the answer with both words
        "strict": 0.25,  # left alone
        "accuracy_left": 0.5,
        "accuracy_right": 0.5,
        "opposite_reading": 0.5,  # "right" for left, and both words
        "answered": 0.75,
    }


def test_a_failure_is_wrong_under_every_reading() -> None:
    rules, (question,) = scorer("above")
    sums = rules.sums(None, question)
    assert all(value == 0 for value, _ in sums.values())
    assert all(weight == 1 for _, weight in sums.values())
    assert set(sums) == set(rules.figures)


def test_the_floor_is_the_commonest_word() -> None:
    rules, _ = scorer("above", "below", "below", "below")
    floors = rules.floors()
    assert (floors["accuracy"].value, floors["accuracy"].answer) == (0.75, "always 'below'")
    assert floors["opposite_reading"].answer == "always 'above'"
    assert "accuracy_above" not in floors


def test_rows_are_asked_directly_or_with_examples() -> None:
    row = {
        "id": 7,
        "image": "a.png",
        "prompt": "Which side of cat is dog located?",
        "reference": "left",
        "icl_prompt": "Q: ...",
        "icl_reference": "right",
        "subject": {"category": "dog", "box": [0, 1, 2, 3]},
        "object": {"category": "cat", "box": [4, 5, 6, 7]},
        "third": None,
    }
    direct, icl = direct_question(row), icl_question(row)
    assert (direct.id, direct.prompt, direct.reference) == ("7", row["prompt"], "left")
    assert (icl.prompt, icl.reference) == ("Q: ...", "right")
    assert direct.boxes == {"dog": (0, 1, 2, 3), "cat": (4, 5, 6, 7)}
    with pytest.raises(ValueError, match="sideways"):
        direct_question({**row, "reference": "sideways"})
