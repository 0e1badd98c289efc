"""The registry on a SQLite store: versions, their lineage, and a gate that holds or does not."""

import json
import re
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
from locvlm.registry import versions
from locvlm.registry.champion import PROMOTED, Change, crown, history
from locvlm.registry.checkpoints import fetch_checkpoint

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
    stored = fetch_checkpoint("models:/lineage@challenger", tmp_path / "fetched")
    assert fingerprint(stored.folder) == fingerprint(model)
    assert (stored.name, stored.version) == ("lineage", made.version)
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
    monkeypatch.setattr(versions, "LARGEST_UPLOAD", 5)
    model = make_model(tmp_path / "model", "weights")
    write_json(tmp_path / "metrics.json", measured([True], 0.2, 1.0))
    made = registry.register(model, {"coco-spatial": tmp_path / "metrics.json"}, "large", {})
    client = tracking.connect()
    assert made.weights == model.as_uri()
    assert client.get_model_version("large", made.version).tags["weights"] == model.as_uri()
    names = {Path(entry.path).name for entry in client.list_artifacts(made.run_id, "model/artifacts/checkpoint")}
    assert names == {"config.json", "locvlm.yaml", "receipt.json"}
    assert fetch_checkpoint(f"models:/large/{made.version}", tmp_path / "fetched").folder == model
    (model / "model.safetensors").write_text("another training's weights")
    with pytest.raises(TrackingError, match="no longer holds what was registered"):
        fetch_checkpoint(f"models:/large/{made.version}", tmp_path / "fetched")
    model.rename(tmp_path / "elsewhere")
    with pytest.raises(TrackingError, match=f"left in {model}, which is not there; mount"):
        fetch_checkpoint(f"models:/large/{made.version}", tmp_path / "fetched")


@pytest.mark.parametrize(
    ("uri", "words"),
    [("models:/nobody@champion", "nobody"), ("models:/a/b/c", "models:/NAME@ALIAS"), ("runs:/x", "models:/NAME@ALIAS")],
)
def test_a_version_that_is_not_there_is_told(tmp_path: Path, uri: str, words: str) -> None:
    with pytest.raises(TrackingError, match=words):
        fetch_checkpoint(uri, tmp_path)


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
    with pytest.raises(GateError, match=rf"version {first} stays champion\n.*paired difference -0\.250"):
        decision.check()
    better = add(tmp_path, "paired", measured([True] * 100, 0.96, 1.0))
    assert registry.promote("paired", better, paired_difference).promoted
    assert champion("paired") == better


def test_a_wide_interval_does_not_pass_whatever_its_middle(tmp_path: Path) -> None:
    """One question better of ten: the interval of the difference begins below 0, and nothing is proven."""
    first = add(tmp_path, "wide", measured([True] * 5 + [False] * 5, 0.2, 0.8))
    registry.promote("wide", first, paired_difference)
    right = [False, *[True] * 6, False, False, False]  # one lost, two won
    decision = registry.promote("wide", add(tmp_path, "wide", measured(right, 0.3, 0.9)), paired_difference)
    numbers = decision.gates[0].numbers
    assert numbers["difference_low"] < 0 < numbers["difference"] < numbers["difference_high"]
    assert not decision.promoted
    assert re.search(
        r"paired difference \+0\.100 \[-0\.\d+, \+0\.\d+\], its low end is below 0$", decision.gates[0].reason
    )
    assert champion("wide") == first


def test_an_identical_model_holds_and_a_surely_better_one_too(tmp_path: Path) -> None:
    half = [True, False] * 50
    registry.promote("same", add(tmp_path, "same", measured(half, 0.4, 0.6)), paired_difference)
    twin = registry.promote("same", add(tmp_path, "same", measured(half, 0.4, 0.6)), paired_difference)
    assert twin.promoted
    assert twin.gates[0].reason.endswith("paired difference +0.000 [+0.000, +0.000], its low end is not below 0")


def test_a_tolerance_is_a_margin_of_non_inferiority(tmp_path: Path) -> None:
    half = [True, False] * 50
    registry.promote("tolerant", add(tmp_path, "tolerant", measured(half, 0.4, 0.6)), paired_difference)
    worse = measured([ok and i % 4 == 0 for i, ok in enumerate(half)], 0.17, 0.43)
    narrow = add(tmp_path, "tolerant", worse, "gate.tolerance=0.3")  # -0.25, but it may be -0.34
    decision = registry.promote("tolerant", narrow, paired_difference)
    assert not decision.promoted
    assert decision.gates[0].reason.endswith("its low end is below -0.3")
    wide = add(tmp_path, "tolerant", worse, "gate.tolerance=0.4")
    assert registry.promote("tolerant", wide, paired_difference).promoted


