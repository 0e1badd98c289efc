"""`python -m workflows.run_local`, as far as it goes without training: mistakes, names of runs, the summary."""

import json
from pathlib import Path

import pytest

from workflows import provenance, run_local


def start(folder: Path, *options: str) -> int:
    return run_local.main(["--runs", str(folder / "runs"), "--scenes", str(folder / "scenes"), *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "sed=1"], "sed: there is no such setting; did you mean seed?"),
        (["--preset", "tyni"], "it must be one of tiny"),
        (["--arms", "nfp"], "--arms is for --pipeline ablation"),
        (["--pipeline", "ablation", "--arms", "npf"], "there is no arm npf; there are full, nfp"),
        (["--data", "instances.json"], "--images, the folder of its images, is needed too"),
        (["--data", "instances.json", "--images", "."], "there is no such file"),
        (["--dvc-remote", "s3://bucket/data"], "--data-md5, the version, is needed"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert start(tmp_path, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "run `make demo` again" in said
    assert list(tmp_path.iterdir()) == []


def test_a_tracking_server_that_is_away_is_told_before_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert start(tmp_path, "--n-train", "8", "--n-test", "8") == 2
    said = capsys.readouterr().err
    assert "talking to MLflow at http://127.0.0.1:9: " in said
    assert "run `make demo` again" in said
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["prepare.log"]


def test_a_file_that_is_not_cocos_is_told_in_the_verbs_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text('{"images": []}')
    assert start(tmp_path, "--data", str(tmp_path / "mine.json"), "--images", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "data coco failed:\n  locvlm: reading" in said
    assert f"its log: {tmp_path}/runs/prepare.log" in said
    assert (tmp_path / "runs" / "prepare.log").read_text().startswith("$ locvlm data coco --annotations")


def test_an_equal_run_has_an_equal_name_and_any_change_another() -> None:
    name = provenance.run_name("tiny", ["config", "md5", 0])
    assert name == provenance.run_name("tiny", ["config", "md5", 0])
    assert name.startswith("tiny-")
    assert len({name, *(provenance.run_name("tiny", parts) for parts in (["config", "md5", 1], ["c", "md5", 0]))}) == 3


def test_the_code_version_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in provenance.PACKAGES:
        (tmp_path / package / "__pycache__").mkdir(parents=True)
        (tmp_path / package / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    first = provenance.code_version()
    (tmp_path / "locvlm" / "__pycache__" / "a.pyc").write_text("bytecode")
    assert provenance.code_version() == first
    (tmp_path / "components" / "a.py").write_text("a = 2\n")
    assert provenance.code_version() != first


def test_the_summary_shows_both_arms_the_gate_and_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("locvlm", 0.75), ("baseline", 0.5)):
        folder = tmp_path / "predictions" / name
        folder.mkdir(parents=True)
        metrics = {"task": "coco-spatial", "figures": {"accuracy": {"value": value}}}
        (folder / "coco-spatial.metrics.json").write_text(json.dumps(metrics))
    gate = {"gate": "floor", "figure": "presence/accuracy", "held": False, "reason": "0.4 is not above 0.5"}
    decision = {"name": "locvlm", "version": "3", "promoted": False, "gates": [gate]}
    (tmp_path / "decision.json").write_text(json.dumps(decision))
    run_local._summarise(tmp_path, run_local.ARMS, "sqlite:////runs/mlflow.db", 312.0)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "            coco-spatial/accuracy",
        "  LocVLM                    0.750",
        "  baseline                  0.500",
        "",
        "model:   locvlm version 3, alias challenger (a gate did not hold)",
        "         floor gate, presence/accuracy: 0.4 is not above 0.5",
        f"report:  {tmp_path}/report/report.html",
        "MLflow:  make ui   (mlflow ui --backend-store-uri sqlite:////runs/mlflow.db)",
        "time:    5 min 12 s",
    ]
