from pathlib import Path

import pytest

from locvlm import tracking
from locvlm.cli import main
from locvlm.records import write_json, write_jsonl

WORDS = ("left", "right")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [{"id": str(i), "image": f"{i}.png", "prompt": "?", "reference": WORDS[i % 2]} for i in range(20)]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    for name, n in (("a", 18), ("b", 9)):
        said = [{"id": row["id"], "answer": row["reference"] if int(row["id"]) < n else "?"} for row in rows]
        write_jsonl(tmp_path / f"{name}.jsonl", said)
        paths = ["--predictions", str(tmp_path / f"{name}.jsonl"), "--data", str(tmp_path / "questions.jsonl")]
        output = ["--output", str(tmp_path / f"{name}.json")]
        assert main(["score", "--task", "coco-spatial", *paths, *output]) == 0
    return tmp_path


def report(files: Path, *more: str) -> int:
    single = [word for name in "ab" for word in ("--metrics", f"{name}={files / name}.json")]
    return main(["report", *single, *more, "--output", str(files / "report")])


def test_single_files_make_arms(files: Path) -> None:
    write_json(files / "kw.json", {"conversations": 5, "phrases": {"the left": {"conversations": 2}}})
    more = [
        "--compare",
        "b=a",
        "--seeds",
        "model=a,b",
        "--label",
        "a pseudo_data=no",
        "--keywords",
        f"mine={files}/kw.json",
    ]
    assert report(files, *more) == 0
    text = (files / "report" / "report.md").read_text()
    assert "## b against a" in text
    assert "## model over seeds (a, b)" in text
    assert "the <side>, mine (ours)" in text
    assert "- label pseudo_data: `no`" in text


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (["--compare", "a"], "--compare 'a' is not of the form NAME=NAME"),
        (["--compare", "a=c"], "there is no arm 'c'"),
        (["--seeds", "m=a,c"], "there is no arm 'c'"),
        (["--label", "c pseudo_data=no"], "is about no arm"),
        (["--label", "a colour=red"], "'colour' is not one of"),
        (["--metrics", "c=/nowhere/metrics.json"], "/nowhere/metrics.json"),
        (["--metrics", "c="], "is not of the form NAME=PATH"),
        (["--keywords", "mine=/nowhere.json"], "/nowhere.json"),
        (["--blur-faces"], "give their folder with --images"),
        (["--images", "/nowhere"], "does not exist"),
    ],
)
def test_faulty_options_are_the_users_to_mend(
    files: Path, capsys: pytest.CaptureFixture[str], more: list[str], fault: str
) -> None:
    capsys.readouterr()
    assert report(files, *more) == 2
    told = capsys.readouterr().err
    assert fault in told
    assert "Traceback" not in told
    assert not (files / "report").exists()


def test_nothing_to_report_on_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--output", str(tmp_path / "report")]) == 2
    assert "name a model with --arm or --metrics" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_is_stored_with_the_run(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{files}/mlflow.db")
    parent = tracking.open_parent_run("pipeline", {})
    assert report(files) == 0  # a run of its own
    client = tracking.connect()
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    (own,) = [run for run in client.search_runs([experiment.experiment_id]) if run.info.run_id != parent]
    assert own.info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    assert report(files) == 0
    assert len(client.search_runs([experiment.experiment_id])) == 2
    for run_id in (own.info.run_id, parent):
        stored = [item.path for item in client.list_artifacts(run_id, "report")]
        assert stored == ["report/report.html", "report/report.md"]
