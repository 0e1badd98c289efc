from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from locvlm.cli import main
from locvlm.errors import DataError
from locvlm.evaluation.metrics import Item, summarise
from locvlm.evaluation.questions import Question, QuestionSet
from locvlm.evaluation.score import score
from locvlm.evaluation.spatial import SpatialScorer, direct_question, icl_question
from locvlm.evaluation.tasks import TASKS
from locvlm.records import read_jsonl, write_jsonl


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


def pairs(*words: tuple[str, str]) -> tuple[SpatialScorer, list[Question]]:
    """Questions and their twins about the mirrored images, by their references."""
    questions = []
    for number, (first, second) in enumerate(words):
        questions.append(Question(str(number), f"{number}.png", "?", first))
        questions.append(Question(f"{number}-mirrored", f"{number}.png", "?", second, mirror=True))
    return SpatialScorer(QuestionSet("set", tuple(questions))), questions


def figures(rules: SpatialScorer, questions: list[Question], *answers: str | None) -> dict[str, float]:
    rules.prepare({question.id: answer for question, answer in zip(questions, answers, strict=True)})
    items = [Item(q.id, q.image, rules.sums(a, q)) for q, a in zip(questions, answers, strict=True)]
    return {name: figure.value for name, figure in summarise(items, rules.figures, rules.floors()).items()}


def test_consistency_wants_the_question_and_its_mirrored_twin_right() -> None:
    rules, questions = pairs(*[("left", "right")] * 5)
    answers = (
        *("left", "right"),  # both right
        *("right", "left"),  # both wrong, but the answer turns with the image
        *("left", "left"),  # says left whatever it sees
        *("left", None),
        *("left or right", "right"),  # right by the paper's rule; not one word
    )
    found = figures(rules, questions, *answers)
    assert (found["consistency"], found["flips"]) == (0.4, 0.4)
    assert found["accuracy"] == 0.6
    floors = rules.floors()
    assert (floors["consistency"].value, floors["flips"].value) == (0, 0)  # a constant answer is wrong once a pair


def test_above_and_below_must_not_turn_with_the_mirror() -> None:
    rules, questions = pairs(("above", "above"), ("below", "below"), ("below", "below"))
    found = figures(rules, questions, "above", "above", "below", "above", "above", "above")
    assert found["consistency"] == pytest.approx(1 / 3)
    assert found["flips"] == pytest.approx(2 / 3)
    floors = rules.floors()
    assert (floors["consistency"].value, floors["consistency"].answer) == (pytest.approx(2 / 3), "always 'below'")
    assert floors["flips"].value == 1


def test_a_set_without_twins_has_no_figures_over_pairs_and_a_lone_twin_is_no_pair() -> None:
    rules, _ = scorer("left", "right")
    assert "consistency" not in rules.figures
    lone = SpatialScorer(QuestionSet("set", (Question("7-mirrored", "7.png", "?", "left", mirror=True),)))
    assert "consistency" not in lone.figures


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("coco-spatial", ["--mirrored"]),
        ("coco-spatial-vertical", ["--axis", "vertical", "--mirrored"]),
        ("coco-spatial-released", ["--rules", "released", "--mirrored"]),
    ],
)
def test_real_coco_by_both_rule_sets_with_answers_of_known_score(
    realdata: Path, tmp_path: Path, name: str, options: list[str]
) -> None:
    annotations = realdata / "coco_annotations" / "coco128_instances_train2017.json"
    data = tmp_path / "set"
    assert main(["data", "coco-spatial", "--annotations", str(annotations), "--output", str(data), *options]) == 0
    rows = read_jsonl(data / "questions.jsonl")
    word = {"coco-spatial-vertical": "above"}.get(name, "left")
    turns = word == "left"  # a mirror swaps left and right, and leaves above and below alone

    def scored(task: str, answer: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        write_jsonl(tmp_path / "p.jsonl", [{"id": row["id"], "answer": answer(row)} for row in rows])
        return score(TASKS[task], tmp_path / "p.jsonl", data)

    right = scored("coco-spatial", lambda row: f"It is {row['reference']} of it")
    assert (right["dataset"], right["n"]) == (name, len(rows))
    assert [right[f] for f in ("accuracy", "strict", "consistency", "flips", "opposite_reading")] == [1, 1, 1, 1, 0]
    blind = scored("coco-spatial", lambda row: word)
    share = sum(row["reference"] == word for row in rows) / len(rows)
    assert (blind["accuracy"], blind[f"accuracy_{word}"], blind["figures"]["accuracy"]["floor"]) == (share, 1.0, share)
    assert (blind["consistency"], blind["flips"]) == ((0, 0) if turns else (share, 1.0))
    both = scored("coco-spatial", lambda row: "left or right, above or below")
    assert (both["accuracy"], both["strict"]) == (1.0, 0.0)  # the paper's rule lets both words pass
    if name.endswith("released"):
        with pytest.raises(DataError, match="no in-context form"):
            scored("coco-spatial-icl", lambda row: word)
        return
    icl = scored("coco-spatial-icl", lambda row: row["icl_reference"])
    assert (icl["accuracy"], icl["consistency"]) == (1.0, 1.0)
    assert all(row["icl_prompt"].count("Q: ") == 3 for row in rows)
