"""Retraining, for real on this machine: new data is trained on, judged and registered; the same data is left alone."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from locvlm import tracking
from locvlm.cli import main
from locvlm.registry import standing, trace
from workflows.local_runner import RunFolder, run_pipeline
from workflows.retrain_pipeline import make_pipeline

TINY = ["stages.align.steps=2", "stages.instruct.steps=2", "stages.align.global_batch=4", "cluster.num_workers=0"]
TINY += ["stages.instruct.global_batch=4", "evaluation.max_new_tokens=6"]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few scenes in a DVC remote, and the .dvc file that pins them."""
    programs = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", os.pathsep.join([programs, os.environ["PATH"]]))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    folder = tmp_path / "published"
    assert main(["data", "scenes", "--output", str(folder / "data"), "--n-train", "40", "--n-test", "16"]) == 0
    for command in (
        ["init", "--quiet", "--no-scm"],
        ["remote", "add", "--quiet", "--default", "local", str(tmp_path / "remote")],
        ["add", "--quiet", "data"],
        ["push", "--quiet"],
    ):
        subprocess.run(["dvc", *command], cwd=folder, check=True)
    return folder / "data.dvc"


def retrain(folder: Path, dvc_file: Path) -> tuple[str, dict[str, Any]]:
    """Run the pipeline; returns what a person saw and the newest answer of `locvlm due`."""
    runs = folder / "runs"
    out = io.StringIO()
    arguments = {
        "dvc_file": str(dvc_file),
        "dvc_remote": str(folder / "remote"),
        "runs": str(runs),
        "data": str(folder / "data"),
        "captions": "captions_train.json",
        "preset": "tiny",
        "overrides": TINY,
        "n_test": 4,
        "runner": "local",
        "code_version": "c1",
    }
    run_pipeline(make_pipeline(retries=0), arguments, RunFolder(runs), out)
    newest = max((runs / "due").iterdir(), key=lambda path: path.stat().st_mtime)
    return out.getvalue(), json.loads(newest.read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_new_data_is_trained_on_once(published: Path, tmp_path: Path) -> None:
    said, found = retrain(tmp_path, published)
    assert found["due"]
    assert "train: instruct, locvlm" in said
    root = tmp_path / "runs" / found["run"]
    assert (root / "report" / "report.html").is_file()
    assert (root / "decision.json").is_file()
    assert not list((tmp_path / "runs").glob("*.claim"))
    assert (tmp_path / "data" / found["inputs"]["data"].removesuffix(".dir") / "instances_train.json").is_file()

    known = standing("locvlm", found["inputs"])
    assert known.judged == "1"
    origin = trace("locvlm", "1")
    assert origin.lineage == json.loads((root / "lineage.json").read_text())["lineage"]
    assert (origin.data, origin.code, len(origin.kfp_runs)) == (found["inputs"]["data"], "c1", 1)
    runs = {run.name: run for run in origin.runs}
    assert runs.keys() == {found["run"], "align", "locvlm", "baseline", "register locvlm"}
    assert {run.status for run in runs.values()} == {"FINISHED"}
    assert runs[found["run"]].is_parent
    client = tracking.connect()
    for arm, name in (("LocVLM", "locvlm"), ("baseline", "baseline")):
        data = client.get_run(runs[name].id).data
        assert data.tags["arm"] == arm
        assert {"loss", "coco-spatial/accuracy", "presence/accuracy"} <= data.metrics.keys()

    said, again = retrain(tmp_path, published)
    assert not again["due"]
    assert again["why"].startswith("nothing to do: locvlm version 1 was made from data ")
    assert again["why"] in (tmp_path / "runs" / "logs" / "due.log").read_text()
    assert "train" not in said
    assert [line.split("]")[1].split("  ")[0].strip() for line in said.splitlines()] == [
        "look for changes",
        "look for changes",
        "give the claim back",
        "give the claim back",
    ]
