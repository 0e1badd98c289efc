"""What MLflow shows of a run: its few parameters, and the figures of its model beside its curve."""

from pathlib import Path

import pytest

from locvlm import tracking
from locvlm.cli.story import params_of, tell
from locvlm.evaluation.arms import Arm, Result
from locvlm.presets import preset
from workflows.image_pipeline import BASELINE


def test_two_arms_differ_in_what_was_changed_alone() -> None:
    arms = [params_of(preset("tiny", changes), "instruct", "align", 2) for changes in ([], [BASELINE])]
    assert [key for key in arms[0] if arms[0][key] != arms[1][key]] == ["mixture"]
    assert arms[1]["mixture"] == "generic caption 0.4, generic presence 0.4, generic stated_left_right 0.2"
    assert arms[0]["places"] == "ivb 48, squash"
    assert len(arms[0]) < 15
    paper = params_of(preset("locvlm-b"), "align", "the foundation", 8)
    assert (paper["length"], paper["starts from"], paper["engine"]) == (
        "1 epochs",
        "the foundation",
        "zero2, 8 workers",
    )


def arm(name: str, accuracy: float, model: str) -> Arm:
    figures = {"accuracy": {"value": accuracy}, "accuracy_left": {"value": 0.1}}
    metrics = {"task": "coco-spatial", "primary": "accuracy", "figures": figures}
    silent = {"task": "presence", "primary": "accuracy", "figures": {"accuracy": {"value": None}}}
    receipt = {"model": {"fingerprint": "of the folder", "receipt": {"fingerprint": model}}}
    return Arm(name, (Result({**metrics, **receipt}, {}, {}), Result({**silent, **receipt}, {}, {})), {})


def test_every_arms_figures_go_to_the_run_that_trained_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tracking.initialise(f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    parent = tracking.open_parent_run("tiny-1", {})
    monkeypatch.setenv("MLFLOW_RUN_ID", parent)
    runs = {}
    for name in ("locvlm", "locvlm", "baseline"):  # the first try of one: the newest counts
        with tracking.start_stage(name, "", {}, {}) as run:
            run.log_metrics({"loss": 1.0}, 1)
            tracking.set_tags(run.run_id, {"fingerprint": f"sha256:{name}"})
        runs[name] = run.run_id
    tell(
        [
            arm("LocVLM", 0.5, "sha256:locvlm"),
            arm("no ICL, please", 0.25, "sha256:baseline"),
            arm("stock", 0.75, "sha256:nobody"),
        ]
    )
    client = tracking.connect()
    found = {name: client.get_run(run_id).data for name, run_id in runs.items()}
    assert found["locvlm"].metrics == {"loss": 1.0, "coco-spatial/accuracy": 0.5}
    assert found["locvlm"].tags["arm"] == "LocVLM"
    assert found["baseline"].metrics["coco-spatial/accuracy"] == 0.25
    assert client.get_run(parent).data.metrics == {
        "LocVLM/coco-spatial/accuracy": 0.5,
        "no ICL  please/coco-spatial/accuracy": 0.25,  # MLflow takes no comma there
        "stock/coco-spatial/accuracy": 0.75,
    }
