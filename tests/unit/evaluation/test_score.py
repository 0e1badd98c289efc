import json
from pathlib import Path
from typing import Any

import pytest

from locvlm.errors import DataError
from locvlm.evaluation.metrics import paired_difference
from locvlm.evaluation.score import describe, read_metrics, score, write_metrics
from locvlm.evaluation.tasks import TASKS
from locvlm.presets import preset
from locvlm.records import write_json, write_jsonl

SPATIAL = TASKS["coco-spatial"]


def rows(n: int = 4) -> list[dict[str, Any]]:
    return [
        {"id": str(i), "image": f"{i // 2}.png", "prompt": "?", "reference": "left" if i % 2 == 0 else "right"}
        for i in range(n)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, rows())
    return path


def answered(tmp_path: Path, answers: list[tuple[Any, str]]) -> Path:
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [{"id": key, "answer": answer} for key, answer in answers])
    return path


def test_ids_and_answers_are_enough(tmp_path: Path, data: Path) -> None:
    found = score(SPATIAL, answered(tmp_path, [("0", "left"), ("1", "left"), ("2", "left"), ("3", "right")]), data)
    assert found["accuracy"] == 0.75
    figure = found["figures"]["accuracy"]
    assert (figure["value"], figure["n"], figure["floor"]) == (0.75, 4, 0.5)
    assert 0 <= figure["low"] <= 0.75 <= figure["high"] <= 1
    assert found["failures"] == {"missing": [], "duplicate": [], "unknown": [], "failed": {}, "empty": []}
    assert (found["n"], found["n_images"], found["n_failures"], found["decoding"]) == (4, 2, 0, None)


def test_missing_and_repeated_ids_are_wrong_and_the_denominator_stays(tmp_path: Path, data: Path) -> None:
    answers = [("0", "left"), ("1", "right"), ("1", "right"), ("9", "left")]  # 2 and 3 are missing
    found = score(SPATIAL, answered(tmp_path, answers), data)
    assert found["n"] == 4
    assert found["accuracy"] == 0.25
    assert found["failures"] == {"missing": ["2", "3"], "duplicate": ["1"], "unknown": ["9"], "failed": {}, "empty": []}
    assert found["n_failures"] == 3
    assert "failures: 2 missing, 1 duplicate, 1 unknown; 3 questions counted as wrong" in describe(found)


@pytest.mark.parametrize(
    ("key", "answer"),
    [("id", "answer"), ("question_id", "text"), ("questionId", "prediction"), ("ref_id", "sent"), ("id", "pred")],
)
def test_the_names_of_other_result_files_are_known(tmp_path: Path, data: Path, key: str, answer: str) -> None:
    path = tmp_path / "result.jsonl"
    write_jsonl(path, [{key: str(i), answer: "left"} for i in range(4)])
    assert score(SPATIAL, path, data)["accuracy"] == 0.5


def test_an_empty_answer_is_told_and_left_to_the_rule_of_the_task(tmp_path: Path) -> None:
    questions = [{"question_id": n, "image": "a.jpg", "text": "?", "label": "yes"} for n in range(2)]
    write_jsonl(tmp_path / "coco_pope_random.json", questions)
    found = score(TASKS["pope"], answered(tmp_path, [("0", ""), ("1", "no")]), tmp_path / "coco_pope_random.json")
    assert (found["accuracy"], found["yes_ratio"]) == (0.5, 0.5)  # officially, nothing is a yes
    assert (found["failures"]["empty"], found["n_failures"]) == (["0"], 0)
    assert "pope: 2 questions on 1 images of coco_pope_random" in describe(found)
    assert "1 empty" in describe(found)


def test_options_about_the_data_need_the_data(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [{**row, "answer": "left"} for row in rows()])
    for option in ({"annotations": path}, {"split": "val"}):
        with pytest.raises(DataError, match="say more about --data"):
            score(SPATIAL, path, **option)  # type: ignore[arg-type]