@pytest.mark.parametrize(("low", "holds"), [(0.5, True), (0.45, False)])
def test_models_of_different_questions_hold_if_their_low_end_reaches_the_champions_value(
    tmp_path: Path, low: float, holds: bool
) -> None:
    name = f"intervals {holds}"
    registry.promote(name, add(tmp_path, name, measured([True, False], 0.4, 0.6)), paired_difference)
    version = add(tmp_path, name, measured([True, True, False], low, 0.9, ids="other"))
    decision = registry.promote(name, version, paired_difference)
    assert decision.comparison.startswith("not paired: comparing two models on accuracy: the first has 3 questions")
    assert decision.promoted is holds
    end = f"the questions differ, and the low end of its interval is {'not below' if holds else 'below'} 0.500"
    assert decision.gates[0].reason.endswith(end)


def test_figures_of_different_judges_are_not_compared(tmp_path: Path) -> None:
    registry.promote(
        "judges", add(tmp_path, "judges", measured([True] * 4, 0.5, 1) | {"judge": "exact"}), paired_difference
    )
    version = add(tmp_path, "judges", measured([True] * 4, 1, 1) | {"judge": "lexical"})
    decision = registry.promote("judges", version, paired_difference)
    assert not decision.promoted
    assert "different judges (lexical, exact): score both with one" in decision.gates[0].reason


def crowned(folder: Path, name: str, n: int) -> list[str]:
    """That many champions, one after the other."""
    made = [add(folder, name, measured([True] * (20 + i), 0.9, 1.0, ids=f"set {i} ")) for i in range(n)]
    for version in made:
        client = tracking.connect()
        client.set_model_version_tag(name, version, "gates", "held")
        before = champion(name)
        crown(client, name, Change(version, before, PROMOTED, "a test", ""))
    return made


def test_a_rollback_goes_one_champion_back_each_time_and_says_who_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three = crowned(tmp_path, "back", 3)
    assert main(["rollback", "--name", "back", "--reason", "sees cats everywhere", "--by", "ann"]) == 0
    assert champion("back") == two
    said = capsys.readouterr().out
    assert f"back version {two} is champion again, in place of version {three}" in said
    assert "ann: sees cats everywhere" in said
    client = tracking.connect()
    assert client.get_model_version("back", three).tags["rolled_back"].endswith("by ann: sees cats everywhere")
    assert main(["rollback", "--name", "back", "--reason", "and dogs"]) == 0
    assert champion("back") == one
    changes = history(client, "back")
    assert [(change.before, change.version, change.how) for change in changes] == [
        ("", one, "promoted"),
        (one, two, "promoted"),
        (two, three, "promoted"),
        (three, two, "rolled back"),
        (two, one, "rolled back"),
    ]
    assert "@" in changes[-1].by
    assert main(["rollback", "--name", "back", "--reason", "more"]) == 2
    assert f"no champion is known before version {one}; name a version with --to (there are 1, 2, 3)" in (
        capsys.readouterr().err
    )
    assert main(["rollback", "--name", "back", "--reason", "it was the data", "--to", three]) == 0
    assert champion("back") == three
    assert main(["rollback", "--name", "back", "--reason", "again"]) == 0
    assert champion("back") == one


def test_a_promotion_is_part_of_the_history(tmp_path: Path) -> None:
    half = [True, False] * 50
    first = add(tmp_path, "told", measured(half, 0.4, 0.6))
    second = add(tmp_path, "told", measured([True] * 100, 0.96, 1.0))
    for version in (first, second, second):
        registry.promote("told", version, paired_difference)
    changes = history(tracking.connect(), "told")
    assert [(change.before, change.version, change.by) for change in changes] == [
        ("", first, "the gate"),
        (first, second, "the gate"),
    ]
    registry.rollback("told", "a reason", "me")
    assert champion("told") == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "9"], "to version 9: there is none; there are 1, 2"),
        (["--to", "1"], "to version 1: it is champion already"),
        (["--to", "2"], "to version 2: it never was champion, and its gates were never asked"),
        (["--name", "nobody"], "rolling nobody back: the registry has no model of this name"),
        (["--name", "headless"], "rolling headless back: it has no champion"),
    ],
)
def test_a_rollback_to_nonsense_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    client = tracking.connect()
    if not client.search_registered_models(filter_string="name = 'nonsense'"):
        crowned(tmp_path, "nonsense", 1)
        add(tmp_path, "nonsense", measured([True], 0.2, 1.0))
        add(tmp_path, "headless", measured([True], 0.2, 1.0))
    assert main(["rollback", "--name", "nonsense", "--reason", "r", *options]) == 2
    assert message in capsys.readouterr().err
    assert champion("nonsense") == "1"


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
