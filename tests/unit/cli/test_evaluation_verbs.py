import json
import subprocess
import sys
from pathlib import Path

import pytest

from locvlm.cli import main
from locvlm.cli.evaluation import TASK_NAMES
from locvlm.evaluation.tasks import TASKS
from locvlm.records import write_jsonl


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
    assert "not a whole LocVLM checkpoint" in message(capsys)
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
