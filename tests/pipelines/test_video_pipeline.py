"""The video pipeline from real videos to a registered model, with an untrained segmenter and two steps a stage."""

import json
import os
import sys
from pathlib import Path

import pytest

from locvlm import tracking
from locvlm.cli import main
from tests.segmenters import save_segmenter
from workflows import video_pipeline
from workflows.local_runner import RunFolder, run_pipeline

NAMES = ("cockatoo", "dog_eating", "playing_guitar")
TINY = [
    *(f"stages.{stage}.{setting}" for stage in ("align", "instruct") for setting in ("steps=2", "global_batch=4")),
    "cluster.num_workers=0",
    "evaluation.max_new_tokens=6",
    "video={n_frames: 4}",
    "stages.video={trainable: [adapter], learning_rate: 0.001, global_batch: 4, steps: 2}",
    "gate.must_beat_floor=[]",
    video_pipeline.GATE,
]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_videos_end_in_a_registered_model_and_answers_about_them(
    realdata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in NAMES:
        (videos / f"v_{name}.mp4").symlink_to(realdata / "videos" / f"{name}.mp4")
    asked = [{"video_name": n, "question": "is there a dog", "question_id": f"v_{n}_0"} for n in NAMES]
    told = [{"answer": "yes", "type": 3, "question_id": row["question_id"]} for row in asked]
    spoken = [{"q": "What is shown?", "a": "Something moves.", "video_id": f"v_{name}"} for name in NAMES]
    for name, rows in (("test_q", asked), ("test_a", told), ("instructions", spoken)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    scenes = tmp_path / "scenes"
    assert main(["data", "scenes", "--output", str(scenes), "--n-train", "20", "--n-test", "4"]) == 0
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.initialise(f"sqlite:///{tmp_path / 'mlflow.db'}"))
    folder = RunFolder(tmp_path / "run")
    arguments = {
        "root": str(folder.root),
        "data_root": str(scenes),
        "images": str(scenes / "images"),
        "videos": str(videos),
        "test_videos": str(videos),
        "video_instructions": str(tmp_path / "instructions.json"),
        "segmenter": str(save_segmenter("mask2former", tmp_path / "segmenter")),
        "features": True,
        "benchmarks": [
            {
                "task": "activitynet-qa",
                "data": str(tmp_path / "test_q.json"),
                "annotations": str(tmp_path / "test_a.json"),
                "images": str(videos),
                "judge": "exact",
            }
        ],
        "preset": "tiny",
        "overrides": TINY,
        "n_test": 4,
        "runner": "local",
        "code_version": "test",
    }
    run_pipeline(video_pipeline.make_pipeline(retries=0), arguments, folder, sys.stdout)
    receipts = {
        name: json.loads((folder.root / "models" / name / "receipt.json").read_text()) for name in ("image", "video")
    }
    assert (receipts["video"]["stage"], receipts["video"]["steps"]) == ("video", 2)
    assert receipts["video"]["parent"].endswith("image")
    assert set(receipts["video"]["data"]) == {"instructions", "activitynet"}
    figures = {
        path.name: json.loads(path.read_text())
        for path in (folder.root / "predictions" / "video").glob("*.metrics.json")
    }
    (qa,) = [content for content in figures.values() if content["task"] == "activitynet-qa"]
    assert qa["figures"]["accuracy"]["n"] == len(NAMES)
    assert qa["failures"] == {key: type(value)() for key, value in qa["failures"].items()}
    decision = json.loads((folder.root / "decision.json").read_text())
    assert (decision["version"], decision["promoted"]) == ("1", True)
    assert "ActivityNet" in (folder.root / "report" / "report.md").read_text()
