"""`locvlm lineage`, in both directions, of a version that a whole (small) pipeline run would leave."""

import json
from pathlib import Path
from typing import Any

import pytest

from locvlm import identity, registry, tracking
from locvlm.cli import main
from locvlm.config import dump_config
from locvlm.presets import preset
from locvlm.records import write_json

MD5 = "6ea46d53348e675e87743182f72de908.dir"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IMAGE = "locvlm@sha256:" + "1" * 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pipeline run with a training in a RayJob, and its version; and another version without any lineage."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        store = tracking.initialise(f"sqlite:///{folder / 'mlflow.db'}")
        patch.setenv("MLFLOW_TRACKING_URI", store)
        patch.setenv("LOCVLM_GIT_COMMIT", COMMIT)
        known = identity.begin(folder / "run", "kfp-1", {"code": "c1"})
        with identity.working_for(folder / "run"):
            patch.setenv("LOCVLM_RAY_JOB", "locvlm-train-align-1")
            with tracking.start_stage("align", "", {}, {}) as training:
                pass
            patch.delenv("LOCVLM_RAY_JOB")
            version = register(folder, "one", "--tag", f"data={MD5}", "--tag", f"image={IMAGE}", "--tag", "code=c1")
        other = register(folder, "two")
    found = {"store": store, "lineage": known.lineage, "training": training.run_id, "parent": known.mlflow_run}
    return {**found, "version": version, "other": other}


def register(folder: Path, name: str, *more: str) -> str:
    model = folder / name
    model.mkdir()
    (model / "model.safetensors").write_text(name)
    (model / "locvlm.yaml").write_text(dump_config(preset("tiny")))
    write_json(model / "receipt.json", {"stage": "instruct", "steps": 7, "data": {"generic": "g"}})
    figure = {"value": 0.5, "n": 1, "low": 0.0, "high": 1.0}
    write_json(
        folder / "m.json", {"format": 1, "task": "coco-spatial", "n": 1, "figures": {"accuracy": figure}, "items": {}}
    )
    argv = ["register", "--model", str(model), "--metrics", str(folder / "m.json"), "--name", "traced", *more]
    assert main([*argv, "--output", str(folder / "receipt.json")]) == 0
    return str(json.loads((folder / "receipt.json").read_text())["version"])


@pytest.fixture(autouse=True)
def use_store(made: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made["store"])


def test_a_version_tells_all_that_it_was_made_of_and_by(
    made: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lineage", made["version"], "--name", "traced"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"traced version {made['version']}\n  lineage     {made['lineage']}\n  data        {MD5}\n")
    for line in (
        f"  Git commit  {COMMIT}",
        "  code        c1",
        f"  image       {IMAGE}",
        "  trained     data.generic g, stage instruct, steps 7",
        "  KFP run     kfp-1",
        "  RayJob      locvlm-train-align-1",
        f"  MLflow run  {made['parent']}  run, running, the whole pipeline",
        f"  MLflow run  {made['training']}  align, finished, in locvlm-train-align-1",
        "  gates       not asked yet",
    ):
        assert line in said.splitlines(), said
    assert main(["lineage", "challenger", "--name", "traced"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        f"traced version {made['other']} (challenger)\n  lineage     unknown\n  data        unknown\n"
    )
    assert said.count("MLflow run") == 1


def test_the_runs_and_the_model_name_each_other_in_mlflow_itself(made: dict[str, str]) -> None:
    client = tracking.connect()
    version = client.get_model_version("traced", made["version"])
    assert version.tags["lineage"] == made["lineage"]
    for run_id in (made["parent"], version.run_id):
        assert client.get_run(run_id).data.tags["model"] == f"traced version {made['version']}"


@pytest.mark.parametrize(
    "way",
    [
        ["--lineage", "LINEAGE"],
        ["--data", MD5],
        ["--data", MD5[:12], "--name", "traced"],
        ["--commit", COMMIT[:7]],
        ["--code", "c1"],
        ["--image", IMAGE],
        ["--image", "locvlm"],
        ["--kfp-run", "kfp-1"],
        ["--job", "locvlm-train-align-1"],
        ["--run", "TRAINING"],
        ["--run", "PARENT"],
    ],
    ids=" ".join,
)
def test_each_thing_leads_back_to_the_version(
    way: list[str], made: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [made.get(word.lower(), word) for word in way]
    assert main(["lineage", *words]) == 0
    found = capsys.readouterr().out.splitlines()
    assert f"traced version {made['version']}" in found
    # the commit and the configuration are those of both; nothing else leads to the one without a lineage
    assert (len(found) == 1) == (way[0] != "--commit")


def test_the_answers_are_to_be_had_as_json(made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", made["version"], "--name", "traced", "--json"]) == 0
    origin: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (origin["lineage"], origin["kfp_runs"]) == (made["lineage"], ["kfp-1"])
    assert origin["ray_jobs"] == ["locvlm-train-align-1"]
    assert main(["lineage", "--data", MD5, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "traced", "version": made["version"]}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a version (a number or an alias) or one of --lineage, --data"),
        (["1", "--data", MD5], "give a version"),
        (["9", "--name", "traced"], "tracing traced version 9: there is none; there are 1, 2, challenger"),
        (["1", "--name", "nobody"], "no model of this name"),
        (["--job", "unheard-of"], "no version of any model was made of --job unheard-of"),
        (["--run", "0" * 32], "was made of --run"),
    ],
)
def test_a_question_without_an_answer_is_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lineage", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_another_run_came_to_again_is_found_by_both(
    made: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "again"
    first = identity.begin(tmp_path / "first", "", {})
    second = identity.begin(tmp_path / "second", "", {})
    versions = []
    for number, known in enumerate((first, second)):
        monkeypatch.setenv("LOCVLM_LINEAGE", known.lineage)
        if number == 0:
            versions.append(register(tmp_path, "again"))
        else:
            argv = ["register", "--model", str(model), "--metrics", str(tmp_path / "m.json"), "--name", "traced"]
            assert main([*argv, "--output", str(tmp_path / "r.json")]) == 0
            versions.append(json.loads((tmp_path / "r.json").read_text())["version"])
    assert versions[0] == versions[1]
    for known in (first, second):
        assert registry.find("lineage", known.lineage) == [("traced", versions[0])]
