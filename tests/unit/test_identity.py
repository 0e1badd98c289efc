"""The lineage id of a run: born once, joined by whoever goes on, told to MLflow, under KFP's run if there is one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from locvlm import identity, tracking
from locvlm.cli import main
from locvlm.cli.steps import run_step
from locvlm.errors import DataError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.initialise(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture
def client(store: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    return tracking.connect()


def test_the_id_is_born_once_and_every_kfp_run_joins_it(client: Any, tmp_path: Path) -> None:
    root = tmp_path / "tiny-1"
    first = identity.begin(root, "kfp-1", {"code": "c1"})
    tracking.resume_run(first.mlflow_run).close("FAILED", "a step failed")
    second = identity.begin(root, "kfp-2", {"code": "c1", "preset": "tiny"})
    assert (second.lineage, second.mlflow_run) == (first.lineage, first.mlflow_run)
    assert second.kfp_runs == ("kfp-1", "kfp-2")
    assert identity.read(root) == second
    run = client.get_run(first.mlflow_run)
    assert (run.info.run_name, run.info.status) == ("tiny-1", "RUNNING")
    assert run.data.tags["lineage"] == first.lineage
    assert identity.begin(tmp_path / "tiny-2", "kfp-1", {}).lineage != first.lineage


def test_the_steps_of_a_run_work_under_its_name_and_its_end_is_told(client: Any, tmp_path: Path) -> None:
    known = identity.begin(tmp_path, "", {})
    seen: dict[str, str] = {}
    with identity.working_for(tmp_path):
        seen |= {name: os.environ[name] for name in ("LOCVLM_LINEAGE", "MLFLOW_RUN_ID")}
        with tracking.start_stage("align", "", {}, {}) as run:
            pass
    assert seen == {"LOCVLM_LINEAGE": known.lineage, "MLFLOW_RUN_ID": known.mlflow_run}
    assert not {"LOCVLM_LINEAGE", "MLFLOW_RUN_ID"} & set(os.environ)
    tags = client.get_run(run.run_id).data.tags
    assert (tags["lineage"], tags["mlflow.parentRunId"]) == (known.lineage, known.mlflow_run)
    with pytest.raises(RuntimeError):
        run_step(["config", "--preset", "tyni"], log=f"{tmp_path}/logs/resolve-config.log")
    failed = client.get_run(known.mlflow_run)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["mlflow.note.content"].startswith("resolve-config: locvlm: looking up the preset 'tyni'")
    run_step(["config", "--preset", "tiny"], log=f"{tmp_path}/logs/report.log", is_last=True)
    assert client.get_run(known.mlflow_run).info.status == "FINISHED"


def kfp_run(client: Any) -> tuple[str, str]:
    """What KFP's integration makes: a run for the pipeline and one for the step, in an experiment of its own."""
    experiment = client.create_experiment(f"KFP {os.urandom(4).hex()}")
    outer = client.create_run(experiment, run_name="pipeline").info.run_id
    return outer, client.create_run(experiment, run_name="step", tags={"mlflow.parentRunId": outer}).info.run_id


def test_kfps_own_run_is_joined_and_left_for_kfp_to_close(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, task = kfp_run(client)
    n_runs = len(client.search_runs([client.get_run(outer).info.experiment_id]))
    monkeypatch.setenv("MLFLOW_RUN_ID", task)
    known = identity.begin(tmp_path, "kfp-1", {"code": "c1"})
    assert (known.mlflow_run, known.ours) == (outer, False)
    for run_id in (outer, task):
        assert client.get_run(run_id).data.tags["lineage"] == known.lineage
    run_step(["config", "--preset", "tiny"], log=f"{tmp_path}/logs/report.log", is_last=True)
    assert client.get_run(outer).info.status == "RUNNING"
    with identity.working_for(tmp_path):
        assert os.environ["MLFLOW_RUN_ID"] == task
    monkeypatch.delenv("MLFLOW_RUN_ID")
    with identity.working_for(tmp_path):  # a server that does not tell its steps their run
        assert os.environ["MLFLOW_RUN_ID"] == outer
    assert len(client.search_runs([client.get_run(outer).info.experiment_id])) == n_runs


def test_kfps_configuration_is_read_where_it_sets_no_variables_of_mlflow(
    client: Any, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer, _ = kfp_run(client)
    experiment = client.get_run(outer).info.experiment_id
    config = {"endpoint": store, "parentRunId": outer, "experimentId": experiment, "authType": "none"}
    monkeypatch.setenv("KFP_MLFLOW_CONFIG", json.dumps({**config, "workspacesEnabled": True, "workspace": "team"}))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with identity.working_for(tmp_path):
        names = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_WORKSPACE")
        assert [os.environ[name] for name in names] == [store, outer, experiment, "team"]
    monkeypatch.setenv("KFP_MLFLOW_CONFIG", json.dumps(config))
    assert identity.begin(tmp_path, "kfp-1", {}).mlflow_run == outer


@pytest.mark.parametrize("config", ["no JSON", '{"endpoint": "http://elsewhere:5000", "parentRunId": "r"}', "[]"])
def test_a_configuration_of_kfp_that_is_of_no_use_is_told_and_left(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, config: str
) -> None:
    monkeypatch.setenv("KFP_MLFLOW_CONFIG", config)
    assert identity.begin(tmp_path, "kfp-1", {}).ours
    assert "KFP" in caplog.text


def test_a_run_on_another_server_of_kfps_is_not_taken_for_one_of_ours(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KFP_MLFLOW_CONFIG", '{"endpoint": "http://elsewhere:5000", "parentRunId": "r"}')
    monkeypatch.setenv("MLFLOW_RUN_ID", "a run there")
    known = identity.begin(tmp_path, "kfp-1", {})
    assert known.ours
    with identity.working_for(tmp_path):
        assert os.environ["MLFLOW_RUN_ID"] == known.mlflow_run
    assert os.environ["MLFLOW_RUN_ID"] == "a run there"


def test_without_a_tracking_server_a_run_has_its_id_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["begin", "--root", str(tmp_path), "--kfp-run", "k", "--tag", "code=c"]) == 0
    known = identity.read(tmp_path)
    assert known is not None
    assert capsys.readouterr().out.startswith(f"lineage {known.lineage}, begun ")
    assert (known.mlflow_run, known.tags) == ("", {"code": "c"})


@pytest.mark.parametrize("content", ["{}", '{"lineage": "a b", "began": "now", "kfp_runs": []}', "[]", "no JSON"])
def test_a_lineage_file_that_is_none_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "lineage.json").write_text(content)
    with pytest.raises(DataError, match=r"lineage\.json"):
        identity.read(tmp_path)


def test_an_end_that_cannot_be_told_ends_nothing(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    identity.begin(tmp_path, "", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    identity.end(tmp_path, "FAILED", "why")
    assert "could not be marked FAILED" in caplog.text
