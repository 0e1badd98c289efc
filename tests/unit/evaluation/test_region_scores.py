import pytest

from locvlm.evaluation.metrics import Item, summarise
from locvlm.evaluation.questions import Question, QuestionSet
from locvlm.evaluation.region import RegionScorer, question

CATEGORIES = ("cat", "dog", "hot dog", "traffic light")


def ask(key: str, category: str) -> Question:
    return question({"id": key, "image": f"{key}.png", "prompt": "?", "category": category, "box": [0, 0, 1, 1]})


def rules_for(questions: list[Question]) -> RegionScorer:
    return RegionScorer(QuestionSet("set", tuple(questions), CATEGORIES))


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("There is a dog.", ["dog"]),
        ("There is a hot dog.", ["hot dog"]),
        ("a HOT  DOG beside a dog", ["hot dog", "dog"]),
        ("hotdog, dogs and a category", None),
        ("a traffic light", ["traffic light"]),
        ("", None),
    ],
)
def test_the_longest_whole_words_are_read(answer: str, named: list[str] | None) -> None:
    assert rules_for([ask("0", "dog")]).parse(answer, ask("0", "dog")) == named


def test_scores_worked_by_hand() -> None:
    questions = [ask("0", "dog"), ask("1", "dog"), ask("2", "cat"), ask("3", "hot dog"), ask("4", "cat")]
    answers = ["There is a dog.", "a dog and a cat", "There is a dog.", "a thing", None]
    rules = rules_for(questions)
    entries = [Item(q.id, q.image, rules.sums(a, q)) for a, q in zip(answers, questions, strict=True)]
    found = {name: figure.value for name, figure in summarise(entries, rules.figures, rules.floors()).items()}
    assert found == pytest.approx({"accuracy": 1 / 5, "names_category": 2 / 5, "names_nothing": 2 / 5})


def test_the_floor_is_the_commonest_category() -> None:
    floor = rules_for([ask("0", "dog"), ask("1", "dog"), ask("2", "cat")]).floors()["accuracy"]
    assert (floor.value, floor.answer) == (pytest.approx(2 / 3), "always 'dog'")
