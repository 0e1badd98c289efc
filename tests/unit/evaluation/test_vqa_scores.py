import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from locvlm.errors import DataError
from locvlm.evaluation.questions import Question, QuestionSet, Source
from locvlm.evaluation.score import score, write_results
from locvlm.evaluation.tasks import TASKS, read_set
from locvlm.evaluation.vqa import VqaScorer, accuracies, clean, consensus, normalise
from locvlm.evaluation.vqa import rows as vqa_rows
from locvlm.records import write_jsonl

VQA = TASKS["vqav2"]
SUFFIX = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes.", "yes"),
        ("A red, white and blue kite", "red white and blue kite"),
        ("2,000", "2000"),
        ("two dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("10.5", "10.5"),
        ("U.S.A.", "usa"),
        ("none", "0"),
        ("black-white", "black white"),
        ("red/green", "red green"),
        ("left side of the table", "left side of table"),
        ("a", ""),
        ("1,2 and 3", "12 and 3"),
        ("it is a cat!", "it is cat"),
        ("somebody'd", "somebodyd"),  # the table has it the wrong way round
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # one apostrophe comes back, not two
        ("ow's'at", "'ow's'at"),
        ("Im", "im"),  # the table's capital keys never match
        ("shes", "shes"),
        ("o'clock: 9:30", "o'clock: 9:30"),  # apostrophe and colon stay
        ("1,,3 c-b", "1 3 c b"),  # a comma between digits means exactly one
        ("a\tb\n", "b"),
        ("." * 40, "." * 8),  # the flag passed as count: 32 at most
        ("", ""),
    ],
)
def test_golden_normalisations(answer: str, expected: str) -> None:
    assert normalise(clean(answer)) == expected


@given(st.integers(2, 12), st.data())
def test_the_short_form_is_the_published_loop(n: int, data: st.DataObject) -> None:
    matches = data.draw(st.integers(0, n))
    people = [True] * matches + [False] * (n - matches)
    scores = [min(1.0, sum(people[:i] + people[i + 1 :]) / 3) for i in range(n)]
    assert consensus(matches, n) == pytest.approx(sum(scores) / n, abs=1e-12)


def test_three_of_ten_score_nine_tenths_and_four_score_all() -> None:
    given_answers = ["yes"] * 3 + ["no"] * 4 + ["maybe"] * 2 + ["I don't know"]
    found = [accuracies(answer, given_answers)[0] for answer in ("yes", "no", "maybe", "i dont know.", "dunno")]
    assert found == pytest.approx([0.9, 1.0, 0.6, 0.3, 0.0])


def test_where_all_agree_raw_text_is_compared() -> None:
    assert accuracies("Yes.", ["yes"] * 10) == (0.0, 1.0)
    assert accuracies("yes", ["yes"] * 10) == (1.0, 1.0)
    assert accuracies(" yes\n", ["yes"] * 10) == (1.0, 1.0)  # ends are stripped all the same
    assert accuracies("off", ["Off"] * 10) == (0.0, 1.0)
    assert accuracies("Yes.", ["yes"] * 9 + ["no"]) == (1.0, 1.0)


