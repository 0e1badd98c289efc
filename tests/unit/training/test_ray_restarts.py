"""What lies in a run's folder when Ray Train starts its workers again."""

import json
from pathlib import Path

import pytest
import torch

from locvlm.errors import UserError
from locvlm.presets import preset
from locvlm.training.ray_train import _forget_removed, _worker
from locvlm.training.stage import Job


def test_what_the_user_has_to_mend_is_told_again_without_loading_a_model(tmp_path: Path) -> None:
    job = Job("align", preset("tiny"), {"generic": tmp_path / "no"}, tmp_path, tmp_path / "out", tmp_path / "no model")
    job.folder.mkdir()
    (job.folder / "refusal.json").write_text(json.dumps({"message": "the batch does not fit"}))
    with pytest.raises(UserError, match=r"^the batch does not fit$"):
        _worker(job.to_dict())


def test_what_the_user_has_to_mend_is_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locvlm.training.ray_train.get_device", lambda: torch.device("cpu"))
    job = Job("align", preset("tiny"), {"generic": tmp_path / "no"}, tmp_path, tmp_path / "out", tmp_path / "no model")
    for _ in range(2):
        with pytest.raises(UserError, match="no model"):
            _worker(job.to_dict())
    assert "no model" in json.loads((job.folder / "refusal.json").read_text())["message"]


def test_a_disk_that_cannot_keep_it_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locvlm.training.ray_train.get_device", lambda: torch.device("cpu"))
    job = Job("align", preset("tiny"), {"generic": tmp_path / "no"}, tmp_path, tmp_path / "out", tmp_path / "no model")
    (job.folder / "refusal.json").mkdir(parents=True)  # no file can take its place
    with pytest.raises(UserError, match="no model"):
        _worker(job.to_dict())


def snapshot(folder: Path, *steps: int) -> Path:
    """Ray's list of checkpoints at these steps, as far as it is read here; a folder for each."""
    results = [{"version": 0, "checkpoint_dir_name": f"step-{step}", "metrics": {"step": step}} for step in steps]
    for result in results:
        (folder / str(result["checkpoint_dir_name"])).mkdir(parents=True)
    path = folder / "checkpoint_manager_snapshot.json"
    state = {"checkpoint_results": results, "checkpoint_report_indices": list(range(len(steps))), "ray_version": "x"}
    path.write_text(json.dumps({**state, "latest_checkpoint_result": results[-1]}))
    return path


def test_a_removed_checkpoint_is_forgotten_and_the_one_before_is_the_last(tmp_path: Path) -> None:
    path = snapshot(tmp_path / "ray", 4, 8)
    untouched = path.read_bytes()
    _forget_removed(tmp_path / "ray")
    assert path.read_bytes() == untouched
    (tmp_path / "ray" / "step-8").rmdir()
    _forget_removed(tmp_path / "ray")
    state = json.loads(path.read_text())
    assert [result["checkpoint_dir_name"] for result in state["checkpoint_results"]] == ["step-4"]
    assert state["checkpoint_report_indices"] == [0]
    assert state["latest_checkpoint_result"]["metrics"] == {"step": 4}
    assert state["ray_version"] == "x"


def test_without_any_checkpoint_the_run_begins_again(tmp_path: Path) -> None:
    snapshot(tmp_path / "ray", 4)
    (tmp_path / "ray" / "step-4").rmdir()
    _forget_removed(tmp_path / "ray")
    assert not (tmp_path / "ray").exists()
    _forget_removed(tmp_path / "ray")
