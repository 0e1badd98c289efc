"""Every task on hand-made answers of known score, and on prediction files with every fault that one can have."""

from pathlib import Path
from typing import Any

import pytest

from locvlm.config import CoordinateConfig
from locvlm.errors import DataError
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS
from locvlm.presets import preset
from locvlm.records import write_jsonl

SIZE = {"width": 224, "height": 224}
SIDES = ("left", "right", "left", "right")
WHERE = {"objective": "loc_pred", "category": "cup", **SIZE}
PEOPLE = ["two"] * 3 + ["three"] * 6 + ["four"]

# task -> rows of its questions, an answer each, figure -> its value by hand
CASES: dict[str, tuple[list[dict[str, Any]], list[str], dict[str, float]]] = {
    "coco-spatial": (
        [{"prompt": "?", "reference": side} for side in SIDES],
        ["It is left", "left", "left or right", "to the RIGHT"],
        {"accuracy": 3 / 4, "strict": 2 / 4, "accuracy_left": 1.0, "accuracy_right": 1 / 2, "opposite_reading": 2 / 4},
    ),
    "coco-spatial-icl": (
        [{"icl_prompt": "?", "icl_reference": side} for side in SIDES],
        ["right", "right", "left", "neither"],
        {"accuracy": 2 / 4, "strict": 2 / 4, "answered": 3 / 4},
    ),
    "presence": (
        [{"prompt": "?", "reference": said} for said in ("yes", "yes", "no", "no")],
        ["Yes, it is", "No", "cannot say", "No."],
        {"accuracy": 2 / 4, "precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "yes_ratio": 2 / 4},
    ),
    "pope": (
        [{"text": "?", "label": said} for said in ("yes", "yes", "no", "no")],
        ["yes", "yes", "Yes", "there is not"],
        {"accuracy": 3 / 4, "precision": 2 / 3, "recall": 1.0, "f1": 4 / 5, "yes_ratio": 3 / 4},
    ),
    "localization": (
        [
            {**WHERE, "prompt": "?", "box": [0, 0, 100, 100]},
            {**WHERE, "prompt": "?", "box": [0, 0, 100, 100]},
            {**WHERE, "prompt": "?", "objective": "neg_pred"},
            {**WHERE, "prompt": "?", "objective": "neg_pred"},
        ],
        ["It is located at (0,0,100,50)", "no idea", "There is no such object in the image", "(0,0,9,9)"],
        {"mean_iou": 1 / 4, "accuracy_iou50": 1 / 2, "parse_failure_rate": 1 / 2, "neg_recall": 1 / 2, "neg_f1": 2 / 3},
    ),
    "region-description": (
        [{"box": [0, 0, 9, 9], **SIZE, "category": name} for name in ("cup", "cup", "hot dog", "dog")],
        ["There is a cup.", "a cup and a dog", "There is a hot dog.", "nothing"],
        {"accuracy": 2 / 4, "names_category": 3 / 4, "names_nothing": 1 / 4},
    ),
    "vqav2": (
        [
            {"question": "?", "image_id": n, "answers": PEOPLE, "answer_type": kind}
            for n, kind in enumerate(("number", "number", "other", "other"))
        ],
        ["2", "three", "four.", "five"],
        {"accuracy": (0.9 + 1 + 0.3) / 4, "accuracy_number": 1.9 / 2, "accuracy_other": 0.3 / 2},
    ),
    "gqa": (
        [
            {"question": "?", "imageId": "n1", "answer": answer, "types": {"structural": kind}}
            for answer, kind in (("cup", "query"), ("yes", "verify"), ("left", "choose"), ("no", "verify"))
        ],
        ["Cup.", "Yes, it is", "right", "no"],
        {"accuracy": 2 / 4, "contains": 3 / 4, "accuracy_structural_verify": 1 / 2, "accuracy_binary": 1 / 3},
    ),
    **{
        task: (
            [{"question": "what is it", "answer": answer, "type": "0"} for answer in ("cup", "dog", "yes", "two")],
            ["a cup", "a brown dog", "no", "2"],
            {"accuracy": 2 / 4, "accuracy_type_0": 2 / 4},
        )
        for task in ("activitynet-qa", "msrvtt-qa", "msvd-qa")
    },
    "tgif-qa": (
        [{"question": "what is it", "answer": answer} for answer in ("cup", "dog", "yes", "two")],
        ["cup", "dog", "yes", "3"],
        {"accuracy": 3 / 4},
    ),
}


def questions(task: str, folder: Path) -> Path:
    rows = CASES[task][0]
    path = folder / "questions.jsonl"
    if task == "tgif-qa":
        lines = ["gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription"]
        lines += [f"t{n}\t{row['question']}\t{row['answer']}\t\t{n}\t{n}\t" for n, row in enumerate(rows)]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path
    write_jsonl(path, [{"id": str(n), "image": f"{n}.png", **row} for n, row in enumerate(rows)])
    return path


def scored(task: str, folder: Path, answers: list[dict[str, Any]]) -> dict[str, Any]:
    write_jsonl(folder / "p.jsonl", answers)
    ivb = CoordinateConfig(representation="ivb", n_bins=224)
    config = preset("tiny").model_copy(update={"coordinates": ivb})
    return score(TASKS[task], folder / "p.jsonl", questions(task, folder), config)


def said(task: str) -> list[dict[str, Any]]:
    return [{"id": str(n), "answer": answer} for n, answer in enumerate(CASES[task][1])]


def test_no_task_is_left_out() -> None:
    assert CASES.keys() == TASKS.keys()


@pytest.mark.parametrize("task", TASKS)
def test_known_answers_have_their_scores(task: str, tmp_path: Path) -> None:
    metrics = scored(task, tmp_path, said(task))
    for figure, value in CASES[task][2].items():
        assert metrics[figure] == pytest.approx(value), figure
    assert metrics["n_failures"] == 0
    assert not any(metrics["failures"].values())


@pytest.mark.parametrize("task", TASKS)
def test_every_fault_is_counted_and_nothing_leaves_the_denominator(task: str, tmp_path: Path) -> None:
    first, second, third, fourth = said(task)
    faulty = [first, first, {**third, "answer": " "}, {**fourth, "failure": "no image"}, {"id": "x", "answer": "left"}]
    metrics = scored(task, tmp_path, faulty)
    assert metrics["failures"] == {
        "missing": ["1"],
        "duplicate": ["0"],
        "unknown": ["x"],
        "failed": {"3": "no image"},
        "empty": ["2"],
    }
    assert (metrics["n"], metrics["n_failures"], len(metrics["items"])) == (4, 3, 4)
    # an empty answer is what the task's rule makes of it: POPE's is yes, which is wrong here
    primary = metrics["primary"]
    assert metrics[primary] == 0, primary
    assert scored(task, tmp_path, [second, third])["n"] == 4


@pytest.mark.parametrize("task", TASKS)
def test_answers_to_other_questions_are_refused(task: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of its 1 ids is among the 4 questions"):
        scored(task, tmp_path, [{"id": "other", "answer": "yes"}])
    with pytest.raises(DataError, match="has no `answer` text"):
        scored(task, tmp_path, [{"id": "0", "answer": 7}])
    with pytest.raises(DataError, match="neither id nor question_id"):
        scored(task, tmp_path, [{"answer": "yes"}])
