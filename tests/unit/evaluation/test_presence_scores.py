import json
from pathlib import Path

import pytest

from locvlm.evaluation.metrics import Item, summarise
from locvlm.evaluation.presence import PresenceScorer, pope_official
from locvlm.evaluation.questions import Question, QuestionSet
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes, there is a dog.", "yes"),
        ("No", "no"),
        ("no", "no"),
        ("NO", "yes"),  # only No, no and not count
        ("nO", "yes"),
        ("", "yes"),
        ("I cannot see one", "yes"),
        ("There is not a dog", "no"),
        ("not", "no"),
        ("No, there is a dog", "no"),  # the comma goes, the word stays
        ("Yes. No dog", "yes"),  # only the text before the first period
        (". No", "yes"),
        ("No\nYes", "yes"),  # split on single spaces: the token is "No\nYes"
        ("it is, no, absent", "no"),
        ("Nothing", "yes"),
        ("no!", "yes"),
    ],
)
def test_the_official_mapping_to_the_letter(answer: str, read: str) -> None:
    assert pope_official(answer) == read


def rules_for(*labels: str) -> tuple[PresenceScorer, list[Question]]:
    questions = [Question(str(i), f"{i}.png", "?", label) for i, label in enumerate(labels)]
    return PresenceScorer(QuestionSet("set", tuple(questions))), questions


def figures(rules: PresenceScorer, questions: list[Question], answers: list[str | None]) -> dict[str, float]:
    entries = [Item(q.id, q.image, rules.sums(a, q)) for a, q in zip(answers, questions, strict=True)]
    return {name: figure.value for name, figure in summarise(entries, rules.figures, rules.floors()).items()}


def test_scores_worked_by_hand() -> None:
    rules, questions = rules_for("yes", "yes", "yes", "no", "no")
    answers = ["Yes", "yes", "No", "maybe", "No"]  # TP TP FN FP TN
    found = figures(rules, questions, list(answers))
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["yes_ratio"] == pytest.approx(3 / 5)  # counts answers, not labels
    entries = [Item(q.id, q.image, rules.sums(a, q)) for a, q in zip(answers, questions, strict=True)]
    assert rules.counts(entries) == {"TP": 2, "FP": 1, "TN": 1, "FN": 1, "unparsable": 1}


def test_zero_denominators_give_zero() -> None:
    rules, questions = rules_for("no", "no")
    found = figures(rules, questions, ["No", "No"])
    assert (found["precision"], found["recall"], found["f1"], found["accuracy"]) == (0, 0, 0, 1)


def test_failures_are_the_wrong_label_but_nobody_said_yes() -> None:
    rules, questions = rules_for("yes", "no")
    found = figures(rules, questions, [None, None])
    assert found == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0, "unparsable_rate": 0}


def test_floors_are_those_of_always_yes() -> None:
    rules, _ = rules_for("yes", "no", "no", "no")
    floors = rules.floors()
    assert (floors["accuracy"].value, floors["accuracy"].answer) == (0.75, "always 'no'")
    assert floors["precision"].value == 0.25
    assert floors["recall"].value == 1.0
    assert floors["f1"].value == pytest.approx(0.4)  # 2 * 0.25 / 1.25


def test_llava_on_real_pope_gives_the_published_figures(realdata: Path, tmp_path: Path) -> None:
    questions = realdata / "pope" / "coco_pope_random.json"
    ids = [json.loads(line)["question_id"] for line in questions.read_text().splitlines()]
    answers = (realdata / "pope" / "llava-v1.5-13b_answers_random.jsonl").read_text().splitlines()
    result = [{"question_id": key, "answer": json.loads(line)["text"]} for key, line in zip(ids, answers, strict=True)]
    predictions = tmp_path / "result.json"
    predictions.write_text(json.dumps(result))
    found = score(TASKS["pope"], predictions, questions)
    expected = json.loads((realdata / "pope" / "expected_pope.json").read_text())["random"]
    assert found["n"] == expected["n"]
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)
    assert {name: found["counts"][name] for name in ("TP", "FP", "TN", "FN")} == {
        name: expected[name] for name in ("TP", "FP", "TN", "FN")
    }
