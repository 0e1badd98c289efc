import json
from pathlib import Path
from typing import Any

import pytest

from locvlm.errors import DataError
from locvlm.evaluation.gqa import contains
from locvlm.evaluation.score import score, write_results
from locvlm.evaluation.tasks import TASKS, read_set
from locvlm.records import write_jsonl

GQA = TASKS["gqa"]


def record(answer: str, structural: str, semantic: str, image: str = "1", **more: Any) -> dict[str, Any]:
    types = {"structural": structural, "semantic": semantic, "detailed": "x"}
    return {"imageId": image, "question": "Which?", "answer": answer, "types": types, "isBalanced": True, **more}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    records = {
        "10": record("left", "choose", "attr"),
        "11": record("pants", "query", "rel"),
        "12": record("yes", "verify", "attr", "2"),
        "13": record("dining table", "query", "cat", "3"),
        "14": record("no", "verify", "obj", "3", isBalanced=False),
    }
    path = tmp_path / "testdev_balanced_questions.json"
    path.write_text(json.dumps(records))
    return path


def scored(questions: Path, answers: dict[str, str], **names: str) -> dict[str, Any]:
    key, value = names.get("id", "questionId"), names.get("answer", "prediction")
    path = questions.with_name("predictions.json")
    path.write_text(json.dumps([{key: name, value: text} for name, text in answers.items()]))
    return score(GQA, path, questions)


SAID = {"10": "Left.", "11": "He wears blue pants.", "12": "yes", "13": "table"}


def test_scores_worked_by_hand(questions: Path) -> None:
    found = scored(questions, SAID)
    assert (found["n"], found["n_images"]) == (4, 3)
    assert (found["accuracy"], found["exact"], found["contains"]) == (0.5, 0.5, 0.75)
    assert (found["accuracy_binary"], found["accuracy_open"]) == (1.0, 0.0)
    assert found["by_structural"] == {"choose": 1.0, "query": 0.0, "verify": 1.0}
    assert found["by_semantic"] == {"attr": 1.0, "cat": 0.0, "rel": 0.0}
    assert found["skipped"] == {"not in the balanced set": 1}


@pytest.mark.parametrize("names", [{"id": "question_id", "answer": "text"}, {"id": "id", "answer": "answer"}])
def test_llavas_answers_and_ours_are_read_too(questions: Path, names: dict[str, str]) -> None:
    assert scored(questions, SAID, **names)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("answer", "reference", "found"),
    [
        ("The dining  table.", "dining table", True),
        ("pantsuit", "pants", False),
        ("It is on the LEFT side", "left", True),
        ("c++ code", "c++", True),
        ("", "left", False),
        ("right", "left", False),
    ],
)
def test_containment_wants_whole_words(answer: str, reference: str, found: bool) -> None:
    assert contains(answer, reference) is found


def test_missing_repeated_unknown_and_empty_answers_are_told(questions: Path) -> None:
    path = questions.with_name("predictions.jsonl")
    said = [("10", "left"), ("11", "pants"), ("11", "pants"), ("12", ""), ("99", "no")]
    write_jsonl(path, [{"questionId": key, "prediction": text} for key, text in said])
    found = score(GQA, path, questions)
    assert found["accuracy"] == 0.25
    failures = {"missing": ["13"], "duplicate": ["11"], "unknown": ["99"], "failed": {}, "empty": ["12"]}
    assert found["failures"] == failures


def test_llavas_questions_are_asked_and_take_their_answers_from_the_official_file(questions: Path) -> None:
    text = "Which?\nAnswer the question using a single word or phrase."
    path = questions.with_name("llava.jsonl")
    write_jsonl(path, [{"question_id": key, "image": "1.jpg", "text": text} for key in ("10", "11", "12")])
    assert {question.prompt for question in read_set(GQA, path).questions} == {text}
    predictions = questions.with_name("answers.jsonl")
    write_jsonl(predictions, [{"question_id": key, "text": "left"} for key in ("10", "11", "12")])
    with pytest.raises(DataError, match="no reference answer"):
        score(GQA, predictions, path)
    found = score(GQA, predictions, path, annotations=questions)
    assert (found["n"], found["accuracy"]) == (3, pytest.approx(1 / 3))
    assert found["skipped"] == {"answer without a question": 2}


def test_predictions_with_their_own_references_score_alike(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    reference = {"answer": "left", "structural": "choose", "semantic": "attr"}
    rows = [{"id": str(n), "image": "1.jpg", "answer": text} for n, text in enumerate(("left", "right"))]
    write_jsonl(path, [{**row, "reference": reference} for row in rows])
    assert score(GQA, path)["by_structural"] == {"choose": 0.5}
    write_jsonl(path, [{**row, "reference": "Right"} for row in rows])  # a reference may be the bare answer
    assert score(GQA, path)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ({"1": {"imageId": "2", "question": "?", "answer": 3}}, "the answer 3 is not a text"),
        ({"1": {"imageId": "2", "answer": "left"}}, "no usable 'prompt'"),
        ({"1": {"question": "?", "answer": "left"}}, "no usable 'imageId'"),
        ([1, 2], "record 1 is a int"),
        ([], "no record"),
    ],
)
def test_faulty_questions_are_told(tmp_path: Path, document: Any, fault: str) -> None:
    (tmp_path / "questions.json").write_text(json.dumps(document))
    write_jsonl(tmp_path / "p.jsonl", [{"id": "1", "answer": "left"}])
    with pytest.raises(DataError, match=fault):
        score(GQA, tmp_path / "p.jsonl", tmp_path / "questions.json")


def test_the_result_file_is_the_servers(questions: Path) -> None:
    path = questions.with_name("predictions.jsonl")
    write_jsonl(path, [{"id": key, "answer": text} for key, text in SAID.items()])
    write_results(GQA, path, questions, questions.with_name("out.json"))
    rows = json.loads(questions.with_name("out.json").read_text())
    assert rows[0] == {"questionId": "10", "prediction": "left"}
    assert len(rows) == 4


def test_the_real_files_are_read(realdata: Path, tmp_path: Path) -> None:
    official = realdata / "gqa" / "gqa_questions_official_format9.json"
    answers = {key: value["answer"] for key, value in json.loads(official.read_text()).items()}
    write_jsonl(tmp_path / "p.jsonl", [{"questionId": key, "prediction": text} for key, text in answers.items()])
    found = score(GQA, tmp_path / "p.jsonl", official)
    assert (found["n"], found["accuracy"], found["contains"]) == (9, 1.0, 1.0)
    assert found["by_structural"] == {"choose": 1.0, "compare": 1.0, "query": 1.0}
    assert found["figures"]["accuracy_open"]["n"] == 6
    first = realdata / "gqa" / "gqa_train_balanced_first25.json"
    assert len(read_set(GQA, first).questions) == 25
    asked = read_set(GQA, realdata / "gqa" / "llava_gqa_testdev_balanced_part1.jsonl").questions
    assert len(asked) == 6289
    assert all(question.prompt.count("single word or phrase") == 1 for question in asked)