def annotation(key: int, answers: list[str], kind: str = "other") -> dict[str, Any]:
    people = [{"answer_id": n, "answer": text, "answer_confidence": "yes"} for n, text in enumerate(answers, 1)]
    return {"question_id": key, "image_id": 42, "answer_type": kind, "question_type": "what", "answers": people}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    questions = [{"question_id": key, "image_id": 42 + key // 2, "question": f"What {key}?"} for key in range(4)]
    document = {"questions": questions, "data_subtype": "val2014", "task_type": "Open-Ended"}
    (tmp_path / "questions.json").write_text(json.dumps(document, indent=1))
    annotations = [
        annotation(0, ["yes"] * 10, "yes/no"),
        annotation(1, ["2"] * 5 + ["two"] * 3 + ["3"] * 2, "number"),
        annotation(2, ["red"] * 3 + ["dark red"] * 7),
        annotation(3, ["a dog"] * 10),
    ]
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return tmp_path


def scored(files: Path, results: list[dict[str, Any]]) -> dict[str, Any]:
    (files / "results.json").write_text(json.dumps(results))
    return score(VQA, files / "results.json", files / "questions.json", annotations=files / "annotations.json")


def test_scores_worked_by_hand(files: Path) -> None:
    said = ["Yes", "Two.", "red", "dog"]
    found = scored(files, [{"question_id": n, "answer": text} for n, text in enumerate(said)])
    assert found["accuracy"] == pytest.approx((0 + 1 + 0.9 + 0) / 4)
    assert found["accuracy_always_normalised"] == pytest.approx((1 + 1 + 0.9 + 1) / 4)
    assert found["by_answer_type"] == pytest.approx({"yes/no": 0.0, "number": 1.0, "other": 0.45})
    assert found["figures"]["accuracy_other"]["n"] == 2
    assert found["n_images"] == 2
    floor = found["figures"]["accuracy"]["floor"], found["figures"]["accuracy"]["floor_answer"]
    assert floor == (0.25, "always 'yes'")


def test_missing_repeated_unknown_and_empty_answers_are_told(files: Path) -> None:
    results = [(0, "yes"), (1, "2"), (1, "2"), (2, ""), (9, "red")]
    found = scored(files, [{"question_id": key, "answer": text} for key, text in results])
    assert found["accuracy"] == 0.25
    assert found["failures"] == {
        "missing": ["3"],
        "duplicate": ["1"],
        "unknown": ["9"],
        "failed": {},
        "empty": ["2"],
    }
    assert found["n_failures"] == 2


def test_questions_become_prompts_with_the_short_answer_request(files: Path) -> None:
    found = read_set(VQA, files / "questions.json")
    assert [q.prompt for q in found.questions] == [f"What {n}?{SUFFIX}" for n in range(4)]
    assert found.questions[3].image == "COCO_val2014_000000000043.jpg"
    assert found.questions[0].reference is None  # can be asked without annotations
    write_jsonl(files / "llava.jsonl", [{"question_id": 1, "image": "a.jpg", "text": f"What?{SUFFIX}"}])
    assert read_set(VQA, files / "llava.jsonl").questions[0].prompt == f"What?{SUFFIX}"  # not twice


def test_a_test_split_names_its_images_by_the_whole_test_set(files: Path) -> None:
    document = {"questions": [{"question_id": 1, "image_id": 7, "question": "?"}], "data_subtype": "test-dev2015"}
    (files / "test.json").write_text(json.dumps(document))
    assert vqa_rows(Source(files / "test.json")).rows[0]["image"] == "COCO_test2015_000000000007.jpg"


def test_questions_without_references_cannot_be_scored(files: Path) -> None:
    (files / "results.json").write_text(json.dumps([{"question_id": 0, "answer": "yes"}]))
    with pytest.raises(DataError, match=r"4 of 4 questions .* no reference answer .*--annotations"):
        score(VQA, files / "results.json", files / "questions.json")


def test_annotations_of_another_split_are_refused(files: Path) -> None:
    (files / "annotations.json").write_text(json.dumps({"annotations": [annotation(0, ["yes"] * 10)]}))
    with pytest.raises(DataError, match=r"3 of 4 questions have no answer there \(first id '1'\)"):
        scored(files, [{"question_id": 0, "answer": "yes"}])
    (files / "annotations.json").write_text(json.dumps({"annotations": [annotation(0, ["yes"] * 10)] * 2}))
    with pytest.raises(DataError, match="'0' occurs twice"):
        scored(files, [{"question_id": 0, "answer": "yes"}])


@pytest.mark.parametrize(
    ("answers", "fault"),
    [([], "is empty"), ("yes", "is not a list"), ([1, 2], "not a list of texts"), ([{"text": "x"}], "list of texts")],
)
def test_faulty_annotations_are_told(files: Path, answers: Any, fault: str) -> None:
    rows = [{"question_id": n, "answers": answers} for n in range(4)]
    (files / "annotations.json").write_text(json.dumps({"annotations": rows}))
    with pytest.raises(DataError, match=f"record 1: .*{fault}"):
        scored(files, [{"question_id": 0, "answer": "yes"}])


def test_predictions_with_their_own_references_score_alike(files: Path) -> None:
    reference = {"answers": ["red"] * 3 + ["blue"] * 7, "answer_type": "other"}
    write_jsonl(files / "own.jsonl", [{"id": "1", "image": "a.jpg", "answer": "red", "reference": reference}])
    assert score(VQA, files / "own.jsonl")["accuracy"] == pytest.approx(0.9)


def test_the_submission_holds_every_question_processed_once(files: Path) -> None:
    rows = [{"id": "2", "answer": "The 1,,2 dogs."}, {"id": "0", "answer": "Yes."}, {"id": "1", "answer": "two"}]
    write_jsonl(files / "predictions.jsonl", rows)
    failures = write_results(VQA, files / "predictions.jsonl", files / "questions.json", files / "out.json")
    assert json.loads((files / "out.json").read_text()) == [
        {"question_id": 0, "answer": "yes"},
        {"question_id": 1, "answer": "2"},
        {"question_id": 2, "answer": "1 2 dogs"},
        {"question_id": 3, "answer": ""},
    ]
    assert failures.missing == ("3",)
    # what is a result file already stays as it is: processed twice is not processed once
    write_results(VQA, files / "out.json", files / "questions.json", files / "again.json")
    assert (files / "again.json").read_bytes() == (files / "out.json").read_bytes()


def test_tasks_without_an_official_file_say_so(files: Path) -> None:
    write_jsonl(files / "predictions.jsonl", [{"id": "0", "answer": "yes"}])
    with pytest.raises(DataError, match="pope has no official result file; vqav2, gqa have one"):
        write_results(TASKS["pope"], files / "predictions.jsonl", files / "questions.json", files / "out.json")


def test_the_floor_of_a_mixed_set_is_the_best_constant() -> None:
    references = [
        {"answers": ["yes"] * 10, "answer_type": ""},
        {"answers": ["Yes"] * 10, "answer_type": ""},  # all agree on another spelling: "yes" is wrong officially
        {"answers": ["no"] * 9 + ["yes"], "answer_type": ""},
    ]
    questions = tuple(Question(str(n), "a", "?", reference) for n, reference in enumerate(references))
    floors = VqaScorer(QuestionSet("set", questions)).floors()
    assert floors["accuracy"].value == pytest.approx((1 + 0 + 0.3) / 3)
    assert floors["accuracy_always_normalised"].value == pytest.approx((1 + 1 + 0.3) / 3)


def test_okvqa_gives_the_official_figure(realdata: Path) -> None:
    folder = realdata / "vqa"
    figures = json.loads((folder / "expected_vqa.json").read_text())
    expected = next(value for name, value in figures.items() if name.startswith("okvqa"))
    found = score(VQA, folder / "okvqa_predictions_pica_vinvl.json", folder / "okvqa_test_split.json")
    assert 100 * found["accuracy"] == pytest.approx(expected["overall"], abs=5e-5)
    assert 100 * found["accuracy_always_normalised"] == pytest.approx(
        expected["overall_if_answers_are_always_normalised"], abs=5e-5
    )
    assert (found["n"], len(found["failures"]["unknown"])) == (4456, 5046 - 4456)
    for key, _, value in expected["per_question_first_100"]:
        assert 100 * found["items"][str(key)]["sums"]["accuracy"][0] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("name", ["predicting each multiple_choice_answer", "predicting 'Yes.' everywhere"])
def test_vqav2_gives_the_official_figures(realdata: Path, tmp_path: Path, name: str) -> None:
    folder = realdata / "vqa"
    expected = json.loads((folder / "expected_vqav2_sample53.json").read_text())["vqav2_sample53"]
    annotations = json.loads((folder / "vqav2_sample53_annotations.json").read_text())["annotations"]
    is_first = name.startswith("predicting each")
    results = [
        {"question_id": row["question_id"], "answer": row["multiple_choice_answer"] if is_first else "Yes."}
        for row in annotations
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = score(
        VQA,
        tmp_path / "results.json",
        folder / "vqav2_sample53_questions.json",
        annotations=folder / "vqav2_sample53_annotations.json",
    )
    assert 100 * found["accuracy"] == pytest.approx(expected[name]["overall"], abs=5e-5)
    by_type = {kind: 100 * value for kind, value in found["by_answer_type"].items()}
    assert by_type == pytest.approx(expected[name]["perAnswerType"], abs=5e-5)
    always = expected["the same two, always normalised"][0 if is_first else 1]
    assert 100 * found["accuracy_always_normalised"] == pytest.approx(always, abs=5e-5)
