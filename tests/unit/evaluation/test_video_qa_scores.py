import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from locvlm.errors import DataError
from locvlm.evaluation.judges import Case, Judge, LexicalJudge, Verdict
from locvlm.evaluation.score import score
from locvlm.evaluation.tasks import TASKS, read_set
from locvlm.records import write_jsonl

ANET, MSRVTT, MSVD, TGIF = (TASKS[name] for name in ("activitynet-qa", "msrvtt-qa", "msvd-qa", "tgif-qa"))


class Prepared(Judge):
    """A grading judge whose verdicts were written down before."""

    id = "prepared"
    grades = True

    def __init__(self, verdicts: dict[str, Verdict]) -> None:
        self._verdicts = verdicts

    def verdicts(self, cases: Sequence[Case]) -> list[Verdict]:
        return [self._verdicts[case.prediction] for case in cases]


@pytest.fixture
def anet(tmp_path: Path) -> Path:
    questions = [
        {"video_name": video, "question": f"is it {n}", "question_id": f"v_{video}_{n}"}
        for n, video in enumerate(("a", "a", "b", "c"))
    ]
    answers = [("yes", 3), ("two", 7), ("no", 3), ("in the park", 6)]
    (tmp_path / "val_q.json").write_text(json.dumps(questions))
    rows = [
        {"answer": text, "type": kind, "question_id": row["question_id"]}
        for (text, kind), row in zip(answers, questions, strict=True)
    ]
    (tmp_path / "val_a.json").write_text(json.dumps(rows[::-1]))  # joined by id, not by place
    return tmp_path


def scored(anet: Path, answers: Sequence[tuple[str, str]], judge: Judge | None = None) -> dict[str, Any]:
    write_jsonl(anet / "p.jsonl", [{"question_id": key, "answer": text} for key, text in answers])
    return score(ANET, anet / "p.jsonl", anet / "val_q.json", annotations=anet / "val_a.json", judge=judge)


SAID = [("v_a_0", "Yes."), ("v_a_1", "2"), ("v_b_2", "yes"), ("v_c_3", "He walks in the park")]


def test_scores_worked_by_hand(anet: Path) -> None:
    found = scored(anet, SAID)
    assert (found["n"], found["n_images"], found["accuracy"]) == (4, 3, 0.5)
    assert found["by_type"] == {"3": 0.5, "6": 0.0, "7": 1.0}
    assert found["judge"] == "exact"
    assert found["counts"] == {"yes": 2, "no": 2, "unreadable": 0}
    floor = found["figures"]["accuracy"]["floor"], found["figures"]["accuracy"]["floor_answer"]
    assert floor == (0.25, "always 'yes'")


def test_the_lexical_judge_takes_an_answer_within_a_sentence(anet: Path) -> None:
    found = scored(anet, SAID, LexicalJudge())
    assert (found["accuracy"], found["judge"]) == (0.75, "lexical")
    assert found["figures"]["accuracy"]["floor"] is None


def test_a_grading_judge_adds_its_scores_and_what_it_could_not_say(anet: Path) -> None:
    verdicts = {"Yes.": Verdict(True, 5), "2": Verdict(None), "yes": Verdict(False, 1)}
    found = scored(anet, SAID[:3], Prepared(verdicts))  # one question has no answer
    assert found["accuracy"] == 0.25
    assert found["accuracy_of_judged"] == pytest.approx(1 / 3)  # the unreadable reply is left out, the gap is not
    assert found["mean_score"] == pytest.approx((5 + 1 + 0) / 3)
    assert found["judge_score"] == pytest.approx((5 + 1 + 0) / 15)
    assert found["counts"] == {"yes": 1, "no": 1, "unreadable": 1}
    assert found["judge"] == "prepared"


def test_missing_repeated_unknown_and_empty_answers_are_told(anet: Path) -> None:
    found = scored(anet, [("v_a_0", "yes"), ("v_a_0", "yes"), ("v_a_1", ""), ("v_b_2", "no"), ("v_z_0", "no")])
    assert found["accuracy"] == 0.25
    assert found["failures"] == {
        "missing": ["v_c_3"],
        "duplicate": ["v_a_0"],
        "unknown": ["v_z_0"],
        "failed": {},
        "empty": ["v_a_1"],
    }


def test_video_chatgpts_own_rows_are_read_by_their_prediction(anet: Path) -> None:
    rows = [{"id": key, "question": "?", "answer": "the reference", "pred": text} for key, text in SAID]
    (anet / "p.json").write_text(json.dumps(rows))
    found = score(ANET, anet / "p.json", anet / "val_q.json", annotations=anet / "val_a.json")
    assert found["accuracy"] == 0.5


def test_questions_are_asked_as_they_stand(anet: Path) -> None:
    found = read_set(ANET, anet / "val_q.json")
    assert [(q.image, q.prompt, q.reference) for q in found.questions[:1]] == [("v_a.mp4", "is it 0", None)]
    write_jsonl(anet / "p.jsonl", [{"id": "v_a_0", "answer": "yes"}])
    with pytest.raises(DataError, match=r"no reference answer .* --annotations"):
        score(ANET, anet / "p.jsonl", anet / "val_q.json")


