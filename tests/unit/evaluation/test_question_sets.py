from pathlib import Path
from typing import Any

import pytest

from locvlm.config import ExperimentConfig
from locvlm.data.conversations import write_conversations
from locvlm.errors import CheckpointError, DataError
from locvlm.evaluation.questions import Question, read_rows, spread
from locvlm.evaluation.tasks import TASKS, read_set, task_named
from locvlm.presets import preset
from locvlm.prompts import LOC_PROMPTS
from locvlm.records import Conversation, Manifest, Turn, write_jsonl, write_manifest

TINY = preset("tiny")


def localize_folder(folder: Path, config: ExperimentConfig = TINY, **manifest: Any) -> Path:
    """Two images: one with a dog (and no cat), one with a cat."""
    conversations = [
        Conversation(
            "1-loc_pred",
            "1.png",
            96,
            48,
            "loc_pred",
            (Turn("loc_pred", "dog", box_xyxy=(0, 0, 48, 24)), Turn("neg_pred", "cat")),
        ),
        Conversation("1-rev_loc", "1.png", 96, 48, "rev_loc", (Turn("rev_loc", "dog", box_xyxy=(0, 0, 48, 24)),)),
        Conversation("2-rev_loc", "2.png", 96, 48, "rev_loc", (Turn("rev_loc", "cat", box_xyxy=(48, 24, 96, 48)),)),
        Conversation("3-text", "2.png", 96, 48, "text", (Turn("text", question="What?", answer="A cat."),)),
    ]
    counts = write_conversations(folder, conversations)
    sections = {"coordinates": config.coordinates.model_dump(), "geometry": config.geometry.model_dump()}
    write_manifest(folder, Manifest("localize-instruct", counts, **{**sections, **manifest}))
    return folder


def spatial_row(number: int, word: str = "left") -> dict[str, Any]:
    return {
        "id": f"{number}",
        "task": "coco-spatial",
        "image": f"{number // 2}.png",
        "prompt": "Which side of cat is dog located?",
        "reference": word,
        "icl_prompt": "Q: ... Which side of cat is dog located?",
        "icl_reference": "right" if word == "left" else "left",
    }


def test_every_structured_turn_becomes_one_question_in_the_checkpoints_words(tmp_path: Path) -> None:
    found = read_set(TASKS["localization"], localize_folder(tmp_path), TINY)
    assert [question.id for question in found.questions] == ["1-loc_pred#0", "1-loc_pred#1"]
    assert [question.reference["objective"] for question in found.questions] == ["loc_pred", "neg_pred"]
    repr_text = "(x1,y1,x2,y2) bbox"
    dog, cat = ({p.format(category=name, repr=repr_text) for p in LOC_PROMPTS} for name in ("dog", "cat"))
    assert found.questions[0].prompt in dog
    assert found.questions[1].prompt in cat
    assert found.categories == ("cat", "dog")
    again = read_set(TASKS["localization"], tmp_path, TINY)
    assert [q.prompt for q in again.questions] == [q.prompt for q in found.questions]


def test_region_questions_hold_the_encoded_place(tmp_path: Path) -> None:
    found = read_set(TASKS["region-description"], localize_folder(tmp_path), TINY)
    assert [question.reference["category"] for question in found.questions] == ["dog", "cat"]
    assert "(0,0,24,24)" in found.questions[0].prompt  # 48 bins: x 96 -> 48, y 48 -> 48
    assert "(24,24,48,48)" in found.questions[1].prompt


def test_scoring_reads_the_same_ids_without_prompts(tmp_path: Path) -> None:
    folder = localize_folder(tmp_path)
    asked, scored = (read_set(TASKS["localization"], folder, config) for config in (TINY, None))
    assert [q.id for q in asked.questions] == [q.id for q in scored.questions]
    assert {q.prompt for q in scored.questions} == {""}
    assert scored.coordinates == TINY.coordinates


