"""The registry on a SQLite store: versions, their lineage, and a gate that holds or does not."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from locvlm import registry, tracking
from locvlm.cli import main
from locvlm.config import dump_config
from locvlm.errors import DataError, GateError, TrackingError
from locvlm.evaluation.metrics import paired_difference
from locvlm.presets import preset
from locvlm.records import fingerprint, write_json

FLOORED = "gate.must_beat_floor=[coco-spatial/accuracy]"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.initialise(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture(autouse=True)
def use_store(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


def make_model(folder: Path, weights: str, *overrides: str) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_text(weights)
    (folder / "config.json").write_text("{}")
    (folder / "locvlm.yaml").write_text(dump_config(preset("tiny", ["gate.must_beat_floor=[]", *overrides])))
    write_json(folder / "receipt.json", {"stage": "instruct", "parent": "align", "steps": 7, "data": {"generic": "g"}})
    return folder


def measured(
    right: Sequence[bool], low: float, high: float, floor: float | None = 0.5, ids: str = "q"
) -> dict[str, Any]:
    """The contents of a metrics.json of coco-spatial in which question i was answered `right[i]`."""
    figure = {"value": sum(right) / len(right), "n": len(right), "low": low, "high": high, "floor": floor}
    items = {f"{ids}{i}": {"image": f"{i}.png", "sums": {"accuracy": [int(ok), 1]}} for i, ok in enumerate(right)}
    return {"format": 1, "task": "coco-spatial", "n": len(right), "figures": {"accuracy": figure}, "items": items}


def add(folder: Path, name: str, metrics: dict[str, Any], *overrides: str) -> str:
    """Register a new model with these metrics; returns the version."""
    number = len(list(folder.iterdir()))
    model = make_model(folder / f"model-{number}", f"weights {number}", *overrides)
    write_json(folder / f"metrics-{number}.json", metrics)
    paths = {"coco-spatial": folder / f"metrics-{number}.json"}
    return registry.register(model, paths, name, {"git": "abc"}).version


def champion(name: str) -> str:
    return str(tracking.connect().get_registered_model(name).aliases.get("champion", ""))


def test_a_version_carries_its_lineage_its_figures_and_its_files(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "weights")
    write_json(tmp_path / "metrics.json", measured([True, True, False, True], 0.6, 0.9))
    made = registry.register(
        model, {"coco-spatial": tmp_path / "metrics.json"}, "lineage", {"git": "abc", "data": "md5"}
    )
    client = tracking.connect()
    version = client.get_model_version("lineage", made.version)
    assert version.tags["git"] == "abc"
    assert version.tags["data"] == "md5"
    assert version.tags["config"] == preset("tiny", ["gate.must_beat_floor=[]"]).fingerprint()
    assert version.tags["fingerprint"] == fingerprint(model)
    assert version.tags["places"] == "ivb-48-squash"
    assert version.tags["figure/coco-spatial/accuracy"] == "0.750 [0.600, 0.900], n 4, floor 0.500"
    assert str(client.get_registered_model("lineage").aliases["challenger"]) == made.version
    stored = Path(client.download_artifacts(made.run_id, "model", str(tmp_path)))
    assert (stored / "model.safetensors").read_text() == "weights"
    assert client.get_run(made.run_id).data.metrics == {"coco-spatial/accuracy": 0.75}


def test_registering_the_same_again_gives_the_same_version(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "weights")
    write_json(tmp_path / "metrics.json", measured([True], 0.2, 1.0))
    first = registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "again", {})
    second = registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "again", {})
    assert (first.is_new, second.is_new) == (True, False)
    assert (first.version, first.run_id) == (second.version, second.run_id)
    write_json(tmp_path / "metrics.json", measured([False], 0.0, 0.8))
    assert registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "again", {}).version == "2"


def test_large_weights_stay_where_they_are_and_the_version_points_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "LARGEST_UPLOAD", 5)
    model = make_model(tmp_path / "model", "weights")
    write_json(tmp_path / "metrics.json", measured([True], 0.2, 1.0))
    made = registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "large", {})
    client = tracking.connect()
    assert made.weights == model.as_uri()
    assert client.get_model_version("large", made.version).tags["weights"] == model.as_uri()
    names = {Path(entry.path).name for entry in client.list_artifacts(made.run_id, "model")}
    assert names == {"config.json", "locvlm.yaml", "receipt.json"}


def test_metrics_of_another_model_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "weights")
    metrics = {**measured([True], 0.2, 1.0), "model": {"fingerprint": "sha256:other"}}
    write_json(tmp_path / "metrics.json", metrics)
    with pytest.raises(DataError, match="measured with another model"):
        registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "other", {})


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"no locvlm\.yaml"):
        registry.register(tmp_path, {}, "none", {})


def test_the_first_model_above_its_floor_becomes_champion(tmp_path: Path) -> None:
    version = add(tmp_path, "first", measured([True] * 9 + [False], 0.6, 0.98), FLOORED)
    decision = registry.promote("first", version, paired_difference)
    assert decision.promoted
    assert (decision.champion, decision.comparison) == ("", "no champion")
    assert champion("first") == version
    assert registry.promote("first", version, paired_difference).comparison == "is champion already"
    client = tracking.connect()
    run_id = client.get_model_version("first", version).run_id
    assert [entry.path for entry in client.list_artifacts(run_id, "gate")] == ["gate/decision.json"]


def test_a_model_that_does_not_beat_its_floor_stays_a_challenger(tmp_path: Path) -> None:
    version = add(tmp_path, "floor", measured([True] * 6 + [False] * 4, 0.3, 0.85), FLOORED)
    decision = registry.promote("floor", version, paired_difference)
    assert not decision.promoted
    assert champion("floor") == ""
    with pytest.raises(
        GateError,
        match=r"floor gate, coco-spatial/accuracy: 0\.600 \[0\.300, .*, floor 0\.500: the low end is not above",
    ):
        decision.check()


@pytest.mark.parametrize(
    ("metrics", "override", "reason"),
    [
        (measured([True], 0.2, 1.0), "gate.must_beat_floor=[presence/f1]", "not measured; there are: coco-spatial/acc"),
        (measured([True], 0.2, 1.0, floor=None), FLOORED, "no floor or no interval"),
        (measured([True], 0.6, 1.0), "gate.primary=presence/f1", "not measured"),
    ],
)
def test_a_gate_on_a_figure_that_is_not_there_does_not_hold(
    tmp_path: Path, metrics: dict[str, Any], override: str, reason: str
) -> None:
    name = f"absent {tmp_path.name}"
    decision = registry.promote(name, add(tmp_path, name, metrics, override), paired_difference)
    assert not decision.promoted
    assert reason in decision.gates[0].reason


def test_models_that_answered_the_same_questions_are_compared_in_pairs(tmp_path: Path) -> None:
    half = [True, False] * 50
    first = add(tmp_path, "paired", measured(half, 0.4, 0.6))
    assert registry.promote("paired", first, paired_difference).promoted
    worse = add(tmp_path, "paired", measured([ok and i % 4 == 0 for i, ok in enumerate(half)], 0.17, 0.43))
    decision = registry.promote("paired", worse, paired_difference)
    assert decision.comparison == "paired, on the same questions"
    assert not decision.promoted
    # the two intervals overlap; only the pairs tell the models apart
    assert decision.gates[0].numbers["high"] > decision.gates[0].numbers["champion_low"]
    assert decision.gates[0].numbers["difference"] == pytest.approx(-0.25)
    assert champion("paired") == first
    with pytest.raises(GateError, match=rf"version {first} stays champion\n.*difference -0\.250"):
        decision.check()
    better = add(tmp_path, "paired", measured([True] * 100, 0.96, 1.0))
    assert registry.promote("paired", better, paired_difference).promoted
    assert champion("paired") == better


def test_a_tolerance_lets_a_slightly_worse_model_pass(tmp_path: Path) -> None:
    half = [True, False] * 50
    registry.promote("tolerant", add(tmp_path, "tolerant", measured(half, 0.4, 0.6)), paired_difference)
    worse = measured([ok and i % 4 == 0 for i, ok in enumerate(half)], 0.17, 0.43)
    version = add(tmp_path, "tolerant", worse, "gate.tolerance=0.3")
    assert registry.promote("tolerant", version, paired_difference).promoted


@pytest.mark.parametrize(("high", "holds"), [(0.55, True), (0.45, False)])
def test_models_of_different_questions_are_compared_by_their_intervals(
    tmp_path: Path, high: float, holds: bool
) -> None:
    name = f"intervals {holds}"
    registry.promote(name, add(tmp_path, name, measured([True, False], 0.5, 0.6)), paired_difference)
    version = add(tmp_path, name, measured([True, False, False], 0.2, high, ids="other"))
    decision = registry.promote(name, version, paired_difference)
    assert decision.comparison.startswith("intervals, because the two cannot be paired")
    assert decision.promoted is holds
    assert ("do not overlap" in decision.gates[0].reason) is not holds


def test_the_command_line_registers_and_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model", "weights", FLOORED)
    write_json(tmp_path / "m.json", measured([True, False], 0.1, 0.9))
    receipt, decision = tmp_path / "receipt.json", tmp_path / "decision.json"
    given = ["--model", str(model), "--metrics", str(tmp_path / "m.json"), "--name", "verbs", "--output", str(receipt)]
    assert main(["register", *given, "--tag", "data=md5"]) == 0
    version = json.loads(receipt.read_text())["version"]
    tags = tracking.connect().get_model_version("verbs", version).tags
    assert (tags["data"], tags["train.parent"], tags["train.data.generic"]) == ("md5", "align", "g")
    gate = ["promote", "--name", "verbs", "--version", version, "--output", str(decision)]
    assert main([*gate, "--report-only"]) == 0
    assert "floor gate, coco-spatial/accuracy" in capsys.readouterr().out
    decision.unlink()
    assert main(gate) == 2
    assert "floor gate, coco-spatial/accuracy: 0.500 [0.100, 0.900]" in capsys.readouterr().err
    assert json.loads(decision.read_text())["promoted"] is False


def test_mistakes_on_the_command_line_are_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model", "weights")
    write_json(tmp_path / "m.json", measured([True], 0.2, 1.0))
    shutil.copy(tmp_path / "m.json", tmp_path / "n.json")
    given = [
        "register",
        "--model",
        str(model),
        "--output",
        str(tmp_path / "o.json"),
        "--metrics",
        str(tmp_path / "m.json"),
    ]
    assert main([*given, str(tmp_path / "n.json")]) == 2
    assert "both of the task coco-spatial" in capsys.readouterr().err
    assert main([*given, "--tag", "no value"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err
    assert main(["promote", "--name", "nobody", "--version", "1", "--output", str(tmp_path / "d.json")]) == 2
    assert "nobody" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(given) == 2
    assert "talking to MLflow at http://127.0.0.1:9" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(given) == 2
    assert "MLFLOW_TRACKING_URI is not set" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