def test_predictions_with_their_own_references_score_alike(tmp_path: Path) -> None:
    row = {"id": "1", "image": "video1.mp4", "prompt": "what is it", "answer": "dog"}
    reference = {"question": "what is it", "answer": "a dog", "type": "what"}
    write_jsonl(tmp_path / "p.jsonl", [{**row, "reference": reference}])
    found = score(MSRVTT, tmp_path / "p.jsonl")
    assert (found["accuracy"], found["by_type"]) == (1.0, {"what": 1.0})


def test_msrvtt_comes_as_json_and_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "val_qa.json").write_text(
        json.dumps([{"id": 7, "video_id": 65, "category_id": 1, "question": "who sings?", "answer": "man"}])
    )
    table = 'video,question,answer,qid,type\n65,"who sings, then?",man,7,2\n'
    (tmp_path / "val.csv.gz").write_bytes(gzip.compress(table.encode()))
    whole, rows = (read_set(MSRVTT, tmp_path / name).questions[0] for name in ("val_qa.json", "val.csv.gz"))
    assert (whole.id, whole.image, whole.reference["type"]) == ("7", "video65.mp4", "who")
    assert (rows.id, rows.image, rows.prompt, rows.reference["type"]) == ("7", "video65.mp4", "who sings, then?", "2")


def test_msvd_names_its_videos_by_the_mapping_beside_it(tmp_path: Path) -> None:
    rows = [{"id": n, "video_id": n, "question": "what is it?", "answer": "dog"} for n in (1, 2)]
    (tmp_path / "val_qa.json").write_text(json.dumps(rows))
    (tmp_path / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid1\n")
    assert [q.image for q in read_set(MSVD, tmp_path / "val_qa.json").questions] == ["-4wsuPCjDBc_5_15.avi", "vid2.avi"]


TGIF_HEAD = "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "no column gif_name"),
        (TGIF_HEAD.replace("\t", ","), "separated by tabs"),
        (TGIF_HEAD, "the table has no rows"),
        (TGIF_HEAD + "tumblr_1\twhat is", "row 1 has too few columns"),
        (TGIF_HEAD + "a\twhat\t\t0\tF1\t1\tx\n", "the answer '' is not a text"),
    ],
)
def test_faulty_tables_are_told(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(DataError, match=fault):
        read_set(TGIF, tmp_path / "test.csv")


def test_damaged_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(TGIF_HEAD.encode() * 99)[:-20])
    with pytest.raises(DataError, match="cut short or damaged"):
        read_set(TGIF, tmp_path / "cut.csv.gz")
    (tmp_path / "latin.csv").write_bytes(TGIF_HEAD.encode() + "a\twhat\tcaf\xe9\t0\tF1\t1\tx\n".encode("latin1"))
    with pytest.raises(DataError, match="must be UTF-8"):
        read_set(TGIF, tmp_path / "latin.csv")
    write_jsonl(tmp_path / "q.json", [{"id": 1, "question": "?", "answer": "x", "video_id": 1}])
    for task, option in ((MSVD, "annotations"), (TGIF, "split"), (ANET, "split")):
        value: Any = tmp_path / "q.json" if option == "annotations" else "val"
        with pytest.raises(DataError, match=f"drop --{option}"):
            read_set(task, tmp_path / "q.json", **{option: value})


def test_another_tasks_judge_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"id": "1", "answer": "yes", "reference": "yes", "image": "a.png"}])
    with pytest.raises(DataError, match="--judge goes with activitynet-qa"):
        score(TASKS["pope"], tmp_path / "p.jsonl", judge=LexicalJudge())


def test_a_constant_answer_on_the_real_activitynet_scores_its_share(realdata: Path, tmp_path: Path) -> None:
    questions, answers = (realdata / "video_qa" / f"activitynetqa_test_{name}.json" for name in "qa")
    rows = json.loads(answers.read_text())
    write_jsonl(tmp_path / "p.jsonl", [{"question_id": row["question_id"], "answer": "yes"} for row in rows])
    found = score(ANET, tmp_path / "p.jsonl", questions, annotations=answers)
    right = Counter(row["type"] for row in rows if row["answer"] == "yes")
    total = Counter(row["type"] for row in rows)
    assert (found["n"], found["n_images"]) == (8000, 800)
    assert found["accuracy"] == sum(right.values()) / 8000 == 1102 / 8000
    assert found["by_type"] == {str(kind): right[kind] / n for kind, n in total.items()}
    write_jsonl(tmp_path / "p.jsonl", [{"question_id": row["question_id"], "answer": row["answer"]} for row in rows])
    assert score(ANET, tmp_path / "p.jsonl", questions, annotations=answers)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("task", "name", "n", "n_videos"),
    [
        ("msvd-qa", "msvdqa_val_qa.json", 6415, None),
        ("msrvtt-qa", "msrvttqa_val.csv.gz", 12278, None),
        ("tgif-qa", "tgifqa_Test_frameqa_question_part1.csv.gz", 6845, 4785),
    ],
)
def test_the_real_files_are_read_whole(realdata: Path, task: str, name: str, n: int, n_videos: int | None) -> None:
    found = read_set(TASKS[task], realdata / "video_qa" / name).questions
    assert len(found) == n
    assert all(question.reference["type"] for question in found if task != "msvd-qa")
    if n_videos:
        assert len({question.image for question in found}) == n_videos