def test_a_set_of_one_file_takes_no_second(tmp_path: Path, data: Path) -> None:
    predictions = answered(tmp_path, [("0", "left")])
    with pytest.raises(DataError, match="leave out --annotations"):
        score(SPATIAL, predictions, data, annotations=data)
    with pytest.raises(DataError, match="leave out --split"):
        score(SPATIAL, predictions, data, split="val")


def test_an_official_result_list_is_read(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps([{"question_id": i, "answer": "left"} for i in range(4)]))
    assert score(SPATIAL, path, data)["accuracy"] == 0.5


def test_without_data_the_rows_own_references_count(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [{**row, "answer": "left"} for row in rows()])
    found = score(SPATIAL, path)
    assert (found["accuracy"], found["n_images"]) == (0.5, 2)
    write_jsonl(path, [{**row, "answer": "left", "reference": None} for row in rows()])
    with pytest.raises(DataError, match="no reference; give the questions with --data"):
        score(SPATIAL, path)
    write_jsonl(path, [{**row, "answer": "left", "reference": "up"} for row in rows()])
    with pytest.raises(DataError, match="'up' is not one of"):
        score(SPATIAL, path)


def test_places_are_read_in_the_form_that_the_files_tell(tmp_path: Path) -> None:
    reference = {"objective": "loc_pred", "category": "dog", "box": [0, 0, 48, 48], "width": 96, "height": 96}
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [{"id": "0", "image": "0.png", "answer": "(0,0,24,24)", "reference": reference}])
    task = TASKS["localization"]
    with pytest.raises(DataError, match="nothing says how places are written"):
        score(task, path)
    tiny = preset("tiny")
    assert score(task, path, config=tiny)["mean_iou"] == 1.0  # 48 bins
    finer = preset("tiny", ["coordinates.n_bins=96"])
    write_json(tmp_path / "predictions.meta.json", {"task": "localization", "config": finer.model_dump(mode="json")})
    assert score(task, path)["mean_iou"] == pytest.approx(0.25)  # 96 bins: a quarter of the area
    assert score(task, path)["primary"] == "mean_iou"


def test_another_tasks_predictions_are_refused(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [{"id": "0", "answer": "left", "task": "coco-spatial-icl"}])
    with pytest.raises(DataError, match="for the task coco-spatial-icl, not coco-spatial; score them with --task"):
        score(SPATIAL, path, data)
    write_jsonl(path, [{"id": "a", "answer": "left"}])
    with pytest.raises(DataError, match="none of its 1 ids is among the 4 questions"):
        score(SPATIAL, path, data)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"answer": "left"}, "neither id nor question_id"),
        ({"id": "0"}, "no `answer` text"),
        ({"id": "0", "answer": 3}, "no `answer` text"),
        ({"id": True, "answer": "left"}, "neither id nor question_id"),
    ],
)
def test_rows_without_id_or_answer_are_told(tmp_path: Path, data: Path, row: dict[str, Any], fault: str) -> None:
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [row])
    with pytest.raises(DataError, match=f"record 1.*{fault}|record 1 has {fault}"):
        score(SPATIAL, path, data)


def test_metrics_come_back_from_disk_and_repeat_byte_for_byte(tmp_path: Path, data: Path) -> None:
    predictions = answered(tmp_path, [(str(i), "left") for i in range(4)])
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    for path in (first, second):
        write_metrics(path, score(SPATIAL, predictions, data))
    assert first.read_bytes() == second.read_bytes()
    back = read_metrics(first)
    assert back["accuracy"] == 0.5
    assert paired_difference(back, back) == (0.0, 0.0, 0.0)
    lines = first.read_text().splitlines()
    assert sum('"sums"' in line for line in lines) == 4  # one line a question
    first.write_text("{}")
    with pytest.raises(DataError, match="not a metrics file"):
        read_metrics(first)


def test_decoding_settings_travel_from_the_predictions(tmp_path: Path, data: Path) -> None:
    predictions = answered(tmp_path, [(str(i), "left") for i in range(4)])
    write_json(tmp_path / "predictions.meta.json", {"task": "coco-spatial", "decoding": {"temperature": 0.2}})
    assert score(SPATIAL, predictions, data)["decoding"] == {"temperature": 0.2}