def test_data_in_another_form_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    localize_folder(tmp_path, preset("tiny", ["coordinates.n_bins=96"]))
    with pytest.raises(CheckpointError, match=r"n_bins: data 96, checkpoint 48\n.*build the data again.*or take"):
        read_set(TASKS["localization"], tmp_path, TINY)
    localize_folder(tmp_path, geometry={"kind": "letterbox", "side": 48})
    with pytest.raises(CheckpointError, match="kind: data 'letterbox', checkpoint 'squash'"):
        read_set(TASKS["region-description"], tmp_path, TINY)


def test_written_prompts_with_places_need_their_manifest(tmp_path: Path) -> None:
    row = {"id": "0", "image": "a.png", "prompt": "What is at (1,2,3,4)?", "category": "dog", "box": [0, 0, 1, 1]}
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, [row])
    with pytest.raises(DataError, match=r"no manifest\.json beside"):
        read_set(TASKS["region-description"], path, TINY)
    manifest = Manifest("regions", {}, coordinates=TINY.coordinates.model_dump(), geometry={"side": 48})
    write_manifest(tmp_path, manifest)
    found = read_set(TASKS["region-description"], path, TINY)
    assert (found.name, found.questions[0].prompt) == ("regions", row["prompt"])


def test_direct_and_in_context_questions_come_from_one_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "questions.jsonl", [spatial_row(0)])
    direct, icl = (read_set(TASKS[name], tmp_path).questions[0] for name in ("coco-spatial", "coco-spatial-icl"))
    assert (direct.reference, icl.reference) == ("left", "right")


def test_popes_own_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "coco_pope_popular.json"
    path.write_text('{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}\n')
    found = read_set(TASKS["pope"], path)
    assert found.name == "coco_pope_popular"
    assert (found.questions[0].id, found.questions[0].reference) == ("1", "no")


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{**spatial_row(0), "task": "presence"}], "record 1 is of the task 'presence'"),
        ([spatial_row(0), spatial_row(0)], "'0' occurs twice"),
        ([{"id": "0", "image": "a.png", "prompt": "?"}], "no usable 'reference'"),
        ([{**spatial_row(0), "prompt": None}], "no usable 'prompt'"),
        ([{**spatial_row(0), "reference": "up"}], "'up' is not one of"),
    ],
)
def test_faulty_question_files_are_told(tmp_path: Path, rows: list[dict[str, Any]], fault: str) -> None:
    write_jsonl(tmp_path / "questions.jsonl", rows)
    with pytest.raises(DataError, match=fault):
        read_set(TASKS["coco-spatial"], tmp_path)


def test_missing_or_foreign_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_set(TASKS["presence"], tmp_path / "absent")
    with pytest.raises(DataError, match=r"neither questions\.jsonl nor conversations\.arrow"):
        read_set(TASKS["presence"], tmp_path)
    with pytest.raises(DataError, match="only localization, region-description"):
        read_set(TASKS["presence"], localize_folder(tmp_path))
    with pytest.raises(DataError, match="must be one of coco-spatial"):
        task_named("coco-spacial")


def test_lists_and_lines_are_told_apart_by_content(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('[{"id": 1}, {"id": 2}]')
    assert len(read_rows(path)) == 2
    path.write_text('{"id": "a\u2028b"}\n\n{"id": 2}\n', encoding="utf-8")
    assert [row["id"] for row in read_rows(path)] == ["a\u2028b", 2]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('[{"id": 1}, {"id"', "cut short"),
        ('{"id": 1}\n{"id": 2, "ans', "line 2: not valid JSON"),
        ("[1]", "record 1 is a int"),
        ("", "no record"),
    ],
)
def test_damaged_files_are_told(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=fault):
        read_rows(path)


def test_a_limit_draws_the_same_questions_from_all_over_the_set() -> None:
    questions = [Question(str(i), f"{i}.png", "", "left" if i % 2 else "right") for i in range(1000)]
    chosen = spread(questions, 100)
    assert chosen == spread(questions, 100)
    assert [int(q.id) for q in chosen] == sorted(int(q.id) for q in chosen)
    assert 35 <= sum(q.reference == "left" for q in chosen) <= 65
    assert 35 <= sum(int(q.id) < 500 for q in chosen) <= 65
    assert {q.id for q in chosen} <= {q.id for q in spread(questions, 200)}
    assert spread(questions, None) == spread(questions, 5000) == tuple(questions)
